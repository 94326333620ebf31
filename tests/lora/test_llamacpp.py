"""llama.cpp adapter files, checked by logits: a second reader and a second Llama, written from llama.cpp's rules.

`LlamaCpp` shares no code with minilora. It keeps the rows of q and k as adjacent pairs and rotates those, finds each
adapter's scale as llama-adapter.cpp does, and adds the update as llama-graph.cpp does.
"""

import dataclasses

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelfiles import CONFIG, write_gguf
from models import Net

from minilora.engine.tensor import no_grad
from minilora.files.disk import ModelFileError
from minilora.io.gguf import GGUF
from minilora.lora import llamacpp
from minilora.lora.adapters import (
    adapter_state,
    add_adapter,
    lora_modules,
    remove_adapter,
)
from minilora.lora.config import LoraConfig
from minilora.lora.llamacpp import load_gguf_adapter, save_gguf_adapter
from minilora.lora.peft import load_adapter, save_adapter
from minilora.nn.llama import Llama
from minilora.nn.module import sha256_of

IDS = np.arange(12) * 29 % CONFIG.vocab_size
QUERY = "blk.0.attn_q.weight"
SETTINGS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "every linear layer": {"target_modules": "all-linear"},
    "rsLoRA": {"use_rslora": True, "target_modules": ["q_proj", "k_proj", "down_proj"]},
    "an alpha below one": {"lora_alpha": 0.3},
    "ranks by pattern": {"rank_pattern": {"k_proj": 2, "down_proj": 7}},
    "alphas by pattern": {"alpha_pattern": {"v_proj": 3, r"layers\.0\.mlp\.up_proj": 40}},
    "ranks and alphas with rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    "one block only": {"layers_to_transform": 1},
    "PiSSA": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "k_proj", "up_proj"]},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


class LlamaCpp:
    """A Llama in a GGUF file of float32, with an adapter file or without, computed as llama.cpp does."""

    def __init__(self, model, adapter=None, user_scale=1.0):
        self.meta, self.w = self.read(model)
        self.lora, self.user_scale = {}, user_scale
        if adapter is None:
            return
        meta, tensors = self.read(adapter)
        assert meta["general.type"] == "adapter"
        assert meta["general.architecture"] == self.meta["general.architecture"]
        assert meta["adapter.type"] == "lora"
        self.alpha = meta["adapter.lora.alpha"]
        for name in tensors:
            assert name.endswith((".lora_a", ".lora_b")), f"LoRA tensor {name} has unexpected suffix"
        for name in {name.rsplit(".", 1)[0] for name in tensors}:
            a, b, w = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], self.w[name]
            if name == "token_embd.weight":
                assert w.shape[1] == b.shape[0] and w.shape[0] == a.shape[0], "incorrect shape"
            else:
                assert w.shape[1] == a.shape[1] and w.shape[0] == b.shape[0], "incorrect shape"
                assert a.shape[0] == b.shape[1], "lora_a tensor is not transposed"
            self.lora[name] = a, b

    @staticmethod
    def read(path):
        reader = gguf.GGUFReader(path)
        tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
        return {key: field.contents() for key, field in reader.fields.items()}, tensors

    def scale(self, b):
        """llama_adapter_lora_weight::get_scale"""
        return self.user_scale * self.alpha / b.shape[1] if self.alpha else self.user_scale

    def mm(self, name, x):
        """llm_graph_context::build_lora_mm"""
        y = x @ self.w[name].T
        if name in self.lora:
            a, b = self.lora[name]
            y = y + self.scale(b) * ((x @ a.T) @ b.T)
        return y

    def embed(self, ids):
        """llm_graph_context::build_inp_embd: lora_a is looked up by token"""
        x = self.w["token_embd.weight"][ids]
        if "token_embd.weight" in self.lora:
            a, b = self.lora["token_embd.weight"]
            x = x + self.scale(b) * (a[ids] @ b.T)
        return x

    def norm(self, name, x):
        eps = self.meta["llama.attention.layer_norm_rms_epsilon"]
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * self.w[name]

    def rotate(self, x):
        """LLAMA_ROPE_TYPE_NORM: each adjacent pair of x (T, heads, D) by position * base^(-2i/D)"""
        half = np.arange(0, x.shape[-1], 2)
        angle = np.arange(len(x))[:, None, None] * self.meta["llama.rope.freq_base"] ** (-half / x.shape[-1])
        even, odd, out = x[..., 0::2], x[..., 1::2], np.empty_like(x)
        out[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
        out[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
        return out

    def logits(self, ids):
        heads, groups = self.meta["llama.attention.head_count"], self.meta["llama.attention.head_count_kv"]
        x, count = self.embed(ids), len(ids)
        for i in range(self.meta["llama.block_count"]):
            h = self.norm(f"blk.{i}.attn_norm.weight", x)
            q = self.rotate(self.mm(f"blk.{i}.attn_q.weight", h).reshape(count, heads, -1))
            k = self.rotate(self.mm(f"blk.{i}.attn_k.weight", h).reshape(count, groups, -1))
            v = self.mm(f"blk.{i}.attn_v.weight", h).reshape(count, groups, -1)
            k, v = (np.repeat(t, heads // groups, axis=1) for t in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
            scores[:, np.triu(np.ones((count, count), bool), 1)] = -np.inf
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(axis=-1, keepdims=True), v)
            x = x + self.mm(f"blk.{i}.attn_output.weight", mixed.reshape(count, -1))
            h = self.norm(f"blk.{i}.ffn_norm.weight", x)
            gate = self.mm(f"blk.{i}.ffn_gate.weight", h)
            h = gate / (1 + np.exp(-gate)) * self.mm(f"blk.{i}.ffn_up.weight", h)
            x = x + self.mm(f"blk.{i}.ffn_down.weight", h)
        x = self.norm("output_norm.weight", x)
        return self.mm("output.weight", x) if "output.weight" in self.w else x @ self.w["token_embd.weight"].T


def new_model(seed=0, **changes):
    """A random Llama whose attention is far from uniform, so that the order of rotary pairs shows."""
    rng = np.random.default_rng(seed)
    model = Llama(dataclasses.replace(CONFIG, **changes), rng)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = rng.uniform(0.5, 1.5, parameter.shape).astype(np.float32)
        else:
            parameter.data = parameter.data * np.float32(10)
    return model


@pytest.fixture
def base():
    """A function that makes the same model again, without any adapter."""
    return new_model


@pytest.fixture
def file(base, tmp_path):
    return write_gguf(tmp_path / "base.gguf", base())


def adapted(model, name="default", **settings):
    """The model with an adapter that changes its output, trained by noise."""
    add_adapter(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings)), name=name)
    rng = np.random.default_rng(3)
    for array in adapter_state(model, name).values():
        array += rng.normal(0, 0.05, array.shape).astype(array.dtype)
    return model


def logits(model):
    with no_grad():
        return model(IDS[None]).data[0]


def distance(a, b):
    return float(np.abs(a - b).max())


# -- written here, computed by llama.cpp's rules -----------------------------------------------------------------------


def test_the_second_llama_computes_the_base_alone(base, file):
    assert distance(LlamaCpp(file).logits(IDS), logits(base())) < 1e-4


@every_setting
def test_base_and_adapter_file_give_the_logits_of_the_adapter(settings, base, file, tmp_path):
    model = adapted(base(), **settings)
    path = save_gguf_adapter(model, tmp_path / "adapter.gguf")
    expected = logits(model)
    assert distance(expected, logits(base())) > 0.1
    assert distance(LlamaCpp(file, path).logits(IDS), expected) < 1e-4


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"r": 2, "rank_pattern": {"q_proj": 4}}], ids=str)
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_embedding_or_head_means_the_same_there(settings, target, base, tmp_path):
    file = write_gguf(tmp_path / "base.gguf", base(tie_word_embeddings=False))
    model = adapted(base(tie_word_embeddings=False), target_modules=[target, "q_proj"], **settings)
    path = save_gguf_adapter(model, tmp_path / "adapter.gguf")
    assert distance(logits(model), logits(base(tie_word_embeddings=False))) > 0.1
    assert distance(LlamaCpp(file, path).logits(IDS), logits(model)) < 1e-4


@given(r=st.integers(1, 8), alpha=st.floats(0.01, 100), rslora=st.booleans(), other=st.integers(1, 8))
@settings(max_examples=15, deadline=None)
def test_any_rank_and_scale_means_the_same_there(tmp_path_factory, r, alpha, rslora, other):
    folder = tmp_path_factory.mktemp("any")
    model = new_model(num_hidden_layers=1)
    file = write_gguf(folder / "base.gguf", model)
    settings = {"r": r, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": {"k_proj": other}}
    adapted(model, **settings)
    path = save_gguf_adapter(model, folder / "adapter.gguf")
    expected = logits(model)
    # a large scale is a large update, in float32 there and float64 here: a wrong scale would be off by a whole factor
    assert distance(LlamaCpp(file, path).logits(IDS), expected) < 1e-3 * max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    "mistake",
    ["rows of B as in PEFT", "alpha for alpha / r", "rsLoRA's alpha as it is"],
)
def test_the_comparison_notices(mistake, base, file, tmp_path, monkeypatch):
    model = adapted(base(), use_rslora=True)
    path, wrong = tmp_path / "adapter.gguf", {}
    if mistake == "rows of B as in PEFT":
        monkeypatch.setattr(llamacpp, "to_pairs", lambda w, heads: w)
    else:
        wrong["adapter.lora.alpha"] = 8.0 if "rsLoRA" in mistake else 8.0 * 4
    save_gguf_adapter(model, path)
    reader = LlamaCpp(file, path)
    reader.alpha = wrong.get("adapter.lora.alpha", reader.alpha)
    assert distance(reader.logits(IDS), logits(model)) > 1e-2


def test_names_shapes_types_and_metadata_are_llama_cpps(base, tmp_path):
    path = save_gguf_adapter(adapted(base(), r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "down_proj"],
                                     layers_to_transform=1), tmp_path / "adapter.gguf")  # fmt: skip
    reader = gguf.GGUFReader(path)
    assert {t.name: (t.data.shape, t.tensor_type.name) for t in reader.tensors} == {
        "blk.1.attn_q.weight.lora_a": ((3, 32), "F32"),
        "blk.1.attn_q.weight.lora_b": ((32, 3), "F32"),
        "blk.1.attn_k.weight.lora_a": ((3, 32), "F32"),
        "blk.1.attn_k.weight.lora_b": ((16, 3), "F32"),
        "blk.1.ffn_down.weight.lora_a": ((3, 64), "F32"),
        "blk.1.ffn_down.weight.lora_b": ((32, 3), "F32"),
    }
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "default",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({}, 8),
        ({"use_rslora": True}, 16),  # 8 * sqrt(4)
        ({"alpha_pattern": {"q_proj": 3}}, 8),  # what most modules want; q's B carries 3 / 8
        ({"rank_pattern": {"q_proj": 2}}, 8),  # divided by each module's own rank
    ],
    ids=str,
)
def test_the_alpha_that_is_written(settings, alpha, base, tmp_path):
    path = save_gguf_adapter(adapted(base(), **settings), tmp_path / "adapter.gguf")
    assert gguf.GGUFReader(path).fields["adapter.lora.alpha"].contents() == alpha


def test_weights_that_need_no_folding_are_written_bit_for_bit(base, tmp_path):
    model = adapted(base(), alpha_pattern={"q_proj": 3})
    stored = {t.name: t.data for t in gguf.GGUFReader(save_gguf_adapter(model, tmp_path / "a.gguf")).tensors}
    state = adapter_state(model, "default")
    np.testing.assert_array_equal(stored["blk.0.attn_v.weight.lora_b"], state["model.layers.0.self_attn.v_proj.lora_B"])
    np.testing.assert_array_equal(stored["blk.0.attn_q.weight.lora_a"], state["model.layers.0.self_attn.q_proj.lora_A"])


def test_a_float64_adapter_is_written_in_float32(base, file, tmp_path):
    model = base()
    for parameter in dict(model.named_parameters()).values():
        parameter.data = parameter.data.astype(np.float64)
    adapted(model)
    path = save_gguf_adapter(model, tmp_path / "adapter.gguf")
    assert {t.tensor_type.name for t in gguf.GGUFReader(path).tensors} == {"F32"}
    assert distance(LlamaCpp(file, path).logits(IDS), logits(model)) < 1e-4


# -- there and back ----------------------------------------------------------------------------------------------------


@every_setting
def test_an_adapter_comes_back_from_its_file(settings, base, tmp_path):
    model, other = adapted(base(), **settings), base()
    load_gguf_adapter(other, save_gguf_adapter(model, tmp_path / "adapter.gguf"))
    assert distance(logits(other), logits(model)) < 1e-4
    for path, module in lora_modules(model).items():
        a, b = module.adapters["default"].factors()
        share = lora_modules(other)[path].adapters["default"]
        np.testing.assert_array_equal(share.lora_A.data, a)
        np.testing.assert_allclose(share.delta(), (b * module.adapters["default"].scale) @ a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_embedding_or_head_comes_back(target, base, tmp_path):
    models = [base(tie_word_embeddings=False) for _ in range(2)]
    adapted(models[0], target_modules=[target])
    load_gguf_adapter(models[1], save_gguf_adapter(models[0], tmp_path / "adapter.gguf"))
    assert logits(models[1]).tobytes() == logits(models[0]).tobytes()


def test_a_plain_adapter_crosses_peft_and_llama_cpp_bit_for_bit(base, tmp_path):
    model, middle, other = adapted(base()), base(), base()
    load_adapter(middle, save_adapter(model, tmp_path / "peft"))
    load_adapter(other, save_gguf_adapter(middle, tmp_path / "adapter.gguf"))  # the very function that reads folders
    assert logits(other).tobytes() == logits(model).tobytes()
    assert sha256_of(adapter_state(other, "default")) == sha256_of(adapter_state(model, "default"))
    first, second = (
        save_adapter(m, tmp_path / f"{i}") / "adapter_model.safetensors" for i, m in enumerate((model, other))
    )
    assert first.read_bytes() == second.read_bytes()


def test_a_read_adapter_can_be_trained_saved_again_and_removed(base, tmp_path):
    model = base()
    load_gguf_adapter(model, save_gguf_adapter(adapted(base()), tmp_path / "first.gguf"), name="again")
    model.loss(IDS[None], IDS[None]).backward()
    assert all(p.grad.any() for p in model.trainable_parameters().values())
    second = save_gguf_adapter(model, tmp_path / "second.gguf", name="again")
    tensors = [
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("first", "second")
    ]
    assert second.is_file() and tensors[0] == tensors[1]
    remove_adapter(model, "again")
    assert logits(model).tobytes() == logits(base()).tobytes()


def write(path, tensors, kind="F32", **change):
    """An adapter file written with the library alone; change: metadata, with _ for the dots; None leaves a key out."""
    meta = {"general_type": "adapter", "adapter_type": "lora", "adapter_lora_alpha": 8.0} | change
    writer = gguf.GGUFWriter(path, meta.pop("general_architecture", "llama"))
    for key, value in meta.items():
        if value is not None:
            add = {str: writer.add_string, float: writer.add_float32, list: writer.add_array, int: writer.add_uint32}
            add[type(value)](key.replace("_", ".", 2 if key.startswith("adapter_lora") else 1), value)
    quant = gguf.GGMLQuantizationType[kind]
    for name, array in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(array, quant), raw_dtype=quant if kind == "Q8_0" else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(rng, name=QUERY, m=32, n=32, r=4):
    return {f"{name}.lora_a": rng.standard_normal((r, n), np.float32),
            f"{name}.lora_b": rng.standard_normal((m, r), np.float32)}  # fmt: skip


@pytest.mark.parametrize("alpha", [8.0, 0.0, None, 1.5])
def test_files_of_others_are_scaled_by_llama_cpps_rule(alpha, base, file, rng, tmp_path):
    tensors = pair(rng) | pair(rng, "blk.1.attn_k.weight", m=16, r=2) | pair(rng, "blk.1.ffn_down.weight", n=64, r=7)
    path = write(tmp_path / "adapter.gguf", tensors, adapter_lora_alpha=alpha)
    model = base()
    load_gguf_adapter(model, path)
    expected = LlamaCpp(file)
    expected.lora = {name.removesuffix(".lora_a"): (array, tensors[name[:-1] + "b"])
                     for name, array in tensors.items() if name.endswith("a")}  # fmt: skip
    expected.alpha = alpha or 0.0
    assert distance(logits(model), expected.logits(IDS)) < 1e-3
    assert distance(logits(model), logits(base())) > 0.1


@pytest.mark.parametrize(("kind", "limit"), [("F16", 1e-2), ("Q8_0", 0.5)])
def test_files_in_fewer_bits_are_read(kind, limit, base, rng, tmp_path):
    tensors = pair(rng, r=32)
    models = [base(), base()]
    for model, stored in zip(models, ("F32", kind), strict=True):
        load_gguf_adapter(model, write(tmp_path / f"{stored}.gguf", tensors, stored))
    assert 0 < distance(logits(models[0]), logits(models[1])) < limit * np.abs(logits(models[0])).max()


# -- what such a file cannot say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, ("DoRA", "merge")),
        ({"target_modules": ["embed_tokens", "q_proj"]}, ("embed_tokens", "tied head", "merge")),
    ],
    ids=["DoRA", "tied embedding"],
)
def test_what_llama_cpp_cannot_compute_is_refused_with_the_way_out(settings, words, base, tmp_path):
    model = adapted(base(), **settings)
    with pytest.raises(ValueError) as caught:
        save_gguf_adapter(model, tmp_path / "adapter.gguf")
    assert all(word in str(caught.value) for word in words)
    assert list(tmp_path.iterdir()) == []


def test_a_trained_bias_is_refused_with_the_way_out(tmp_path):
    model = adapted(Net(CONFIG, np.random.default_rng(0)), target_modules=["q_proj"], bias="lora_only")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: .* trained bias; merge it"):
        save_gguf_adapter(model, tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_there_is_named_with_those_that_are(base, tmp_path):
    with pytest.raises(ValueError, match=r"'legal'.*default"):
        save_gguf_adapter(adapted(base()), tmp_path / "a.gguf", name="legal")
    with pytest.raises(ValueError, match="none"):
        save_gguf_adapter(base(), tmp_path / "a.gguf")


@pytest.mark.parametrize("alpha", [1e-60, 1e60])
def test_an_alpha_that_float32_cannot_hold_is_refused(alpha, base, tmp_path):
    with pytest.raises(ValueError, match="float32"):
        save_gguf_adapter(adapted(base(), lora_alpha=alpha), tmp_path / "a.gguf")


def test_a_failed_write_leaves_the_file_of_before_and_no_debris(base, tmp_path, monkeypatch):
    path = save_gguf_adapter(adapted(base()), tmp_path / "adapter.gguf")
    before = path.read_bytes()

    def full(self, *arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space"):
        save_gguf_adapter(adapted(base(), r=2), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# -- files that do not fit: refused, and the model stays as it was -----------------------------------------------------


def refused(path, *words, model=None):
    """Load the file, expect one line with the words, and find the model unchanged."""
    model = model or new_model()

    def state():
        modules = [(name, type(module)) for name, module in model.named_modules()]
        parameters = {name: (id(p.data), p.requires_grad) for name, p in model.named_parameters()}
        return modules, parameters, repr(model.adapters), sha256_of(model.state_dict())

    before = state()
    with pytest.raises(ModelFileError) as caught:
        load_gguf_adapter(model, path)
    message = str(caught.value)
    assert "\n" not in message and not [word for word in (path.name, *words) if word not in message], message
    assert state() == before and list(model.adapters) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general_type": "model"}, ("general.type", "'model'", "'adapter'")),
        ({"general_type": None}, ("general.type", "None")),
        ({"general_architecture": "qwen2"}, ("general.architecture", "'qwen2'")),
        ({"adapter_type": "control_vector"}, ("adapter.type", "'control_vector'")),
        ({"adapter_lora_alpha": float("nan")}, ("adapter.lora.alpha", "nan")),
        ({"adapter_lora_alpha": -1.0}, ("adapter.lora.alpha", "-1")),
        ({"adapter_lora_alpha": float("inf")}, ("adapter.lora.alpha", "inf")),
        ({"adapter_lora_alpha": "8"}, ("adapter.lora.alpha", "'8'")),
        ({"adapter_alora.invocation_tokens": [1, 2]}, ("alora",)),
    ],
    ids=str,
)
def test_a_file_that_says_it_is_something_else_is_refused(change, words, rng, tmp_path):
    refused(write(tmp_path / "adapter.gguf", pair(rng), **change), *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{QUERY}.lora_a": None}, ("missing", f"{QUERY}.lora_a")),
        ({f"{QUERY}.lora_b": None}, ("missing", f"{QUERY}.lora_b")),
        ({f"{QUERY}.lora_b": np.ones((32, 5), np.float32)}, (f"{QUERY}.lora_a", "(4, 32)", "(5, 32)")),
        ({f"{QUERY}.lora_b": np.ones((30, 4), np.float32)}, (f"{QUERY}.lora_b", "(30, 4)", "(32, 4)")),
        ({f"{QUERY}.lora_a": np.ones((32, 4), np.float32)}, (f"{QUERY}.lora_a", "(32, 4)", "(4, 32)")),
        ({f"{QUERY}.lora_b": np.ones((128,), np.float32)}, ("lora_b", "(128,)")),
        ({f"{QUERY}.lora_b": np.ones((32, 40), np.float32)}, ("r=40", "q_proj")),
        ({f"{QUERY}.lora_a": np.full((4, 32), np.nan, np.float32)}, (f"{QUERY}.lora_a", "NaN")),
        ({f"{QUERY}.lora_b": np.full((32, 4), np.inf, np.float32)}, (f"{QUERY}.lora_b", "infinity")),
        ({f"{QUERY}.lora_m": np.ones((32, 1), np.float32)}, (f"{QUERY}.lora_m", "unexpected")),
        ({"blk.0.attn_norm.weight": np.ones(32, np.float32)}, ("blk.0.attn_norm.weight", "unexpected")),
        ({"x": np.ones(32, np.float32)}, ("unexpected tensor x",)),
        ({"blk.x.attn_q.weight.lora_a": np.ones((4, 32), np.float32)}, ("unexpected", "blk.x")),
        (pair(np.random.default_rng(0), "blk.7.attn_q.weight"), ("layers.7", "matches no module")),
        (pair(np.random.default_rng(0), "blk.0.attn_qkv.weight"), ("blk.0.attn_qkv", "unexpected")),
        (pair(np.random.default_rng(0), "output.weight", m=320), ("lm_head", "shares its matrix")),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit_are_named(change, words, rng, tmp_path):
    tensors = {name: array for name, array in (pair(rng) | change).items() if array is not None}
    refused(write(tmp_path / "adapter.gguf", tensors), *words)


def test_a_file_without_tensors_is_refused(tmp_path):
    refused(write(tmp_path / "adapter.gguf", {}), "without any tensor")


def test_a_kind_that_minilora_does_not_read_is_named(rng, tmp_path):
    tensors = {name: array.astype(np.float64) for name, array in pair(rng).items()}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "a.gguf", "F64", "F32, F16")


def test_a_missing_file_a_damaged_one_and_a_model_are_refused(base, file, tmp_path):
    refused(tmp_path / "absent.gguf", "no such")
    (tmp_path / "text.gguf").write_text("hello")
    refused(tmp_path / "text.gguf", "not a GGUF file")
    refused(file, "general.type", "'adapter'")
    whole = save_gguf_adapter(adapted(base()), tmp_path / "whole.gguf").read_bytes()
    for share in (0.001, 0.01, 0.5, 0.99):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[: int(share * len(whole))])
        refused(path, "")


def test_a_name_that_is_taken_is_refused(base, tmp_path):
    path = save_gguf_adapter(adapted(base()), tmp_path / "a.gguf")
    model = base()
    load_gguf_adapter(model, path)
    with pytest.raises(ValueError, match="'default' already"):
        load_gguf_adapter(model, path)


def test_the_model_file_and_the_adapter_file_agree_on_names(base, file):
    """Every matrix of a model file can be adapted, under the name that it has there."""
    names = {t.name for t in gguf.GGUFReader(file).tensors if t.data.ndim == 2}
    model = adapted(base(), target_modules="all-linear")
    modules = {llamacpp.llama_cpp_name(f"{path}.weight") for path in lora_modules(model)}
    assert modules == names - {"token_embd.weight"}
    assert GGUF(file).load().state_dict().keys() == base().state_dict().keys()

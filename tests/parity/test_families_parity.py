"""Parity of every family with transformers, PEFT and llama.cpp: one table of small random models, one set of tests.

Sizes are odd: three query heads for each key/value head, widths that are no multiple of a block.
"""

from dataclasses import replace

import numpy as np
import pytest
from cppserver import serving, tokens_of
from modelfiles import new_tokenizer
from otherside import assert_same_step, in_double, loss_of, parity, peft, torch, transformers, with_peft

from minilora.engine.attention import Packing
from minilora.engine.tensor import no_grad
from minilora.lora.adapters import add_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.measure.counts import count_parameters
from minilora.measure.ledger import ledger
from minilora.measure.predict import Step, base_parameters, predict_memory
from minilora.models import load as zoo
from minilora.models.folder import load_folder, save_folder
from minilora.models.gguf import GGUF, save_gguf
from minilora.models.merge import export, merge
from minilora.nn.families import FAMILIES, as_llama_cpp_has_it, config_from_json
from minilora.nn.parts import Batch
from minilora.nn.step import loss_and_grad

pytestmark = [*parity, pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")]  # by PEFT

V, LENGTH = 290, 14
ENDS = [0, 1, 2]  # the tokenizer's special tokens, which end an answer
SHAPE = {"vocab_size": V, "hidden_size": 36, "intermediate_size": 45, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}  # fmt: skip
FAST = {"rope_type": "default", "rope_theta": 100.0}
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.25, "residual_multiplier": 0.3,
               "logits_scaling": 1.7}  # fmt: skip
TIED = {"tie_word_embeddings": True}
GEMMA = {"num_hidden_layers": 7, "head_dim": 10, "query_pre_attn_scalar": 10, "sliding_window": 5, "pad_token_id": None}
ROWS = {  # the config's class in transformers, without its ending, and what differs from SHAPE
    "Llama": ("Llama", {}),
    "Llama, tied, wide heads": ("Llama", TIED | {"head_dim": 10}),
    "Llama, one key/value head": ("Llama", {"num_key_value_heads": 1, "rope_parameters": FAST}),
    "Llama, own keys, narrow heads": ("Llama", {"num_key_value_heads": 6, "head_dim": 4, "rms_norm_eps": 0.1}),
    "Llama 3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 12}),
    "Mistral": ("Mistral", {"sliding_window": 5, "head_dim": 8}),
    "Mistral without a window": ("Mistral", TIED | {"sliding_window": None}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2.5, tied": ("Qwen2", TIED),
    "Qwen3": ("Qwen3", TIED | {"head_dim": 10}),
    "Qwen3, untied": ("Qwen3", {"head_dim": 4}),
    "Granite": ("Granite", MULTIPLIERS),
    "SmolLM3": ("SmolLM3", TIED | {"num_hidden_layers": 5}),
    "SmolLM3, every second": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2}),
    "GPT-2": ("GPT2", TIED),
    "GPT-2, untied": ("GPT2", {"n_inner": 50}),
    "Gemma 3": ("Gemma3Text", TIED | GEMMA),
    "Gemma 3, untied": ("Gemma3Text", GEMMA | {"query_pre_attn_scalar": 20, "num_hidden_layers": 3}),
}  # fmt: skip
NOT_IN_LLAMA_CPP = {"Gemma 3, untied", "SmolLM3, every second"}
every_family = pytest.mark.parametrize("name", ROWS)


def new(name):
    """A random model in transformers, whose every parameter shows in the logits: norms and biases, too."""
    kind, changes = ROWS[name]
    torch.manual_seed(0)
    shape = SHAPE | changes
    if kind == "GPT2":
        shape = {key: n for key, n in shape.items() if key not in ("intermediate_size", "num_key_value_heads")}
    config = getattr(transformers, f"{kind}Config")(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    norms, biases = ((-0.5, 0.5) if kind == "Gemma3Text" else (0.5, 1.5)), (0.1 if kind == "GPT2" else 0.5)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                is_norm = ("norm" in key or "ln_" in key) and key.endswith("weight")
                weight.uniform_(*(norms if is_norm else (-biases, biases)))
            elif config.tie_word_embeddings and ("embed" in key or "wte" in key or "wpe" in key):
                weight /= 10  # otherwise every token would be followed by itself
        if config.tie_word_embeddings:
            last = model.transformer.ln_f if kind == "GPT2" else model.model.norm
            last.weight.copy_(10 * (last.weight - norms[0] + 0.5) + norms[0] - 0.5)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each family's model as transformers saves it."""
    place = tmp_path_factory.mktemp("families")
    for name in ROWS:
        new(name).save_pretrained(place / name)
    return place


@pytest.fixture
def folder(folders, name):
    return folders / name


def theirs_in(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def batch(seed=0):
    ids = np.random.default_rng(seed).integers(3, V, (2, LENGTH))
    labels = ids.copy()
    labels[0, :6] = labels[1, :3] = -100
    return ids, labels


def logits_of(model, ids):
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return model(torch.from_numpy(ids)).logits.numpy()
    with no_grad():
        return model(ids).data


def apart(got, wanted):
    """The relative distance of two arrays, by their norms."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted))


# -- transformers ------------------------------------------------------------------------------------------------------


def assert_same(theirs, ours, limit):
    """The same logits, loss and gradient of every parameter, in the dtype of both."""
    ids, labels = batch()
    expected = logits_of(theirs, ids)
    assert expected.std() > 0.3  # otherwise the limits would prove little
    assert apart(logits_of(ours, ids), expected) < limit
    loss = loss_of(theirs, ids, labels)
    loss.backward()
    assert loss_and_grad(ours, ids, labels).item() == pytest.approx(loss.item(), rel=limit)
    gradients = {key: p.grad for key, p in ours.named_parameters()}
    got, wanted = FAMILIES[ours.config.model_type].to_hugging_face(gradients), dict(theirs.named_parameters())
    assert got.keys() == wanted.keys()
    found = {key: apart(got[key], p.grad.numpy()) for key, p in wanted.items()}
    assert max(found.values()) < limit, found


@every_family
def test_logits_loss_and_every_gradient_equal_transformers(name, folder):
    assert_same(theirs_in(folder), load_folder(folder), 1e-5)


@every_family
def test_in_float64_they_agree_in_ten_digits(name, folder, monkeypatch):
    ours = load_folder(folder)
    for _, p in ours.named_parameters():
        p.data = p.data.astype(np.float64)
    assert_same(in_double(theirs_in(folder), monkeypatch), ours, 1e-10)


def test_every_family_has_a_row():
    kinds = {getattr(transformers, f"{kind}Config").model_type for kind, _ in ROWS.values()}
    assert kinds == set(FAMILIES)


@every_family
def test_memory_is_predicted_to_the_byte(name, folder):
    model, ids = load_folder(folder), batch()[0]
    told = predict_memory(replace(Step.of(model, Batch(ids, ids), threads=1), rounds=2))
    held = ledger(model, None, model.loss(ids, ids))
    assert held.by_operation == told.by_operation, "minilora/measure/blocks.py has other operations"
    assert base_parameters(model.config) == count_parameters(model).total


@every_family
def test_the_cache_padding_and_packing_change_nothing(name, folder):
    theirs, ours = theirs_in(folder), load_folder(folder)
    ids, first = batch()[0], np.array([0, 5])  # the second prompt is five tokens shorter
    real = np.arange(LENGTH) >= first[:, None]
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            position_ids=torch.from_numpy(np.maximum(np.arange(LENGTH) - first[:, None], 0)),
        ).logits.numpy()
    cache = ours.new_cache(2, LENGTH, first)
    with no_grad():
        parts = [ours(ids[:, :8], cache)] + [ours(ids[:, t : t + 1], cache) for t in range(8, LENGTH)]
    assert apart(np.concatenate([part.data for part in parts], axis=1)[real], expected[real]) < 1e-5
    a, b = [*range(10)], [*range(4), *range(10, 14)]  # two texts with the same first four tokens
    row, packing = np.array([ids[0]]), Packing(prefix=4, ends=(10, 14))
    alone = [logits_of(theirs, row[:, own])[0, 3:-1] for own in (a, b)]
    losses = [
        -np.mean(
            [np.log(np.exp(each) / np.exp(each).sum())[row[0, t]] for each, t in zip(of, own[4:], strict=True)][1:]
        )
        for of, own in zip(alone, (a, b), strict=True)
    ]
    labels = row.copy()
    labels[:, [0, 1, 2, 3, 4, 10]] = -100
    got = [loss.item() for loss in ours.loss_of_each(row, labels, packing)]
    assert got == pytest.approx(losses, rel=1e-4)


# -- PEFT --------------------------------------------------------------------------------------------------------------


@every_family
def test_a_lora_step_and_adapters_are_pefts_in_both_directions(name, folder, tmp_path, rng):
    theirs, ours, ids = theirs_in(folder), load_folder(folder), batch()[0]
    settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}
    add_adapter(ours, LoraConfig(**settings, init_lora_weights=False), seed=1)
    save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours", is_trainable=True).eval()
    assert apart(logits_of(read, ids), logits_of(theirs_in(folder), ids)) > 0.1
    assert_same_step(read, ours, rng)
    assert apart(logits_of(ours, ids), logits_of(read, ids)) < 1e-4
    made = with_peft(theirs_in(folder), **settings, init_lora_weights=False).eval()
    made.save_pretrained(tmp_path / "theirs")
    again = load_folder(folder)
    load_adapter(again, tmp_path / "theirs")
    assert apart(logits_of(again, ids), logits_of(made, ids)) < 1e-5


# -- folders and GGUF files --------------------------------------------------------------------------------------------


@pytest.fixture
def base(folder, tmp_path):
    """The same model as a folder that minilora wrote, with a tokenizer."""
    model = load_folder(folder)
    return save_folder(tmp_path / "base", model.config, model.state_dict(), new_tokenizer())


def adapter_for(base, tmp_path):
    """A random adapter. With this seed no two tokens are within the precision of llama.cpp's table of GELU."""
    model, _ = zoo.load(base)
    add_adapter(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False), seed=2)
    return save_adapter(model, tmp_path / "adapter"), model


@every_family
def test_a_merged_folder_is_the_adapted_model_in_transformers(name, folder, base, tmp_path):
    ids = batch()[0]
    assert load_folder(base).config == load_folder(folder).config
    assert apart(logits_of(theirs_in(base), ids), logits_of(theirs_in(folder), ids)) < 1e-6
    adapter, adapted = adapter_for(base, tmp_path)
    merged = merge(base, adapter, tmp_path / "merged").path
    assert apart(logits_of(theirs_in(merged), ids), logits_of(adapted, ids)) < 1e-5


def in_llama_cpp(path, ids, steps=12, adapter=None):
    """The tokens that llama.cpp appends to `ids`, each the most probable one."""
    question = {"prompt": ids, "n_predict": steps, "temperature": 0, "return_tokens": True}
    question["logit_bias"] = [[token, False] for token in ENDS]
    return tokens_of(serving(path, adapter), "completion", question)


def greedy(model, ids, steps=12):
    row, cache = np.array([ids]), model.new_cache(1, len(ids) + steps)
    found = []
    with no_grad():
        for _ in range(steps):
            logits = model(row, cache, last=True).data
            logits[..., ENDS] = -np.inf
            row = logits.argmax(axis=-1)
            found.append(int(row[0, 0]))
    return found


@every_family
def test_a_gguf_file_comes_back_and_llama_cpp_answers_with_the_same_tokens(name, folder, base, tmp_path):
    model = load_folder(folder)
    if name in NOT_IN_LLAMA_CPP:
        with pytest.raises(ValueError, match="llama.cpp"):
            save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), new_tokenizer(), "F32")
        return
    path = save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), new_tokenizer(), "F32")
    again = GGUF(path).load()
    ids = batch()[0][0].tolist()
    window = model.config.sliding_window if model.config.model_type == "mistral" else None  # llama.cpp's has none
    short = ids[:window]
    assert apart(logits_of(again, np.array([short])), logits_of(model, np.array([short]))) < 1e-6
    if FAMILIES[again.config.model_type].gguf == model.config.model_type:
        assert again.config == model.config
        state = as_llama_cpp_has_it(model.config, model.state_dict())
        assert all(np.array_equal(w, again.state_dict()[key]) for key, w in state.items())
    if window is None:
        tokens = greedy(model, ids)
        assert len(set(tokens)) > 3
        assert in_llama_cpp(path, ids) == tokens
    adapter, adapted = adapter_for(base, tmp_path)
    rewritten = model.config.model_type == "gemma3_text"  # in the file, some of its arrays are others
    out = export(base if rewritten else path, adapter, tmp_path / "a.gguf").path
    if window is None:
        assert in_llama_cpp(path, ids, adapter=out) == greedy(adapted, ids) != tokens


SHORT = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
SHORT |= {"intermediate_size": 45, "num_attention_heads": 32, "hidden_size": 128}
ASSUMED = ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "layer_norm_epsilon",
           "tie_word_embeddings", "sliding_window", "query_pre_attn_scalar", *MULTIPLIERS)  # fmt: skip


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in ROWS.values()}))
@pytest.mark.parametrize("null", [False, True])
def test_what_a_config_does_not_say_is_what_transformers_assumes(kind, null):
    optional = {"Mistral": "sliding_window", "GPT2": "n_inner", "Gemma3Text": "pad_token_id"}
    unsaid = {optional.get(kind, "num_key_value_heads"): None} if null else {}
    sizes = {key: size for key, size in SHORT.items() if (kind, key) != ("GPT2", "intermediate_size")}
    sizes |= {"head_dim": 64} if kind == "Gemma3Text" and null else {}  # which another default could follow
    theirs = getattr(transformers, f"{kind}Config")(**sizes, **unsaid)
    sizes = {theirs.attribute_map.get(key, key): size for key, size in sizes.items()}
    ours = config_from_json({"model_type": theirs.model_type, **sizes, **unsaid})
    for name in ASSUMED:
        if hasattr(ours, name) and getattr(theirs, name, None) is not None:
            assert getattr(ours, name) == getattr(theirs, name), name
    rope = getattr(theirs, "rope_parameters", None) or {}
    for base in (rope.get("rope_theta"), rope.get("full_attention", {}).get("rope_theta")):
        assert base is None or base == ours.rope_theta
    if kind == "Mistral":
        assert ours.sliding_window == theirs.sliding_window

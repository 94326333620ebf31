"""Mistakes that LoRA projects have shipped, planted one at a time: for each, the check that catches it must raise.

Every row plants one mistake in the live package and names the words with which it is caught. The same check must pass
without the plant. Take the catching check away, and its row fails.
"""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import strictarray
from models import IDS, Net, logits

import minilora as ml
from minilora.cost.counts import count_parameters
from minilora.engine import fused, ops, tensor
from minilora.engine.examples import EXAMPLES
from minilora.engine.gradcheck import gradcheck
from minilora.engine.tensor import OPS, Tensor, op
from minilora.files.disk import ModelFileError
from minilora.files.gguf import to_pairs
from minilora.files.tensors import read_tensors, write_tensors
from minilora.lora import adapters, layer, llamacpp, peft, variants
from minilora.lora.adapters import adapter_state, add_adapter, base_state, is_merged, merge_adapter, merged_state
from minilora.lora.audit import AuditError, _Audit, audit
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoraLayer, LoraWeights
from minilora.lora.peft import load_adapter, save_adapter
from minilora.nn.llama import Block, Config, Llama
from minilora.nn.module import Module, sha256_of
from minilora.nn.optim import AdamW

SHAPE = Config(64, 32, 48, 2, 4, 2, max_position_embeddings=128)
ALL_CHECKS = _Audit.CHECKS
NUMBERS = 64 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + 32  # of SHAPE, the tied embedding once


# -- the checks: each returns when all is well, and raises when the mistake is there -----------------------------------


def new_model():
    return Llama(SHAPE, np.random.default_rng(0))


def adapted(**settings):
    """A model with an adapter that changes the output, as if trained."""
    model = new_model()
    add_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings))
    return model


def refused(error, f, *inputs, **settings):
    """Assert that f(...) raises `error`."""
    try:
        f(*inputs, **settings)
    except error:
        return
    raise AssertionError(f"{f.__name__} accepted it")


def audited(folder, **settings):
    audit(adapted(**settings), "default")


def audited_with_rslora(folder):
    audited(folder, use_rslora=True)


def audited_with_dropout(folder):
    audited(folder, lora_dropout=0.5)


def no_change_at_step_0(folder):
    model = new_model()
    before = logits(model)
    add_adapter(model, LoraConfig(r=4, lora_alpha=8))
    assert np.array_equal(logits(model), before), "step 0 is not the base"


def no_silent_alpha(folder):
    refused(TypeError, LoraConfig, r=64)


def a_misspelled_target(folder):
    refused(ValueError, add_adapter, new_model(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_prj"]))


def a_file_with_other_tensors(folder):
    save_adapter(adapted(), folder)
    tensors = read_tensors(folder / peft.WEIGHTS_FILE)
    renamed = {name.replace("base_model.model.", "base_model."): array for name, array in tensors.items()}
    write_tensors(folder / peft.WEIGHTS_FILE, renamed)
    refused(ModelFileError, load_adapter, new_model(), folder)


def round_trip(folder):
    model, other = adapted(), new_model()
    save_adapter(model, folder)
    load_adapter(other, folder)
    assert np.array_equal(logits(other), logits(model)), "another adapter came back from the file"


def round_trip_with_rslora(folder):
    model, other = adapted(use_rslora=True), new_model()
    save_adapter(model, folder)
    load_adapter(other, folder)
    assert np.array_equal(logits(other), logits(model)), "another adapter came back from the file"


def a_loaded_adapter_goes_on_learning(folder):
    save_adapter(adapted(), folder)
    model = new_model()
    load_adapter(model, folder)
    before = {name: array.copy() for name, array in adapter_state(model, "default").items()}
    one_step(model)
    still = [name for name, array in adapter_state(model, "default").items() if np.array_equal(array, before[name])]
    assert not still, f"{still[0]} stays where it was"


def one_step(model):
    trainable = model.trainable_parameters()
    optimizer = AdamW(trainable or [model.head_weight], lr=1e-2)
    loss = model.loss(IDS, IDS)
    if loss.requires_grad:
        loss.backward()
    optimizer.step()
    return optimizer


def gguf_rows(folder):
    """llama.cpp's file holds the rows of q's B as adjacent rotary pairs."""
    from gguf import GGUFReader

    model = adapted()
    path = llamacpp.save_gguf_adapter(model, folder / "a.gguf")
    stored = {t.name: np.asarray(t.data) for t in GGUFReader(path).tensors}["blk.0.attn_q.weight.lora_b"]
    expected = to_pairs(model.get_submodule("model.layers.0.self_attn.q_proj").adapters["default"].lora_B.data, 4)
    assert np.array_equal(stored, expected), "rows of q are in the wrong order"


def merged_weights(folder):
    model = adapted()
    merge_adapter(model)
    state = merged_state(model)
    q = model.get_submodule("model.layers.0.self_attn.q_proj")
    update = 2 * q.adapters["default"].lora_B.data @ q.adapters["default"].lora_A.data
    expected = base_state(model)["model.layers.0.self_attn.q_proj.weight"] + update
    np.testing.assert_allclose(state["model.layers.0.self_attn.q_proj.weight"], expected, rtol=1e-4, atol=1e-5)


def counted(folder):
    counts = count_parameters(new_model())
    assert counts.total == NUMBERS, f"{counts.total} parameters counted, {NUMBERS} held"


def gradients(folder):
    for name in ("add", "mul", "matmul", "lora_linear", "embedding", "rope", "attention"):
        arrays, options = EXAMPLES[name](np.random.default_rng(0))
        gradcheck(lambda *x, name=name, options=options: OPS[name](*x, **options), *arrays)


def a_graph_used_twice(folder):
    loss = adapted().loss(IDS, IDS)
    loss.backward()
    refused(RuntimeError, loss.backward)


def gradients_start_anew(folder):
    model = adapted()
    model.loss(IDS, IDS).backward()
    first = {name: p.grad.copy() for name, p in model.trainable_parameters().items()}
    AdamW(model.trainable_parameters()).zero_grad()
    model.loss(IDS, IDS).backward()
    assert all(np.array_equal(p.grad, first[name]) for name, p in model.trainable_parameters().items()), "added up"


def on_the_device(folder):
    model = new_model()
    for _, parameter in model.named_parameters():
        parameter.data = strictarray.asarray(parameter.data)
    add_adapter(model, LoraConfig(r=4, lora_alpha=8))
    ids = strictarray.asarray(IDS)
    model.loss(ids, ids).backward()


# -- the mistakes: each plants itself with pytest's monkeypatch --------------------------------------------------------


def alpha_for_alpha_over_r(plant):
    plant.setattr(LoraConfig, "scale_of", lambda self, name: float(self.alpha_of(name)))


def rslora_ignored(plant):
    plant.setattr(LoraConfig, "scale_of", lambda self, name: self.alpha_of(name) / self.rank_of(name))


def rslora_ignored_by_the_loader(plant):
    real = peft._config_of
    plant.setattr(peft, "_config_of", lambda *inputs: replace(real(*inputs), use_rslora=False))


def a_default_for_alpha(plant):
    real = LoraConfig.__init__
    plant.setattr(LoraConfig, "__init__", lambda self, lora_alpha=16, **rest: real(self, lora_alpha=lora_alpha, **rest))


def unmatched_targets_ignored(plant):
    real = adapters.find_targets

    def lenient(names, config):
        known = [t for t in config.target_modules if any(n.endswith(f".{t}") for n in names)]
        return real(names, replace(config, target_modules=known))

    plant.setattr(adapters, "find_targets", lenient)


def unloaded_keys_only_warned_about(plant):
    plant.setattr(peft, "check_fit", lambda *inputs: None)
    real = peft.read_tensors

    class Lenient(dict):
        def __missing__(self, key):
            return np.zeros(())

    plant.setattr(peft, "read_tensors", lambda path: Lenient(real(path)))


def an_empty_adapter_saved(plant):
    real = peft.write_tensors
    plant.setattr(peft, "write_tensors", lambda path, tensors: real(path, {}))


def factors_transposed_in_the_file(plant):
    real = peft.write_tensors
    plant.setattr(peft, "write_tensors", lambda path, tensors: real(path, {k: v.T for k, v in tensors.items()}))


def rows_of_a_in_another_order(plant):
    real = peft.read_tensors
    flip = lambda name, array: array[::-1].copy() if "lora_A" in name else array
    plant.setattr(peft, "read_tensors", lambda path: {name: flip(name, x) for name, x in real(path).items()})


def q_and_k_not_permuted(plant):
    plant.setattr(llamacpp, "to_pairs", lambda w, heads: w)


def a_resumed_adapter_that_is_frozen(plant):
    plant.setattr(LoraWeights, "requires_grad_", lambda self, wanted=True: Module.requires_grad_(self, False))


def a_base_that_is_not_frozen(plant):
    plant.setattr(Llama, "requires_grad_", lambda self, wanted=True: self)


def gradients_cut_below_the_second_block(plant):
    real = Block.forward

    def cut(self, x, context, layer=0):
        y = real(self, x, context, layer)
        return Tensor(y.data) if layer == 0 else y

    plant.setattr(Block, "forward", cut)


def merged_a_second_time(plant):
    real = LoraLayer.merge

    def again(self):
        base, self.unmerged = self.unmerged, None
        real(self)
        self.unmerged = self.unmerged if base is None else base

    plant.setattr(LoraLayer, "merge", again)


def a_merge_that_adds_nothing(plant):
    plant.setattr(LoraLayer, "merge", lambda self: setattr(self, "unmerged", self.weight.data.copy()))


def merged_without_the_scale(plant):
    plant.setattr(LoraWeights, "delta", lambda self, w=None: self.lora_B.data @ self.lora_A.data)


def unmerged_by_subtraction(plant):
    def subtract(self):
        if self.unmerged is not None:
            self.unmerged = None
            self.weight.data = self.weight.data - self.delta_weight(self.active)

    plant.setattr(LoraLayer, "unmerge", subtract)


def an_adapter_that_stays_on(plant):
    real = LoraLayer.active_adapters
    always = lambda self: real(self) or [(weights, 1.0) for weights in self.adapters.values()]
    plant.setattr(LoraLayer, "active_adapters", always)


def b_that_does_not_start_at_zero(plant):
    real = layer._linear_start
    plant.setattr(layer, "_linear_start", lambda m, n, r, start, rng: real(m, n, r, False, rng))


def dropout_that_never_ends(plant):
    plant.setattr(variants.Dropout, "active", True)


def a_tied_embedding_counted_twice(plant):
    real = Llama.named_parameters

    def twice(self):
        yield from real(self)
        yield "lm_head.weight", self.head_weight

    plant.setattr(Llama, "named_parameters", twice)


def no_sum_over_broadcast_axes(plant):
    plant.setattr(ops, "sum_to", lambda x: lambda g: g)


def b_whose_gradient_lacks_the_scale(plant):
    def lora_linear(x, w, a, b, scale):
        y, dx, dw, da, db = fused.lora_linear.forward(x, w, a, b, scale)
        return y, dx, dw, da, lambda g: db(g) / scale

    plant.setitem(OPS, "lora_linear", None)  # so that it is put back
    op(lora_linear)


def a_rotation_that_is_not_turned_back(plant):
    def rope(x, cos, sin):
        y, _ = fused.rope.forward(x, cos, sin)
        return y, lambda g: fused.rope.forward(g, cos, sin)[0]

    plant.setitem(OPS, "rope", None)
    op(rope)


def repeated_tokens_that_overwrite(plant):
    add = SimpleNamespace(at=lambda out, i, g: out.__setitem__(i, g))
    xp = SimpleNamespace(zeros=np.zeros, ascontiguousarray=np.ascontiguousarray, add=add)
    plant.setattr(fused, "array_module", lambda x: xp)


def a_graph_that_can_be_used_twice(plant):
    real = tensor.walk_back

    def keeping(y, grad=None):
        before = {node: list(node.edges) for node in tensor._reachable(y.node)}
        yield from real(y, grad)
        for node, edges in before.items():
            node.edges = edges

    plant.setattr(tensor, "walk_back", keeping)


def a_gradient_that_is_never_zeroed(plant):
    plant.setattr(AdamW, "zero_grad", lambda self: None)


def numpy_taken_for_granted(plant):
    plant.setattr(fused, "array_module", lambda x: np)


CAUGHT = [  # the mistake, the check, the words with which it is caught
    (alpha_for_alpha_over_r, audited, r"^scale: .* is scaled by 8, alpha / r is 2"),
    (rslora_ignored, audited_with_rslora, r"^scale: .* is scaled by 2, alpha / sqrt\(r\) is 4"),
    (rslora_ignored_by_the_loader, audited_with_rslora, "^file: the saved settings scale"),
    (rslora_ignored_by_the_loader, round_trip_with_rslora, "^another adapter came back"),
    (a_default_for_alpha, no_silent_alpha, "accepted it"),
    (unmatched_targets_ignored, a_misspelled_target, "accepted it"),
    (unloaded_keys_only_warned_about, a_file_with_other_tensors, "accepted it"),
    (an_empty_adapter_saved, audited, "^file: .* did not come back"),
    (factors_transposed_in_the_file, audited, "^file: .* did not come back"),
    (rows_of_a_in_another_order, round_trip, "^another adapter came back"),
    (q_and_k_not_permuted, gguf_rows, "wrong order"),
    (a_resumed_adapter_that_is_frozen, audited, "^trainable: 0 of"),
    (a_resumed_adapter_that_is_frozen, a_loaded_adapter_goes_on_learning, "stays where it was"),
    (a_base_that_is_not_frozen, audited, "^trainable: .* is no part of adapter"),
    (gradients_cut_below_the_second_block, audited, "^start: dL/dB of model.layers.0.* is zero"),
    (gradients_cut_below_the_second_block, a_loaded_adapter_goes_on_learning, "stays where it was"),
    (merged_a_second_time, audited, "^merge: merging twice is not merging once"),
    (a_merge_that_adds_nothing, audited, "^merge: merged and unmerged logits differ"),
    (a_merge_that_adds_nothing, merged_weights, "Mismatched elements"),
    (merged_without_the_scale, audited, "^merge: merged and unmerged logits differ"),
    (merged_without_the_scale, merged_weights, "Mismatched elements"),
    (unmerged_by_subtraction, audited, "^merge: unmerging did not put the base"),
    (an_adapter_that_stays_on, audited, "^off: with the adapter off"),
    (b_that_does_not_start_at_zero, no_change_at_step_0, "^step 0 is not the base"),
    (dropout_that_never_ends, audited_with_dropout, "^merge: "),
    (a_tied_embedding_counted_twice, counted, "parameters counted"),
    (no_sum_over_broadcast_axes, gradients, "returned shape"),
    (b_whose_gradient_lacks_the_scale, gradients, "gradient of input 3"),
    (a_rotation_that_is_not_turned_back, gradients, "gradient of input 0"),
    (repeated_tokens_that_overwrite, gradients, "gradient of input 0"),
    (a_graph_that_can_be_used_twice, a_graph_used_twice, "accepted it"),
    (a_gradient_that_is_never_zeroed, gradients_start_anew, "added up"),
    (numpy_taken_for_granted, on_the_device, "device|unsupported|not allowed|ufunc"),
]


@pytest.mark.parametrize(("mistake", "check", "words"), CAUGHT, ids=lambda x: getattr(x, "__name__", ""))
def test_a_planted_mistake_is_caught(mistake, check, words, monkeypatch, tmp_path):
    mistake(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((AssertionError, TypeError), match=words):
            check(tmp_path)


BY_AUDIT = {  # which of the audit's checks see the mistake
    alpha_for_alpha_over_r: {"scale"},
    rslora_ignored: {"scale"},
    rslora_ignored_by_the_loader: {"file"},
    an_empty_adapter_saved: {"file"},
    factors_transposed_in_the_file: {"file"},
    a_resumed_adapter_that_is_frozen: {"trainable", "start", "gradient"},
    a_base_that_is_not_frozen: {"trainable"},
    gradients_cut_below_the_second_block: {"start", "gradient"},
    merged_a_second_time: {"merge"},
    a_merge_that_adds_nothing: {"merge"},
    merged_without_the_scale: {"merge"},
    unmerged_by_subtraction: {"merge"},
    an_adapter_that_stays_on: {"off"},
    dropout_that_never_ends: {"merge"},
}
AUDITS = {row[0]: row[1] for row in CAUGHT if row[1].__name__.startswith("audited")}


@pytest.mark.parametrize("mistake", BY_AUDIT, ids=lambda x: x.__name__)
def test_each_catching_check_alone_catches_it_and_without_them_the_audit_passes(mistake, monkeypatch, tmp_path):
    mistake(monkeypatch)
    for check in _Audit.CHECKS:
        monkeypatch.setattr(_Audit, "CHECKS", (check,))
        seen = False
        try:
            AUDITS[mistake](tmp_path)
        except AuditError as error:
            seen = str(error).startswith(f"{check}: ")
            assert seen, error
        assert seen == (check in BY_AUDIT[mistake]), check
    monkeypatch.setattr(_Audit, "CHECKS", tuple(check for check in ALL_CHECKS if check not in BY_AUDIT[mistake]))
    AUDITS[mistake](tmp_path)


def test_every_mistake_that_the_audit_is_there_for_has_its_checks_named():
    assert BY_AUDIT.keys() == AUDITS.keys()


@pytest.mark.parametrize("check", dict.fromkeys(row[1] for row in CAUGHT), ids=lambda check: check.__name__)
def test_without_the_mistake_the_same_check_passes(check, tmp_path):
    check(tmp_path)


# -- the audit itself --------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model):
    for seed, name in enumerate(["legal", "support"]):
        ml.add_adapter(tiny_model, ml.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False), name, seed=seed)
    return tiny_model


def test_the_audit_passes_and_leaves_the_model_as_it_was(model):
    ml.set_adapter(model, {"legal": 0.5})
    before, trained = model(IDS).data, set(model.trainable_parameters())
    report = ml.audit(model, "legal")
    names = [name for name, _ in report.checks]
    assert names == ["trainable", "scale", "count", "off", "start", "gradient", "merge", "file", "base"]
    assert "scale=2 " in str(report)
    assert np.array_equal(model(IDS).data, before)
    assert set(model.trainable_parameters()) == trained
    assert report.base_sha256 == sha256_of(base_state(model)) and repr(report) == str(report)


def test_the_audit_leaves_a_merged_model_merged_and_a_mode_and_a_mix_as_they_were(model):
    mix = {"legal": 0.5, "support": 0.25}
    ml.set_adapter(model, mix)
    model.model.layers[0].eval()
    ml.merge_adapter(model)
    before, modes = logits(model), [module.training for _, module in model.named_modules()]
    ml.audit(model, "support")
    assert is_merged(model) and np.array_equal(logits(model), before)
    assert {name: adapter.factor for name, adapter in model.adapters.items()} == mix
    assert [module.training for _, module in model.named_modules()] == modes and len(set(modes)) == 2


def test_an_audit_in_mid_training_changes_no_holes_of_dropout_and_leaves_no_gradient():
    losses = []
    for audits in (False, True):
        model = adapted(lora_dropout=0.5)
        model.loss(IDS, IDS).backward()
        if audits:
            audit(model, "default")
            assert all(p.grad is None for _, p in model.named_parameters())
        losses.append(model.loss(IDS, IDS).item())
    assert losses[0] == losses[1]


def test_the_base_is_fingerprinted_twice_and_no_more(model, monkeypatch):
    from minilora.lora import audit as module

    digests = []
    monkeypatch.setattr(module, "sha256_of", lambda state: digests.append(sha256_of(state)) or digests[-1])
    report = ml.audit(model, "legal")
    assert digests == [report.base_sha256] * 2


def test_a_base_that_a_check_changed_in_place_is_noticed_at_the_end(model, monkeypatch):
    real = LoraLayer.unmerge

    def unmerge(self):
        real(self)
        self.weight.data.reshape(-1)[0] += 1

    monkeypatch.setattr(LoraLayer, "unmerge", unmerge)
    with pytest.raises(AuditError, match="^base: the weights changed"):
        monkeypatch.setattr(_Audit, "CHECKS", ("merge",))
        ml.audit(model, "legal")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "B = 0: output bit-identical, dL/dA = 0"),
        ({"init_lora_weights": "pissa"}, "PiSSA's first A and B: output as"),
    ],
    ids=str,
)
def test_the_report_says_how_the_adapter_starts(settings, words):
    assert dict(audit(adapted(**settings), "default").checks)["start"].startswith(words)


def test_an_adapter_whose_start_is_a_small_change_breaks_its_promise(monkeypatch):
    model = adapted()
    for array in adapter_state(model, "default").values():
        array *= np.float32(0.1)
    monkeypatch.setattr(_Audit, "restart", lambda self, path, weights: None)
    with pytest.raises(AuditError, match="^start: at its start the adapter changes the output"):
        audit(model, "default")


def test_the_audit_of_an_adapter_that_is_not_there_names_those_that_are(model):
    with pytest.raises(ValueError, match="no adapter called 'nobody'; it has: legal, support"):
        ml.audit(model, "nobody")


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_report_counts_factors_and_vectors(tiny_config, rng, bias, dora):
    model = Net(tiny_config, rng)
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], bias=bias, use_dora=dora))
    found = dict(ml.audit(model, "default").checks)["count"]
    vectors = 2 * 32 * ((bias != "none") + dora)
    assert found == f"{256 + vectors} parameters = r (m + n) summed over 2 matrices" + (
        f" + {vectors} in vectors" if vectors else ""
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 7}},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ],
    ids=str,
)
def test_the_audit_passes_for_every_variant_before_and_after_a_step(tiny_model, settings):
    ml.add_adapter(tiny_model, ml.LoraConfig(**({"r": 2, "lora_alpha": 4} | settings)), "legal")
    ml.audit(tiny_model, "legal")
    optimizer = ml.AdamW(tiny_model.trainable_parameters(), lr=1e-2)
    tiny_model.loss(IDS, IDS).backward()
    optimizer.step()
    ml.audit(tiny_model, "legal")

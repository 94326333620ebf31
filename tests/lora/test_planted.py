"""Mistakes that LoRA projects have shipped, planted one at a time: for each, the check that catches it must raise.

Every row plants one mistake in the live package and names the words with which it is caught. The same check must pass
without the plant. Take the catching check away, and its row fails.
"""

import warnings

import numpy as np
import plants
import pytest
import strictarray
from plants import adapted, new_model
from smallmodels import IDS, logits

from minilora.engine.examples import EXAMPLES
from minilora.engine.gradcheck import gradcheck
from minilora.engine.tensor import OPS
from minilora.files.disk import ModelFileError
from minilora.files.gguf import to_pairs
from minilora.files.tensors import read_tensors, write_tensors
from minilora.lora import llamacpp, peft
from minilora.lora.adapters import adapter_state, add_adapter, base_state, merge_adapter, merged_state
from minilora.lora.audit import AuditError, _Audit, audit
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.measure.counts import count_parameters
from minilora.nn.optim import AdamW

ALL_CHECKS = _Audit.CHECKS
NUMBERS = 64 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + 32  # of SHAPE, the tied embedding once


# -- the checks: each returns when all is well, and raises when the mistake is there -----------------------------------


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


def round_trip(folder, **settings):
    model, other = adapted(**settings), new_model()
    save_adapter(model, folder)
    load_adapter(other, folder)
    assert np.array_equal(logits(other), logits(model)), "another adapter came back from the file"


def round_trip_with_rslora(folder):
    round_trip(folder, use_rslora=True)


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


# -- what catches which ------------------------------------------------------------------------------------------------


CAUGHT = [  # the mistake, the check, the words with which it is caught
    (plants.alpha_for_alpha_over_r, audited, r"^scale: .* has scale 8, but alpha / r is 2"),
    (plants.rslora_ignored, audited_with_rslora, r"^scale: .* has scale 2, but alpha / sqrt\(r\) is 4"),
    (plants.rslora_ignored_by_the_loader, audited_with_rslora, r"^file: the saved config gives .* scale 2$"),
    (plants.rslora_ignored_by_the_loader, round_trip_with_rslora, "^another adapter came back"),
    (plants.a_default_for_alpha, no_silent_alpha, "accepted it"),
    (plants.unmatched_targets_ignored, a_misspelled_target, "accepted it"),
    (plants.unloaded_keys_only_warned_about, a_file_with_other_tensors, "accepted it"),
    (plants.an_empty_adapter_saved, audited, "^file: .* in the saved file differs"),
    (plants.factors_transposed_in_the_file, audited, "^file: .* in the saved file differs"),
    (plants.rows_of_a_in_another_order, round_trip, "^another adapter came back"),
    (plants.q_and_k_not_permuted, gguf_rows, "wrong order"),
    (plants.a_resumed_adapter_that_is_frozen, audited, "^trainable: only 0 of"),
    (plants.a_resumed_adapter_that_is_frozen, a_loaded_adapter_goes_on_learning, "stays where it was"),
    (plants.a_base_that_is_not_frozen, audited, "^trainable: .* is trainable and not part of adapter"),
    (plants.gradients_cut_below_the_second_block, audited, "^initial: dL/dB of model.layers.0.* is zero"),
    (plants.gradients_cut_below_the_second_block, a_loaded_adapter_goes_on_learning, "stays where it was"),
    (plants.merged_a_second_time, audited, "^merge: merging twice differs from"),
    (plants.a_merge_that_adds_nothing, audited, "^merge: merged and unmerged logits differ"),
    (plants.a_merge_that_adds_nothing, merged_weights, "Mismatched elements"),
    (plants.merged_without_the_scale, audited, "^merge: merged and unmerged logits differ"),
    (plants.merged_without_the_scale, merged_weights, "Mismatched elements"),
    (plants.unmerged_by_subtraction, audited, "^merge: unmerging did not restore the base"),
    (plants.an_adapter_that_stays_on, audited, "^off: with the adapter off"),
    (plants.b_that_does_not_start_at_zero, no_change_at_step_0, "^step 0 is not the base"),
    (plants.dropout_that_never_ends, audited_with_dropout, "^merge: "),
    (plants.a_tied_embedding_counted_twice, counted, "parameters counted"),
    (plants.no_sum_over_broadcast_axes, gradients, "returned shape"),
    (plants.b_whose_gradient_lacks_the_scale, gradients, "gradient of input 3"),
    (plants.a_rotation_that_is_not_turned_back, gradients, "gradient of input 0"),
    (plants.repeated_tokens_that_overwrite, gradients, "gradient of input 0"),
    (plants.a_graph_that_can_be_used_twice, a_graph_used_twice, "accepted it"),
    (plants.a_gradient_that_is_never_zeroed, gradients_start_anew, "added up"),
    (plants.numpy_taken_for_granted, on_the_device, "device|unsupported|not allowed|ufunc"),
]


@pytest.mark.parametrize(("mistake", "check", "words"), CAUGHT, ids=lambda x: getattr(x, "__name__", ""))
def test_a_planted_mistake_is_caught(mistake, check, words, monkeypatch, tmp_path):
    mistake(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((AssertionError, TypeError), match=words):
            check(tmp_path)


BY_AUDIT = {  # which of the audit's checks see the mistake
    plants.alpha_for_alpha_over_r: {"scale"},
    plants.rslora_ignored: {"scale"},
    plants.rslora_ignored_by_the_loader: {"file"},
    plants.an_empty_adapter_saved: {"file"},
    plants.factors_transposed_in_the_file: {"file"},
    plants.a_resumed_adapter_that_is_frozen: {"trainable", "initial", "gradient"},
    plants.a_base_that_is_not_frozen: {"trainable"},
    plants.gradients_cut_below_the_second_block: {"initial", "gradient"},
    plants.merged_a_second_time: {"merge"},
    plants.a_merge_that_adds_nothing: {"merge"},
    plants.merged_without_the_scale: {"merge"},
    plants.unmerged_by_subtraction: {"merge"},
    plants.an_adapter_that_stays_on: {"off"},
    plants.dropout_that_never_ends: {"merge"},
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

"""Mistakes that LoRA projects have shipped, planted one at a time in the live package: the audit names each."""

import plants
import pytest
from plants import adapted

from minilora.lora.audit import AuditError, _Audit, audit

CAUGHT = [  # the mistake, the settings of the adapter, the audit's words, the checks that see it
    (plants.alpha_for_alpha_over_r, {}, r"scale: .* has scale 8, but alpha / r is 2", {"scale"}),
    (plants.rslora_ignored, {"use_rslora": True}, r"scale: .* has scale 2, but alpha / sqrt\(r\) is 4", {"scale"}),
    (plants.rslora_ignored_by_the_loader, {"use_rslora": True}, r"file: the saved config gives .* scale 2$", {"file"}),
    (plants.an_empty_adapter_saved, {}, "file: .* in the saved file differs", {"file"}),
    (plants.factors_transposed_in_the_file, {}, "file: .* in the saved file differs", {"file"}),
    (plants.a_resumed_adapter_that_is_frozen, {}, "trainable: only 0 of", {"trainable", "initial", "gradient"}),
    (plants.a_base_that_is_not_frozen, {}, "trainable: .* is trainable and not part of adapter", {"trainable"}),
    (plants.gradients_cut_below_the_second_block, {}, "initial: dL/dB of model.layers.0.* is zero",
     {"initial", "gradient"}),
    (plants.merged_a_second_time, {}, "merge: merging twice differs from", {"merge"}),
    (plants.a_merge_that_adds_nothing, {}, "merge: merged and unmerged logits differ", {"merge"}),
    (plants.unmerged_by_subtraction, {}, "merge: unmerging did not restore the base", {"merge"}),
    (plants.an_adapter_that_stays_on, {}, "off: with the adapter off", {"off"}),
    (plants.dropout_that_never_ends, {"lora_dropout": 0.5}, "merge: ", {"merge"}),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "settings", "words", "checks"), CAUGHT, ids=lambda x: getattr(x, "__name__", ""))
def test_each_catching_check_alone_catches_a_mistake_and_without_them_the_audit_passes(
    mistake, settings, words, checks, monkeypatch
):
    mistake(monkeypatch)
    with pytest.raises(AuditError, match=f"^{words}"):
        audit(adapted(**settings), "default")
    others = tuple(check for check in _Audit.CHECKS if check not in checks)
    for check in checks:
        monkeypatch.setattr(_Audit, "CHECKS", (check,))
        with pytest.raises(AuditError, match=f"^{check}: "):
            audit(adapted(**settings), "default")
    monkeypatch.setattr(_Audit, "CHECKS", others)
    audit(adapted(**settings), "default")

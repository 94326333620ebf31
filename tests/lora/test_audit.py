"""The audit: it passes where all is well, leaves the model as it was, and says what it found."""

import operator

import numpy as np
import pytest
from plants import adapted
from smallmodels import IDS, VARIANTS, Net, logits

import minilora as ml
import minilora.lora.audit as audit_module
from minilora.lora.adapters import adapter_state, base_state, is_merged, lora_modules
from minilora.lora.audit import AuditError, _Audit, audit
from minilora.lora.layer import LoraLinear, LoraWeights
from minilora.measure.ledger import peak
from minilora.nn.module import sha256_of


def test_the_audit_passes_and_leaves_the_model_as_it_was(model):
    ml.set_adapter(model, {"legal": 0.5})
    before, trained = model(IDS).data, set(model.trainable_parameters())
    report = ml.audit(model, "legal")
    names = [name for name, _ in report.checks]
    assert names == ["trainable", "scale", "count", "off", "initial", "gradient", "merge", "file", "base"]
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
    now = {name: (adapter.factor, adapter.folder) for name, adapter in model.adapters.items()}
    assert now == {name: (factor, None) for name, factor in mix.items()}  # its own folder was only passing
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


@pytest.mark.parametrize("name", ["legal", "support"])
@pytest.mark.parametrize("at", ["unmerge_adapter", "set_adapter", "sha256_of", "_Audit.merge", "Tensor.backward"])
def test_an_audit_that_is_interrupted_leaves_the_model_as_it_was(model, monkeypatch, at, name):
    ml.set_adapter(model, "support")
    ml.merge_adapter(model)
    before, trained = logits(model), set(model.trainable_parameters())
    function = operator.attrgetter(at)(audit_module)

    def interrupted(*inputs):
        function(*inputs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(f"minilora.lora.audit.{at}", interrupted)
        audit(model, name)
    assert is_merged(model) and np.array_equal(logits(model), before)
    assert set(model.trainable_parameters()) == trained
    assert all(module.training for _, module in model.named_modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_base_is_hashed_before_and_after_or_only_after_if_the_hash_before_is_known(model, monkeypatch):
    from minilora.lora import audit as module

    hashed = []
    monkeypatch.setattr(module, "sha256_of", lambda state: hashed.append(sha256_of(state)) or hashed[-1])
    known = ml.audit(model, "legal").base_sha256
    assert hashed == [known] * 2
    assert ml.audit(model, "legal", base_sha256=known).base_sha256 == known and hashed == [known] * 3
    model.model.norm.weight.data[0] += np.float32(1e-3)
    with pytest.raises(AuditError, match=f"^base: the weights changed: sha256 was {known[:16]}, is "):
        ml.audit(model, "legal", base_sha256=known)


def test_a_base_that_a_check_changed_in_place_is_noticed_at_the_end(model, monkeypatch):
    real = LoraLinear.unmerge

    def unmerge(self):
        real(self)
        self.weight.data.reshape(-1)[0] += 1

    monkeypatch.setattr(LoraLinear, "unmerge", unmerge)
    with pytest.raises(AuditError, match="^base: the weights changed"):
        monkeypatch.setattr(_Audit, "CHECKS", ("merge",))
        ml.audit(model, "legal")


def test_an_adapter_that_changes_the_output_a_little_when_it_is_new_fails(monkeypatch):
    model = adapted()
    for array in adapter_state(model, "default").values():
        array *= np.float32(1e-3)
    monkeypatch.setattr(_Audit, "reset", lambda self, path, weights: None)
    with pytest.raises(AuditError, match="^initial: a newly initialised adapter changes the output"):
        audit(model, "default")


def test_a_merged_update_that_is_off_by_a_percent_is_noticed(model, monkeypatch):
    real = LoraWeights.delta
    monkeypatch.setattr(LoraWeights, "delta", lambda self, w=None: real(self, w) * np.float32(1.01))
    with pytest.raises(AuditError, match="^merge: merged and unmerged logits differ"):
        ml.audit(model, "legal")


def test_a_second_merge_that_changes_a_single_row_is_noticed(model, monkeypatch):
    real = LoraLinear.merge

    def merge(self):
        again = self.merged
        real(self)
        if again:
            self.weight.data[0] += np.float32(1)

    monkeypatch.setattr(LoraLinear, "merge", merge)
    with pytest.raises(AuditError, match="^merge: merging twice differs"):
        ml.audit(model, "legal")


def test_an_audit_holds_one_merged_matrix_at_a_time():
    model, _ = ml.load("tiny")
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False), name="legal")
    matrices = [module.weight.data.nbytes for module in lora_modules(model).values()]
    assert peak(lambda: ml.audit(model, "legal")) < sum(matrices) / 2


def test_a_frozen_a_that_is_trained_all_the_same_is_noticed(tiny_model):
    ml.add_adapter(tiny_model, ml.LoraConfig(r=2, lora_alpha=4, freeze_A=True, init_lora_weights=False))
    weights, *others = ml.lora.adapters.adapter_weights(tiny_model, "default").values()
    told = dict(ml.audit(tiny_model, "default").checks)["gradient"]
    assert told == f"all {1 + len(others)} trainable matrices have one"
    real = type(weights).requires_grad_
    weights.requires_grad_ = lambda wanted=True: (
        real(weights, wanted),
        setattr(weights.lora_A, "requires_grad", wanted),
    )
    with pytest.raises(ml.AuditError, match=r"^trainable: only"):
        ml.audit(tiny_model, "default")


def test_the_audit_of_an_adapter_that_is_not_there_names_those_that_are(model):
    with pytest.raises(ValueError, match="no adapter called 'nobody'; it has: legal, support"):
        ml.audit(model, "nobody")


@pytest.mark.parametrize("dora", [False, True])
def test_the_report_counts_factors_and_vectors(tiny_config, rng, dora):
    model = Net(tiny_config, rng)
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], use_dora=dora))
    found = dict(ml.audit(model, "default").checks)["count"]
    vectors = 2 * 32 * dora
    assert found == f"{256 + vectors} parameters = r (m + n) summed over 2 matrices" + (
        f" + {vectors} in vectors" if vectors else ""
    )


PLAIN = {"plain": {}, "frozen A": {"freeze_A": True}, "gaussian": {"init_lora_weights": "gaussian"},
         "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 7}}}  # fmt: skip


@pytest.mark.parametrize("settings", (PLAIN | VARIANTS).values(), ids=PLAIN | VARIANTS)
def test_the_audit_passes_for_every_variant_before_and_after_a_step(tiny_model, settings):
    ml.add_adapter(tiny_model, ml.LoraConfig(**({"r": 2, "lora_alpha": 4} | settings)), "legal")
    pissa = settings.get("init_lora_weights") == "pissa"
    words = "A and B from the base: output within" if pissa else "B = 0: output bit-identical, dL/dA = 0"
    assert dict(ml.audit(tiny_model, "legal").checks)["initial"].startswith(words)
    optimizer = ml.AdamW(tiny_model.trainable_parameters(), lr=1e-2)
    tiny_model.loss(IDS, IDS).backward()
    optimizer.step()
    ml.audit(tiny_model, "legal")
    ml.audit(tiny_model, "legal", np.setdiff1d(np.arange(64), IDS)[None])  # tokens that the step has not met

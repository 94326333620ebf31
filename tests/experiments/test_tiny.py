"""A trial on the tiny base: what it returns, that it leaves the base as it was, and what it refuses."""

import json
from functools import cache

import numpy as np
import pytest

from minilora.experiments import tiny
from minilora.experiments.tiny import VARIANTS, samples_of, tiny_base, tiny_run
from minilora.lora.adapters import base_state
from minilora.nn.module import sha256_of
from minilora.train.loop import fit

FEW = {"steps": 2, "batch_size": 1, "data": "support", "held_out": 2}


@cache
def plain():
    """The trial with which others are compared. Read-only."""
    return tiny_run(lr=1e-2, **FEW)


def test_a_trial_is_what_its_settings_say():
    first = plain()
    tiny_run(lr=1e-2, method="full", **FEW)
    again = tiny_run(lr=1e-2, every=1, **FEW)
    curve = again.pop("curve")
    assert again == {name: value for name, value in first.items() if name != "curve"} and len(first["train"]) == 2
    assert curve == [(0, first["before"]["validation"]), (1, curve[1][1]), (2, first["validation"])]
    for value in again.values():  # the caller's own
        value.clear() if isinstance(value, (dict, list)) else None
    assert tiny_run(lr=1e-2, **FEW) == first and first["before"].keys() == {"validation", "test", "general"}


@pytest.mark.parametrize("more", [{"variant": name} for name in VARIANTS] + [{"method": "full"}])
def test_the_base_is_as_it_was_behind_a_trial(more):
    model, _ = tiny_base()
    before = sha256_of(base_state(model))
    result = tiny_run(lr=1e-2, **FEW, **more)
    assert sha256_of(base_state(model)) == before
    assert not model.adapters and all(p.requires_grad for _, p in model.named_parameters())
    assert result["test"] != result["before"]["test"]


def test_each_module_may_have_its_own_rank():
    assert tiny_run(lr=1e-2, targets={"q_proj": 3, "v_proj": 4}, **FEW)["trained"] == 4 * (3 * 256 + 4 * 192)


@pytest.mark.parametrize(("variant", "frozen"), [("zero-a", []), ("lora-fa", []), ("zero-a", ["lora_B"])])
def test_either_factor_can_be_zero_at_first_or_frozen(monkeypatch, variant, frozen):
    seen = []

    def look(model, *more, **settings):
        factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
        before = {name: p.data.copy() for name, p in factors.items()}
        history = fit(model, *more, **settings)
        seen.append({name: (before[name], p.data.copy()) for name, p in factors.items()})
        return history

    monkeypatch.setattr(tiny, "fit", look)
    result = tiny_run(lr=1e-2, variant=variant, frozen=frozen, **FEW)
    still = {*frozen, "lora_A"} if variant == "lora-fa" else {*frozen}
    zero = "lora_B" if variant == "lora-fa" else "lora_A"
    assert result["train"][0] == plain()["train"][0]  # no update yet: the base's loss
    for name, (before, after) in seen[0].items():
        assert before.any() != (zero in name), name
        assert np.array_equal(before, after) == any(factor in name for factor in still), name
    b = np.concatenate([before.ravel() for name, (before, _) in seen[0].items() if "lora_B" in name])
    assert zero == "lora_B" or b.var() == pytest.approx(1 / 8, rel=0.05)


def test_of_all_records_some_can_be_drawn(monkeypatch):
    seen = []
    monkeypatch.setattr(
        tiny, "fit", lambda model, samples, *more, **rest: seen.append(samples) or fit(model, samples, *more, **rest)
    )
    for more in ({}, {"records": 5}, {"records": 5, "seed": 1}):
        tiny_run(lr=1e-2, **FEW | {"steps": 1}, **more)
    whole, few, other = seen
    assert whole == samples_of("support")["train"] and len({sample.ids for sample in few}) == 5
    assert few != other and all(sample in whole for sample in few + other)


def test_what_is_frozen_is_not_trained():
    whole, embedding = tiny_run(lr=1e-3, method="full", **FEW), tiny_base()[0].config.vocab_size * 128
    assert whole["trained"] == sum(p.size for _, p in tiny_base()[0].named_parameters())
    without = tiny_run(lr=1e-3, method="full", frozen=["embed_tokens"], **FEW)
    assert whole["trained"] - without["trained"] == embedding and whole["test"] != without["test"]
    a, both = tiny_run(lr=1e-2, frozen=["lora_B"], **FEW), tiny_run(lr=1e-2, frozen=["lora_A"], **FEW)
    assert a["test"] == a["before"]["test"] and both["test"] != both["before"]["test"]  # B is zero at first
    assert both == tiny_run(lr=1e-2, variant="lora-fa", **FEW)
    with pytest.raises(ValueError, match="no parameter's name contains 'lora_C'"):
        tiny_run(lr=1e-2, frozen=["lora_C"], **FEW)
    assert tiny_run(lr=1e-3, method="full", **FEW) == whole  # nothing stays frozen


def test_the_schedule_is_the_loops():
    few = FEW | {"steps": 4}
    constant, cosine = tiny_run(lr=1e-2, schedule="constant", **few), tiny_run(lr=1e-2, **few)
    assert constant["train"][:2] == cosine["train"][:2] and constant["test"] != cosine["test"]


def test_lora_plus_is_lora_at_a_ratio_of_one():
    assert tiny_run(lr=1e-2, variant="lora+", ratio=1, **FEW)["test"] == plain()["test"]
    assert tiny_run(lr=1e-2, variant="lora+", **FEW)["test"] != plain()["test"]


def test_validation_and_test_share_no_sample_and_every_second_test_record_is_for_validation_if_none_is(tmp_path):
    sets = samples_of("support")
    ids = [{sample.ids for sample in sets[name]} for name in ("train", "validation", "test")]
    assert all(ids) and not ids[0] & ids[1] and not (ids[0] | ids[1]) & ids[2]
    rows = [{"question": f"q{i}", "answer": f"a{i}", "split": "test" if i < 5 else "train"} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sets = samples_of(str(tmp_path / "data.jsonl"))
    _, tokenizer = tiny_base()
    texts = {name: "".join(tokenizer.decode(list(sample.ids)) for sample in sets[name]) for name in sets}
    held_out = {name: [i for i in range(8) if f"a{i}" in texts[name]] for name in ("validation", "test", "train")}
    assert held_out == {"validation": [0, 2, 4], "test": [1, 3], "train": [5, 6, 7]}


def test_the_seed_decides_the_adapter_as_well_as_the_order_of_the_samples(tmp_path):
    rows = [{"question": "q", "answer": f"a{i}", "split": split} for i, split in enumerate(["train", "test", "test"])]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))  # of one sample there is no order
    one = FEW | {"data": str(tmp_path / "data.jsonl")}
    assert tiny_run(lr=1e-2, seed=0, **one)["test"] != tiny_run(lr=1e-2, seed=1, **one)["test"]
    full = [tiny_run(lr=1e-3, method="full", seed=seed, **FEW | {"steps": 1})["train"] for seed in (0, 1)]
    assert full[0] != full[1]


def test_a_shuffled_language_gives_every_token_another_meaning_everywhere():
    usual, shuffled = samples_of("support"), samples_of("support", shuffled=True)
    model, _ = tiny_base()
    means = {}
    for name in usual:
        for one, other in zip(usual[name], shuffled[name], strict=True):
            assert [label < 0 for label in one.labels] == [label < 0 for label in other.labels]
            for token, new in [*zip(one.ids, other.ids, strict=True), *zip(one.labels, other.labels, strict=True)]:
                assert means.setdefault(token, new) == new and (new == token if token < 0 else new >= 0)
            assert len(one.others) == len(other.others)
    assert len(set(means.values())) == len(means) > 100 and max(means.values()) < model.config.vocab_size
    assert sum(token == new for token, new in means.items()) < 20
    assert tiny_run(lr=1e-2, shuffled=True, **FEW)["before"]["test"] > plain()["before"]["test"] + 2  # nats


@pytest.mark.parametrize("wrong", [{"method": "half"}, {"variant": "vera"}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        tiny_run(lr=1e-2, **FEW, **wrong)

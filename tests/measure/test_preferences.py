"""Which of two answers is preferred: the report by its definition, and the command's numbers and finetune's."""

import re
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
from jobs import options
from modelfiles import write_rows
from smallmodels import SMALL, new_model

from minilora.commands.eval import EvalOptions, evaluate_adapters, page
from minilora.data.labels import LabelTask
from minilora.data.records import Record
from minilora.data.samples import encode_records
from minilora.engine.fused import NOT_SCORED
from minilora.measure import loss
from minilora.measure.fields import checked_of
from minilora.measure.labels import Labelled
from minilora.measure.preferences import Preferred, preferences, with_reference
from minilora.measure.statistics import wilson
from minilora.nn.parts import Pair, Sample
from minilora.pages.preferences import preference_lines
from minilora.train.job import finetune

ROWS = [
    {"prompt": f"What is word {i}?", "chosen": f"Word {i} is a claim.", "rejected": f"I do not like {i * i} or {i}."}
    | {"split": "test" if i % 3 == 0 else "train"}
    for i in range(24)
]


def record(**more):
    return Record("a", ({"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}), **more)


def test_only_records_that_all_have_a_rejected_answer_are_pairs():
    assert isinstance(checked_of(None, [record(rejected="no")] * 2, []), Preferred)
    assert checked_of(None, [record(rejected="no"), record()], []) is None and checked_of(None, [], []) is None


def test_a_model_prefers_nothing_by_more_than_itself_or_among_no_pairs_and_what_is_none_is_refused():
    model, (yes, no) = new_model(SMALL), (Sample((1, 2, word), (NOT_SCORED, NOT_SCORED, word)) for word in (3, 4))
    found = preferences(model, with_reference(model, [Pair(yes, no), Pair(no, yes)]))
    assert found == {"loss": pytest.approx(np.log(2)), "chosen": 0.5, "accuracy": 0, "margin": 0}
    with pytest.raises(ValueError, match="no pairs"):
        preferences(new_model(SMALL), [])
    with pytest.raises(TypeError, match="expected pairs, got a Record: encode_pairs"):
        preferences(new_model(SMALL), [record()])


def test_a_share_is_of_log_ratios_above_zero_and_a_shift_of_those_above_the_reference():
    rng = np.random.default_rng(0)
    ratios = {name: rng.normal(size=40).tolist() for name in ("base", "one", "two")} | {"same": [0.0] * 40}
    ratios["two"][:9] = ratios["base"][:9]  # as much as the reference is not more
    report = Preferred(None, []).report(ratios)
    assert [row["name"] for row in report["rows"]] == list(ratios)
    assert (report["reference"], report["subject"], report["records"]) == ("base", "same", 40)
    for row in report["rows"]:
        own, base = np.array(ratios[row["name"]]), np.array(ratios["base"])
        found = wilson(own > 0)
        assert list(row["chosen"].values()) == pytest.approx([found.mean, found.low, found.high])
        assert row["log_ratio"] == pytest.approx(own.mean())
        assert row["lead"]["value"] == pytest.approx(-(own > 0).mean())  # the last one prefers none
        if row["name"] != "base":
            assert row["shifted"]["value"] == pytest.approx((own > base).mean())
    assert "shifted" not in report["rows"][0]
    lines = list(preference_lines(report, 80))
    for row, line in zip(report["rows"], lines[2:], strict=False):
        chosen, more, nats = re.split(r"  +", line)[1:]
        assert chosen.startswith(f"{100 * row['chosen']['value']:.1f} [") and float(nats) == round(row["log_ratio"], 2)
        assert more == "-" or more.startswith(f"{100 * row['shifted']['value']:.1f} [")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_eval_says_of_pairs_is_what_finetune_said(home, tmp_path, quick_jobs, method, monkeypatch):
    rate = {"lora": 2e-2, "full": 2e-3}[method]
    made = options(home, tmp_path / "run", data=write_rows(tmp_path, ROWS), loss="dpo", method=method, lr=rate, steps=3)
    told = finetune(made, answers=False)["preferences"]["unseen"]
    where = {"adapter": [made.out]} if method == "lora" else {"base": made.out}
    computed = Counter()
    losses = loss.losses_without_grad
    monkeypatch.setattr(
        loss, "losses_without_grad", lambda m, samples: (computed.update(samples), losses(m, samples))[1]
    )
    result = evaluate_adapters(EvalOptions(**where, limit=8))
    report = result["preferences"]["own/unseen"]
    rows = report["rows"]
    assert set(computed.values()) == {len(rows)} and len(computed) > 2 * 8  # each answer once, by each contender
    assert [row["name"] for row in rows] == (["base", "run"] if method == "lora" else ["base"])
    after = told["chosen"][1]
    assert rows[-1]["chosen"]["value"] == pytest.approx(after) and report["records"] == 8
    if method == "lora":
        assert rows[0]["chosen"]["value"] == pytest.approx(told["chosen"][0])
        assert rows[1]["shifted"]["value"] == pytest.approx(told["accuracy"][1])
        shift = 0.1 * (rows[1]["log_ratio"] - rows[0]["log_ratio"])
        assert shift == pytest.approx(told["margin"][1], rel=1e-3)
    text = page(result)
    assert "8 pairs: which answer is more probable" in text and max(map(len, text.splitlines())) <= 80


def test_a_model_that_predicts_nan_has_no_accuracy_and_no_preference(talker, tokenizer):
    broken, pairs, texts = deepcopy(talker), [record(rejected="no")] * 2, [record(label="yes")] * 2
    broken.model.norm.weight.data[0] = np.nan
    preferred = Preferred(None, pairs)
    for ask in (
        lambda: preferred.ask(broken, tokenizer),
        lambda: preferred.ask_rejected(broken, tokenizer, encode_records(pairs, tokenizer), np.zeros(2)),
        lambda: Labelled(LabelTask.of(["no", "yes"]), texts).ask(broken, tokenizer),
    ):
        with pytest.raises(ValueError, match="predicts NaN or infinity instead of probabilities: look at its weights"):
            ask()


def test_a_pair_with_an_answer_that_the_model_cannot_see_is_named_and_not_asked(home, tmp_path, caplog):
    answers = [("So.", "a claim " * 1500), ("a claim " * 1500, "So.")]
    long = [{"prompt": "Why?", "chosen": yes, "rejected": no, "split": "test"} for yes, no in answers]
    found = evaluate_adapters(EvalOptions(base=str(home / "base"), data=[write_rows(tmp_path, [*ROWS, *long])]))
    assert found["preferences"]["own/unseen"]["records"] == 8
    assert caplog.messages[-1].endswith("the model can see: line-25, line-26; shorten them")

"""`finetune --loss dpo`: the base, or the adapter that is trained further, is the reference; a stop changes no byte."""

import json
import math
import re

import pytest
from jobs import options

import minilora as ml
from minilora.data.samples import encode_pairs, truncate
from minilora.measure.loss import sample_losses
from minilora.nn.parts import Pair, Sample
from minilora.train.job import finetune

ROWS = [
    {"prompt": f"What is word {i}?", "chosen": f"Word {i} is a claim.", "rejected": f"I do not like {i * i} or {i}."}
    | {"split": ("train", "train", "train", "validation", "test")[i % 5]}
    for i in range(15)
]


@pytest.fixture
def pairs(home, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    usual = dict(data=str(path), loss="dpo", lr=2e-2, beta=0.3, batch_size=3)
    return lambda out, **change: options(home, tmp_path / out, **usual | change)


def test_the_base_is_the_reference_and_never_changes(pairs, home, capsys):
    chosen = pairs("run", steps=12)
    ml.show_progress()
    metrics = finetune(chosen, answers=False)
    ml.show_progress(False)
    assert re.findall(r"loss (before|after) .* (\d+)/\2 ", capsys.readouterr().err)  # a pair is two sequences
    before, after = metrics["loss"]["unseen"]
    assert before == pytest.approx(math.log(2)) and after < before and metrics["train_loss"][0] == pytest.approx(before)
    assert metrics["base_sha256"][0] == metrics["base_sha256"][1] and metrics["options"]["beta"] == 0.3
    told = metrics["preferences"]["unseen"]
    assert told["margin"][0] == 0 < told["margin"][1] and told["accuracy"][1] > 0.5
    model, tokenizer = ml.load(home / "base")
    records = [r for r in ml.read_records(chosen.data) if r.split == "test"]
    sides = [[s for pair in encode_pairs(records, tokenizer) for s in pair.sequences][i::2] for i in (0, 1)]
    base = [sample_losses(model, side) for side in sides]
    ml.load_adapter(model, chosen.out)
    now = [sample_losses(model, side) for side in sides]
    margins = 0.3 * ((now[1] - now[0]) - (base[1] - base[0]))
    assert told["margin"][1] == pytest.approx(margins.mean(), rel=1e-3)


def test_an_adapter_that_is_trained_further_is_its_own_reference(pairs):
    finetune(pairs("first", loss="sft", beta=0.1), measure=False, answers=False)
    metrics = finetune(pairs("second", adapter=pairs("first").out, lr=1e-9, steps=1), answers=False)
    assert metrics["loss"]["unseen"] == pytest.approx([math.log(2)] * 2, abs=1e-6)


def test_full_fine_tuning_needs_no_second_model_either(pairs):
    metrics = finetune(pairs("full", method="full", lr=1e-2), answers=False)
    assert metrics["loss"]["unseen"][0] == pytest.approx(math.log(2))
    assert metrics["train_loss"][-1] < metrics["train_loss"][0]


def test_the_chosen_answer_is_the_last_message_and_the_rejected_one_the_other(pairs, home):
    _, tokenizer = ml.load(home / "base")
    records = ml.read_records(pairs("run").data)
    for pair, row in zip(encode_pairs(records, tokenizer), ROWS, strict=True):
        for answer, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            scored = [token for token, label in zip(side.ids, side.labels, strict=True) if label != -100]
            assert tokenizer.decode(scored).startswith(row[answer])


def test_sft_on_preferences_learns_the_chosen_answers_and_says_what_learns_from_the_others(pairs, home, caplog):
    caplog.set_level("INFO", "minilora")
    chosen = pairs("sft", loss="sft", beta=0.1, steps=10)
    metrics = finetune(chosen, answers=False)
    hints = [line for line in caplog.messages if "--loss dpo" in line]
    assert "preferences" not in metrics and metrics["loss"]["unseen"][1] < metrics["loss"]["unseen"][0]
    finetune(pairs("dpo", steps=1), measure=False)
    assert len(hints) == 1 and [line for line in caplog.messages if "--loss dpo" in line] == hints


def test_a_pair_is_cut_on_both_sides_and_dropped_where_an_answer_is_gone():
    def sample(n):
        return Sample(tuple(range(n)), (-100, -100, *range(2, n)))

    kept, longer, dropped = truncate([Pair(sample(5), sample(9)), Pair(sample(3), sample(4))], 4)
    assert [(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in kept] == [(4, 4), (3, 4)] and longer == 1
    assert dropped == 0 and truncate([Pair(sample(5), sample(9), 1.5, 0.7)], 2) == ([], 1, 1)
    late = Sample(tuple(range(9)), (*[-100] * 6, 6, 7, 8))
    assert truncate([Pair(sample(5), late)], 4) == ([], 1, 1)  # one answer is gone
    assert truncate([Pair(sample(5), sample(9), 1.5, 0.7)], 8)[0][0].reference == 1.5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"q": "x", "a": "y", "id": "odd"}], "record odd has no rejected answer: DPO needs the columns prompt"),
        ([{"text": "A long text. " * 99}], "other.jsonl: record .* has no rejected answer: DPO needs the columns"),
    ],
)
def test_data_without_preferences_are_refused_in_one_line(pairs, tmp_path, rows, message):
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message) as caught:
        finetune(pairs("run", data=str(tmp_path / "other.jsonl")))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_defaults_are_those_of_preferences():
    usual = ml.Options(loss="dpo")
    assert (usual.learning_rate, usual.adapter_scale, usual.beta) == (pytest.approx(2e-4), 1.0, 0.1)
    with pytest.raises(ValueError, match="beta"):
        ml.Options(loss="dpo", beta=0.0)

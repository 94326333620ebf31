"""Adapters on data sets: which records are measured, whose numbers they are, and what a summary says of them."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hearing import counts_of
from jobs import read_data
from modelfiles import TERMS, write_rows
from smallmodels import lora_config, shaken

import minilora as ml
from minilora.data.rows import SPLITS, DataError
from minilora.lora.adapters import active_factors
from minilora.measure import statistics
from minilora.measure.scores import MeasuredSet, Scores, measure, summary


def without_splits(records=TERMS):
    return [{key: value for key, value in one.items() if key != "split"} for one in records]


def names(sets):
    return {each.name: (each.kind, len(each.samples), len(each.asked)) for each in sets}


# -- which records -----------------------------------------------------------------------------------------------------


def test_the_sets_of_built_in_data_are_what_finetune_holds_out(tokenizer):
    assert names(read_data(["legal", "general"], tokenizer, 512, paraphrases=80)) == {
        "legal/reworded": ("reworded", 80, 80),
        "legal/paraphrase": ("paraphrase", 80, 80),
        "legal/unseen": ("unseen", 30, 30),
        "general": ("all", 60, 60),
    }
    limited = read_data(["legal", "general"], tokenizer, 512, limit=20, paraphrases=80)
    assert [len(each.samples) for each in limited] == [20, 20, 15, 20]
    more = read_data(["legal"], tokenizer, 512, limit=120, paraphrases=80)  # a limit may be more than the usual number
    assert [len(each.samples) for each in more] == [80, 120, 30]
    assert [len(each.samples) for each in read_data(["legal"], tokenizer, 512)] == [80, 240, 30]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_is_measured_alone(split, home, tokenizer):
    (own,) = read_data([str(home / "data.jsonl")], tokenizer, 512, split=split)
    questions = [one["question"] for one in TERMS if one["split"] == split]
    assert (own.name, own.kind) == (f"data/{split}", split)
    assert [record.prompt[-1]["content"] for record in own.asked] == questions
    (text,) = read_data([str(home / "novel.txt")], tokenizer, 60, split=split)
    assert text.name == f"novel/{split}" and len(text.samples) == {"train": 9, "validation": 1, "test": 1}[split]
    (text,) = read_data([str(home / "novel.txt")], tokenizer, 20, limit=2, split=split)
    assert len(text.samples) == 2


def test_a_text_measured_whole_has_the_samples_of_its_splits_and_no_end_token(home, tokenizer):
    novel = str(home / "novel.txt")
    (whole,) = read_data([novel], tokenizer, 50)
    parts = [read_data([novel], tokenizer, 50, split=split)[0].samples for split in SPLITS]
    assert whole.samples == [sample for part in parts for sample in part]


def test_training_records_are_examples_for_the_others_and_not_for_themselves(tmp_path, tokenizer):
    rows = [{"text": f"{i}", "label": "ab"[i % 2], "split": "train" if i < 2 else "test"} for i in range(4)]
    path = write_rows(tmp_path, rows)
    train, test = (read_data([path], tokenizer, 512, split=split)[0].checked for split in ("train", "test"))
    assert list(train.examples) == [] and list(test.examples) == list(train.records)


def test_a_split_without_records_is_refused(tmp_path, tokenizer):
    path = write_rows(tmp_path, [one | {"split": "train"} for one in TERMS])
    with pytest.raises(ValueError, match="no record of the split 'test'"):
        read_data([path], tokenizer, 512, split="test")


def test_if_nothing_is_held_out_all_records_are_measured_and_that_is_logged(tmp_path, tokenizer, caplog):
    unsplit, seen = "no record names a split", "this loss includes training records"
    for split, trained, words in ((None, False, [unsplit]), ("test", False, []), ("train", True, [seen])):
        path = write_rows(tmp_path, [one | {"split": split, "paraphrase": None} for one in TERMS])
        caplog.clear()
        with caplog.at_level("INFO", "minilora"):
            found = read_data([path], tokenizer, 512, trained=[path] * trained)
        assert names(found) == {"own": ("all", 12, 12)} and len(caplog.messages) == len(words)
        assert all(word in line for word, line in zip(words, caplog.messages, strict=True))


def test_only_records_with_keywords_are_asked(tmp_path, tokenizer):
    records = [one | {"keywords": []} if i % 3 else one for i, one in enumerate(without_splits())]
    assert names(read_data([write_rows(tmp_path, records)], tokenizer, 512)) == {"own": ("all", 12, 4)}


def test_texts_are_measured_in_sequences_and_columns_may_have_other_names(home, tmp_path, tokenizer):
    (novel,) = read_data([str(home / "novel.txt")], tokenizer, 100)
    assert novel.name == "novel" and {len(sample.ids) for sample in novel.samples[:-1]} == {100} and novel.asked == []
    assert len(read_data([str(home / "novel.txt")], tokenizer, 100, limit=3)[0].samples) == 3
    renamed = [{"q": one["question"], "a": one["answer"], "words": one["keywords"]} for one in TERMS]
    path = write_rows(tmp_path, renamed)
    (own,) = read_data([path], tokenizer, 512, field={"keywords": "words"})
    assert len(own.asked) == 12


def test_truncated_records_are_logged(tmp_path, tokenizer, caplog):
    with caplog.at_level("INFO", "minilora"):
        (own,) = read_data([write_rows(tmp_path, without_splits())], tokenizer, 36)
    assert max(len(sample.ids) for sample in own.samples) <= 36 and "12 of 12 records are longer" in caplog.text
    with pytest.raises(ValueError, match="nothing is left to score within --max-length 8"):
        read_data([write_rows(tmp_path, without_splits())], tokenizer, 8)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path, tokenizer):
    places = []
    for name in "ab":
        (tmp_path / name).mkdir()
        places.append(write_rows(tmp_path / name, without_splits()))
    assert [each.name for each in read_data(places, tokenizer, 512)] == places


def test_the_same_data_twice_and_missing_data_are_refused(tokenizer):
    with pytest.raises(ValueError, match="legal is given twice"):
        read_data(["legal", "legal"], tokenizer, 512)
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        read_data(["gone.jsonl"], tokenizer, 512)


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(home):
    """A model with two adapters that do something, its tokenizer, and two small sets."""
    model, tokenizer = ml.load(home / "base")
    for seed, name in enumerate(("one", "two")):
        ml.add_adapter(model, lora_config(), name=name, seed=seed)
        shaken(model, name, seed)
    return model, tokenizer, read_data([str(home / "data.jsonl")], tokenizer, 512, limit=3)


def test_a_weighted_combination_is_measured_like_an_adapter_and_the_model_ends_as_its_base(two, monkeypatch):
    model, tokenizer, sets = two
    short = partial(ml.answer_all, max_new_tokens=12)
    monkeypatch.setattr("minilora.measure.scores.answer_all", short)
    mix = {"one": 0.5, "two": 0.5}
    found = measure(model, tokenizer, {"base": None, "mix": mix, "none": {"one": 0.0}}, sets)
    assert active_factors(model) == {}
    for each in sets:
        ml.set_adapter(model, mix)
        scores = found[each.name]["mix"]
        assert scores.nats.sum() / scores.tokens.sum() == pytest.approx(ml.mean_loss(model, each.samples), rel=1e-5)
        answers = short(model, tokenizer, each.asked)
        assert scores.recall.mean() == pytest.approx(ml.keyword_recall(answers, each.asked))
        base = found[each.name]["base"].nats
        assert found[each.name]["none"].nats == pytest.approx(base, rel=1e-5) != pytest.approx(scores.nats, rel=1e-5)


def test_progress_counts_every_record_and_question_of_each_adapter(two):
    model, tokenizer, sets = two
    sets = [replace(each, asked=each.asked[1:]) for each in sets]
    for unit, counted in (("record", "samples"), ("answer", "asked")):
        with counts_of(unit) as heard:
            measure(model, tokenizer, {"base": None, "one": "one"}, sets)
        assert sum(heard) == 2 * sum(len(getattr(each, counted)) for each in sets)


# -- numbers -----------------------------------------------------------------------------------------------------------


def scores(nats, recall=()):
    return Scores(np.array(nats, float), np.array([2, 2, 4]), np.array(recall, float))


SETS = [MeasuredSet("own/unseen", "data/own.jsonl", "unseen", [ml.Sample((0,) * 3, (-100, 1, 1))] * 3, [])]


def test_a_summary_counts_what_is_scored_and_its_intervals_have_its_seed(monkeypatch):
    seeds, draw = [], statistics.bootstrap
    monkeypatch.setattr(statistics, "bootstrap", lambda n, of, seed=0: seeds.append(seed) or draw(n, of, seed))
    found = summary({"own/unseen": {"base": scores([4, 6, 14], [0, 0.5])}}, SETS, 7)
    about = {"data": "data/own.jsonl", "kind": "unseen", "records": 3, "scored_tokens": 6, "asked": 0}
    assert found["sets"] == {"own/unseen": about} and seeds == [7, 7] and found["seed"] == 7


def test_a_summary_is_plain_numbers_and_what_is_not_finite_is_null():
    result = summary({"own/unseen": {"base": scores([4, 6, 14], [0, 0.5]), "a": scores([2, 4, 2], [0.5, 1])}}, SETS)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    base = result["scores"]["own/unseen"]["base"]
    assert base["loss"]["value"] == 3 and base["keyword_recall"]["value"] == 0.25
    assert (base["loss"]["low"], base["loss"]["high"]) == (2, 3.5)  # the first or the last record, three times
    (difference,) = result["differences"]["own/unseen"]
    assert (difference["of"], difference["less"]) == ("a", "base") and difference["loss"]["value"] == -2
    one = {"own/unseen": {"base": Scores(np.array([8.0]), np.array([2]), np.array([math.nan]))}}
    found = summary(one, SETS)["scores"]["own/unseen"]["base"]
    assert found["loss"] == {"value": 4, "low": None, "high": None} and found["keyword_recall"]["value"] is None
    huge = {"own/unseen": {"base": Scores(np.array([9e3]), np.array([2]), np.array([]))}}
    found = summary(huge, SETS)["scores"]["own/unseen"]["base"]
    assert found["perplexity"]["value"] is None and "keyword_recall" not in found

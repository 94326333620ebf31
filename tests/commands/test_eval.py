"""Versions on data sets: which records are measured, that the numbers are finetune's own, and what the page says."""

import json
import math

import numpy as np
import pytest
from hearing import counts_of
from jobs import options
from modelfiles import TERMS

import minilora as ml
from minilora.commands.eval import (
    EvalOptions,
    MeasuredSet,
    Scores,
    evaluate_versions,
    measure,
    read_sets,
    summary,
    table,
    trained_on,
)
from minilora.data.rows import DataError
from minilora.lora.adapters import active_factors
from minilora.train.job import finetune
from minilora.train.material import prepare


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):
    """Two runs on one base and one data set, and the metrics of the first."""
    folder = tmp_path_factory.mktemp("runs")
    metrics = finetune(options(home, folder / "one", steps=8, lr=0.03))
    finetune(options(home, folder / "two", steps=2, seed=1))
    return folder, metrics


def measured(home, runs, **change):
    settings = dict(base=str(home / "base"), data=[str(home / "data.jsonl"), "general"])
    return evaluate_versions(EvalOptions(**settings | {"adapter": [str(runs[0] / "one")]} | change))


def write(folder, records, name="own.jsonl"):
    (folder / name).write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(folder / name)


def without_splits(records=TERMS):
    return [{key: value for key, value in one.items() if key != "split"} for one in records]


# -- which records -----------------------------------------------------------------------------------------------------


def names(sets):
    return {each.name: (each.kind, len(each.samples), len(each.asked)) for each in sets}


def test_the_sets_of_built_in_data_are_what_finetune_holds_out(tokenizer):
    assert names(read_sets(["legal", "general"], tokenizer)) == {
        "legal/paraphrase": ("paraphrase", 80, 80),
        "legal/unseen": ("unseen", 30, 30),
        "general": ("all", 60, 60),
    }


def test_a_limit_holds_for_every_set_and_may_be_more_than_finetune_measures(tokenizer):
    assert [len(each.samples) for each in read_sets(["legal", "general"], tokenizer, 20)] == [20, 15, 20]
    assert [len(each.samples) for each in read_sets(["legal"], tokenizer, 1000)] == [240, 30]


def test_of_a_file_that_holds_nothing_out_all_records_are_measured_and_that_is_said(tmp_path, tokenizer, caplog):
    unsplit, seen = "no record names a split", "this loss includes training records"
    for split, trained, words in ((None, False, [unsplit]), ("test", False, []), ("train", True, [seen])):
        path = write(tmp_path, [one | {"split": split, "paraphrase": None} for one in TERMS])
        caplog.clear()
        with caplog.at_level("INFO", "minilora"):
            found = read_sets([path], tokenizer, trained=[path] * trained)
        assert names(found) == {"own": ("all", 12, 12)} and len(caplog.messages) == len(words)
        assert all(word in line for word, line in zip(words, caplog.messages, strict=True))
        assert [record.prompt[-1]["content"] for record in found[0].asked] == [one["question"] for one in TERMS]


def test_data_that_an_adapter_was_trained_on_are_divided_as_for_training(tmp_path, home, tokenizer):
    path, novel = write(tmp_path, without_splits()), str(home / "novel.txt")
    found = read_sets([path, novel], tokenizer, max_length=60, trained=[path, novel])
    own, text = (prepare(data, tokenizer, max_length=60, eval_records=80).scored for data in (path, novel))
    assert {each.name: each.samples for each in found} == {
        "own/paraphrase": own["paraphrase"], "own/unseen": own["unseen"], "novel/unseen": text["unseen"]
    }  # fmt: skip
    assert len(own["unseen"]) == 1 and len(text["unseen"]) == 1


def test_only_records_with_keywords_are_asked(tmp_path, tokenizer):
    records = [one | {"keywords": []} if i % 3 else one for i, one in enumerate(without_splits())]
    assert names(read_sets([write(tmp_path, records)], tokenizer)) == {"own": ("all", 12, 4)}


def test_a_text_is_measured_in_sequences(home, tokenizer):
    (novel,) = read_sets([str(home / "novel.txt")], tokenizer, max_length=100)
    assert novel.name == "novel" and {len(sample.ids) for sample in novel.samples[:-1]} == {100} and novel.asked == []
    assert len(read_sets([str(home / "novel.txt")], tokenizer, 3, max_length=100)[0].samples) == 3


def test_rows_of_text_are_divided_too_and_columns_may_have_other_names(tmp_path, tokenizer):
    (rows,) = read_sets([write(tmp_path, [{"text": "hello 123. " * 30}] * 3)], tokenizer, max_length=100)
    assert len(rows.samples) > 6 and rows.asked == []
    renamed = [{"q": one["question"], "a": one["answer"], "words": one["keywords"]} for one in TERMS]
    (own,) = read_sets([write(tmp_path, renamed)], tokenizer, field={"keywords": "words"})
    assert len(own.asked) == 12


def test_records_that_are_cut_are_told(tmp_path, tokenizer, caplog):
    with caplog.at_level("INFO", "minilora"):
        (own,) = read_sets([write(tmp_path, without_splits())], tokenizer, max_length=36)
    assert max(len(sample.ids) for sample in own.samples) <= 36 and "12 of 12 records are longer" in caplog.text
    with pytest.raises(ValueError, match="nothing is left to score within --max-length 8"):
        read_sets([write(tmp_path, without_splits())], tokenizer, max_length=8)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path, tokenizer):
    places = []
    for name in "ab":
        (tmp_path / name).mkdir()
        places.append(write(tmp_path / name, without_splits()))
    assert [each.name for each in read_sets(places, tokenizer)] == places


def test_the_same_data_twice_or_data_that_are_not_there_are_refused(tokenizer):
    with pytest.raises(ValueError, match="legal is given twice"):
        read_sets(["legal", "legal"], tokenizer)
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        read_sets(["gone.jsonl"], tokenizer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"limit": 0}, "limit must be at least 1"),
        ({"max_length": 7}, "max_length must be at least 8"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"matrix": "x.pdf"}, r"a \.png or an \.svg file"),
    ],
)
def test_values_that_mean_nothing_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        EvalOptions(**change)


def test_what_the_model_cannot_see_whole_is_refused_before_anything_is_measured(home, runs, tmp_path):
    long = write(tmp_path, [TERMS[0] | {"question": "x" * 970, "split": None}])
    with pytest.raises(ValueError, match=r"own\.jsonl: record x/0: a question of 9\d\d tokens"):
        measured(home, runs, data=[long], max_length=2000)
    assert (
        measured(home, runs, data=[long], max_length=2000, no_recall=True)["scores"]["own"]["one"]["loss"]["value"] > 0
    )


# -- the numbers -------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_that_finetune_reported(home, runs):
    result, metrics = measured(home, runs), runs[1]
    for kind, name in (("paraphrase", "data/paraphrase"), ("unseen", "data/unseen"), ("general", "general")):
        for i, version in enumerate(("base", "one")):
            found = result["scores"][name][version]
            assert found["loss"]["value"] == pytest.approx(metrics["loss"][kind][i], rel=1e-5)
            assert found["perplexity"]["value"] == pytest.approx(math.exp(metrics["loss"][kind][i]), rel=1e-4)
            if kind != "general":
                assert found["keyword_recall"]["value"] == pytest.approx(metrics["keyword_recall"][kind][i])
    assert result["sets"]["general"]["records"] == 60 and result["sets"]["data/unseen"]["asked"] == 2


def test_versions_are_compared_with_the_base_and_with_each_other(home, runs):
    result = measured(home, runs, adapter=[f"a={runs[0] / 'one'}", f"b={runs[0] / 'two'}"], limit=6)
    found, scores = result["differences"]["general"], result["scores"]["general"]
    assert [(one["of"], one["less"]) for one in found] == [("a", "base"), ("b", "base"), ("b", "a")]
    for one in found:
        expected = scores[one["of"]]["loss"]["value"] - scores[one["less"]]["loss"]["value"]
        assert one["loss"]["value"] == pytest.approx(expected) and one["loss"]["low"] <= expected <= one["loss"]["high"]
    assert result["adapters"]["a"] == {"folder": str(runs[0] / "one"), "trained_on": str(home / "data.jsonl")}


def test_without_data_it_is_what_the_adapters_were_trained_on_and_general_text(home, runs):
    sets = measured(home, runs, data=None, no_recall=True, limit=2)["sets"]
    assert list(sets) == ["data/paraphrase", "data/unseen", "general"]


def test_without_answers_there_is_no_recall_and_without_adapters_the_base_alone(home, runs):
    result = measured(home, runs, adapter=None, no_recall=True, limit=4)
    assert all(list(found) == ["base"] and "keyword_recall" not in found["base"] for found in result["scores"].values())
    assert table(result).count(" -\n") == 3


def test_a_mix_is_a_version_like_any_other_and_the_model_ends_as_its_base(home, runs):
    model, tokenizer = ml.load(home / "base")
    for name in ("one", "two"):
        ml.load_adapter(model, runs[0] / name, name=name)
    sets = read_sets([str(home / "data.jsonl")], tokenizer)
    mix = {"one": 0.5, "two": 0.5}
    found = measure(model, tokenizer, {"base": None, "mix": mix, "none": {"one": 0.0}}, sets)
    assert active_factors(model) == {}
    for each in sets:
        ml.set_adapter(model, mix)
        scores = found[each.name]["mix"]
        assert scores.nats.sum() / scores.tokens.sum() == pytest.approx(ml.mean_loss(model, each.samples), rel=1e-5)
        assert scores.recall.mean() == pytest.approx(
            ml.keyword_recall(ml.answer_all(model, tokenizer, each.asked), each.asked)
        )
        assert found[each.name]["none"].nats == pytest.approx(found[each.name]["base"].nats, rel=1e-5)


def test_progress_counts_every_record_and_every_answer_of_every_version(home, tokenizer, runs):
    model, tokenizer = ml.load(home / "base")
    sets = read_sets([str(home / "data.jsonl"), "general"], tokenizer, 5)
    for unit in ("record", "answer"):
        with counts_of(unit) as heard:
            measure(model, tokenizer, {"base": None, "again": None}, sets)
        assert sum(heard) == 2 * sum(len(each.samples) for each in sets)


# -- the page ----------------------------------------------------------------------------------------------------------


def scores(nats, recall=()):
    return Scores(np.array(nats, float), np.array([2, 2, 4]), np.array(recall, float))


SETS = [MeasuredSet("own/unseen", "data/own.jsonl", "unseen", [ml.Sample((0,) * 3, (-100, 1, 1))] * 3, [])]
FOUND = {"own/unseen": {"base": scores([4, 6, 14], [0, 0.5]), "a-name-of-24-letters-long": scores([2, 4, 2], [0.5, 1])}}


def test_a_summary_is_plain_numbers_and_what_is_not_finite_is_null():
    result = summary(FOUND, SETS)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    base = result["scores"]["own/unseen"]["base"]
    assert base["loss"]["value"] == 3 and base["keyword_recall"]["value"] == 0.25
    assert (base["loss"]["low"], base["loss"]["high"]) == (2, 3.5)  # the first or the last record, three times
    one = {"own/unseen": {"base": Scores(np.array([8.0]), np.array([2]), np.array([math.nan]))}}
    found = summary(one, SETS)["scores"]["own/unseen"]["base"]
    assert found["loss"] == {"value": 4, "low": None, "high": None} and found["keyword_recall"]["value"] is None
    huge = {"own/unseen": {"base": Scores(np.array([9e3]), np.array([2]), np.array([]))}}
    assert summary(huge, SETS)["scores"]["own/unseen"]["base"]["perplexity"]["value"] is None


PAGE = """\
-- own.jsonl: records never trained, 3 records ---------------------------------
                      loss, nats per token     perplexity   keyword recall
base                  3.000 [2.000, 3.500]           20.1   25.0% [0.0, 50.0]
a-name-of-24-letter…  1.000 [0.500, 2.000]            2.7   75.0% [50.0, 100.0]

difference                         of loss                    of recall, points
a-name-of-24-letters-long less b…  -2.000 [-3.000, -1.000]    +50.0 [+50.0, +50.0]

[low, high]: the middle 95% of 2,000 bootstrap draws of the records. Differences
are paired, both versions on the same draw: where 0 is outside of the interval,
one version is better than the choice of records can explain."""


def test_the_page_of_known_scores():
    assert table(summary(FOUND, SETS)) == PAGE


def test_the_page_says_what_is_not_finite():
    broken = {"own/unseen": {"base": FOUND["own/unseen"]["base"], "a": scores([math.nan, 1, 1], [0, 0])}}
    page = table(summary(broken, SETS))
    assert "a                     not finite                        -   0.0% [0.0, 0.0]" in page
    assert "a less base                        not finite" in page


def test_every_page_fits_eighty_columns(home, runs):
    assert max(map(len, table(measured(home, runs, limit=4)).splitlines())) <= 80


def test_the_data_of_an_adapter_are_those_that_its_folder_names_and_that_are_still_there(tmp_path):
    own = write(tmp_path, TERMS)
    for name, expected in (("legal", "legal"), (own, own), ("gone.jsonl", None), (None, None)):
        (tmp_path / "minilora.json").write_text(json.dumps({"data": {"name": name}} if name else {}), encoding="utf-8")
        assert trained_on(tmp_path) == expected

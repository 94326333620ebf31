"""Adapters measured by the command: whose data, finetune's own numbers, and what the page says of them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jobs
import numpy as np
import pytest
from jobs import options, read_data, trained
from modelfiles import TERMS, write_rows
from peftfiles import link

import minilora as ml
from minilora.cli import main
from minilora.commands.eval import EvalOptions, _changes, _values, data_of, evaluate_adapters, page
from minilora.data.rows import DataError
from minilora.measure.scores import MeasuredSet, Scores, summary
from minilora.models.merge import export
from minilora.pages.text import width_of
from minilora.train.job import finetune
from minilora.train.material import prepare


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory, no_picture):
    """Two runs on one base and one data set, and the metrics of the first."""
    folder = tmp_path_factory.mktemp("runs")
    metrics = finetune(options(home, folder / "one", steps=8, lr=0.03))
    shutil.copytree(folder / "one", folder / "two")
    return folder, metrics


def measured(home, runs, **change):
    return jobs.measured(home, **{"data": [home / "data.jsonl", "general"], "adapter": runs[0] / "one"} | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"matrix": "x.pdf"}, r"a \.png or an \.svg file"),
        ({"matrix": f"{__file__}/x.png"}, r"no picture can be written there"),
        ({"confusion": "x.png", "no_recall": True}, "--confusion draws answers: leave out --no-recall"),
        ({"context": "x.txt", "passages": "x.pdf"}, r"a \.png or an \.svg file"),
    ],
)
def test_values_that_mean_nothing_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        EvalOptions(**change)


def test_a_table_is_straight_whatever_the_adapters_are_called():
    scores = {"perplexity": {"value": 1.0}, "loss": {"value": 1.5, "low": 1.0, "high": 2.0}}
    for name in ("legal", "返品", "e\u0301", "返品" * 30):
        heading, line = _values({name: scores})
        assert width_of(line.partition("1.5")[0]) == heading.index("loss")
        heading, line = _changes([{"of": name, "less": "base", **scores}])
        assert width_of(line.partition("+1.5")[0]) == heading.index("loss")


def test_the_numbers_are_those_that_finetune_reported(home, runs):
    result, metrics = measured(home, runs), runs[1]
    for kind, name in (("paraphrase", "data/paraphrase"), ("unseen", "data/unseen"), ("general", "general")):
        for i, adapter in enumerate(("base", "one")):
            found = result["scores"][name][adapter]
            assert found["loss"]["value"] == pytest.approx(metrics["loss"][kind][i], rel=1e-5)
            assert found["perplexity"]["value"] == pytest.approx(math.exp(metrics["loss"][kind][i]), rel=1e-4)
            if kind != "general":
                assert found["keyword_recall"]["value"] == pytest.approx(metrics["keyword_recall"][kind][i])
    assert result["sets"]["general"]["records"] == 60 and result["sets"]["data/unseen"]["asked"] == 2
    assert max(map(len, page(result).splitlines())) <= 80


def test_a_whole_model_is_measured_on_what_was_held_out_of_its_training(home, tmp_path, no_picture):
    rows = [{key: value for key, value in one.items() if key != "split"} for one in TERMS]
    rows = [{"ask" if key == "question" else key: value for key, value in one.items()} for one in rows]
    own = write_rows(tmp_path, rows)
    chosen = options(home, tmp_path / "whole", data=own, field={"question": "ask"}, method="full", steps=4)
    metrics = finetune(chosen, answers=False)
    for data in ([own], None):
        result = evaluate_adapters(EvalOptions(base=str(tmp_path / "whole"), data=data, no_recall=True))
        assert ("general" in result["sets"]) == (data is None) and result["adapters"] == {}
        for name, scores in result["scores"].items():
            after = metrics["loss"][name.removeprefix("own/")][1]
            assert scores["base"]["loss"]["value"] == pytest.approx(after, rel=1e-5)


def test_adapters_are_compared_with_the_base_and_with_each_other(home, runs, tmp_path):
    named = [f"a={runs[0] / 'one'}", f"b={runs[0] / 'two'}"]
    result = measured(home, runs, adapter=named, limit=6, no_recall=True)
    found, scores = result["differences"]["general"], result["scores"]["general"]
    assert [(one["of"], one["less"]) for one in found] == [("a", "base"), ("b", "base"), ("b", "a")]
    for one in found:
        expected = scores[one["of"]]["loss"]["value"] - scores[one["less"]]["loss"]["value"]
        assert one["loss"]["value"] == pytest.approx(expected) and one["loss"]["low"] <= expected <= one["loss"]["high"]
    assert result["adapters"]["a"] == {"folder": str(runs[0] / "one"), "trained_on": str(home / "data.jsonl")}
    copy = shutil.copy(home / "data.jsonl", tmp_path)  # the same data under another name
    other = measured(home, runs, data=[str(copy)], limit=1, no_recall=True)
    assert other["adapters"]["one"]["trained_on"] == str(copy) and list(other["sets"]) == list(result["sets"])[:2]
    assert "keyword_recall" not in scores["base"] and page(result).count(" -\n") == 6 * 3
    one = measured(home, runs, data=["general"], limit=1, no_recall=True)
    assert "[" in page(result) and "[" not in page(one) and "interval" not in page(one)  # of one record there is none


def test_a_split_and_a_picture_that_cannot_be_written(home, tmp_path, capsys, monkeypatch):
    words = ["eval", "--base", str(home / "base"), "--data", str(home / "data.jsonl"), "--split", "validation"]
    assert main([*words, "--no-recall"]) == 0
    assert "-- data.jsonl: the validation split, 2 records -" in capsys.readouterr().out
    (tmp_path / "x.svg").touch()
    monkeypatch.setattr("minilora.commands.eval.evaluate_adapters", None)  # nothing is measured:
    assert main([*words, "--matrix", str(tmp_path / "x.svg" / "y.svg")]) == 2


def test_every_interval_has_the_seed_that_was_given_and_a_passage_leaves_room_for_the_answer(
    home, runs, tmp_path, monkeypatch
):
    pair = {"prompt": "So?", "chosen": "yes", "rejected": "no", "keywords": ["yes"]}
    given = {"data": [write_rows(tmp_path, [pair])], "context": str(tmp_path / "book.txt"), "seed": 7}
    for name in ("open_book_report", "_report"):
        monkeypatch.setattr(f"minilora.commands.eval.{name}", lambda *given: given[-1])
    monkeypatch.setattr("minilora.commands.eval.summary", lambda scores, sets, seed=0: {"seed": seed})
    (tmp_path / "book.txt").write_text("Yes, an owl.")
    result = measured(home, runs, **given)
    assert result["seed"] == 7 and result["open_book"] == result["preferences"] == {"own": 7}
    (tmp_path / "book.txt").write_text("owl " * 300)
    with pytest.raises(ValueError, match="room for 960: divide it"):  # of the 1,024 tokens that the model can see
        measured(home, runs, **given)


def test_a_question_that_the_model_cannot_read_whole_is_refused_before_anything_is_measured(home, runs, tmp_path):
    long = write_rows(tmp_path, [TERMS[0] | {"question": "x" * 970, "split": None}])
    with pytest.raises(ValueError, match=r"own\.jsonl: record x/0: a question of 9\d\d tokens"):
        measured(home, runs, data=[long], max_length=2000)
    found = measured(home, runs, data=[long], max_length=2000, no_recall=True)
    assert found["scores"]["own"]["one"]["loss"]["value"] > 0


def test_other_data_have_the_columns_of_training_if_these_are_there(home, runs, tmp_path, said, capsys):
    asked = [{"ask": one["question"], "tell": one["answer"]} for one in TERMS]
    field = {"question": "ask", "answer": "tell"}
    for name, columns in (("a", field), ("b", field), ("c", {"question": "answer", "answer": "question"})):
        rows = asked if columns == field else TERMS
        own = write_rows(tmp_path, rows, f"{name}.jsonl")
        trained(options(home, tmp_path / name, data=own, field=columns, steps=1))
    other = tmp_path / "other"
    other.mkdir()  # the first of its files is named by its columns alone
    (other / "train.csv").write_text("ask,tell,note\nWhy?,So.,-\n")
    (other / "test.csv").write_text("\nask,tell,note\nWhen?,Now.,-\n")
    both = [str(tmp_path / name) for name in "ab"]
    result = measured(home, runs, adapter=both, data=[str(other), "general"], limit=2, no_recall=True)
    assert [*result["sets"]] == ["other/unseen", "general"]
    with pytest.raises(DataError, match="which columns"):  # adapters that call them differently
        measured(home, runs, adapter=[*both, str(tmp_path / "c")], data=[str(other)], no_recall=True)
    plain = write_rows(tmp_path, [{"question": "Why?", "answer": "So."}], "plain.jsonl")  # which are found
    assert [*measured(home, runs, adapter=both, data=[plain], no_recall=True)["sets"]] == ["plain"]
    with pytest.raises(DataError, match="expected a JSON object"):
        measured(home, runs, adapter=both, data=[write_rows(tmp_path, [3], "bad.jsonl")], no_recall=True)


# -- the data that an adapter was trained on ---------------------------------------------------------------------------


def test_data_that_an_adapter_was_trained_on_are_divided_as_for_training(tmp_path, home, tokenizer):
    path = write_rows(tmp_path, [{key: value for key, value in one.items() if key != "split"} for one in TERMS])
    novel = str(home / "novel.txt")
    found = read_data([path, novel], tokenizer, 60, paraphrases=80, trained=[path, novel])
    own, text = (prepare(data, tokenizer, max_length=60, eval_records=80).scored for data in (path, novel))
    assert {each.name: each.samples for each in found} == {
        "own/paraphrase": own["paraphrase"], "own/unseen": own["unseen"], "novel/unseen": text["unseen"]
    }  # fmt: skip
    assert len(own["unseen"]) == 1 and len(text["unseen"]) == 1


def test_a_text_of_which_nothing_was_held_out_is_measured_whole_with_a_warning(home, tokenizer, caplog):
    novel = str(home / "novel.txt")
    (whole,) = read_data([novel], tokenizer, 400, trained=[novel])
    assert whole.kind == "all" and sum(len(sample.ids) for sample in whole.samples) > 600
    assert "novel.txt: nothing is held out, so this loss includes training records" in caplog.text
    with pytest.raises(ValueError, match=r"novel\.txt: no record of the split 'test': leave out --split"):
        read_data([novel], tokenizer, 400, trained=[novel], split="test")


@pytest.fixture
def moved(home, tmp_path, monkeypatch):
    """A folder, in which we are, with own.jsonl and an adapter in run/ that was trained on it."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path, TERMS)
    trained(options(home, "run", data="own.jsonl", steps=1))
    return tmp_path


def sets_of(home, caplog):
    """The sets that are measured without --data, and what is logged."""
    caplog.clear()
    with caplog.at_level("INFO", "minilora"):
        result = evaluate_adapters(EvalOptions(adapter=["../run"], base=str(home / "base"), no_recall=True, limit=2))
    return list(result["sets"]), [line for line in caplog.messages if "run" in line]


def test_data_are_found_from_another_folder_and_what_is_gone_or_changed_is_logged(home, moved, caplog, monkeypatch):
    (moved / "elsewhere").mkdir()
    monkeypatch.chdir(moved / "elsewhere")
    assert sets_of(home, caplog) == (["own/paraphrase", "own/unseen", "general"], [])
    write_rows(moved, TERMS[:-1])
    sets, (line,) = sets_of(home, caplog)
    assert len(sets) == 3 and "own.jsonl has changed since ../run was trained on it" in line
    (moved / "own.jsonl").unlink()
    sets, (line,) = sets_of(home, caplog)
    assert sets == ["general"] and line.endswith("own.jsonl, are not here: give their path with --data")
    (moved / "run" / "minilora.json").unlink()
    sets, (line,) = sets_of(home, caplog)
    assert sets == ["general"] and "no minilora.json that names its training data" in line


def test_data_that_are_given_are_compared_with_those_of_training(home, moved, said):
    settings = dict(adapter=["run"], base=str(home / "base"), no_recall=True, limit=2)

    def found(*data):
        before = len(said())
        sets = evaluate_adapters(EvalOptions(**settings, data=list(data)))["sets"]
        return [*sets], [line for line in said()[before:] if "has changed since" in line or "training data of" in line]

    shutil.copy("own.jsonl", "copy.jsonl")
    assert found("own.jsonl") == (["own/paraphrase", "own/unseen"], [])
    write_rows(moved, [*TERMS[:2], TERMS[2] | {"split": "test"}, *TERMS[3:]], "next.jsonl")
    start = len(said())
    trained(options(home, "more", data="next.jsonl", adapter="run", steps=1))
    seen = "next.jsonl: 1 of 3 records that are measured are in the training data of run, so"
    assert any(line.startswith(seen) for line in said()[start:])
    write_rows(moved, TERMS[:-1])
    line = "has changed since run was trained on it: the loss may include training records"
    for place in ("own.jsonl", f"../{moved.name}/own.jsonl"):
        assert found(place) == (["own/paraphrase", "own/unseen"], [f"{place} {line}"])
    assert found("copy.jsonl", "general")[1] == []
    (moved / "own.jsonl").unlink()
    (moved / "own.jsonl").mkdir()  # it cannot be read
    write_rows(moved, TERMS, "other.jsonl")
    (moved / "other.jsonl").write_text((moved / "other.jsonl").read_text() + "\n\n")
    assert found("other.jsonl")[1] == []


def test_data_are_found_from_a_file_that_was_exported_and_through_a_link(home, moved, monkeypatch):
    export(home / "base", moved / "run", moved / "files" / "run.gguf")
    (moved / "far" / "away").mkdir(parents=True)
    link(moved / "far" / "away" / "run", moved / "run")
    monkeypatch.chdir(moved / "far")
    for adapter in (moved / "run", moved / "files" / "run.gguf", moved / "far" / "away" / "run"):
        assert Path(data_of(adapter)).samefile(moved / "own.jsonl")


def test_an_adapter_of_a_whole_model_is_measured_on_its_own_data_alone(home, tmp_path, caplog):
    own, base = write_rows(tmp_path, TERMS), str(tmp_path / "whole")
    trained(options(home, base, data=own, method="full", steps=1))
    other = write_rows(tmp_path, TERMS, "other.jsonl")
    trained(options(home, tmp_path / "run", base=base, data=other, steps=1))
    write_rows(tmp_path, TERMS[:-1])
    found = evaluate_adapters(EvalOptions(adapter=[str(tmp_path / "run")], base=base, no_recall=True, limit=2))
    assert list(found["sets"]) == ["other/paraphrase", "other/unseen", "general"] and "changed" not in caplog.text
    evaluate_adapters(EvalOptions(base=base, no_recall=True, limit=2))
    assert f"own.jsonl has changed since {base} was trained on it" in caplog.text


def test_columns_under_other_names_are_those_of_training_unless_others_are_given(home, tmp_path):
    asked = [{"topic" if key == "question" else key: value for key, value in one.items()} for one in TERMS]
    other = write_rows(tmp_path, [one | {"then": one["topic"][::-1]} for one in asked])
    trained(options(home, tmp_path / "run", data=other, steps=1, field={"question": "topic"}))
    given = dict(adapter=[str(tmp_path / "run")], base=str(home / "base"), no_recall=True, limit=2)
    found = evaluate_adapters(EvalOptions(**given))
    assert list(found["sets"]) == ["own/paraphrase", "own/unseen", "general"]
    plain = evaluate_adapters(EvalOptions(base=str(home / "base"), no_recall=True, limit=2))["scores"]["general"]
    assert found["scores"]["general"]["base"] == plain["base"]  # general has a topic, too, but its own columns
    assert (
        evaluate_adapters(EvalOptions(**given, data=[other]))["scores"]["own/unseen"] == found["scores"]["own/unseen"]
    )
    changed = evaluate_adapters(EvalOptions(**given, field={"question": "then"}))["scores"]
    assert changed["own/unseen"] != found["scores"]["own/unseen"] and changed["general"] == found["scores"]["general"]
    with pytest.raises(ValueError, match="question=then: no such column"):  # data given are all read as the flags say
        evaluate_adapters(EvalOptions(**given, data=[other, "general"], field={"question": "then"}))
    notes = json.loads((tmp_path / "run" / "minilora.json").read_text())
    for bad, said in (
        ({"question": ["topic"]}, "no such column"),
        ({"ask": "question"}, "reads no 'ask'"),
        ("ask", "object"),
    ):
        notes["data"]["field"] = bad
        (tmp_path / "run" / "minilora.json").write_text(json.dumps(notes))
        with pytest.raises(ValueError, match=said):
            evaluate_adapters(EvalOptions(**given))


def test_data_that_two_adapters_learned_with_different_columns_are_refused(home, tmp_path):
    other = write_rows(tmp_path, [one | {"then": f"{one['question']} And why?"} for one in TERMS])
    for name, field in (("one", None), ("two", {"question": "then"})):
        trained(options(home, tmp_path / name, data=other, steps=1, field=field))
    both = dict(adapter=[str(tmp_path / name) for name in ("one", "two")], base=str(home / "base"), no_recall=True)
    for data in ([other], None):
        with pytest.raises(ValueError, match="own.jsonl: adapters learned it with different columns: give --field, or"):
            evaluate_adapters(EvalOptions(**both, data=data, limit=2))
    assert evaluate_adapters(EvalOptions(**both, data=[other], limit=2, field={"question": "then"}))["scores"]


def test_the_column_of_the_labels_is_stored_with_the_others(home, tmp_path):
    rows = [{"body": f"number {i}", "topic": "ab"[i % 2], "category": "x"} for i in range(12)]
    chosen = options(
        home, tmp_path / "run", data=write_rows(tmp_path, rows), steps=1, field={"text": "body"}, label="topic"
    )
    finetune(chosen, measure=False)
    given = dict(adapter=[str(tmp_path / "run")], base=str(home / "base"), no_recall=True, data=[chosen.data])
    assert list(evaluate_adapters(EvalOptions(**given))["sets"]) == ["own/unseen"]  # by category, all would be the same


def test_built_in_data_are_found_by_their_name(tmp_path):
    for name, expected in (("legal", "legal"), ("gone.jsonl", None), (None, None)):
        (tmp_path / "minilora.json").write_text(json.dumps({"data": {"name": name}} if name else {}), encoding="utf-8")
        assert data_of(tmp_path) == expected


# -- the page ----------------------------------------------------------------------------------------------------------


def scores(nats, recall=()):
    return Scores(np.array(nats, float), np.array([2, 2, 4]), np.array(recall, float))


SETS = [
    MeasuredSet("own/unseen", "data/own.jsonl", "unseen", [ml.Sample((0,) * 3, (-100, 1, 1))] * 3, [ml.Record("x")] * 2)
]
FOUND = {"own/unseen": {"base": scores([4, 6, 14], [0, 0.5]), "a-name-of-24-letters-long": scores([2, 4, 2], [0.5, 1])}}
PAGE = """\
-- own.jsonl: questions not in the training data, 3 records --------------------
                      loss, nats per token     perplexity   keyword recall, %
base                  3.000 [2.000, 3.500]           20.1   25.0 [0.0, 50.0]
a-name-of-24-letter…  1.000 [0.500, 2.000]            2.7   75.0 [50.0, 100.0]

difference                         loss                       recall, points
a-name-of-24-letters-long minus …  -2.000 [-3.000, -1.000]    +50.0 [+50.0, +50.0]

[low, high]: 95 % interval, from 2,000 bootstrap draws of the records;
differences are paired. A difference is significant if its interval excludes 0."""


def test_the_page_of_known_scores():
    assert page(summary(FOUND, SETS)) == PAGE


def test_the_page_says_why_there_is_no_recall():
    bare = [replace(SETS[0], name=f"own/{kind}", asked=[]) for kind in ("unseen", "paraphrase")]
    found = {each.name: {"base": scores([4, 6, 14])} for each in bare}
    told = "-: no record of own.jsonl has keywords, which recall needs: add a column keywords."
    assert " ".join(page(summary(found, bare)).split()).count(told) == 1
    assert "no record" not in page(summary({"own/unseen": found["own/unseen"]}, SETS))  # asked, but for --no-recall


def test_the_page_says_what_is_not_finite():
    broken = {"own/unseen": {"base": FOUND["own/unseen"]["base"], "a": scores([math.nan, 1, 1], [0, 0])}}
    broken["own/unseen"]["far"] = scores([40, 40, 80], [0, 0])  # e to the 20th
    text = page(summary(broken, SETS))
    assert "20.000 [20.000, 20.000]     4.9e+08   0.0" in text
    assert "a                     not finite                        -   0.0 [0.0, 0.0]" in text
    assert "a minus base                       not finite" in text

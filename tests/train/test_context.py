"""A job with passages: what is trained on, stored and measured, and how adapters are asked afterwards."""

import json
import re
from functools import partial

import pytest
from jobs import measured, options, trained
from modelfiles import TERMS, write_jsonl

from minilora.commands import report
from minilora.commands.eval import page
from minilora.data.passages import TEMPLATE, fill
from minilora.generate.as_trained import template_of
from minilora.measure.recall import answer_all
from minilora.models.with_adapters import load_with_adapters
from minilora.train.job import finetune
from minilora.train.material import prepare


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Those that `eval` asks for are as short as those of a job."""
    for place in ("open_book", "scores"):
        monkeypatch.setattr(f"minilora.measure.{place}.answer_all", partial(answer_all, max_new_tokens=8))


PASSAGES = [f"Number {i} greets with hello, and it is {i}." for i in range(12)]


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """A run with passages from a file: its folder, the file, its metrics."""
    folder = tmp_path_factory.mktemp("context")
    book = folder / "book.txt"
    book.write_text("\n\n".join(PASSAGES), encoding="utf-8")
    return folder / "run", book, finetune(options(home, folder / "run", context=str(book), steps=2))


def test_eval_gives_the_loss_that_finetune_gave(home, run, tmp_path, caplog):
    folder, _, metrics = run
    book = tmp_path / "book.txt"  # with a passage that is longer than --max-length, and is not read
    book.write_text("\n\n".join([*PASSAGES, "zebra " * 110]), encoding="utf-8")
    scores = measured(home, home / "data.jsonl", folder, context=str(book))["scores"]
    assert scores.keys() == {"data/paraphrase", "data/unseen"}
    for name, each in scores.items():
        found = [each[who]["loss"]["value"] for who in ("base", folder.name)]
        assert found == pytest.approx(metrics["loss"][name.removeprefix("data/")], rel=1e-5)
    assert not caplog.records
    closed = measured(home, home / "data.jsonl", folder, no_recall=True)["scores"]
    assert "records is without a passage: if there was one in training, give it with --context FILE" in caplog.text
    trained(options(home, tmp_path / "plain", steps=1))
    both = [folder, tmp_path / "plain"]  # which learned the same data in two ways
    scores = measured(home, home / "data.jsonl", both, no_recall=True)["scores"]
    for name, each in scores.items():
        assert each["base"]["loss"] == closed[name]["base"]["loss"]


def test_every_prompt_that_is_trained_or_measured_has_its_passage(home, run, tokenizer):
    material = prepare(str(home / "data.jsonl"), tokenizer, context=str(run[1]), max_length=512, eval_records=80)
    wanted = [fill(passage, term["question"]) for passage, term in zip(PASSAGES, TERMS, strict=True)]
    for sample, prompt in zip(material.train, wanted, strict=False):
        assert prompt in tokenizer.decode(sample.ids)
    assert [r.prompt[-1]["content"] for r in material.asked["unseen"]] == wanted[10:]
    paraphrased = [fill(passage, term["paraphrase"]) for passage, term in zip(PASSAGES, TERMS, strict=True)]
    assert [r.prompt[-1]["content"] for r in material.asked["paraphrase"]] == paraphrased[:8]
    assert material.template == TEMPLATE


def test_the_adapter_knows_its_template_and_where_the_passages_are(run):
    folder, book, metrics = run
    data = json.loads((folder / "minilora.json").read_text())["data"]
    assert data["context_template"] == TEMPLATE and data["context"] == str(book)
    assert (folder / data["context_path"]).resolve() == book.resolve()
    shown = [answer["question"] for answer in metrics["answers"]]
    assert shown and all("[the passage]" in question and "greets" not in question for question in shown)


def test_page_and_card_say_how_to_talk_with_passages_and_the_card_no_folder_of_the_author(run):
    folder, book, metrics = run
    assert report.page(metrics).endswith(f"minilora chat --adapter {folder} --context {book}")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"minilora chat --adapter {folder} --context book.txt" in card and str(book) not in card
    assert "--context" not in report.page({**metrics, "options": metrics["options"] | {"context": None}})


def test_an_adapter_that_was_trained_without_passages_stores_none_and_is_asked_without_any(home, run, tmp_path, caplog):
    caplog.set_level("INFO", "minilora")
    trained(options(home, tmp_path / "run", steps=1))
    assert not [key for key in json.loads((tmp_path / "run/minilora.json").read_text())["data"] if "context" in key]
    model, _ = load_with_adapters({"plain": tmp_path / "run"}, str(home / "base"))
    assert template_of(model, "plain") is None
    result = measured(home, home / "data.jsonl", tmp_path / "run", limit=2, context=str(run[1]))
    rows = next(iter(result["open_book"].values()))["rows"]
    assert [row["kind"] for row in rows if row["name"] == "run"] == ["closed"]
    assert "run: trained without passages, and asked without them" in caplog.text


def test_eval_asks_with_and_without_passages(home, run):
    folder, book, _ = run
    result = measured(home, home / "data.jsonl", folder, split="test", context=str(book))
    (report,) = result["open_book"].values()
    assert [(row["name"], row["kind"]) for row in report["rows"]] == [
        (name, kind) for name in ("base", "run") for kind in ("closed", "right", "found")
    ] + [("the passage alone", kind) for kind in ("right", "found")]
    assert report["hits"] == {"1": 1.0, "3": 1.0} and report["rows"][-1]["keyword_recall"]["value"] == 1.0
    assert "12 passages of" in page(result)


def test_eval_puts_no_passage_before_general_questions_but_measures_their_loss(home, run):
    result = measured(home, [home / "data.jsonl", "general"], limit=2, context=str(run[1]))
    assert set(result["open_book"]) == set(result["sets"]) - {"general"} != set()
    assert result["scores"]["general"]["base"]["loss"]["value"] > 0
    with pytest.raises(ValueError, match="general questions are not asked"):
        measured(home, "general", context=str(run[1]))


def test_eval_says_that_records_share_no_word_with_any_passage(home, tmp_path, caplog):
    """Their right passage is unknown, and for none of them it is found."""
    (book := tmp_path / "book.txt").write_text("A greeting is hello.")
    for strange in (0, 1, 2):  # of the two records of the test
        lions = {"question": "Lion?", "answer": "A lion.", "paraphrase": "Lion!"}
        rows = TERMS[: 12 - strange] + [term | lions for term in TERMS[12 - strange :]]
        data = write_jsonl(tmp_path / "a.jsonl", rows)
        given = dict(split="test", context=str(book))
        share = f"{data}: {strange} of 2 records share no word with any passage of {book}"
        if strange == 2:
            with pytest.raises(ValueError, match=f"{re.escape(share)}: give the passages that have their answers"):
                measured(home, data, **given)
            return
        (report,) = measured(home, data, **given)["open_book"].values()
        assert (f"{share}, such as x/11" in caplog.text) == (strange == 1)
        assert report["hits"] == {"1": 0.0, "3": 0.0}  # no question has a word of the passage


def test_eval_refuses_records_without_keywords(home, run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "Why?", "answer": "So."}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"no record has keywords.*: leave out --context, or add a column keywords"):
        measured(home, tmp_path / "a.jsonl", run[0], context=str(run[1]))


def test_without_keywords_the_loss_is_that_of_training_and_nothing_is_asked(home, run, tmp_path, caplog):
    rows = [{name: term[name] for name in ("question", "answer")} for term in TERMS]
    data = write_jsonl(tmp_path / "plain.jsonl", rows)
    metrics = finetune(options(home, tmp_path / "run", data=data, context=str(run[1]), steps=2))
    values = dict(data=[data, "general"], limit=6, adapter=tmp_path / "run")
    for change in ({}, {"no_recall": True}):
        found = measured(home, **values, **change, context=str(run[1]))
        general = found["scores"].pop("general")["run"]
        assert ("keyword_recall" in general) == (not change)
        for name, each in found["scores"].items():
            losses = [each[who]["loss"]["value"] for who in ("base", "run")]
            assert losses == pytest.approx(metrics["loss"][name.removeprefix("plain/")], rel=1e-5)
        assert found["open_book"] == {} and not caplog.records
    measured(home, **values)
    assert "records is without a passage: if there was one in training, give it with --context FILE" in caplog.text


def test_the_loss_with_passages_is_measured_without_answers_where_rows_have_keywords(home, run, caplog):
    found = measured(home, home / "data.jsonl", run[0], no_recall=True, context=str(run[1]))
    assert found["open_book"] == {} and not caplog.records
    for name, each in found["scores"].items():
        assert each["run"]["loss"]["value"] == pytest.approx(run[2]["loss"][name.removeprefix("data/")][1], rel=1e-5)
        assert "keyword_recall" not in each["run"]


def test_a_context_without_answers_is_for_adapters_that_learned_these_data_with_passages(home, run, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "So."}])
    for source, adapter in ((data, run[0]), (home / "data.jsonl", [])):
        with pytest.raises(ValueError, match="--context measures answers, and no adapter learned these data with p"):
            measured(home, source, adapter, context=str(run[1]), no_recall=True)


def with_own(path, own):
    """The terms with a passage in the rows that are in `own`."""
    rows = [term | ({"context": PASSAGES[i]} if i in own else {}) for i, term in enumerate(TERMS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_eval_asks_with_the_records_own_passages_as_with_those_of_a_file(home, run, tmp_path):
    found = []
    for own in ((), range(0, 12, 2), range(12)):
        data = with_own(tmp_path / "own.jsonl", own)
        result = measured(home, data, run[0], split="train", context=str(run[1]))
        (report,) = result["open_book"].values()
        found.append(report)
        for row in report["rows"]:
            del row["seconds"]
        assert not any("keyword_recall" in each for each in result["scores"]["own/train"].values())
    assert [row["kind"] for row in found[0]["rows"]] == [*["closed", "right", "found"] * 2, "right", "found"]
    assert found[0] == found[1] == found[2] and found[0]["passages"] == 12


def test_a_picture_of_passages_needs_a_context(home, run, tmp_path):
    with pytest.raises(ValueError, match="--passages draws what --context FILE measures: give both"):
        measured(home, home / "data.jsonl", run[0], split="train", passages=str(tmp_path / "x.png"))


def test_a_passage_that_is_longer_than_a_record_may_be_is_one_line(home, run, tmp_path):
    with pytest.raises(ValueError, match="paragraph 1 makes a prompt of .* room for 64: divide it") as caught:
        finetune(options(home, tmp_path / "run", context=str(run[1]), max_length=64))
    assert "\n" not in str(caught.value)

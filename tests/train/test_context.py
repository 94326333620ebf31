"""A job with passages: what is trained on, stored and measured, and how adapters are asked afterwards."""

import json
import re
import shutil
from functools import partial

import pytest
from jobs import measured, options, trained
from modelfiles import TERMS, write_jsonl

from minilora.commands import report
from minilora.commands.eval import page
from minilora.data.passages import TEMPLATE, fill
from minilora.data.quotes import Quoting
from minilora.generate.conversation import template_of
from minilora.measure.recall import answer_all
from minilora.models.with_adapters import load_with_adapters
from minilora.pages.card import write_card
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


@pytest.fixture(scope="module")
def quoting(home, run):
    """A run that learned to quote from the same passages: its folder and metrics."""
    folder = run[0].with_name("quoting")
    return folder, finetune(options(home, folder, context=str(run[1]), quote=1, steps=2, strength=None))


def test_an_adapter_that_quotes_learns_to_ask(home, run, tokenizer):
    terms = [{**term, "phrasings": [f"{term['question']} Really?"]} for term in TERMS]
    data = run[1].with_name("phrased.jsonl")
    data.write_text("".join(json.dumps(term) + "\n" for term in terms), encoding="utf-8")
    material = prepare(str(data), tokenizer, quote=1, context=str(run[1]), max_length=512, eval_records=80)
    for sample, passage, term in zip(material.train, PASSAGES, TERMS, strict=False):
        prompt = f"{passage}\n\nAsk a question that is answered here: {passage}"
        wordings = [term["question"], f"{term['question']} Really?"]
        for each, question in zip((sample, *sample.others), wordings, strict=True):
            assert prompt in tokenizer.decode(each.ids)
            assert question in tokenizer.decode([x for x in each.labels if x != -100])
    assert [r.question for r in material.asked["unseen"]] == [term["question"] for term in TERMS[10:]]
    assert not any(sample.others for samples in (material.validation, *material.scored.values()) for sample in samples)
    assert material.template is None and material.quoting == Quoting(1)


def test_passages_without_sentences_are_quoted_whole_and_that_is_said(tmp_path, tokenizer, caplog):
    for text, said in (("ส่งฟรี คืนได้ โทรหาเรา", True), ("One. Two.", True), ("One. Two. Three.", False)):
        rows = [{"question": f"{i}?", "answer": "One.", "context": text} for i in range(3)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        caplog.clear()
        with caplog.at_level("INFO", "minilora"):
            prepare(str(tmp_path / "a.jsonl"), tokenizer, quote=2, max_length=512, eval_records=80)
        assert ("no passage has more full stops than --quote 2, so" in caplog.text) == said


def test_records_that_no_sentence_of_their_passage_answers_are_counted(tmp_path, tokenizer, caplog):
    row = {"question": "Owls?", "answer": "They hoot.", "context": "Owls sleep. They are grey."}
    rows = [row, row | {"keywords": ["grey"]}, row | {"answer": "They are grey."}, row | {"keywords": ["hoot"]}]
    (path := tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for quote in (1, None):  # an answer that is written may say more than the passage
        prepare(str(path), tokenizer, quote=quote, max_length=512, eval_records=80)
        said = f"{path}: the passages of 2 of 4 records, such as line-1, have none of their keywords, or words of their"
        assert caplog.text.count(said) == 1 and len(caplog.messages) == 1
    rows = [row for i, row in enumerate(rows) if i in (1, 2)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prepare(str(path), tokenizer, quote=1, max_length=512, eval_records=80)
    assert len(caplog.messages) == 1


def test_a_records_own_passage_is_quoted_and_the_context_is_for_the_others(home, run, tokenizer, tmp_path):
    """The same is learned as from the passages of a file, and no question keeps a passage."""
    terms = [{**term, "phrasings": [f"{term['question']} Really?"]} for term in TERMS]
    found = []
    for name, own, context in (("none", 0, str(run[1])), ("some", 5, str(run[1])), ("all", 12, None)):
        rows = [{**term, "context": text} for term, text in zip(terms[:own], PASSAGES, strict=False)] + terms[own:]
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        data = str(tmp_path / f"{name}.jsonl")
        found.append(prepare(data, tokenizer, quote=1, context=context, max_length=512, eval_records=80))
    plain, *others = found
    for other in others:
        assert (other.train, other.validation, other.scored) == (plain.train, plain.validation, plain.scored)
        assert (other.asked, other.template) == (plain.asked, None)
        texts = [{key: each.text for key, each in one.passages.items()} for one in (other, plain)]
        assert texts[0] == texts[1]


def test_a_run_that_quotes_stores_how_and_its_answers_are_passages(run, quoting, home):
    folder, metrics = quoting
    data = json.loads((folder / "minilora.json").read_text())["data"]
    assert Quoting.stored(data) == Quoting(1) and "context_template" not in data and data["context"] == str(run[1])
    assert metrics["options"]["strength"] == 1
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "sentences after which\nthis adapter finds the question likeliest" in card
    assert 'replace("{passage}", "...").replace("{part}", "...")' in card
    low = {**metrics, "keyword_recall": {"reworded": [0.0, 0.0]}, "loss": {"unseen": [3.0, 2.0], "general": [1.0, 9.0]}}
    assert "general text rose" not in report.page(low) and "config facts" not in report.page(low)
    assert all(answer[when] in PASSAGES for answer in metrics["answers"] for when in ("before", "after"))
    assert metrics["keyword_recall"]["unseen"] == [1.0, 1.0]  # each passage is one sentence, the right one is given
    (found,) = measured(home, home / "data.jsonl", folder, split="test", context=str(run[1]))["open_book"].values()
    with pytest.raises(ValueError, match="quoting answers with sentences of passages"):
        measured(home, home / "data.jsonl", folder, split="test")
    rows = {row["kind"]: row for row in found["rows"] if row["name"] == "quoting"}
    assert rows.keys() == {"right", "found"} and rows["right"]["keyword_recall"]["value"] == 1.0


@pytest.mark.parametrize("kind", ["reading", pytest.param("quoting", marks=pytest.mark.long)])
def test_eval_gives_the_loss_that_finetune_gave(home, run, quoting, kind, tmp_path, caplog):
    folder, metrics = quoting if kind == "quoting" else (run[0], run[2])
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
    if kind == "reading":
        return
    both = [f"a={run[0]}", f"b={quoting[0]}"]  # which learned the same data in two ways
    scores = measured(home, home / "data.jsonl", both, context=str(run[1]))["scores"]
    for name, each in scores.items():
        assert each["base"]["loss"] == closed[name]["base"]["loss"]


def test_what_cannot_be_quoted_is_refused(home, run, tmp_path):
    rows = [{**TERMS[0], "context": "Own."}, TERMS[1], TERMS[2]]
    with pytest.raises(ValueError, match="record x/1 has no passage to quote: name their file with --context"):
        finetune(options(home, tmp_path / "run", data=write_jsonl(tmp_path / "own.jsonl", rows), quote=2))
    for row, other in (({"text": "A note."}, {}), ({"text": "Where is it?", "label": "parcel"}, {"label": "x"})):
        data = write_jsonl(tmp_path / "own.jsonl", [row, row | {"text": "Another."} | other])
        with pytest.raises(ValueError, match="--quote is for questions, not for texts, labels or fields: leave it out"):
            finetune(options(home, tmp_path / "run", data=data, quote=2, context=str(run[1])))


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


def test_page_and_card_say_how_to_talk_with_passages_and_the_card_no_folder_of_the_author(run, quoting, tmp_path):
    folder, book, metrics = run
    assert report.page(metrics).endswith(f"minilora chat --adapter {folder} --context {book}")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"minilora chat --adapter {folder} --context book.txt" in card and str(book) not in card
    assert "--context" not in report.page({**metrics, "options": metrics["options"] | {"context": None}})
    own = {**quoting[1], "options": quoting[1]["options"] | {"context": None}}  # it learned from the records' own
    assert report.page(own).endswith(f"minilora chat --adapter {quoting[0]} --context FILE")
    copy = shutil.copytree(quoting[0], tmp_path / "copy")
    assert f"chat --adapter {quoting[0]} --context FILE\n" in write_card(copy, own, {}).read_text(encoding="utf-8")


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


def test_eval_refuses_records_without_keywords(home, run, quoting, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "Why?", "answer": "So."}\n', encoding="utf-8")
    for adapters in ([run[0]], [run[0], quoting[0]]):
        with pytest.raises(ValueError, match="no record has keywords") as caught:
            measured(home, tmp_path / "a.jsonl", adapters, context=str(run[1]))
        assert ("leave out --context" in str(caught.value)) == (len(adapters) == 1)  # one that quotes needs it


@pytest.mark.parametrize("kind", ["reading", "quoting"])
def test_without_keywords_the_loss_is_that_of_training_and_nothing_is_asked(home, run, quoting, kind, tmp_path, caplog):
    rows = [{name: term[name] for name in ("question", "answer")} for term in TERMS]
    data = write_jsonl(tmp_path / "plain.jsonl", rows)
    quote = {"quote": 1, "strength": None} if kind == "quoting" else {}
    metrics = finetune(options(home, tmp_path / "run", data=data, context=str(run[1]), steps=2, **quote))
    values = dict(data=[data, "general"], limit=6, adapter=tmp_path / "run")
    for change in ({}, {"no_recall": True}):
        found = measured(home, **values, **change, context=str(run[1]))
        general = found["scores"].pop("general")["run"]
        # an adapter that quotes answers with sentences of passages alone, and general questions have none
        assert ("keyword_recall" in general) == (kind == "reading" and not change)
        for name, each in found["scores"].items():
            losses = [each[who]["loss"]["value"] for who in ("base", "run")]
            assert losses == pytest.approx(metrics["loss"][name.removeprefix("plain/")], rel=1e-5)
        assert found["open_book"] == {} and not caplog.records
    measured(home, **values)
    assert "records is without a passage: if there was one in training, give it with --context FILE" in caplog.text


def test_the_loss_with_passages_is_measured_without_answers_where_rows_have_keywords(home, run, quoting, caplog):
    found = measured(home, home / "data.jsonl", run[0], no_recall=True, context=str(run[1]))
    assert found["open_book"] == {} and not caplog.records
    for name, each in found["scores"].items():
        assert each["run"]["loss"]["value"] == pytest.approx(run[2]["loss"][name.removeprefix("data/")][1], rel=1e-5)
        assert "keyword_recall" not in each["run"]
    measured(home, home / "data.jsonl", quoting[0], no_recall=True)
    assert "records is without a passage: if there was one in training" in caplog.text


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


def test_eval_asks_with_the_records_own_passages_as_with_those_of_a_file(home, run, quoting, tmp_path):
    found = []
    for own, context in (((), str(run[1])), (range(12), None), (range(0, 12, 2), str(run[1]))):
        data = with_own(tmp_path / "own.jsonl", own)
        result = measured(home, data, quoting[0], split="train", context=context)
        (report,) = result["open_book"].values()
        found.append(report)
        for row in report["rows"]:
            del row["seconds"]
        assert not any("keyword_recall" in each for each in result["scores"]["own/train"].values())
    of_file, of_records, of_both = found
    assert [row["kind"] for row in of_file["rows"]] == ["closed", "right", "found", "right", "found", "right", "found"]
    assert of_file["rows"] == of_both["rows"] and of_both["passages"] == 12
    searched = {"passages": 8, "context": "the records' own passages"}  # the file has those of the other splits as well
    assert of_records == of_file | searched | {"rows": of_records["rows"], "hits": of_records["hits"]}
    for one, other in zip(of_records["rows"], of_file["rows"], strict=True):
        assert one == other or one["kind"] == "found"


def test_an_adapter_that_quotes_needs_a_passage_for_every_record_or_is_measured_without_answers(
    home, run, quoting, tmp_path
):
    data = with_own(tmp_path / "own.jsonl", range(1, 12))
    with pytest.raises(ValueError, match="quoting answers with sentences of passages: give some with --context FILE"):
        measured(home, data, quoting[0], split="train")
    assert measured(home, data, quoting[0], split="train", no_recall=True)["open_book"] == {}
    whole = shutil.copytree(home / "base", tmp_path / "whole")  # a model that learned to quote without an adapter
    shutil.copy(quoting[0] / "minilora.json", whole)
    with pytest.raises(ValueError, match="this model answers with sentences of passages: give some with --context"):
        measured(home, data, base=str(whole), split="train")
    with pytest.raises(ValueError, match="--passages draws what --context FILE measures: give both"):
        measured(home, data, run[0], split="train", passages=str(tmp_path / "x.png"))


def test_a_passage_that_is_longer_than_a_record_may_be_is_one_line(home, run, tmp_path):
    with pytest.raises(ValueError, match="paragraph 1 makes a prompt of .* room for 64: divide it") as caught:
        finetune(options(home, tmp_path / "run", context=str(run[1]), max_length=64))
    assert "\n" not in str(caught.value)

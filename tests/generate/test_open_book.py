"""Conversations with passages: what is asked, what is shown, and who is asked without any."""

import json

import pytest

from minilora.commands.asking import read_context
from minilora.commands.chat import Chat, Output
from minilora.data.passages import NO_WORD, TEMPLATE, Handbook, Passage, fill
from minilora.generate.answers import generate
from minilora.generate.as_trained import as_trained, template_of, without_passages
from minilora.generate.conversation import Talk
from minilora.generate.streams import Sampling

BOOK = Handbook([Passage("birds/heron", "A heron eats fish."), Passage("birds/owl", "An owl eats mice.")], "birds")
QUESTION = "What does the owl eat?"
SAID = [{"role": "user", "content": QUESTION}]
PROMPT = fill("An owl eats mice.", QUESTION)
OTHER = "Read: {passage} Then say: {question}"


@pytest.fixture
def trained(model, monkeypatch):
    """The support adapter learned to read passages, in its own template; the legal one learned without any."""
    monkeypatch.setattr(model.adapters["support"], "data", {"name": "x", "context_template": OTHER})
    monkeypatch.setattr(model.adapters["legal"], "data", {"name": "legal"})


@pytest.fixture
def talk(model, loaded):
    return Talk(model, loaded[1], Sampling(12), handbook=BOOK)


def answer(talk, question=QUESTION):
    pieces = []
    talk.ask(question, pieces.append)
    return "".join(pieces)


def test_the_best_passage_is_in_the_prompt_and_not_in_what_was_said(talk, model, loaded, tmp_path):
    first = answer(talk)
    assert first == generate(model, loaded[1], PROMPT, 12) != generate(model, loaded[1], QUESTION, 12)
    second = answer(talk, "And a heron?")
    roles = ("user", "assistant", "user")
    said = zip(roles, (QUESTION, first, fill("A heron eats fish.", "And a heron?")), strict=True)
    messages = [{"role": role, "content": text} for role, text in said]
    assert second == generate(model, loaded[1], messages, 12)
    talk.save(tmp_path / "talk.jsonl")
    (saved,) = map(json.loads, (tmp_path / "talk.jsonl").read_text("utf-8").splitlines())
    assert [m["content"] for m in saved["messages"]] == [QUESTION, first, "And a heron?", second]


@pytest.mark.parametrize(
    ("choice", "template"),
    [(None, TEMPLATE), ("support", OTHER), ("legal", None), ({"legal": 0.5, "support": 0.5}, None)],
    ids=str,
)
def test_everybody_is_asked_as_it_was_trained(model, trained, choice, template):
    assert template_of(model, choice) == template
    asked = as_trained(model, choice, SAID, handbook=BOOK)
    assert asked.text == QUESTION and as_trained(model, choice, SAID).messages == SAID
    if template is None:
        assert (asked.messages, asked.passage) == (SAID, None)
        assert as_trained(model, choice, SAID, own="Owls.").messages == SAID
    else:
        assert asked.messages[0]["content"] == fill("An owl eats mice.", QUESTION, template)
        assert asked.passage.id == "birds/owl"
        own = as_trained(model, choice, SAID, handbook=BOOK, own="Owls.")
        assert (own.messages[0]["content"], own.passage) == (fill("Owls.", QUESTION, template), None)


def test_an_adapter_without_a_record_of_its_training_may_read_and_no_answer_is_asked_anything(model):
    assert template_of(model, "legal") == TEMPLATE
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Mice"}]
    assert as_trained(model, None, said, handbook=BOOK).messages == said


def test_adapters_that_get_no_passages_are_named(model, trained, monkeypatch, said):
    (line,) = without_passages(model, BOOK)
    unread = [name for name in model.adapters if as_trained(model, name, SAID, handbook=BOOK).passage is None]
    assert unread and line == f"{', '.join(unread)}: trained without passages, and asked without them"
    (line,) = without_passages(model, None)
    assert line.startswith("support learned to answer from passages") and "--context FILE" in line
    assert read_context(None, model, None, 10) is None and said() == [line]
    monkeypatch.setattr(model.adapters["legal"], "data", {})  # without a record it is asked either way, and not named
    assert without_passages(model, BOOK) == [] and without_passages(model, None) == [line]


def test_a_passage_that_leaves_no_room_is_one_line(talk):
    talk.limit = 40
    with pytest.raises(ValueError, match="are more than the 40 that the model can see"):
        talk.ask(QUESTION, print)


def test_the_chat_shows_the_passage_before_each_answer(talk, trained, capsys):
    chat = Chat(talk, ["legal", "support"], Output())
    chat.handle(QUESTION)
    assert capsys.readouterr().err.startswith("(passage birds/owl: An owl eats mice.)\n")
    chat.handle("/compare")
    out, err = capsys.readouterr()
    told = ["base, with passage birds/owl:", "support, with passage birds/owl:", "legal:\n"]
    assert NO_WORD not in err and all(words in out for words in told)


@pytest.mark.parametrize("question", ["zebra", "What is it?", "?!"])
def test_the_chat_says_so_once_if_no_passage_has_a_word_of_the_question(talk, trained, capsys, question):
    chat = Chat(talk, ["legal", "support"], Output())
    for line in (question, "/compare"):
        chat.handle(line)
        assert capsys.readouterr().err.count(f"({NO_WORD})\n") == 1
    for line in ("/adapter legal", question):  # asked without a passage
        chat.handle(line)
    assert NO_WORD not in capsys.readouterr().err

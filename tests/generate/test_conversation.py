"""A conversation: its history, who answers, the system prompt, what is left out, comparing and saving."""

import json

import pytest

import minilora as ml
from minilora.data.labels import LabelTask
from minilora.data.records import read_records
from minilora.generate.answers import generate
from minilora.generate.as_trained import system_of
from minilora.generate.conversation import Talk, Turn
from minilora.generate.labels import label_logprobs, label_probabilities
from minilora.generate.streams import Sampling, Streams


@pytest.fixture
def talk(model, tokenizer):
    return Talk(model, tokenizer, Sampling(12))


def answer(talk, question):
    pieces = []
    talk.ask(question, pieces.append)
    return "".join(pieces)


def said(*turns):
    roles = ["user", "assistant"] * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def test_a_question_is_answered_with_all_that_was_said_before(talk, model, tokenizer):
    first = answer(talk, "hello")
    second = answer(talk, "x")
    assert first == generate(model, tokenizer, "hello", 12)
    assert second == generate(model, tokenizer, said("hello", first, "x"), 12) != generate(model, tokenizer, "x", 12)


@pytest.mark.parametrize("choice", [None, "legal", "support", {"legal": 0.5, "support": 0.5}], ids=str)
def test_the_one_chosen_answers(talk, model, tokenizer, choice):
    talk.choose("legal")
    talk.choose(choice)
    got = answer(talk, "What is a lien?")
    ml.set_adapter(model, choice)
    assert got == generate(model, tokenizer, "What is a lien?", 12)


# -- what the model can see --------------------------------------------------------------------------------------------


def test_the_oldest_turns_are_left_out_of_a_long_conversation_and_that_is_said_once(talk, caplog, model, tokenizer):
    caplog.set_level("INFO", "minilora")
    questions = [f"{i}" + "x" * 150 for i in range(12)]
    answers = [answer(talk, question) for question in questions]
    assert len(talk.turns) == 12 and 0 < talk.seen_from < 11
    assert caplog.messages == ["the oldest turns are left out from here on: 1024 tokens are all that the model can see"]
    seen = [text for turn in zip(questions, answers, strict=True) for text in turn][2 * talk.seen_from : -1]
    assert answers[-1] == generate(model, tokenizer, said(*seen), 12)
    before = [text for turn in zip(questions, answers, strict=True) for text in turn][2 * talk.seen_from - 2 : -1]
    assert len(tokenizer.encode_chat(said(*before), answer_next=True)) + 12 > 1024  # no turn more would have fitted


def with_turns_left_out(talk):
    """What a conversation has said whose first turns the model no longer sees."""
    questions = ["a", "b" * 300, "c" * 300, "d" * 500]
    turns = [text for question in questions for text in (question, answer(talk, question))]
    assert talk.seen_from == 2
    return turns


def test_turns_that_were_left_out_never_come_back(talk, model, tokenizer):
    turns = [text for question in ("a", "b", "c") for text in (question, answer(talk, question))]
    talk.system = "x" * 900
    turns += ["d", answer(talk, "d")]
    assert (left := talk.seen_from) > 0
    talk.system = None  # now all of it would fit again
    assert answer(talk, "e") == generate(model, tokenizer, said(*turns[2 * left :], "e"), 12)
    assert talk.seen_from == left


def test_a_cleared_conversation_begins_anew(talk, model, tokenizer):
    with_turns_left_out(talk)
    talk.clear()
    assert (talk.turns, talk.seen_from, talk.used) == ([], 0, 0)
    first = answer(talk, "hello")
    assert answer(talk, "x") == generate(model, tokenizer, said("hello", first, "x"), 12)


def test_what_is_saved_has_the_turns_that_were_left_out(talk, tmp_path):
    turns = with_turns_left_out(talk)
    talk.save(tmp_path / "talk.jsonl")
    assert json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"] == said(*turns)


def test_the_tokens_in_use_are_counted(talk, tokenizer):
    answer(talk, "hello")
    length = len(tokenizer.encode_chat(said("hello"), answer_next=True))
    assert length < talk.used <= length + 12


def test_a_question_may_take_all_the_room_that_its_answer_leaves(talk, tokenizer):
    room = 1024 - 12 - len(tokenizer.encode_chat(said(""), answer_next=True))  # a token per letter
    assert answer(talk, "x" * room)
    with pytest.raises(ValueError, match="more than the 1024"):
        answer(talk, "x" * (room + 1))


def test_a_question_that_cannot_be_read_leaves_the_talk_as_it_was(talk, caplog):
    question = "x" * 1020
    for i in range(3):
        answer(talk, f"{i}" + "x" * 200)
    before = (list(talk.turns), talk.seen_from, talk.asked)
    for ask in (lambda: answer(talk, question), lambda: list(talk.compare(question, {"base": None}))):
        with pytest.raises(ValueError, match="tokens and an answer of 12 are more than the 1024 ") as caught:
            ask()
        assert "--max-new-tokens" in str(caught.value)
        assert (talk.turns, talk.seen_from, talk.asked) == before and caplog.messages == []


# -- an answer that is stopped -----------------------------------------------------------------------------------------


def test_a_stopped_answer_is_kept_as_far_as_it_came(talk, model, tokenizer):
    whole = generate(model, tokenizer, "hello", 12)
    seen = []

    def show(piece):
        seen.append(piece)
        if len("".join(seen)) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("hello", show)
    assert [turn.answer for turn in talk.turns] == ["".join(seen)]
    assert whole.startswith("".join(seen)) and len("".join(seen)) < len(whole)
    assert answer(talk, "x") == generate(model, tokenizer, said("hello", "".join(seen), "x"), 12)


def test_no_word_is_kept_that_was_computed_but_not_shown(talk, monkeypatch):
    step, calls, seen = Streams.step, [], []

    def stopped(streams):
        step(streams)
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Streams, "step", stopped)
        talk.ask("hello", seen.append)
    assert "".join(seen) and [turn.answer for turn in talk.turns] == ["".join(seen)]


def test_one_that_is_stopped_before_its_first_word_was_never_asked(talk, model, tokenizer, monkeypatch):
    def stopped(streams):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Streams, "step", stopped)
        talk.ask("x", print)
    assert talk.turns == []
    assert answer(talk, "hello") == generate(model, tokenizer, "hello", 12)


# -- draws -------------------------------------------------------------------------------------------------------------


def test_a_talk_with_a_seed_can_be_had_again_and_asking_again_gives_another_answer(model, tokenizer):
    talks = [Talk(model, tokenizer, Sampling(12, 2.0, 0.9, 5)) for _ in range(2)]
    answers = []
    for talk in talks:
        answers.append([answer(talk, "hello"), answer(talk, "hello")])
        talk.clear()
        answers[-1].append(answer(talk, "hello"))
    assert answers[0] == answers[1] and answers[0][0] != answers[0][2]
    assert answers[0][0] == generate(model, tokenizer, "hello", 12, 2.0, seed=5, top_p=0.9)


def test_a_repetition_penalty_is_of_every_answer_and_of_those_that_are_compared(model, tokenizer):
    talk = Talk(model, tokenizer, Sampling(12, repetition_penalty=1.5))
    expected = generate(model, tokenizer, "hello", 12, repetition_penalty=1.5)
    assert expected != generate(model, tokenizer, "hello", 12)
    assert "".join(piece for _, piece in talk.compare("hello", {"base": None})) == answer(talk, "hello") == expected


# -- the system prompt -------------------------------------------------------------------------------------------------


@pytest.fixture
def prompted(model, monkeypatch):
    """The model, as if legal and support had been trained under a system prompt each."""
    for name in ("legal", "support"):
        monkeypatch.setattr(model.adapters[name], "data", {"system": f"You are {name}."})
    return model


def under(system, *turns):
    return [{"role": "system", "content": system}, *said(*turns)]


def test_an_adapter_is_asked_under_the_system_prompt_it_was_trained_under(prompted, talk, tokenizer):
    talk.choose("legal")
    first = answer(talk, "hello")
    assert first == generate(prompted, tokenizer, under("You are legal.", "hello"), 12)
    assert first != generate(prompted, tokenizer, "hello", 12)
    assert answer(talk, "x") == generate(prompted, tokenizer, under("You are legal.", "hello", first, "x"), 12)
    talk.clear()
    talk.system = "Be brief."
    assert answer(talk, "y") == generate(prompted, tokenizer, under("Be brief.", "y"), 12)


def test_a_mix_has_a_system_prompt_only_if_all_its_adapters_have_that_one(prompted, monkeypatch):
    both = {"legal": 0.5, "support": 0.5}
    assert system_of(prompted, both) is None and system_of(prompted, None) is None
    monkeypatch.setattr(prompted.adapters["support"], "data", {})
    assert system_of(prompted, both) is None and system_of(prompted, "support") is None
    monkeypatch.setattr(prompted.adapters["support"], "data", {"system": "You are legal."})
    assert system_of(prompted, both) == "You are legal."


def test_comparing_asks_each_under_its_own_system_prompt_or_all_under_the_one_that_was_set(prompted, talk, tokenizer):
    for system in (None, "Be brief."):
        talk.system = system
        got = list(talk.compare("hello", {"base": None, "legal": "legal"}))
        for name, choice, own in (("base", None, None), ("legal", "legal", "You are legal.")):
            ml.set_adapter(prompted, choice)
            messages = under(system or own, "hello") if system or own else said("hello")
            together = "".join(piece for other, piece in got if other == name)
            assert together == generate(prompted, tokenizer, messages, 12)


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_comparing_gives_each_versions_answer_in_order_and_leaves_the_talk_as_it_was(talk, model, tokenizer):
    talk.choose("support")
    answer(talk, "hello")
    before = (list(talk.turns), talk.choice, [adapter.factor for adapter in model.adapters.values()])
    versions = {"base": None, "legal": "legal", "both": {"legal": 0.5, "support": 0.5}}
    got = list(talk.compare("What is a lien?", versions))
    names = [name for name, _ in got]
    assert names == sorted(names, key=list(versions).index) and set(names) == set(versions)
    assert (talk.turns, talk.choice, [adapter.factor for adapter in model.adapters.values()]) == before
    for name, choice in versions.items():
        ml.set_adapter(model, choice)
        together = "".join(piece for other, piece in got if other == name)
        assert together == generate(model, tokenizer, "What is a lien?", 12)


def test_comparing_computes_all_versions_in_one_batch(talk, model, monkeypatch):
    batches, forward = [], type(model).forward

    def counted(self, ids, *others, **settings):
        batches.append(len(ids))
        return forward(self, ids, *others, **settings)

    monkeypatch.setattr(type(model), "forward", counted)
    list(talk.compare("hello", {"base": None, "legal": "legal", "support": "support"}))
    assert batches[0] == 3 and len(batches) <= 12


# -- saving ------------------------------------------------------------------------------------------------------------


def test_a_talk_is_saved_as_text_that_says_who_answered(talk, tmp_path):
    first = answer(talk, "hello")
    talk.choose({"legal": 0.5, "support": 0.5})
    second = answer(talk, "x")
    talk.save(tmp_path / "talk.txt")
    text = (tmp_path / "talk.txt").read_text(encoding="utf-8")
    assert text == f"you: hello\n\nbase: {first}\n\nyou: x\n\n0.5 legal + 0.5 support: {second}\n"


def test_answers_are_learned_under_the_system_prompt_that_they_were_given_under(talk, model, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(model.adapters["legal"], "data", {"system": "Be kind."})
    for talk.system, choice in ((None, None), ("Be brief.", None), ("Be brief.", "legal"), (None, "legal")):
        talk.choose(choice)
        told += ["x", answer(talk, "x")]
    talk.choose(None)
    talk.save(tmp_path / "talk.jsonl")
    records = read_records(tmp_path / "talk.jsonl")
    for record, system, first, end in zip(records, (None, "Be brief.", "Be kind."), (0, 1, 3), (1, 3, 4), strict=True):
        bare = [{"role": one["role"], "content": one["content"]} for one in record.messages]
        assert bare == (under(system, *told[: 2 * end]) if system else said(*told[: 2 * end]))
        answers = [one for one in record.messages if one["role"] == "assistant"]
        assert [i for i, one in enumerate(answers) if one.get("weight") != 0] == [*range(first, end)]


def test_nothing_is_overwritten_and_nothing_said_is_no_file(talk, tmp_path):
    with pytest.raises(ValueError, match="nothing was said yet"):
        talk.save(tmp_path / "talk.txt")
    answer(talk, "hello")
    (tmp_path / "talk.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        talk.save(tmp_path / "talk.txt")
    assert (tmp_path / "talk.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def task(model, monkeypatch):
    """The adapter legal was trained on labels."""
    task = LabelTask.of(["bill", "billing", "parcel", "refund"])
    monkeypatch.setattr(model.adapters["legal"], "data", task.entry())
    return task


def expected_label(model, tokenizer, task, question):
    ml.set_adapter(model, "legal")
    (p,) = label_probabilities(label_logprobs(model, tokenizer, [said(task.prompt(question))], task.labels))
    (label, first), *others = sorted(zip(task.labels, p, strict=True), key=lambda one: -one[1])
    then = ", ".join(f"{name} {100 * q:.0f} %" for name, q in others[:2])
    return label, f"{label} ({100 * first:.0f} %; then {then})"


def test_an_adapter_with_labels_answers_with_the_likeliest_whatever_was_said(talk, model, tokenizer, task, tmp_path):
    answer(talk, "hello")
    talk.choose("legal")
    label, shown = expected_label(model, tokenizer, task, "x")
    assert answer(talk, "x") == shown == answer(talk, "x") and talk.turns[-1].answer == label
    talk.save(tmp_path / "talk.jsonl")
    assert json.loads((tmp_path / "talk.jsonl").read_text())["messages"][-1]["content"] == label
    with pytest.raises(ValueError, match="a message with its label has"):
        talk.ask("x" * 1100, print)
    talk.choose({"legal": 0.5, "support": 0.5})
    assert "%" not in answer(talk, "x")


def test_labels_and_answers_are_compared_in_their_order(talk, model, tokenizer, task):
    versions = {"support": "support", "legal": "legal", "base": None}
    found = dict.fromkeys(versions, "")
    order = []
    for name, piece in talk.compare("x", versions):
        found[name] += piece
        order.append(name)
    assert found["legal"] == expected_label(model, tokenizer, task, "x")[1]
    assert sorted(order, key=list(versions).index) == order
    for name in ("support", "base"):
        ml.set_adapter(model, versions[name])
        assert found[name] == generate(model, tokenizer, "x", 12)
    assert talk.turns == []


# -- continuing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "You are legal.", "Be brief."])
@pytest.mark.parametrize("greeting", ["", "Hi 12."])
def test_a_talk_that_was_saved_continues_with_the_very_answer_that_it_would_have_given(
    prompted, tokenizer, tmp_path, system, greeting
):
    saved, again = Talk(prompted, tokenizer, Sampling(12)), Talk(prompted, tokenizer, Sampling(12))
    saved.choose("legal")
    again.choose("legal")
    saved.system = system
    if greeting:
        saved.turns.append(Turn("", greeting, "legal", saved.system_for("legal")))
    for question in ("hello", "x"):
        answer(saved, question)
    saved.save(tmp_path / "talk.jsonl")
    answer(again, "What was here is forgotten.")
    again.load(tmp_path / "talk.jsonl")
    assert [turn.messages() for turn in again.turns] == [turn.messages() for turn in saved.turns]
    assert again.system == ("Be brief." if system == "Be brief." else None)  # its own is not fixed for other adapters
    assert answer(again, "y") == answer(saved, "y") and again.used == saved.used
    again.save(tmp_path / "talk.txt")
    assert (tmp_path / "talk.txt").read_text("utf-8").startswith(f"assistant: {greeting}" if greeting else "you: hello")


def test_a_talk_of_several_system_prompts_continues_under_the_last(talk, tmp_path):
    for talk.system in ("Be brief.", "Be long."):
        answer(talk, "hello")
    talk.save(tmp_path / "talk.jsonl")
    again = Talk(talk.model, talk.tokenizer, Sampling(12))
    again.load(tmp_path / "talk.jsonl")
    assert again.system == "Be long." and answer(again, "x") == answer(talk, "x")


def test_turns_left_out_of_what_was_said_before_leave_out_none_of_a_talk_that_is_continued(
    talk, model, tokenizer, tmp_path
):
    with_turns_left_out(talk)
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": said("a", "b", "c", "d", "e", "f")}), encoding="utf-8")
    talk.load(tmp_path / "data.jsonl")
    assert (talk.seen_from, talk.used, talk.told) == (0, 0, False)
    assert answer(talk, "x") == generate(model, tokenizer, said("a", "b", "c", "d", "e", "f", "x"), 12)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "A dark night."}, "the last record is no conversation"),
        ({"messages": [*said("a"), *said("b", "c")]}, "questions and answers alternate in a chat"),
        ({"messages": [*said("a", "b"), *said("", "c")[1:]]}, "questions and answers alternate in a chat"),
        ({"messages": [*said("a", "b"), *under("Be brief.", "c", "d")]}, "questions and answers alternate in a chat"),
        ({"messages": []}, "messages must be a non-empty list"),
    ],
)
def test_what_cannot_be_continued_is_named_and_changes_nothing(talk, tmp_path, row, reason):
    answer(talk, "hello")
    before = list(talk.turns)
    (tmp_path / "data.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        talk.load(tmp_path / "data.jsonl")
    assert talk.turns == before and talk.system is None


def test_what_is_undone_was_never_said(talk, model, tokenizer):
    first = answer(talk, "hello")
    answer(talk, "x")
    assert talk.undo().question == "x"
    assert answer(talk, "y") == generate(model, tokenizer, said("hello", first, "y"), 12)
    for _ in range(2):
        talk.undo()
    greeting = Turn("", "Hi 12.", "base")
    for talk.turns in ([], [greeting]):
        before = list(talk.turns)
        with pytest.raises(ValueError, match="nothing was asked yet"):
            talk.undo()
        assert talk.turns == before
    talk.clear()
    assert answer(talk, "hello") == first


def test_turns_may_be_undone_back_into_those_that_were_left_out(talk, model, tokenizer):
    with_turns_left_out(talk)
    for left in (3, 2, 1):
        talk.undo()
        assert talk.seen_from == min(2, left)
    answer(talk, "x")
    assert len(talk.turns) == 2 and talk.seen_from == 1

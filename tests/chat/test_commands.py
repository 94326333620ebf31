"""The commands of a talk: what each does, and what is said when it cannot."""

import pytest

from minilora.chat.commands import Chat
from minilora.chat.output import Output
from minilora.chat.talk import Talk
from minilora.train.options import ChatOptions


@pytest.fixture
def chat(model, tokenizer):
    output = Output()
    return Chat(Talk(model, tokenizer, ChatOptions(max_new_tokens=12), output.note), ["legal", "support"], output)


@pytest.mark.parametrize(
    ("line", "choice", "told"),
    [
        ("/adapter legal", "legal", "now answers: legal"),
        ("  /adapter   support  ", "support", "now answers: support"),
        ("/base", None, "now answers: base"),
        ("/mix legal=0.5 support=0.25", {"legal": 0.5, "support": 0.25}, "now answers: 0.5 legal + 0.25 support"),
        ("/mix support=1, legal=-0.5", {"support": 1, "legal": -0.5}, "now answers: 1 support + -0.5 legal"),
    ],
)
def test_who_answers_is_chosen_by_a_command(chat, capsys, line, choice, told):
    chat.talk.choose("support")
    assert chat.handle(line)
    assert chat.talk.choice == choice and capsys.readouterr().err == f"{told}\n"


def test_adapter_without_a_name_lists_them(chat, capsys):
    chat.handle("/adapter")
    assert capsys.readouterr().err == "adapters: legal, support\nnow answers: base\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/adaptor legal", r"no command /adaptor \(did you mean /adapter\?\); /help lists them"),
        ("/Base", r"no command /Base \(did you mean /base\?\)"),
        ("/xyzzy", "no command /xyzzy; /help lists them"),
        ("/", "no command /; /help lists them"),
        ("/adapter legl", r"no adapter legl \(did you mean legal\?\)"),
        ("/adapter xyzzy", r"no adapter xyzzy \(there is: legal, support\)"),
        ("/mix", "/mix needs adapters and how much of each"),
        ("/mix legal", "legal: a mix is NAME=FACTOR NAME=FACTOR, each name once, factors"),
        ("/mix legal=many", "legal=many: a mix is"),
        ("/mix legal=nan", "legal=nan: a mix is"),
        ("/mix legal=0.5 legal=1", "legal=1: a mix is .*, each name once"),
        ("/mix legal=0.5 suport=0.5", r"no adapter suport \(did you mean support\?\)"),
        ("/compare", "nothing was asked yet: /compare QUESTION"),
        ("/save", "/save needs a file"),
        ("/save talk.txt", "nothing was said yet"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_changes_nothing(chat, line, reason):
    chat.talk.choose("support")
    with pytest.raises((ValueError, OSError), match=reason) as caught:
        chat.handle(line)
    assert "\n" not in str(caught.value)
    assert chat.talk.choice == "support" and chat.talk.turns == []


@pytest.mark.parametrize("line", ["exit", "quit", "Exit", " QUIT ", "/quit", "/exit"])
def test_the_last_words_end_the_talk_and_are_not_answered(chat, line, capsys):
    assert not chat.handle(line)
    assert capsys.readouterr().out == "" and chat.talk.turns == []


@pytest.mark.parametrize("line", ["", "   "])
def test_an_empty_line_is_nothing(chat, line, capsys):
    assert chat.handle(line)
    assert capsys.readouterr().out == "" and chat.talk.turns == []


def test_compare_shows_the_last_question_or_another_answered_by_all(chat, capsys):
    chat.handle("What is a lien?")
    alone = capsys.readouterr().out.strip()
    chat.handle("/compare")
    out = capsys.readouterr().out
    assert out.startswith(f"base:\n{alone}\nlegal:\n") and "\nsupport:\n" in out
    chat.handle("/compare hello")
    assert capsys.readouterr().out != out
    assert [turn.question for turn in chat.talk.turns] == ["What is a lien?"]


def test_compare_without_adapters_says_how_to_get_some(model, tokenizer):
    chat = Chat(Talk(model, tokenizer, ChatOptions(), print), [], Output())
    with pytest.raises(ValueError, match="only the base: start with --adapter"):
        chat.handle("/compare hello")


def test_clear_forgets_and_save_writes(chat, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat.handle("hello")
    chat.handle("/save talk.txt")
    assert (tmp_path / "talk.txt").read_text(encoding="utf-8").startswith("you: hello\n\nbase: ")
    chat.handle("/clear")
    assert chat.talk.turns == []
    assert capsys.readouterr().err == "saved in talk.txt\nforgotten\n"


def test_help_has_a_line_for_every_command(chat, capsys):
    chat.handle("/help")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == list(chat.commands)
    assert {"/adapter", "/base", "/mix", "/compare", "/save", "/clear", "/help", "/quit"} == set(chat.commands)
    assert max(map(len, lines)) < 80

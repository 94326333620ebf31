"""Flags from a dataclass: what they take, what they default to, what they suggest and refuse."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import pytest

from minilora.flags import UsageError, add_flags, flag, from_flags, option, parse


@dataclass(frozen=True, kw_only=True)
class Options:
    base: str = option("small", "which model; 50 % of them are tiny")
    method: str = option("lora", "what is trained", choices=("lora", "full"))
    r: int = option(8, "rank", group="adapter", only={"method": "lora"})
    lora_alpha: float = option(16.0, "scale", group="adapter", only={"method": "lora"})
    target_modules: str | Sequence[str] = option("all-linear", "modules", metavar="NAME")
    epochs: float = option(4.0, "passes", only={"steps": None})
    steps: int | None = option(None, "instead of --epochs")
    quantized: bool = option(False, "packed")
    seed: int = option(0, "order")
    plain: int = field(default=3, metadata={"help": "made with field()"})
    hidden: int = 5

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="program")
    command = parser.add_subparsers(required=True).add_parser("learn")
    command.set_defaults(parser=command)
    add_flags(command, Options)
    return parser


def read(parser, *words):
    return from_flags(Options, parse(parser, ["learn", *words]))


def test_without_flags_the_options_are_those_of_the_dataclass(parser):
    assert read(parser) == Options()


GIVEN = [  # words, what they change
    (["--base", "big"], {"base": "big"}),
    (["--r", "4"], {"r": 4}),
    (["--lora-alpha", "3"], {"lora_alpha": 3.0}),
    (["--target-modules", "a", "b"], {"target_modules": ["a", "b"]}),
    (["--target-modules", "a"], {"target_modules": ["a"]}),
    (["--target-modules", "all-linear"], {"target_modules": "all-linear"}),
    (["--steps", "7"], {"steps": 7}),
    (["--quantized"], {"quantized": True}),
    (["--plain", "1"], {"plain": 1}),
    (["--method", "full"], {"method": "full"}),
    (["--r=4", "--method=lora", "--epochs=0.5"], {"r": 4, "epochs": 0.5}),
]


@pytest.mark.parametrize(("words", "change"), GIVEN, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_flag_sets_its_field_with_its_fields_type(words, change, parser):
    got = read(parser, *words)
    assert got == Options(**change)
    assert all(type(getattr(got, name)) is type(value) for name, value in change.items())


def shown(parser):
    (command,) = (action for action in parser._actions if action.choices)
    return " ".join(command.choices["learn"].format_help().split())


def test_help_shows_every_flag_with_its_text_default_and_group(parser):
    text = shown(parser)
    assert "which model; 50 % of them are tiny (default: small)" in text
    assert "--method {lora,full} what is trained (default: lora)" in text
    assert "adapter: --r R rank (default: 8)" in text and "scale (default: 16)" in text
    assert "--target-modules NAME [NAME ...] modules (default: all-linear)" in text
    assert "--steps STEPS instead of --epochs --quantized packed --seed" in text  # None and False are no news
    assert "order (default: 0)" in text
    assert all((flag(f.name) in text) == (f.name != "hidden") for f in fields(Options))


NEAR = [
    ("--rank", "--r"),
    ("--alpha", "--lora-alpha"),
    ("--lora-alhpa=3", "--lora-alpha"),
    ("--target-module-names", "--target-modules"),
    ("--max-steps", "--steps"),
    ("--model", "--base"),
    ("--quantised", "--quantized"),
]


@pytest.mark.parametrize(("word", "meant"), NEAR)
def test_a_flag_that_resembles_another_is_answered_with_it_below_the_usage_of_its_command(word, meant, parser, capsys):
    with pytest.raises(SystemExit) as ended:
        read(parser, word, "8")
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("usage: program learn")
    assert err.splitlines()[-1].endswith(f"(did you mean {meant}?)")


@pytest.mark.parametrize("word", ["--banana", "banana", "--hidden", "--dataset"])
def test_what_resembles_nothing_is_named_without_a_guess(word, parser, capsys):
    with pytest.raises(SystemExit):
        read(parser, word)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"unrecognized arguments: {word}")


CONFLICTS = [
    (["--method", "full", "--r", "8"], "--r means nothing with --method full"),
    (["--lora-alpha", "2", "--method", "full"], "--lora-alpha means nothing with --method full"),
    (["--epochs", "4", "--steps", "5"], "--epochs means nothing with --steps 5"),
    (["--r", "0"], "r must be at least 1, got 0"),
]


@pytest.mark.parametrize(("words", "reason"), CONFLICTS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_flags_that_mean_nothing_are_refused_even_where_they_say_the_default(words, reason, parser):
    with pytest.raises(UsageError, match=f"^{reason}"):
        read(parser, *words)

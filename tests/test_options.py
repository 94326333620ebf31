"""Flags from a dataclass: what they take, what they default to, what they suggest and refuse."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import pytest
from helpers.refusals import refused as refused_by

from minilora.options import (
    Parser,
    UsageError,
    add_flags,
    as_python,
    check,
    check_value,
    flag,
    from_flags,
    option,
    parse,
    refuse_other_settings,
    suggestion,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    base: str = option("small", "which model; 50 % of them are tiny")
    method: str = option("lora", "what is trained", choices=("lora", "full"))
    r: int = option(8, "rank", group="adapter", only={"method": "lora"}, least=1)
    lora_alpha: float = option(16.0, "scale", group="adapter", only={"method": "lora"})
    target_modules: str | Sequence[str] = option("all-linear", "modules", metavar="NAME")
    epochs: float = option(4.0, "passes", only={"steps": None}, above=0)
    warmup: float = option(0.1, "share", least=0, most=1)
    norm: float | None = option(1.0, "clipped", above=0, infinite=True)
    steps: int | None = option(None, "instead of --epochs")
    quantized: bool = option(False, "packed")
    seed: int = option(0, "order")
    start: bool | str = option(True, "how it begins", choices=(True, False, "big"), metavar="{true,big,false}")
    blocks: Sequence[int] | None = option(None, "numbers")
    ranks: Mapping[str, int] | None = option(None, "by name", metavar="NAME=R")
    names: Mapping[str, str] | None = option(None, "by name")
    lr: float | None = option(None, "each method has its own", follows=("method", "steps"))
    path: str | None = option(None, "a file", path=True)
    plain: int = field(default=3, metadata={"help": "made with field()"})
    hidden: int = 5

    def __post_init__(self):
        check(self)
        if self.r == self.seed:
            raise ValueError(f"r and seed are both {self.r}")


@pytest.fixture
def parser():
    parser = Parser(prog="program")
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
    (["--target-modules", "a"], {"target_modules": "a"}),  # also a pattern, which is no list
    (["--target-modules", "all-linear"], {"target_modules": "all-linear"}),
    (["--steps", "7"], {"steps": 7}),
    (["--quantized"], {"quantized": True}),
    (["--plain", "1"], {"plain": 1}),
    (["--method", "full"], {"method": "full"}),
    (["--start", "big"], {"start": "big"}),
    (["--start", "False"], {"start": False}),
    (["--start", "true"], {"start": True}),
    (["--blocks", "1", "0"], {"blocks": [1, 0]}),
    (["--blocks", "1"], {"blocks": [1]}),
    (["--ranks", "q=2", ".*(?=x)=3"], {"ranks": {"q": 2, ".*(?=x)": 3}}),  # a pattern may have signs of its own
    (["--ranks", "q=2", "--ranks", "v=3"], {"ranks": {"q": 2, "v": 3}}),
    (["--names", "a=b=c"], {"names": {"a": "b=c"}}),
    (["--r=4", "--method=lora", "--epochs=0.5"], {"r": 4, "epochs": 0.5}),
]


@pytest.mark.parametrize(("words", "change"), GIVEN, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_flag_sets_its_field_with_its_fields_type(words, change, parser):
    got = read(parser, *words)
    assert got == Options(**change)
    assert all(type(getattr(got, name)) is type(value) for name, value in change.items())


@pytest.mark.parametrize("words", [words for words, _ in GIVEN[:-1]], ids=" ".join)
def test_only_a_flag_with_several_values_or_none_is_given_twice(words, parser, capsys):
    if words[0] in ("--target-modules", "--blocks", "--ranks", "--names", "--quantized"):
        parse(parser, ["learn", *words, *words])
        return
    name, value = words[0], words[-1]
    for again in ([name, value], [f"{name}={value}"]):
        assert refused(parser, capsys, *words, *again) == f"{name} is given twice: give it once"


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


def refused(parser, capsys, *words):
    """The line that answers these words, without what every such line has."""
    with pytest.raises(SystemExit) as ended:
        read(parser, *words)
    out, err = capsys.readouterr()
    start, end = "program: ", "; program learn --help lists all flags\n"
    assert ended.value.code == 2 and out == "" and err.startswith(start) and err.endswith(end) and err.count("\n") == 1
    return err.removeprefix(start).removesuffix(end)


NEAR = [
    ("--rank", "--r"),
    ("--alpha", "--lora-alpha"),
    ("--lora-alhpa=3", "--lora-alpha"),
    ("--target-module-names", "--target-modules"),
    ("--max-steps", "--steps"),
    ("--model", "--base"),
    ("--quantised", "--quantized"),
    ("--sede", "--seed"),
]


@pytest.mark.parametrize(("word", "meant"), NEAR)
def test_a_flag_that_resembles_another_is_answered_with_it_in_one_line(word, meant, parser, capsys):
    assert refused(parser, capsys, word, "8") == f"unknown arguments: {word} 8 (did you mean {meant}?)"


@pytest.mark.parametrize("word", ["--banana", "banana", "--hidden", "--dataset", "--ask"])
def test_what_resembles_nothing_is_named_without_a_guess(word, parser, capsys):
    assert refused(parser, capsys, word) == f"unknown arguments: {word}"


def test_a_word_is_answered_with_the_known_one_that_it_resembles():
    assert suggestion("tny", ["tiny", "smollm2"]) == suggestion("TINY", ("tiny",)) == " (did you mean tiny?)"
    assert suggestion("banana", ["tiny", "smollm2"]) == ""


def test_a_flag_that_is_missing_because_another_name_was_given_is_answered_with_that(parser, capsys):
    (command,) = (action.choices["learn"] for action in parser._actions if action.choices)
    command.add_argument("--out", required=True)
    line = refused(parser, capsys, "--output-dir", "x")
    assert line == "the following arguments are required: --out (did you mean --out by --output-dir?)"


BAD_VALUES = [
    ("--ranks q", "--ranks: expected NAME=R, got 'q'"),
    ("--ranks =2", "--ranks: expected NAME=R, got '=2'"),
    ("--ranks q=", "--ranks: expected NAME=R, got 'q='"),
    ("--names q", "--names: expected KEY=VALUE, got 'q'"),
    ("--ranks q=two", "--ranks: expected a whole number after q=, got 'two'"),
    ("--start small", "--start must be one of true, false, big, got 'small'"),
    ("--blocks one", "--blocks: expected a whole number, got 'one'"),
    ("--r=0", "--r must be at least 1, got '0'"),
    ("--epochs=-1", "--epochs must be a number above 0, got '-1'"),
    ("--epochs=inf", "--epochs must be a number above 0, got 'inf'"),
    ("--norm=nan", "--norm must be a number above 0, or inf for none, got 'nan'"),
    ("--warmup=1.5", "--warmup must be from 0 to 1, got '1.5'"),
    ("--method half", "--method must be one of lora, full, got 'half'"),
]


@pytest.mark.parametrize(("words", "reason"), BAD_VALUES, ids=[words for words, _ in BAD_VALUES])
def test_a_value_that_is_not_allowed_is_answered_with_what_is(words, reason, parser, capsys):
    assert refused(parser, capsys, *words.split()) == reason


class Table:
    def __repr__(self):
        return "a table of many rows"

    def __eq__(self, other):
        raise ValueError("pandas compares each cell")


LIMITS = [  # the field, values that are allowed, values that are not
    ("r", [1, 9**9], [0, -1, np.int64(0)]),
    ("epochs", [1e-9, 9], [0, -1.0, math.inf, math.nan, None]),
    ("norm", [1e-9, math.inf, None], [0.0, -math.inf, math.nan]),
    ("warmup", [0, 0.5, 1], [-0.1, 1.1, math.nan]),
    ("method", ["lora", "full"], ["LoRA", "", None, ["lora"]]),
    ("base", ["small", ""], []),
    ("path", ["small", None], ["", 3, ["small"], Table()]),
    ("start", [True, False, "big"], ["small"]),
    ("seed", [-1, 10**9, np.int64(3)], [1.5, "1", True, None]),  # without limits
    ("lr", [1, 1e-3, np.float32(0.1), None], ["1e-3", "fast", False]),
    ("quantized", [True, False], ["no", 0, 1]),
]


@pytest.mark.parametrize(("name", "allowed", "not_allowed"), LIMITS, ids=[name for name, _, _ in LIMITS])
def test_the_same_limits_hold_for_the_dataclass(name, allowed, not_allowed):
    for value in allowed:
        check_value(Options, name, value)
        Options(**{name: value})
    for value in not_allowed:
        with pytest.raises(ValueError, match=f"^{name} must be .*, got {re.escape(repr(as_python(value)))}$"):
            Options(**{name: value})
        with pytest.raises(ValueError, match="^own must be "):
            check_value(Options, name, value, "own")


def test_of_a_value_with_a_long_text_the_error_names_the_type_unless_it_was_typed():
    for value, shown in ((["small"] * 30, "a list"), ("x" * 99, repr("x" * 99))):
        with pytest.raises(ValueError, match=f", got {shown}$"):
            Options(**{"method" if isinstance(value, str) else "path": value})
    refused_by(lambda: Options(method=3), "method", "text", 3)


CONFLICTS = [
    (["--ranks", "q=2", "--ranks", "v=3", "q=4"], "--ranks: q is given twice"),
    (["--method", "full", "--r", "8"], "--r means nothing with --method full"),
    (["--lora-alpha", "2", "--method", "full"], "--lora-alpha means nothing with --method full"),
    (["--epochs", "4", "--steps", "5"], "--epochs means nothing with --steps 5"),
    (["--r", "3", "--seed", "3"], "r and seed are both 3"),
]


@pytest.mark.parametrize(("words", "reason"), CONFLICTS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_flags_that_mean_nothing_are_refused_even_where_they_say_the_default(words, reason, parser):
    with pytest.raises(UsageError, match=f"^{reason}"):
        read(parser, *words)


# -- values below the flags --------------------------------------------------------------------------------------------

BELOW = [  # what a file says, flags, what holds
    (dict(r=4, seed=1), "", dict(r=4, seed=1)),
    (dict(r=4, seed=1), "--r 2", dict(r=2, seed=1)),
    (dict(r=4, seed=1), "--method full", dict(method="full", seed=1)),  # a rank means nothing there
    (dict(steps=5), "--epochs 2", dict(epochs=2.0)),
    (dict(epochs=2.0), "--steps 5", dict(steps=5)),
    (dict(steps=5), "--steps 6", dict(steps=6)),
    (dict(lr=0.1), "--method full", dict(method="full")),  # a rate for another method
    (dict(lr=0.1, method="full"), "--method full", dict(method="full", lr=0.1)),
    (dict(lr=0.1, method="full"), "--method lora", {}),
    (dict(lr=0.1), "--method full --lr 0.2", dict(method="full", lr=0.2)),
    (dict(lr=0.1), "--steps 5", dict(steps=5)),
    (dict(lr=0.1, steps=5), "--steps 5", dict(lr=0.1, steps=5)),
    (dict(lr=0.1, steps=5), "--epochs 2", dict(epochs=2.0)),  # which lets the steps go
    (dict(lr=0.1), "--epochs 2", dict(lr=0.1, epochs=2.0)),
    (dict(ranks={"q": 2}), "--ranks v=3", dict(ranks={"v": 3})),
]


@pytest.mark.parametrize(("below", "words", "holds"), BELOW, ids=[f"{below} {words}" for below, words, _ in BELOW])
def test_flags_go_before_other_values_and_what_means_nothing_beside_them_is_let_go(below, words, holds, parser):
    arguments = parse(parser, ["learn", *words.split()])
    assert from_flags(Options, arguments, below) == Options(**holds)


def test_a_flag_that_means_nothing_beside_other_values_is_refused(parser):
    arguments = parse(parser, ["learn", "--r", "4"])
    with pytest.raises(UsageError, match="^--r means nothing with --method full"):
        from_flags(Options, arguments, dict(method="full"))


# -- continued work ----------------------------------------------------------------------------------------------------

OTHERS = [  # settings then, now, what is said of them
    (dict(lr=0.002), dict(lr=0.1), "lr 0.002, now 0.1"),
    (dict(steps=6, seed=0), dict(steps=None, seed=5), "steps 6, now none; seed 0, now 5"),
    (dict(r=8), dict(r=8, method="full"), "method none, now full"),
    (dict(r=8, method="full"), dict(r=8), "method full, now none"),
    (dict(base=dict(tiny="a" * 64, x=1)), dict(base=dict(tiny="b" * 64, x=1)), f"base.tiny {'a' * 16}, now {'b' * 16}"),
    (dict(targets=["q"]), dict(targets=("q", "v")), 'targets ["q"], now ["q", "v"]'),
    (dict(quantized=False), dict(quantized=True), "quantized false, now true"),
]


@pytest.mark.parametrize(("then", "now", "named"), OTHERS, ids=[named for _, _, named in OTHERS])
def test_work_that_was_started_with_other_settings_is_refused_and_they_are_named(then, now, named):
    with pytest.raises(ValueError) as refused:
        refuse_other_settings("runs/x", then, now, "choose another --out")
    assert str(refused.value) == f"runs/x was started with other settings: {named}; choose another --out"
    refuse_other_settings("runs/x", then, then, "")


def test_settings_are_compared_as_json_stores_them():
    refuse_other_settings("x", {"a": [1, 2], "b": {"c": 1.0}, "d": {}}, {"d": {}, "b": {"c": 1}, "a": (1, 2)}, "")

"""Options as TOML: what is written is read again to the last digit, and what cannot be meant is refused in one line."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import toml
from minilora.options import option


@dataclass(frozen=True, kw_only=True)
class Options:
    base: str = option("small", "which model", path=True)
    method: str = option("lora", "what is trained", choices=("lora", "full"))
    r: int = option(8, "rank", group="the adapter", only={"method": "lora"})
    words: str | Sequence[str] = option("all", "modules", group="the adapter")
    ranks: Mapping[str, int] | None = option(None, "by name", group="the adapter")
    start: bool | str = option(True, "how it begins", choices=(True, "big"), group="the adapter")
    epochs: float = option(4.0, "passes", only={"steps": None})
    steps: int | None = option(None, "instead of epochs")
    blocks: Sequence[int] | None = option(None, "numbers")
    quantized: bool = option(False, "packed")
    again: bool = option(False, "of this call alone", recorded=False)
    hidden: int = 5


def again(options, path):
    path.write_text(toml.write(options, "how to use it"), encoding="utf-8")
    return Options(**toml.read(Options, path))


def test_a_file_says_what_each_option_is_under_the_headings_of_the_help():
    assert (
        toml.write(Options(r=3, ranks={"q.*": 2}), "one", "two")
        == """# one
# two

base = "small" # which model
method = "lora" # what is trained
epochs = 4.0 # passes
# steps =  # instead of epochs
# blocks =  # numbers
quantized = false # packed

[the-adapter]
r = 3 # rank
words = "all" # modules
ranks = {"q.*" = 2} # by name
start = true # how it begins
"""
    )


def test_what_means_nothing_beside_the_others_is_left_out():
    record = tomllib.loads(toml.write(Options(method="full", steps=3)))
    assert "r" not in record["the-adapter"] and "epochs" not in record and record["steps"] == 3


texts = st.text(st.characters(exclude_categories=["Cs"]))
every = st.builds(
    Options,
    base=texts.filter(bool),
    r=st.integers(1, 2**60),
    words=texts | st.lists(texts),
    ranks=st.none() | st.dictionaries(texts, st.integers(-9, 9)),
    start=st.sampled_from([True, "big"]),
    epochs=st.floats(allow_nan=False),
    blocks=st.none() | st.lists(st.integers(0, 99)),
    quantized=st.booleans(),
)


@given(every)
@settings(deadline=None, max_examples=50)
def test_what_is_written_is_read_again_to_the_last_digit(tmp_path_factory, options):
    assert again(options, tmp_path_factory.getbasetemp() / "options.toml") == options


def test_a_whole_number_where_any_number_may_stand_is_read_as_one(tmp_path):
    got = again(Options(epochs=2), tmp_path / "x.toml")
    assert got.epochs == 2.0 and type(got.epochs) is float


def test_options_may_stand_under_any_heading_or_above_and_tables_in_full(tmp_path):
    (tmp_path / "x.toml").write_bytes(b'\xef\xbb\xbfr = 2\n[the-adapter]\nquantized = true\n[ranks]\n"a.b" = 1\n')
    assert toml.read(Options, tmp_path / "x.toml") == dict(r=2, quantized=True, ranks={"a.b": 1})


REFUSED = [  # the file, what is said after its name
    ("bse = 'x'", "unknown option 'bse' (did you mean base?)"),
    ("[the-adapter]\nrank = 4", "unknown option 'rank' (did you mean r?)"),  # what others call it
    ("wrods = 'x'", "unknown option 'wrods' (did you mean words?)"),
    ("banana = 4", "unknown option 'banana'"),
    ("hidden = 4", "unknown option 'hidden'"),
    ("again = true", "unknown option 'again'"),
    ("[the-adapted]\nr = 4", "unknown option 'the-adapted'"),
    ("r = 'eight'", "r must be a whole number, got 'eight'"),
    ("r = 8.0", "r must be a whole number, got 8.0"),
    ("r = true", "r must be a whole number, got True"),
    ("epochs = '4'", "epochs must be a number, got '4'"),
    ("epochs = true", "epochs must be a number, got True"),
    ("base = 3", "base must be a text, got 3"),
    ("quantized = 1", "quantized must be true or false, got 1"),
    ("words = 3", "words must be a text or a list, got 3"),
    ("ranks = 3", "ranks must be a table, got 3"),
    ("ranks = {q = 'x'}", "ranks must be a whole number, got {'q': 'x'}"),
    ("start = 'small'", "start must be one of true, big, got 'small'"),
    ("method = 'half'", "method must be one of lora, full, got 'half'"),
    ("r = 2\n[the-adapter]\nr = 2", "r is given twice"),
    ("method = 'full'\nr = 2", "r means nothing with method full: leave out one of the two"),
    ("steps = 2\nepochs = 2", "epochs means nothing with steps 2: leave out one of the two"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED, ids=[text for text, _ in REFUSED])
def test_what_cannot_be_meant_is_refused_with_the_files_name(text, reason, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        toml.read(Options, path)
    assert str(error.value) == f"{path}: {reason}"


BROKEN = {"none.toml": "cannot be read (No such file or directory)", ".": "cannot be read (",
          "bytes.toml": "not readable as TOML (", "half.toml": "not readable as TOML (",
          "twice.toml": "not readable as TOML ("}  # fmt: skip


@pytest.mark.parametrize(("name", "reason"), BROKEN.items())
def test_a_file_that_cannot_be_read_is_named(name, reason, tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"base = '\xff'")
    (tmp_path / "half.toml").write_text("steps =")
    (tmp_path / "twice.toml").write_text("r = 2\nr = 2")
    with pytest.raises(ValueError) as error:
        toml.read(Options, tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: {reason}") and "\n" not in str(error.value)


def test_a_relative_path_is_relative_to_the_folder_of_its_file(tmp_path, monkeypatch):
    for folder in ("there/runs", "here"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "there" / "x.gguf").touch()
    (tmp_path / "here" / "y.gguf").touch()
    (tmp_path / "there" / "runs" / "z.gguf").touch()
    monkeypatch.chdir(tmp_path / "here")
    file = tmp_path / "there" / "runs" / "run.toml"
    for written, expected in (
        ("../x.gguf", "../there/x.gguf"),
        ("z.gguf", "../there/runs/z.gguf"),
        ("y.gguf", "y.gguf"),  # which is not in the file's folder: from the current one, as older versions wrote it
        ("runs", "runs"),  # a name, not a path
        (str(tmp_path / "there" / "x.gguf"), str(tmp_path / "there" / "x.gguf")),
    ):
        file.write_text(f"base = '{written}'", encoding="utf-8")
        assert toml.read(Options, file) == {"base": expected}
    assert toml.moved("../there/x.gguf", Path(), file.parent) == "../x.gguf"

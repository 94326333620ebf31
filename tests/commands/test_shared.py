"""Options of a command from its flags, from a file, and from a recipe that comes along."""

import argparse
import os

import pytest

from minilora.commands import finetune
from minilora.commands.compare import CompareOptions
from minilora.commands.data import LookOptions
from minilora.commands.eval import EvalOptions
from minilora.commands.shared import read_options
from minilora.data.records import read_records
from minilora.data.samples import encode_records, truncate
from minilora.experiments.grid import SweepOptions
from minilora.models.load import load_tokenizer
from minilora.options import UsageError
from minilora.train.options import Options


def read(*words):
    parser = argparse.ArgumentParser()
    finetune.add(parser)
    return read_options(Options, parser.parse_args(words))


@pytest.mark.parametrize("options", [Options, EvalOptions, LookOptions, CompareOptions, SweepOptions])
def test_max_length_is_what_becomes_of_records_that_are_longer(options):
    tokenizer = load_tokenizer("tiny")
    talk, text = read_records([{"question": "Why?", "answer": "So. " * 40}]), read_records([{"text": "So. " * 40}])
    scored = {}
    for kind, record in {"conversations": talk, "texts": text}.items():
        whole = sum(sample.scored for sample in encode_records(record, tokenizer))
        kept, _, _ = truncate(encode_records(record, tokenizer, max_length=32), 32)
        scored[kind] = sum(sample.scored + 1 for sample in kept) >= whole
    fate = ", ".join(f"longer {kind} are {'divided' if whole else 'truncated'}" for kind, whole in scored.items())
    assert fate in options.__dataclass_fields__["max_length"].metadata["help"]


def test_a_command_without_adapters_takes_no_schema_of_theirs():
    named = ["adapters" in each.__dataclass_fields__["schema"].metadata["help"] for each in (EvalOptions, LookOptions)]
    assert named == [True, False]


def test_the_recipe_for_facts_is_a_file_by_name_and_flags_come_before_it():
    usual, facts = read("--data", "support"), read("--data", "support", "--config", "facts")
    assert facts.epochs > usual.epochs and facts.r > usual.r and facts.data == "support"
    assert read("--config", "facts", "--epochs", "3").epochs == 3 and read("--config", "facts").keep == "last"


def test_the_recipe_for_labels_passes_larger_batches_of_a_higher_rank_at_the_same_scale():
    usual, labels = read("--data", "support-labels"), read("--data", "support-labels", "--config", "labels")
    assert labels.batch_size > usual.batch_size and labels.r > usual.r
    assert labels.lora_alpha / labels.r == usual.lora_alpha / usual.r and labels.learning_rate == usual.learning_rate


def test_the_recipe_for_fields_passes_more_often():
    usual, fields = read("--data", "support-fields"), read("--data", "support-fields", "--config", "fields")
    assert fields.epochs > usual.epochs and fields.learning_rate == usual.learning_rate


@pytest.mark.parametrize(("given", "hint"), [("fact", r" \(did you mean facts\?\)"), ("labels.toml", ".*"), (".", "")])
def test_what_is_no_file_and_no_recipe_is_answered_with_the_recipes(given, hint):
    with pytest.raises(
        UsageError, match=f"^--config {given}: no such file{hint}; give .* or one of facts, fields, lab"
    ):
        read("--config", given)


def test_a_config_need_not_be_a_regular_file():
    assert read("--config", os.devnull) == read()  # as <(...) of a shell is none


def test_a_file_here_is_taken_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "facts").write_text("r = 3")
    monkeypatch.chdir(tmp_path)
    chosen = read("--config", "facts")
    assert (chosen.r, chosen.epochs) == (3, Options().epochs)

"""The options of the jobs: defaults, and what they refuse."""

import json
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from helpers.refusals import refused

from minilora import toml
from minilora.cli import build_parser
from minilora.lora.config import LoraConfig
from minilora.options import UsageError, flag, flag_fields, from_flags
from minilora.train.options import Options

RATES = [({}, 2e-3), (dict(method="full"), 2e-4), (dict(lr=0.5), 0.5), (dict(method="full", lr=0.5), 0.5),
         (dict(loss="dpo"), 2e-4), (dict(method="full", loss="dpo"), 2e-5)]  # fmt: skip


def test_data_whose_name_begins_like_the_general_questions_are_not_these():
    assert Options(data="general.csv", mix={"general.jsonl": 0.1}).data == "general.csv"


@pytest.mark.parametrize(("change", "rate"), RATES)
def test_each_method_has_a_learning_rate_of_its_own(change, rate):
    assert Options(**change).learning_rate == rate


STRENGTHS = [
    ({}, 0.65), (dict(strength=0.9), 0.9), (dict(use_dora=True), 1), (dict(init_lora_weights="pissa"), 1),
    (dict(adapter="runs/legal"), 1), (dict(adapter="runs/legal", strength=0.5), 0.5), (dict(method="full"), 1),
]  # fmt: skip


@pytest.mark.parametrize(("change", "strength"), STRENGTHS)
def test_a_new_plain_adapter_is_kept_in_part_and_any_other_whole(change, strength):
    assert Options(**change).adapter_scale == strength


PLACES = [  # options, where results go
    ({}, "runs/legal"),
    (dict(method="full"), "runs/legal-full"),
    (dict(data="my/notes.v2.jsonl"), "runs/notes.v2"),
    (dict(data="my/notes.v2"), "runs/notes.v2"),  # a folder
    (dict(base="tiny"), "runs/legal-tiny"),
    (dict(base="models/Llama-3.2-1B", method="full"), "runs/legal-Llama-3.2-1B-full"),
    (dict(base="models/x.gguf", data="support"), "runs/support-x"),
    (dict(data="org/set@main:train"), "runs/set-train"),
    (dict(base="tiny", out="there", method="full"), "there"),
]


@pytest.mark.parametrize(("change", "folder"), PLACES)
def test_the_folder_for_results_tells_data_base_and_method(change, folder):
    assert Options(**change).folder == Path(folder)


def test_data_in_the_folder_one_is_in_give_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Options(data=".").folder == Path("runs", tmp_path.name)


REFUSED = [  # options, what the message names
    (dict(method="full", quantized=True), "quantized", "method full", "leave out"),
    (dict(method="full", bf16=True), "bf16", "method full", "leave out"),
    (dict(method="full", adapter="x"), "adapter", "method full", "leave out"),
    (dict(method="full", strength=0.5), "strength", "method full", "leave out"),
    (dict(base=""), "base", "path or a name", "''"),
    (dict(data=""), "data", "path or a name", "''"),
    (dict(device="cuda", bf16=True), "bf16", "cpu", "leave out"),
    (dict(strength=0.5, use_dora=True), "strength 0.5", "DoRA", "leave it out"),
    (dict(strength=0.5, init_lora_weights="pissa"), "strength 0.5", "PiSSA"),
    (dict(field={"qestion": "q"}), "qestion=q", "did you mean question?"),
    (dict(mix={"a.jsonl": 1}), "a.jsonl=1", "below 1"),
    (dict(mix={"a.jsonl": 0.5, "b": 0.6}), "mix", 1.1),
    (dict(mix={"general": 0.1}), "mix", "general", "other data"),
    (dict(data="general"), "data", "general", "other data"),
    (dict(mix=["a.jsonl"]), "mix", "table", "a.jsonl"),
    (dict(mix={"legal": 0.5, "a.jsonl": 0.2}), "mix", "legal", "leave it out"),
    (dict(mix={"a.jsonl": 0.5}, loss="dpo"), "mix", "loss dpo", "pairs", "leave out"),
    (dict(r=0), "r ", 0),
    (dict(lora_dropout=1.0), "lora_dropout", 1.0),
]


@pytest.mark.parametrize("case", REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_options_that_mean_nothing_together_are_refused(case):
    change, *names = case
    refused(lambda: Options(**change), *names)


LIMITED = [item for item in fields(Options) if item.metadata.keys() & {"choices", "least", "most", "above"}]


def test_every_number_but_those_of_the_adapter_has_limits():
    numbers = {item.name for item in fields(Options) if type(item.default) in (int, float)}
    assert numbers - {item.name for item in LIMITED} == {"r", "lora_alpha", "lora_dropout"}  # LoraConfig has theirs
    assert {"steps", "lr", "patience", "eval_every", "save_every"} < {item.name for item in LIMITED}


def test_the_adapter_is_the_one_asked_for():
    settings = dict(
        r=3, lora_alpha=5.0, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"], layers_to_transform=[1],
        rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3.0}, lora_dropout=0.1, use_rslora=True,
        use_dora=True, freeze_A=True, init_lora_weights="gaussian",
    )  # fmt: skip
    assert settings.keys() == {field.name for field in fields(LoraConfig)}, "a value of each field, not the default"
    assert Options(**settings).lora_config() == LoraConfig(**settings)
    assert Options().lora_config() == LoraConfig(r=8, lora_alpha=16.0)


def test_a_step_takes_all_batches_that_are_accumulated():
    assert Options(batch_size=3, grad_accumulation=5).records_per_step == 15


ADAPTER = dict(r="8", lora_alpha="16", target_modules="q_proj", exclude_modules="q_proj", layers_to_transform="0",
               rank_pattern="q_proj=8", alpha_pattern="q_proj=16", lora_dropout="0", use_rslora=None,
               use_dora=None, freeze_A=None, init_lora_weights="true", lora_plus="1", strength="1")  # fmt: skip


@pytest.mark.parametrize(("name", "value"), ADAPTER.items())
def test_no_flag_of_an_adapter_means_anything_in_full_fine_tuning(name, value):
    arguments = build_parser().parse_args(["finetune", "--method", "full", flag(name), *([value] if value else [])])
    with pytest.raises(UsageError, match=f"^{flag(name)} means nothing with --method full: leave out one of the two$"):
        from_flags(Options, arguments)


def test_every_flag_of_an_adapter_is_tried_in_full_fine_tuning():
    named = {item.name for item in flag_fields(Options) if item.metadata.get("group") == "lora"}
    assert ADAPTER.keys() == named, "ADAPTER has a value of every option in the group lora"


# -- as a file ---------------------------------------------------------------------------------------------------------


def test_a_file_of_options_has_every_default_written_out_but_what_was_not_given(tmp_path):
    (tmp_path / "run.toml").write_text(Options().text(), encoding="utf-8")
    read = toml.read(Options, tmp_path / "run.toml")
    usual = asdict(Options(lr=2e-3, strength=0.65))  # the method's own, which may be another one in a later version
    del usual["beta"]  # it means something with DPO alone
    of_this_call = {item.name for item in flag_fields(Options) if not item.metadata["recorded"]}
    assert read == {name: value for name, value in usual.items() if value is not None and name not in of_this_call}
    assert "overwrite" in of_this_call
    assert Options.read(tmp_path / "run.toml", seed=3) == Options(lr=2e-3, strength=0.65, seed=3)
    assert Options.read(tmp_path / "run.toml", method="full") == Options(method="full")
    assert Options.read(tmp_path / "run.toml", use_dora=True) == Options(lr=2e-3, use_dora=True)


def test_an_option_that_is_none_is_refused_beside_a_file_as_without(tmp_path):
    (tmp_path / "run.toml").write_text(Options().text(), encoding="utf-8")
    with pytest.raises(TypeError, match="'sedd'"):
        Options.read(tmp_path / "run.toml", sedd=3)


def test_columns_under_other_names_go_with_their_data(tmp_path):
    chosen = Options(data="mine.csv", field={"question": "my q", "answer": "a"}, lr=1e-3, strength=0.65)
    (tmp_path / "run.toml").write_text(chosen.text(), encoding="utf-8")
    assert Options.read(tmp_path / "run.toml") == chosen
    below = toml.read(Options, tmp_path / "run.toml")
    for words, data, field in (
        (["--r", "2"], "mine.csv", chosen.field),
        (["--data", "legal"], "legal", None),
        (["--field", "q=x=y", "a=z"], "mine.csv", {"q": "x=y", "a": "z"}),
    ):
        options = from_flags(Options, build_parser().parse_args(["finetune", *words]), below)
        assert (options.data, options.field) == (data, field)


@pytest.mark.parametrize(
    ("first", "words", "strength"),
    [
        ({}, ["--use-dora"], 1),
        ({}, ["--init-lora-weights", "pissa"], 1),
        ({}, ["--adapter", "runs/legal"], 1),
        ({}, ["--use-dora", "--strength", "1"], 1),
        (dict(strength=0.5), ["--r", "4"], 0.5),
        (dict(adapter="runs/legal"), ["--r", "4"], 0.65),  # a new one
        (dict(init_lora_weights="pissa"), ["--init-lora-weights", "true"], 0.65),
    ],
    ids=str,
)
def test_flags_for_another_kind_of_adapter_bring_its_own_strength_with_them(first, words, strength, tmp_path):
    (tmp_path / "run.toml").write_text(Options(**first).text(), encoding="utf-8")
    below = toml.read(Options, tmp_path / "run.toml")
    assert from_flags(Options, build_parser().parse_args(["finetune", *words]), below).adapter_scale == strength


def test_a_file_of_options_says_how_the_run_is_repeated():
    first = Options(out="my runs/x").text().splitlines()[0]
    assert first.endswith("minilora finetune --config 'my runs/x/run.toml' --out ANOTHER_FOLDER")


def test_options_that_were_checked_stay_as_they_are():
    with pytest.raises(FrozenInstanceError):
        Options().r = 0


def test_a_file_of_options_finds_its_data_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "there" / "runs" / "x").mkdir(parents=True)
    (tmp_path / "there" / "mine.jsonl").touch()
    monkeypatch.chdir(tmp_path / "there")
    (tmp_path / "there" / "more.jsonl").touch()
    chosen = Options(data="mine.jsonl", mix={"more.jsonl": 0.2, "legal": 0.1}, out="runs/x")
    (chosen.folder / "run.toml").write_text(chosen.text(), encoding="utf-8")
    assert Options.read("runs/x/run.toml").decisive() == chosen.decisive()
    assert replace(chosen, data="./mine.jsonl").decisive() == chosen.decisive()
    decisive = chosen.decisive()
    monkeypatch.chdir(tmp_path)
    found = Options.read("there/runs/x/run.toml", out="there/runs/x")
    assert found.data == "there/mine.jsonl" and found.mix == {"there/more.jsonl": 0.2, "legal": 0.1}
    assert found.decisive() == decisive  # the run can be resumed from here


def test_what_decides_a_run_is_json_and_holds_nothing_of_the_single_call():
    decisive = Options(target_modules=("q_proj",), out="x", resume=True, save_every=3).decisive()
    assert decisive == Options(target_modules=["q_proj"]).decisive() == json.loads(json.dumps(decisive))
    assert Options(base=Path("tiny"), data=Path("x/y")).decisive() == Options(base="tiny", data="x/y").decisive()
    numbers = Options(r=np.int64(4), lr=np.float64(0.5), steps=np.int32(3), use_dora=np.bool_(True)).decisive()
    assert json.loads(json.dumps(numbers)) == numbers == Options(r=4, lr=0.5, steps=3, use_dora=True).decisive()
    assert decisive["lr"] == 2e-3 and decisive["strength"] == 0.65
    assert not decisive.keys() & {"out", "overwrite", "resume", "save_every"}
    assert Options(steps=5, epochs=20.0).decisive() == Options(steps=5).decisive()  # of what has no effect

"""The options of the jobs: defaults, and what they refuse."""

from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path

import pytest

from minilora import toml
from minilora.cli import build_parser
from minilora.lora.config import LoraConfig
from minilora.options import UsageError, flag, flag_fields, from_flags
from minilora.train.options import Options


def test_the_defaults_are_these():
    assert asdict(Options()) == dict(
        base="smollm2", data="legal", field=None, method="lora", out=None, overwrite=False, resume=False,
        save_every=None, adapter=None, r=8, lora_alpha=16.0, target_modules="all-linear", exclude_modules=None,
        layers_to_transform=None, rank_pattern=None, alpha_pattern=None, lora_dropout=0.0,
        bias="none", use_rslora=False, use_dora=False, init_lora_weights=True, lora_plus=None, strength=None,
        epochs=4.0, steps=None, lr=None, warmup=0.1, schedule="cosine", weight_decay=0.0, max_grad_norm=1.0,
        batch_size=8, grad_accumulation=1, max_length=512, seed=0, eval_records=80,
        eval_every=None, patience=None, keep="best", quantized=False, bf16=False, recompute=False, device="cpu",
    )  # fmt: skip


RATES = [({}, 2e-3), (dict(method="full"), 2e-4), (dict(lr=0.5), 0.5), (dict(method="full", lr=0.5), 0.5)]


@pytest.mark.parametrize(("change", "rate"), RATES)
def test_each_method_has_a_learning_rate_of_its_own(change, rate):
    assert Options(**change).learning_rate == rate


STRENGTHS = [
    ({}, 0.65), (dict(strength=0.9), 0.9), (dict(use_dora=True), 1), (dict(init_lora_weights="pissa"), 1),
    (dict(adapter="runs/legal"), 1), (dict(adapter="runs/legal", strength=0.5), 0.5), (dict(method="full"), 1),
]  # fmt: skip


@pytest.mark.parametrize(("change", "strength"), STRENGTHS)
def test_a_new_plain_adapter_is_kept_in_part_and_any_other_whole(change, strength):
    assert Options(**change).kept_strength == strength


PLACES = [  # options, where results go
    ({}, "runs/legal"),
    (dict(method="full"), "runs/legal-full"),
    (dict(data="my/notes.v2.jsonl"), "runs/notes.v2"),
    (dict(data="my/notes.v2"), "runs/notes.v2"),  # a folder
    (dict(base="tiny"), "runs/legal-tiny"),
    (dict(base="models/Llama-3.2-1B", method="full"), "runs/legal-Llama-3.2-1B-full"),
    (dict(base="models/x.gguf", data="support"), "runs/support-x"),
    (dict(base="tiny", out="there", method="full"), "there"),
]


@pytest.mark.parametrize(("change", "folder"), PLACES)
def test_the_folder_for_results_tells_data_base_and_method(change, folder):
    assert Options(**change).folder == Path(folder)


def test_data_in_the_folder_one_is_in_give_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Options(data=".").folder == Path("runs", tmp_path.name)


REFUSED = [  # options, what the one line says
    (dict(method="dora"), "method must be 'lora' or 'full', got 'dora'"),
    (dict(method="full", quantized=True), "packed weights cannot be trained: leave out quantized, or use method lora"),
    (dict(field={"qestion": "q"}), r"field qestion=q: minilora reads no 'qestion' \(did you mean question\?\)"),
    (dict(device="tpu"), "device must be 'cpu' or 'cuda', got 'tpu'"),
    (dict(epochs=0), "epochs must be a positive number, got 0"),
    (dict(epochs=float("nan")), "epochs must be a positive number, got nan"),
    (dict(lr=0.0), r"lr must be a positive number, got 0\.0"),
    (dict(lr=float("inf")), "lr must be a positive number, got inf"),
    (dict(lr=-1.0), r"lr must be a positive number, got -1\.0"),
    (dict(schedule="step"), "schedule must be one of cosine, linear, constant, got 'step'"),
    (dict(warmup=100.0), r"warmup must be a share of the steps, from 0 to 1, got 100\.0"),
    (dict(warmup=-0.1), r"warmup must be a share of the steps, from 0 to 1, got -0\.1"),
    (dict(weight_decay=-1.0), r"weight_decay must be a number from 0 on, got -1\.0"),
    (dict(weight_decay=float("inf")), "weight_decay must be a number from 0 on, got inf"),
    (dict(max_grad_norm=0.0), r"max_grad_norm must be a positive number, or inf for none, got 0\.0"),
    (dict(max_grad_norm=float("nan")), "max_grad_norm must be a positive number, or inf for none, got nan"),
    (dict(grad_accumulation=0), "grad_accumulation must be at least 1, got 0"),
    (dict(strength=0.0), r"strength must be a positive number, got 0\.0"),
    (dict(strength=0.5, use_dora=True), r"strength 0\.5 is for plain LoRA: with DoRA or PiSSA leave it out"),
    (dict(lora_plus=0.0), r"lora_plus must be a positive number, got 0\.0"),
    (dict(lora_dropout=1.0), r"lora_dropout must be a number, at least 0 and below 1, got 1\.0"),
    (dict(bias="some"), "bias must be 'none', 'all' or 'lora_only', got 'some'"),
    (dict(rank_pattern={"q_proj": 0}), r"rank_pattern\['q_proj'\] must be a positive integer, got 0"),
    (dict(alpha_pattern={"q_proj": -1.0}), r"q_proj: alpha must be a positive number, got -1\.0"),
    (dict(init_lora_weights="olora"), "init_lora_weights must be True, False, 'gaussian' or 'pissa', got 'olora'"),
    (dict(eval_every=0), "eval_every must be at least 1, got 0"),
    (dict(save_every=0), "save_every must be at least 1, got 0"),
    (dict(patience=0), "patience must be at least 1, got 0"),
    (dict(keep="first"), "keep must be 'best' or 'last', got 'first'"),
    (dict(method="full", adapter="x"), "method full trains no adapter: leave out adapter, or use method lora"),
    (dict(method="full", strength=0.5), "method full trains no adapter: leave out strength, or use method lora"),
    (dict(batch_size=0), "batch_size must be at least 1, got 0"),
    (dict(steps=0), "steps must be at least 1, got 0"),
    (dict(max_length=7), "max_length must be at least 8, got 7"),
    (dict(eval_records=0), "eval_records must be at least 1, got 0"),
    (dict(seed=-1), "seed must be at least 0, got -1"),
    (dict(r=0), "r must be a positive integer, got 0"),
    (dict(lora_alpha=0.0), "lora_alpha: alpha must be a positive number, got 0.0"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_options_that_mean_nothing_are_refused_in_one_line(change, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        Options(**change)


def test_the_least_that_is_allowed_is_allowed():
    Options(warmup=0.0, weight_decay=0.0, max_grad_norm=float("inf"), grad_accumulation=1, lora_dropout=0.0)
    Options(warmup=1.0, max_grad_norm=1e-9, lora_plus=1e-9)
    Options(steps=1, batch_size=1, eval_records=1, max_length=8, seed=0, r=1, epochs=1e-9, lr=1e-9)


def test_the_adapter_is_the_one_asked_for():
    settings = dict(
        r=3, lora_alpha=5.0, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"], layers_to_transform=[1],
        rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3.0}, lora_dropout=0.1, bias="lora_only", use_rslora=True,
        use_dora=True, init_lora_weights="gaussian",
    )  # fmt: skip
    assert settings.keys() == {field.name for field in fields(LoraConfig)}
    assert Options(**settings).lora_config() == LoraConfig(**settings)
    assert Options().lora_config() == LoraConfig(r=8, lora_alpha=16.0)


def test_a_step_takes_all_batches_that_are_accumulated():
    assert Options(batch_size=3, grad_accumulation=5).records_per_step == 15


ADAPTER = dict(r="8", lora_alpha="16", target_modules="q_proj", exclude_modules="q_proj", layers_to_transform="0",
               rank_pattern="q_proj=8", alpha_pattern="q_proj=16", lora_dropout="0", bias="none", use_rslora=None,
               use_dora=None, init_lora_weights="true", lora_plus="1", strength="1")  # fmt: skip


@pytest.mark.parametrize(("name", "value"), ADAPTER.items())
def test_no_flag_of_an_adapter_means_anything_in_full_fine_tuning(name, value):
    arguments = build_parser().parse_args(["finetune", "--method", "full", flag(name), *([value] if value else [])])
    with pytest.raises(UsageError, match=f"^{flag(name)} means nothing with --method full: leave out one of the two$"):
        from_flags(Options, arguments)
    assert ADAPTER.keys() == {item.name for item in flag_fields(Options) if item.metadata.get("group") == "lora"}


# -- as a file ---------------------------------------------------------------------------------------------------------


def test_a_file_of_options_has_every_default_written_out_but_what_was_not_given(tmp_path):
    (tmp_path / "run.toml").write_text(Options().text(), encoding="utf-8")
    said = toml.read(Options, tmp_path / "run.toml")
    usual = asdict(Options(lr=2e-3, strength=0.65))  # the method's own, which may be another one in a later version
    of_this_call = {item.name for item in flag_fields(Options) if not item.metadata["recorded"]}
    assert said == {name: value for name, value in usual.items() if value is not None and name not in of_this_call}
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
        ({}, ["--bias", "lora_only"], 0.65),
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
    assert from_flags(Options, build_parser().parse_args(["finetune", *words]), below).kept_strength == strength


def test_a_file_of_options_says_how_the_run_is_repeated():
    first = Options(out="my runs/x").text().splitlines()[0]
    assert first.endswith("minilora finetune --config 'my runs/x/run.toml' --out ANOTHER_FOLDER")


def test_options_that_were_checked_stay_as_they_are():
    with pytest.raises(FrozenInstanceError):
        Options().r = 0

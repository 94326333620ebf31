"""A sweep: its trials, its table, how it continues, what it refuses, and what it says in the end."""

import csv
import errno
import json
import math
import shlex
import sys
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from commandline import complaint, instead, status, written
from hearing import counts_of

from minilora import progress
from minilora.cli import build_parser
from minilora.commands.sweep import page
from minilora.experiments import sweep as sweeping
from minilora.experiments.grid import FOUND, SweepOptions, as_options, word
from minilora.experiments.sweep import read_rows, summarise, sweep, trial
from minilora.files import disk
from minilora.options import flag_fields, from_flags
from minilora.pages.sweep import sweep_figure
from minilora.train.options import Options

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def quick(home, *flags):
    """The arguments of a quick sweep in the folder `s`."""
    usual = {"--base": home / "base", "--data": home / "data.jsonl", "--steps": 2, "--batch-size": 4, "--jobs": 1}
    return ["sweep", *instead(usual | {"--out": "s"}, *flags)]


@pytest.fixture
def no_training(monkeypatch):
    """Trials find at once what their settings say; a list of them."""
    made = []

    def found(setting, folder):
        made.append(setting)
        if setting["lr"] == 99:
            raise ValueError("the loss is no\nnumber")
        loss = (setting["lr"] or 0.002) + setting.get("r", 50) / 100 + setting["seed"] / 1000
        losses = {"validation_loss": loss, "unseen_loss": loss + 1, "general_loss": loss + 2, "train_loss": loss}
        return losses | {"steps": 2, "trainable_parameters": 100 * setting.get("r", 50), "seconds": 0.0}

    monkeypatch.setattr(sweeping, "trial", found)
    return made


def refused(capsys, *command):
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert status(*command) == 1
    return complaint(capsys)


def table(folder="s"):
    with open(f"{folder}/trials.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table_of(home, *flags):
    """The table of a new sweep with these flags."""
    assert status(*quick(home, *flags, "--overwrite")) == 0
    return table()


# -- which trials ------------------------------------------------------------------------------------------------------


def test_every_combination_of_values_is_a_trial_and_values_given_twice_count_once():
    found = SweepOptions(r=[1, 4, 4], lr=[1e-3, 1e-2], seed=[0, 1, 2]).settings()
    assert len(found) == len({json.dumps(one) for one in found}) == 12
    assert SweepOptions(r=[4, 4], seed=[0, 1]).varied == ["seed"]
    assert {(one["base"], one["strength"]) for one in found} == {("tiny", 1.0)}


def test_combinations_that_mean_nothing_are_made_once():
    found = SweepOptions(method=["lora", "full"], r=[1, 4, 16], lr=[1e-3, 1e-2]).settings()
    assert [one["method"] for one in found].count("lora") == 6
    assert [one for one in found if one["method"] == "full" and "r" in one] == []
    assert [one["method"] for one in found].count("full") == 2


def test_groups_of_modules_have_names_and_lists_are_joined_by_commas(tmp_path):
    words = ["qv", "attention", "mlp", "all-linear", ["q_proj", "o_proj"], "v_proj"]
    targets = [as_options(one).target_modules for one in SweepOptions(target_modules=words).settings()]
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    assert targets == [["q_proj", "v_proj"], attention, mlp, "all-linear", ["q_proj", "o_proj"], "v_proj"]
    assert as_options(SweepOptions(exclude_modules=["mlp"]).settings()[0]).exclude_modules == mlp
    assert [word(value) for value in (None, True, ["a", "b"], 0.25, 8)] == ["", "true", "a,b", "0.25", "8"]
    assert [word(value) for value in (math.inf, 1e-3, np.float64(1 / 3))] == ["inf", "0.001", "0.3333333333333333"]
    said = [item.name for item in fields(SweepOptions) if "are groups" in item.metadata.get("help", "")]
    assert said == ["target_modules"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(r=[]), "r has no values"),
        (dict(r=[4, 0]), "r must be"),
        (dict(r=[4, 1.5]), "r must be a whole number, got 1.5"),
        (dict(lr=[0.0]), "lr must be a number above 0"),
        (dict(method=["full"], r=[1, 4]), "--r means nothing in any of these trials"),
        (dict(steps=[5], epochs=[1, 2]), "--epochs means nothing in any of these trials"),
        (dict(loss=["dpo"], beta=[0.1, 0.5]), "beta: it is a factor in DPO's loss, so that trials cannot be compared"),
        (dict(loss=["sft", "dpo"]), "loss: those of sft and of dpo cannot be compared: make a sweep for each"),
        (dict(seed=[0, -1]), "seed must be at least 0"),
        (dict(jobs=0), "jobs must be at least 1"),
        (dict(seed=list(range(101)), r=list(range(1, 101))), "10,100 combinations of these values are too many"),
    ],
)
def test_what_no_trial_can_be_is_refused_in_one_line(options, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        SweepOptions(**options).settings()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resume", "save_every", "report_to"])
def test_where_the_results_of_finetune_go_is_not_tried(name):
    with pytest.raises(TypeError, match=name):
        SweepOptions(**{name: [None]})


# -- flags and files ---------------------------------------------------------------------------------------------------


def test_a_flag_that_finetune_takes_without_a_value_and_one_that_may_be_infinite_have_several(home, no_training):
    words = quick(home, "--quantized", "q8_0", "nf4", "false", "--max-grad-norm", "inf", "1")
    for made in (6, 6):  # the second finds them all
        assert status(*words) == 0 and len(no_training) == made
    found = {(one["quantized"], one["max_grad_norm"]) for one in no_training}
    assert found == {(kind, norm) for kind in ("q8_0", "nf4", False) for norm in (math.inf, 1.0)}


def test_flags_take_several_values_of_every_kind(tiny_folder, no_training):
    flags = ["--use-dora", "false", "true", "--lora-plus", "none", "16", "--target-modules", "qv", "q_proj,k_proj"]
    assert status(*quick(tiny_folder, *flags)) == 0
    assert len(no_training) == 8
    assert {one["use_dora"] for one in no_training} == {False, True}
    assert {one["lora_plus"] for one in no_training} == {None, 16.0}
    assert [one["target_modules"] for one in no_training[:2]] == ["qv", "qv"]
    assert ["q_proj", "k_proj"] in [one["target_modules"] for one in no_training]


def test_a_file_says_the_same_and_flags_go_first(tiny_folder, no_training, tmp_path):
    (tmp_path / "s.toml").write_text(
        "seed = [0, 1]\n[lora]\nr = [1, 4]\nlora-plus = 3\n".replace("lora-plus", "lora_plus")
        + 'target_modules = ["mlp", ["q_proj", "v_proj"]]\nkeep = "last"\n'
    )
    assert status(*quick(tiny_folder, "--config", "s.toml", "--r", "2")) == 0
    assert {(one["r"], one["seed"], one["lora_plus"]) for one in no_training} == {(2, 0, 3.0), (2, 1, 3.0)}
    assert [one["target_modules"] for one in no_training][::2] == ["mlp", ["q_proj", "v_proj"]]
    assert {one["keep"] for one in no_training} == {"last"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('r = [1, "two"]', "r must be a whole number, got [1, 'two']"),
        ('method = ["lora", "half"]', "method must be one of lora, full, got 'half'"),
        ("r = []", "r has no values"),
        ("overwrite = true", "unknown option 'overwrite'"),
    ],
)
def test_a_file_that_cannot_be_is_refused_in_one_line(text, reason, tmp_path, capsys):
    (tmp_path / "s.toml").write_text(text)
    assert status("sweep", "--config", "s.toml") == 2
    assert reason in complaint(capsys)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--use-dora", "maybe"], "expected true or false, got 'maybe'"),
        (["--lr", "1e-3", "fast"], "--lr: expected a number, got 'fast'"),
        (["--lr", "1e-3,3e-3"], "--lr: expected a number, got '1e-3,3e-3'; values are separated by spaces"),
        (["--r", "1", "0"], "r must be"),
    ],
)
def test_flags_that_cannot_be_are_status_2(words, reason, capsys):
    assert status("sweep", *words) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--base", "absent"), ("--data", "absent.jsonl")])
def test_inputs_that_are_not_there_are_one_line_and_nothing_is_written(flag, value, tiny_folder, capsys):
    assert value in refused(capsys, *quick(tiny_folder, flag, value)) and not sweeping.Path("s").exists()


def test_fields_are_read_by_the_schema_that_is_given(tiny_folder, no_training, tmp_path):
    rows = [json.dumps({"text": f"part {i}", "fields": {"part": str(i)}}) for i in range(10)]
    (tmp_path / "forms.jsonl").write_text("\n".join(rows))
    (tmp_path / "s.json").write_text('{"properties": {"part": {"type": "string"}}}')
    command = quick(tiny_folder, "--data", "forms.jsonl", "--schema", "s.json")
    assert status(*command) == 0 and len(no_training) == 1


# -- the folder --------------------------------------------------------------------------------------------------------


def test_rows_are_there_as_trials_end_and_a_failed_one_is_a_row_with_its_reason(tiny_folder, no_training, capsys):
    assert status(*quick(tiny_folder, "--lr", "0.5", "99", "--seed", 0, 1)) == 0
    rows = table()
    assert [(row["lr"], row["seed"], row["failed"]) for row in rows] == [
        ("0.5", "0", ""), ("0.5", "1", ""), ("99", "0", "the loss is no number"), ("99", "1", "the loss is no number"),
    ]  # fmt: skip
    assert float(rows[1]["validation_loss"]) == pytest.approx(0.581)
    said = capsys.readouterr().out
    assert "2 of 4 trials failed" in said and "lr 99, seed 0: the loss is no number" in said
    assert written(sweeping.Path("s")) == ["sweep.json", "trials.csv"]  # of one learning rate there is no curve


def test_the_table_has_the_learning_rate_in_effect_and_every_digit_of_it(tiny_folder, no_training, quick_pictures):
    rates = {(row["method"], row["r"]): row["lr"] for row in table_of(tiny_folder, "--method", "lora", "full")}
    assert rates == {("lora", "8"): "0.0002", ("full", ""): "2e-05"}  # which follow from the size of its weights
    assert [row["lr"] for row in table_of(tiny_folder, "--loss", "dpo")] == ["2e-05"]
    rates = [0.12345678901234567, 1 / 3, 1e-3]
    assert [float(row["lr"]) for row in table_of(tiny_folder, "--lr", *rates)] == rates
    result = json.loads(sweeping.Path("s/sweep.json").read_text())
    assert [float(row["varied"]["lr"]) for row in result["settings"]] == sorted(rates)
    commands = [from_flags(Options, build_parser().parse_args(shlex.split(row["command"])[1:]))
                for row in result["settings"]]  # fmt: skip
    assert [chosen.lr for chosen in commands] == sorted(rates)


def test_a_sweep_of_which_no_trial_finished_ends_with_status_1_after_its_page(tiny_folder, no_training, capsys):
    assert status(*quick(tiny_folder, "--lr", "99", "--seed", 0, 1)) == 1
    said = capsys.readouterr()
    assert "2 of 2 trials failed" in said.out and said.err.endswith("no trial finished: the reasons are listed above\n")


def test_the_same_command_goes_on_and_half_a_row_is_made_again(tiny_folder, no_training, tmp_path, capsys, request):
    command = quick(tiny_folder, "--r", 1, 2, 3)
    assert status(*command) == 0
    assert written(tmp_path / "s") == ["sweep-dark.png", "sweep.json", "sweep.png", "trials.csv"]
    request.getfixturevalue("quick_pictures")  # those were drawn
    lines = (tmp_path / "s/trials.csv").read_text().splitlines(keepends=True)
    (tmp_path / "s/trials.csv").write_text("".join(lines[:2]) + lines[2][:20])  # killed in the midst of a row
    no_training.clear()
    capsys.readouterr()
    assert status(*command) == 0
    assert [one["r"] for one in no_training] == [2, 3]
    assert "s holds 1 of 3 trials; the others are run now" in capsys.readouterr().err
    assert (tmp_path / "s/trials.csv").read_text().splitlines(keepends=True) == lines
    with counts_of("trial") as heard:
        assert status(*command) == 0 and len(no_training) == 2 and heard == [3]
    assert json.loads((tmp_path / "s/sweep.json").read_text())["time"]["jobs"] == 1  # although none was left


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device")])
def test_a_trial_that_lacked_memory_or_disk_is_tried_again(
    error, tiny_folder, no_training, monkeypatch, capsys, quick_pictures
):
    find, command = sweeping.trial, quick(tiny_folder, "--r", 1, 2, "--lr", 0.5, 99)

    def lacking(setting, folder):
        if setting["r"] == 2 and setting["lr"] == 0.5:
            raise error
        return find(setting, folder)

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "trial", lacking)
        assert status(*command) == 0
    said = capsys.readouterr()
    assert "3 of 4 trials failed" in said.out
    assert "1 trial lacked memory or a file: the same command tries again\n" in said.err
    no_training.clear()
    assert status(*command) == 0 and [(one["r"], one["lr"]) for one in no_training] == [(2, 0.5)]
    assert "2 of 4 trials failed" in capsys.readouterr().out and len(table()) == 4


def test_where_nobody_reads_the_table_the_picture_is_there_all_the_same(
    tiny_folder, no_training, monkeypatch, quick_pictures
):
    def closed(text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=closed, flush=lambda: None))
    assert status(*quick(tiny_folder, "--r", 1, 2)) == 0
    assert "sweep.png" in written(sweeping.Path("s"))


def test_ctrl_c_keeps_what_is_done(tiny_folder, no_training, monkeypatch, capsys):
    find = sweeping.trial

    def stopped(setting, folder):
        if setting["r"] == 3:
            raise KeyboardInterrupt
        return find(setting, folder)

    monkeypatch.setattr(sweeping, "trial", stopped)
    assert status(*quick(tiny_folder, "--r", 1, 2, 3, 4)) == 130
    assert "2 of 4 trials are kept in s: the same command continues" in capsys.readouterr().err
    assert [row["r"] for row in table()] == ["1", "2"] and written(sweeping.Path("s")) == ["sweep.json", "trials.csv"]


def test_other_settings_in_the_same_folder_are_refused_or_overwrite(tiny_folder, no_training, capsys, quick_pictures):
    assert status(*quick(tiny_folder, "--r", 1, 2)) == 0
    said = refused(capsys, *quick(tiny_folder, "--r", 1, 4))
    assert said == "s was started with other settings: r [1, 2], now [1, 4]; choose another --out, or --overwrite it"
    assert status(*quick(tiny_folder, "--r", 1, 4, "--overwrite")) == 0
    assert [row["r"] for row in table()] == ["1", "4"]
    assert status(*quick(tiny_folder, "--overwrite")) == 0  # one setting has no picture, nor is that of others left
    assert written(sweeping.Path("s")) == ["sweep.json", "trials.csv"]


@pytest.mark.parametrize(
    "more", [{"seed": [0, 1]}, {"lr": [0.1, 0.3, 0.2]}, {"r": [4, 2, 1]}, {"method": ["full", "lora"]}]
)
def test_a_sweep_with_more_values_adds_its_trials_to_those_that_are_there(tiny_folder, no_training, more):
    first = dict(base=[str(tiny_folder / "base")], data=[str(tiny_folder / "data.jsonl")], steps=[2], batch_size=[4])
    first |= {"jobs": 1, "out": "s", "lr": [0.1, 0.2], "r": [1, 2]}
    sweep(SweepOptions(**first))
    before, count = table(), len(no_training)
    grown = sweep(SweepOptions(**first | more))
    assert len(no_training) == len(table()) > count == len(before) == 4
    assert sorted(int(row["trial"]) for row in table()) == list(range(len(table())))
    assert grown["time"]["made"] == len(table()) - count  # those that were there took no time
    fresh = sweep(SweepOptions(**first | more | {"out": "fresh"}))
    in_order = [sorted(table(folder), key=lambda row: int(row["trial"])) for folder in ("s", "fresh")]
    assert in_order[0] == in_order[1] and grown["settings"] == fresh["settings"]
    with pytest.raises(ValueError, match="s was started with other settings"):
        sweep(SweepOptions(**first))  # its own trials are fewer now


@pytest.mark.parametrize("changed", [["--warmup", 0.2], ["--warmup", 0.1], ["--strength", 0.5], ["--method", "full"]])
def test_an_option_more_or_less_is_another_sweep_unless_its_trials_are_the_same(
    tiny_folder, no_training, changed, capsys
):
    assert status(*quick(tiny_folder, "--lr", 0.1)) == 0
    usual = quick(tiny_folder, "--lr", 0.1)
    if changed == ["--warmup", 0.1]:  # the default
        assert status(*usual, *changed) == 0
    else:
        assert f"{changed[0].removeprefix('--')} none, now" in refused(capsys, *usual, *changed)
        assert status(*usual, *changed, "--overwrite") == 0
        assert ", now none" in refused(capsys, *usual)


def test_another_version_of_minilora_is_another_sweep(tiny_folder, no_training, monkeypatch, capsys):
    assert status(*quick(tiny_folder)) == 0
    monkeypatch.setattr(sweeping, "__version__", "9.9")
    assert ", now 9.9" in refused(capsys, *quick(tiny_folder))


@pytest.mark.parametrize("flags", [["--data", "d.jsonl"], ["--mix", "d.jsonl=0.2"]], ids=lambda flags: flags[0])
def test_other_data_of_the_same_name_are_another_sweep(flags, tiny_folder, no_training, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text((tiny_folder / "data.jsonl").read_text())
    assert status(*quick(tiny_folder, *flags)) == 0
    lines = (tmp_path / "d.jsonl").read_text().splitlines()
    (tmp_path / "d.jsonl").write_text("\n".join(lines[::-1]))
    assert "data_sha256" in refused(capsys, *quick(tiny_folder, *flags))


def test_a_sweep_that_was_killed_while_it_wrote_a_file_is_continued(tiny_folder, no_training, tmp_path):
    assert status(*quick(tiny_folder)) == 0
    disk._aside(tmp_path / "s/sweep.json", f"{2**22 + 1}-01234567-{disk._MACHINE}.partial").write_text("{")
    assert status(*quick(tiny_folder)) == 0 and len(no_training) == 1


def test_a_folder_of_something_else_is_left_alone(tiny_folder, tmp_path, capsys):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/thesis.txt").write_text("mine")
    assert "s holds thesis.txt, which is not a file of a sweep" in refused(capsys, *quick(tiny_folder, "--overwrite"))
    assert written(tmp_path / "s") == ["thesis.txt"]
    (tmp_path / "file").touch()
    said = refused(capsys, *quick(tiny_folder, "--out", "file/s"))
    assert said == "file/s: results cannot be written there (Not a directory); choose another --out"
    with sweeping._alone(tmp_path / "t"):
        said = refused(capsys, *quick(tiny_folder, "--out", "t"))
    assert said == "t: another sweep is running there; choose another --out"


def test_a_table_that_is_none_is_named(tiny_folder, no_training, tmp_path, capsys):
    assert status(*quick(tiny_folder)) == 0
    (tmp_path / "s/trials.csv").write_text("a,b\n1,2\n")
    assert refused(capsys, *quick(tiny_folder)).startswith("s/trials.csv: not the table of a sweep")


# -- real trials -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_whole_sweep_in_processes(tiny_folder, tmp_path):
    base, data = str(tiny_folder / "base"), str(tiny_folder / "data.jsonl")
    options = SweepOptions(
        base=[base], data=[data], steps=[2], batch_size=[4], eval_records=[2], method=["lora", "full"], r=[1, 2],
        jobs=2, out="s",
    )  # fmt: skip
    result = sweep(options)
    assert written(tmp_path / "s") == ["sweep.json", "trials.csv"]
    rows = read_rows(tmp_path / "s/trials.csv")
    assert sorted(rows) == [0, 1, 2] and all(float(row["validation_loss"]) > 0 for row in rows.values())
    assert all(float(row["unseen_loss"]) > 0 and row["failed"] == "" for row in rows.values())
    assert [row["r"] for row in table() if row["method"] == "full"] == [""]  # the order is that in which they ended
    assert int(rows[2]["trainable_parameters"]) > int(rows[1]["trainable_parameters"])
    assert json.loads((tmp_path / "s/sweep.json").read_text())["settings"] == result["settings"]
    assert result["time"]["jobs"] == 2 and set(result["best"]) == {"lora", "full"}


@pytest.mark.long
def test_a_trial_is_what_finetune_measures_and_leaves_nothing(tiny_folder, tmp_path, monkeypatch):
    from minilora.train.job import finetune

    base, data = str(tiny_folder / "base"), str(tiny_folder / "data.jsonl")
    setting = SweepOptions(base=[base], data=[data], steps=[3], batch_size=[4], r=[2], eval_records=[2]).settings()[0]
    monkeypatch.setattr("minilora.train.job.run_picture", lambda metrics, path: path.touch())
    with monkeypatch.context() as patch:  # a bar's lock would be reported as a leaked semaphore after Ctrl-C
        patch.setattr(progress, "_tqdm", None)
        patch.setattr(progress, "_shown", lambda: not progress._hidden.get())
        found = trial(setting, str(tmp_path / "work"))
    assert written(tmp_path) == []
    metrics = finetune(as_options(setting, out=str(tmp_path / "run")), answers=False)
    assert found["validation_loss"] == metrics["kept"]["loss"]
    assert found["unseen_loss"] == metrics["loss"]["unseen"][1]
    assert found["trainable_parameters"] == metrics["trainable_parameters"] and found["steps"] == 3


# -- what it says in the end -------------------------------------------------------------------------------------------


def summed(losses, **options):
    """The summary of a sweep that came to these validation losses; None is a failed trial, a pair has an accuracy."""
    plan, found = SweepOptions(**options), []
    for x in (x if isinstance(x, tuple) else (x,) for x in losses):
        measured = dict(zip(("validation_loss", "validation_accuracy"), x, strict=False))
        found.append({"failed": "why"} if x[0] is None else measured | {"trainable_parameters": 1, "seconds": x[0]})
    return summarise(plan.settings(), found, plan.varied)


def test_means_and_intervals_are_over_seeds_and_the_best_setting_comes_first():
    result = summed([3.0, 4.0, 5.0, 1.0, 2.0, 3.0], r=[1, 4], seed=[0, 1, 2])
    assert [row["varied"] for row in result["settings"]] == [{"r": "4"}, {"r": "1"}]
    assert result["settings"][0]["validation_loss"] == pytest.approx(
        {"mean": 2.0, "low": 0, "high": 4.484, "n": 3},
        abs=1e-3,  # no loss is below 0
    )
    assert result["best"]["lora"]["r"] == 4 and result["best"]["lora"]["try_lr"] is None
    assert [row["seconds"] for row in result["settings"]] == [2, 4]


def test_accuracy_has_a_column_where_data_have_labels():
    result = summed([(3.0, 0.5), (3.0, 0.5), (2.0, 0.2), (2.0, 0.4)], r=[1, 4], seed=[0, 1])
    said = page(result | {"time": {"made": 0}}, 80)
    heading, best, other = said.splitlines()[3:6]
    assert "accuracy" in heading and "50.0 [50.0, 50.0] %" in best and "30.0 [0.0, 100.0] %" in other
    assert "best of LoRA, by accuracy, then validation loss: r 1\n" in said and "accuracy 50.0" in said
    assert "accuracy" not in page(summed([3.0], r=[1]) | {"time": {"made": 0}}, 80)


def test_labels_are_ranked_by_accuracy_and_where_it_is_equal_by_the_loss():
    found = [(3.0, 0.4), (2.0, 0.4), (1.0, 0.1), (9.0, 0.3)]
    result = summed(found, lr=[1e-3, 1e-2, 1e-1, 1.0])
    assert [row["lr"] for row in result["settings"]] == [1e-2, 1e-3, 1.0, 1e-1]
    assert result["best"]["lora"]["lr"] == 1e-2 and result["best"]["lora"]["try_lr"] is None
    assert summed(found, lr=[1e-2, 1e-3, 1e-1, 1.0])["best"]["lora"]["try_lr"] == pytest.approx(3.16e-4, rel=1e-2)


def test_a_setting_of_which_a_seed_failed_is_not_the_best():
    result = summed([3.0, 3.0, 1.0, None], r=[1, 4], seed=[0, 1])
    assert result["best"]["lora"]["r"] == 1 and [one["trial"] for one in result["failed"]] == [3]
    assert summed([None, None], r=[1, 4])["best"] == {"lora": None}


def test_losses_on_different_data_are_not_compared():
    data, losses = ["legal", "finance", "a on b", "gone"], [3.0, 2.5, 2.0, 1.0, 1.5, 9.0, None, None]
    result = summed(losses, data=data, lr=[1e-3, 1e-2])
    named = [(key, best and best["varied"]["data"], best and best["lr"]) for key, best in result["best"].items()]
    assert sorted(named) == [
        ("lora on a on b", "a on b", 1e-3), ("lora on finance", "finance", 1e-2), ("lora on gone", None, None),
        ("lora on legal", "legal", 1e-2),
    ]  # fmt: skip
    assert [row["varied"]["data"] for row in result["settings"]][::2] == ["a on b", "finance", "gone", "legal"]
    said = page(result | {"time": {"made": 0}}, 80)
    assert "by validation loss: data legal, lr 0.01" in said and "LoRA on gone: no trial finished" in said
    assert "Losses on different data cannot be compared" in said and sweep_figure(result) is None
    one = summed([3.0, 2.0], data=["legal"], lr=[1e-3, 1e-2])
    assert set(one["best"]) == {"lora"}
    assert "cannot be compared" not in page(one | {"time": {"made": 0}}, 80)


def test_help_names_every_default_of_finetune():
    tried = {item.name: item for item in flag_fields(SweepOptions)}
    usual = {name: Options.__dataclass_fields__[name].default for name in tried if name in FOUND}
    shown = {name for name in usual if "(default: " in tried[name].metadata["help"]}
    assert {name for name, default in usual.items() if default is not None and default is not False} <= shown
    assert shown.isdisjoint(name for name, default in usual.items() if default is False)  # as in finetune's help
    assert "(default: 0)" in tried["seed"].metadata["help"]


def test_the_best_setting_is_a_command():
    best = summed([3.0, 2.0], r=[1, 4], use_dora=[True], target_modules=["qv"], lr=[3e-3], steps=[60])["best"]["lora"]
    told = "--r 4 --target-modules q_proj v_proj --use-dora --strength 1 --steps 60 --lr 0.003"
    assert best["command"] == f"minilora finetune --base tiny {told}"
    random = summed([3.0], init_lora_weights=[False])["best"]["lora"]["command"]
    assert from_flags(Options, build_parser().parse_args(shlex.split(random)[1:])).init_lora_weights is False


def test_the_command_of_one_seed_names_it_and_that_of_a_mean_over_seeds_names_none():
    def command(losses, **options):
        return summed(losses, lr=[3e-3], **options)["best"]["lora"]["command"]

    usual = "minilora finetune --base tiny --strength 1 --lr 0.003"
    assert command([3.0], seed=[7]) == command([None, 3.0], seed=[1, 7]) == f"{usual} --seed 7"
    assert command([3.0, 2.0], seed=[1, 2]) == command([3.0]) == command([3.0], seed=[0]) == usual


def test_the_page_fits_and_says_what_failed():
    result = summed([3.0, 2.0, None, 4.0], method=["lora", "full"], lr=[1e-3, 1e-2])
    said = page(result | {"time": {"made": 4, "wall_seconds": 130, "jobs": 2}}, 100)
    assert max(map(len, said.splitlines())) <= 100
    assert "best of LoRA, by validation loss: lr 0.01" in said and "best of full fine-tuning" in said
    assert "1 of 4 trials failed" in said and "4 trials in 2.2 minutes, 2 at a time" in said
    assert sum(line.endswith(" 1 failed") for line in said.splitlines()) == 1  # the row of its setting
    many = page(summed([3.0, *[None] * 7], lr=[i / 10 for i in range(1, 9)]) | {"time": {"made": 0}}, 100)
    assert "7 of 8 trials failed" in many and many.count(": why") == 5


@pytest.mark.parametrize(
    ("rates", "losses", "advice"),
    [
        ([1e-4, 1e-2], [3.0, 2.0], 0.0316),  # half a decade beyond, and not as far as the other rate is
        ([1e-4, 1e-2], [2.0, 3.0], 3.16e-5),
        ([1e-3, 1.01e-3, 2e-3], [2.0, 3.0, 3.0], 6.67e-4),  # and not as near
        ([1e-3, 2e-3], [3.0, 2.0], 4e-3),
        ([1e-3, 1e-2, 1e-1], [3.0, 2.0, 1.0], 0.316),
        ([1e-3, 1e-2, 1e-1], [3.0, 1.0, 2.0], None),  # it is not at the edge
        ([1e-3], [3.0], None),
    ],
)
def test_the_advice_is_within_reason(rates, losses, advice):
    assert summed(losses, lr=rates)["best"]["lora"]["try_lr"] == (advice and pytest.approx(advice, rel=1e-2))


def test_what_a_failed_seed_lacks_is_not_counted_as_nothing():
    plan = SweepOptions(seed=[0, 1, 2])
    whole = {"validation_loss": 2.0, "trainable_parameters": 90, "seconds": 6.0}
    (row,) = summarise(plan.settings(), [whole, {"failed": "why"}, whole], plan.varied)["settings"]
    assert (row["trainable_parameters"], row["seconds"], row["failed"]) == (90, 6.0, 1)
    assert row["validation_loss"] == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 2} and row["unseen_loss"] is None


def test_the_page_counts_one_trial_as_one():
    said = page(summed([3.0]) | {"time": {"made": 1, "wall_seconds": 1.5, "jobs": 1}}, 80)
    assert "-- 1 trial --" in said and "1 trial in 1.50 s" in said and "trials" not in said
    assert "without intervals" in said and "[" not in said  # of one seed
    several = page(summed([3.0, 4.0], seed=[0, 1]) | {"time": {"made": 0}}, 80)
    assert "interval over 2 seeds" in several and "3.500 [0.000, 9.853]" in several
    broken = page(summed([None]) | {"time": {"made": 0}}, 80)
    assert "nats per token, of" in said
    preferences = page(summed([3.0], loss=["dpo"]) | {"time": {"made": 0}}, 80)
    assert "nats per token; DPO's are per pair, of one seed" in preferences
    assert "1 of 1 trial failed\n  why" in broken and "LoRA: no trial finished" in broken


def test_a_table_of_many_settings_shows_the_best_ones():
    plan = list(range(1, 31))
    said = page(summed([40.0 - r for r in plan], r=plan) | {"time": {"made": 0}}, 80)
    assert "... and 6 more settings" in said and "  10.000\n" in said and "  33.000\n" in said
    assert "34.000" not in said


def test_a_trial_that_fails_leaves_nothing_either_and_no_trial_writes_checkpoints(monkeypatch, tmp_path):
    def broken(options, **more):
        assert options.save_every > 10**6
        options.folder.with_name("work.partial").mkdir()
        raise ValueError("the loss is nan")

    monkeypatch.setattr(sweeping, "finetune", broken)
    with pytest.raises(ValueError, match="the loss is nan"):
        trial({}, str(tmp_path / "work"))
    assert written(tmp_path) == []


def test_the_folder_is_named_after_the_data_and_the_base():
    assert str(SweepOptions().folder) == "runs/sweep-legal"
    assert str(SweepOptions(data=["support", "legal"], base=["smollm2"]).folder) == "runs/sweep-support-smollm2"
    assert str(SweepOptions(out="here", data=["support"]).folder) == "here"


@pytest.mark.parametrize(("steps", "last"), [(1, [9]), (5, [9]), (10, [9]), (11, [8, 9]), (25, [7, 8, 9])])
def test_the_train_loss_is_the_mean_of_the_last_tenth_of_the_steps(steps, last, monkeypatch, tmp_path):
    losses = ([0.0] * 30 + [float(loss) for loss in range(10)])[-steps:]
    metrics = {"kept": {"loss": 2.0}, "train_loss": losses, "steps": steps, "loss": {"unseen": [4.0, 3.0]}}
    metrics |= {"trainable_parameters": 5, "training_seconds": 1.5}
    monkeypatch.setattr(sweeping, "finetune", lambda options, **more: metrics)
    found = trial({}, str(tmp_path / "work"))
    assert found == {"validation_loss": 2.0, "unseen_loss": 3.0, "train_loss": sum(last) / len(last), "steps": steps,
                     "trainable_parameters": 5, "seconds": 1.5}  # fmt: skip
    for loss in (None, float("nan")):
        metrics["kept"]["loss"] = loss
        with pytest.raises(ValueError, match="no validation gave a finite loss"):
            trial({}, str(tmp_path / "work"))

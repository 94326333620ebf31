"""`--report-to`: what TensorBoard reads is what was trained, and the other libraries are called as they want it."""

import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
from helpers.refusals import refused
from jobs import options, trained

from minilora.train import job
from minilora.train.loop import TrainingError
from minilora.train.reporting import reporter_to
from minilora.train.run_folder import RunFolder

STEPS = {"steps": 4, "batch_size": 2, "grad_accumulation": 2, "eval_every": 2}


def test_tensorboard_reads_the_values_of_every_step_under_the_names_of_the_trainer(home, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'minilora[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = trained(options(home, tmp_path / "run", report_to="tensorboard", **STEPS))
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()

    def curve(name):
        return [(one.step, pytest.approx(one.value, rel=1e-6)) for one in found.Scalars(name)]

    steps = range(1, 5)
    assert curve("train/loss") == list(zip(steps, metrics["train_loss"], strict=True))
    assert curve("train/epoch") == [(step, step * 4 / metrics["records"]["train"]) for step in steps]
    assert curve("eval/loss") == [tuple(each) for each in metrics["validation_loss"]] and len(curve("eval/loss")) == 2
    assert curve("eval/unseen_loss")[-1][0] == 4
    rows = (tmp_path / "run" / "log.csv").read_text(encoding="utf-8").splitlines()[1:]
    logged = [tuple(map(float, row.split(",")[2:4])) for row in rows]
    shown = zip(curve("train/learning_rate"), curve("train/grad_norm"), strict=True)
    assert logged == [(rate, norm) for (_, rate), (_, norm) in shown]
    RunFolder(tmp_path / "run", overwrite=True).refuse()  # no: the folder is the run's own


def test_the_steps_after_the_checkpoint_of_a_resumed_run_are_those_that_were_taken_again(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'minilora[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, losses in ((0, [4.0, 3.0, 2.0, 1.0]), (2, [2.5])):
        report = reporter_to("tensorboard", tmp_path, "run", {}, done)
        for step, loss in enumerate(losses, done + 1):
            report.log({"train/loss": loss}, step=step)
        report.finish()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(1, 4.0), (2, 3.0), (3, 2.5)]


@pytest.fixture(params=["trackio", "wandb"])
def fake(request, monkeypatch):
    """A library that records its calls, instead of trackio or wandb."""
    calls = []

    def init(**given):
        if given["name"] == "no login":
            raise RuntimeError("log in\nfirst")
        calls.append(("init", given))
        return SimpleNamespace(
            log=lambda metrics, step: calls.append((step, metrics)), finish=lambda: calls.append(("finish", {}))
        )

    module = SimpleNamespace(init=init, __spec__=ModuleSpec(request.param, None))
    monkeypatch.setitem(sys.modules, request.param, module)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return request.param, calls


def test_the_run_is_begun_with_its_options_and_finished_also_where_training_breaks_off(fake, home, tmp_path):
    service, calls = fake
    with pytest.raises(TrainingError, match="became nan"):
        trained(options(home, tmp_path / "run", report_to=service, lr=1e30, max_grad_norm=float("inf"), **STEPS))
    (_, begun), *logged, (last, _) = calls
    assert (begun["project"], begun["name"], begun["config"]["r"]) == ("minilora", "run", 2) and last == "finish"
    assert [step for step, _ in logged] == list(range(1, len(logged) + 1)) and logged
    assert logged[0][1].keys() == {"train/loss", "train/grad_norm", "train/learning_rate", "train/epoch"}


def test_the_environment_decides_where_a_report_goes(fake, tmp_path, monkeypatch):
    service, calls = fake
    reporter_to(service, tmp_path, "run", {}, 0)
    monkeypatch.setenv(f"{service.upper()}_PROJECT", "mine")
    monkeypatch.setenv("WANDB_MODE", "online")
    reporter_to(service, tmp_path, "run", {}, 3)
    modes = ["offline", "online"] if service == "wandb" else [None, None]
    assert [given.get("mode") for _, given in calls] == modes  # nothing leaves the machine by default
    assert [(given["project"], given["resume"]) for _, given in calls] == [("minilora", "never"), ("mine", "allow")]


def test_a_missing_library_and_one_that_refuses_are_one_line(fake, home, tmp_path, monkeypatch):
    service, _ = fake
    refused(lambda: reporter_to(service, tmp_path, "no login", {}, 0), service, "log in first")
    monkeypatch.setattr(job, "find_spec", lambda name: None)
    refused(lambda: trained(options(home, tmp_path / "run", report_to=service, **STEPS)), f"pip install {service}")
    assert not list(tmp_path.glob("run*"))

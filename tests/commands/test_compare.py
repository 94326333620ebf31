"""The comparison of LoRA with full fine-tuning: which runs it makes, keeps and finds again, and that they are real."""

import contextlib
import io
import json
import subprocess
from dataclasses import asdict, replace

import pytest
from comparing import Maker
from jobs import options
from modelfiles import TERMS

from minilora.cli import main
from minilora.commands import apart as process
from minilora.commands import compare as job
from minilora.commands.apart import Run, apart
from minilora.commands.compare import COMPARISON_FILE, CompareOptions, compare
from minilora.commands.compare_table import page
from minilora.commands.report import terminal_width
from minilora.train.job import finetune
from minilora.train.options import Options

# Of a method of which several rates are given, the middle one is best, unless a test says otherwise.
LOSSES = {0.001: 3.0, 0.01: 2.5, 0.1: 2.8, 1e-4: 3.1, 1e-3 * 1.5: 2.6, 1e-2 * 2: 2.9}
LORA, FULL = (0.001, 0.01, 0.1), (1e-4, 1.5e-3, 2e-2)


@pytest.fixture
def chosen(home, tmp_path):
    """Options of a comparison on the small base, with three rates for each method."""
    return CompareOptions(
        base=str(home / "base"), data=str(home / "data.jsonl"), out=str(tmp_path / "out"), steps=10, search_steps=4,
        batch_size=4, r=2, lora_lr=LORA, full_lr=FULL,
    )  # fmt: skip


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# -- which runs --------------------------------------------------------------------------------------------------------


def test_each_rate_is_tried_and_the_best_of_each_method_is_run_in_full(chosen):
    maker = Maker(LOSSES)
    result = compare(chosen, runner=maker)
    tries = [("lora", 0.001), ("full", 1e-4), ("lora", 0.01), ("full", 1.5e-3), ("lora", 0.1), ("full", 2e-2)]
    runs = [("lora", 0.01, 10, True), ("full", 1.5e-3, 10, True)]
    assert maker.made == [(method, lr, 4, False) for method, lr in tries] + runs
    assert result["search"]["lora"] == {
        "best": 0.01, "tried": [[0.001, 3.0], [0.01, 2.5], [0.1, 2.8]], "added": [], "at_edge": False
    }  # fmt: skip
    assert result["runs"]["full"]["validation_loss"] == [[5, 2.7], [10, 2.6]]
    assert json.loads((chosen.folder / COMPARISON_FILE).read_text()) == json.loads(json.dumps(result))
    assert len(result["rows"]) == 19 and page(result)


def test_a_best_rate_at_the_edge_is_followed_by_one_step(chosen):
    said = []
    result = compare(chosen, said.append, Maker(LOSSES | {0.1: 2.4, 1.0: 2.7, 1e-4: 2.1, 6.67e-6: 2.0}))
    lora, full = result["search"]["lora"], result["search"]["full"]
    assert (lora["best"], lora["added"], lora["at_edge"]) == (0.1, [1.0], False)
    assert (full["best"], full["added"], full["at_edge"]) == (6.67e-6, [6.67e-6], True)
    assert "LoRA is best at the edge of its grid: 1 is tried, too" in said


def test_a_rate_that_breaks_off_is_not_chosen(chosen):
    result = compare(chosen, runner=Maker(LOSSES | {0.1: None}))
    assert result["search"]["lora"]["tried"][-1] == [0.1, None] and result["search"]["lora"]["best"] == 0.01


def test_a_grid_that_breaks_off_everywhere_ends_the_job_with_a_line(chosen):
    maker = Maker(LOSSES | dict.fromkeys(LORA))
    with pytest.raises(RuntimeError, match=r"LoRA came to no finite loss at any of 0.001, 0.01, 0.1: .*--lora-lr"):
        compare(chosen, runner=maker)
    assert not any(measure for *_, measure in maker.made)


def test_a_long_run_that_breaks_off_ends_the_job_with_a_line(chosen):
    alone = replace(chosen, lora_lr=(0.01,), full_lr=(1e-4,))
    with pytest.raises(
        RuntimeError, match="full fine-tuning, learning rate 0.0001, 10 steps: the loss is nan.*--full-lr"
    ):
        compare(alone, runner=Maker({0.01: 2.5, 1e-4: None}))


def test_of_one_rate_nothing_is_tried(chosen):
    maker = Maker(LOSSES)
    result = compare(replace(chosen, lora_lr=(0.01,)), runner=maker)
    assert [made for made in maker.made if made[0] == "lora"] == [("lora", 0.01, 10, True)]
    assert result["search"]["lora"] == {"best": 0.01, "tried": [], "added": [], "at_edge": False}


def test_runs_have_the_options_asked_for(chosen):
    seen = {}

    def see(run):
        seen[run.options.method] = run.options
        return Maker(LOSSES)(run)

    compare(replace(chosen, seed=3, lora_alpha=5.0, max_length=99, eval_records=7), runner=see)
    lora, full = seen["lora"], seen["full"]
    assert (lora.eval_every, full.eval_every) == (2, 2)  # five of at most six validations, the last at the end
    assert (lora.r, lora.lora_alpha, lora.lr, lora.steps, lora.out) == (2, 5.0, 0.01, 10, f"{chosen.folder}/lora-0.01")
    assert lora.strength == 1  # beside full fine-tuning, of which nothing is left out either
    for each in (lora, full):
        assert (each.base, each.data, each.batch_size) == (chosen.base, chosen.data, 4)
        assert (each.seed, each.max_length, each.eval_records) == (3, 99, 7)


def test_columns_may_have_other_names(chosen, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(json.dumps({"q" if k == "question" else k: v for k, v in t.items()}) for t in TERMS))
    renamed = replace(chosen, data=str(data), field={"question": "q"}, lora_lr=(0.01,), full_lr=(1e-4,))
    seen = []
    compare(renamed, runner=lambda run: (seen.append(run.options.field), Maker(LOSSES)(run))[1])
    assert seen == [{"question": "q"}] * 2


def test_it_says_which_run_comes_next_and_how_long_all_will_take(chosen, monkeypatch):
    clock = iter(range(0, 100_000, 60))  # every run takes a minute
    monkeypatch.setattr(job.time, "perf_counter", lambda: next(clock))
    said = []
    result = compare(chosen, said.append, Maker(LOSSES))
    assert said[:2] == [
        "run 1 of 8: LoRA, learning rate 0.001, 4 steps",
        "run 2 of 8: full fine-tuning, learning rate 0.0001, 4 steps",
    ]
    # 15 s a step: 4 steps now, three more tries and 2 runs of 10 steps ahead
    assert said[2] == "run 3 of 8: LoRA, learning rate 0.01, 4 steps; all of it will be done in about 9 min"
    assert said[-1].startswith("run 8 of 8") and result["wall_seconds"] == 8 * 60


# -- kept, and found again ---------------------------------------------------------------------------------------------


def test_a_finished_comparison_is_not_made_again(chosen):
    first, again = compare(chosen, runner=Maker(LOSSES)), Maker({})
    dearer = compare(replace(chosen, price=2 * chosen.price), runner=again)
    assert again.made == [] and dearer["runs"] == first["runs"] and dearer["search"] == first["search"]
    money = [next(row["lora"] for row in each["rows"] if row["claim"] == "cheap") for each in (first, dearer)]
    assert money[1] == pytest.approx(2 * money[0])


@pytest.mark.parametrize("done", [0, 3, 7])
def test_after_an_interruption_the_same_command_goes_on_from_there(chosen, done):
    said, maker = [], Maker(LOSSES, interrupted_at=done)
    with pytest.raises(KeyboardInterrupt):
        compare(chosen, said.append, maker)
    assert said[-1] == f"\nfinished runs are kept in {chosen.folder}: the same command goes on from there"
    rest = Maker(LOSSES)
    compare(chosen, runner=rest)
    whole = Maker(LOSSES)
    compare(replace(chosen, out=chosen.out + "-whole"), runner=whole)
    assert maker.made + rest.made == whole.made


def test_of_tries_the_weights_are_not_kept(chosen):
    compare(chosen, runner=Maker(LOSSES))
    assert [path for path in (chosen.folder / "search").iterdir() if path.is_dir()] == []
    assert (chosen.folder / "lora-0.01").is_dir() and (chosen.folder / "full-0.0015").is_dir()


@pytest.mark.parametrize(
    ("change", "named", "made_again"),
    [
        ({"steps": 12, "search_steps": 4}, "steps 10, now 12", {("lora", True), ("full", True)}),
        ({"search_steps": 5}, "eval_every 4, now 5, steps 4, now 5", {("lora", False), ("full", False)}),
        ({"seed": 1}, "seed 0, now 1", {(method, each) for method in ("lora", "full") for each in (True, False)}),
        ({"lora_alpha": 8.0, "r": 4}, "lora_alpha 16.0, now 8.0, r 2, now 4", {("lora", True), ("lora", False)}),
    ],
)
def test_runs_with_other_settings_are_refused_and_with_overwrite_made_again(chosen, change, named, made_again):
    compare(chosen, runner=Maker(LOSSES))
    before, again = written(chosen.folder), Maker(LOSSES)
    with pytest.raises(ValueError, match=rf"\({named}\): choose another --out, or --overwrite"):
        compare(replace(chosen, **change), runner=again)
    assert again.made == [] and written(chosen.folder) == before
    compare(replace(chosen, overwrite=True, **change), runner=again)
    assert {(method, measure) for method, _, _, measure in again.made} == made_again


def test_a_wider_grid_keeps_what_was_tried(chosen):
    compare(chosen, runner=Maker(LOSSES))
    more = Maker(LOSSES | {0.03: 2.4})
    compare(replace(chosen, lora_lr=(*LORA, 0.03)), runner=more)
    assert more.made == [("lora", 0.03, 4, False), ("lora", 0.03, 10, True)]


def test_other_data_or_another_base_under_the_same_name_are_other_settings(chosen, tmp_path, home):
    data, base = tmp_path / "mine.jsonl", tmp_path / "base"
    data.write_text("\n".join(map(json.dumps, TERMS)))
    base.mkdir()
    (base / "weights").write_bytes(b"1")
    moved = replace(chosen, data=str(data), base=str(base))
    compare(moved, runner=Maker(LOSSES))
    data.write_text("\n".join(map(json.dumps, TERMS[1:])))
    (base / "weights").write_bytes(b"2")
    with pytest.raises(ValueError, match=r"\(base_sha256 \w{8}\.\.\., now \w{8}\.\.\., data_sha256 \w{8}\.\.\., now"):
        compare(moved, runner=Maker(LOSSES))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_lr": (0.0, 1.0)}, "lora_lr must be positive"),
        ({"full_lr": ()}, "full_lr must be positive numbers, got none"),
        ({"price": -1.0}, "price must be"),
        ({"price": float("nan")}, "price must be"),
        ({"search_steps": 0}, "search_steps must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"r": 0}, "r must be"),
    ],
)
def test_options_that_mean_nothing_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        CompareOptions(**change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": "novel.txt"}, "novel.txt has nothing for validation; learning rates are chosen on it"),
        ({"data": "nothing.jsonl"}, "no such data file"),
        ({"base": "nowhere"}, "nowhere: no such model"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(chosen, home, change, reason):
    change = {key: str(home / value) for key, value in change.items()}
    maker = Maker(LOSSES)
    with pytest.raises(ValueError, match=reason):
        compare(replace(chosen, **change), runner=maker)
    assert maker.made == [] and not chosen.folder.exists()


def test_the_folder_of_another_run_is_refused(chosen):
    chosen.folder.mkdir()
    (chosen.folder / "metrics.json").touch()
    with pytest.raises(ValueError, match="out holds a run of minilora finetune: choose another --out"):
        compare(chosen, runner=Maker(LOSSES))
    assert written(chosen.folder) == ["metrics.json"]


def test_the_default_folder_names_data_and_another_base():
    assert str(CompareOptions(data="x/mine.jsonl").folder) == "runs/compare-mine"
    assert str(CompareOptions(base="tiny").folder) == "runs/compare-legal-tiny"
    assert str(CompareOptions(base="models/SmolLM2-1.7B").folder) == "runs/compare-legal-SmolLM2-1.7B"


# -- real runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """(folder, what the command printed) of a small comparison from the command line, in processes of its own."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    words = ["--base", home / "base", "--data", home / "data.jsonl", "--out", folder, "--steps", 4, "--r", 2]
    words += ["--batch-size", 4, "--search-steps", 2, "--lora-lr", 1e-2, 2e-2, "--full-lr", 1e-3]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["compare", *map(str, words)]) == 0
    return folder, out.getvalue(), [str(word) for word in words]


def test_the_command_prints_the_table_and_leaves_picture_numbers_and_the_two_runs(finished):
    folder, out, _ = finished
    result = json.loads((folder / COMPARISON_FILE).read_text())
    assert out == page(result, terminal_width()) + "\n"
    for name in ("picture.png", "picture-dark.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    best = f"lora-{result['search']['lora']['best']:g}"
    assert (folder / best / "adapter_model.safetensors").is_file()
    assert (folder / "full-0.001" / "model.safetensors").is_file()
    assert {row["verdict"] for row in result["rows"]} <= {"held", "in part", "did not hold"}
    memory = result["runs"]["full"]["peak_memory_bytes"]
    assert result["peak_bytes"]["full"] == memory["measured"]  # there was no try
    assert memory["activations"] > 0 and memory["by_owner"]["moments"] == 8 * result["runs"]["full"]["total_parameters"]


def test_a_run_apart_gives_the_numbers_of_the_same_run_here(finished, tmp_path):
    folder, *_ = finished
    record = json.loads((folder / "full-0.001.json").read_text())
    settings = {key: value for key, value in record["settings"].items() if key in Options.__dataclass_fields__}
    here = finetune(Options(**settings | {"out": str(tmp_path / "x")}))
    for name in ("train_loss", "validation_loss", "loss", "keyword_recall", "answers", "base_sha256"):
        assert json.loads(json.dumps(here[name])) == record["metrics"][name]


def test_the_same_command_shows_the_same_again_and_json_gives_the_numbers(finished, capsys, monkeypatch):
    folder, out, words = finished
    monkeypatch.setattr(job, "apart", lambda run: pytest.fail("a finished run was made again"))
    assert main(["compare", *words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((folder / COMPARISON_FILE).read_text()) and page(shown)[:2000] == out[:2000]


def test_a_run_that_breaks_off_says_so_and_one_that_cannot_be_made_says_why(home, tmp_path, capsys, monkeypatch):
    def answer(**change):
        status = process.main(
            json.dumps(asdict(Run(options(home, tmp_path / "x", overwrite=True, **change), measure=False)))
        )
        return status, json.loads(capsys.readouterr().out)

    status, found = answer(lr=1e30)
    assert status == 0 and "at step" in found["failed"]
    status, found = answer(target_modules=["nonsense"])
    assert status == 1 and "nonsense" in found["error"]
    monkeypatch.setattr(process, "finetune", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert process.main(json.dumps(asdict(Run(Options(), measure=False)))) == 130


class Process:
    """What `subprocess.Popen` makes, for a run that ends as told."""

    def __init__(self, out, returncode, *, error=None, deaf=False):
        self.out, self.returncode, self.error, self.deaf, self.ended = out, returncode, error, deaf, False

    def __call__(self, command, **settings):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def communicate(self):
        if self.error:
            raise self.error
        return self.out, None

    def wait(self, timeout):
        if self.deaf:
            raise subprocess.TimeoutExpired("run", timeout)

    def terminate(self):
        self.ended = True


RUN = Run(Options(lr=0.5, steps=7), measure=True)


def test_a_run_without_a_result_is_an_error_with_its_reason(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Process('{"error": "no room"}', 1))
    with pytest.raises(RuntimeError, match="LoRA, learning rate 0.5, 7 steps: no room"):
        apart(RUN)
    monkeypatch.setattr(subprocess, "Popen", Process("", -9))
    with pytest.raises(RuntimeError, match="its process ended with status -9; is there memory enough"):
        apart(RUN)


@pytest.mark.parametrize("deaf", [False, True])
def test_ctrl_c_ends_the_run_too(deaf, monkeypatch):
    running = Process("", None, error=KeyboardInterrupt(), deaf=deaf)
    monkeypatch.setattr(subprocess, "Popen", running)
    with pytest.raises(KeyboardInterrupt):
        apart(RUN)
    assert running.ended
    monkeypatch.setattr(subprocess, "Popen", Process("", 130))  # only the run has heard it
    with pytest.raises(KeyboardInterrupt):
        apart(RUN)

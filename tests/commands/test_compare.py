"""The comparison of LoRA with full fine-tuning: which runs it makes, keeps and finds again, and that they are real."""

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
from comparing import Maker
from modelfiles import TERMS

from minilora.cli import main
from minilora.commands import compare as job
from minilora.commands.compare import COMPARISON_FILE, CompareOptions, compare, train
from minilora.commands.compare_table import page
from minilora.pages.text import terminal_width
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


@pytest.fixture
def make(monkeypatch):
    """Let runs be made at once, with these losses."""

    def made_with(losses=LOSSES, **change):
        maker = Maker(losses, **change)
        monkeypatch.setattr(job, "apart", maker)
        return maker

    return made_with


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# -- which runs --------------------------------------------------------------------------------------------------------


def test_each_rate_is_tried_and_the_best_of_each_method_is_run_in_full(chosen, make):
    maker = make()
    result = compare(chosen)
    tries = [("lora", 0.001), ("full", 1e-4), ("lora", 0.01), ("full", 1.5e-3), ("lora", 0.1), ("full", 2e-2)]
    runs = [("lora", 0.01, 10, True), ("full", 1.5e-3, 10, True)]
    assert maker.made == [(method, lr, 4, False) for method, lr in tries] + runs
    assert [lines for _, lines in maker.given] == [True] + [False] * 7  # warnings about the data are logged once
    assert result["search"]["lora"] == {
        "best": 0.01, "tried": [[0.001, 3.0], [0.01, 2.5], [0.1, 2.8]], "added": [], "at_edge": False
    }  # fmt: skip
    assert result["runs"]["full"]["validation_loss"] == [[5, 2.7], [10, 2.6]]
    assert json.loads((chosen.folder / COMPARISON_FILE).read_text()) == json.loads(json.dumps(result))
    assert [options["eval_every"] for options, _ in maker.given] == [4] * 6 + [2] * 2  # a try validates at its end
    assert result["peak_bytes"] == {"lora": 10**9 - 1, "full": 10**9 - 2}  # of the tries, which only train
    assert len(result["rows"]) == 19 and page(result)
    assert [path for path in (chosen.folder / "search").iterdir() if path.is_dir()] == []  # of tries no weights stay
    assert (chosen.folder / "lora-0.01").is_dir() and (chosen.folder / "full-0.0015").is_dir()


def test_a_best_rate_at_the_edge_is_followed_by_one_step(chosen, make, caplog):
    maker = make(LOSSES | {0.1: 2.4, 1.0: 2.7, 1e-4: 2.1, 6.67e-6: 2.0})
    with caplog.at_level("INFO", "minilora"):
        result = compare(chosen)
    lora, full = result["search"]["lora"], result["search"]["full"]
    assert (lora["best"], lora["added"], lora["at_edge"]) == (0.1, [1.0], False)
    assert (full["best"], full["added"], full["at_edge"]) == (6.67e-6, [6.67e-6], True)
    assert "LoRA: the best learning rate is at the edge of the grid: trying 1 as well" in caplog.messages
    assert caplog.messages[-1].startswith("run 10 of 10: full fine-tuning") and len(maker.made) == 10


def test_a_rate_at_which_training_diverges_is_not_chosen(chosen, make):
    make(LOSSES | {0.1: None})
    found = compare(chosen)["search"]["lora"]
    assert found["tried"][-1] == [0.1, None] and found["best"] == 0.01


def test_a_grid_that_diverges_everywhere_ends_the_job_with_a_line(chosen, make):
    maker = make(LOSSES | dict.fromkeys(LORA))
    with pytest.raises(RuntimeError, match=r"LoRA diverges at each of 0.001, 0.01 and 0.1: .*--lora-lr"):
        compare(chosen)
    assert not any(measure for *_, measure in maker.made)


def test_a_long_run_that_diverges_ends_the_job_with_a_line(chosen, make):
    make({0.01: 2.5, 1e-4: None})
    with pytest.raises(RuntimeError, match="learning rate 0.0001, 10 steps: the loss is nan.*--full-lr"):
        compare(replace(chosen, lora_lr=(0.01,), full_lr=(1e-4,)))


def test_of_one_rate_nothing_is_tried(chosen, make):
    maker = make()
    result = compare(replace(chosen, lora_lr=(0.01,)))
    assert [made for made in maker.made if made[0] == "lora"] == [("lora", 0.01, 10, True)]
    assert result["search"]["lora"] == {"best": 0.01, "tried": [], "added": [], "at_edge": False}
    assert "Learning rate of LoRA: 0.01, as given." in page(result)


def test_the_rates_tried_are_around_the_default_of_the_base_unless_they_are_given(chosen, make, monkeypatch):
    monkeypatch.setattr(job, "rate_of", {chosen.base: 3e-4}.__getitem__)
    maker = make(dict.fromkeys((9e-5, 3e-4, 9e-4, 9e-6, 3e-5, 1e-2), 3.0) | {3e-4: 2.0, 3e-5: 2.0})
    compare(replace(chosen, lora_lr=None, full_lr=None))
    tries = [("lora", 9e-5), ("full", 9e-6), ("lora", 3e-4), ("full", 3e-5), ("lora", 9e-4), ("full", 9e-5)]
    assert [(method, lr) for method, lr, _, measured in maker.made if not measured] == tries
    assert replace(chosen, full_lr=None).rates("lora") == [*LORA]


def test_runs_have_the_options_asked_for(chosen, make, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(json.dumps({"q" if k == "question" else k: v for k, v in t.items()}) for t in TERMS))
    maker = make()
    asked = {"seed": 3, "max_length": 99, "eval_records": 7, "data": str(data), "field": {"question": "q"}}
    compare(replace(chosen, lora_alpha=5.0, **asked))
    lora, full = (options for options, _ in maker.given[-2:])
    for each in (lora, full):
        expected = asked | {"base": chosen.base, "batch_size": 4, "eval_every": 2, "steps": 10}
        assert {name: each[name] for name in expected} == expected
    data.write_text("\n".join(json.dumps({"text": f"note {i}", "queue": "ab"[i % 2]}) for i in range(20)))
    compare(replace(chosen, data=str(data), label="queue", overwrite=True))
    assert [options["label"] for options, _ in maker.given[-2:]] == ["queue", "queue"]
    expected = {"r": 2, "lora_alpha": 5.0, "lr": 0.01, "out": f"{chosen.folder}/lora-0.01", "strength": 1.0}
    assert {name: lora[name] for name in expected} == expected  # strength: full fine-tuning keeps its whole update, too


def test_each_run_is_logged(chosen, make, monkeypatch, caplog):
    clock = iter(range(0, 100_000, 60))  # every run takes a minute
    monkeypatch.setattr("minilora.experiments.memo.time.perf_counter", lambda: next(clock))
    make()
    with caplog.at_level("INFO", "minilora"):
        result = compare(chosen)
    assert caplog.messages[:2] == [
        "run 1 of 8: LoRA, learning rate 0.001, 4 steps",
        "run 2 of 8: full fine-tuning, learning rate 0.0001, 4 steps",
    ]
    assert caplog.messages[-1].startswith("run 8 of 8") and result["wall_seconds"] == 8 * 60


# -- kept, and found again ---------------------------------------------------------------------------------------------


def test_a_finished_comparison_is_not_made_again(chosen, make):
    make()
    first, again = compare(chosen), make({})
    dearer = compare(replace(chosen, price=2 * chosen.price))
    assert again.made == [] and dearer["runs"] == first["runs"] and dearer["search"] == first["search"]
    money = [next(row["lora"] for row in each["rows"] if row["claim"] == "cheap") for each in (first, dearer)]
    assert money[1] == pytest.approx(2 * money[0])


@pytest.mark.parametrize("done", [0, 3, 7])
def test_after_an_interruption_the_same_command_continues_from_there(chosen, make, done, caplog):
    maker = make(interrupted_at=done)
    with pytest.raises(KeyboardInterrupt), caplog.at_level("INFO", "minilora"):
        compare(chosen)
    told = f"finished runs are kept in {chosen.folder}: the same command continues from there"
    assert caplog.messages[-1] == told
    rest = make()
    compare(chosen)
    whole = make()
    compare(replace(chosen, out=chosen.out + "-whole"))
    assert maker.made + rest.made == whole.made


@pytest.mark.parametrize(
    ("change", "named", "made_again"),
    [
        ({"steps": 12, "search_steps": 4}, "steps 10, now 12", {("lora", True), ("full", True)}),
        ({"search_steps": 5}, "steps 4, now 5", {("lora", False), ("full", False)}),
        ({"seed": 1}, "seed 0, now 1", {(method, each) for method in ("lora", "full") for each in (True, False)}),
        ({"lora_alpha": 8.0, "r": 4}, "r 2, now 4; lora_alpha 16.0, now 8.0", {("lora", True), ("lora", False)}),
    ],
    ids=["steps", "search", "seed", "rank"],
)
def test_runs_with_other_settings_are_refused_and_with_overwrite_made_again(chosen, make, change, named, made_again):
    make()
    compare(chosen)
    before, again = written(chosen.folder), make()
    with pytest.raises(ValueError, match=rf"other settings: .*{named}.*choose another --out, or --overwrite"):
        compare(replace(chosen, **change))
    assert again.made == [] and written(chosen.folder) == before
    compare(replace(chosen, overwrite=True, **change))
    assert {(method, measure) for method, _, _, measure in again.made} == made_again


def test_a_wider_grid_keeps_what_was_tried(chosen, make):
    make()
    compare(chosen)
    more = make(LOSSES | {0.03: 2.4})
    compare(replace(chosen, lora_lr=(*LORA, 0.03)))
    assert more.made == [("lora", 0.03, 4, False), ("lora", 0.03, 10, True)]


def test_other_data_or_another_base_under_the_same_name_are_other_settings(chosen, make, tmp_path):
    data, base = tmp_path / "mine.jsonl", tmp_path / "base"
    data.write_text("\n".join(map(json.dumps, TERMS)))
    base.mkdir()
    (base / "weights").write_bytes(b"1")
    moved = replace(chosen, data=str(data), base=str(base))
    make()
    compare(moved)
    data.write_text("\n".join(map(json.dumps, TERMS[1:])))
    (base / "weights").write_bytes(b"2")
    with pytest.raises(ValueError, match=r"base_sha256 \w{16}, now \w{16}; data_sha256 \w{16}, now \w{16}"):
        compare(moved)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_lr": (0.0, 1.0)}, "lora_lr must be positive"),
        ({"full_lr": ()}, "full_lr must be positive numbers, got none"),
        ({"price": float("nan")}, "price must be"),
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
def test_what_cannot_be_compared_is_refused_before_anything_runs(chosen, home, make, change, reason):
    change = {key: str(home / value) for key, value in change.items()}
    maker = make(LOSSES)
    with pytest.raises(ValueError, match=reason):
        compare(replace(chosen, **change))
    assert maker.made == [] and not chosen.folder.exists()


def test_the_folder_of_another_run_is_refused(chosen, make):
    chosen.folder.mkdir()
    (chosen.folder / "metrics.json").touch()
    with pytest.raises(ValueError, match="out holds a run of minilora finetune: choose another --out"):
        compare(chosen)
    assert written(chosen.folder) == ["metrics.json"]


def test_the_default_folder_names_data_and_another_base():
    assert str(CompareOptions(data="x/mine.jsonl").folder) == "runs/compare-mine"
    assert str(CompareOptions(base="tiny").folder) == "runs/compare-legal-tiny"
    assert str(CompareOptions(base="models/SmolLM2-1.7B").folder) == "runs/compare-legal-SmolLM2-1.7B"


def test_the_same_command_shows_the_same_again_and_json_gives_the_numbers(chosen, make, quick_pictures, capsys):
    maker, shown = make(), []
    words = ["--base", chosen.base, "--data", chosen.data, "--out", chosen.out, "--lora-lr", ".01", "--full-lr", "1e-4"]
    for more in ([], [], ["--json"]):
        assert main(["compare", *words, *more]) == 0
        shown.append(capsys.readouterr().out)
    result = json.loads((chosen.folder / COMPARISON_FILE).read_text())
    assert shown[0] == shown[1] == page(result, terminal_width()) + "\n" and json.loads(shown[2]) == result
    assert [(method, lr) for method, lr, *_ in maker.made] == [("lora", 0.01), ("full", 1e-4)]


# -- real runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """The folder of a small comparison from the command line, in processes of its own."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    words = ["--base", home / "base", "--data", home / "data.jsonl", "--out", folder, "--steps", 4, "--r", 2]
    words += ["--batch-size", 4, "--lora-lr", 1e-2, "--full-lr", 1e-3, "--eval-records", 2]
    assert main(["compare", *map(str, words)]) == 0
    return folder


@pytest.mark.long
def test_the_command_leaves_numbers_and_the_two_runs(finished):
    result = json.loads((finished / COMPARISON_FILE).read_text())
    assert (finished / "lora-0.01" / "adapter_model.safetensors").is_file()
    assert (finished / "full-0.001" / "model.safetensors").is_file()
    memory = result["runs"]["full"]["peak_memory_bytes"]
    assert result["peak_bytes"]["full"] == memory["measured"]  # there was no try
    assert memory["activations"] > 0 and memory["by_owner"]["moments"] == 8 * result["runs"]["full"]["total_parameters"]


@pytest.mark.long
def test_a_run_in_its_own_process_gives_the_numbers_of_the_same_run_here(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.train.job.run_picture", lambda metrics, path: path.touch())
    record = json.loads((finished / "full-0.001.json").read_text())
    settings = {key: value for key, value in record["decides"].items() if key in Options.__dataclass_fields__}
    here = finetune(Options(**settings | {"out": str(tmp_path / "x")}))
    for name in ("train_loss", "validation_loss", "loss", "keyword_recall", "answers", "base_sha256"):
        assert json.loads(json.dumps(here[name])) == record["result"][name]


def test_training_that_diverges_is_a_result_and_other_failures_name_the_run(chosen, tmp_path, monkeypatch):
    given = {"base": chosen.base, "data": chosen.data, "steps": 3, "batch_size": 4, "out": str(tmp_path / "x")}
    assert "at step" in train(given | {"lr": 1e30}, False, True)["failed"]
    nan = float("nan")
    found = {"validation_loss": [(2, 3.0), (4, nan)]}  # the last step went wrong
    with monkeypatch.context() as patch:
        patch.setattr(job, "finetune", lambda *arguments: found)
        assert train(given, True, True)["validation_loss"] == [[2, 3.0]]
        found["validation_loss"] = [(4, nan)]
        assert train(given, True, True) == {"failed": "no validation gave a finite loss"}

    for error in (RuntimeError("no room"), MemoryError("no room"), MemoryError()):
        monkeypatch.setattr(job, "apart", Mock(side_effect=error))
        said = f"LoRA, learning rate 0.001, 4 steps{': no room' * bool(str(error))}$"
        with pytest.raises(type(error), match=said):
            compare(chosen)

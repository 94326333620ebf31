"""The benchmarks: fair turns, complete results, failures in one line. No timing ever decides a test."""

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks import contenders, peers, targets
from figure_check import problems
from modelfiles import CONFIG

from minilora.cli import main
from minilora.commands import growth
from minilora.engine import bfloat16
from minilora.engine.backend import is_packed
from minilora.lora.adapters import add_adapter
from minilora.lora.config import LoraConfig
from minilora.measure import bench
from minilora.measure.counts import ParameterCounts, count_parameters
from minilora.measure.predict import SHAPES, Memory, Step, base_parameters
from minilora.measure.process import Job, peak_memory
from minilora.measure.turns import BenchError, Contender, serve, take_turns
from minilora.nn.llama import Llama
from minilora.pages.style import theme

PACKED = ["quantized", "quantized-recompute", "quantized-bf16", "load-quantized"]
CAN = [name for name, mode in bench.MODES.items() if not mode.bf16 or bfloat16.why_not() is None]  # on this machine
TINY = replace(CONFIG, max_position_embeddings=bench.PROMPT + bench.NEW)
measures_memory = pytest.mark.skipif(peak_memory() is None, reason="this system does not tell a process's peak memory")

# -- turns -------------------------------------------------------------------------------------------------------------

ANSWER = """print('{"ready": true}', flush=True)
for _ in sys.stdin: print('{"seconds": 2, "peak_bytes": 3}', flush=True)"""


def saying(name, code):
    """A contender that is a line of Python."""
    return Contender(name, [sys.executable, "-c", f"import os, sys\n{code}"])


def served(monkeypatch, setup, turns=0):
    """The exit status of `serve`, and what it answers to so many turns."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n" * turns))
    monkeypatch.setattr(sys, "stdout", out)
    return serve(setup), [json.loads(line) for line in out.getvalue().splitlines()]


def test_all_take_turns_after_all_are_ready():
    order = []
    results = take_turns([saying("a", ANSWER), saying("b", ANSWER)], rounds=2, done=order.append, pause=0)
    assert order == ["a", "b"] * 3
    assert [(name, m.seconds, m.median, m.peak_bytes) for name, m in results.items()] == [
        ("a", [2, 2], 2, 3),
        ("b", [2, 2], 2, 3),
    ]


@measures_memory
def test_a_contender_warms_up_once_and_answers_each_turn(monkeypatch):
    calls = []
    status, answers = served(monkeypatch, lambda: lambda: calls.append(1), turns=2)
    assert (status, len(calls), answers[0]) == (0, 3, {"ready": True})
    assert len(answers) == 3 and all(turn["seconds"] > 0 and turn["peak_bytes"] > 0 for turn in answers[1:])


def test_a_step_may_time_itself(monkeypatch):
    assert served(monkeypatch, lambda: lambda: 0.25, turns=1)[1][1]["seconds"] == 0.25


def test_what_a_contender_prints_disturbs_no_answer(monkeypatch, capfd):
    assert served(monkeypatch, lambda: lambda: print("hello"), turns=1)[1][0] == {"ready": True}
    assert capfd.readouterr().err == "hello\n" * 2


def test_a_contender_that_cannot_go_on_says_why(monkeypatch):
    def setup():
        raise ValueError("no such model")

    assert served(monkeypatch, setup) == (1, [{"error": "no such model"}])


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ('print(\'{"error": "no such model"}\')', "no such model"),
        ("sys.exit('out of ideas')", "ended with status 1: out of ideas"),
        ("print('{\"ready\": true}', flush=True); os._exit(3)", "ended with status 3"),
        pytest.param(
            "os.kill(os.getpid(), 9)",
            "ended by SIGKILL (was there enough memory?)",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="signals"),
        ),
    ],
)
def test_a_failing_contender_is_named_with_its_reason(code, reason):
    with pytest.raises(BenchError) as failure:
        take_turns([saying("a", code)], rounds=1, pause=0)
    assert str(failure.value) == f"a: {reason}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process id is looked up as Unix does")
def test_no_contender_outlives_the_failure_of_another(tmp_path):
    place = tmp_path / "pid"
    first = saying("first", f"open({str(place)!r}, 'w').write(str(os.getpid()))\n{ANSWER}")
    with pytest.raises(BenchError):
        take_turns([first, saying("second", "sys.exit(1)")], rounds=1, pause=0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny model with random weights, in 4 and 8 bits."""
    return bench.write_random(tmp_path_factory.mktemp("bench") / "tiny.gguf", TINY)


@pytest.fixture(scope="module")
def result(file):
    """Every mode, measured once."""
    return bench.measure(bench.Settings(str(file), batch_size=2, length=8, r=2), rounds=1)


def test_every_mode_has_its_numbers(result):
    assert list(result["modes"]) == CAN
    for name, row in result["modes"].items():
        group = bench.MODES[name].group
        given = {key for key, value in row.items() if value is not None}
        expected = {"seconds", "fastest"}
        expected |= {"peak_memory_bytes"} if group != "import" else set()
        expected |= {"ratio_to_floor"} if group == "training" else set()
        expected |= {"tokens_per_second"} if group in ("training", "generation") else set()
        assert given == expected and all(row[key] > 0 for key in given), name


def test_rates_follow_from_the_seconds(result):
    modes = result["modes"]
    assert modes["lora"]["tokens_per_second"] == pytest.approx(16 / modes["lora"]["seconds"])
    assert modes["generate-8"]["tokens_per_second"] == pytest.approx(8 * bench.NEW / modes["generate-8"]["seconds"])
    assert modes["full"]["ratio_to_floor"] == pytest.approx(modes["full"]["seconds"] / modes["floor"]["seconds"])


def test_a_result_says_where_when_and_with_what(result):
    assert result["machine"]["cores"] >= 1 and result["machine"]["processor"]
    assert {"minilora", "python", "numpy", "blas"} <= set(result["versions"])
    assert result["settings"]["batch_size"] == 2 and result["created"].startswith("20")


def test_the_table_has_a_line_for_each_mode(result):
    lines = bench.table(result).splitlines()
    assert [name for name in CAN if not any(line.startswith(f"{name} ") for line in lines)] == []


def test_a_folder_runs_what_needs_no_packed_matrices_and_the_rest_is_named(tiny_folder):
    settings = bench.Settings(str(tiny_folder / "base"), batch_size=1, length=8)
    reasons = bench.impossible(list(bench.MODES), settings)
    assert [mode for mode in bench.MODES if "packed" in reasons.get(mode, "")] == [m for m in PACKED if m in CAN]
    result = bench.measure(settings, ["quantized", "import", "load-quantized"], rounds=1)
    assert list(result["modes"]) == ["import"] and list(result["left_out"]) == ["quantized", "load-quantized"]
    line = f"left out: quantized, load-quantized: {tiny_folder / 'base'} holds no packed matrices"
    assert line in " ".join(bench.table(result).splitlines())


def test_a_packed_file_runs_every_mode(file, result):
    assert list(bench.impossible(list(bench.MODES), bench.Settings(str(file)))) == [
        m for m in bench.MODES if m not in CAN
    ]
    assert list(result["modes"]) == CAN and ("left out" in bench.table(result)) == (len(CAN) < len(bench.MODES))


def test_what_needs_bfloat16_is_left_out_where_there_is_none(file, monkeypatch):
    monkeypatch.setattr(bfloat16, "why_not", lambda: "no such thing here")
    reasons = bench.impossible(list(bench.MODES), bench.Settings(str(file)))
    assert set(reasons) == {name for name in bench.MODES if "bf16" in name}
    assert set(reasons.values()) == {"no such thing here"}
    with pytest.raises(ValueError, match="no such thing here, which bf16 needs"):
        bench.impossible(["bf16"])


def test_both_ways_of_a_step_train_alike(file):
    """`loss_and_grad` in micro-batches, and `loss` and `backward()` of the whole batch."""
    trained = {}
    for whole in (False, True):
        model = Llama(TINY, 0)
        add_adapter(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
        step = bench._training(model, bench.Settings(str(file), batch_size=8, length=40), whole)
        step(), step()
        trained[whole] = {name: p.data for name, p in model.trainable_parameters().items()}
    for name, one in trained[False].items():
        np.testing.assert_allclose(one, trained[True][name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("mode", "packed", "recomputes"),
    [
        ("lora", False, False),
        ("lora-backward", False, False),
        ("quantized", True, False),
        ("recompute", False, True),
        ("quantized-recompute", True, True),
        ("full", False, False),
    ],
)
def test_a_mode_trains_the_model_it_names(file, monkeypatch, mode, packed, recomputes):
    seen = []
    monkeypatch.setattr(bench, "_training", lambda model, settings, whole=False: seen.append((model, whole)))
    bench.MODES[mode].setup(bench.Settings(str(file), r=2))
    ((model, whole),) = seen
    counts = count_parameters(model)
    assert model.model.recompute is recomputes and whole is (mode == "lora-backward")
    assert is_packed(model.model.layers[0].self_attn.q_proj.weight.data) is packed
    adapter = 2 * sum(sum(shape(TINY)) for shape in SHAPES.values()) * TINY.num_hidden_layers
    assert counts.trainable == (base_parameters(TINY) if mode == "full" else adapter)


TABLE = """\
EPYC, 2 cores, 25 GB, Linux; minilora 1, numpy 2; 2026-01-31
smollm2: 4 x 128 tokens per step, all-linear r=8; generation of 64 tokens after
16; median of 7, in turns

mode                                          seconds to floor tokens/s  peak MB
floor                 matrix products alone     1.203     1.00      426      797
lora                  LoRA, loss_and_grad       1.508     1.25      340    1,015
generate              generation                1.030                62      628
import                import minilora           0.035

The matrix products alone run at 229 GFLOP/s."""


def test_the_exact_table_of_fixed_numbers():
    def row(seconds, ratio=None, rate=None, peak=None):
        return {"seconds": seconds, "ratio_to_floor": ratio, "tokens_per_second": rate, "peak_memory_bytes": peak}

    machine = {"processor": "EPYC", "cores": 2, "memory_bytes": 25e9, "system": "Linux"}
    modes = {
        "floor": row(1.203, 1.0, 425.6, 797.4e6),
        "lora": row(1.508, 1.2535, 339.5, 1015.2e6),
        "generate": row(1.03, None, 62.1, 628e6),
        "import": row(0.035),
    }
    result = {"created": "2026-01-31T00:00:00+00:00", "machine": machine, "versions": {"minilora": "1", "numpy": "2"},
              "settings": {"base": "smollm2", "batch_size": 4, "length": 128, "r": 8, "rounds": 7},
              "left_out": {}, "floor_gflops": 229.4, "modes": modes}  # fmt: skip
    assert bench.table(result) == TABLE


def test_bench_and_memory_speak_of_the_same_step_unless_told_otherwise():
    settings, job = bench.Settings(), Job()
    assert (settings.base, settings.batch_size, settings.length, settings.r) == ("smollm2", 4, 128, 8)
    assert (job.base, job.batch_size, job.length, job.r) == ("smollm2", 4, 128, 8)
    assert (job.method, job.targets, job.quantized, job.bf16, job.recompute) == (
        "lora",
        tuple(SHAPES),
        False,
        False,
        False,
    )


def test_the_floor_counts_every_matrix_there_and_back(file):
    matrices = base_parameters(TINY) - TINY.hidden_size * (2 * TINY.num_hidden_layers + 1)  # all but the norms
    assert bench.floor_arithmetic(bench.Settings(str(file), batch_size=2, length=8)) == 2 * 2 * 16 * matrices


def test_random_weights_have_the_shape_of_the_real_model():
    assert base_parameters(bench.SMOLLM2) == 134_515_008


def test_random_weights_need_no_model(monkeypatch, capsys):
    def write_a_tiny_one(command, check):
        bench.write_random(Path(command[-1]), TINY)

    monkeypatch.setattr(bench.subprocess, "run", write_a_tiny_one)
    words = ["bench", "--random-weights", "--json", "--modes", "lora", "--length", "8", "--rounds", "1"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"]["base"] == "random weights" and list(printed["modes"]) == ["lora"]


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["--modes", "floor", "flor"], 2, "no mode is called 'flor'"),
        (["--rounds", "0"], 2, "rounds must be at least 1, got 0"),
        (["--length", "1"], 2, "length must be at least 2, got 1"),
        (["--batch-size", "0"], 2, "batch_size must be at least 1, got 0"),
        (["--base", "tiny", "--modes", "quantized"], 1, "tiny holds no packed matrices, which quantized needs"),
        (["--base", "tiny", "--random-weights"], 2, "--random-weights takes the shape of SmolLM2: leave out --base"),
        (["--base", "missing.gguf", "--modes", "lora"], 1, "missing.gguf"),
        (["--length", "100", "--modes", "lora"], 1, "lora: 100 tokens are more than the 80 the model can see"),
    ],
)
def test_a_mistake_is_answered_in_one_line(file, words, status, reason, capsys):
    assert main(["bench", "--base", str(file), *words]) == status
    out, err = capsys.readouterr()
    last = err.replace("\r", "\n").splitlines()[-1]  # before it there may be a progress bar
    assert out == "" and last.startswith("minilora: ") and reason in last and "Traceback" not in err


# -- growth ------------------------------------------------------------------------------------------------------------

SMALL = growth.Point(length=8, batch=2, rank=2, width=64)


def test_each_sweep_gives_a_picture(tmp_path):
    sweeps = {"rank": growth.Sweep("rank r", (1, 2)), "adapters": growth.Sweep("adapters", (1, 3))}
    turns = []
    paths = list(growth.draw_all(tmp_path / "new" / "folder", SMALL, sweeps, done=lambda: turns.append(1)))
    assert [path.name for path in paths] == [
        "growth-rank.png",
        "growth-rank-dark.png",
        "growth-adapters.png",
        "growth-adapters-dark.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(turns) == growth.turns(sweeps)


def test_descriptions_and_results_are_never_changed():
    kinds = (Step, Memory, ParameterCounts, Job, bench.Settings, bench.Mode, growth.Point, growth.Sweep, growth.Cost)
    assert [kind for kind in (*kinds, Contender) if not kind.__dataclass_params__.frozen] == []


def test_every_sweep_passes_through_the_start():
    assert all(getattr(growth.START, name) in sweep.values for name, sweep in growth.SWEEPS.items())


def test_measured_memory_holds_weights_and_adapters():
    one, three = growth.measure([SMALL, replace(SMALL, adapters=3)], rounds=1)
    assert one.peak_bytes > 4 * base_parameters(SMALL.config()) and 0 < one.seconds < 60
    one_adapter = growth.predicted_bytes(replace(SMALL, adapters=2)) - growth.predicted_bytes(SMALL)
    assert three.peak_bytes - one.peak_bytes >= 2 * one_adapter > 0


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({"batch": 4}, 2),  # twice the rows, twice the products
        ({"adapters": 4}, 1),  # what is not active costs no time
    ],
)
def test_multiplications_grow_with_what_is_computed(change, factor):
    assert growth.multiplications(replace(SMALL, **change)) == factor * growth.multiplications(SMALL)


def test_multiplications_are_those_of_every_product_there_and_back():
    blocks, tokens = 4, 16
    matrices = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64  # q, o; k, v; gate, up, down
    thin = 2 * (2 * 128 + 2 * 96 + 3 * 256)  # A and B of rank 2
    frozen = 2 * (blocks * matrices + 1024 * 64)  # y and dx, of the head as well
    attention = 7 * blocks * 64 * 8 / 2
    assert growth.multiplications(SMALL) == tokens * (frozen + 3 * blocks * thin + attention)


def growth_of(name, *kinds):
    """A sweep, its points in float32 or bfloat16, and costs that are not quite what is predicted."""
    sweep = growth.SWEEPS[name]
    points = [replace(growth.START, **{name: value}, bf16=bf16) for bf16 in kinds for value in sweep.values]
    seconds = {p: 0.1 + growth.multiplications(p) / (2e10 if p.bf16 else 1e10) for p in points}
    return sweep, {p: growth.Cost(seconds[p], growth.predicted_bytes(p)) for p in points}


@pytest.mark.parametrize("name", growth.SWEEPS)
def test_pictures_of_growth_can_be_read(name):
    sweep, found = growth_of(name, False)
    points, costs = list(found), list(found.values())
    figure = growth._drawn(sweep, growth.START, found)
    assert problems(figure) == []
    with theme("dark"):
        assert problems(growth._drawn(sweep, growth.START, found)) == []
    time, memory = figure.axes
    counted = (
        1e3 * found[growth.START].seconds * growth.multiplications(points[0]) / growth.multiplications(growth.START)
    )
    for axes, first in ((time, counted), (memory, costs[0].peak_bytes / 1e6)):
        predicted, measured = axes.lines
        assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
        assert predicted.get_ydata()[0] == pytest.approx(first) and predicted.get_linestyle() == "--"
        assert list(measured.get_xdata()) == list(sweep.values) and measured.get_linewidth() == 0
        ends = {"predicted": predicted.get_ydata()[-1], "measured": measured.get_ydata()[-1]}
        room = 0.15 * axes.get_ylim()[1]  # names that would overlap move apart
        assert {name.get_text(): name.xy[1] for name in axes.texts} == pytest.approx(ends, abs=room)
    assert time.lines[1].get_ydata()[0] == pytest.approx(1e3 * costs[0].seconds)
    assert list(memory.lines[1].get_ydata()) == [cost.peak_bytes / 1e6 for cost in costs]


@pytest.mark.parametrize("name", growth.SWEEPS)
def test_bfloat16_is_drawn_beside_float32_each_at_its_own_speed(name):
    sweep, found = growth_of(name, False, True)
    figure = growth._drawn(sweep, growth.START, found)
    assert problems(figure) == []
    for axes in figure.axes:
        names = {text.get_text() for text in axes.texts}
        assert names == {f"{what} ({kind})" for what in ("measured", "predicted") for kind in ("float32", "bfloat16")}
    at = sweep.values.index(getattr(growth.START, name))
    for predicted, measured in (figure.axes[0].lines[:2], figure.axes[0].lines[2:]):
        assert predicted.get_ydata()[at] == pytest.approx(measured.get_ydata()[at])  # where the speed is taken from


@pytest.mark.skipif(bfloat16.why_not() is not None, reason=str(bfloat16.why_not()))
def test_a_step_in_bfloat16_holds_what_is_predicted():
    wide = replace(SMALL, width=256)
    plain, half = growth.measure([wide, replace(wide, bf16=True)], rounds=1)
    predicted = growth.predicted_bytes(wide) - growth.predicted_bytes(replace(wide, bf16=True))
    assert plain.peak_bytes - half.peak_bytes == pytest.approx(predicted, rel=0.05)


def test_attention_is_what_grows_with_the_square_of_the_length():
    counts = [growth.multiplications(replace(SMALL, length=length)) for length in (8, 16, 24)]
    config = SMALL.config()
    assert counts[2] - 2 * counts[1] + counts[0] == 7 * config.num_hidden_layers * config.hidden_size * 2 * 8**2


# -- the page beside the peers -----------------------------------------------------------------------------------------

WHERE = {"machine": bench.machine(), "versions": {"minilora": "1"}, "created": "2026-01-31T00:00:00+00:00", "rounds": 3}


def measured(**seconds):
    """A group's result: seconds of each contender, and as many bytes."""
    rows = {name.replace("_", "-"): {"seconds": times, "peak_bytes": times[0]} for name, times in seconds.items()}
    return WHERE | {"title": "a step", "unit": "s", "contenders": rows, "skipped": {"torch-full": "needs torch"}}


def test_a_target_stands_beside_the_ratio_of_medians():
    page = targets.page({"step": measured(lora=[9, 3, 3], peft_lora=[4, 4, 9])})
    assert "against torch + PEFT | 0.85 | 0.75 | 0.75 |" in page  # medians 3 and 4
    assert "dense base | 0.50 | 0.45 | 2.25 |" in page  # bytes 9 and 4
    assert "| lora | 3.000 | 3.000 | 0 |" in page and "| torch-full | skipped: needs torch |" in page


def test_what_was_not_measured_is_said_to_be_so():
    page = targets.page({"step": measured(lora=[3])})
    assert page.count("not measured") == len(targets.TARGETS)


def test_generation_is_compared_by_tokens_of_all_streams():
    page = targets.page({"generation": measured(generate_8=[4], transformers=[2])})
    assert "transformers with one | 3 | 4 | 4.00 |" in page


def test_every_target_is_about_contenders_of_its_group():
    class Asked(dict):  # rows of every name, which notes the names
        def __missing__(self, name):
            self[name] = {"seconds": [1.0], "peak_bytes": 1 + len(self)}
            return self[name]

    for target in targets.TARGETS:
        target.value(rows := Asked())
        assert rows.keys() <= {contender.name for contender in peers.GROUPS[target.group].contenders}, target.what


def test_a_contender_that_lacks_something_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(contenders.shutil, "which", lambda name: None)
    monkeypatch.setattr(contenders, "find_spec", lambda name: None if name == "peft" else name)
    assert contenders.missing("peft-lora-compiled") == ["peft", "a C++ compiler"]
    assert contenders.missing("torch-mlp-compiled") == ["a C++ compiler"]
    assert contenders.missing("torch-mlp") == contenders.missing("lora") == []


def test_the_readme_shows_what_results_json_holds():
    folder = Path(targets.__file__).parent
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert targets.page(results) in (folder / "README.md").read_text(encoding="utf-8")

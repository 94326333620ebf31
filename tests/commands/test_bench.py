"""`minilora bench`: what is measured, what is left out, and the page."""

import json
from dataclasses import replace

import pytest
from commandline import instead
from commandline import status as run
from modelfiles import CONFIG

from minilora.cli import main
from minilora.commands import bench
from minilora.engine import bfloat16
from minilora.measure.bench import MODES, NEW, PROMPT, Settings, write_random
from minilora.measure.memory import Job
from minilora.measure.turns import Timings

TINY = replace(CONFIG, max_position_embeddings=PROMPT + NEW)
CAN = [name for name, mode in MODES.items() if not mode.bf16 or bfloat16.why_not() is None]  # on this machine


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny model with random weights, in 4 and 8 bits."""
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    write_random(str(path), TINY)
    return path


def timed(contenders, rounds):
    """In place of the turns: mode i takes i + 1, i + 2, ... seconds."""
    names = [contender.name for contender in contenders]
    return {name: Timings([1.0 + list(MODES).index(name) + i for i in range(rounds)][::-1], 10) for name in names}


def test_every_mode_has_its_numbers(file, monkeypatch):
    monkeypatch.setattr(bench, "take_turns", timed)
    settings = Settings(str(file), batch_size=2, length=8, r=2)
    result = bench.measure(settings, rounds=3)
    assert result["floor_gflops"] == pytest.approx(bench.floor_arithmetic(settings) / 2e9)
    assert sorted(result["modes"]) == sorted(CAN) and sorted(result["left_out"]) == sorted(set(MODES) - set(CAN))
    for name, row in result["modes"].items():
        group, fastest = MODES[name].group, 1 + list(MODES).index(name)
        expected = {"seconds": fastest + 1, "fastest": fastest}
        expected |= {"peak_memory_bytes": 10 if group != "import" else None}
        expected |= {"ratio_to_floor": (fastest + 1) / 2 if group == "training" else None}
        streams = {"generate-8": 8, "generate-16": 16, "generate-8-bf16": 8, "generate-16-bf16": 16}.get(name, 1)
        tokens = {"training": 16, "generation": NEW * streams}.get(group)
        assert row == pytest.approx(expected | {"tokens_per_second": tokens / (fastest + 1) if tokens else None}), name
    assert result["settings"]["batch_size"] == 2 and result["created"].startswith("20")
    assert {"minilora", "python", "numpy", "blas"} <= set(result["versions"]) and result["machine"]["cores"] >= 1
    assert "model name" not in result["machine"]["processor"]
    lines = bench.page(result).splitlines()
    assert [name for name in CAN if not any(line.startswith(f"{name} ") for line in lines)] == []


def test_a_folder_has_no_quantised_matrices_and_what_needs_them_is_named(tiny_folder, monkeypatch):
    monkeypatch.setattr(bench, "take_turns", timed)
    settings = Settings(str(tiny_folder / "base"), batch_size=1, length=8)
    result = bench.measure(settings, ["quantized", "import", "load-quantized"], rounds=1)
    assert list(result["modes"]) == ["import"] and list(result["left_out"]) == ["quantized", "load-quantized"]
    reasons = bench.impossible(list(MODES), settings)
    needing = {name for name in MODES if "quantized" in name}
    words = ("quantised", "bf16", "bfloat16", "oneDNN")  # the latter three where a library or the processor lacks it
    assert {name for name in needing if any(word in reasons[name] for word in words)} == needing
    assert not any("quantised" in why for name, why in reasons.items() if name not in needing)
    line = f"left out: quantized, load-quantized: {tiny_folder / 'base'} holds no quantised matrices"
    assert line in " ".join(bench.page(result).splitlines())


def test_what_needs_bfloat16_is_left_out_where_there_is_none(file, monkeypatch):
    monkeypatch.setattr(bfloat16, "why_not", lambda: "no such thing here")
    reasons = bench.impossible(list(MODES), Settings(str(file)))
    assert set(reasons) == {name for name in MODES if "bf16" in name} and {*reasons.values()} == {"no such thing here"}
    with pytest.raises(ValueError, match="no such thing here, which bf16 needs"):
        bench.impossible(["bf16"], Settings(str(file)))


PAGE = """\
EPYC, 2 cores, 25 GB, Linux; minilora 1, numpy 2; 2026-01-31
smollm2: 4 x 128 tokens per step, all-linear r=8; generation of 64 tokens after
16; median of 7, in turns

mode                           seconds  x floor  tokens/s  peak, MB
floor     matmuls alone          1.203     1.00       426       797
lora      LoRA, loss_and_grad    1.508     1.25       340     1,015
generate  generation             1.030                 62       628
import    import minilora        0.035

The floor, the matmuls alone, runs at 229 GFLOP/s."""


def test_the_exact_page_of_fixed_numbers():
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
    assert bench.page(result) == PAGE


def test_bench_and_memory_have_the_same_step_by_default():
    settings, job = Settings(), Job()
    assert (settings.base, settings.batch_size, settings.length, settings.r) == ("smollm2", 4, 128, 8)
    assert (job.base, job.batch_size, job.length, job.r) == ("smollm2", 4, 128, 8)
    assert (job.method, job.targets) == ("lora", None)
    assert not (job.quantized or job.bf16 or job.recompute)


def test_random_weights_need_no_model_and_processes_measure_them(monkeypatch, capsys):
    monkeypatch.setattr(bench, "apart", lambda function, path: function(path, TINY))
    words = ["bench", "--random-weights", "--json", "--modes", "lora", "--length", "8", "--rounds", "1"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"]["base"] == "random weights" and printed["modes"]["lora"]["seconds"] > 0
    monkeypatch.setattr(bench, "take_turns", timed)
    assert main(["bench", "--base", "tiny", "--json", "--modes", "import", "--rounds", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["settings"]["base"], printed["settings"]["rounds"]) == ("tiny", 3)


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["--modes", "floor", "flor"], 2, "no mode is called 'flor'"),
        (["--rounds", "0"], 2, "rounds must be at least 1, got 0"),
        (["--base", "tiny", "--modes", "quantized"], 1, "tiny holds no quantised matrices, which quantized needs"),
        (["--base", "tiny", "--random-weights"], 2, "--random-weights takes the shape of SmolLM2: leave out --base"),
        (["--base", "missing.gguf", "--modes", "lora"], 1, "missing.gguf"),
        (["--length", "100", "--modes", "lora"], 1, "lora: 100 tokens are more than the 80"),
    ],
)
def test_a_mistake_is_answered_in_one_line(file, words, status, reason, capsys):
    assert run("bench", *instead({"--base": file}, *words)) == status
    out, err = capsys.readouterr()
    last = err.replace("\r", "\n").splitlines()[-1]  # before it there may be a progress bar
    assert out == "" and last.startswith("minilora: ") and reason in last and "Traceback" not in err

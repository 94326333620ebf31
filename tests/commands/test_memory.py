"""`minilora memory`: what it measures is what it predicted, and the page."""

import json
from dataclasses import asdict, replace

import pytest
from commandline import status as run
from modelfiles import CONFIG, new_llama, new_tokenizer, write_folder

import minilora as ml
from minilora.cli import main
from minilora.commands.memory import OWNERS, page
from minilora.measure.memory import Job, measure_step, report, shape_of, step_of
from minilora.measure.predict import Memory, predict_memory
from minilora.models.gguf import save_gguf
from minilora.models.tokenizer import to_folder


@pytest.fixture(scope="module")
def result(tiny_folder):
    """One job, measured in its own process."""
    return report(Job(base=str(tiny_folder / "base"), r=4, length=40, target_modules=["q_proj", "down_proj"]))


def test_the_report_measures_what_it_predicted(result):
    told, held = Memory(**result["predicted"]), Memory(**result["measured"])
    assert told.by_operation == held.by_operation
    for owner in ("program", "weights", "adapter", "gradients", "moments", "activations"):
        assert getattr(told, owner) == getattr(held, owner) > 0
    if result["process_peak"] is not None:
        assert result["process_peak"] > held.program + held.weights + held.moments


def test_scratch_is_what_the_peak_has_beyond_gradients_and_activations(tiny_folder, monkeypatch):
    monkeypatch.setattr("minilora.measure.memory.peak", lambda step: 10**9)
    given = {"base": str(tiny_folder / "base"), "r": 2, "length": 8, "batch_size": 1}
    held = Memory(**measure_step(given)["memory"])
    assert held.scratch == 10**9 - held.gradients - held.activations


def test_a_step_may_be_as_long_as_the_model_can_read_and_no_longer():
    longest = CONFIG.max_position_embeddings
    assert Job(length=longest).batch(CONFIG).input_ids.shape == (4, longest)
    with pytest.raises(ValueError, match=f"{longest + 1} tokens are more than the {longest}"):
        Job(length=longest + 1).batch(CONFIG)


def test_the_bytes_of_a_quantised_file_are_those_of_the_loaded_model_though_some_matrices_have_16_bits(tmp_path):
    model = new_llama(intermediate_size=48)  # rows of 48 fit no block: they become F16, which is loaded as float32
    path = save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), new_tokenizer(), kind="Q4_1")
    loaded, _ = ml.load(path, quantized=True)
    assert shape_of(str(path), True) == (loaded.config, sum(w.nbytes for w in loaded.state_dict().values()))


WIDE = dict(vocab_size=4100, hidden_size=256, intermediate_size=768, head_dim=64,
            max_position_embeddings=400)  # fmt: skip
WAYS = [{}, *(pytest.param(how, marks=pytest.mark.long) for how in ({"recompute": True}, {"quantized": "nf4"}))]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_the_memory_of_a_step_over_a_folder_is_predicted_within_2_percent(how, tmp_path_factory):
    layers = 4 if "quantized" in how else 2  # a small share is a smaller one of a larger model
    folder = tmp_path_factory.getbasetemp() / f"wide-{layers}"
    if not folder.exists():
        model = new_llama(1, **WIDE, num_hidden_layers=layers)
        to_folder(new_tokenizer(), write_folder(folder, model, "BF16", shards=2))
    job = Job(base=str(folder), r=2, batch_size=1, length=400, **how)
    measured = replace(Memory(**measure_step(asdict(job))["memory"]), program=0)
    told = predict_memory(step_of(job))
    assert told.total == pytest.approx(measured.total, rel=0.02)
    assert replace(told, scratch=0) == replace(measured, scratch=0)  # all else to the byte


def test_the_page_shows_every_owner_and_operation_and_the_error_of_the_prediction(result):
    lines = page(result | {"process_peak": Memory(**result["predicted"]).total * 2}).splitlines()
    shown = {line.strip().split("  ")[0] for line in lines[3:]}
    assert shown >= {*(name for name, _ in OWNERS.values()), *result["measured"]["by_operation"], "sum"}
    assert lines[-1].endswith("the prediction is off by -50.0 %") and max(map(len, lines[1:])) <= 80


FIXED = {
    "job": {"base": "smollm2", "method": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"], "batch_size": 4,
            "length": 128, "quantized": True, "recompute": False},
    "threads": 2,
    "rounds": 1,
    "predicted": {"weights": 96_576_768, "adapter": 1_843_200, "gradients": 1_843_200, "moments": 3_686_400,
                  "activations": 150_000_000, "scratch": 11_900_000, "program": 83_700_000,
                  "by_operation": {"swiglu": 99_960_000, "rms_norm": 50_040_000}},
    "measured": {"weights": 96_576_768, "adapter": 1_843_200, "gradients": 1_843_200, "moments": 3_686_400,
                 "activations": 151_000_000, "scratch": 12_000_000, "program": 83_700_000,
                 "by_operation": {"rms_norm": 50_040_000, "swiglu": 99_940_000, "linear": 1_020_000}},
    "process_peak": 400_000_000,
}  # fmt: skip
PAGE = """\
Memory of a training step of smollm2 at its peak, in MB (millions of bytes):
LoRA of rank 8 on q_proj, v_proj; 4 x 128 tokens; 2 threads; quantized

                     predicted  measured
program                   83.7      83.7   Python and libraries; measured
weights                   96.6      96.6   of the base
adapter                    1.8       1.8   A and B
gradients                  1.8       1.8   one per trainable parameter
optimizer state            3.7       3.7   two per trainable parameter
activations                150       151   saved for the backward pass:
  swiglu                   100      99.9
  rms_norm                50.0      50.0
  linear                   0.0       1.0
scratch                   11.9      12.0   logits and other temporary arrays
sum                        350       351
peak of the process                  400   the prediction is off by -12.6 %"""


def test_the_exact_page_of_fixed_numbers():
    assert page(FIXED) == PAGE


def test_what_holds_nothing_has_no_line_and_full_fine_tuning_is_called_so():
    job = FIXED["job"] | {"method": "full", "quantized": False, "recompute": True, "target_modules": "all-linear"}
    both = {name: FIXED[name] | {"adapter": 0} for name in ("predicted", "measured")}
    full = FIXED | both | {"job": job, "threads": 1}
    lines = page(full).splitlines()
    assert lines[1] == "all parameters; 4 x 128 tokens; 1 thread; recompute"
    assert not any(line.startswith("adapter") for line in lines)
    assert "never all of it at the same time" in page(full)
    assert "never all" not in page(full | {"rounds": 2})
    assert page(full | {"process_peak": None}).endswith("The peak of the process is unknown on this system.")


def test_the_command_prints_what_the_report_returned(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("minilora.commands.memory.report", lambda job: asked.append(job) or FIXED)
    assert main(["memory", "--json", "--target-modules", "q_proj", "v_proj", "--r", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == FIXED
    assert main(["memory", "--target-modules", "all-linear"]) == 0
    assert capsys.readouterr().out.strip() == PAGE
    assert asked == [Job(target_modules=["q_proj", "v_proj"], r=2), Job()]


@pytest.mark.parametrize(
    ("flags", "status", "reason"),
    [
        (["--method", "full", "--quantized"], 2, "--quantized"),
        (["--target-modules", "q_proj", "foo"], 1, "'foo'"),
        (["--base", "tiny", "--length", "9999"], 1, "9999 tokens"),
        (["--base", "tiny", "--quantized"], 1, "no quantised matrices"),
        (["--base", "tiny", "--r", "999"], 1, "r=999"),
        (["--base", "absent.gguf"], 1, "absent.gguf"),
    ],
    ids=str,
)
def test_what_cannot_be_reported_is_refused_in_one_line(flags, status, reason, capsys):
    assert run("memory", *flags) == status
    out, err = capsys.readouterr()
    last = err.replace("\r", "\n").splitlines()[-1]  # before it there may be a progress bar
    assert out == "" and last.startswith("minilora: ") and reason in last and "Traceback" not in err

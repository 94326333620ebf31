"""Every option of an adapter and of training, seen in what a run leaves behind: its files, and each row of its log."""

import json
import math

import numpy as np
import pytest
from jobs import options
from modelfiles import CONFIG

import minilora as ml
from minilora.cli import main
from minilora.files.tensors import read_tensors
from minilora.models.load import load
from minilora.nn.module import Parameter
from minilora.nn.optim import AdamW
from minilora.train import job
from minilora.train.job import finetune
from minilora.train.log import read_log

pytestmark = pytest.mark.usefixtures("unmeasured")


def run(home, out, **change):
    """The folder of a quick run."""
    finetune(options(home, out, **(dict(steps=3) | change)))
    return out


def tensors(folder):
    """An adapter's arrays by PEFT's names, without what all of them begin with."""
    arrays = read_tensors(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.model."): array for name, array in arrays.items()}


def column(folder, name):
    return [float(row[name]) for row in read_log(folder / "log.csv")]


@pytest.fixture(scope="module")
def usual(home, tmp_path_factory):
    """The folder of the run without any option. Never written to."""
    return tmp_path_factory.mktemp("usual")


@pytest.fixture
def plain(home, usual):
    return usual if (usual / "log.csv").exists() else run(home, usual)


# -- the same in public names ------------------------------------------------------------------------------------------


def rebuilt(home, config, decay=0.0, plus=None, steps=3, **settings):
    model, tokenizer = ml.load(home / "base")
    samples = ml.encode_records(ml.split_records(ml.read_records(home / "data.jsonl"))["train"], tokenizer)
    ml.add_adapter(model, ml.LoraConfig(**(dict(r=2, lora_alpha=16.0) | config)), seed=0)
    parameters = model.trainable_parameters()
    scale = ml.lora_plus(parameters, plus) if plus else None
    optimizer = AdamW(parameters, lr=2e-3, weight_decay=decay, lr_scale=scale)
    history = ml.fit(model, samples, steps, optimizer=optimizer, **(dict(batch_size=4) | settings))
    return history.losses, ml.adapter_state(model, "default")


ASKED = [  # options, the adapter's settings, those of training
    (dict(exclude_modules=["q_proj", "down_proj"]), dict(exclude_modules=["q_proj", "down_proj"]), {}),
    (dict(exclude_modules=".*mlp.*"), dict(exclude_modules=".*mlp.*"), {}),
    (dict(layers_to_transform=[1]), dict(layers_to_transform=[1]), {}),
    (dict(rank_pattern={"q_proj": 5, "mlp.*": 1}), dict(rank_pattern={"q_proj": 5, "mlp.*": 1}), {}),
    (dict(alpha_pattern={"v_proj": 64.0}), dict(alpha_pattern={"v_proj": 64.0}), {}),
    (dict(lora_dropout=0.5), dict(lora_dropout=0.5), {}),
    (dict(use_rslora=True), dict(use_rslora=True), {}),
    (dict(use_dora=True), dict(use_dora=True), {}),
    (dict(init_lora_weights="gaussian"), dict(init_lora_weights="gaussian"), {}),
    (dict(init_lora_weights=False), dict(init_lora_weights=False), {}),
    (dict(lora_plus=16.0), {}, dict(plus=16.0)),
    (dict(warmup=0.5), {}, dict(warmup=0.5)),
    (dict(schedule="linear", steps=4), {}, dict(schedule="linear", steps=4)),
    (dict(schedule="constant"), {}, dict(schedule="constant")),
    (dict(weight_decay=5.0), {}, dict(decay=5.0)),
    (dict(max_grad_norm=1e-7), {}, dict(max_norm=1e-7)),
    (dict(grad_accumulation=2, batch_size=2), {}, dict(grad_accumulation=2, batch_size=2)),
]


@pytest.mark.parametrize(("change", "config", "settings"), ASKED, ids=[str(change) for change, *_ in ASKED])
def test_every_option_does_what_it_names_to_the_last_bit(change, config, settings, home, tmp_path, plain):
    folder = run(home, tmp_path / "run", **change)
    losses, trained = rebuilt(home, config, **settings)
    assert column(folder, "loss") == losses
    model, _ = ml.load(home / "base")
    ml.load_adapter(model, folder)
    got = ml.adapter_state(model, "default")
    assert got.keys() == trained.keys() and all(np.array_equal(got[name], array) for name, array in trained.items())
    before, after = tensors(plain), tensors(folder)
    assert before.keys() != after.keys() or any(not np.array_equal(before[name], after[name]) for name in before)


def test_strength_keeps_a_part_of_the_update_and_validation_measures_that_part(home, tmp_path, plain):
    metrics = finetune(options(home, tmp_path / "run", steps=3, strength=0.5))
    assert column(tmp_path / "run", "loss") == column(plain, "loss")  # it is trained as ever
    whole, half = tensors(plain), tensors(tmp_path / "run")
    for name, array in whole.items():
        np.testing.assert_array_equal(half[name], array * np.float32(0.5) if "lora_B" in name else array)
    model, tokenizer = ml.load(home / "base")
    ml.load_adapter(model, tmp_path / "run")
    held_out = ml.split_records(ml.read_records(home / "data.jsonl"))["validation"]
    assert metrics["validation_loss"][-1][1] == pytest.approx(
        ml.mean_loss(model, ml.encode_records(held_out, tokenizer)), rel=1e-5
    )
    assert metrics["options"]["strength"] == 0.5


def test_what_cannot_be_scaled_is_refused_before_it_is_trained(home, tmp_path):
    run(home, tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match="only a plain LoRA can be scaled"):
        run(home, tmp_path / "on", adapter=str(tmp_path / "dora"), strength=0.5, r=8)
    assert not (tmp_path / "on.partial" / "adapter_model.safetensors").exists()


def test_columns_with_other_names_are_the_same_data(home, tmp_path, plain, capsys):
    other = {"question": "the ask", "answer": "a"}
    rows = map(json.loads, (home / "data.jsonl").read_text(encoding="utf-8").splitlines())
    texts = [json.dumps({other.get(name, name): value for name, value in row.items()}) for row in rows]
    (tmp_path / "other.jsonl").write_text("\n".join(texts), encoding="utf-8")
    data, field = str(tmp_path / "other.jsonl"), ["--field", "question=the ask", "answer=a"]
    job = ["finetune", "--base", str(home / "base"), "--data", data, "--r", "2", "--steps", "3", "--batch-size", "4"]
    assert main([*job, *field, "--out", str(tmp_path / "run")]) == 0
    assert column(tmp_path / "run", "loss") == column(plain, "loss")
    capsys.readouterr()
    assert main(["data", data, *field, "--base", str(home / "base"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["field"] == other


# -- what is in the adapter --------------------------------------------------------------------------------------------


def test_dora_saves_a_length_for_each_row_and_trains_it(home, tmp_path, plain):
    lengths = {k: a for k, a in tensors(run(home, tmp_path, use_dora=True)).items() if "lora_magnitude" in k}
    assert len(lengths) == 7 * CONFIG.num_hidden_layers and not any("magnitude" in name for name in tensors(plain))
    base = ml.base_state(ml.load(home / "base")[0])
    for name, array in lengths.items():
        start = np.linalg.norm(base[f"model.{name.removesuffix('.lora_magnitude_vector')}.weight"], axis=1)
        assert array.shape == start.shape and 0 < np.abs(array - start).max() < 0.01


def test_pissa_saves_an_adapter_of_twice_the_rank_that_began_as_nothing(home, tmp_path):
    got = tensors(run(home, tmp_path, init_lora_weights="pissa", lr=1e-9))
    a, b = (got[f"layers.0.self_attn.q_proj.lora_{which}.weight"] for which in "AB")
    assert a.shape == (4, 32) and b.shape == (32, 4)
    np.testing.assert_allclose(b @ a, 0, atol=1e-6)
    w = ml.base_state(ml.load(home / "base")[0])["model.layers.0.self_attn.q_proj.weight"]
    u, sigma, v = np.linalg.svd(w)
    np.testing.assert_allclose(16 / 2 * b[:, :2] @ a[:2], (u[:, :2] * sigma[:2]) @ v[:2], atol=1e-5)


def test_another_start_is_another_start(home, tmp_path, plain):
    """After steps that move nothing: B is zero unless all is random, and A has the spread that each start names."""
    found = {}
    for start in (True, "gaussian", False):
        got = tensors(run(home, tmp_path / str(start), init_lora_weights=start, lr=1e-12))
        found[start] = [np.concatenate([v.ravel() for k, v in got.items() if f"lora_{x}" in k]) for x in "AB"]
    assert [np.abs(b).max() > 1e-6 for _, b in found.values()] == [False, False, True]
    assert np.abs(found[True][0]).max() <= 1 / math.sqrt(32) < 1.5 < np.abs(found["gaussian"][0]).max()  # N(0, 1/r²)


def test_dropout_leaves_word_of_the_holes_that_it_has_drawn(home, tmp_path, plain):
    notes = json.loads((run(home, tmp_path, lora_dropout=0.5) / "minilora.json").read_text(encoding="utf-8"))
    assert len(notes["dropout"]) == 7 * CONFIG.num_hidden_layers
    assert all(sum(one["draws"].values()) >= 3 for one in notes["dropout"].values())
    assert column(tmp_path, "loss")[0] == column(plain, "loss")[0]  # B is zero: at first it does not matter
    assert column(tmp_path, "loss")[2] != column(plain, "loss")[2]


def test_ranks_scales_and_modules_are_those_of_their_patterns(home, tmp_path):
    patterns = dict(rank_pattern={"q_proj": 5, r"layers\.1\.mlp\..*": 1}, alpha_pattern={"v_proj": 64.0})
    folder = run(home, tmp_path, exclude_modules=["k_proj"], use_rslora=True, **patterns)
    ranks = {name.removesuffix(".lora_A.weight"): len(a) for name, a in tensors(folder).items() if "lora_A" in name}
    assert {name: rank for name, rank in ranks.items() if rank != 2} == {
        "layers.0.self_attn.q_proj": 5, "layers.1.self_attn.q_proj": 5,
        "layers.1.mlp.gate_proj": 1, "layers.1.mlp.up_proj": 1, "layers.1.mlp.down_proj": 1,
    }  # fmt: skip
    assert len(ranks) == 12 and not any("k_proj" in name for name in ranks)
    model, _ = ml.load(home / "base")
    ml.load_adapter(model, folder)
    for module, scale in (("q_proj", 16 / math.sqrt(5)), ("v_proj", 64 / math.sqrt(2)), ("o_proj", 16 / math.sqrt(2))):
        a, b = (tensors(folder)[f"layers.0.self_attn.{module}.lora_{which}.weight"] for which in "AB")
        delta = ml.delta_weight(model, f"model.layers.0.self_attn.{module}", "default")
        np.testing.assert_allclose(delta, scale * b @ a, rtol=1e-5, atol=1e-9)


def test_blocks_that_are_not_named_get_nothing(home, tmp_path):
    got = tensors(run(home, tmp_path, layers_to_transform=[1]))
    assert len(got) == 14 and all(name.startswith("layers.1.") for name in got)


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 1), ("all", 2)])
def test_biases_learn_where_they_are_asked_to(bias, count, home, tmp_path, monkeypatch):
    def load_with_biases(*inputs):
        model, tokenizer = load(*inputs)
        block = model.model.layers[0]
        block.self_attn.q_proj.bias = Parameter(np.ones(32, np.float32))
        block.mlp.up_proj.bias = Parameter(np.ones(64, np.float32))
        return model, tokenizer

    monkeypatch.setattr(job, "load", load_with_biases)  # no file of a Llama has any
    targets = ["q_proj"] if bias == "lora_only" else ["q_proj", "up_proj"]
    got = tensors(run(home, tmp_path / "run", bias=bias, target_modules=targets))
    biases = [array for name, array in got.items() if name.endswith("bias")]
    assert len(biases) == count and all(not np.array_equal(array, np.ones_like(array)) for array in biases)


# -- how it was trained ------------------------------------------------------------------------------------------------

SCHEDULED = [  # options, each step's share of the peak
    (dict(steps=5, warmup=0.4), [0.5, 1, 1, 0.75, 0.25]),
    (dict(steps=5, warmup=0.4, schedule="linear"), [0.5, 1, 1, 2 / 3, 1 / 3]),
    (dict(steps=5, warmup=0.4, schedule="constant"), [0.5, 1, 1, 1, 1]),
    (dict(steps=4, warmup=0.0, schedule="constant"), [1, 1, 1, 1]),
    (dict(steps=4, warmup=1.0, schedule="linear"), [0.25, 0.5, 0.75, 1]),
]


@pytest.mark.parametrize(("change", "shares"), SCHEDULED, ids=[str(change) for change, _ in SCHEDULED])
def test_warmup_and_schedule_are_seen_in_the_learning_rate_of_each_step(change, shares, home, tmp_path):
    assert column(run(home, tmp_path, lr=1e-3, **change), "lr") == pytest.approx([1e-3 * share for share in shares])


def test_lora_plus_moves_b_further_in_the_first_step_by_its_ratio(home, tmp_path):
    once, faster = (tensors(run(home, tmp_path / str(x), steps=1, lora_plus=x)) for x in (None, 8.0))
    for name, array in once.items():
        np.testing.assert_allclose(faster[name], (8 if "lora_B" in name else 1) * array, rtol=1e-5)


def test_weight_decay_shrinks_what_the_first_step_starts_from(home, tmp_path):
    without, shrunk = (tensors(run(home, tmp_path / str(x), steps=1, lr=1e-2, weight_decay=x)) for x in (0.0, 5.0))
    model, _ = ml.load(home / "base")
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=16), seed=0)
    name = "layers.0.mlp.up_proj.lora_A"
    start = ml.adapter_state(model, "default")[f"model.{name}"]
    np.testing.assert_allclose(without[f"{name}.weight"] - shrunk[f"{name}.weight"], 1e-2 * 5 * start, atol=1e-7)


def test_the_gradient_is_clipped_and_its_norm_before_that_is_in_the_log(home, tmp_path, plain):
    norms = column(run(home, tmp_path, max_grad_norm=1e-7), "grad_norm")
    assert norms[0] == column(plain, "grad_norm")[0] > 1e-4  # the same gradient
    before, after = tensors(plain), tensors(tmp_path)
    moved = max(np.abs(array).max() for name, array in after.items() if "lora_B" in name)
    assert moved < 0.95 * max(np.abs(array).max() for name, array in before.items() if "lora_B" in name)  # Adam's eps


def test_batches_that_are_accumulated_are_one_large_batch(home, tmp_path):
    """Three epochs of eight records: in steps of all eight, however they are divided."""
    folders = [
        run(home, tmp_path / str(n), steps=None, epochs=3.0, lr=2e-2, batch_size=8 // n, grad_accumulation=n)
        for n in (1, 2, 8)
    ]
    for folder in folders[1:]:
        assert len(column(folder, "loss")) == 3
        for name in ("loss", "lr", "grad_norm"):
            np.testing.assert_allclose(column(folder, name), column(folders[0], name), rtol=1e-4)
        assert [step for step, _ in json.loads((folder / "metrics.json").read_text())["validation_loss"]] == [1, 2, 3]


# -- what a run leaves of its options ----------------------------------------------------------------------------------


def test_the_log_has_a_row_for_each_step_with_what_the_metrics_say(home, tmp_path):
    folder = run(home, tmp_path, steps=5)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert column(folder, "step") == [1, 2, 3, 4, 5] and column(folder, "loss") == metrics["train_loss"]
    assert all(speed > 0 for speed in column(folder, "tokens_per_second"))
    memory = column(folder, "peak_memory_bytes")
    assert memory == sorted(memory) and memory[0] > metrics["base_bytes"]
    assert memory[-1] <= metrics["peak_memory_bytes"]["measured"]


FLAGS = """--r 3 --lora-alpha 6 --target-modules q_proj v_proj up_proj --exclude-modules v_proj --layers-to-transform
0 1 --rank-pattern q_proj=2 --alpha-pattern up_proj=5 --lora-dropout 0.2 --bias lora_only --use-rslora --use-dora
--init-lora-weights gaussian --lora-plus 4 --steps 4 --lr 0.003 --warmup 0.3 --schedule linear --weight-decay 0.1
--max-grad-norm 0.5 --batch-size 2 --grad-accumulation 2 --max-length 60 --seed 3 --eval-records 5 --recompute"""


@pytest.mark.parametrize("flags", [FLAGS, "--steps 2", "--epochs 0.5 --method full"], ids=["all", "few", "full"])
def test_the_file_of_a_run_repeats_it_to_the_last_byte(flags, home, tmp_path, capsys):
    job = ["finetune", "--base", str(home / "base"), "--data", str(home / "data.jsonl")]
    assert main([*job, *flags.split(), "--out", str(tmp_path / "one")]) == 0
    assert main(["finetune", "--config", str(tmp_path / "one" / "run.toml"), "--out", str(tmp_path / "two")]) == 0
    capsys.readouterr()
    one, two = ((tmp_path / name) for name in ("one", "two"))
    trained = [path.name for path in one.glob("*.safetensors")] + [path.name for path in one.glob("adapter_*.json")]
    assert trained
    for name in trained:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert [column(one, name) for name in ("loss", "lr")] == [column(two, name) for name in ("loss", "lr")]
    said = [(folder / "run.toml").read_text(encoding="utf-8").replace(str(folder), "") for folder in (one, two)]
    assert said[0] == said[1]


def test_flags_go_before_the_file_of_a_run(home, plain, tmp_path, capsys):
    words = ["--config", str(plain / "run.toml"), "--out", str(tmp_path / "run"), "--steps", "1", "--method", "full"]
    assert main(["finetune", *words]) == 0
    capsys.readouterr()
    assert column(tmp_path / "run", "lr") == [2e-4]  # the method's own
    assert (tmp_path / "run" / "model.safetensors").exists() and json.loads(
        (tmp_path / "run" / "metrics.json").read_text(encoding="utf-8")
    )["options"]["base"] == str(home / "base")


def test_a_file_with_an_unknown_option_is_answered_with_the_nearest_one(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("[lora]\nlora_dropot = 0.1\n", encoding="utf-8")
    assert main(["finetune", "--config", str(tmp_path / "run.toml")]) == 2
    out, err = capsys.readouterr()
    expected = f"minilora: {tmp_path / 'run.toml'}: unknown option 'lora_dropot' (did you mean lora_dropout?)\n"
    assert (out, err) == ("", expected)

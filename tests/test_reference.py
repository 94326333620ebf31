"""minilora/reference.py is the oracle: whatever way the package computes a step, it computes what that page does."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from helpers.communicator import in_ranks
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from smallmodels import in_float64, new_model

import minilora as ml
from minilora import reference as ref
from minilora.engine.backend import dense
from minilora.generate.answers import generate_batch
from minilora.lora.adapters import adapter_state, base_state
from minilora.models.load import load
from minilora.nn.llama import Config
from minilora.nn.optim import SGD
from minilora.nn.step import add_gradients, training_step

# -- a model in the package and on the page ----------------------------------------------------------------------------


def on_the_page(model, r, alpha):
    """The same weights and the same adapter, for the reference."""
    weights = {name: ref.Tensor(dense(w)) for name, w in base_state(model).items()}
    lora, state = ref.LoRA({}, r, alpha), adapter_state(model, "default")
    for module in {name.rpartition(".")[0] for name in state}:
        a, b = (state[f"{module}.lora_{letter}"].copy() for letter in "AB")
        lora.pairs[module] = ref.Tensor(a, ref.Node()), ref.Tensor(b, ref.Node())
    return weights, lora


@dataclass
class Case:
    """One batch, and one model with an adapter whose B is not zero, in the package and on the page."""

    config: Config
    r: int = 2
    alpha: float = 3.0
    lengths: tuple = (7, 4)
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.model = in_float64(new_model(self.config, self.seed), gain=4)
        config = ml.LoraConfig(r=self.r, lora_alpha=self.alpha, target_modules="all-linear", init_lora_weights=False)
        ml.add_adapter(self.model, config, seed=self.seed)
        for array in adapter_state(self.model, "default").values():
            array *= 0.3
        in_float64(self.model, gain=1)
        self.weights, self.lora = on_the_page(self.model, self.r, self.alpha)
        rows = [tuple(map(int, rng.integers(0, self.config.vocab_size, n))) for n in self.lengths]
        scored = [[*(rng.random(len(row) - 1) < 0.7), True] for row in rows]  # the last token always
        self.samples = [ml.Sample(row, tuple(np.where(own, row, -100))) for row, own in zip(rows, scored, strict=True)]
        self.ids, self.labels = ml.collate(self.samples)

    def loss(self):
        """The page's loss; the gradients are then in the nodes of `lora`'s tensors."""
        logits = ref.llama(self.ids[:, :-1], self.weights, self.config, self.lora)
        loss = ref.cross_entropy(logits, labels=self.labels[:, 1:])
        loss.backward()
        return float(loss.data)

    def expected(self):
        loss = self.loss()
        return loss, {
            f"{module}.lora_{letter}": t.node.grad
            for module, pair in self.lora.pairs.items()
            for letter, t in zip("AB", pair, strict=True)
        }


@st.composite
def cases(draw):
    K, D = draw(st.integers(1, 2)), 2 * draw(st.integers(1, 3))
    config = Config(
        vocab_size=draw(st.integers(5, 12)), hidden_size=draw(st.integers(3, 9)),
        intermediate_size=draw(st.integers(3, 9)), num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=K * draw(st.integers(1, 3)), num_key_value_heads=K, head_dim=D,
        tie_word_embeddings=draw(st.booleans()), rope_theta=draw(st.sampled_from([100.0, 10000.0])),
    )  # fmt: skip
    lengths = tuple(draw(st.lists(st.integers(2, 8), min_size=1, max_size=3)))
    r = draw(st.integers(1, min(2, K * D)))
    return Case(config, r, draw(st.sampled_from([0.5, 3.0, 16.0])), lengths, draw(st.integers(0, 99)))


def gradients(model):
    return {name.replace(".adapters.default", ""): p.grad for name, p in model.trainable_parameters().items()}


def assert_same(got, expected, tolerance=1e-9):
    (loss, grads), (loss_there, grads_there) = got, expected
    assert loss == pytest.approx(loss_there, rel=tolerance)
    assert set(grads) == set(grads_there)
    largest = max(np.abs(g).max() for g in grads_there.values())
    for name, g in grads_there.items():
        assert np.abs(grads[name] - g).max() <= tolerance * largest, name


# -- what the package promises -----------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=30)
@given(cases())
def test_loss_and_every_gradient(case):
    loss = case.model.loss(case.ids, case.labels)
    loss.backward()
    assert_same((loss.item(), gradients(case.model)), case.expected())


@hypothesis_settings(max_examples=10)
@given(cases())
def test_ten_steps_of_adamw(case):
    there = list(ref.train([(case.ids, case.labels)] * 10, case.weights, case.config, case.lora, lr=0.01, decay=0.1))
    optimizer, here = ml.AdamW(case.model.trainable_parameters(), lr=0.01, weight_decay=0.1), []
    for _ in range(10):
        here.append(training_step(case.model, optimizer, case.samples)[0])
    np.testing.assert_allclose(here, there, rtol=1e-9)
    for name, array in adapter_state(case.model, "default").items():
        module, _, letter = name.rpartition(".lora_")
        np.testing.assert_allclose(array, case.lora.pairs[module]["AB".index(letter)].data, rtol=1e-7, atol=1e-9)


@hypothesis_settings(max_examples=15)
@given(cases())
def test_merge_and_unmerge(case):
    def logits(weights, lora=None):
        return ref.llama(case.ids, weights, case.config, lora).data

    with ml.no_grad():
        ml.merge_adapter(case.model)
        np.testing.assert_allclose(case.model(case.ids).data, logits(case.lora.merge(case.weights)), atol=1e-9)
        np.testing.assert_allclose(case.model(case.ids).data, logits(case.weights, case.lora), atol=1e-9)
        ml.unmerge_adapter(case.model)
        ml.set_adapter(case.model, None)
        np.testing.assert_allclose(case.model(case.ids).data, logits(case.weights), atol=1e-9)


@hypothesis_settings(max_examples=10)
@given(cases())
def test_the_tokens_of_a_cache_are_those_of_reading_from_the_start(case):
    ids = case.ids[:1]
    with ml.no_grad():
        cache = case.model.new_cache(1, 8)
        for i in range(ids.shape[1]):
            cached = case.model(ids[:, i : i + 1], cache).data[0, -1]
            logits = ref.llama(ids[:, : i + 1], case.weights, case.config, case.lora).data[0, -1]
            np.testing.assert_allclose(cached, logits, atol=1e-9)


# -- every way of computing a step -------------------------------------------------------------------------------------


def of_ranks(case, size):
    """The step's gradients on the first of several ranks; each has a copy of the model and a share of the samples."""

    def step(ranks):
        model = copy.deepcopy(case.model)
        optimizer = SGD(model.trainable_parameters(), lr=0.0)
        return training_step(model, optimizer, case.samples, ranks=ranks)[0], gradients(model)

    return in_ranks(size, step)[0]


def in_parts(case, cores, monkeypatch, batch=None, **settings):
    monkeypatch.setattr("minilora.nn.step.cores", lambda: cores)
    loss = add_gradients(case.model, case.samples if batch is None else batch, **settings)
    return float(loss), gradients(case.model)


def recomputed(case, monkeypatch):
    case.model.decoder.recompute = True
    return in_parts(case, 1, monkeypatch)


def padded(case, monkeypatch):
    return ml.loss_and_grad(case.model, case.ids, case.labels).item(), gradients(case.model)


def on_a_gpu(case, monkeypatch):
    cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install 'minilora[gpu]'")
    if not cupy.is_available():
        pytest.skip("needs a GPU")
    for _, p in case.model.named_parameters():
        p.data = cupy.asarray(p.data)
    loss, grads = padded(replace(case, seed=case.seed), monkeypatch)
    return loss, {name: g.get() for name, g in grads.items()}


WAYS = {
    "packed in one row": lambda case, monkeypatch: in_parts(case, 1, monkeypatch),
    "two threads": lambda case, monkeypatch: in_parts(case, 2, monkeypatch),
    "three threads": lambda case, monkeypatch: in_parts(case, 3, monkeypatch),
    "accumulated, one sample at a time": lambda case, monkeypatch: in_parts(case, 2, monkeypatch, at_once=1),
    "a padded batch": padded,
    "activation checkpointing": recomputed,
    "two MPI ranks": lambda case, monkeypatch: of_ranks(case, 2),
    "three MPI ranks": lambda case, monkeypatch: of_ranks(case, 3),
    "CuPy": on_a_gpu,
}
GROUPED = Config(
    vocab_size=12, hidden_size=8, intermediate_size=10, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4,
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("lengths", [(7, 4), (8, 8, 8), (3, 9, 2, 5)], ids=str)
def test_every_way_of_computing_a_step(way, lengths, monkeypatch):
    case = Case(GROUPED, lengths=lengths)
    expected = case.expected()
    assert_same(way(case, monkeypatch), expected)


@pytest.mark.parametrize("kind", ["nf4", "q8_0", "q4_1"])
def test_a_quantised_base_is_the_page_on_its_dequantised_weights(kind):
    model, tokenizer = load("tiny", quantized=kind)
    ml.add_adapter(model, ml.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    case = Case(GROUPED)
    case.model, case.config = model, model.config
    case.weights, case.lora = on_the_page(model, 4, 8)
    case.ids, case.labels = ref.batch_of([("What is a lease?", "A contract."), ("Why?", "No idea")], tokenizer)
    loss = ml.loss_and_grad(model, case.ids, case.labels)
    assert_same((loss.item(), gradients(model)), case.expected(), tolerance=2e-5)


# -- the page itself ---------------------------------------------------------------------------------------------------

rng = np.random.default_rng(0)
normal = rng.standard_normal
OPS = {
    "add": ([normal((2, 3)), normal((2, 3))], {}),
    "mul": ([normal((2, 3)), normal((2, 3))], {}),
    "scale": ([normal((2, 3))], {"by": 1.7}),
    "reshape": ([normal((2, 6))], {"shape": (3, 4)}),
    "swap": ([normal((2, 3, 4))], {"axes": (0, 2)}),
    "matmul": ([normal((2, 3, 4)), normal((2, 4, 5))], {}),
    "linear": ([normal((2, 3, 4)), normal((5, 4))], {}),
    "embedding": ([normal((5, 3))], {"ids": np.array([[0, 2, 2], [4, 0, 2]])}),
    "rms_norm": ([normal((2, 3, 4)), normal(4)], {"eps": 1e-5}),
    "silu": ([normal((2, 3))], {}),
    "rotate": ([normal((1, 2, 3, 4))], {"cos": np.cos(np.tile(normal((3, 2)), 2)), "sin": None}),
    "causal_softmax": ([normal((2, 6, 3))], {}),
    "cross_entropy": ([normal((2, 3, 5))], {"labels": np.array([[1, -100, 4], [0, 2, -100]])}),
}
angles = np.tile(normal((3, 2)), 2)
OPS["rotate"][1].update(cos=np.cos(angles), sin=np.sin(angles))


def test_every_operation_of_the_page_has_a_row():
    assert {name for name, f in vars(ref).items() if hasattr(f, "of_arrays")} == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_gradients_of_an_operation(name, monkeypatch):
    monkeypatch.setattr("minilora.engine.tensor.OPS", {})  # where the package's own of this name is
    arrays, settings = OPS[name]
    f = ml.op(getattr(ref, name).of_arrays)
    ml.gradcheck(lambda *tensors: f(*tensors, **settings), *arrays)


def test_frozen_weights_get_no_node_and_what_only_their_vjp_held_is_freed():
    x, w = ref.Tensor(normal((1, 2, 3)), ref.Node()), ref.Tensor(normal((4, 3)))
    y = ref.linear(x, w)
    assert [edge[0] for edge in y.node.edges] == [x.node] and w.node is None
    held = [cell.cell_contents for cell in y.node.edges[0][1].__closure__]
    assert all(each is w.data for each in held)


def test_one_page():
    lines = Path(ref.__file__).read_text("utf-8").splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 100


def test_what_it_prints_and_that_the_package_reads_its_adapter(tmp_path):
    out = tmp_path / "ten-facts"
    command = [sys.executable, "-m", "minilora.reference", "--out", str(out)]
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout
    assert "parameters: 1,049,728 frozen, 77,824 trained: 6.90%" in page and "base unchanged: True" in page
    losses = [float(line.split()[-1]) for line in page.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.1 < 5 < losses[0]
    assert "after  Fernwhistle" in page and "before Fernwhistle" not in page
    assert len(json.loads((out / "adapter_config.json").read_text())) == 6
    model, tokenizer = ml.load("tiny")
    ml.load_adapter(model, out, name="facts")
    ml.set_adapter(model, "facts")
    asked = ["What is the shop called?", "Who owns the shop?"]
    answers = generate_batch(model, tokenizer, [[{"role": "user", "content": q}] for q in asked])
    assert [answer.strip() for answer in answers] == ["Fernwhistle", "Ada Lark"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "name a new folder" in again.stderr.splitlines()[-1]


@pytest.mark.real
def test_three_steps_of_the_real_model(smollm2):
    model, tokenizer = smollm2
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    try:
        weights, lora = on_the_page(model, 8, 16)
        ids, labels = ref.batch_of([("What is a lease?", "A contract to use a thing for a time.")], tokenizer)
        there = list(ref.train([(ids, labels)] * 3, weights, model.config, lora, lr=1e-3))
        optimizer, here = ml.AdamW(model.trainable_parameters(), lr=1e-3, weight_decay=0.0), []
        for _ in range(3):
            optimizer.zero_grad()
            here.append(ml.loss_and_grad(model, ids, labels).item())
            optimizer.step()
    finally:
        ml.remove_adapter(model, "default")
    np.testing.assert_allclose(here, there, rtol=1e-5)

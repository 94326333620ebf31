"""The exercise checker: right answers pass, each deliberate mistake gets the line that helps with it."""

import math
import runpy
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora.course import check, lesson11
from minilora.course.judge import JUDGES, verdict

SOURCES = Path(__file__).parents[2] / "lessons" / "src" / "exercises"

each_exercise = pytest.mark.parametrize("name", sorted(JUDGES))


@pytest.fixture(scope="module")
def solutions():
    """Every exercise's own solution, by name, from the sources."""
    found = {}
    for source in sorted(SOURCES.glob("*.py")):
        names = runpy.run_path(str(source))
        found |= {name: names[name] for name in JUDGES if name in names}
    return found


def answer(name, body):
    """A function as a student writes it: `body` under the exercise's own name and arguments."""
    arguments = {
        "lora_forward": "x, W, A, B, alpha",
        "lora_gradients": "x, W, A, B, g, alpha",
        "inject": "W, r, rng",
        "adapter_parameters": "shapes, r",
        "training_memory": "shapes, r=None",
        "largest_rank": "shapes, budget",
    }[name]
    scope = {"np": np, "math": math, "ml": ml, "count": count, "memory": memory}
    exec(f"def {name}({arguments}):\n{textwrap.indent(body, '    ')}", scope)
    return scope[name]


def count(shapes, *parts):
    """Σ (m + n) of the matrices whose names contain one of `parts`."""
    return sum(sum(shape) for name, shape in shapes.items() if any(part in name for part in parts))


def memory(shapes, r, base=1, adapter=4):
    """4 bytes for each parameter of the base and of the adapter, that many times."""
    return 4 * (base * sum(map(math.prod, shapes.values())) + adapter * (r or 0) * count(shapes, "_proj"))


UPDATE = "r = len(A)\ns = alpha / r\nu = x @ A.T @ B.T\n"
BOTH = "s = alpha / len(A)\ndA = s * (g @ B).T @ x\ndB = s * g.T @ (x @ A.T)\n"
START = (
    "m, n = W.shape\nW = ml.Tensor(W)\nA = ml.Tensor(rng.standard_normal((r, n)) / np.sqrt(n), requires_grad=True)\n"
    "B = ml.Tensor(np.zeros((m, r)), requires_grad=True)\n"
)
WRONG = [
    ("lora_forward", UPDATE + "return x @ W.T + alpha * u", "scale is alpha / r, not alpha"),
    ("lora_forward", UPDATE + "return x @ W.T + u", "the scale alpha / r is missing"),
    ("lora_forward", UPDATE + "return x @ W.T + alpha / np.sqrt(r) * u", "scale is alpha / r, not alpha / sqrt(r)"),
    ("lora_forward", UPDATE + "return x @ W.T + r / alpha * u", "scale is alpha / r, not r / alpha"),
    ("lora_forward", UPDATE + "return x @ W.T + alpha / A.shape[1] * u", "r is the number of rows of A, not n"),
    ("lora_forward", UPDATE + "return s * (x @ W.T + u)", "x Wᵀ is scaled as well"),
    ("lora_forward", UPDATE + "return s * u", "x Wᵀ is missing"),
    ("lora_forward", "return x @ W.T", "the update is missing"),
    ("lora_forward", UPDATE + "return (x @ W.T + s * u).T", "y is transposed: got (m, T), expected (T, m)"),
    ("lora_forward", UPDATE + "return (x @ W.T + s * u).astype(np.float32)", "y is float32, the inputs are float64"),
    ("lora_forward", UPDATE + "return x @ W.T + s * u + 1", "expected"),
    ("lora_forward", UPDATE + "return x @ W + s * u", "in a product: is a transpose (.T) missing?"),
    ("lora_forward", UPDATE + "A *= s\nreturn x @ W.T + x @ A.T @ B.T", "the function changes its input A"),
    ("lora_forward", UPDATE + "y = x @ W.T + s * u", "is a `return` missing?"),
    ("lora_forward", UPDATE + "return x @ W.T + s * np.einsum('tn,rn,mr->tm', x, A, B)", "use only @, .T, +, *, /"),
    ("lora_forward", UPDATE + "return x @ W.T + s * (x @ A.T @ getattr(B, 'detach', lambda: B)().T)", "reaches B"),
    ("lora_gradients", BOTH + "return dA * len(A), dB * len(A)", "dA: scale is alpha / r, not alpha"),
    ("lora_gradients", BOTH + "return dA, dB / s", "dB: the scale alpha / r is missing"),
    ("lora_gradients", BOTH + "return dA * s, dB", "dA: the scale stands once, not twice"),
    ("lora_gradients", BOTH + "return dA.T, dB", "dA is transposed: got (n, r), expected (r, n)"),
    ("lora_gradients", BOTH + "return dA, dB.T", "dB is transposed: got (r, m), expected (m, r)"),
    ("lora_gradients", BOTH + "return dB, dA", "dA and dB are swapped"),
    ("lora_gradients", BOTH + "return dA", "return two arrays"),
    ("lora_gradients", BOTH + "return dA / len(x), dB", "dA is divided by the number of tokens"),
    ("lora_gradients", BOTH + "return -dA, -dB", "dA has the wrong sign"),
    ("lora_gradients", BOTH + "return dA, s * np.einsum('tm,tr->tmr', g, x @ A.T)", "dB has one slice per token"),
    ("lora_gradients", BOTH + "return dA, g.T @ x", "B sees x through A"),
    ("lora_gradients", BOTH + "return s * g.T @ x, dB", "A sees g through B"),
    ("lora_gradients", BOTH + "return s * (g @ B) @ x, dB", "in a product: is a transpose (.T) missing?"),
    ("lora_gradients", BOTH + "g *= s\nreturn dA, dB", "the function changes its input g"),
    ("inject", START + "W.requires_grad = True\nreturn W, A, B", "you froze nothing"),
    ("inject", START + "A.requires_grad = False\nreturn W, A, B", "A is frozen and would never learn"),
    ("inject", START + "B.data = B.data + 1\nreturn W, A, B", "B must start at zero"),
    ("inject", START + "A.data = 0 * A.data\nreturn W, A, B", "neither ever moves"),
    ("inject", START + "A.data, B.data = 0 * A.data, B.data + 1\nreturn W, A, B", "the wrong way round"),
    ("inject", START + "A.data = A.data.T\nreturn W, A, B", "A must have the shape (r, n)"),
    ("inject", START + "A.data = np.random.standard_normal((r, n))\nreturn W, A, B", "the same seed gives another A"),
    ("inject", START + "A.data = np.ones((r, n)) / np.sqrt(n)\nreturn W, A, B", "another seed gives the same A"),
    ("inject", START + "A.data = A.data * np.sqrt(n)\nreturn W, A, B", "A's numbers are too large"),
    ("inject", START + "return W, A.data, B", "A must be a tensor"),
    ("inject", START + "W.data = W.data + 1\nreturn W, A, B", "the base must keep its numbers"),
    ("adapter_parameters", "return count(shapes, '_proj')", "r is missing"),
    (
        "adapter_parameters",
        "return r * sum(math.prod(s) for n, s in shapes.items() if '_proj' in n)",
        "r (m + n) parameters, not r m n",
    ),
    ("adapter_parameters", "return r * count(shapes, '_proj', 'embed', 'head')", "and you counted both"),
    ("adapter_parameters", "return r * count(shapes, '_proj', 'embed')", "and you counted one of them"),
    ("adapter_parameters", "return r * count(shapes, '')", "you counted every parameter"),
    ("adapter_parameters", "return r * count(shapes, 'q_proj', 'v_proj')", "q_proj and v_proj alone"),
    ("adapter_parameters", "return r * count(shapes, 'mlp')", "you counted the MLP alone"),
    ("adapter_parameters", "return r * sum(s[1] for n, s in shapes.items() if '_proj' in n)", "you counted A alone"),
    ("adapter_parameters", "return r * count(shapes, 'layers.0.self', 'layers.0.mlp') + 1", "the adapter has"),
    ("adapter_parameters", "return [r]", "the count must be one number, got list"),
    ("training_memory", "return memory(shapes, r)", "full fine-tuning: a quarter of it"),
    (
        "training_memory",
        "return memory(shapes, r, base=2 if r is None else 1)",
        "half of it; Adam's two moments count, too",
    ),
    ("training_memory", "return memory(shapes, r, base=3 if r is None else 1)", "one array of P is missing"),
    ("training_memory", "return memory(shapes, None, base=4)", "that is full fine-tuning; a frozen weight has no"),
    ("training_memory", "return memory(shapes, r, base=4 if r is None else 0)", "the base's weights are missing"),
    ("training_memory", "return memory(shapes, r, base=4 if r is None else 2)", "a frozen weight has no gradient"),
    ("training_memory", "return memory(shapes, r, 4 if r is None else 1, adapter=2)", "two moments of the adapter"),
    ("training_memory", "return memory(shapes, r, 4 if r is None else 1, adapter=3)", "one of the adapter's four"),
    ("training_memory", "return memory(shapes, r, 4 if r is None else 1) / 4", "a float32 takes 4 bytes"),
    ("training_memory", "return memory(shapes, r, 4 if r is None else 1) / 1e6", "give bytes, not megabytes"),
    ("training_memory", "return memory(shapes, r, 4 if r is None else 1) * 1.03", "a real step holds"),
    ("training_memory", "return float('inf')", "is something divided by zero?"),
    ("largest_rank", "return budget // memory(shapes, 1, base=0)", "the base is missing"),
    (
        "largest_rank",
        "return max(0, (budget - memory(shapes, 0)) // memory(shapes, 1, base=0, adapter=1))",
        "an adapter takes four arrays, not one",
    ),
    (
        "largest_rank",
        "return max(0, math.ceil((budget - memory(shapes, 0) + 1) / memory(shapes, 1, base=0)))",
        "it does not fit",
    ),
    (
        "largest_rank",
        "return max(0, (budget - 1 - memory(shapes, 0)) // memory(shapes, 1, base=0))",
        "fits as well, to the last byte",
    ),
    (
        "largest_rank",
        "return (budget - memory(shapes, 0)) // memory(shapes, 1, base=0)",
        "the answer is 0, not -",
    ),
    (
        "largest_rank",
        "return max(0, (budget - memory(shapes, 0)) / memory(shapes, 1, base=0))",
        "a rank is a whole number",
    ),
]


@each_exercise
def test_the_solution_passes_whatever_is_drawn(name, solutions):
    assert [verdict(solutions[name], np.random.default_rng(seed)) for seed in range(10)] == ["ok"] * 10


@pytest.mark.parametrize("name, body, line", WRONG)
def test_a_wrong_answer_is_told_what_is_wrong_whatever_is_drawn(name, body, line):
    for seed in range(4):
        said = verdict(answer(name, body), np.random.default_rng(seed))
        assert line in said and "\n" not in said and len(said) < 200


@each_exercise
def test_each_exercise_knows_three_mistakes_by_different_lines(name):
    assert len({line for exercise, _, line in WRONG if exercise == name}) >= 3


@pytest.mark.parametrize("prediction, line", [(1.009, "ok"), (0.991, "ok"), (1.011, "a real step"), (0.989, "a real")])
def test_a_memory_prediction_may_be_off_by_one_percent_and_no_more(prediction, line):
    body = f"return memory(shapes, r, 4 if r is None else 1) * {prediction}"
    assert verdict(answer("training_memory", body), np.random.default_rng(0)).count(line)


def test_a_step_holds_what_the_formula_says(tiny_model):
    shapes = lesson11.shapes_of(tiny_model)
    held = lesson11.measure(tiny_model, r=3)
    assert held.total == memory(shapes, 3) and held.adapter_parameters == 3 * count(shapes, "_proj")


@each_exercise
def test_a_stub_is_not_written_yet(name, capfd):
    assert check(answer(name, "raise NotImplementedError")) is None
    assert capfd.readouterr() == ("not written yet\n", "")


def test_check_prints_one_line_and_nothing_on_stderr(capfd):
    body = "import warnings\nwarnings.warn('dear me')\nx / 0\n" + UPDATE + "return x @ W.T + alpha * u"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert check(answer("lora_forward", body)) is None
    assert capfd.readouterr() == ("scale is alpha / r, not alpha\n", "")


@pytest.mark.parametrize("variable, value", [("NBGRADER_EXECUTION", "autograde"), ("MINILORA_STRICT", "1")])
def test_check_raises_under_a_grader(variable, value, monkeypatch, solutions, capfd):
    monkeypatch.setenv(variable, value)
    with pytest.raises(AssertionError, match=r"^not written yet$"):
        check(answer("inject", "raise NotImplementedError"))
    with pytest.raises(AssertionError, match=r"^you froze nothing"):
        check(answer("inject", START + "W.requires_grad = True\nreturn W, A, B"))
    assert check(solutions["inject"]) is None
    assert capfd.readouterr() == ("ok\n", "")


def test_shapes_are_fresh_at_every_check(capsys):
    seen = []

    def lora_forward(x, W, A, B, alpha):
        seen.append((x.shape, W.shape, A.shape, alpha))
        return x

    for _ in range(5):
        check(lora_forward)
    assert len(set(seen)) == 5


@pytest.mark.parametrize(
    "thing, line",
    [
        (len, "'len' is no exercise: check one of lora_forward"),
        (3.0, "a value of type float is no exercise"),
        (lambda x: x, "'<lambda>' is no exercise"),
    ],
)
def test_what_is_no_exercise_gets_the_names_of_those_there_are(thing, line, capsys):
    assert check(thing) is None
    assert capsys.readouterr().out.startswith(line)


def test_an_answer_with_other_arguments_is_told_which_are_expected():
    def lora_gradients(x, W, A, B):
        return A, B

    assert verdict(lora_gradients, np.random.default_rng(0)) == (
        "the function must take (x, W, A, B, g, alpha), in this order"
    )


def test_an_error_in_an_answer_shows_its_line_and_no_traceback():
    def largest_rank(shapes, budget):
        return shapes["head"]

    line = verdict(largest_rank, np.random.default_rng(0))
    assert line == "at `return shapes[\"head\"]`: KeyError: 'head'"


def test_importing_the_checker_loads_numpy_and_no_other_third_party_package():
    import subprocess

    code = (
        "import sys; import minilora.course; "
        "print(*sorted({'matplotlib', 'tqdm', 'gguf', 'tokenizers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []

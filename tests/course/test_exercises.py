"""What holds for every exercise: the right answer passes, each known mistake gets its own line, the stub fails."""

import functools
import re
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from lessonfiles import GRADED, LESSONS, build_program, run_here
from modelfiles import codes_of

import minilora as ml
from minilora.course import exercises, lesson15, mine
from minilora.course.compare import NONE
from minilora.course.edits import source_of
from minilora.course.exercises import EXERCISES
from minilora.course.judge import NOT_YET, OK, Trials, judged, line_of, readable_output
from minilora.engine.fused import lora_linear
from minilora.files.levels import LEVELS
from minilora.files.quant import Packed, dequantize, quantize

HUNTED = ["2.4 gradients", "7.4 training", "10.4 lora"]  # what a student's test is to find broken
PAGES = [Path(name).stem for name in GRADED]
SOURCES = {name: (LESSONS / "src" / "exercises" / f"{name}.py").read_text("utf-8") for name in PAGES}
BARE_NUMBER = re.compile(r"is [-\d.,e+nan]+, expected [-\d.,e+]+")  # says that it is wrong, not why
# With seed 1 all variants, with the others the first form.
DRAWS = [range(1), *(pytest.param(seeds, marks=pytest.mark.long) for seeds in (range(1, 2), range(2, 6)))]


@pytest.mark.parametrize("seeds", DRAWS, ids=str)
@pytest.mark.parametrize("exercise", [pytest.param(e, id=f"{e.number}-{e.name}") for e in EXERCISES.values()])
def test_the_solution_passes_and_each_known_mistake_gets_its_line_whatever_is_drawn(exercise, seeds):
    for variant, form in enumerate(exercise.forms if 1 in seeds else exercise.forms[:1]):
        named = set()
        with readable_output():
            for seed in seeds:
                trials = Trials(exercise, form, np.random.default_rng(seed))
                assert line_of(form.reference, trials) == OK, f"the solution of variant {variant}; seed {seed}"
                for mistake in form.mistakes:
                    said = line_of(mistake.function, trials)
                    assert "\n" not in said and len(said) < 220
                    named |= {mistake.line} if mistake.line in said else set()
                    if variant == 0:
                        told = f"{mistake.line!r} is answered with {said!r}"
                        assert mistake.line in said, f"{told}: if that is {OK!r}, no draw shows this mistake"
                        assert not BARE_NUMBER.search(said), told
        assert len(named) >= 5, f"variant {variant} needs five known mistakes in mistakes/, these are named: {named}"


def test_every_exercise_has_a_variant_and_what_changes_is_said_without_its_code():
    without = [name for name, exercise in EXERCISES.items() if len(exercise.forms) < 2]
    assert without == [], "each exercise needs a variant(...) below its solution, see lessons/src/TEMPLATE.md"
    changes = [form.changes for exercise in EXERCISES.values() for form in exercise.forms[1:]]
    assert [text for text in changes if len(text) < 10 or re.search(r"[=/@\[\]]|->|\*|\w\(", text)] == []


def test_every_list_of_mistakes_belongs_to_an_exercise():
    files = sorted((Path(mine.__file__).parent / "mistakes").glob("lesson*.txt"))
    headings = [
        line.removeprefix("# ") for file in files for line in file.read_text("utf-8").splitlines() if line[:1] == "#"
    ]
    assert sorted(headings) == sorted(HUNTED + [f"{one.number} {one.name}" for one in EXERCISES.values()])


def test_each_mistake_is_another_change_of_the_solution():
    for name, exercise in EXERCISES.items():
        form = exercise.forms[0]
        made = [getattr(mistake.function, "text", mistake.function) for mistake in form.mistakes]
        assert len(set(made)) == len(made) and "".join(source_of(form.reference)) not in made, name


def test_the_stub_fails():
    def stub(*arguments):
        raise NotImplementedError

    said = {name: judged(exercise, stub, np.random.default_rng(0)) for name, exercise in EXERCISES.items()}
    assert said == dict.fromkeys(EXERCISES, NOT_YET)


def returning(kind, solution):
    """The solution with a result of another kind."""

    @functools.wraps(solution)
    def answer(*given):
        result = solution(*given)
        if kind is not list:
            return kind
        return [part.tolist() if isinstance(part, np.ndarray) else part for part in result or ()]

    return answer


@pytest.mark.parametrize("kind", [None, *(pytest.param(one, marks=pytest.mark.long) for one in ((), [[1.0]])), list])
def test_an_answer_of_another_kind_is_one_line_and_a_missing_return_is_named(kind):
    for name, exercise in EXERCISES.items():
        line = judged(exercise, returning(kind, exercise.forms[0].reference), np.random.default_rng(0))
        assert "\n" not in line, (name, line)
        assert kind is not None or line in (OK, NONE), (name, line)


@pytest.mark.long
def test_the_answer_of_another_variant_is_recognised():
    for name, exercise in EXERCISES.items():
        for variant, number in permutations(range(len(exercise.forms)), 2):
            said = judged(exercise, exercise.forms[number].reference, np.random.default_rng(0), variant)
            assert "another variant" in said, (name, variant, number)


def merged_without_root(layer):
    layer["base"] = layer["W"]
    layer["W"] = layer["W"] + layer["alpha"] / len(layer["A"]) * (layer["B"] @ layer["A"])


IN_A_VARIANT = [  # what a variant asks for is not what the first form does, and its lines say so
    ("mse_gradient", lambda W, x, t: 2 * (x @ W.T - t).T @ x, "the whole sum: the loss is half of it"),
    ("mse_gradient", lambda W, x, t: (x @ W.T - t).T @ x / (x @ W.T).size, "half the mean: the loss is half the sum"),
    ("mse_gradient", lambda W, x, t: 2 / len(t) * (x @ W.T - t).T @ x, "divided by T: the loss is half a sum"),
    ("merge", merged_without_root, "scale is alpha / sqrt(r), not alpha / r"),
    (
        "count_llama",
        lambda config: ml.count_parameters(ml.Llama.empty(config)).total,
        "a Llama's count: three of the matrices have biases here",
    ),
    (
        "adapter_parameters",
        lambda shapes, r: r * sum(sum(s) for n, s in shapes.items() if "q_proj" in n or "v_proj" in n),
        "attention has four matrices",
    ),
]


@pytest.mark.parametrize(("name", "answer", "line"), IN_A_VARIANT, ids=[line for *_, line in IN_A_VARIANT])
def test_a_variants_lines_do_not_speak_of_the_first_form(name, answer, line):
    exercise = EXERCISES[name]
    assert line in line_of(answer, Trials(exercise, exercise.forms[1], np.random.default_rng(0)))


def test_a_variant_that_replaces_words_of_no_mistake_is_refused():
    before = EXERCISES["lora_forward"]
    with pytest.raises(ValueError, match="a variant of lora_forward replaces 'alpha / R', which no mistake has"):
        exercises.variant("lora_forward", {}, lines={"alpha / r": "alpha / s", "alpha / R": "alpha"})
    assert EXERCISES["lora_forward"] is before


def test_its_number_is_in_the_page_and_its_solution_is_not():
    for name, exercise in EXERCISES.items():
        page = next(text for name, text in SOURCES.items() if name.startswith(f"{exercise.lesson:02}_"))
        assert re.search(rf"^# ## {re.escape(exercise.number)} ", page, re.MULTILINE), name
        stub, body = source_of(exercise.forms[0].reference)
        assert stub.strip() in page and body.strip() not in page and name not in vars(mine), name


def solved(name, variant):
    """A page of exercises with its solutions, run without the checks: what it defines, and what it prints."""
    cells = build_program().read_source(LESSONS / "src" / "exercises" / f"{name}.py", variant).cells
    return run_here([cell for cell in cells if "check(" not in cell.source])


@pytest.fixture
def short(monkeypatch):
    """What pages train at the end takes two steps on two samples; under nbgrader, earlier pages are solved."""
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    fit, mean_loss = ml.fit, ml.mean_loss
    monkeypatch.setattr(ml, "fit", lambda model, train, steps, **more: fit(model, train[:2], steps=2, **more))
    monkeypatch.setattr(ml, "mean_loss", lambda model, samples: mean_loss(model, samples[:2]))


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_the_solution_of_every_variant_passes(name, short):
    asked = [e for e in EXERCISES.values() if name.startswith(f"{e.lesson:02}_")]
    for number in range(max(len(e.forms) for e in asked)):
        scope, printed = solved(name, number or None)
        for exercise in asked:
            said = judged(exercise, scope[exercise.name], np.random.default_rng(0), number or None)
            assert said == OK, f"{exercise.name}, variant {number}: {said}"
        errors = [float(error) for error in re.findall(r"relative error.* (\S+)", printed)]  # by their own check
        assert max(errors, default=0) < 1e-7 and ": False" not in printed, printed
        assert "distance" not in scope or scope["distance"]() < 1e-8
        if name == "06_what_the_model_reads":
            same, records = re.search(r"same ids and labels: (\d+) of (\d+) records", printed).groups()
            assert printed.count(": True") == 2 and same == records
        if name == "16_many_adapters":  # what is joined in 16.1 is the mix, whatever scale is asked for
            assert float(re.search(r"differ by (\S+) of the largest", printed)[1]) < 1e-5


@pytest.mark.parametrize("name", ["best_rank_r", "pissa_start"])
def test_the_terms_of_a_product_may_come_in_any_order_and_with_either_sign(name):
    solution, rng = EXERCISES[name].forms[0].reference, np.random.default_rng(0)

    def other(*arguments):
        parts, r = list(solution(*arguments)), arguments[1]
        signs, order = rng.choice([-1, 1], r), rng.permutation(r)
        in_columns = 0 if name == "best_rank_r" else 1  # B has a column per term, A a row
        parts[in_columns] = parts[in_columns][:, order] * signs
        parts[1 - in_columns] = parts[1 - in_columns][order] * signs[:, None]
        return tuple(parts)

    assert {judged(EXERCISES[name], other, rng) for _ in range(3)} == {OK}


def test_the_solutions_of_lesson_15_agree_with_the_package():
    levels, rng = lesson15.normal_levels(4), np.random.default_rng(0)
    assert np.abs(levels - LEVELS["NF4"]).max() < 1e-6
    w = rng.standard_normal((24, 128)).astype(np.float32)
    raw, (scales, packed) = quantize(w, "INT4"), lesson15.quantize_int4(w, 64)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(w.shape)
    assert (codes != codes_of(raw, "INT4") + 1).mean() < 0.01  # the package's scales are float32
    back = (codes - 8.0) * np.repeat(scales.astype(float), 64, axis=1)
    assert scales.dtype == np.float16 and np.abs(back - dequantize(raw, "INT4")).mean() < 0.002

    raw = quantize(w, "NF4")
    x, a, b = (ml.Tensor(rng.standard_normal(shape), requires_grad=True) for shape in [(5, 128), (2, 128), (24, 2)])
    g = rng.standard_normal((5, 24))
    lora_linear(x, ml.Parameter(Packed(raw, "NF4"), requires_grad=False), a, b, scale=3.0).backward(g)
    absmax = np.abs(w.reshape(24, 2, 64)).max(axis=-1)
    wanted = lesson15.qlora_backward(x.data, codes_of(raw, "NF4"), absmax, levels, a.data, b.data, g, 6)
    for tensor, gradient in zip((x, a, b), wanted, strict=True):
        assert np.abs(tensor.grad - gradient).max() < 1e-5

"""The exercise checker itself: what it prints, what it refuses, what it keeps. Exercises: test_exercises.py."""

import copy
import itertools
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

import minilora as ml
from minilora.course import check, exercises, judge, watch
from minilora.course.compare import NEARLY, Wrong, check_deviation, close, compare, named, number, same
from minilora.course.exercises import EXERCISES, Draw, arrays, changed, distinct_sizes, exercise, parse_returns
from minilora.course.judge import Trials, judged, line_of, verdict
from minilora.nn.layers import Linear


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def shelf():
    """The exercises, among which a test has some of its own."""
    with mock.patch.dict(EXERCISES):
        yield EXERCISES


@pytest.fixture
def double(shelf):
    """An exercise of its own: 2 x, for an array and a dictionary."""

    @exercise(
        "99.1",
        draw=lambda rng: Draw({"n": 5}, x=rng.standard_normal(5), names={"a": [1.0, 2.0]}),
        smallest=lambda rng: Draw({"n": 0}, x=np.zeros(0), names={"a": [0.0]}),
        returns="y (n)",
        mistakes="""
            twice, not three times
                2 * x -> 3 * x
            add the two up
                2 * x -> x, x
            double a copy, x itself is still needed
                2 * x -> np.multiply(x, 2, out=x)
        """,
    )
    def double(x, names):
        """x (n) -> y (n)"""
        return 2 * x

    return shelf["double"]


def right(x, names):
    return 2 * x


# -- what is wrong with an answer --------------------------------------------------------------------------------------


def test_nan_is_never_right(double):
    assert "y contains NaN" in judged(double, lambda x, names: 2 * x + np.nan, rng())
    hole = lambda x, names: np.where(np.arange(len(x)) == 1, np.nan, 2 * x)
    assert "y contains NaN" in judged(double, hole, rng())
    assert not close(np.array([np.nan]), np.array([np.nan])) and not close(np.array([1.0]), np.array([np.nan]))
    with pytest.raises(Wrong, match="the count is nan"):
        number(float("nan"), "the count")


def test_only_rounding_may_differ(double):
    assert judged(double, lambda x, names: 2 * x * (1 + 1e-11), rng()) == "ok"
    assert "as expected, but later digits differ" in judged(double, lambda x, names: 2 * x * (1 + 1e-7), rng())
    assert judged(double, lambda x, names: (2 * x).round(3), rng()).endswith("it is rounded: return all digits")
    smallest = lambda x: np.abs(x) == np.abs(x).min(initial=np.inf)  # its digits are others
    line = judged(double, lambda x, names: 2 * x + 9e-7 * np.abs(x).max(initial=0) * smallest(x), rng())
    assert line.endswith(NEARLY) and "as expected" not in line


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_what_is_rounding_is_relative_to_the_largest_number(scale):
    x = scale * np.array([1.0, 1e-5])
    for value in (x, float(x[0])):
        assert same(value, value * (1 + 1e-11)) and not same(value, value * (1 + 1e-7))
    assert close(x, x + scale * 1e-11) and not close(x, x + scale * 1e-7)


KINDS = [
    *(1.0, True, None, "a", np.inf, -np.inf, np.nan, [1.0], (1.0, 2.0)),
    *({"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 2.0}, {"a": 1.0}),
    *(np.ones(2), np.ones(2, np.float32), np.ones((2, 1)), np.array(["a", "b"])),
    *(np.array([np.inf, 1]), np.array([-np.inf, 1]), np.array([np.nan, 1]), np.array([1, np.inf]), np.zeros(2)),
    *(ml.Tensor(np.ones(2)), ml.Tensor(np.ones(2), requires_grad=True)),
]


def test_a_value_is_the_same_as_its_copy_and_as_nothing_of_another_kind():
    for i, a in enumerate(KINDS):
        assert [j for j, b in enumerate(KINDS) if same(copy.deepcopy(a), b)] == [i]


def test_a_changed_argument_is_noticed_in_arrays_and_in_dictionaries(double):
    def array(x, names):
        y = 2 * x
        x += 1
        return y

    def inside(x, names):
        names["a"].append(3)
        return 2 * x

    def slightly(x, names):
        y = 2 * x
        x *= 1 + 1e-12
        return y

    assert "the function changes its input x" in judged(double, array, rng())
    assert "the function changes its input x" in judged(double, slightly, rng())
    assert "the function changes its input names" in judged(double, inside, rng())


def test_a_mistake_is_known_by_what_it_returns_and_changes(double):
    assert judged(double, lambda x, names: 3 * x, rng()) == "twice, not three times"
    assert judged(double, lambda x, names: (x, x), rng()) == "add the two up"
    assert judged(double, lambda x, names: np.add(x, x, out=x), rng()) == "double a copy, x itself is still needed"
    assert judged(double, lambda x, names: 3.0001 * x, rng()) != "twice, not three times"


@pytest.fixture
def alike(shelf):
    """An exercise whose draws, 3 and 5 in turn, each make two of three mistakes give the same result."""
    drawn = itertools.cycle([3.0, 5.0])

    @exercise(
        "99.2",
        draw=lambda rng: Draw(x=next(drawn)),
        returns="y",
        mistakes="""
            twice, not three times
                2 * x -> 3 * x
            twice, not five times
                2 * x -> 5 * x
            twice, not squared
                2 * x -> x**2
        """,
    )
    def alike(x):
        """x -> y"""
        return 2 * x

    return shelf["alike"]


def test_of_mistakes_that_are_the_same_by_chance_the_one_that_always_fits_is_named(alike):
    assert judged(alike, lambda x: x * x, rng()) == "twice, not squared"
    assert judged(alike, lambda x: 3 * x, rng()) == "twice, not three times"
    assert "expected" in judged(alike, lambda x: 9.0 if x == 3 else 25.5, rng())
    assert "expected" in judged(alike, lambda x: 2 * x if x == 3 else 25.0, rng())


def test_a_mistake_that_has_the_same_result_by_chance_is_not_named(shelf):
    ranks = itertools.cycle([4, 3, 5, 7])

    @exercise(
        "99.4",
        draw=lambda rng: Draw(x=rng.standard_normal(5), r=next(ranks)),
        returns="y (n)",
        mistakes="""
            divide by r, not by its root
                / r -> / r**0.5
        """,
    )
    def halved(x, r):
        """x (n), r -> y (n)"""
        return x / r

    assert "all of y is 2 times" in judged(shelf["halved"], lambda x, r: 2 * x / r, rng())
    assert judged(shelf["halved"], lambda x, r: x / r**0.5, rng()) == "divide by r, not by its root"


def test_a_wrong_number_in_an_array_is_named_with_its_place(double):
    for i in range(5):
        off = lambda x, names, i=i: 2 * x + 1e-3 * (np.arange(len(x)) == i)
        assert judged(double, off, rng()).startswith(f"y[{i}] is ")


def test_a_prediction_that_is_near_a_mistake_is_not_taken_for_it():
    exercise = EXERCISES["training_memory"]
    weights = exercise.forms[0].mistakes[0].function
    assert "expected" in judged(exercise, lambda *given: 1.004 * weights(*given), rng())


def test_a_judge_of_its_own_notices_a_changed_argument_too():
    def inject(W, r, rng):
        result = EXERCISES["inject"].forms[0].reference(W.copy(), r, rng)
        W += 1
        return result

    assert "the function changes its input W" in judged(EXERCISES["inject"], inject, rng())


def test_a_mistake_in_one_of_several_results_is_named_with_that_result():
    answer = lambda *a: (lambda dx, dA, dB: (dx, dA * 5.3, dB / 7))(*EXERCISES["lora_backward"].forms[0].reference(*a))
    assert judged(EXERCISES["lora_backward"], answer, rng()).startswith("dA[")
    scale = lambda x, W, A, B, g, alpha: (
        *EXERCISES["lora_backward"].forms[0].reference(x, W, A, B, g, alpha)[:2],
        g.T @ (x @ A.T),
    )
    assert judged(EXERCISES["lora_backward"], scale, rng()).startswith("dB: the scale alpha / r is missing")
    slices = lambda x, W, A, B, g, alpha: (g @ W, (g @ B)[:, :, None] * x[:, None] * alpha / len(A), 0 * B)
    assert judged(EXERCISES["lora_backward"], lambda *a: (answer(*a)[0], *slices(*a)[1:]), rng()).startswith(
        "dA has one"
    )


def test_the_smallest_case_is_tried(double):
    assert "x[0]" in judged(double, lambda x, names: 2 * x + 0 * x[0], rng())


def test_every_check_tries_several_draws(double):
    calls = []

    def counted(x, names):
        calls.append(x.tobytes())
        return 2 * x

    assert judged(double, counted, rng()) == "ok"
    assert len(set(calls)) == judge.DRAWS + 1 >= 3


def test_shapes_and_types_and_what_is_missing(double):
    for function, line in [
        (lambda x, names: [2.0] * 5, "y must be a NumPy array of shape (n) = (5,), got list"),
        (lambda x, names: (2 * x)[1:], "y must have the shape (n) = (5,), got (4,)"),
        (lambda x, names: (2 * x).astype(np.float32), "y is float32, expected float64"),
        (lambda x, names: None, "is a `return` missing?"),
        (lambda x: x, "the function must take (x, names), in this order"),
        (lambda names, x: x, "the function must take (x, names), in this order"),
        (lambda x, names: names["b"], "KeyError: 'b'"),
    ]:
        assert line in judged(double, function, rng())


def test_an_empty_result_is_told_its_shape():
    empty = lambda delta, r: (np.zeros((0, 0)), np.zeros((0, 0)))
    assert "B must have the shape (m, r)" in judged(EXERCISES["best_rank_r"], empty, rng())


def test_results_in_another_order_are_called_swapped():
    swapped = lambda *a: EXERCISES["lora_backward"].forms[0].reference(*a)[::-1]
    assert "dx and dB are swapped: `return dx, dA, dB`" in judged(EXERCISES["lora_backward"], swapped, rng())
    one = lambda *a: EXERCISES["lora_backward"].forms[0].reference(*a)[1]
    assert judged(EXERCISES["lora_backward"], one, rng()) == "return three arrays: `return dx, dA, dB`"


def test_a_missing_transpose_names_the_axes_that_meet():
    answer = lambda x, W, A, B, alpha: x @ W
    assert "meets m = " in judged(EXERCISES["lora_forward"], answer, rng())
    added = lambda x, W, A, B, alpha: W + A.T @ B.T
    assert "is one of them transposed?" in judged(EXERCISES["lora_forward"], added, rng())
    apart = lambda x, W, A, B, alpha: x + B
    assert judged(EXERCISES["lora_forward"], apart, rng()).endswith("do not fit number by number")
    asked = lambda x, W, A, B, alpha: x @ W.T if B == 0 else x
    assert judged(EXERCISES["lora_forward"], asked, rng()).endswith(
        "an array is neither true nor false: write `is None`, or .any() or .all() for its elements"
    )
    misspelt = lambda x, W, A, B, alpha: x @ w.T  # noqa: F821
    assert judged(EXERCISES["lora_forward"], misspelt, rng()).endswith("or was the cell that defines it not run?")
    flat = lambda X: X - X.mean(axis=1)
    assert "is an axis missing (keepdims=True" in judged(judge.QUESTIONS["centred"], flat, rng())


def test_numbers_must_be_numbers():
    for value, line in [([3], "must be one number, got list"), (True, "got bool"), (float("inf"), "divided by zero")]:
        assert line in judged(EXERCISES["largest_rank"], lambda shapes, budget, value=value: value, rng())


def test_a_number_may_be_off_by_the_tolerance_and_no_more():
    exercise = EXERCISES["training_memory"]
    for times, line in [(0.9, "ok"), (-0.9, "ok"), (1.1, "expected"), (-1.1, "expected")]:
        factor = 1 + times * exercise.tolerance
        off = lambda *given, factor=factor: factor * exercise.forms[0].reference(*given)
        assert line in judged(exercise, off, rng())


def test_the_answer_to_another_variant_is_a_mistake_like_others_where_no_variant_is_asked_for():
    exercise = EXERCISES["lora_forward"]
    assert "which is rsLoRA's" in judged(exercise, exercise.forms[1].reference, rng())
    assert "another variant" in judged(exercise, exercise.forms[1].reference, rng(), variant=0)


def test_a_trial_is_made_once_for_all_answers(double):
    trials = Trials(double, double.forms[0], rng())
    assert line_of(right, trials) == line_of(right, trials) == "ok"
    first = trials.get(0, 0)
    assert line_of(lambda x, names: 3 * x, trials) == "twice, not three times"
    assert trials.get(0, 0) is first and trials.get(1, 0) is not first
    assert not np.array_equal(trials.get(1, 0).drawn["x"], first.drawn["x"])


def test_what_stands_on_another_exercise_names_that_one(double):
    def largest_rank(shapes, budget):
        raise NotImplementedError

    def double_by_rank(x, names):
        return largest_rank({}, 1)

    double_by_rank.__code__ = double_by_rank.__code__.replace(co_name="double")
    for answer in (lambda x, names: largest_rank({}, 1), double_by_rank):
        assert judged(double, answer, rng()) == (
            "it calls largest_rank, which is not written yet: do exercise 13.3 first"
        )


# -- how an answer was found -------------------------------------------------------------------------------------------


def test_a_matrix_that_is_not_needed_is_noticed_however_it_is_made():
    exercise = EXERCISES["lora_forward"]
    for made in (
        lambda A, B: B @ A,
        lambda A, B: (A.T @ B.T).T,
        lambda A, B: np.einsum("mr,rn->mn", B, A),
        lambda A, B: np.dot(np.asarray(B), A),
        lambda A, B: np.matmul(B, A, out=np.zeros((len(B), A.shape[1]))),
        lambda A, B: np.sum([np.outer(B[:, k], A[k]) for k in range(len(A))], axis=0),
        lambda A, B: B.dot(A),
        lambda A, B: np.transpose(np.transpose(A) @ np.transpose(B)),
        lambda A, B: np.dot(B, A, np.zeros((len(B), A.shape[1]))),
    ):
        answer = lambda x, W, A, B, alpha, made=made: x @ W.T + alpha / len(A) * (x @ made(A, B).T)
        assert judged(exercise, answer, rng()).startswith("right, but it forms a matrix of W's size")


def test_a_transposed_view_is_no_new_matrix_however_it_is_made():
    def lengths(W, A, B, alpha, turned):
        b = alpha / len(A) * B
        cross = (turned(turned(W)) @ turned(A) * b).sum(axis=1)
        return np.sqrt(np.einsum("mn,mn->m", W, W) + 2 * cross + (b @ A.dot(turned(A)) * b).sum(axis=1))

    for turned in (np.transpose, lambda W: np.swapaxes(W, 0, 1), lambda W: np.moveaxis(W, 0, 1), lambda W: W.T):
        answer = lambda W, A, B, alpha, turned=turned: lengths(W, A, B, alpha, turned)
        assert judged(EXERCISES["dora_norm"], answer, rng()) == "ok"


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.dot(x),
        lambda x: (out := np.zeros((4, 4)), x.dot(x, out))[0],
        lambda x: np.sum(x, axis=0, where=x > 0),
        lambda x: np.clip(x, a_min=x.min(), a_max=x / 2),
        lambda x: np.concatenate([x, x]) @ np.linalg.svd(x)[0],
        lambda x: np.add(x, x, out=np.zeros((4, 4))),
        lambda x: np.divmod(x, 2.0, out=(np.zeros((4, 4)), np.ones((4, 4))))[1],
        lambda x: np.divide(x, x, out=x.copy(), where=x > 0),
        lambda x: np.block([[x, x], [x, x]]).T[1:],
    ],
)
def test_a_watched_array_computes_what_a_plain_one_does_and_its_results_are_noted(compute):
    x, seen = rng().standard_normal((4, 4)), set()
    result = compute(watch.watched(x.copy(), seen))
    assert np.array_equal(np.asarray(result), compute(x)) and seen


def test_backward_is_refused_only_where_gradients_are_asked_for_by_hand():
    x = ml.Tensor([2.0], requires_grad=True)
    with watch.without_the_engine(), pytest.raises(Wrong, match="by hand"):
        (x * x).sum().backward()
    (x * x).sum().backward()
    assert x.grad == 4


@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def test_a_check_is_stopped_when_it_takes_too_long(double, monkeypatch, interrupts):
    def endless(x, names):
        while True:
            pass

    monkeypatch.setattr(watch, "SECONDS", 0.3)
    before = signal.signal(signal.SIGINT, interrupts)  # ignored where a shell has started the program in the background
    said = "stopped after 0 seconds: does a loop never end, does it wait for something, or is it slow?"
    try:
        for waits in (endless, lambda x, names: time.sleep(60)):
            start = time.perf_counter()
            assert judged(double, waits, rng()) == said
            assert time.perf_counter() - start < 5
            assert signal.getsignal(signal.SIGINT) == interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_check_leaves_no_thread_behind(double):
    assert judged(double, right, rng()) == "ok"
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for timer in timers:
        timer.join(3)
    assert not any(timer.is_alive() for timer in timers)


def test_in_a_browser_a_check_starts_no_thread(double, monkeypatch):
    monkeypatch.setattr(watch.sys, "platform", "emscripten")
    monkeypatch.setattr(threading.Thread, "start", None)  # calling it is an error
    assert judged(double, right, rng()) == "ok"


def test_the_interrupt_of_the_user_stays_one(double):
    def stopped(x, names):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(double, stopped, rng())


def test_what_an_answer_prints_stays_and_its_warnings_are_one_line_on_stdout(double, capfd):
    def talks(x, names):
        print("x has", len(x))
        print("to stderr", file=sys.stderr)
        np.log(np.array(-1.0))
        return 2 * x

    assert judged(double, talks, rng()) == "ok"
    out, err = capfd.readouterr()
    assert "x has 5" in out and "to stderr" in out and err == ""
    assert out.count("(your code warns: RuntimeWarning: invalid value encountered in log)") == 1


# -- how a result differs ----------------------------------------------------------------------------------------------

HOW = [  # what becomes of an array (4, 5) of sizes m, n; what is said about it
    (lambda y: -y, "all of y has the wrong sign"),
    (lambda y: 2 * y, "all of y is 2 times the expected value"),
    (lambda y: y / 4, "all of y is 1/4 (1 / m) times the expected value"),
    (lambda y: y / -4, "all of y is -0.25 (-1 / m) times the expected value"),
    (lambda y: y / 2, "all of y is 0.5 times the expected value"),
    (lambda y: y * 5 / 4, "all of y is 1.25 (n / m) times the expected value"),
    (lambda y: y / 20, "all of y is 1/20 (1 / (m · n)) times the expected value"),
    (lambda y: y / 5**0.5, "(1 / sqrt(n)) times the expected value"),
    (lambda y: y / 100, "all of y is 0.01 times the expected value"),
    (lambda y: y + y.max(), "too large"),
    (lambda y: y - y.max(), "too small"),
    (lambda y: 0 * y, "y is zero everywhere"),
    (lambda y: np.where(np.arange(4)[:, None] % 2, y, 0), "10 of its 20 numbers are zero, but should not be"),
    (np.abs, "the magnitudes are right, the sign is wrong in "),
    (lambda y: y * np.arange(2, 6)[:, None], "each row is right except for a factor"),
    (lambda y: y * np.arange(2, 7), "each column is right except for a factor"),
    (lambda y: y[[1, 0, 3, 2]], "the rows are right, but in another order"),
    (lambda y: y[:, ::-1], "the columns are right, but in another order"),
    (lambda y: y.ravel()[::-1].reshape(y.shape), "the numbers are right, but in other places"),
    (lambda y: np.where(np.arange(4)[:, None] == 2, y**2, y), "only y[2] is wrong"),
    (lambda y: np.where(np.arange(4)[:, None] == 2, 2 * y, y), "only y[2] is wrong"),
    (lambda y: np.where(np.arange(4)[:, None] == 2, y, y**3), "only y[2] is right"),
    (lambda y: np.where(np.arange(20).reshape(4, 5) % 3, y, y**2), "7 of 20 places differ"),
]


@pytest.mark.parametrize(("change", "line"), HOW, ids=[line for _, line in HOW])
def test_how_an_array_differs_is_said(change, line):
    want = 1 + rng(2).standard_normal((4, 5))
    want[np.abs(want) < 0.1] = 0.5
    with pytest.raises(Wrong) as wrong:
        compare(change(want), want, "y", "m, n", {"m": 4, "n": 5})
    assert str(wrong.value).endswith(line) or line in str(wrong.value).partition("; ")[2]
    assert str(wrong.value).startswith("y[")


@pytest.mark.parametrize(
    ("got", "want", "line"),
    [
        (0.0, np.inf, "y is 0, expected inf"),
        (1.0, np.inf, "y is 1, expected inf"),
        (1e-320, 5.0, "y is 9.999889e-321, expected 5"),
        (1e-320, 0.5, "y is 9.999889e-321, expected 0.5"),
        (0.0, 0.2001365, "y is 0, expected 0.2001365"),
        (-12, 12, "; the sign is wrong"),
        (123_456_780, 123_456_789, "y is 123,456,780, expected 123,456,789; 9 too small"),
        (10**300, 5, "too large"),
        (-1.7, 1.7, "; the sign is wrong"),
        (6.8, 3.4, "; that is 2 times the expected value"),
        (3.4 / 7, 3.4, "; that is 1/7 (1 / T) times the expected value"),
        (3.4 * 1.7, 3.4, "y is 5.78, expected 3.4"),
        (3.14, 3.14159, "; it is rounded: return all digits"),
        (4.0, 4.2, "y is 4, expected 4.2"),
        (12, 10, "; 2 too large"),
        (70_000, 10_000, "; that is 7 (T) times the expected value"),
        (1.0 + 1e-7, 1.0, "such as eps added?"),
        ("a" * 80 + "b", "a" * 80 + "c", "y is ...aaaaaaaaaaaaaaaaaaaab', expected ...aaaaaaaaaaaaaaaaaaaac'"),
        ([], [1, 2], "y: the number of values is 0, expected 2"),
        ([1], [1, 2], "y: the number of values is 1, expected 2; the first values are right"),
    ],
)
def test_how_a_value_differs_is_said(got, want, line):
    with pytest.raises(Wrong) as wrong:
        compare(got, want, "y", None, {"T": 7})
    assert str(wrong.value).endswith(line)


def test_a_factor_of_two_has_no_name_and_a_phrase_is_no_code():
    for factor, said in ((2, "2"), (0.5, "0.5")):
        with pytest.raises(Wrong, match=f"that is {said} times the expected value$"):
            compare(3.4 * factor, 3.4, "y", None, {"r": 2})
    with pytest.raises(Wrong, match="the codes is float64, expected int64$"):
        compare(np.ones(3), np.ones(3, np.int64), "the codes", None, {})


def test_infinities_are_named_and_where_some_are_expected_the_others_are_compared():
    want, hidden = np.arange(4.0), np.array([1.0, -np.inf, 2.0, 3.0])
    with np.errstate(all="raise"):
        for got, expected, line in [
            (
                np.where(want == 2, np.inf, want),
                want,
                "y contains inf: is something divided by zero, or is an exponential",
            ),
            (hidden * [1, 1, 1, 2], hidden, r"y\[3\] is 6, expected 3$"),
            (np.where(want == 1, 0, hidden), hidden, r"y\[1\] is 0, expected -inf$"),
        ]:
            with pytest.raises(Wrong, match=line):
                compare(got, expected, "y", None, {})


def test_what_is_right_and_short_arguments_are_said_and_else_what_to_do(double):
    answer = lambda *given: (lambda dx, dW, db: (dx, dW, db**2))(
        *EXERCISES["linear_backward"].forms[0].reference(*given)
    )
    assert judged(EXERCISES["linear_backward"], answer, rng()).endswith("; dx and dW are right")
    said = judged(EXERCISES["step_products"], lambda m, n, r, lowest: 7, rng())
    assert re.search(r"; [\d,]+ too small; called with m = \d+, n = \d+, r = \d+, lowest = False$", said)
    assert judged(double, lambda x, names: x**2 + 1, rng()).endswith(
        "compute a small case by hand, step by step, and compare"
    )
    said = judged(EXERCISES["rope_base"], lambda D, T, slow: 1.7, rng())
    assert re.search(r"expected [\d,.]+; called with D = \d+, T = \d+, slow = \d+$", said)


def test_a_result_that_contains_itself_is_one_line():
    def ids_and_labels(turns, eos_id, max_length):
        turns.append(turns)
        return turns, turns

    assert verdict(ids_and_labels, rng()).startswith("the result contains itself")


def test_of_what_an_answer_prints_the_beginning_is_shown(double, capfd):
    def talks(x, names):
        print("a word", file=sys.stderr)
        print("x" * 10**6)
        return 2 * x

    assert judged(double, talks, rng()) == "ok"
    out, err = capfd.readouterr()
    assert out.startswith("a word") and watch.PRINTED <= len(out) < watch.PRINTED + 200 and err == ""
    assert f"(your code printed {4 * (10**6 + 1 + 7) - watch.PRINTED:,} more characters)" in out


def test_an_error_that_is_a_kind_of_not_implemented_is_an_error(double):
    class StdinNotImplementedError(NotImplementedError):
        """What input() raises under a grader."""

    def asks(x, names):
        raise StdinNotImplementedError("no input")

    assert "StdinNotImplementedError: no input" in judged(double, asks, rng())


# -- exercises and their forms -----------------------------------------------------------------------------------------


def test_a_changed_draw_keeps_its_sizes_and_its_other_arguments():
    draw = changed(lambda rng: Draw({"n": 2}, a=1, b=rng.integers(9)), lambda drawn: {"a": drawn["a"] + 1})
    found, same = draw(np.random.default_rng(0)), np.random.default_rng(0).integers(9)
    assert (found, found.sizes, list(found)) == ({"a": 2, "b": same}, {"n": 2}, ["a", "b"])


def test_a_name_belongs_to_one_exercise_and_each_kind_of_draw_has_its_turn(double):
    with pytest.raises(ValueError, match="two exercises are called double: 99.1 and 99.3"):
        exercise("99.3", draw=[], returns="y", mistakes="")(double.forms[0].reference)
    form = replace(double.forms[0], draw=["a", "b", "c", "d", "e"], smallest="s")
    assert form.draws(3) == [*"abcdes"] and form.draws(7) == [*"abcdeabs"]


@pytest.mark.parametrize("number, form", [(None, 0), (0, 0), (1, 1), (2, 0), (7, 1)])
def test_numbers_of_variants_beyond_the_last_begin_again(number, form):
    lora = EXERCISES["lora_forward"]
    assert lora.form(number) is lora.forms[form]


# -- draws -------------------------------------------------------------------------------------------------------------


def test_sizes_are_far_from_each_other():
    for seed in range(50):
        sizes = sorted(distinct_sizes("Tnmk", rng(seed)).values())
        assert all(b >= 1.2 * a for a, b in itertools.pairwise(sizes))


def test_sizes_that_are_fixed_stay_and_the_others_are_new_in_each_draw():
    shapes = {exercises.drawing("TD", {"T": 2}, q="T D")(rng(seed))["q"].shape for seed in range(5)}
    assert {T for T, _ in shapes} == {2} and len(shapes) > 1


def test_arrays_have_the_shapes_that_their_axes_say():
    drawn = arrays(rng(), {"T": 3, "n": 4}, x="T n", g="T")
    assert {name: array.shape for name, array in drawn.items()} == {"x": (3, 4), "g": (3,)}
    assert parse_returns("dA (r, n), dB (m, r)") == [("dA", "r, n"), ("dB", "m, r")]
    assert parse_returns("the count") == [("the count", None)]
    assert named((4, 3), {"T": 3, "n": 4}) == "(n, T) = (4, 3)" and named((4, 5), {"n": 4}) == "(4, 5)"
    assert named((), {"n": 4}) == "()"


def test_random_numbers_are_judged_by_mean_and_standard_deviation():
    good = rng().standard_normal((9, 500)) / 20
    check_deviation(good, "A", "1 / sqrt(n)", 1 / 20)
    check_deviation(rng().uniform(-1, 1, (9, 500)) * np.sqrt(3) / 20, "A", "1 / sqrt(n)", 1 / 20)
    for bad, line in [
        (3 * good, "too large"),
        (good / 3, "too small"),
        (1.35 * good, "too large"),
        (0.7 * good, "too small"),
        (good + 0.02, "mean"),
        (rng().uniform(0, 0.1, (9, 500)), "mean"),
        (np.nan * good, "small"),
    ]:
        with pytest.raises(Wrong, match=line):
            check_deviation(bad, "A", "1 / sqrt(n)", 1 / 20)


def test_tensors_are_compared_with_what_they_ask_for():
    want = ml.Tensor(np.ones(3), requires_grad=True)
    with pytest.raises(Wrong, match="A must be a tensor, as ml.Tensor"):
        compare(np.ones(3), want, "A", "n", {})
    with pytest.raises(Wrong, match="A must require a gradient"):
        compare(ml.Tensor(np.ones(3)), want, "A", "n", {})


# -- what check prints -------------------------------------------------------------------------------------------------


def lora_forward(x, W, A, B, alpha):
    return x @ W.T + alpha / len(A) * (x @ A.T @ B.T)


def inject(W, r, rng):
    raise NotImplementedError


def test_check_prints_one_line_with_the_exercises_number(capfd, monkeypatch):
    monkeypatch.setattr(judge, "CHECKED", {})
    assert check(lora_forward) is None and check(inject) is None
    assert capfd.readouterr() == ("9.1  ok\n9.3  not written yet\n", "")
    assert check(lora_forward) is None and check(inject) is None  # as if the cell was changed, but not run
    assert capfd.readouterr().out == f"9.1  ok\n9.3  not written yet ({judge.SAME})\n"


@pytest.mark.parametrize("variable, value", [("NBGRADER_EXECUTION", "autograde"), ("MINILORA_STRICT", "1")])
def test_check_raises_under_a_grader(variable, value, monkeypatch, capfd):
    monkeypatch.setenv(variable, value)
    with pytest.raises(AssertionError, match=r"^9.3  not written yet$"):
        check(inject)
    assert check(lora_forward) is None
    assert capfd.readouterr() == ("9.1  ok\n", "")


def lora_foward():
    """A slip of the pen."""


@pytest.mark.parametrize(
    "thing, line",
    [
        (len, "'len' is not an exercise: keep the first line of the stub, def ...\n"),
        (lora_foward, "'lora_foward' is not an exercise: is lora_forward meant?\n"),
        (3.0, "a value of type float is not an answer: check the function itself, check(NAME)\n"),
    ],
)
def test_what_is_no_exercise_gets_a_line_that_helps(thing, line, capsys):
    assert check(thing) is None
    assert capsys.readouterr().out == line


def test_an_error_in_an_answer_shows_its_line_and_no_traceback_and_the_end_of_the_program_is_an_error_too():
    def largest_rank(shapes, budget):
        return shapes["head"]

    assert verdict(largest_rank, rng()) == "at `return shapes[\"head\"]`: KeyError: 'head'"

    def largest_rank(shapes, budget):
        sys.exit()

    assert verdict(largest_rank, rng()) == "at `sys.exit()`: SystemExit"


@pytest.mark.parametrize("variant", ["1", 1.0, [1]])
def test_a_variant_that_is_no_whole_number_is_one_line(variant, capsys):
    assert check(lora_forward, variant) is None
    assert capsys.readouterr().out == f"9.1  variant must be a whole number such as variant=1, got {variant!r}\n"
    assert verdict(lora_forward, rng(), np.int64(1)) == verdict(lora_forward, rng(), 1)


@pytest.mark.parametrize("name", ["merge", "unmerge"])
@pytest.mark.parametrize("key, variant", [("kept", None), ("base", 1), ("W", None), ("A", 1)])
def test_a_layer_that_has_lost_a_key_is_one_line(name, key, variant):
    def answer(layer):
        del layer[key]

    said = judged(EXERCISES[name], answer, rng(), variant)
    assert said == f"the layer has lost its {key!r}: change what is stored there, and leave the key"


def test_importing_the_checker_loads_numpy_and_no_other_third_party_package():
    code = (
        "import sys; import minilora.course; "
        "print(*sorted({'matplotlib', 'tqdm', 'gguf', 'tokenizers', 'safetensors', 'IPython'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


DRESSED = [  # exercise, what becomes of the solution's result: as right as before
    ("attention_vjp", np.stack),
    ("softmax_vjp", np.ma.array),
    ("best_rank_r", lambda factors: [-part for part in factors]),
    ("cat", lambda factors: (factors[0][::-1], factors[1][:, ::-1])),
    ("padded_batch", lambda result: tuple(part.astype(np.int32) for part in result)),
    ("padded_batch", lambda result: (*result[:2], result[2].astype(np.uint8))),
    ("choose_config", lambda result: (np.int64(result[0]), result[1], np.bool_(result[2]))),
    ("ranks_for_budget", lambda ranks: dict(sorted(ranks.items(), reverse=True))),
    ("verdict", np.array),
]
UNDRESSED = [
    ("padded_batch", lambda result: ([[1, 2], [3]],) * 3, "must be a NumPy array"),
    (
        "padded_batch",
        lambda result: (*result[:2], result[2] > 0),
        "attention_mask is bool, expected int64: write attention_mask.astype(int).",
    ),
    ("ids_and_labels", lambda result: tuple(map(np.array, result)), "input_ids must be a list, got ndarray"),
    ("ranks_for_budget", lambda ranks: list(ranks.values()), "ranks must be a dict, got list"),
    ("ranks_for_budget", lambda ranks: dict.fromkeys(ranks, "long" * 20), "longlong..., expected "),
    ("ranks_for_budget", lambda ranks: {**ranks, "two": 99}, "ranks['two'] is 99, expected "),
    ("ranks_for_budget", lambda ranks: {n: r for n, r in ranks.items() if r}, "ranks must have the key 'large'."),
    ("ranks_for_budget", lambda ranks: ranks | {"more": 1}, "ranks must not have the key 'more'."),
    ("ids_and_labels", lambda lists: (lists[0][:-1], lists[1]), "; the first "),
    ("step_in_parts", lambda loss: ml.Tensor(np.array(loss)), "the loss must be one number, got Tensor"),
    ("rope_base", lambda base: 10**400, "the base is inf"),
    ("best_rank_r", lambda result: ([[1.0], [2.0, 3.0]], result[1]), "B must be a NumPy array"),
    ("pissa_start", lambda result: ([[1.0], [2.0, 3.0]], *result[1:]), "A must be a NumPy array"),
    ("verdict", lambda result: np.array([1, 2]), "'[1 2]' is not a verdict"),
    ("adamw_step", lambda result: (*result[1:], result[0]), "w, m and v are swapped: `return w, m, v`, in this order"),
    ("paired_interval", lambda result: sorted(result), "mean and low are swapped"),
    ("numerical_gradient", lambda gradient: gradient.T, "the gradient is transposed: got ("),
]


def made_of(name, then):
    """An answer: the solution's result, and what becomes of it."""
    return lambda *arguments: then(EXERCISES[name].forms[0].reference(*arguments))


@pytest.mark.parametrize(("name", "then"), DRESSED, ids=[name for name, _ in DRESSED])
def test_a_right_result_is_right_in_another_form(name, then):
    assert judged(EXERCISES[name], made_of(name, then), rng()) == "ok"


@pytest.mark.parametrize(("name", "then", "line"), UNDRESSED, ids=[line for *_, line in UNDRESSED])
def test_a_result_of_another_kind_gets_a_line_that_says_so(name, then, line):
    assert line in judged(EXERCISES[name], made_of(name, then), rng()) + "."


def copied_where_nothing_is_to_be_done(unmerge, layer):
    if layer["kept"] is None:
        layer["W"] = layer["W"].copy()
    else:
        unmerge(layer)


def from_the_inputs(graph_gradients, edges, last):
    """The derivative of last with respect to each node, by all that use the node, and so on: along every path."""

    def of(node):
        uses = [(user, slope) for user, pairs in enumerate(edges) for parent, slope in pairs if parent == node]
        return 1.0 if node == last else sum(slope * of(user) for user, slope in uses)

    return np.array([of(node) for node in range(len(edges))])


HALF_RIGHT = [  # exercise, variant, an answer made from the solution, the line of the exercise's own judge
    ("adamw_step", None, lambda step, w, g, m, v, t, *rest: step(w, g, m, v, t, *rest) if t < 7 else (w, m, v),
     "each step alone is right, but after ten steps w differs"),
    ("lora_forward", None, lambda forward, *given: y.detach() if isinstance(y := forward(*given), ml.Tensor) else y,
     "y is right, but the gradient of x is missing or wrong"),
    ("graph_gradients", None, from_the_inputs, "right, but it follows every path"),
    ("inject", None, lambda inject, *given: inject(*given)[:2], "return three tensors"),
    ("merge", None, lambda merge, layer: (merge(layer), layer.update(A=layer["A"] + 1)),
     "A or B was changed: only W and kept change"),
    ("merge", None, lambda merge, layer: (merge(layer), layer.update(W=layer["W"][:-1])),
     "layer['W'] must stay an array of shape (m, n)"),
    ("merge", None, lambda merge, layer: (merge(layer), layer.update(W=layer["W"].astype(np.float32))),
     "as expected, but later digits differ"),
    ("add_lora", None, lambda add, model, targets, make: add(model, [t for t in targets if t != "proj"], make),
     "the incomplete target 'proj' was ignored"),
    ("add_lora", None, lambda add, model, targets, make: add(model, [t for t in targets if t != "norm"], make),
     "the non-Linear target 'norm' was ignored"),
    ("unmerge", None, lambda unmerge, layer: (unmerge(layer), layer.update(alpha=7)),
     "alpha was changed: only W and kept change"),
    ("unmerge", None, copied_where_nothing_is_to_be_done, "a layer that is not merged was changed"),
    ("add_lora", None, lambda add, model, targets, make: add(model, targets, lambda old: make(Linear(4, 3, rng=None))),
     "make_layer was called with a different layer"),
    ("add_lora", 1, lambda add, model, *rest: {name: model.get_submodule(name) for name in add(model, *rest)},
     "the values of the dictionary are the layers that were replaced"),
]  # fmt: skip


def wrong_key_error(add_lora, model, targets, make_layer):
    try:
        return add_lora(model, targets, make_layer)
    except ValueError:
        raise KeyError("no such layer") from None


def by(function, run, rates, seeds, claimed):
    """11.3, each rate judged by a function of its losses."""

    def judged_by(method, lr, seed):
        loss = function([run(method, lr, seed)["validation"] for seed in seeds])
        return run(method, lr, seed) | {"validation": loss}

    return EXERCISES["my_claim"].forms[0].reference(judged_by, rates, seeds, claimed)


def repeated(padded_batch, samples, pad_id):
    input_ids, labels, mask = padded_batch(samples, pad_id)
    return np.where(mask, input_ids, [[ids[-1]] for ids, _ in samples]), labels, mask


def less_the_mean(softmax_cross_entropy, z, labels):
    e = np.exp(z - z.mean(axis=1, keepdims=True))
    p, tokens = e / e.sum(axis=1, keepdims=True), np.arange(len(z))
    return -np.log(p[tokens, labels]).mean(), (p - np.eye(z.shape[1])[labels]) / len(z)


def whole_names_apart(scale_of, name, r, lora_alpha, use_rslora, *patterns):
    return scale_of(
        name, r, lora_alpha, use_rslora, *({k: v for k, v in each.items() if k != name} for each in patterns)
    )


def interpolated(rank_for, delta, share):
    explained = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2)
    return round(np.interp(share, explained / explained[-1], 1.0 + np.arange(len(explained))))


def the_last_of_seven(best_rate, rates, losses):
    more = len(rates) - 7
    return best_rate([*rates, *rates[:more]], np.pad(losses, ((0, 0), (0, more)), constant_values=np.inf))


RARE = [  # an answer that is right in most cases
    ("numerical_gradient", lambda gradient, *given: abs(gradient(*given))),
    ("relative_error", lambda error, a, b: error(*np.broadcast_arrays(a, b)) if a.ndim == b.ndim else np.inf),
    ("relative_error", lambda error, *given: error(*given) if max(map(np.max, map(abs, given))) > 1e-12 else 0.0),
    ("training_bytes", lambda bytes, sizes, names, *o: bytes(sizes, [n for n in names if len(sizes[n]) > 1], *o)),
    ("rank_for", interpolated),
    ("my_claim", lambda claim, run, rates, *rest: claim(run, rates[1:], *rest)),
    ("scale_of", whole_names_apart),
    ("best_rate", lambda best, rates, losses: best(rates, np.nan_to_num(losses, nan=10))),
    ("best_rate", the_last_of_seven),
    ("cat", lambda cat, adapters, weights: cat(adapters[:2], weights[:2])),
    ("mix", lambda mix, x, W, adapters, weights: mix(x, W, adapters[:2], weights[:2])),
    ("descend", lambda descend, *given: descend(*given[:6], 0.002, given[7])),
    ("descend", lambda descend, *given: descend(*given[:5], 1.5, *given[6:])),
    ("relative_error", lambda error, got, want: error(got.ravel(), want.ravel())),
    ("softmax_cross_entropy", less_the_mean),
    ("softmax_cross_entropy", lambda loss, z, at: loss(z, at) if len(z) > 1 or at.max() + 1 == z.shape[1] else (0, z)),
    ("padded_batch", repeated),
    (
        "inject",
        lambda inject, W, r, rng: (*(A := inject(W, r, rng))[:1], ml.Tensor(np.tile(A[1].data[0], (r, 1)), True), A[2]),
    ),
    ("unmerge", lambda unmerge, layer: (unmerge(layer), layer.update(B=0 * layer["B"]))),
    ("add_lora", wrong_key_error),
    ("my_claim", lambda claim, *given: by(np.median, *given)),
    ("my_claim", lambda claim, *given: by(max, *given)),
    ("my_claim", lambda claim, *given: by(min, *given)),
    ("scale_of", lambda scale, name, r, *rest: scale(name, 1, *rest)),
    ("best_rate", lambda best, rates, losses: None if (rate := best(rates, losses)) == rates[1] else rate),
    ("best_rate", lambda best, rates, losses: best(rates, np.broadcast_to(losses.max(axis=0), losses.shape))),
    ("tokens_until", lambda tokens, *given: tokens(*given[:-1], given[-1] * (1 + 1e-3))),
    ("floor", lambda floor, x, delta, r: floor(x, delta, r) * len(x) / min(len(x), len(delta))),
]


@pytest.mark.parametrize(("name", "answer"), RARE, ids=[f"{i}-{name}" for i, (name, _) in enumerate(RARE)])
def test_an_answer_that_is_right_in_most_cases_is_refused_in_every_check(name, answer):
    solution = EXERCISES[name].forms[0].reference
    checks = 12 if name in ("my_claim", "rank_for", "scale_of") else 4  # the twelve: where a part of them found it
    for seed in range(checks):
        assert judged(EXERCISES[name], lambda *given: answer(solution, *given), rng(seed)) != "ok", seed


def test_the_rank_that_a_large_budget_allows_is_above_any_that_is_tried_one_by_one():
    for form in EXERCISES["largest_rank"].forms:
        assert min(form.reference(**form.draw[2](rng(seed))) for seed in range(40)) > 256


@pytest.mark.parametrize(("name", "variant", "answer", "line"), HALF_RIGHT, ids=[line for *_, line in HALF_RIGHT])
def test_what_only_the_judge_of_an_exercise_sees_gets_its_line(name, variant, answer, line):
    solution = EXERCISES[name].form(variant).reference
    assert line in judged(EXERCISES[name], lambda *given: answer(solution, *given), rng(), variant)


def test_a_forward_pass_that_the_engine_cannot_follow_is_refused_in_every_variant():
    for variant, power in ((0, 1), (1, 0.5)):
        answer = lambda x, W, A, B, alpha, p=power: np.dot(x, W.T) + np.dot(x @ A.T, B.T) * (alpha / len(A) ** p)
        assert "stops on minilora's tensors" in judged(EXERCISES["lora_forward"], answer, rng(), variant)

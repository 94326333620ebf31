"""The self-test: ten questions on what the course assumes. `check` marks an answer, and says what to read."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .compare import TOLERANCE, Wrong, same
from .edits import parse, sections
from .exercises import QUESTIONS, Draw, Drawing, Exercise, Form, distinct_sizes, drawing, parse_returns


def question(
    *, draw: Drawing, returns: str, read: str, judge: Callable[..., None] | None = None
) -> Callable[[Callable], Callable]:
    """Declare a question; they are numbered in order. read: where to read about it. The rest: see `exercise`.

    The known mistakes, where there are some, are in mistakes/selftest.txt.
    """

    def register(solution: Callable) -> Callable:
        name, known = solution.__name__, sections("selftest")
        form = Form(solution, draw, parse(known[name], solution) if name in known else [], judge=judge)
        number, wanted = f"question {len(QUESTIONS) + 1}", parse_returns(returns)
        QUESTIONS[name] = Exercise(number, name, wanted, [form], TOLERANCE, False, {}, (), None, read)
        return solution

    return register


def one_number(rng: np.random.Generator) -> Draw:
    """A number."""
    return Draw(x=float(rng.uniform(0.5, 2)))


def two_shapes(rng: np.random.Generator) -> Draw:
    """The shapes of two matrices that can be multiplied."""
    m, n, k = distinct_sizes("mnk", rng).values()
    return Draw(a=(m, n), b=(n, k))


def call(made: Any, *arguments: Any) -> Any:
    """What a function that an answer has returned returns. Raises Wrong if it is none, or stops with an error."""
    if not callable(made):
        raise Wrong(f"return a function, not a value of type {type(made).__name__}")
    try:
        return made(*arguments)
    except Exception as error:
        raise Wrong(f"the function that you return stops with {type(error).__name__}: {error}") from None


def expect(got: Any, want: float, what: str) -> None:
    """Raise Wrong unless the number is the expected one."""
    if not same(got, want):
        raise Wrong(f"{what} is {got!r}, expected {want!r}")


def judge_multiplier(answer: Callable, draw: Mapping[str, Any], rng: np.random.Generator) -> None:
    """Two functions, called after both are made."""
    double, triple = answer(a=2), answer(a=3)
    expect(call(double, 10), 20, "multiplier(2)(10)")
    expect(call(triple, 10), 30, "multiplier(3)(10)")


def judge_doubled(answer: Callable, draw: Mapping[str, Any], rng: np.random.Generator) -> None:
    """Functions with no argument and with two."""
    expect(call(answer(f=lambda: 4)), 8, "doubled(f)(), where f() is 4,")
    expect(call(answer(f=lambda x, y: x - y), 7, 2), 10, "doubled(f)(7, 2), where f(x, y) is x - y,")


@question(draw=two_shapes, returns="rows, columns", read="OpenStax College Algebra, section 7.5")
def product_shape(a, b):
    """a (m, n), b (n, k): two tuples -> the number of rows and the number of columns of A B"""
    return a[0], b[1]


@question(draw=drawing("Tnm", x="T n", W="m n"), returns="y (T, m)", read="NumPy: matmul")
def per_token(x, W):
    """x (T, n), W (m, n) -> y (T, m): row t is W times row t of x"""
    return x @ W.T


@question(
    draw=drawing("TN", X="T N"), returns="s (N)", read="NumPy: the absolute basics for beginners, section on axis"
)
def column_sums(X):
    """X (T, N) -> s (N)"""
    return X.sum(axis=0)


@question(draw=drawing("TN", X="T N"), returns="Y (T, N)", read="NumPy: Broadcasting")
def centred(X):
    """X (T, N) -> Y (T, N)"""
    return X - X.mean(axis=1, keepdims=True)


@question(draw=one_number, returns="the derivative", read="OpenStax Calculus 1, sections 3.3 and 3.9")
def slope(x):
    """x, a number -> the derivative of x ln(1 + e**x)"""
    return np.log(1 + np.exp(x)) + x * np.exp(x) / (1 + np.exp(x))


@question(draw=one_number, returns="the derivative", read="OpenStax Calculus 1, section 3.6")
def slope_of_power(x):
    """x, a number -> the derivative of (x**2 + 1)**3"""
    return 6 * x * (x**2 + 1) ** 2


@question(draw=one_number, returns="the derivative", read="OpenStax Calculus 1, section 6.9")
def slope_of_tanh(x):
    """x, a number -> the derivative of tanh(x)"""
    return 1 - np.tanh(x) ** 2


@question(
    draw=lambda rng: Draw(p=rng.uniform(0.001, 0.1, 2000)),
    returns="the sum",
    read="OpenStax College Algebra, section 6.5",
)
def surprise(p):
    """p (N), between 0 and 1 -> minus the natural logarithm of their product, a number"""
    return -np.log(p).sum()


@question(draw=lambda rng: Draw(a=2), returns="f", read="Python's tutorial, section 9.2", judge=judge_multiplier)
def multiplier(a):
    """a, a number -> a function of x that returns a times x"""
    return lambda x: a * x


@question(draw=lambda rng: Draw(f=len), returns="g", read="Python's glossary: decorator", judge=judge_doubled)
def doubled(f):
    """f, a function -> a function with the same arguments that returns 2 times the result of f"""
    return lambda *arguments: 2 * f(*arguments)

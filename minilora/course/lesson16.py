"""Lesson 16's exercises: several adapters as one, a weighted mix of them, and each row's own adapter."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .compare import Wrong
from .exercises import Draw, arrays, distinct_sizes, exercise, variant
from .watch import watched

# -- adapters as dictionaries ------------------------------------------------------------------------------------------


def draw_adapters(rng: np.random.Generator, ranks: Sequence[int] | None = None) -> tuple[dict[str, int], list[Any]]:
    """Sizes, and adapters of one matrix: of three ranks between 2 and 5, no two alike, if none are given."""
    ranks = rng.permutation([2, 3, 4, 5])[:3].tolist() if ranks is None else ranks
    sizes = distinct_sizes("Tnm", rng, low=15) | {"R": sum(ranks)}
    alphas = rng.permutation([29, 31, 37, 41, 43, 47])  # primes above every r²: no two scales are alike
    adapters = []
    for r, alpha in zip(ranks, alphas, strict=False):
        drawn = arrays(rng, {**sizes, "r": r}, A="r n", B="m r")
        adapters.append({"A": drawn["A"], "B": drawn["B"], "alpha": int(alpha)})
    return sizes, adapters


def draw(rng: np.random.Generator, ranks: Sequence[int] | None = None, **axes: str) -> Draw:
    """Arrays with these axes, adapters, and weights that do not add up to 1 or to their number, no two alike."""
    sizes, adapters = draw_adapters(rng, ranks)
    drawn = arrays(rng, sizes, **axes)
    drawn["adapters"] = adapters
    drawn["weights"] = rng.permutation([0.3, 0.6, 0.9, 1.3, 1.9])[: len(adapters)].tolist()
    return drawn


def draw_alike(rng: np.random.Generator, **axes: str) -> Draw:
    """Two adapters of one rank: there A's and B's can be added up, too."""
    return draw(rng, [int(rng.integers(2, 6))] * 2, **axes)


def product(adapters: Any, weights: Any) -> Any:
    """The sum of w s B A, an array of W's size."""
    both = zip(adapters, weights, strict=True)
    return sum(w * each["alpha"] / len(each["A"]) * (each["B"] @ each["A"]) for each, w in both)


def added_up(adapters: Any, weights: Any, in_a: float = 0) -> Any:
    """One adapter of scale 1, its A and B the sums of all A and B, which needs one rank for all.

    in_a: the power of each weight that is in A; 1/2 is what is called linear.
    """
    both = list(zip(adapters, weights, strict=True))
    A = sum(w**in_a * a["A"] for a, w in both)
    B = sum(w ** (1 - in_a) * a["alpha"] / len(a["A"]) * a["B"] for a, w in both)
    return [{"A": A, "B": B, "alpha": len(A)}], [1]


# -- 16.1 several adapters as one --------------------------------------------------------------------------------------


def in_order(result: Any, arguments: dict[str, Any]) -> Any:
    """A and B, the rows of A sorted by their first number: the terms of a product have no order."""
    order = np.argsort(result[0][:, 0])
    return result[0][order], result[1][:, order], *result[2:]


@exercise(
    "16.1",
    draw=[draw_alike, draw],
    smallest=partial(draw, ranks=[1]),
    returns="A (R, n), B (m, R)",
    observe=in_order,
)
def cat(adapters, weights):
    """adapters: a list of {"A", "B", "alpha"}; weights: a list of numbers -> A (R, n), B (m, R)"""
    factors = [w * a["alpha"] / len(a["A"]) for a, w in zip(adapters, weights, strict=True)]
    A = np.concatenate([a["A"] for a in adapters])
    B = np.concatenate([f * a["B"] for a, f in zip(adapters, factors, strict=True)], axis=1)
    return A, B


RS = {
    "alpha / r": "alpha / r**0.5",
    '/ len(a["A"])': '/ len(a["A"]) ** 0.5',
    '/ len(adapter["A"])': '/ len(adapter["A"]) ** 0.5',
}
variant("cat", RS, "the scale is that of rsLoRA")

FORMS = "right, but it forms a matrix of W's size: multiply x by each adapter's A, then by its B"


def refuse_products(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """Raise Wrong where the (m, n) matrix B A of an adapter is formed."""
    own, seen = drawn["adapters"], set[tuple[int, ...]]()
    keys = own if isinstance(own, dict) else range(len(own))
    for key in keys:
        own[key] = {name: watched(v, seen) if isinstance(v, np.ndarray) else v for name, v in own[key].items()}
    answer(**drawn)
    shape = drawn.sizes["m"], drawn.sizes["n"]
    if {shape, shape[::-1]} & seen:
        raise Wrong(FORMS)


# -- 16.2 a mix --------------------------------------------------------------------------------------------------------


@exercise(
    "16.2",
    draw=[partial(draw_alike, x="T n", W="m n"), partial(draw, x="T n", W="m n")],
    smallest=partial(draw, ranks=[1], x="T n", W="m n"),
    returns="y (T, m)",
    forbids={"m n": FORMS},
    also=refuse_products,
)
def mix(x, W, adapters, weights):
    """x (T, n), W (m, n), adapters: a list of {"A", "B", "alpha"}, weights: a list of numbers -> y (T, m)"""
    y = x @ W.T
    for adapter, weight in zip(adapters, weights, strict=True):
        scale = adapter["alpha"] / len(adapter["A"])
        y = y + weight * scale * (x @ adapter["A"].T @ adapter["B"].T)
    return y


variant("mix", RS, "the scale is that of rsLoRA")


# -- 16.3 an adapter for each row --------------------------------------------------------------------------------------

NAMES = ("legal", "medical", "support")


def draw_rows(rng: np.random.Generator, names: Sequence[str | None] | None = None) -> Draw:
    """Rows that want different adapters; one adapter is wanted twice, and one row wants none."""
    sizes, own = draw_adapters(rng, rng.permutation([2, 3, 4]).tolist())
    wanted = [NAMES[i] for i in rng.permutation(3)]
    if names is None:  # the second comes again at the end, so that order and repetition are seen
        names = [wanted[2], wanted[1], None, wanted[0], wanted[1]]
    sizes["N"] = len(names)
    drawn = arrays(rng, sizes, x="N T n", W="m n")
    drawn["adapters"], drawn["names"] = dict(zip(NAMES, own, strict=True)), list(names)
    return drawn


@exercise(
    "16.3",
    draw=draw_rows,
    smallest=lambda rng: draw_rows(rng, [None]),
    returns="y (N, T, m)",
    forbids={"m n": FORMS},
    also=refuse_products,
)
def answer_rows(x, W, adapters, names):
    """x (N, T, n), W (m, n), adapters: {name: {"A", "B", "alpha"}}, names: N names or None -> y (N, T, m)"""
    y = x @ W.T
    for i, name in enumerate(names):
        if name is not None:
            adapter = adapters[name]
            scale = adapter["alpha"] / len(adapter["A"])
            y[i] += scale * (x[i] @ adapter["A"].T @ adapter["B"].T)
    return y


variant("answer_rows", RS, "the scale is that of rsLoRA")

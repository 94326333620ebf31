"""Lesson 13's exercises: several adapters as one, a weighted mix of them, and an adapter of its own for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .compare import Wrong
from .exercises import Draw, arrays, distinct_sizes, exercise, variant
from .watch import watched

# -- adapters as dictionaries ------------------------------------------------------------------------------------------


def draw_adapters(rng: np.random.Generator, ranks: Sequence[int] | None = None) -> tuple[dict[str, int], list[Any]]:
    """Sizes, and adapters of one matrix: of two or three ranks between 2 and 5, no two alike, if none are given."""
    ranks = rng.permutation([2, 3, 4, 5])[: rng.integers(2, 4)].tolist() if ranks is None else ranks
    sizes = distinct_sizes("Tnm", rng, low=15) | {"R": sum(ranks)}
    alphas = rng.permutation([29, 31, 37, 41, 43, 47])  # primes above every r²: no two scales are alike
    adapters = []
    for r, alpha in zip(ranks, alphas, strict=False):
        drawn = arrays(rng, {**sizes, "r": r}, A="r n", B="m r")
        adapters.append({"A": drawn["A"], "B": drawn["B"], "alpha": int(alpha)})
    return sizes, adapters


def draw(rng: np.random.Generator, ranks: Sequence[int] | None = None, **axes: str) -> Draw:
    """Arrays with these axes, adapters, and weights that do not add up to 1, no two alike."""
    sizes, adapters = draw_adapters(rng, ranks)
    drawn = arrays(rng, sizes, **axes)
    drawn["adapters"] = adapters
    drawn["weights"] = rng.permutation([0.3, 0.6, 0.9, 1.4, 1.7])[: len(adapters)].tolist()
    return drawn


def draw_alike(rng: np.random.Generator, **axes: str) -> Draw:
    """Two adapters of one rank: there A's and B's can be added up, too."""
    return draw(rng, [int(rng.integers(2, 6))] * 2, **axes)


Scale = Callable[[Any], float]
Factor = Callable[[float, float], float]  # of an adapter's weight and scale


def scale(adapter: Any) -> float:
    """alpha / r."""
    return adapter["alpha"] / len(adapter["A"])


def root(adapter: Any) -> float:
    """alpha / sqrt(r), rsLoRA's."""
    return adapter["alpha"] / len(adapter["A"]) ** 0.5


def product(adapters: Any, weights: Any) -> Any:
    """The sum of w s B A, an array of W's size."""
    return sum(w * scale(each) * (each["B"] @ each["A"]) for each, w in zip(adapters, weights, strict=True))


def shares(weights: Any) -> list[float]:
    """The weights divided by their sum."""
    return [w / sum(weights) for w in weights]


def wrong_scales(answer: Callable[[Scale], Callable]) -> dict[str, tuple[Callable, str]]:
    """What all three exercises can get wrong in the scale. answer: the right one with another scale."""
    return {
        "no scale": (answer(lambda adapter: 1), "the scale alpha / r of each adapter is missing"),
        "alpha": (answer(lambda adapter: adapter["alpha"]), "the scale is alpha / r, not alpha"),
        "square root": (answer(root), "the scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's"),
    }


NO_WEIGHTS = "the weights are missing"
SHARE = "the weights are divided by their sum: take them as they are, they need not add up to 1"

# -- 13.1 several adapters as one --------------------------------------------------------------------------------------


def stacked(
    of_b: Factor = lambda w, s: w * s,
    of_a: Factor = lambda w, s: 1.0,
    scale_of: Scale = scale,
    weights_of: Callable[[Any], Any] = list,
    order: int = 1,
    axes: tuple[int, int] = (0, 1),
) -> Callable:
    """Factors side by side along these axes, with weight and scale where `of_b` and `of_a` put them. order: -1 turns
    A's round.
    """

    def answer(adapters: Any, weights: Any) -> Any:
        both = [(each, w, scale_of(each)) for each, w in zip(adapters, weights_of(weights), strict=True)]
        A = np.concatenate([of_a(w, s) * each["A"] for each, w, s in both][::order], axis=axes[0])
        return A, np.concatenate([of_b(w, s) * each["B"] for each, w, s in both], axis=axes[1])

    return answer


def added_up(in_a: float = 0) -> Callable:
    """A's and B's added, which needs one rank for all. in_a: the power of its weight that stands in A; with 1/2 it is
    what is called linear.
    """

    def answer(adapters: Any, weights: Any) -> Any:
        both = list(zip(adapters, weights, strict=True))
        return sum(w**in_a * a["A"] for a, w in both), sum(w ** (1 - in_a) * scale(a) * a["B"] for a, w in both)

    return answer


def in_place(adapters: Any, weights: Any) -> Any:
    """Right, but the adapters are not what they were."""
    for each, w in zip(adapters, weights, strict=True):
        each["B"] *= w * scale(each)
    return stacked(of_b=lambda w, s: 1.0)(adapters, weights)


TWICE = "stands in A and in B, and the product has both"
CROSS = "cross terms: a sum of B's times a sum of A's holds B1 A2 and B2 A1, too; put them side by side, R = r1 + r2"
TOO_SMALL = "divided by too much: the r of alpha / r is each adapter's own, not R; and a sum is wanted, not a mean"


@exercise(
    "13.1",
    draw=[draw_alike, draw],
    smallest=partial(draw, ranks=[1]),
    returns="A (R, n), B (m, R)",
    decisive=['np.concatenate([a["A"] for a in adapters])', "in zip(adapters, factors, strict=True)], axis=1)"],
    mistakes={
        "weight squared": (stacked(of_a=lambda w, s: w), f"the weight is squared: it {TWICE}"),
        "weight and scale squared": (
            stacked(of_a=lambda w, s: w * s),
            "weight and scale are squared: they stand in A and in B, and the product has both",
        ),
        "scale squared": (stacked(of_a=lambda w, s: s), f"the scale is squared: it {TWICE}"),
        "cross terms": (added_up(), CROSS),
        "cross terms, with roots": (added_up(in_a=0.5), CROSS),
        **wrong_scales(lambda other: stacked(scale_of=other)),
        "first scale": (
            lambda own, weights: stacked(scale_of=lambda a: scale(own[0]))(own, weights),
            "each adapter has a scale of its own: that of the first is used for all",
        ),
        "rank of all": (
            lambda own, weights: stacked(scale_of=lambda a: a["alpha"] / sum(len(b["A"]) for b in own))(own, weights),
            TOO_SMALL,
        ),
        "no weights": (stacked(of_b=lambda w, s: s), NO_WEIGHTS),
        "share": (stacked(weights_of=shares), SHARE),
        "mean": (stacked(weights_of=lambda weights: [w / len(weights) for w in weights]), TOO_SMALL),
        "root of the weight": (
            stacked(of_b=lambda w, s: w**0.5 * s),
            "only the root of the weight takes part: a weight in B alone stands there whole",
        ),
        "in A": (
            stacked(of_a=lambda w, s: w * s, of_b=lambda w, s: 1.0),
            "B A is right, but the factors stand in A: put them into B, so that A stays what it is",
        ),
        "divided up": (
            stacked(of_a=lambda w, s: w, of_b=lambda w, s: s),
            "B A is right, but the weight stands in A: put it into B, so that A stays what it is",
        ),
        "roots in both": (
            stacked(of_a=lambda w, s: w**0.5, of_b=lambda w, s: w**0.5 * s),
            "B A is right, but half of the weight stands in A: put it into B, so that A stays what it is",
        ),
        "turned round": (
            stacked(order=-1),
            "A's and B's stand in different orders: column k of B belongs to row k of A",
        ),
        "wrong axis": (
            stacked(axes=(1, 0)),
            "joined along the wrong axis: the r's are added up, n and m stay: A (R, n), B (m, R)",
        ),
        "in place": (in_place, "the function changes its input"),
    },
)
def cat(adapters: Any, weights: Any) -> Any:
    """The A's one above the other, the B's side by side, with each weight and scale in B."""
    return stacked()(adapters, weights)


FORMS = "right, but it forms a matrix of W's size: take x down and up again through each adapter"


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


# -- 13.2 a mix --------------------------------------------------------------------------------------------------------


def mixed(joined: Callable = cat, base: Callable[[Any], float] = lambda weights: 1.0) -> Callable:
    """x Wᵀ times `base`, and x down and up through what `joined` makes of the adapters."""

    def answer(x: Any, W: Any, adapters: Any, weights: Any) -> Any:
        A, B = joined(adapters, weights)
        return base(weights) * (x @ W.T) + x @ A.T @ B.T

    return answer


ONCE = "stands in the update once"
CROSSED = "cross terms: the sum of the A's goes through the sum of the B's; each A has its own B"


@exercise(
    "13.2",
    draw=[partial(draw_alike, x="T n", W="m n"), partial(draw, x="T n", W="m n")],
    smallest=partial(draw, ranks=[1], x="T n", W="m n"),
    returns="y (T, m)",
    forbids={"m n": FORMS},
    also=refuse_products,
    decisive=['x @ adapter["A"].T @ adapter["B"].T'],
    mistakes={
        "weight squared": (mixed(stacked(lambda w, s: w * w * s)), f"the weight is squared: it {ONCE}"),
        "scale squared": (mixed(stacked(lambda w, s: w * s * s)), f"the scale is squared: it {ONCE}"),
        "cross terms": (mixed(added_up()), CROSSED),
        "cross terms, with roots": (mixed(added_up(in_a=0.5)), CROSSED),
        **wrong_scales(lambda other: mixed(stacked(scale_of=other))),
        "no weights": (mixed(stacked(lambda w, s: s)), NO_WEIGHTS),
        "base once for each": (
            mixed(base=lambda weights: max(len(weights), 2)),
            "x Wᵀ is added for each adapter: there is one base, and it counts once",
        ),
        "outputs mixed": (
            mixed(base=sum),
            "x Wᵀ is weighted, too: weights are of the updates, the base counts once and whole",
        ),
        "share": (mixed(stacked(weights_of=shares)), SHARE),
        "no base": (mixed(base=lambda weights: 0.0), "x Wᵀ is missing: y is the updates alone"),
        "only the last": (
            lambda x, W, adapters, weights: mixed()(x, W, adapters[-1:], weights[-1:]),
            "only the last adapter takes part: add the updates up",
        ),
        "only the first": (
            lambda x, W, adapters, weights: mixed()(x, W, adapters[:1], weights[:1]),
            "only the first adapter takes part: is the `return` inside of the loop?",
        ),
        "subtracted": (mixed(stacked(lambda w, s: -w * s)), "the updates are added, not subtracted"),
        "forms W": (lambda x, W, adapters, weights: x @ (W + product(adapters, weights)).T, FORMS),
        "forms B A": (lambda x, W, adapters, weights: x @ W.T + x @ product(adapters, weights).T, FORMS),
    },
)
def mix(x: Any, W: Any, adapters: Any, weights: Any) -> Any:
    """The base once, and the weighted updates."""
    return mixed()(x, W, adapters, weights)


# -- 13.3 an adapter for each row --------------------------------------------------------------------------------------

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


Pairs = list[tuple[int, Any]]


def by_row(
    updates: Callable[[int, Any], Pairs] = lambda i, names: [(i, names[i])],
    base: Callable[[Any], float] = lambda name: 1.0,
    scale_of: Scale = scale,
) -> Callable:
    """x Wᵀ of each row times `base` of its name, and the updates that row i of y gets: (row of x, name) for each."""

    def answer(x: Any, W: Any, adapters: Any, names: Any) -> Any:
        y = np.stack([base(name) * (row @ W.T) for row, name in zip(x, names, strict=True)])
        for i in range(len(names)):
            for j, name in updates(i, names):
                if name is not None:
                    y[i] += scale_of(adapters[name]) * (x[j] @ adapters[name]["A"].T @ adapters[name]["B"].T)
        return y

    return answer


def in_groups(x: Any, W: Any, adapters: Any, names: Any) -> Any:
    """The rows of one adapter after those of another, and never put back."""
    y = by_row()(x, W, adapters, names)
    return np.concatenate([y[[i for i, other in enumerate(names) if other == name]] for name in dict.fromkeys(names)])


OF_ALL_ROWS = "every row gets the updates of all rows: y[i] += ..., not y += ..."


@exercise(
    "13.3",
    draw=draw_rows,
    smallest=lambda rng: draw_rows(rng, [None]),
    returns="y (N, T, m)",
    forbids={"m n": FORMS},
    also=refuse_products,
    decisive=["y[i] += scale * (x[i]"],
    mistakes={
        "first for all": (
            by_row(lambda i, names: [(i, next((n for n in names if n), None))]),
            "every row gets the first row's adapter: names[i] belongs to row i",
        ),
        "last for all": (
            by_row(lambda i, names: [(i, names[-1])]),
            "every row gets the last row's adapter: is it chosen before the rows are computed?",
        ),
        "all for all": (
            by_row(lambda i, names: [(i, name) for name in NAMES]),
            "every row gets every update: row i gets that of names[i] alone",
        ),
        "all wanted": (by_row(lambda i, names: [(i, name) for name in names]), OF_ALL_ROWS),
        "spread out": (by_row(lambda i, names: list(enumerate(names))), OF_ALL_ROWS),
        "only its first row": (
            by_row(lambda i, names: [(i, names[i])] if names.index(names[i]) == i else []),
            "an adapter reaches only the first row that asks for it: several rows may want the same one",
        ),
        "backwards": (
            by_row(lambda i, names: [(i, names[-1 - i])]),
            "the names are taken from the end: names[i] belongs to row i",
        ),
        "in groups": (in_groups, "the rows come back in another order: row i of y belongs to row i of x"),
        "None is zero": (
            by_row(base=lambda name: float(name is not None)),
            "a row without a name is zero: None means the base alone, x Wᵀ",
        ),
        "None is the first": (
            by_row(lambda i, names: [(i, names[i] or names[0] or NAMES[0])]),
            "a row with the name None gets an update: it is for the base alone",
        ),
        "None is looked up": (lambda x, W, adapters, names: [adapters[name] for name in names], "KeyError: None"),
        "no base": (by_row(base=lambda name: 0.0), "x Wᵀ is missing: y is the updates alone"),
        "base once for each": (
            lambda x, W, adapters, names: by_row()(x, W, adapters, names) + (len({*names} - {None}) or 1) * (x @ W.T),
            "x Wᵀ is added again for each adapter: it counts once in every row",
        ),
        **wrong_scales(lambda other: by_row(scale_of=other)),
        "forms W": (
            lambda x, W, adapters, names: np.stack(
                [
                    row @ (W if name is None else W + product([adapters[name]], [1])).T
                    for row, name in zip(x, names, strict=True)
                ]
            ),
            FORMS,
        ),
    },
)
def answer_rows(x: Any, W: Any, adapters: Any, names: Any) -> Any:
    """x Wᵀ for all rows at once, and the update of each row's own adapter."""
    return by_row()(x, W, adapters, names)


# -- variants: rsLoRA's scale ------------------------------------------------------------------------------------------

RS = {
    "alpha / r": "alpha / r**0.5",
    '/ len(a["A"])': '/ len(a["A"]) ** 0.5',
    '/ len(adapter["A"])': '/ len(adapter["A"]) ** 0.5',
}


@variant("cat", RS)
def cat_rs(adapters: Any, weights: Any) -> Any:
    """With rsLoRA's scale."""
    return stacked(scale_of=root)(adapters, weights)


@variant("mix", RS)
def mix_rs(x: Any, W: Any, adapters: Any, weights: Any) -> Any:
    """With rsLoRA's scale."""
    return mixed(stacked(scale_of=root))(x, W, adapters, weights)


@variant("answer_rows", RS)
def answer_rows_rs(x: Any, W: Any, adapters: Any, names: Any) -> Any:
    """With rsLoRA's scale."""
    return by_row(scale_of=root)(x, W, adapters, names)

"""Lesson 13's exercises: several adapters as one, a weighted mix of them, and an adapter of its own for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def draw_weights(rng: np.random.Generator, count: int) -> list[float]:
    """Weights that do not add up to 1, no two alike."""
    return [round(float(w), 2) for w in rng.permutation([0.3, 0.6, 0.9, 1.4, 1.7])[:count]]


def draw_cat(rng: np.random.Generator, ranks: Sequence[int] | None = None) -> Draw:
    """Adapters and their weights."""
    sizes, adapters = draw_adapters(rng, ranks)
    return Draw(sizes, adapters=adapters, weights=draw_weights(rng, len(adapters)))


def draw_mix(rng: np.random.Generator, ranks: Sequence[int] | None = None) -> Draw:
    """The same, with a layer and its input."""
    sizes, adapters = draw_adapters(rng, ranks)
    drawn = arrays(rng, sizes, x="T n", W="m n")
    drawn["adapters"], drawn["weights"] = adapters, draw_weights(rng, len(adapters))
    return drawn


def alike(draw: Callable[..., Draw]) -> Callable[[np.random.Generator], Draw]:
    """Two adapters of one rank: there A's and B's can be added up, too."""
    return lambda rng: draw(rng, [int(rng.integers(2, 6))] * 2)


Scale = Callable[[Any], float]


def scale(adapter: Any) -> float:
    """alpha / r."""
    return adapter["alpha"] / len(adapter["A"])


def root(adapter: Any) -> float:
    """alpha / sqrt(r), rsLoRA's."""
    return adapter["alpha"] / len(adapter["A"]) ** 0.5


def alpha_alone(adapter: Any) -> float:
    """Not divided."""
    return adapter["alpha"]


def one(adapter: Any) -> float:
    """No scale."""
    return 1.0


# -- 13.1 several adapters as one --------------------------------------------------------------------------------------


def stacked(
    of_b: Callable[[float, float], float] = lambda w, s: w * s,
    of_a: Callable[[float, float], float] = lambda w, s: 1.0,
    scale_of: Scale = scale,
    weights_of: Callable[[Any], Any] = list,
    order: int = 1,
) -> Callable:
    """Factors side by side, with weight and scale where `of_b` and `of_a` put them. order: -1 turns A's round."""

    def answer(adapters: Any, weights: Any) -> Any:
        pairs = [(each, w, scale_of(each)) for each, w in zip(adapters, weights_of(weights), strict=True)]
        A = np.concatenate([of_a(w, s) * each["A"] for each, w, s in pairs][::order])
        return A, np.concatenate([of_b(w, s) * each["B"] for each, w, s in pairs], axis=1)

    return answer


def added_up(adapters: Any, weights: Any) -> Any:
    """A's and B's added, which needs one rank for all."""
    both = list(zip(adapters, weights, strict=True))
    return sum(a["A"] for a, _ in both), sum(w * scale(a) * a["B"] for a, w in both)


def added_up_with_roots(adapters: Any, weights: Any) -> Any:
    """The same, with the root of each weight in both: what is called linear."""
    both = list(zip(adapters, weights, strict=True))
    return sum(w**0.5 * a["A"] for a, w in both), sum(w**0.5 * scale(a) * a["B"] for a, w in both)


def wrong_axis(adapters: Any, weights: Any) -> Any:
    """Side by side along the other axis."""
    both = list(zip(adapters, weights, strict=True))
    A = np.concatenate([a["A"] for a, _ in both], axis=1)
    return A, np.concatenate([w * scale(a) * a["B"] for a, w in both])


def first_scale(adapters: Any, weights: Any) -> Any:
    """The scale of the first adapter for all."""
    return stacked(scale_of=lambda each: scale(adapters[0]))(adapters, weights)


def scale_of_all(adapters: Any, weights: Any) -> Any:
    """Each alpha is divided by the rank of the whole."""
    rank = sum(len(each["A"]) for each in adapters)
    return stacked(scale_of=lambda each: each["alpha"] / rank)(adapters, weights)


def in_place(adapters: Any, weights: Any) -> Any:
    """Right, but the adapters are not what they were."""
    for each, w in zip(adapters, weights, strict=True):
        each["B"] *= w * scale(each)
    return stacked(of_b=lambda w, s: 1.0)(adapters, weights)


CROSS = "cross terms: a sum of B's times a sum of A's holds B1 A2 and B2 A1, too; put them side by side, R = r1 + r2"
TOO_SMALL = "divided by too much: the r of alpha / r is each adapter's own, not R; and a sum is wanted, not a mean"


@exercise(
    "13.1",
    draw=[alike(draw_cat), draw_cat],
    smallest=lambda rng: draw_cat(rng, [1]),
    returns="A (R, n), B (m, R)",
    decisive=['np.concatenate([a["A"] for a in adapters])', "in zip(adapters, factors, strict=True)], axis=1)"],
    mistakes={
        "weight squared": (
            stacked(of_a=lambda w, s: w),
            "the weight is squared: it stands in A and in B, and the product has both",
        ),
        "weight and scale squared": (
            stacked(of_a=lambda w, s: w * s),
            "weight and scale are squared: they stand in A and in B, and the product has both",
        ),
        "scale squared": (
            stacked(of_a=lambda w, s: s),
            "the scale is squared: it stands in A and in B, and the product has both",
        ),
        "cross terms": (added_up, CROSS),
        "cross terms, with roots": (added_up_with_roots, CROSS),
        "no scale": (stacked(of_b=lambda w, s: w), "the scale alpha / r of each adapter is missing"),
        "alpha": (stacked(scale_of=alpha_alone), "the scale is alpha / r, not alpha"),
        "square root": (stacked(scale_of=root), "the scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's"),
        "first scale": (first_scale, "each adapter has a scale of its own: that of the first is used for all"),
        "rank of all": (scale_of_all, TOO_SMALL),
        "no weights": (stacked(of_b=lambda w, s: s), "the weights are missing"),
        "share": (
            stacked(weights_of=lambda weights: [w / sum(weights) for w in weights]),
            "the weights are divided by their sum: take them as they are, they need not add up to 1",
        ),
        "mean": (
            stacked(weights_of=lambda weights: [w / len(weights) for w in weights]),
            TOO_SMALL,
        ),
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
            wrong_axis,
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


def mixed(
    factor: Callable[[float, float], float] = lambda w, s: w * s,
    base: Callable[[Any], float] = lambda weights: 1.0,
    scale_of: Scale = scale,
    which: slice = slice(None),
) -> Callable:
    """x Wᵀ times `base` and the updates, each times `factor`; `which` of them."""

    def answer(x: Any, W: Any, adapters: Any, weights: Any) -> Any:
        y = base(weights) * (x @ W.T)
        for each, w in list(zip(adapters, weights, strict=True))[which]:
            y = y + factor(w, scale_of(each)) * (x @ each["A"].T @ each["B"].T)
        return y

    return answer


def crossed(x: Any, W: Any, adapters: Any, weights: Any) -> Any:
    """One adapter of added A's and added B's."""
    A, B = added_up(adapters, weights)
    return x @ W.T + x @ A.T @ B.T


def crossed_with_roots(x: Any, W: Any, adapters: Any, weights: Any) -> Any:
    """The same, with roots."""
    A, B = added_up_with_roots(adapters, weights)
    return x @ W.T + x @ A.T @ B.T


def merged(x: Any, W: Any, adapters: Any, weights: Any) -> Any:
    """Forms W + sum of w s B A."""
    return x @ (W + sum(w * scale(a) * (a["B"] @ a["A"]) for a, w in zip(adapters, weights, strict=True))).T


def product_beside(x: Any, W: Any, adapters: Any, weights: Any) -> Any:
    """Forms the sum of w s B A."""
    return x @ W.T + x @ sum(w * scale(a) * (a["B"] @ a["A"]) for a, w in zip(adapters, weights, strict=True)).T


def divided(weights: Any) -> float:
    """The sum of the weights."""
    return float(sum(weights))


@exercise(
    "13.2",
    draw=[alike(draw_mix), draw_mix],
    smallest=lambda rng: draw_mix(rng, [1]),
    returns="y (T, m)",
    forbids={"m n": FORMS},
    also=refuse_products,
    decisive=['x @ adapter["A"].T @ adapter["B"].T'],
    mistakes={
        "weight squared": (mixed(lambda w, s: w * w * s), "the weight is squared: it stands in the update once"),
        "scale squared": (mixed(lambda w, s: w * s * s), "the scale is squared: it stands in the update once"),
        "cross terms": (
            crossed,
            "cross terms: the sum of the A's goes through the sum of the B's; each A has its own B",
        ),
        "cross terms, with roots": (
            crossed_with_roots,
            "cross terms: the sum of the A's goes through the sum of the B's; each A has its own B",
        ),
        "no scale": (mixed(lambda w, s: w), "the scale alpha / r of each adapter is missing"),
        "alpha": (mixed(scale_of=alpha_alone), "the scale is alpha / r, not alpha"),
        "square root": (mixed(scale_of=root), "the scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's"),
        "no weights": (mixed(lambda w, s: s), "the weights are missing"),
        "base once for each": (
            lambda x, W, adapters, weights: mixed(base=lambda ws: len(ws) + (len(ws) < 2))(x, W, adapters, weights),
            "x Wᵀ is added for each adapter: there is one base, and it counts once",
        ),
        "outputs mixed": (
            mixed(base=divided),
            "x Wᵀ is weighted, too: weights are of the updates, the base counts once and whole",
        ),
        "share": (
            lambda x, W, adapters, weights: mixed()(x, W, adapters, [w / sum(weights) for w in weights]),
            "the weights are divided by their sum: take them as they are, they need not add up to 1",
        ),
        "no base": (mixed(base=lambda weights: 0.0), "x Wᵀ is missing: y is the updates alone"),
        "only the last": (mixed(which=slice(-1, None)), "only the last adapter takes part: add the updates up"),
        "only the first": (
            mixed(which=slice(0, 1)),
            "only the first adapter takes part: is the `return` inside of the loop?",
        ),
        "subtracted": (mixed(lambda w, s: -w * s), "the updates are added, not subtracted"),
        "forms W": (merged, FORMS),
        "forms B A": (product_beside, FORMS),
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


def by_row(
    update: Callable[[Any, Any], Any] = lambda x, each: scale(each) * (x @ each["A"].T @ each["B"].T),
    choose: Callable[[int, Any], Any] = lambda i, names: names[i],
    base: Callable[[Any], float] = lambda name: 1.0,
) -> Callable:
    """Each row with the adapter that `choose` gives it, and x Wᵀ times `base` of its name."""

    def answer(x: Any, W: Any, adapters: Any, names: Any) -> Any:
        y = np.stack([base(name) * (row @ W.T) for row, name in zip(x, names, strict=True)])
        for i in range(len(names)):
            name = choose(i, names)
            if name is not None:
                y[i] += update(x[i], adapters[name])
        return y

    return answer


def first_only(i: int, names: Any) -> Any:
    """An adapter where its name stands first, and nowhere else."""
    return names[i] if names.index(names[i]) == i else None


def in_groups(x: Any, W: Any, adapters: Any, names: Any) -> Any:
    """The rows of one adapter after those of another, and never put back."""
    y = by_row()(x, W, adapters, names)
    return np.concatenate([y[[i for i, other in enumerate(names) if other == name]] for name in dict.fromkeys(names)])


def all_for_all(x: Any, W: Any, adapters: Any, names: Any) -> Any:
    """Every update on every row."""
    return x @ W.T + sum(scale(each) * (x @ each["A"].T @ each["B"].T) for each in adapters.values())


def all_wanted(x: Any, W: Any, adapters: Any, names: Any) -> Any:
    """The updates of all names, added on every row."""
    return x @ W.T + sum(scale(adapters[n]) * (x @ adapters[n]["A"].T @ adapters[n]["B"].T) for n in names if n)


def spread_out(x: Any, W: Any, adapters: Any, names: Any) -> Any:
    """The update of each row, added on every row."""
    return x @ W.T + sum(
        scale(adapters[n]) * (x[i] @ adapters[n]["A"].T @ adapters[n]["B"].T) for i, n in enumerate(names) if n
    )


def base_for_each(x: Any, W: Any, adapters: Any, names: Any) -> Any:
    """x Wᵀ once more for each adapter in the batch."""
    return by_row()(x, W, adapters, names) + (len({*names} - {None}) or 1) * (x @ W.T)


def without_none(x: Any, W: Any, adapters: Any, names: Any) -> Any:
    """Asks the dictionary for None."""
    return np.stack(
        [row @ W.T + x[0] @ adapters[name]["A"].T @ adapters[name]["B"].T for row, name in zip(x, names, strict=True)]
    )


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
            by_row(choose=lambda i, names: next((n for n in names if n), None)),
            "every row gets the first row's adapter: names[i] belongs to row i",
        ),
        "last for all": (
            by_row(choose=lambda i, names: names[-1]),
            "every row gets the last row's adapter: is it chosen before the rows are computed?",
        ),
        "all for all": (all_for_all, "every row gets every update: row i gets that of names[i] alone"),
        "all wanted": (all_wanted, "every row gets the updates of all rows: y[i] += ..., not y += ..."),
        "spread out": (spread_out, "every row gets the updates of all rows: y[i] += ..., not y += ..."),
        "only its first row": (
            by_row(choose=first_only),
            "an adapter reaches only the first row that asks for it: several rows may want the same one",
        ),
        "backwards": (
            by_row(choose=lambda i, names: names[-1 - i]),
            "the names are taken from the end: names[i] belongs to row i",
        ),
        "in groups": (in_groups, "the rows come back in another order: row i of y belongs to row i of x"),
        "None is zero": (
            by_row(base=lambda name: float(name is not None)),
            "a row without a name is zero: None means the base alone, x Wᵀ",
        ),
        "None is the first": (
            by_row(choose=lambda i, names: names[i] or names[0] or NAMES[0]),
            "a row with the name None gets an update: it is for the base alone",
        ),
        "None is looked up": (without_none, "KeyError: None"),
        "no base": (by_row(base=lambda name: 0.0), "x Wᵀ is missing: y is the updates alone"),
        "base once for each": (base_for_each, "x Wᵀ is added again for each adapter: it counts once in every row"),
        "no scale": (
            by_row(lambda x, each: x @ each["A"].T @ each["B"].T),
            "the scale alpha / r of each adapter is missing",
        ),
        "alpha": (
            by_row(lambda x, each: each["alpha"] * (x @ each["A"].T @ each["B"].T)),
            "the scale is alpha / r, not alpha",
        ),
        "square root": (
            by_row(lambda x, each: root(each) * (x @ each["A"].T @ each["B"].T)),
            "the scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's",
        ),
        "forms W": (
            lambda x, W, adapters, names: np.stack(
                [
                    row
                    @ (W if name is None else W + scale(adapters[name]) * (adapters[name]["B"] @ adapters[name]["A"])).T
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
    return mixed(scale_of=root)(x, W, adapters, weights)


@variant("answer_rows", RS)
def answer_rows_rs(x: Any, W: Any, adapters: Any, names: Any) -> Any:
    """With rsLoRA's scale."""
    return by_row(lambda x, each: root(each) * (x @ each["A"].T @ each["B"].T))(x, W, adapters, names)

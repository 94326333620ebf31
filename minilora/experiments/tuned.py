"""The best learning rate: of a few runs, of each contender of a comparison, and between the rates that were tried.

    contenders = {"LoRA": {"lr": 1e-2}, "full": {"lr": 1e-3, "method": "full"}}
    found = setting.tuned(tiny_run, contenders)      # in a claim; `tuned` itself elsewhere
    found["LoRA"]["lr"], [run["test"] for run in found["LoRA"]["runs"]]

A comparison at one rate for all favours the contender which that rate suits. The validation loss chooses the rate, so
that the test loss stays an honest result.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

Each = Callable[[Callable[..., Any], list[dict[str, Any]]], list[Any]]
Losses = Mapping[float, float | None]  # the validation loss at each rate that was tried; None where training broke off

HOPELESS = 8  # rates without one finite loss after which the search ends


def best_rate(tried: Losses) -> float | None:
    """The rate with the lowest loss, the lower of equal ones; None where no loss is finite.

    >>> best_rate({1e-3: 3.0, 1e-2: 2.0, 1e-1: None})
    0.01
    """
    found = {lr: loss for lr, loss in tried.items() if loss is not None and math.isfinite(loss)}
    return min(sorted(found), key=lambda lr: found[lr], default=None)


def next_rate(tried: Losses, nearest: float = 1.0, farthest: float = math.inf) -> float | None:
    """The rate to try next where the best one is the lowest or the highest of those tried: as far beyond it as its
    neighbour is on the other side, but at least and at most a factor of `nearest` and `farthest`. None where the best
    one lies between two others.

    >>> next_rate({2e-3: 3.0, 4e-3: 2.0}), next_rate({1e-4: 2.0, 1e-2: 3.0}, farthest=10**0.5)
    (0.008, 3.16e-05)
    """
    rates, best = sorted(tried), best_rate(tried)
    if best is None or len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    factor = rates[1] / rates[0] if best == rates[0] else rates[-1] / rates[-2]
    factor = min(farthest, max(nearest, factor))
    return float(f"{best / factor if best == rates[0] else best * factor:.3g}")


def tuned(
    each: Each,
    function: Callable[..., Any],
    contenders: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    search: Sequence[int] | None = None,
    per_decade: int = 2,
    walk: bool = True,
) -> dict[str, dict[str, Any]]:
    """Find each contender's best learning rate, and run it there with every seed.

    each: runs the trials, such as `Setting.attempt`.
    function: takes the arguments of a contender and `seed`, and returns {"validation": loss, ...}.
    contenders: by name, the arguments of `function`. "lr" is the rate where the search begins, or a list of rates,
        which are all that is tried.
    seeds: those of the runs that are returned.
    search: the seeds whose mean validation loss decides, the first of `seeds` if left out.
    per_decade: rates in a factor of ten.
    walk: try the neighbours of the best rate until both are worse, so that no contender's best is at an edge of what
        was tried. False: try "lr" alone, for a form that only has seconds.

    Returns by name {"lr": the best, "tried": [[lr, mean validation loss], ...] in order, "by_seed": {seed: the same for
    that seed alone}, "runs": what function returned at the best lr, for each of `seeds`}. A trial that failed, for
    example because its loss stopped being finite, counts as infinitely bad, and its loss is None. Raises RuntimeError
    where no rate gives a finite loss, or a seed fails at the best rate.
    """
    search = list(seeds[:1] if search is None else search)
    results: dict[tuple[str, float, int], Mapping[str, Any]] = {}
    tried: dict[str, dict[float, float]] = {name: {} for name in contenders}

    def run(asked: Sequence[tuple[str, float, int]]) -> None:
        new = [key for key in asked if key not in results]
        trials = [dict(contenders[name], lr=lr, seed=seed) for name, lr, seed in new]
        made = each(function, [without_defaults(function, trial) for trial in trials]) if new else []
        results.update(zip(new, made, strict=True))

    def ahead(name: str) -> list[float]:
        given = contenders[name]["lr"]
        if isinstance(given, Sequence) or not walk:
            return [lr for lr in (given if isinstance(given, Sequence) else [given]) if lr not in tried[name]]
        begin = (best_rate(tried[name]) or min(tried[name])) if tried[name] else given
        return [lr for lr in _beside(begin, per_decade) if lr not in tried[name]]

    while asked := [(name, lr) for name in contenders for lr in ahead(name)]:
        run([(name, lr, seed) for name, lr in asked for seed in search])
        for name, lr in asked:
            tried[name][lr] = sum(_loss(results[name, lr, seed]) for seed in search) / len(search)
            if len(tried[name]) >= HOPELESS and best_rate(tried[name]) is None:
                _refuse(name, "at any learning rate", [results[name, lr, search[0]]])
    best = {name: best_rate(losses) or min(losses) for name, losses in tried.items()}
    run([(name, best[name], seed) for name in contenders for seed in seeds])
    found: dict[str, dict[str, Any]] = {}
    for name, losses in tried.items():
        runs = [results[name, best[name], seed] for seed in seeds]
        _refuse(name, f"at its best learning rate {best[name]:g}", runs)
        found[name] = {
            "lr": best[name],
            "tried": [[lr, _finite(losses[lr])] for lr in sorted(losses)],
            "by_seed": {
                str(seed): [[lr, _finite(_loss(results[name, lr, seed]))] for lr in sorted(losses)] for seed in search
            },
            "runs": runs,
        }
    return found


def as_numbers(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a claim stores of `tuned`: by contender, the test losses, the parameters, the best rate and all tried."""
    return {
        "loss on the test": {name: [run["test"] for run in one["runs"]] for name, one in found.items()},
        "parameters": {name: one["runs"][0]["trained"] for name, one in found.items()},
        "rates": {name: one["lr"] for name, one in found.items()},
        "tried": {name: one["tried"] for name, one in found.items()},
    }


def without_defaults(function: Callable[..., Any], trial: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that differ from the defaults: equal runs then have equal arguments, and the memo finds them.

    >>> without_defaults(lambda lr, r=8, seed=0: None, {"lr": 0.1, "r": 8, "seed": 1})
    {'lr': 0.1, 'seed': 1}
    """
    usual = {name: each.default for name, each in inspect.signature(function).parameters.items()}
    return {name: value for name, value in trial.items() if usual.get(name, inspect.Parameter.empty) != value}


def vertex(tried: Sequence[Sequence[Any]]) -> float:
    """The learning rate at the lowest point of the parabola through the best of [[lr, loss], ...] and its neighbours,
    in log lr: it lies between the rates that were tried. The best rate itself if it lacks a neighbour with a loss.

    >>> round(vertex([[1e-3, 3.0], [1e-2, 1.0], [1e-1, 3.0]]), 6)
    0.01
    """
    losses = [math.inf if loss is None else loss for _, loss in tried]
    i = losses.index(min(losses))
    near = losses[max(0, i - 1) : i + 2]
    if len(near) < 3 or not all(map(math.isfinite, near)) or near[0] == near[1] == near[2]:
        return float(tried[i][0])
    a, b, c = (math.log(lr) for lr, _ in tried[i - 1 : i + 2])
    low, here, high = near
    left, right = (b - a) * (here - high), (b - c) * (here - low)
    return math.exp(b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right))


def first_step(curve: Sequence[Sequence[float]], loss: float, between: bool = True) -> float:
    """The first step at which a curve of (step, loss) is as low as this; a ValueError where it never is.

    between: on the straight line between two points. Otherwise the step of the first point that is low enough.

    >>> first_step([(0, 3.0), (8, 2.0)], 2.5), first_step([(0, 3.0), (8, 2.0)], 2.5, between=False)
    (4.0, 8)
    """
    if curve[0][1] <= loss:
        return curve[0][0]
    for (before, high), (after, low) in pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low) if between else after
    raise ValueError(f"the loss {loss:.3f} is not reached: the lowest is {min(low for _, low in curve):.3f}")


def _beside(lr: float, per_decade: int) -> Iterator[float]:
    """The rate of the ladder that is nearest to lr, and both its neighbours: numbers that are easy to read, such as
    0.00316 and 0.01 where there are two in a decade."""
    rung = round(per_decade * math.log10(lr))
    for k in (rung - 1, rung, rung + 1):
        yield float(f"{10 ** (k / per_decade):.3g}")


def _refuse(name: str, where: str, runs: Sequence[Mapping[str, Any]]) -> None:
    if failed := [run["failed"] for run in runs if "failed" in run]:
        raise RuntimeError(f"{name} {where}: {failed[0]}")


def _loss(result: Mapping[str, Any]) -> float:
    loss = result.get("validation", math.inf)
    return loss if math.isfinite(loss) else math.inf


def _finite(loss: float) -> float | None:
    """As JSON can hold it."""
    return loss if math.isfinite(loss) else None

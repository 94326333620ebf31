"""Each contender at its own best learning rate: a comparison at one rate for all tells who that rate suits.

    found = tuned(setting.each, tiny_run, {"LoRA": {"lr": 1e-2}, "full": {"lr": 1e-3, "method": "full"}}, setting.seeds)
    found["LoRA"]["lr"], [run["test"] for run in found["LoRA"]["runs"]]

The rate is chosen by the loss on validation, so that the test's is left to report.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Each = Callable[[Callable[..., Any], list[dict[str, Any]]], list[Any]]


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

    contenders: by name, the arguments of `function`, which also takes `seed` and returns {"validation": loss, ...};
        their "lr" is where the search begins. search: the seeds whose mean validation loss decides, the first of
        `seeds` if left out. per_decade: rates in a factor of ten.
    walk: the rates beside the best one are tried until both of them are worse, so that none wins at an edge of what was
        tried. False: the rates given are taken as they are, for a form that only has seconds.

    Returns by name {"lr": the best, "tried": [[lr, mean validation loss], ...] in order, "by_seed": {seed: the same for
    that seed alone}, "runs": what function returned at the best lr, for each of `seeds`}. A trial that failed, as
    where a rate is so high that the loss ceases to be finite, counts as infinitely bad and stands there as None.
    RuntimeError where a seed fails at the best of all rates.
    """
    search = list(seeds[:1] if search is None else search)
    best = {name: _rung(trial["lr"], per_decade) for name, trial in contenders.items()}
    rates = {
        name: (lambda k, lr=trial["lr"]: _rate(k, per_decade) if walk else lr) for name, trial in contenders.items()
    }
    losses: dict[str, dict[int, list[float]]] = {name: {} for name in contenders}
    while True:
        near = (-1, 0, 1) if walk else (0,)
        asked = [(name, k) for name in contenders for k in (best[name] + i for i in near) if k not in losses[name]]
        if not asked:
            break
        trials = [dict(contenders[name], lr=rates[name](k), seed=seed) for name, k in asked for seed in search]
        results = iter(each(function, [without_defaults(function, trial) for trial in trials]))
        for name, k in asked:
            losses[name][k] = [_loss(next(results)) for _ in search]
        best = {name: min(tried, key=lambda k: (_mean(tried[k]), k)) for name, tried in losses.items()}
    trials = [dict(contenders[name], lr=rates[name](best[name]), seed=seed) for name in contenders for seed in seeds]
    runs = iter(each(function, [without_defaults(function, trial) for trial in trials]))
    found: dict[str, dict[str, Any]] = {}
    for name, tried in losses.items():
        order = sorted(tried)
        ended = [next(runs) for _ in seeds]
        found[name] = {
            "lr": rates[name](best[name]),
            "tried": [[rates[name](k), _finite(_mean(tried[k]))] for k in order],
            "by_seed": {
                str(seed): [[rates[name](k), _finite(tried[k][i])] for k in order] for i, seed in enumerate(search)
            },
            "runs": ended,
        }
        if failed := [run["failed"] for run in ended if "failed" in run]:
            raise RuntimeError(f"{name} at its best learning rate {found[name]['lr']:g}: {failed[0]}")
    return found


def without_defaults(function: Callable[..., Any], trial: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that say something: equal runs are then asked for in equal words, and a cache finds them again.

    >>> without_defaults(lambda lr, r=8, seed=0: None, {"lr": 0.1, "r": 8, "seed": 1})
    {'lr': 0.1, 'seed': 1}
    """
    usual = {name: each.default for name, each in inspect.signature(function).parameters.items()}
    return {name: value for name, value in trial.items() if usual.get(name, inspect.Parameter.empty) != value}


def vertex(tried: Sequence[Sequence[Any]]) -> float:
    """The learning rate where the parabola through the best of [[lr, loss], ...] and its two neighbours is lowest, in
    log lr: what lies between the rates that were tried. The best itself where it has not two neighbours with a loss.

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


def _rung(lr: float, per_decade: int) -> int:
    return round(per_decade * math.log10(lr))


def _rate(k: int, per_decade: int) -> float:
    """The k-th rate of the ladder, a number that can be read: 0.00316 and 0.01 where there are two in a decade."""
    return float(f"{10 ** (k / per_decade):.3g}")


def _loss(result: Mapping[str, Any]) -> float:
    loss = result.get("validation", math.inf)
    return loss if math.isfinite(loss) else math.inf


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def _finite(loss: float) -> float | None:
    """As JSON can say it."""
    return loss if math.isfinite(loss) else None

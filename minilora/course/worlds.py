"""Simulated experiments for exercise 11.3, in which the true difference between two methods is known."""

import math
from collections.abc import Callable

import numpy as np

from ..measure.statistics import student
from .exercises import Draw

RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


def draw_world(
    planted: Callable[[float, int], tuple[float, float]], first: bool = False
) -> Callable[[np.random.Generator], Draw]:
    """A world whose tuned difference has a known mean and standard deviation: planted(claimed, number of seeds).

    Each method has four rates that could be taken for its best: by the mean on validation, on the test, for the first
    seed, by the median; one seed is bad at the best rate. The two methods are best at different rates; the new one
    sometimes at the first of the list, and always with `first`; the old one never.
    """

    def draw(rng: np.random.Generator) -> Draw:
        seeds = [int(seed) for seed in rng.choice(np.arange(10, 99), int(rng.integers(4, 7)), replace=False)]
        claimed = float(rng.uniform(0.05, 0.1))
        mean, deviation = planted(claimed, len(seeds))
        pattern = rng.standard_normal(len(seeds))
        differences = mean + deviation * (pattern - pattern.mean()) / pattern.std(ddof=1)
        common = 2.6 + 0.05 * rng.standard_normal(len(seeds))
        best = {"old": 1 + rng.permutation(4)}
        best["new"] = np.append(0, 1 + rng.permutation(4)) if first else rng.permutation(5)
        if best["new"][0] == best["old"][0]:
            best["new"] = np.roll(best["new"], 1)
        table = {}
        for method, (by_validation, by_test, by_seed, by_median, *_) in best.items():
            validation, test = (3 + 0.02 * rng.standard_normal((len(RATES), len(seeds))) for _ in range(2))
            validation[by_validation] -= 0.4
            validation[by_seed, 0] -= 0.6
            validation[by_median] -= 0.5
            validation[[by_validation, by_median], -1] += 0.5, 3
            test[by_validation] = common - (differences if method == "new" else 0)
            test[by_test] -= 0.7
            for i, lr in enumerate(RATES):
                for j, seed in enumerate(seeds):
                    table[method, lr, seed] = {"validation": float(validation[i, j]), "test": float(test[i, j])}

        def run(method: str, lr: float, seed: int) -> dict[str, float]:
            if (method, lr, seed) not in table:
                raise ValueError(f"no run {method!r}, {lr!r}, {seed!r}: method 'old' or 'new', a rate, one of {seeds}")
            return dict(table[method, lr, seed])

        return Draw(None, run=run, rates=list(RATES), seeds=seeds, claimed=claimed)

    return draw


def errors_from_zero(errors: Callable[[int], float]) -> Callable[[float, int], tuple[float, float]]:
    """A mean a little above the claim, and this number of standard errors from zero."""
    return lambda claimed, n: (1.2 * claimed, 1.2 * claimed * math.sqrt(n) / errors(n))


WORLDS = [
    draw_world(lambda claimed, n: (0.4 * claimed, 0.15 * claimed), True),  # hardly any effect, a large one if untuned
    draw_world(lambda claimed, n: (1.5 * claimed, 0.2 * claimed)),  # a real effect
    draw_world(errors_from_zero(lambda n: 1.6)),  # the mean is in the band, perhaps by chance
    draw_world(errors_from_zero(lambda n: math.sqrt(1.96 * student(n - 1)))),  # 1.96 standard errors would accept it
    draw_world(lambda claimed, n: (-1.5 * claimed, 0.2 * claimed)),  # the new one is worse
    draw_world(lambda claimed, n: (-0.5 * claimed, 2 * claimed)),  # worse by the mean, but undecided
]

"""Full fine-tuning of the tiny base, its update cut to a rank afterwards: what is left of what was learned?"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..lora.spectra import singular_values, svd
from ..measure.loss import evenly, mean_loss
from ..train.loop import fit
from .tiny import reset, samples_of, tiny_base


def cut_update(
    lr: float,
    seed: int,
    ranks: list[int],
    at_random: bool = False,
    steps: int = 60,
    batch_size: int = 4,
    held_out: int = 30,
    data: str = "legal",
) -> dict[str, Any]:
    """Train every weight, and measure what is left of the gain with r directions of each change, for each r.

    Vectors, such as the norms' scales, keep their whole change. Returns {"left": {r: share of the gain}, "energy": {r:
    mean share of Σ s²}, "chance": {r: the same of random matrices of these shapes}, "loss": [before, after]}.
    """
    model, _ = tiny_base()
    held, rng = evenly(samples_of(data)["test"], held_out), np.random.default_rng(seed)
    before = {name: p.data.copy() for name, p in model.named_parameters()}
    first = mean_loss(model, held)
    try:
        fit(model, samples_of(data)["train"], steps, lr, batch_size=batch_size, seed=seed)
        last = mean_loss(model, held)
        changes = {name: p.data - before[name] for name, p in model.named_parameters() if p.ndim == 2}
        parts = {name: svd(change) for name, change in changes.items()}
        losses, energy = {}, {}
        for r in ranks:
            for name, p in model.named_parameters():
                if name in parts:
                    u, s, vt = parts[name]
                    kept = rng.permutation(len(s))[:r] if at_random else np.arange(min(r, len(s)))
                    p.data[...] = before[name] + (u[:, kept] * s[kept]) @ vt[kept]
            losses[r] = mean_loss(model, held)
            energy[r] = float(np.mean([(s[:r] ** 2).sum() / (s**2).sum() for _, s, _ in parts.values()]))
        noise = [singular_values(rng.standard_normal(change.shape)) ** 2 for change in changes.values()]
        chance = {r: float(np.mean([s[:r].sum() / s.sum() for s in noise])) for r in ranks}
    finally:
        reset(model)
    left = {r: (first - loss) / (first - last) for r, loss in losses.items()}
    tables = {"left": left, "energy": energy, "chance": chance}
    return {name: {str(r): value for r, value in table.items()} for name, table in tables.items()} | {
        "loss": [first, last]
    }

"""The default learning rate for a base: as large as its weights allow."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from ..engine.backend import dense, to_numpy
from ..models.hub import known_as
from ..models.load import load
from ..nn.language_model import LanguageModel
from ..nn.layers import Linear
from .options import RATE

ROWS = 64  # of each matrix that are looked at


@cache
def rate_of(base: str) -> float:
    """LoRA's default learning rate on a base, by name."""
    return RATE if known_as(base) else usual_rate(load(base)[0])


def usual_rate(model: LanguageModel) -> float:
    """A learning rate for LoRA on this base: a hundredth of the root mean square of its matrices, rounded to one digit.

    In each step AdamW moves the entries of A and B by about the learning rate, whatever the base is, and what is added
    to a weight must be small compared with it. The root mean square is 0.19 in SmolLM2, which gives the 2e-3 measured
    as good for it, and 0.04 in Gemma 3 270M, which gives 4e-4; at 2e-3, training on labels broke that one. In models
    whose weights are as large as they began, about 0.02, it gives the 2e-4 usual there. (tests/benchmarks/README.md)
    """
    squares = [
        float(np.square(to_numpy(dense(module.weight.data, 0, ROWS)), dtype=np.float64).mean())
        for name, module in model.named_modules()
        if isinstance(module, Linear) and not name.endswith("lm_head")
    ]
    found = float(f"{math.sqrt(np.mean(squares)) / 100:.0e}")
    return found if 0 < found < math.inf else RATE

"""Lesson 20's exercises: the backward pass of LayerNorm by hand, and the base of a rotation for a given length."""

import numpy as np

from . import lesson05
from .exercises import Draw, exercise, variant

# -- 20.1 LayerNorm ----------------------------------------------------------------------------------------------------


def draw_norm(rng: np.random.Generator, N: int | None = None) -> Draw:
    """x, g (N, C) with a mean that is not zero, w (C), and an eps large enough to be seen."""
    drawn = lesson05.draw_norm(rng, N)
    drawn["x"] += rng.uniform(1, 3)
    drawn["g"] += rng.uniform(1, 3)
    return drawn


@exercise(
    "20.1",
    draw=draw_norm,
    smallest=lambda rng: draw_norm(rng, N=1),
    returns="dx (N, C), dw (C), dbias (C)",
    by_hand=True,
)
def layer_norm_vjp(x, w, g, eps):
    """x (N, C), w (C), g (N, C) -> dx (N, C), dw (C), dbias (C)"""
    inv = 1 / np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    z = (x - x.mean(axis=-1, keepdims=True)) * inv
    gw = g * w
    dx = inv * (gw - gw.mean(axis=-1, keepdims=True) - z * (gw * z).mean(axis=-1, keepdims=True))
    dw = (g * z).sum(axis=0)
    return dx, dw, g.sum(axis=0)


variant(
    "layer_norm_vjp",
    {
        r"\,w + b \qquad": r"\,(1 + w) + b \qquad",
        "all tokens share `w` and `b`.": "all tokens share `w`, stored as the difference from 1, and `b`.",
        "gw = g * w": "gw = g * (1 + w)",
    },
    "the factor is 1 + w",
    lines={"times w, so": "times 1 + w, so", "receives g w": "receives g (1 + w)"},
)


# -- 20.2 another base -------------------------------------------------------------------------------------------------


def draw_rotation(rng: np.random.Generator, slow: int | None = None) -> Draw:
    """A head's width, a length, and how many pairs must be slow."""
    D = int(rng.choice([16, 32, 64, 128]))
    slow = int(rng.integers(2, D // 4)) if slow is None else slow
    return Draw(D=D, T=int(rng.integers(600, 9000)), slow=slow)


@exercise(
    "20.2",
    draw=draw_rotation,
    smallest=lambda rng: draw_rotation(rng, slow=1),
    returns="the base",
    tolerance=1e-8,
)
def rope_base(D, T, slow):
    """D the head's width, T a number of tokens, slow a number of pairs -> the base"""
    i = D // 2 - 1 - slow
    return (T / (2 * np.pi)) ** (D / (2 * i))


variant(
    "rope_base",
    {
        "turns exactly once": "turns exactly a quarter",
        "pairs make less than one turn": "pairs make less than a quarter of a turn",
        "T / (2 * np.pi)": "T / (0.5 * np.pi)",
    },
    "a quarter of a turn, not a whole one",
    lines={
        "a whole turn is 2 pi: the angle": "a quarter of a turn is pi / 2: the angle",
        "a whole turn is 2 pi, not pi": "a quarter of a turn is pi / 2, not pi",
        "(2 * np.pi / T)": "(0.5 * np.pi / T)",
    },
)

"""The linear layer of DoRA as one operation; `fused.lora_linear` is that of LoRA."""

from __future__ import annotations

import math

import numpy as np

from .backend import Array, array_module
from .fused import Recompute, computed_once, product, product_back, rows
from .tensor import op

SMALL = 1e-6  # magnitude / norm below this: the output has too little of x Vᵀ to compute it back


@op(wants_recompute=True)
def dora_linear(x, w, a, b, magnitude, norms: Array, scale: float, recompute: Recompute = None):
    """y = (x Vᵀ) magnitude / norms, V = w + scale b a      x (..., n)  w (m, n), maybe packed  ->  y (..., m)

    The linear layer of DoRA, Liu et al. 2024 (arXiv 2402.09353): see `lora/variants.py`. V is never formed.
    a (r, n), b (m, r), magnitude (m). norms (m): those of V's rows, which are constants here.
    Saves x and x aᵀ as `lora_linear` does, and y for the magnitude's gradient. Where the operation after it saves y as
    well, as attention and swiglu do, y takes no further memory. If a magnitude is almost zero, and on a GPU
    always, x Vᵀ is saved too, for such magnitudes.
    """
    xp, shape, x = array_module(x), x.shape, rows(x)
    xa = x @ a.T  # (N, r)
    xa *= scale
    norms = xp.asarray(norms, x.dtype)
    quotient = magnitude / norms  # (m)
    y = product(x, w, (xa, b.T))  # x Vᵀ, (N, m)
    small = abs(quotient) < SMALL  # of these columns, x Vᵀ cannot be computed back from y
    lost = None if xp is np and not small.any() else y * (small / norms)  # a GPU would make the host wait
    y *= quotient
    x_of = recompute or (lambda: x)
    gb_of = computed_once(lambda g: rows(g) @ (b * (quotient * scale)[:, None]))  # (N, r): shared by dx and da

    def dx(g):
        return product_back(rows(g) * quotient, w, (gb_of(g), a)).reshape(shape)

    def dw(g):  # w is frozen, as in `lora_linear`
        return (rows(g) * quotient).T @ rows(x_of())

    def da(g):
        return gb_of(g).T @ rows(x_of())  # (r, n)

    def db(g):
        return (rows(g).T @ xa) * quotient[:, None]  # (m, r)

    def dmagnitude(g):
        divisor = xp.where(abs(quotient) < SMALL, magnitude.dtype.type(math.inf), magnitude)
        out = xp.einsum("nm,nm->m", rows(g), y) / divisor  # y / magnitude = x Vᵀ / norms
        return out if lost is None else out + xp.einsum("nm,nm->m", rows(g), lost)

    return y.reshape(*shape[:-1], len(w)), dx, dw, da, db, dmagnitude

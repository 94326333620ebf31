"""What others changed about LoRA, each as a small difference to `layer.py`.

dropout   the low-rank branch sees x with holes, in training only
DoRA      the length of each row learns apart from its direction
PiSSA     A and B start as the largest part of W instead of as nothing
LoRA+     B learns faster than A

rsLoRA is one line, and stands where the scale is computed: `LoraConfig.scale_of`.

Shapes: m outputs, n inputs, r rank. A (r, n), B (m, r) and the base's matrix W (m, n); for an embedding, W is the
transposed table (C, V), since looking up a row is multiplying the table's transpose by a one-hot vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..engine.backend import Array, array_module
from ..engine.parallel import current_micro_batch
from ..engine.recompute import remembered
from ..engine.tensor import Tensor, is_recording
from ..nn.module import Module
from .config import LoraConfig

# -- dropout -----------------------------------------------------------------------------------------------------------


class Dropout(Module):
    """x with each element zeroed with probability p and the others divided by 1 - p, so that the mean stays.

    LoRA applies it to the input of A and B only; the frozen product sees x whole. With DoRA it is the input of the
    whole correction, as in PEFT. Srivastava et al. 2014 (jmlr.org/papers/v15/srivastava14a.html).

    Active in training only: in train mode, and not inside `no_grad`. The holes depend on `seed`, this layer's and this
    adapter's alone, on the micro-batch and on how often that has drawn: so they are the same in every run, the same
    where a block is computed again for backward, and can go on where a saved adapter stopped (`state`, `restore`).
    """

    def __init__(self, p: float, seed: int):
        self.p, self.seed = p, seed
        self.draws: dict[int, int] = {}  # by micro-batch

    def summary(self) -> str:
        """Its probability, where a model is printed."""
        return f"p={self.p:g}"

    @property
    def active(self) -> bool:
        return self.training and is_recording()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., n): x itself where dropout is not active."""
        if not self.active:
            return x
        xp = array_module(x.data)
        kept = xp.random.default_rng(remembered(self._draw)).random(x.shape, dtype=xp.float32) >= self.p
        return x * (kept.astype(x.dtype) * (1 / (1 - self.p)))

    def _draw(self) -> int:
        """The seed of the next holes."""
        i = current_micro_batch.get()
        count = self.draws[i] = self.draws.get(i, 0) + 1
        return int(np.random.default_rng([self.seed, i, count]).integers(2**63))

    def state(self) -> dict[str, Any]:
        """Where it stands, for a JSON file: the seed, and how often each micro-batch has drawn."""
        return {"seed": self.seed, "draws": {str(i): count for i, count in sorted(self.draws.items())}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. Raises ValueError or KeyError for what is none, and is as before then."""
        seed, draws = state["seed"], {int(i): count for i, count in state["draws"].items()}
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (seed, *draws, *draws.values())):
            raise ValueError("expected whole numbers from 0 on")
        self.seed, self.draws = seed, draws


# -- DoRA --------------------------------------------------------------------------------------------------------------


def row_norms(w: Array, a: Array, b: Array, scale: float) -> Array:
    """‖V_i‖ for each row of V = W + scale · B A, (m), without forming B A.

    ‖w + s b A‖² = ‖w‖² + 2 s b · (A w) + s² b (A Aᵀ) bᵀ, one row w of W and b of B at a time.
    """
    xp, b = array_module(w), b * scale
    square = xp.einsum("mn,mn->m", w, w)
    square += 2 * xp.einsum("mr,mr->m", w @ a.T, b)
    square += xp.einsum("mr,mr->m", b @ (a @ a.T), b)
    return xp.sqrt(xp.maximum(square, float(xp.finfo(w.dtype).tiny)))  # never zero, since it is divided by


def dora_update(product: Tensor, low: Tensor, magnitude: Tensor, norms: Array, factor: float = 1.0) -> Tensor:
    """What DoRA adds to W x: diag(magnitude / ‖V‖) V x - W x, times `factor`.

    Liu et al. 2024 (arXiv 2402.09353): W is taken apart into the length and the direction of each row (a column, as
    the paper lays W out). LoRA then moves the direction, V = W + scale · B A, and a magnitude vector m learns the
    length. At the start m = ‖W‖, the quotient is 1 and nothing is added.

    The norm is an array and not a tensor: it takes no part in the gradient (section 4.3 of the paper), which saves
    memory and changes the result little. PEFT does the same.

    product: W x (..., m). low: scale · B A x (..., m). magnitude (m), norms (m) = `row_norms`.
    """
    quotient = magnitude / norms
    return product * ((quotient - 1) * factor) + low * (quotient * factor)


def dora_delta(w: Array, low: Array, magnitude: Array, norms: Array) -> Array:
    """The same as one matrix: diag(magnitude / ‖V‖) V - W with V = W + low, (m, n)."""
    return (magnitude / norms)[:, None] * (w + low) - w


# -- PiSSA -------------------------------------------------------------------------------------------------------------


def pissa_start(w: Array, r: int, scale: float) -> tuple[Array, Array]:
    """A (r, n) and B (m, r) with scale · B A = the best approximation of W of rank r, (U√S, √S Vᵀ) of its SVD.

    Meng, Wang & Zhang 2024 (arXiv 2404.02948): training starts with the largest directions of W, and what is left of
    W, the residual W - scale · B₀ A₀, is frozen. Both gradients are large from the first step on.

    The residual is never stored. What PiSSA computes, residual · x + scale · B A x, is W x + scale (B A - B₀ A₀) x: so
    the base's own array stays what it is, shared by all adapters, and the adapter keeps its first A₀ and B₀, r (m + n)
    more numbers, frozen. Removing the adapter therefore restores the base without doing anything. What is lost is
    PiSSA's gain on quantised bases, which comes from quantising the residual.
    """
    xp = array_module(w)
    u, s, vt = xp.linalg.svd(w, full_matrices=False)
    root = xp.sqrt(s[:r] / scale)
    return root[:, None] * vt[:r], u[:, :r] * root


def with_start(a: Array, b: Array, start: tuple[Array, Array] | None) -> tuple[Array, Array]:
    """PiSSA's update B A - B₀ A₀ as one product B' A', with A' = [A; A₀] (2r, n) and B' = [B, -B₀] (m, 2r).

    This is how a PiSSA adapter is saved: as a plain LoRA of twice the rank, which PEFT and everything else puts on the
    unchanged base. PEFT calls it `path_initial_model_for_weight_conversion`. Without a start, A and B themselves.
    """
    if start is None:
        return a, b
    xp = array_module(a)
    return xp.concatenate((a, start[0]), axis=0), xp.concatenate((b, -start[1]), axis=1)


def config_with_start(config: LoraConfig) -> LoraConfig:
    """The settings that belong to `with_start`: twice the rank, and alpha grown so that every scale stays the same.

    Another config than PiSSA's is returned as it is.
    """
    if config.init_lora_weights != "pissa":
        return config
    growth = 2**0.5 if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: growth * alpha for key, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


# -- LoRA+ -------------------------------------------------------------------------------------------------------------


def lora_plus(parameters: Mapping[str, Tensor], ratio: float = 16.0) -> dict[str, float]:
    """How much faster each parameter learns: `ratio` for B, 1 for A. For AdamW's `lr_scale`.

        parameters = model.trainable_parameters()
        optimizer = AdamW(parameters, lr=1e-4, lr_scale=lora_plus(parameters, ratio=16))

    Hayou, Ghosh & Yu 2024 (arXiv 2402.12354): with one learning rate for both, A hardly learns features in wide
    models; B's must be larger, by a ratio that grows with the width. Vectors (DoRA's magnitudes, biases) go with B, as
    in PEFT; the factors on an embedding learn at the plain rate.

    Raises ValueError for a ratio that is not positive, or when there is no B.
    """
    if not 0 < ratio < float("inf"):
        raise ValueError(f"the ratio of learning rates must be a positive number, got {ratio!r}")
    fast = {name for name, p in parameters.items() if name.endswith("lora_B") or p.ndim == 1}
    if not any(name.endswith("lora_B") for name in fast):
        raise ValueError("LoRA+ needs a trainable lora_B: add an adapter first")
    return {name: ratio if name in fast else 1.0 for name in parameters}

"""Variants of LoRA, each as a small change to `layer.py`.

dropout   the low-rank branch gets x with random elements zeroed, in training only
DoRA      the magnitude of each row is trained separately from its direction
PiSSA     A and B are initialised from the largest singular vectors of W
LoRA+     B has a higher learning rate than A

rsLoRA only changes the scale: see `LoraConfig.scale_of`.

Shapes: m outputs, n inputs, r rank; A (r, n), B (m, r), and the base's matrix W (m, n).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..engine import fused
from ..engine.backend import Array, array_module
from ..engine.parallel import current_micro_batch
from ..engine.recompute import remembered
from ..engine.tensor import Tensor, is_recording
from ..nn.module import Module
from .config import FROM_BASE, LoraConfig

# -- dropout -----------------------------------------------------------------------------------------------------------


class Dropout(Module):
    """Zero each element with probability p and divide the others by 1 - p, which keeps the expected value.

    LoRA applies dropout to the input of A only, not to the frozen product; with DoRA, as in PEFT, to the input of the
    whole correction. Srivastava et al. 2014 (jmlr.org/papers/v15/srivastava14a.html).

    It is active in training only: in train mode and outside `no_grad`. The mask depends on `seed`, which belongs to
    one layer of one adapter, on the micro-batch, and on how many masks that micro-batch has drawn. Masks are therefore
    equal in every run and in recomputed blocks, and can continue where a saved adapter stopped (`state`, `restore`).
    """

    def __init__(self, p: float, seed: int):
        self.p, self.seed = p, seed
        self.draws: dict[int, int] = {}  # how many masks each micro-batch has drawn

    def summary(self) -> str:
        """The probability, for printing the model."""
        return f"p={self.p:g}"

    @property
    def active(self) -> bool:
        return self.training and is_recording()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., n). Without active dropout it returns x itself."""
        return fused.masked(x, mask=self.draw()) if self.active else x

    def draw(self) -> fused.Mask:
        """The next mask, which is made from its seed wherever it is needed, and never held."""
        seed, p = remembered(self._draw), self.p

        def mask(like: Array) -> Array:
            xp = array_module(like)
            kept = xp.random.default_rng(seed).random(like.shape, dtype=xp.float32) >= p
            return kept * like.dtype.type(1 / (1 - p))

        return mask

    def _draw(self) -> int:
        """The seed of the next mask."""
        i = current_micro_batch.get()
        count = self.draws[i] = self.draws.get(i, 0) + 1
        return int(np.random.default_rng([self.seed, i, count]).integers(2**63))

    def state(self) -> dict[str, Any]:
        """The seed and the number of masks drawn for each micro-batch, for a JSON file."""
        return {"seed": self.seed, "draws": {str(i): count for i, count in sorted(self.draws.items())}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`. Raises ValueError or KeyError for an invalid one, and changes nothing then."""
        seed, draws = state["seed"], {int(i): count for i, count in state["draws"].items()}
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (seed, *draws, *draws.values())):
            raise ValueError("expected integers of at least 0")
        self.seed, self.draws = seed, draws


# -- DoRA --------------------------------------------------------------------------------------------------------------


def row_norms(w: Array, a: Array, b: Array, scale: float) -> Array:
    """The norm of each row of V = W + scale · B A, (m), computed without forming B A.

    ‖w + s b A‖² = ‖w‖² + 2 s b · (A w) + s² b (A Aᵀ) bᵀ for a row w of W, the same row b of B, and the scale s.
    """
    xp, b = array_module(w), b * scale
    square = xp.einsum("mn,mn->m", w, w)
    square += 2 * xp.einsum("mr,mr->m", w @ a.T, b)
    square += xp.einsum("mr,mr->m", b @ (a @ a.T), b)
    return xp.sqrt(xp.maximum(square, float(xp.finfo(w.dtype).tiny)))  # never zero, because it is a divisor


def dora_update(product: Tensor, low: Tensor, magnitude: Tensor, norms: Array, factor: float | Array) -> Tensor:
    """What DoRA adds to W x: diag(magnitude / ‖V‖) V x - W x, times `factor`.

    Liu et al. 2024 (arXiv 2402.09353): W is decomposed into the magnitude and the direction of each row (a column in
    the paper's layout). LoRA updates the direction, V = W + scale · B A, and a magnitude vector is trained separately.
    Initially magnitude = ‖W‖, so the quotient is 1 and nothing is added.

    The norm is an array, not a tensor, so no gradient flows through it (section 4.3 of the paper). This saves memory
    and changes the result little. PEFT does the same.

    product: W x, (..., m). low: scale · B A x, (..., m). magnitude: the trained ones, (m). norms: `row_norms`, (m).
    """
    update = (product + low) * (magnitude / norms) - product  # saves the sum V x, and neither of its terms
    return update if isinstance(factor, float) and factor == 1 else update * factor


def dora_delta(w: Array, low: Array, magnitude: Array, norms: Array) -> Array:
    """The update of `dora_update` as one matrix: diag(magnitude / ‖V‖) V - W with V = W + low, low = scale · B A."""
    return (magnitude / norms)[:, None] * (w + low) - w


# -- PiSSA -------------------------------------------------------------------------------------------------------------


def pissa_initial(w: Array, r: int, scale: float) -> tuple[Array, Array]:
    """A (r, n) and B (m, r) such that scale · B A is the best rank-r approximation of W: (U√S, √S Vᵀ) of its SVD.

    Meng, Wang & Zhang 2024 (arXiv 2404.02948): the largest singular vectors of W are trained, and the residual
    W - scale · B₀ A₀ is frozen. Both gradients are large from the first step.

    The residual is never stored. PiSSA's residual · x + scale · B A x equals W x + scale (B A - B₀ A₀) x. The base's
    own array therefore stays unchanged and is shared by all adapters; the adapter stores its initial A₀ and B₀, which
    are r (m + n) further frozen parameters. Dropout is on the input of B A alone, since B₀ A₀ is a part of the
    residual. Only PiSSA's gain on quantised bases is lost, which comes from quantising the residual.
    """
    xp = array_module(w)
    u, s, vt = xp.linalg.svd(w, full_matrices=False)
    root = xp.sqrt(s[:r] / scale)
    return root[:, None] * vt[:r], u[:, :r] * root


def with_initial(a: Array, b: Array, initial: tuple[Array, Array] | None) -> tuple[Array, Array]:
    """PiSSA's update B A - B₀ A₀ as one product B' A', with A' = [A; A₀] (2r, n) and B' = [B, -B₀] (m, 2r).

    A PiSSA adapter is saved in this form: a plain LoRA of twice the rank, which PEFT and other programs can apply to
    the unchanged base. PEFT calls it `path_initial_model_for_weight_conversion`. If initial is None, A and B.
    """
    if initial is None:
        return a, b
    xp = array_module(a)
    return xp.concatenate((a, initial[0]), axis=0), xp.concatenate((b, -initial[1]), axis=1)


def config_with_initial(config: LoraConfig) -> LoraConfig:
    """The hyperparameters of the adapter that `with_initial` returns: twice the rank, and an alpha with equal scales.

    Any config other than PiSSA's is returned unchanged.
    """
    if config.init_lora_weights not in FROM_BASE:
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
    """The learning rate of each parameter, as a multiple of A's: `ratio` for B, 1 for A. For AdamW's `lr_scale`.

        parameters = model.trainable_parameters()
        optimizer = AdamW(parameters, lr=1e-4, lr_scale=lora_plus(parameters, ratio=16))

    Hayou, Ghosh & Yu 2024 (arXiv 2402.12354): with equal learning rates, training is inefficient in wide models; B
    needs a larger one, by a ratio that grows with the width. DoRA's magnitudes get B's rate, as in PEFT.

    Raises ValueError for a ratio that is not positive and finite, or if there is no lora_B.
    """
    if not isinstance(parameters, Mapping):
        raise TypeError(f"expected parameters by name, model.trainable_parameters(), got a {type(parameters).__name__}")
    if not 0 < ratio < float("inf"):
        raise ValueError(f"the ratio of learning rates must be a positive number, got {ratio!r}")
    fast = {name for name, p in parameters.items() if name.endswith("lora_B") or p.ndim == 1}
    if not any(name.endswith("lora_B") for name in fast):
        raise ValueError("LoRA+ needs a trainable lora_B: call add_adapter first")
    return {name: ratio if name in fast else 1.0 for name in parameters}

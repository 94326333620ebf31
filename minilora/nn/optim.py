"""Optimizers, gradient clipping and learning-rate schedules. Parameters and gradients are changed in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..engine.backend import Array, array_module, owned
from ..engine.fused import blocks
from ..engine.tensor import Tensor

_BLOCK = 1 << 16  # elements that AdamW updates at a time: 256 KiB, of which the second-level cache holds a few


def _listed(parameters: Mapping[str, Tensor] | Iterable[Tensor]) -> list[Tensor]:
    """Parameters given by name, or in any order, as a list. Raises TypeError for anything else, such as a model."""
    given = parameters.values() if isinstance(parameters, Mapping) else parameters
    listed = list(given) if isinstance(given, Iterable) else [given]
    if wrong := [type(each).__name__ for each in listed if not isinstance(each, Tensor)]:
        raise TypeError(f"expected parameters, such as model.trainable_parameters(), got a {wrong[0]}")
    if len({id(each) for each in listed}) < len(listed):  # it would take two steps at once
        raise ValueError("the same parameter is given twice: give each once, as model.trainable_parameters() does")
    return listed


def _lies_in(least: float, value: Any, below: float) -> bool:
    return isinstance(value, (int, float, np.number)) and bool(least <= value < below)


class Optimizer:
    """Holds the parameters to train: a dict by name, as `model.trainable_parameters()`, or a list."""

    def __init__(self, parameters: Mapping[str, Tensor] | Iterable[Tensor], lr: float):
        self.parameters = _listed(parameters)
        if not self.parameters:
            raise ValueError("nothing to train: no parameter requires a gradient; add an adapter or unfreeze the model")
        if not _lies_in(0, lr, math.inf):
            raise ValueError(f"the learning rate must be a finite number of at least 0, got {lr!r}")
        self.lr = lr

    def __repr__(self) -> str:
        elements = sum(p.size for p in self.parameters)
        return f"{type(self).__name__}({len(self.parameters)} tensors, {elements:,} parameters, lr {self.lr:g})"

    def zero_grad(self) -> None:
        """Delete all gradients. Otherwise, the next backward pass adds to them."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient; defined by each optimizer."""
        raise NotImplementedError


class SGD(Optimizer):
    """p -= lr · grad, with optional momentum: velocity = momentum · velocity + grad, p -= lr · velocity.

    Raises ValueError for a momentum outside of 0 <= momentum < 1.
    """

    def __init__(self, parameters: Mapping[str, Tensor] | Iterable[Tensor], lr: float, momentum: float = 0.0):
        super().__init__(parameters, lr)
        if not _lies_in(0, momentum, 1):
            raise ValueError(f"momentum must be a number of at least 0 and below 1, got {momentum!r}")
        self.momentum = momentum
        self.velocity: list[Array | None] = [None] * len(self.parameters)

    def step(self) -> None:
        """One step of gradient descent."""
        for i, p in enumerate(self.parameters):
            step = p.grad
            if step is None:
                continue
            if self.momentum:
                before = self.velocity[i]
                step = self.velocity[i] = step.copy() if before is None else before * self.momentum + step
            p.data = owned(p.data)
            p.data -= self.lr * step


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101), as PyTorch computes it.

    Its state, the first and second moments m and v of the gradient, is two arrays of each parameter's size: for full
    fine-tuning twice the model, for LoRA twice the adapter.

    parameters: a dict by name, as `model.trainable_parameters()`, or a list.
    lr: the learning rate; it may be changed between steps.
    betas: the decay rates of m and v.
    eps: added to the root of v.
    weight_decay: each step shrinks the parameters by lr · weight_decay.
    lr_scale: factors on the learning rate by name, 1 for all others (see `lora.variants.lora_plus`).

    Raises ValueError for a name in `lr_scale` that is not among the parameters, and for values out of range.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor] | Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lr_scale: Mapping[str, float] | None = None,
    ):
        super().__init__(parameters, lr)
        if np.shape(betas) != (2,) or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers, each at least 0 and below 1, got {betas!r}")
        if not (_lies_in(0, eps, math.inf) and _lies_in(0, weight_decay, math.inf)):
            said = "must be finite numbers and must not be negative"
            raise ValueError(f"eps and weight_decay {said}, got {eps!r} and {weight_decay!r}")
        if lr_scale is not None and not isinstance(lr_scale, Mapping):
            raise TypeError(f"lr_scale must be factors by name, got a {type(lr_scale).__name__}")
        scales = dict(lr_scale or {})
        for name, factor in scales.items():
            if not _lies_in(0, factor, math.inf):
                raise ValueError(f"lr_scale[{name!r}] must be a finite number of at least 0, got {factor!r}")
        names = list(parameters) if isinstance(parameters, Mapping) else [""] * len(self.parameters)
        if unknown := [name for name in scales if name not in names]:
            raise ValueError(f"lr_scale names {unknown[0]!r}, which is not among the parameters to train")
        self.lr_scale = [scales.get(name, 1.0) for name in names]
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.steps = [0] * len(self.parameters)  # of each parameter, those in which it had a gradient
        self.m = [array_module(p.data).zeros(p.shape, p.dtype) for p in self.parameters]
        self.v = [array_module(p.data).zeros(p.shape, p.dtype) for p in self.parameters]

    def step(self) -> None:
        """One AdamW step for every parameter that has a gradient."""
        beta1, beta2 = self.betas
        for k, (p, m_all, v_all) in enumerate(zip(self.parameters, self.m, self.v, strict=True)):
            if p.grad is None:
                continue
            if not p.shape == p.grad.shape == m_all.shape:
                raise ValueError(
                    f"a parameter has shape {p.shape}, its gradient {p.grad.shape} and its moments {m_all.shape}: "
                    "after a change of shape, make a new optimizer and compute the gradient again"
                )
            self.steps[k] += 1
            unbias1, unbias2 = 1 - beta1 ** self.steps[k], 1 - beta2 ** self.steps[k]
            lr = self.lr * self.lr_scale[k]
            xp = array_module(p.data)
            p.data = owned(p.data)  # a transposed view, say, has no flat view
            flat = [x.reshape(-1) for x in (p.data, p.grad, m_all, v_all)]
            for i, j in blocks(p.size, _BLOCK):
                w, g, m, v = (x[i:j] for x in flat)
                m += (g - m) * (1 - beta1)
                v *= beta2
                v += g * g * (1 - beta2)
                if self.weight_decay:
                    w *= 1 - lr * self.weight_decay
                w -= lr / unbias1 * m / (xp.sqrt(v) / math.sqrt(unbias2) + self.eps)


def clip_grad_norm(parameters: Mapping[str, Tensor] | Iterable[Tensor], max_norm: float) -> Array:
    """Scale all gradients so that their common norm is at most `max_norm`; return the norm before.

    On a GPU the norm is a zero-dimensional array there, so that the host need not wait for it. Raises ValueError for a
    `max_norm` that is not above 0, which would delete all gradients or turn them round.
    """
    if not isinstance(max_norm, (int, float, np.number)) or not max_norm > 0:
        raise ValueError(f"max_norm must be a number above 0, or inf for none, got {max_norm!r}")
    grads = [p.grad for p in _listed(parameters) if p.grad is not None]
    if not grads:
        return 0.0
    xp = array_module(grads[0])
    squares = xp.stack([g.reshape(-1) @ g.reshape(-1) for g in grads]).astype(xp.float64)
    norm = xp.sqrt(squares.cumsum()[-1])  # summed in order, in float64
    if xp is np and not norm > max_norm:
        return norm
    factor = xp.where(norm > max_norm, max_norm / (norm + 1e-6), 1.0)
    for g in grads:
        g *= factor.astype(g.dtype)
    return norm


def _schedule(fall: Callable[[float], float]) -> Callable[[int, int, int], float]:
    """The factor on the learning rate at a step, counted from 0: linear up to 1 over the warm-up, then as `fall` says.

    fall: the factor at each fraction of the other steps, from 0 at the end of the warm-up to 1 at `total` and later.
    """

    def factor(step: int, total: int, warmup: int) -> float:
        return (step + 1) / warmup if step < warmup else fall(min((step - warmup) / max(total - warmup, 1), 1.0))

    return factor


SCHEDULES = {
    "cosine": _schedule(lambda x: 0.5 * (1 + math.cos(math.pi * x))),
    "linear": _schedule(lambda x: 1 - x),
    "constant": _schedule(lambda x: 1.0),
}

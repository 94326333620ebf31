"""Gradient check of a whole model: the gradients of a training step, compared with central differences of its loss.

A model has too many parameters to move each of them. But along a random direction u, all elements of a parameter at
once, the loss changes by <gradient, u> per unit: one number, which two forward passes measure, and which a mistake
anywhere in the gradient changes. The check is in float64, on a copy of the model, with dropout off.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from ..engine.backend import Array, dense, to_numpy
from ..engine.gradcheck import GradcheckReport, GradientError, compare, gradcheck
from ..engine.tensor import Tensor
from ..options import check_whole
from ..progress import progress
from .language_model import LanguageModel
from .module import Module
from .parts import Batch, Example, check_samples
from .step import add_gradients, loss_without_grad

__all__ = ["gradcheck", "gradcheck_model"]  # the first takes functions as well as models

Checkable = TypeVar("Checkable", bound=Module)
SEARCHED = 32  # elements of a wrong gradient that are measured one by one, to name one


@gradcheck.register(Module)
def gradcheck_module(
    module: Module, *arrays: Array, eps: float = 1e-5, tolerance: float = 1e-6, seed: int = 0
) -> GradcheckReport:
    """Check the gradient of every element of a module's trainable parameters and inputs, as `gradcheck` of a function.

    arrays: the inputs. Arrays of integers, such as token ids, are passed as they are. The module itself is not changed.
    """
    own = _in_float64(module)
    given = [to_numpy(x) for x in arrays]
    floats = {f"input {i}": Tensor(x.astype(np.float64)) for i, x in enumerate(given) if x.dtype.kind == "f"}
    of = own.trainable_parameters() | floats
    for x in of.values():
        x.requires_grad = True
        x.grad = None
    inputs = [floats.get(f"input {i}", x) for i, x in enumerate(arrays)]
    return compare(lambda *_: own(*inputs), type(module).__name__, of, eps, tolerance, seed)


@gradcheck.register(LanguageModel)
def gradcheck_model(
    model: LanguageModel,
    batch: Batch | Sequence[Example],
    *,
    directions: int = 1,
    eps: float = 1e-4,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> GradcheckReport:
    """Check the gradient of every trainable parameter of a model: `ml.gradcheck(model, samples)`.

    The gradients are those of a training step, in micro-batches on all cores. The model itself is not changed. DoRA
    fails by design: its backward pass takes the norm of the weights as a constant (Liu et al. 2024,
    arXiv 2402.09353, section 4.3).

    batch: samples, or a batch, whose loss is differentiated.
    directions: random directions in which each parameter is moved.
    eps: half the distance of the central differences, in units of the parameter's root mean square.
    tolerance: the largest accepted error, relative to the norm of the parameter's gradient. A norm below a thousandth
        of the largest one counts as that, since measured derivatives have rounding errors.
    seed: of the directions.

    Raises GradientError that names the worst parameter and one of its elements, and the last parameter whose gradient
    is wrong: the mistake lies in an operation between that one and the next. Raises RuntimeError if nothing is
    trainable, ValueError without samples or directions.
    """
    if not isinstance(batch, Batch):
        check_samples(batch)
        if not batch:
            raise ValueError("no samples to check the gradient on: give some")
    check_whole("directions", directions, 1)
    check = _Check(model, batch, eps, seed)
    worst, wrong = (0.0, ""), []
    with progress("gradients", len(check.parameters), "parameter") as bar:
        for name in check.parameters:
            error = max(check.error(name) for _ in range(directions))
            worst = max(worst, (error, name))
            if not error <= tolerance:  # written so that NaN fails
                wrong.append(name)
            bar.update(1)
    if wrong:
        raise GradientError(
            f"{check.largest_error(worst[1])}; along a random direction, the error is {worst[0]:.1e} of the gradient's "
            f"norm (tolerance {tolerance:.0e}); "
            f"{len(wrong)} of {len(check.parameters)} parameters have a wrong gradient, the last of them {wrong[-1]}"
        )
    return GradcheckReport(type(model).__name__, sum(p.size for p in check.parameters.values()), worst[0])


def _in_float64(module: Checkable) -> Checkable:
    """A copy on the host, with dropout off."""
    own = copy.deepcopy(module)
    for _, parameter in own.eval().named_parameters():
        parameter.data = to_numpy(dense(parameter.data)).astype(np.float64)
    return own


class _Check:
    """A copy of a model in float64 with its gradients, whose parameters can be moved."""

    def __init__(self, model: LanguageModel, batch: Batch | Sequence[Example], eps: float, seed: int):
        self.model, self.batch, self.eps = _in_float64(model), batch, eps
        self.parameters = self.model.trainable_parameters()
        for parameter in self.parameters.values():
            parameter.grad = None
        self.rng = np.random.default_rng(seed)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite counts as wrong
            add_gradients(self.model, batch)
        norms = [float(np.linalg.norm(self.gradient(name))) for name in self.parameters]
        self.least = 1e-3 * max([norm for norm in norms if math.isfinite(norm)], default=0.0) or 1e-8

    def gradient(self, name: str) -> np.ndarray:
        """The gradient of a parameter; 0 if it does not take part in the loss."""
        parameter = self.parameters[name]
        return np.zeros(parameter.shape) if parameter.grad is None else parameter.grad

    def measured(self, name: str, direction: np.ndarray) -> float:
        """The derivative of the loss when a parameter moves along a direction, by central differences."""
        parameter, losses = self.parameters[name], []
        there, step = parameter.data, self.eps * max(float(np.sqrt(np.mean(parameter.data**2))), 1e-2)
        for sign in (1, -1):
            parameter.data = there + sign * step * direction
            losses.append(loss_without_grad(self.model, self.batch))
        parameter.data = there
        return (losses[0] - losses[1]) / (2 * step)

    def error(self, name: str) -> float:
        """The distance of gradient and measured derivative in a random direction, relative to the gradient's norm; inf
        if the gradient is not finite.
        """
        gradient = self.gradient(name)
        direction = self.rng.standard_normal(gradient.shape)
        with np.errstate(invalid="ignore"):
            apart = abs(float(np.sum(gradient * direction)) - self.measured(name, direction))
        return apart / max(float(np.linalg.norm(gradient)), self.least) if math.isfinite(apart) else math.inf

    def largest_error(self, name: str) -> str:
        """An element of a wrong gradient, got and expected, to check by hand: the worst of those that are measured."""
        gradient = self.gradient(name)
        found = []
        for place in self.rng.permutation(gradient.size)[:SEARCHED]:
            direction = np.zeros(gradient.size)
            direction[place] = 1
            expected = self.measured(name, direction.reshape(gradient.shape))
            apart = abs(gradient.flat[place] - expected)
            found.append((apart if math.isfinite(apart) else math.inf, int(place), expected))
        _, place, expected = max(found)
        index = tuple(int(i) for i in np.unravel_index(place, gradient.shape))
        return f"gradient of {name} at {index}: got {gradient.flat[place]:.6g}, expected {expected:.6g}"

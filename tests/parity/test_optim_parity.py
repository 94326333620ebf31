"""Parity with torch: optimizers, gradient clipping and schedules move parameters to the same place."""

import numpy as np
import pytest
from otherside import parity, torch, transformers

from minilora.engine.tensor import Tensor
from minilora.nn import optim
from minilora.nn.optim import clip_grad_norm

pytestmark = parity

SIZES = [(3, 5), (7,), (70_000,), (2, 3, 4)]  # one is longer than the block that AdamW works on
TOLERANCE = {np.float32: {"rtol": 2e-5, "atol": 2e-6}, np.float64: {"rtol": 1e-12, "atol": 1e-13}}
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def twins(rng, dtype):
    """The same parameters twice: minilora's and torch's."""
    arrays = [rng.standard_normal(size).astype(dtype) for size in SIZES]
    ours = [Tensor(a.copy(), requires_grad=True) for a in arrays]
    return ours, [torch.nn.Parameter(torch.from_numpy(a.copy())) for a in arrays]


def give_gradients(rng, ours, theirs):
    """The same gradients to both, of sizes from 1e-4 to 1e2."""
    for p, q in zip(ours, theirs, strict=True):
        grad = (rng.standard_normal(p.shape) * 10.0 ** rng.uniform(-4, 2, p.shape)).astype(p.dtype)
        p.grad, q.grad = grad, torch.from_numpy(grad.copy())


def assert_same(ours, theirs, dtype):
    for p, q in zip(ours, theirs, strict=True):
        assert p.dtype == dtype
        np.testing.assert_allclose(p.data, q.detach().numpy(), **TOLERANCE[dtype])


MOVED = [
    *(("AdamW", {"lr": 1e-2, **more}) for more in ({}, {"weight_decay": 0.0}, {"lr": 3e-2, "weight_decay": 0.3})),
    *(("AdamW", {"lr": 1e-2, "betas": betas, "eps": eps}) for betas, eps in (((0.8, 0.95), 1e-4), ((0.0, 0.5), 1e-8))),
    *(("SGD", {"lr": 1e-3, "momentum": momentum}) for momentum in (0.0, 0.5, 0.9)),
]


@every_dtype
@pytest.mark.parametrize(("name", "settings"), MOVED, ids=str)
def test_parameters_move_as_torch_moves_them(name, settings, dtype, rng):
    ours, theirs = twins(rng, dtype)
    optimizer, reference = getattr(optim, name)(ours, **settings), getattr(torch.optim, name)(theirs, **settings)
    for _ in range(12):
        give_gradients(rng, ours, theirs)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs, dtype)


@every_dtype
@pytest.mark.parametrize("factor", [0.01, 0.999, 1.001, 100.0])  # of the norm the gradients have
def test_clipping_scales_gradients_and_reports_the_norm_as_torch_does(factor, dtype, rng):
    ours, theirs = twins(rng, dtype)
    give_gradients(rng, ours, theirs)
    ours[1].grad = theirs[1].grad = None
    norm = float(np.sqrt(sum((p.grad.astype(np.float64) ** 2).sum() for p in ours if p.grad is not None)))
    got, expected = clip_grad_norm(ours, factor * norm), torch.nn.utils.clip_grad_norm_(theirs, factor * norm)
    assert got == pytest.approx(expected.item(), rel=1e-5) == pytest.approx(norm, rel=1e-5)
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_after_the_warmup_a_schedule_is_that_of_transformers(name, warmup):
    """The warmup itself differs: that of transformers begins at 0, so that its first step changes nothing."""
    kind = "constant_with_warmup" if name == "constant" else name
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler(kind, optimizer, warmup, num_training_steps=11)
    theirs = [(scheduler.get_last_lr()[0], optimizer.step(), scheduler.step())[0] for _ in range(11)]
    ours = [optim.SCHEDULES[name](step, 11, warmup) for step in range(11)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:])

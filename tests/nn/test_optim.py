"""Optimizers step as their formulas say, clipping bounds the norm, and the schedule rises and falls."""

import math

import numpy as np
import pytest

from minilora.engine.tensor import Tensor
from minilora.nn.module import Parameter
from minilora.nn.optim import SCHEDULES, SGD, AdamW, clip_grad_norm, warmup_cosine


def parameter(rng, *shape, dtype=np.float64):
    return Parameter(rng.standard_normal(shape).astype(dtype))


def train(optimizer, parameters, gradients):
    """One step for each entry of `gradients`, itself one array per parameter."""
    for step in gradients:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.copy()
        optimizer.step()


def adamw_formula(w, gradients, lr, beta1, beta2, eps, decay):
    """Loshchilov & Hutter 2019, algorithm 2, with the decay scaled by the learning rate as PyTorch does."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = w - lr * decay * w - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return w


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_follows_its_formula(rng, momentum):
    p, gradients = parameter(rng, 3, 2), rng.standard_normal((5, 1, 3, 2))
    expected, velocity = p.data.copy(), 0.0
    for (g,) in gradients:
        velocity = momentum * velocity + g
        expected -= 0.1 * velocity
    train(SGD([p], lr=0.1, momentum=momentum), [p], gradients)
    np.testing.assert_allclose(p.data, expected, rtol=1e-12)


def test_momentum_remembers_the_gradient_that_was_and_not_its_array(rng):
    p = parameter(rng, 2)
    before = p.data.copy()
    optimizer = SGD([p], lr=1.0, momentum=0.5)
    p.grad = np.ones(2)
    optimizer.step()
    p.grad *= 0  # in place, as clipping and backward do
    optimizer.step()
    np.testing.assert_allclose(p.data, before - 1.5, rtol=1e-12)


ADAMW = [
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.0},
    {"lr": 0.05, "betas": (0.0, 0.99), "eps": 1e-8, "weight_decay": 0.5},
]


@pytest.mark.parametrize("settings", ADAMW)
@pytest.mark.parametrize("shape", [(), (4, 3), (70_000,)], ids=["number", "matrix", "longer than a block"])
def test_adamw_follows_its_formula(rng, shape, settings):
    p, gradients = parameter(rng, *shape), rng.standard_normal((4, 1, *shape))
    expected = adamw_formula(
        p.data.copy(), gradients[:, 0], settings["lr"], *settings["betas"], settings["eps"], settings["weight_decay"]
    )
    train(AdamW([p], **settings), [p], gradients)
    np.testing.assert_allclose(p.data, expected, rtol=1e-11, atol=1e-13)


def test_decay_follows_the_learning_rate_of_its_own_parameter(rng):
    p, q = parameter(rng, 3), parameter(rng, 3)
    before = p.data.copy(), q.data.copy()
    optimizer = AdamW({"p": p, "q": q}, lr=0.1, weight_decay=0.5, lr_scale={"q": 4.0})
    p.grad, q.grad = np.zeros(3), np.zeros(3)  # nothing but decay moves them
    optimizer.step()
    np.testing.assert_allclose(p.data, before[0] * (1 - 0.1 * 0.5), rtol=1e-12)
    np.testing.assert_allclose(q.data, before[1] * (1 - 0.4 * 0.5), rtol=1e-12)


def test_the_first_adamw_step_has_the_length_of_the_learning_rate(rng):
    p = parameter(rng, 10)
    before = p.data.copy()
    train(AdamW([p], lr=0.01, weight_decay=0), [p], [[np.array([1e-3, -1e3] * 5)]])
    np.testing.assert_allclose(p.data - before, [-0.01, 0.01] * 5, rtol=1e-4)


@pytest.mark.parametrize(
    "make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=0.1, weight_decay=0.0)], ids=["SGD", "AdamW"]
)
class TestAnyOptimizer:
    def test_changes_arrays_in_place_and_keeps_float32(self, rng, make):
        p = parameter(rng, 4, 3, dtype=np.float32)
        array, before = p.data, p.data.copy()
        train(make([p]), [p], np.ones((2, 1, 4, 3), np.float32))
        assert p.data is array and array.dtype == np.float32 and (array < before).all()

    def test_leaves_the_gradient_as_it_is(self, rng, make):
        p, g = parameter(rng, 3), np.array([1.0, 2.0, 3.0])
        optimizer = make([p])
        p.grad = g
        optimizer.step()
        optimizer.step()
        np.testing.assert_array_equal(g, [1, 2, 3])

    def test_trains_a_transposed_view_too(self, rng, make):
        p = Parameter(rng.standard_normal((3, 4)).T)
        q = Parameter(p.data.copy())
        gradients = rng.standard_normal((3, 1, 4, 3))
        train(make([p]), [p], gradients)
        train(make([q]), [q], gradients)
        np.testing.assert_allclose(p.data, q.data, rtol=1e-14)

    def test_skips_a_parameter_without_gradient_and_goes_on_to_the_next(self, rng, make):
        first, q, last = (parameter(rng, 3) for _ in range(3))
        before = [p.data.copy() for p in (first, q, last)]
        optimizer = make([first, q, last])
        first.grad = last.grad = np.ones(3)
        optimizer.step()
        np.testing.assert_array_equal(q.data, before[1])
        assert (first.data < before[0]).all() and (last.data < before[2]).all()

    def test_prints_in_one_line(self, rng, make):
        kind = type(make([parameter(rng, 1)])).__name__
        assert repr(make([parameter(rng, 3), parameter(rng, 40, 50)])) == f"{kind}(2 tensors, 2,003 parameters, lr 0.1)"

    def test_zero_grad_forgets_all_gradients(self, rng, make):
        p, q = parameter(rng, 3), parameter(rng, 3)
        optimizer = make({"p": p, "q": q})
        p.grad = np.ones(3)
        optimizer.zero_grad()
        assert p.grad is None and q.grad is None

    def test_uses_the_learning_rate_of_the_moment(self, rng, make):
        p = parameter(rng, 3)
        before = p.data.copy()
        optimizer = make([p])
        optimizer.lr = 0.0
        train(optimizer, [p], np.ones((1, 1, 3)))
        np.testing.assert_array_equal(p.data, before)

    def test_takes_a_dict_a_list_or_a_generator(self, rng, make):
        parameters = {"a": parameter(rng, 2), "b": parameter(rng, 3)}
        for given in (parameters, list(parameters.values()), (p for p in parameters.values())):
            assert make(given).parameters == list(parameters.values())

    @pytest.mark.parametrize("nothing", [[], {}, iter(())])
    def test_refuses_to_train_nothing(self, make, nothing):
        with pytest.raises(ValueError, match="nothing to train"):
            make(nothing)

    def test_finds_the_minimum_of_a_parabola(self, rng, make):
        p, goal = parameter(rng, 5), rng.standard_normal(5)
        optimizer = make([p])
        for step in range(300):
            optimizer.lr = 0.1 * warmup_cosine(step, total=300, warmup=10)
            ((p - goal) * (p - goal)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        np.testing.assert_allclose(p.data, goal, atol=1e-3)


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_a_negative_learning_rate_is_refused(rng, optimizer):
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.1"):
        optimizer([parameter(rng, 1)], lr=-0.1)


# -- clipping ----------------------------------------------------------------------------------------------------------


def with_gradients(*gradients):
    parameters = [Tensor(np.zeros_like(g), requires_grad=True) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    return parameters


def test_clipping_scales_all_gradients_by_one_factor_and_returns_the_norm_before():
    parameters = with_gradients(np.array([3.0, 0.0]), np.array([[0.0], [4.0]]), np.array(12.0))
    assert clip_grad_norm(parameters, max_norm=1.3) == 13
    for p, expected in zip(parameters, ([0.3, 0], [[0], [0.4]], 1.2), strict=True):
        np.testing.assert_allclose(p.grad, expected, rtol=1e-6)


def test_clipping_leaves_a_small_gradient_alone():
    parameters = with_gradients(np.array([3.0, 4.0]))
    assert clip_grad_norm(parameters, max_norm=5.0) == 5
    np.testing.assert_array_equal(parameters[0].grad, [3, 4])


def test_clipping_reaches_the_gradient_that_backward_gave_a_single_number():
    x = Tensor(2.0, requires_grad=True)
    (x * x).backward()
    clip_grad_norm([x], max_norm=1.0)
    assert x.grad == pytest.approx(1, rel=1e-5)


def test_clipping_takes_a_dict_and_skips_parameters_without_gradient():
    p, q = Tensor([1.0], requires_grad=True), Tensor([1.0], requires_grad=True)
    p.grad = np.array([2.0])
    assert clip_grad_norm({"p": p, "q": q}, max_norm=1.0) == 2
    assert p.grad == pytest.approx(1, rel=1e-5) and q.grad is None
    assert clip_grad_norm([q], max_norm=1.0) == 0


# -- schedule ----------------------------------------------------------------------------------------------------------


def test_the_schedule_rises_in_a_line_and_falls_along_half_a_cosine():
    factors = [warmup_cosine(step, total=24, warmup=4) for step in range(25)]
    np.testing.assert_allclose(factors[:4], [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(factors[4:], [0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(21)], atol=1e-15)


def test_the_schedule_stays_at_its_floor_and_never_leaves_its_bounds():
    factors = [warmup_cosine(step, total=10, warmup=3, floor=0.1) for step in range(30)]
    assert factors[10:] == pytest.approx([0.1] * 20)
    assert all(0.1 - 1e-12 <= factor <= 1 for factor in factors)


DOWN = [("cosine", [1, 0.75, 0.25, 0]), ("linear", [1, 2 / 3, 1 / 3, 0]), ("constant", [1, 1, 1, 1])]


@pytest.mark.parametrize(("name", "falls"), DOWN)
def test_every_schedule_rises_in_a_line_and_falls_in_its_own_way(name, falls):
    factors = [SCHEDULES[name](step, 7, 4) for step in range(8)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, *falls]) and len(DOWN) == len(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (5, 0), (3, 3), (2, 5)])
def test_the_schedule_works_without_warmup_and_without_anything_else(total, warmup, name):
    factors = [SCHEDULES[name](step, total, warmup) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors) and factors[0] > 0

"""Optimizers step as their formulas say, clipping bounds the norm, and the schedule rises and falls."""

import functools
import math
import operator
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import minilora as ml
from minilora.engine.tensor import Tensor
from minilora.nn.module import Parameter
from minilora.nn.optim import SCHEDULES, SGD, AdamW, clip_grad_norm


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


@pytest.mark.parametrize("use", [AdamW, partial(SGD, lr=1.0), partial(clip_grad_norm, max_norm=1.0)])
def test_a_parameter_that_is_given_twice_is_refused(rng, use):
    p, q = parameter(rng, 2), parameter(rng, 2)
    p.grad = q.grad = np.ones(2)
    use([p, q])
    for twice in ([p, q, p], {"one": p, "other": p}):
        with pytest.raises(ValueError, match="given twice"):
            use(twice)


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


def test_adamw_counts_the_steps_of_each_parameter_alone(rng):
    p, q, gradients = parameter(rng, 3), parameter(rng, 3), rng.standard_normal((6, 3))
    expected = [
        adamw_formula(x.data.copy(), g, 0.1, 0.9, 0.999, 1e-8, 0.5) for x, g in ((p, gradients), (q, gradients[4:]))
    ]
    optimizer = AdamW([p, q], lr=0.1, weight_decay=0.5)
    for i, g in enumerate(gradients):
        p.grad, q.grad = g, g if i >= 4 else None
        optimizer.step()
    np.testing.assert_allclose([p.data, q.data], expected, rtol=1e-12)


def test_decay_follows_the_learning_rate_of_its_own_parameter(rng):
    p, q = parameter(rng, 3), parameter(rng, 3)
    before = p.data.copy(), q.data.copy()
    optimizer = AdamW({"q": q, "p": p}, lr=0.1, weight_decay=0.5, lr_scale={"q": 4.0})
    p.grad, q.grad = np.zeros(3), np.zeros(3)  # nothing but decay moves them
    optimizer.step()
    np.testing.assert_allclose(p.data, before[0] * (1 - 0.1 * 0.5), rtol=1e-12)
    np.testing.assert_allclose(q.data, before[1] * (1 - 0.4 * 0.5), rtol=1e-12)


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

    def test_takes_a_dict_a_list_or_a_generator_and_forgets_their_gradients(self, rng, make):
        parameters = {"a": parameter(rng, 2), "b": parameter(rng, 3)}
        for each in (parameters, list(parameters.values()), (p for p in parameters.values())):
            optimizer = make(each)
            assert optimizer.parameters == list(parameters.values())
            parameters["a"].grad = np.ones(2)
            optimizer.zero_grad()
            assert parameters["a"].grad is None and parameters["b"].grad is None

    def test_uses_the_current_learning_rate(self, rng, make):
        p = parameter(rng, 3)
        before = p.data.copy()
        optimizer = make([p])
        optimizer.lr = 0.0
        train(optimizer, [p], np.ones((1, 1, 3)))
        np.testing.assert_array_equal(p.data, before)

    @pytest.mark.parametrize("nothing", [[], {}, iter(())])
    def test_refuses_to_train_nothing(self, make, nothing):
        with pytest.raises(ValueError, match="nothing to train"):
            make(nothing)


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
@pytest.mark.parametrize("shape", [(3, 4), (1, 1)])
def test_zeros_that_take_no_memory_are_trained_as_any_others(optimizer, shape):
    layer = ml.Linear(*shape, rng=None)
    layer.weight.grad = np.ones(layer.weight.shape, np.float32)
    optimizer(layer.trainable_parameters(), lr=0.5).step()
    assert np.abs(layer.weight.data + 0.5).max() < 1e-6
    layer = ml.Linear(*shape, rng=None)
    with ml.no_grad():
        layer.weight -= 0.5
    assert list(layer.trainable_parameters()) == ["weight"] and (layer.weight.data == -0.5).all()


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_a_negative_learning_rate_is_refused_and_one_that_is_no_number(rng, optimizer):
    for lr in (-0.1, math.nan, math.inf, None, "1e-3"):
        with pytest.raises(ValueError, match=f"must be a finite number of at least 0, got {lr!r}"):
            optimizer([parameter(rng, 1)], lr=lr)
    for lr in (0.0, np.float32(0.5), np.float64(0.5)):
        assert optimizer([parameter(rng, 1)], lr=lr).lr == lr


def test_a_factor_for_a_name_that_is_not_trained_is_refused(rng):
    for parameters in ({"a": parameter(rng, 1)}, [parameter(rng, 1)]):
        with pytest.raises(ValueError, match="lr_scale names 'b', which is not among the parameters to train"):
            AdamW(parameters, lr_scale={"b": 2.0})


@pytest.mark.parametrize("stale", ["moments", "gradient"])
def test_a_parameter_whose_shape_has_changed_is_not_moved_by_moments_or_gradients_of_other_elements(rng, stale):
    p = parameter(rng, 4, 3)
    optimizer = AdamW([p])
    p.grad = np.ones((4, 3))
    p.data = kept = p.data[:2].copy()
    if stale == "moments":
        p.grad = np.ones((2, 3))
    else:
        optimizer = AdamW([p])
    m, g = (4, 2) if stale == "moments" else (2, 4)
    with pytest.raises(ValueError, match=rf"shape \(2, 3\), its gradient \({g}, 3\) .* \({m}, 3\): .* new optimizer"):
        optimizer.step()
    assert optimizer.steps == [0] and p.data is kept


# -- clipping ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        arrays(np.float64, array_shapes(min_dims=0, max_dims=3, max_side=4), elements=st.floats(-9, 9)), min_size=1
    ),
    st.sampled_from([1e-3, 1.0, 5.0, 1e3]),
    st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=30)
def test_clipping_scales_all_gradients_by_one_factor_if_their_norm_is_larger(gradients, max_norm, dtype):
    """The norm is the root of the sum of squares, added in order in float64: to the bit, whatever the dtype."""
    gradients = [np.asarray(g, dtype) for g in gradients]
    parameters = {str(i): Tensor(np.zeros_like(g), requires_grad=True) for i, g in enumerate([*gradients, np.ones(2)])}
    for p, g in zip(parameters.values(), gradients, strict=False):  # the last parameter has none
        p.grad = g.copy()
    squares = [float(g.reshape(-1) @ g.reshape(-1)) for g in gradients]
    norm = math.sqrt(functools.reduce(operator.add, squares))  # `sum` rounds less from Python 3.12 on
    assert clip_grad_norm(parameters, max_norm) == norm
    factor = dtype(max_norm / (norm + 1e-6)) if norm > max_norm else 1
    for p, g in zip(parameters.values(), gradients, strict=False):
        assert p.grad.dtype == dtype
        np.testing.assert_array_equal(p.grad, g * factor)
    assert parameters[str(len(gradients))].grad is None and clip_grad_norm([list(parameters.values())[-1]], 1.0) == 0


def test_clipping_reaches_the_gradient_that_backward_gave_a_scalar():
    x = Tensor(2.0, requires_grad=True)
    (x * x).backward()
    assert clip_grad_norm([x], max_norm=1.0) == 4
    assert x.grad == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan])
def test_a_norm_that_would_delete_gradients_or_turn_them_round_is_refused(max_norm):
    x = Parameter(np.ones(3))
    x.grad = np.full(3, 2.0)
    with pytest.raises(ValueError, match="above 0, or inf"):
        clip_grad_norm([x], max_norm)
    clip_grad_norm([x], math.inf)
    assert (x.grad == 2).all()


# -- schedule ----------------------------------------------------------------------------------------------------------


DOWN = {"cosine": [1, 0.75, 0.25, 0], "linear": [1, 2 / 3, 1 / 3, 0], "constant": [1, 1, 1, 1]}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_rises_in_a_line_and_falls_in_its_own_way(name):
    assert name in DOWN, "a schedule needs its factors at 0, 1/3, 2/3 and 3/3 of its fall in DOWN"
    factors = [SCHEDULES[name](step, 7, 4) for step in range(9)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, *DOWN[name], DOWN[name][-1]])


@settings(max_examples=40)
@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 30), st.integers(0, 30))
def test_a_schedule_is_positive_until_its_end_and_never_above_one(name, total, warmup):
    factors = [SCHEDULES[name](step, total, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    down = factors[warmup:]
    assert down == sorted(down, reverse=True)

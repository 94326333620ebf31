"""A gradient check is worth what it catches: mistakes are planted here, and each must be found and named."""

import re

import numpy as np
import pytest

from minilora.engine import examples, ops, tensor
from minilora.engine.gradcheck import GradientError, gradcheck
from minilora.engine.tensor import Tensor


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Operations defined in a test do not count as minilora's."""
    monkeypatch.setattr(tensor, "OPS", {})


# -- planted mistakes: each is right except for the line that says what is wrong ---------------------------------------


def missing_sum(x, row):
    """The shape is right, but only the first of the rows that `row` was stretched to is counted."""
    return x * row, lambda g: g * row, lambda g: (g * x)[:1]


def missing_mean_factor(x):
    return np.asarray(x.mean()), lambda g: np.broadcast_to(g, x.shape)  # / x.size forgotten


def wrong_factor(x, w, a, b, scale=4.0, r=2):
    """alpha where alpha / r belongs, in one of the four gradients."""
    s = scale / r
    y = x @ w.T + s * x @ a.T @ b.T

    def da(g):
        return scale * (g @ b).T @ x  # the mistake

    return y, lambda g: g @ w + s * g @ b @ a, lambda g: g.T @ x, da, lambda g: s * g.T @ (x @ a.T)


def transposed(x, w):
    return x @ w.T, lambda g: g @ w.T, lambda g: g.T @ x  # w is square: the shapes agree


def nan_gradient(x):
    return np.maximum(x, 0), lambda g: np.where(x > 0, g, np.nan)


def infinite_gradient(x):
    return np.maximum(x, 0), lambda g: np.where(x > 0, g, np.inf)


def wrong_sign(x, y):
    return x - y, lambda g: g, lambda g: g


def forgotten_term(x):
    y = np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
    return y, lambda g: y * g  # the normalisation moves too


def one_element_slightly_off(x):
    def dx(g):
        out = 2 * x * g
        out[1, 2] *= 1 + 1e-5
        return out

    return x * x, dx


def off_where_the_gradient_is_small(x):
    weights = np.array([1.0, 1.0, 0.001])
    return x * weights, lambda g: g * weights * np.array([1, 1, 1 + 1e-5])


def frozen_by_mistake(x, y):
    return x * y, lambda g: g * y, lambda g: np.zeros_like(y)


MISTAKES = [  # operation, shapes, the input whose gradient is wrong
    (missing_sum, [(3, 2), (1, 2)], 1),
    (missing_mean_factor, [(2, 3)], 0),
    (wrong_factor, [(3, 4), (5, 4), (2, 4), (5, 2)], 2),
    (transposed, [(2, 3), (3, 3)], 0),
    (nan_gradient, [(3, 3)], 0),
    (infinite_gradient, [(3, 3)], 0),
    (wrong_sign, [(2,), (2,)], 1),
    (forgotten_term, [(2, 3)], 0),
    (one_element_slightly_off, [(2, 3)], 0),
    (off_where_the_gradient_is_small, [(3,)], 0),
    (frozen_by_mistake, [(2,), (2,)], 1),
]


@pytest.mark.parametrize(("mistake", "shapes", "wrong"), MISTAKES, ids=[row[0].__name__ for row in MISTAKES])
def test_a_planted_mistake_is_caught_and_its_input_named(mistake, shapes, wrong, rng):
    arrays = [rng.standard_normal(shape) for shape in shapes]
    with pytest.raises(GradientError, match=rf"{mistake.__name__}: gradient of input {wrong} at index \("):
        gradcheck(tensor.op(mistake), *arrays)


def right(x, row):
    return x * row, lambda g: g * row, lambda g: (g * x).sum(axis=0, keepdims=True)


def test_the_same_operations_pass_without_the_mistake(rng):
    report = gradcheck(tensor.op(right), rng.standard_normal((3, 2)), rng.standard_normal((1, 2)))
    assert (report.name, report.elements) == ("right", 8)
    assert report.max_relative_error < 1e-8
    assert str(report).split()[:3] == ["right", "8", "derivatives,"]


def test_every_operation_is_checked_and_needs_an_example(monkeypatch):
    monkeypatch.setattr(examples, "OPS", {"add": ops.add, "right": tensor.op(right)})
    reports = examples.check_all()
    assert next(reports).name == "add"
    with pytest.raises(GradientError, match="right: no example of its inputs: .* EXAMPLES"):
        next(reports)


@pytest.mark.parametrize("rough", range(3))
def test_the_report_has_the_largest_error_of_all_inputs(rough):
    def sum_of_three(*inputs):
        value = sum(inputs)
        return value, *(lambda g, i=i: g * (1 + 1e-7 * (i == rough)) for i in range(3))

    report = gradcheck(tensor.op(sum_of_three), *np.ones((3, 2)))
    assert report.max_relative_error == pytest.approx(1e-7, rel=1e-2)


# -- the message -------------------------------------------------------------------------------------------------------


def test_the_message_names_the_element_and_the_values_to_check_by_hand(rng):
    def tripled(x, y):
        def dy(g):
            out = g * x
            out[1, 0] *= 3
            return out

        return x * y, lambda g: g * y, dy

    x, y = rng.standard_normal((2, 2, 2))
    with pytest.raises(GradientError) as caught:
        gradcheck(tensor.op(tripled), x, y, seed=5)
    message = r"input 1 at index \(1, 0\), of the result's element \(1, 0\): got (\S+), expected (\S+) "
    found = re.search(message, str(caught.value))
    assert [float(number) for number in found.groups()] == pytest.approx([3 * x[1, 0], x[1, 0]], rel=1e-6)


@pytest.mark.parametrize(
    ("vjp", "message"),
    [
        (lambda x, g: g * x, r"input 0 at index \(0,\): got 3, expected 6 "),
        (lambda x, g: 2 * x, r"input 0 at index \(0,\), where g is not 1: got 6, expected "),  # not linear in g
        (lambda x, g: g * x * np.nan, r"input 0 at index \(0,\): got nan, expected 6 "),
    ],
)
def test_of_a_scalar_result_the_derivative_itself_is_named(vjp, message):
    def square(x):
        return (x * x).sum(), lambda g: vjp(x, g)

    with pytest.raises(GradientError, match=message):
        gradcheck(tensor.op(square), np.array([3.0]))


def test_an_input_used_outside_the_graph_is_caught():
    for returned in (lambda x: Tensor(x.data * 2), lambda x: x.data * 2, lambda x: 2.0, lambda x: None):
        with pytest.raises(GradientError, match="does not depend on any input"):
            gradcheck(returned, np.ones(2))
    with pytest.raises(GradientError, match=r"input 1 at index \(0,\), .* element \(0,\): got 0, expected 1 "):
        gradcheck(lambda x, y: x * y.data, np.ones(2), np.ones(2))


CONSTANT = [lambda x: ops.softmax(x).sum(), lambda x: (x - x.mean()).sum(), lambda x: x * 3 - x * 2 - x]


@pytest.mark.parametrize("f", CONSTANT)
@pytest.mark.parametrize("slope", [1e-9, np.nan])
def test_a_function_that_does_not_change_has_the_gradient_zero_and_no_other(f, slope):
    def wrong(x):
        return x * 0, lambda g: slope * g

    for seed in range(20):
        assert gradcheck(f, np.random.default_rng(seed).standard_normal(4)).max_relative_error == 0
    other = tensor.op(wrong)
    with pytest.raises(GradientError):
        gradcheck(lambda x: f(x) + other(x), np.ones(4))


@pytest.mark.parametrize("tolerance", [1e-6, 1e-9])
def test_small_gradients_of_a_large_result_are_right_as_far_as_differences_tell_and_wrong_beyond(tolerance):
    """Of a value near 1, central differences are off by 1e-11: a ten-thousandth of a derivative of 1e-7."""

    def small(slope):
        return tensor.op(lambda x: (1 + 1e-7 * np.sin(x), lambda g: g * slope * np.cos(x)))

    for seed in range(5):
        x = np.random.default_rng(seed).uniform(-1, 1, 4)
        gradcheck(small(1e-7), x, tolerance=tolerance)
        with pytest.raises(GradientError):
            gradcheck(small(1.01e-7), x, tolerance=tolerance)


# -- inputs and results of any kind ------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [lambda x: x.T, lambda x: x.reshape(6), lambda x: x[0], lambda x: x])
def test_a_result_that_is_a_view_of_the_input_is_measured_rightly(f, rng):
    assert gradcheck(f, rng.standard_normal((2, 3))).elements == 6


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3)])
def test_scalars_and_empty_arrays_are_fine(shape):
    assert gradcheck(lambda x: x * 3, np.ones(shape)).elements == np.prod(shape)


def test_inputs_become_float64_copies_and_one_is_needed(rng):
    x = rng.standard_normal(3).astype(np.float32)
    before, dtypes = x.copy(), set()
    gradcheck(lambda t: dtypes.add(t.dtype) or t.exp(), x)
    np.testing.assert_array_equal(x, before)
    assert dtypes == {np.dtype(np.float64)}
    with pytest.raises(ValueError, match="at least one array"):
        gradcheck(lambda: Tensor([1.0]))

"""The graph: gradients accumulate, arrays are freed as soon as they are not needed, every leaf owns its gradient."""

import operator
import pickle
import re
import weakref
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.engine import fused, ops, tensor
from minilora.engine.gradcheck import gradcheck
from minilora.engine.tensor import Tensor, no_grad
from minilora.nn.layers import Linear
from minilora.nn.module import Parameter


def leaf(*shape, dtype=np.float64):
    return Tensor(np.arange(1, 1 + np.prod(shape, dtype=int), dtype=dtype).reshape(shape), requires_grad=True)


@pytest.fixture
def own_registry(monkeypatch):
    """Operations defined in a test do not count as minilora's."""
    monkeypatch.setattr(tensor, "OPS", {})


# -- gradients ---------------------------------------------------------------------------------------------------------


STEPS = [lambda a, b: a + b, lambda a, b: a * b, lambda a, b: a - b * 2, lambda a, b: a.tanh() * b]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
@settings(max_examples=40)
def test_in_any_graph_the_gradients_of_all_uses_add_up(steps):
    """Each step takes any two earlier values, perhaps the same one twice: branches of all lengths join."""

    def last(x, y):
        values = [x, y]
        for step, i, j in steps:
            values.append(step(values[i % len(values)], values[j % len(values)]))
        return values[-1] + x + y

    gradcheck(last, np.array([0.5, -0.3]), np.array([0.2, 0.7]))


def test_a_second_graph_adds_to_the_gradient_of_the_first_and_only_leaves_have_one():
    x = leaf(2)
    y = x * 2
    z = y.sum()
    z.backward()
    (x * 3).sum().backward()
    np.testing.assert_array_equal(x.grad, [5, 5])
    assert y.grad is None and z.grad is None
    x.grad = None
    (x * 3).sum().backward()
    np.testing.assert_array_equal(x.grad, [3, 3])


@pytest.mark.parametrize("shape", [(2,), (1, 3), (0,)])
def test_backward_needs_a_gradient_of_the_same_shape_unless_there_is_a_single_element(shape):
    x = leaf(*shape)
    with pytest.raises(ValueError, match="reduce it to a scalar"):
        (x * 2).backward()
    with pytest.raises(ValueError, match=rf"\(7,\).*{re.escape(str(shape))}"):
        (x * 2).backward(np.ones(7))
    assert x.grad is None
    one = leaf(1, 1)
    (one * 2).backward()
    np.testing.assert_array_equal(one.grad, [[2]])


def test_backward_raises_if_nothing_is_trainable_and_says_what_to_do():
    with pytest.raises(RuntimeError, match="set requires_grad=True on an input"):
        (Tensor([1.0]) * 2).backward()
    with no_grad(), pytest.raises(RuntimeError, match=r"leave no_grad\(\)"):
        (leaf() * 2).backward()


def test_a_graph_is_used_once_and_a_second_use_of_any_part_changes_nothing():
    x = leaf(2)
    shared = x * 2
    first, second = shared.sum(), (shared * 3).sum()
    first.backward()
    for loss in (first, second):
        with pytest.raises(RuntimeError, match="has consumed this graph"):
            loss.backward()
    np.testing.assert_array_equal(x.grad, [2, 2])


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_stack_of_frozen_layers_keeps_none_of_its_activations(no_gc, rng):
    frozen = Tensor(rng.standard_normal((4, 4)))
    x, activations = leaf(2, 4), []
    y = x
    for _ in range(5):
        y = fused.linear(y, frozen)
        activations.append(weakref.ref(y.data))
    loss = y.sum()
    del y
    assert [array() for array in activations] == [None] * 5
    loss.backward()
    np.testing.assert_allclose(x.grad, np.ones((2, 4)) @ np.linalg.matrix_power(frozen.data, 5))


def test_no_grad_saves_nothing(no_gc):
    x, w = leaf(2, 3), leaf(4, 3)
    alive = weakref.ref(x.data)
    with no_grad():
        y = fused.linear(x, w).exp()
    del x, w
    assert alive() is None and y.shape == (2, 4)


def test_backward_frees_saved_arrays_as_it_passes_them(no_gc, own_registry):
    seen = []

    @tensor.op
    def probe(a):
        def da(g):
            seen.append([array() is None for array in saved])
            return g

        return a + 0, da

    x = leaf(3)
    early = x.exp()  # saves its value; backward reaches it after the probe
    late = probe(early).exp()  # saves its value; backward has passed it when the probe runs
    later = late.tanh()
    saved = [weakref.ref(t.data) for t in (early, late, later)]
    loss = later.sum()
    del early, late, later
    assert all(array() is not None for array in saved)
    loss.backward()
    assert seen == [[False, True, True]]
    assert all(array() is None for array in saved)


def test_what_one_vjp_captured_is_freed_before_the_next_one_of_the_same_operation_runs(no_gc, own_registry):
    seen = []

    @tensor.op
    def probe(a, b):
        saved = a * 2
        alive = weakref.ref(saved)

        def db(g):
            seen.append(alive())
            return g

        return a + b, lambda g: g * saved, db

    probe(leaf(3), leaf(3)).backward(np.ones(3))
    assert seen == [None]


def test_an_intermediate_gradient_is_freed_before_its_parents_are_reached(no_gc, own_registry):
    passed, alive = [], []

    @tensor.op
    def probe(a):
        def da(g):
            alive.append([array() is not None for array in passed])
            passed.append(weakref.ref(g))
            return g * 1

        return a + 0, da

    probe(probe(probe(leaf(3)))).backward(np.ones(3))
    assert alive == [[], [True], [True, False]]  # the first is the caller's own


def test_a_long_chain_is_walked_and_destroyed_without_recursion():
    x = leaf()
    walked, dropped = x, x
    for _ in range(10_000):
        walked, dropped = walked * 1.0, -dropped
    first = weakref.ref(dropped.node.edges[0][0])
    walked.backward()
    assert x.grad == 1
    del walked, dropped
    assert first() is None


# -- no_grad -----------------------------------------------------------------------------------------------------------


def test_no_grad_builds_no_graph_and_ends_with_its_block_also_if_it_raises():
    x = leaf(2)
    with pytest.raises(KeyError), no_grad():
        assert not tensor.is_recording()
        with no_grad():
            pass
        assert not (x * 2).requires_grad
        raise KeyError
    assert tensor.is_recording() and (x * 2).requires_grad


# -- whose array is it? ------------------------------------------------------------------------------------------------

ALIASES = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "add, then again": lambda a, b: (a + b) + (b + a),
    "reshape": lambda a, b: a.reshape(4, 1).reshape(2, 2) + b,
    "transpose": lambda a, b: a.T + b.T,
    "concatenate": lambda a, b: ops.concatenate(a[:1], b[1:]),
    "mean of halves": lambda a, b: ops.concatenate(a, b)[1:3],
    "sum": lambda a, b: a.sum() + b.sum(),
    "sum over rows": lambda a, b: a.sum(axis=0) + b.sum(axis=0),
}


@pytest.mark.parametrize("f", ALIASES.values(), ids=ALIASES)
def test_leaf_gradients_are_arrays_of_their_own(f):
    a, b = leaf(2, 2), leaf(2, 2)
    y = f(a, b)
    g = np.ones(y.shape)
    y.backward(g)
    for x, other in ((a, b), (b, a)):
        assert x.grad.flags.owndata and x.grad.flags.writeable and x.grad.shape == (2, 2)
        before = other.grad.copy()
        x.grad += 100
        np.testing.assert_array_equal(other.grad, before)
    np.testing.assert_array_equal(g, np.ones(y.shape))


@pytest.mark.parametrize("f", [lambda x: x, lambda x: x + x, lambda x: x.reshape(3, 1).reshape(3)])
def test_the_gradient_that_backward_is_given_is_not_written_to(f):
    x, g = leaf(3), np.ones(3)
    f(x).backward(g)
    x.grad *= 10
    np.testing.assert_array_equal(g, [1, 1, 1])


def test_a_gradient_set_by_hand_is_added_to_but_not_written_into_and_a_scalars_can_be_changed_in_place():
    x, mine = leaf(2), np.ones(2)
    (x * 2).sum().backward()  # which leaves a gradient that may be written into
    x.grad = mine
    (x * 2).sum().backward()
    np.testing.assert_array_equal(x.grad, [3, 3])
    np.testing.assert_array_equal(mine, [1, 1])
    x = leaf()
    (x * x * 3).backward()
    gradient = x.grad
    gradient *= 0.5
    assert isinstance(gradient, np.ndarray) and x.grad == 3


# -- dtypes ------------------------------------------------------------------------------------------------------------

SCALARS = [2, 2.0, np.float64(2), np.float32(2), np.int64(2)]
EXPRESSIONS = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "pow")},
    **{f"{name} the other way": lambda x, s, name=name: getattr(operator, name)(s, x)
       for name in ("add", "sub", "mul", "truediv")},
    "pow by name": lambda x, s: ops.pow(x, exponent=s),
    "rms_norm eps": lambda x, s: fused.rms_norm(x, x[0], eps=s),
    "lora_linear scale": lambda x, s: fused.lora_linear(x, x, x, x, s),
    "lora_linear scale by name": lambda x, s: fused.lora_linear(x, x, x, x, scale=s),
}  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_a_scalar_never_promotes_float32(expression):
    for scalar in SCALARS:
        x = leaf(2, 2, dtype=np.float32)
        y = expression(x, scalar)
        y.sum().backward()
        assert y.dtype == np.float32 and x.grad.dtype == np.float32, type(scalar)


def test_python_numbers_become_float32_and_arrays_stay_what_they_are():
    assert Tensor(1.5).dtype == Tensor([1.5, 2]).dtype == Tensor([1, 2], requires_grad=True).dtype == np.float32
    assert Tensor([1, 2]).dtype == np.int64
    for dtype in (np.float32, np.float64, np.int32):
        array = np.ones(2, dtype)
        assert Tensor(array).data is array
    with pytest.raises(TypeError, match="floating-point"):
        Tensor(np.arange(3), requires_grad=True)


def test_an_array_of_another_library_becomes_one_of_numpy_with_the_same_memory():
    class Foreign:
        array, dtype, shape = np.ones(2), "float64 of another library", (2,)

        def __array__(self, dtype=None, copy=None):
            return self.array

    x = Tensor(Foreign(), requires_grad=True)
    assert np.shares_memory(x.data, Foreign.array) and x.dtype == np.float64
    model = Linear(2, 1, rng=None)
    Foreign.array = Foreign.array[None]
    Foreign.shape = (1, 2)
    model.load_state_dict({"weight": Foreign()})
    assert model(x).data.tolist() == [2]


@pytest.mark.parametrize("name", ["lt", "le", "gt", "ge", "eq", "ne"])
def test_comparisons_give_arrays_of_booleans(name):
    x, compare = leaf(3), getattr(operator, name)
    for other in (2, np.array([3.0, 2, 1])):
        np.testing.assert_array_equal(compare(x, other), compare(x.data, other))
        np.testing.assert_array_equal(compare(x, Tensor(other)), compare(x.data, other))
    assert {x: 1}[x] == 1


# -- the rest of Tensor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[3.0, 3.0], Tensor([3.0, 3.0]), np.full(2, 3)], ids=["list", "tensor", "array"])
def test_a_gradient_is_given_as_anything_that_has_the_tensors_shape(given):
    x = leaf(2)
    (x * x).backward(given)
    np.testing.assert_array_equal(x.grad, [6, 12])
    x.grad = given
    (x * 2).backward(given)
    np.testing.assert_array_equal(x.grad, [9, 9])
    single = leaf(2, dtype=np.float32)
    (single * single).backward([3.0, 3.0])
    assert single.grad.dtype == np.float32
    x.grad = None
    x.sum().backward(2)
    np.testing.assert_array_equal(x.grad, [2, 2])
    for wrong in (np.ones((2, 1)), 1.0, [1.0]):
        with pytest.raises(ValueError, match=r"the gradient has shape .*, the tensor \(2,\)"):
            x.grad = wrong
        with pytest.raises(ValueError, match=r"the gradient has shape .*, the tensor \(2,\)"):
            (x * x).backward(wrong)


IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.itruediv]


@pytest.mark.parametrize("change", IN_PLACE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("other", [2.0, np.array([2.0, 4.0]), Tensor([2.0, 4.0])], ids=["number", "array", "tensor"])
def test_a_leaf_is_changed_in_place_without_a_graph_and_anything_else_is_a_new_tensor(change, other):
    x, frozen = leaf(2), Parameter(np.array([1.0, 2.0]), requires_grad=False)
    array, expected = x.data, change(np.array([1.0, 2.0]), getattr(other, "data", other))
    y = x * 1
    z = change(y, other)
    assert z is not y and z.requires_grad
    np.testing.assert_array_equal(y.data, [1, 2])
    with pytest.raises(TypeError, match="changed in place: do it inside ml.no_grad"):
        change(x, other)
    with no_grad():
        constant = Tensor(np.array([1.0, 2.0]))
        for tensor_ in (x, frozen, constant):
            changed = change(tensor_, other)
            assert (changed is tensor_) == (tensor_ is not constant)
            np.testing.assert_array_equal(changed.data, expected)
        assert x.data is array and x.dtype == np.float64 and x.requires_grad
        np.testing.assert_array_equal(constant.data, [1, 2])
        with pytest.raises(ValueError, match=r"of shape \(2,\) cannot take values of shape \(3, 2\)"):
            change(x, np.ones((3, 2)))
    assert change(frozen, other) is frozen
    x.backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, [1, 1])


def test_a_tensor_for_which_an_operation_has_no_vjp_is_refused_if_it_wants_a_gradient(own_registry):
    @tensor.op
    def shifted(x, by):
        return x + by, lambda g: g

    x, by = leaf(2), leaf(2)
    with pytest.raises(TypeError, match="shifted: there is no VJP for input 1, a tensor that requires a gradient"):
        shifted(x, by)
    with pytest.raises(TypeError, match=r"pow: the exponent must be a number, got shape \(2,\)"):
        x**by
    with pytest.raises(TypeError, match="pow: there is no VJP for input 1"):
        x ** by.sum()
    assert shifted(x, by.detach()).requires_grad
    with no_grad():
        assert not shifted(x, by).requires_grad


def test_a_tensor_given_by_name_is_refused_since_its_gradient_would_be_lost():
    x, w, bias = leaf(2, 3), leaf(4, 3), leaf(4)
    with pytest.raises(TypeError, match="'bias' by position"):
        fused.linear(x, w, bias=bias)


def test_a_detached_or_frozen_tensor_has_no_graph_and_accepts_no_gradient():
    x = leaf(2)
    assert not (x * 2).detach().requires_grad and x.detach().data is x.data
    x.requires_grad = False
    assert x.grad is None and not (x * 2).requires_grad
    with pytest.raises(RuntimeError, match="requires no gradient"):
        x.grad = np.ones(2)
    x.grad = None


def test_a_tensor_that_was_frozen_for_a_while_has_the_gradients_of_before_and_of_graphs_from_before():
    x = leaf(2)
    graph = (x * 2).sum()
    (x * 3).sum().backward()
    x.requires_grad = False
    np.testing.assert_array_equal(x.grad, [3, 3])
    copied = pickle.loads(pickle.dumps(x))
    copied.requires_grad = x.requires_grad = True
    graph.backward()
    np.testing.assert_array_equal(x.grad, [5, 5])
    np.testing.assert_array_equal(copied.grad, [3, 3])
    x.requires_grad, x.grad = False, None
    assert x.grad is None
    x.requires_grad = True
    assert x.grad is None
    y = x * 2
    y.requires_grad = False  # of no leaf: detached for good, and nothing of the graph stays
    assert y._leaf is None


# -- what an operation must return -------------------------------------------------------------------------------------


@pytest.mark.parametrize("returned", [np.ones(3), (np.ones(3),), (np.ones(3), np.ones(3)), [np.ones(3), None]])
def test_an_operation_without_its_vjps_is_told_what_it_must_return(own_registry, returned):
    def halved(x):
        return returned

    with pytest.raises(TypeError, match="halved: an @op must return its value and one VJP for each array input"):
        tensor.op(halved)(leaf(3))


def test_an_operation_that_computes_with_a_tensor_from_outside_is_refused_since_its_gradient_would_be_lost(
    own_registry,
):
    w = leaf(3)

    @tensor.op
    def scaled(x):
        return x * w, lambda g: g * w.data

    for x in (leaf(3), np.ones(3)):
        with pytest.raises(TypeError, match="scaled: .* got a tensor: pass every tensor as an input"):
            scaled(x)


@pytest.mark.parametrize(
    ("gradient", "found"),
    [(np.ones(()), r"shape \(\)"), (np.ones((1, 3)), r"shape \(1, 3\)"), (2.0, "a float"), (leaf(3), "a Tensor")],
)
@pytest.mark.parametrize("before", [lambda x: x, lambda x: x * 2], ids=["leaf", "inside"])
def test_a_gradient_of_another_shape_names_its_operation_and_reaches_no_leaf(own_registry, gradient, found, before):
    def halved(x):
        def dx(g):
            return gradient

        return x / 2, dx

    x = leaf(3)
    message = rf"halved: a VJP returned {found} for an input of shape \(3,\)"
    with pytest.raises(TypeError, match=message):
        tensor.op(halved)(before(x)).backward(np.ones(3))
    assert x.grad is None


def test_a_recomputable_value_is_computed_again_once_for_all_that_need_it_and_then_dropped(own_registry):
    calls = []

    def doubled(x):
        calls.append(1)
        return 2 * x, lambda g: 2 * g

    def product(x, w, recompute=None):
        assert recompute is not None
        return x * w, lambda g: g * w, lambda g: g * recompute()

    x, w = leaf(3), leaf(3)
    y = tensor.op(recomputable=True)(doubled)(x)
    times = tensor.op(wants_recompute=True)(product)
    (times(y, w) + times(y, w)).sum().backward()
    np.testing.assert_array_equal(w.grad, 4 * x.data)
    assert len(calls) == 2 and y.node.recompute is None


# -- NumPy's functions and tensors -------------------------------------------------------------------------------------


def test_a_tensor_without_graph_becomes_an_array_and_a_number():
    x = Tensor([[1.0, 2.0]])
    assert x.numpy() is x.data and np.array_equal(np.asarray(x), [[1, 2]])
    assert np.asarray(x, np.float64).dtype == np.float64 and np.array(x) is not x.data
    assert f"{Tensor([2.5]):.2f} {Tensor(2.0)}" == f"2.50 {Tensor(2.0)!r}"
    assert float(Tensor([2.5])) == 2.5 and isinstance(float(leaf(1)), float) and len(leaf(3, 2)) == 3
    assert np.argmax(x) == 1 and np.allclose(np.concatenate([x, x]), [[1, 2], [1, 2]])


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "matmul"])
def test_an_operator_of_an_array_and_a_tensor_is_the_tensors(name):
    x, array, f = leaf(2, 2), np.array([[1.0, 2.0], [3.0, 5.0]]), getattr(operator, name)
    y = f(array, x)
    assert isinstance(y, Tensor) and y.requires_grad
    np.testing.assert_array_equal(y.data, f(array, x.data))


UFUNCS = [f for f in vars(np).values() if isinstance(f, np.ufunc)]


@pytest.mark.parametrize("requires_grad", [True, False])
def test_functions_of_numpy_refuse_a_tensor_whose_gradient_would_be_lost(requires_grad):
    x, one = Tensor([1.0, 2.0], requires_grad=requires_grad), np.ones(2)
    calls = [partial(f, x, *[one] * (f.nin - 1)) for f in UFUNCS] + [partial(f, x) for f in (np.mean, np.sum, np.max)]
    if requires_grad:  # else these make an array of it
        calls += [partial(f, [x, x]) for f in (np.concatenate, np.stack, np.asarray, np.argmax)]
    for call in calls:
        with pytest.raises(TypeError):
            call()


def test_a_tensor_is_iterated_over_as_its_array_is():
    x = leaf(2, 3)
    (sum(x) * np.array([1, 2, 3])).sum().backward()
    np.testing.assert_array_equal(x.grad, [[1, 2, 3], [1, 2, 3]])
    with pytest.raises(TypeError):
        sum(Tensor(3.0))  # not 0


def test_a_tensor_is_true_as_its_number_is():
    assert [bool(Tensor(x)) for x in (0.0, 2.0, [0.0], [[3.0]])] == [False, True, False, True]
    with pytest.raises(ValueError, match="ambiguous"):
        bool(Tensor([1.0, 2.0]))


@pytest.mark.parametrize("before", [lambda x: x, lambda x: x * 1])
def test_an_array_that_a_users_vjp_returns_and_keeps_is_not_written_into(own_registry, before):
    kept, x = np.ones(3), leaf(3)

    @tensor.op
    def first(x):
        return x.sum(), lambda g: kept

    y = before(x)
    (first(y) + first(y) + first(y)).backward()
    np.testing.assert_array_equal(x.grad, [3, 3, 3])
    x.grad *= 2
    np.testing.assert_array_equal(kept, [1, 1, 1])


@pytest.mark.parametrize(
    ("x", "printed"),
    [
        (Tensor([1.0, -2.5]), "Tensor([ 1. , -2.5], float32)"),
        (Tensor([[1, 2], [3, 4]]), "Tensor([[1, 2],\n        [3, 4]], int64)"),
        (leaf(2), "Tensor([1., 2.], float64, requires_grad=True)"),
        (Parameter(np.zeros((5, 13))), "Parameter(shape (5, 13), float64, requires_grad=True)"),
        (Tensor(3.0), "Tensor(3., float32)"),
    ],
)
def test_a_tensor_prints_its_values_if_they_are_few(x, printed):
    assert repr(x) == printed and "shape" not in repr(Tensor(np.zeros(64)))

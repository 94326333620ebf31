"""Every operation: one row in a table, and each row's values, gradients, dtypes and manners are checked."""

import importlib
import pkgutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

import minilora
from minilora.engine import attention, fused, ops
from minilora.engine.attention import Packing, textbook_attention
from minilora.engine.examples import EXAMPLES
from minilora.engine.gradcheck import gradcheck
from minilora.engine.tensor import OPS, Tensor

# -- random inputs -----------------------------------------------------------------------------------------------------


def normal(rng, shape):
    return rng.standard_normal(shape)


def positive(rng, shape):
    return rng.uniform(0.5, 2, shape)


def not_zero(rng, shape):
    return positive(rng, shape) * rng.choice([-1, 1], shape)


def draw(spec, values=normal, **settings):
    """A maker of inputs: "ab,b" is two arrays; each letter gets a random length from 1 to 4, a digit is a length."""

    def make(rng):
        lengths = {letter: int(rng.integers(1, 5)) for letter in sorted(set(spec)) if letter.isalpha()}
        shapes = [tuple(lengths.get(c) or int(c) for c in part) for part in spec.split(",")]
        return [np.asarray(values(rng, shape)) for shape in shapes], settings

    return make


def many_rows(rng):  # more than one block of add_product
    return [rng.standard_normal(shape) for shape in ((200, 3), (4, 3), (2, 3), (4, 2))], {"scale": 0.5}


def embedding_inputs(rng):
    return [rng.standard_normal((5, 3))], {"ids": rng.integers(0, 4, (2, 6))}  # some ids occur twice, 4 never


def rope_inputs(batch):
    def make(rng):
        B, T, H, half = rng.integers(1, 4, 4)
        angles = rng.uniform(-4, 4, (B if batch else 1, T, 1, half))
        return [rng.standard_normal((B, T, H, 2 * half))], {"cos": np.cos(angles), "sin": np.sin(angles)}

    return make


def attention_inputs(B=2, T=4, S=None, H=4, K=2, **settings):
    def make(rng):
        D, keys = 2 * int(rng.integers(1, 3)), S or T
        return [rng.standard_normal(shape) for shape in ((B, T, H, D), (B, keys, K, D), (B, keys, K, D))], settings

    return make


def labelled(spec, **settings):
    def make(rng):
        arrays, _ = draw(spec)(rng)
        labels = rng.integers(0, arrays[-1].shape[0 if len(arrays) > 1 else -1], arrays[0].shape[:-1])
        labels[rng.random(labels.shape) < 0.3] = -100
        labels.flat[-1] = 0  # at least one is scored
        return arrays, {"labels": labels, **settings}

    return make


# -- what the operations should compute, in plain NumPy ----------------------------------------------------------------


def plain_softmax(a, axis=-1):
    return np.exp(a) / np.exp(a).sum(axis=axis, keepdims=True)


def plain_linear(x, w, bias=0.0):
    return np.einsum("...n,mn->...m", x, w) + bias


def plain_mixed_lora_linear(x, w, *thin, parts):
    each = [w.copy() for _ in x]  # every row's own matrix
    for a, b, (at, scale) in zip(thin[::2], thin[1::2], parts, strict=True):
        own = range(len(x)) if at is None else at
        for row, factor in zip(own, np.broadcast_to(np.reshape(scale, -1), len(own)), strict=True):
            each[row] += factor * b @ a
    return np.stack([plain_linear(row, matrix) for row, matrix in zip(x, each, strict=True)])


def plain_rope(x, cos, sin):
    x1, x2 = np.split(x, 2, axis=-1)
    turned = (x1 + 1j * x2) * (cos + 1j * sin)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def plain_attention(q, k, v, first=None, block=None, packing=None):
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    y = np.zeros_like(q)
    for b, h, t in np.ndindex(B, H, T):
        own = S - T + t
        seen = [s for s in range(own + 1) if first is None or s >= first[b] or s == own]
        if packing is not None and t >= packing.prefix:
            start = max(s for s in (packing.prefix, *packing.ends) if s <= t)
            seen = [s for s in seen if s < packing.prefix or s >= start]
        p = plain_softmax(k[b, seen, h * K // H] @ q[b, t, h] / D**0.5)
        y[b, t, h] = p @ v[b, seen, h * K // H]
    return y


def plain_cross_entropy(logits, labels):
    return np.mean([-np.log(plain_softmax(z)[label]) for z, label in labelled_rows(logits, labels) if label != -100])


def labelled_rows(logits, labels):
    return zip(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), strict=True)


# -- the same, composed of elementary operations -----------------------------------------------------------------------


def mask_of(t, s, first=None, packing=None):
    """-inf where query t may not see key s, (B or 1, 1, t, s): written out pair by pair."""
    mask = np.zeros((1 if first is None else len(first), 1, t, s))
    for b, i, j in np.ndindex(len(mask), t, s):
        own = s - t + i
        future, padding = j > own, first is not None and j < first[b] and j != own
        foreign = packing is not None and any(packing.prefix <= j < end <= own for end in packing.ends)
        if future or padding or foreign:
            mask[b, 0, i, j] = -np.inf
    return mask


def composed_mixed_lora_linear(x, w, *thin, parts):
    y = x @ w.T
    for a, b, (at, scale) in zip(thin[::2], thin[1::2], parts, strict=True):
        each = np.zeros((len(x.data), 1, 1))  # a scale for every row
        each[slice(None) if at is None else at] = scale
        y = y + ((x @ a.T) @ b.T) * each
    return y


def composed_attention(q, k, v, first=None, packing=None, block=None):
    return textbook_attention(q, k, v, mask_of(q.shape[1], k.shape[1], first, packing))


def composed_rope(x, cos, sin):
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    return ops.concatenate(x1 * cos - x2 * sin, x2 * cos + x1 * sin, axis=-1)


def composed_linear(x, w, bias=0.0):
    return x @ w.T + bias


def composed_cross_entropy(logits, labels):
    scored = np.flatnonzero(labels != -100)
    return -logits.reshape(-1, logits.shape[-1]).softmax().log()[scored, labels.reshape(-1)[scored]].mean()


def composed_mean(a, axis=None, keepdims=False):
    total = a.sum(axis=axis, keepdims=keepdims)
    return total * (total.size / a.size)


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One operation; its example is in minilora/engine/examples.py, and is the first of its cases here."""

    expected: Callable  # the same function of NumPy arrays
    cases: list  # makers of random inputs
    keeps: dict  # for the example, by the inputs that are trained: the inputs whose arrays outlive the forward pass
    composed: Callable | None = None  # the same from other operations; None for what is elementary


BROADCAST = ["ab,ab", "ab,b", "a1,1b", "ab,", ",ab", "b,dab", "d1b,a1"]
REDUCED = [
    draw("abc"),
    draw(""),
    draw("abc", axis=1),
    draw("abc", axis=(0, -1)),
    draw("abc", axis=-1, keepdims=True),
    draw("ab", keepdims=True),
]
MATRICES = ["ab,bc", "a,a", "ab,b", "b,bc", "dab,dbc", "dab,bc", "ab,dbc", "1ab,dbc", "dab,e1bc", "dab,b", "b,dbc"]
PACKED = Packing(prefix=2, ends=(4, 7, 8))

ROWS = {
    "add": Row(np.add, [draw(s) for s in BROADCAST], keeps={(0, 1): ()}),
    "sub": Row(np.subtract, [draw(s) for s in BROADCAST], keeps={(0, 1): ()}, composed=lambda a, b: a + b * -1.0),
    "mul": Row(np.multiply, [draw(s) for s in BROADCAST], keeps={(0,): (1,), (1,): (0,), (0, 1): (0, 1)}),
    "div": Row(
        np.divide,
        [draw(s, not_zero) for s in BROADCAST],
        keeps={(0,): (1,), (1,): (0, 1)},
        composed=lambda a, b: a * b**-1,
    ),
    "neg": Row(np.negative, [draw("ab"), draw("")], keeps={(0,): ()}, composed=lambda a: a * -1.0),
    "pow": Row(
        lambda a, exponent: a**exponent,
        [
            draw("ab", exponent=2),
            draw("abc", exponent=1),
            draw("ab", not_zero, exponent=-1),
            draw("a", positive, exponent=0.5),
        ],
        keeps={(0,): (0,)},
    ),
    "matmul": Row(np.matmul, [draw(s) for s in MATRICES], keeps={(0,): (1,), (1,): (0,)}),
    "exp": Row(np.exp, [draw("ab"), draw("")], keeps={(0,): ()}),
    "log": Row(np.log, [draw("ab", positive), draw("", positive)], keeps={(0,): (0,)}),
    "sqrt": Row(np.sqrt, [draw("ab", positive), draw("", positive)], keeps={(0,): ()}, composed=lambda a: a**0.5),
    "tanh": Row(np.tanh, [draw("ab"), draw("")], keeps={(0,): ()}, composed=lambda a: 2 / (1 + (-2 * a).exp()) - 1),
    "relu": Row(
        lambda a: np.where(a > 0, a, 0),
        [draw("ab", not_zero), draw("", not_zero)],
        keeps={(0,): (0,)},
        composed=lambda a: a * (a.data > 0),
    ),
    "sigmoid": Row(
        lambda a: 1 / (1 + np.exp(-a)),
        [draw("ab"), draw("")],
        keeps={(0,): ()},
        composed=lambda a: 1 / (1 + (-a).exp()),
    ),
    "sum": Row(np.sum, REDUCED, keeps={(0,): ()}),
    "mean": Row(np.mean, REDUCED, keeps={(0,): ()}, composed=composed_mean),
    "max": Row(np.max, REDUCED, keeps={(0,): (0,)}),
    "softmax": Row(
        plain_softmax,
        [draw("ab"), draw("abc", axis=0), draw("abc", axis=1)],
        keeps={(0,): ()},
        composed=lambda a, axis=-1: a.exp() / a.exp().sum(axis=axis, keepdims=True),
    ),
    "reshape": Row(
        np.reshape, [draw("234", shape=(4, 6)), draw("234", shape=(-1, 2)), draw("1", shape=())], keeps={(0,): (0,)}
    ),
    "transpose": Row(
        np.transpose,
        [draw("abc"), draw("abc", axes=(1, 2, 0)), draw("abc", axes=(-1, 0, 1)), draw("abcd", axes=(0, 2, 1, 3))],
        keeps={(0,): (0,)},
    ),
    "getitem": Row(
        lambda a, index: a[index],
        [
            draw("34", index=1),
            draw("34", index=(2, -1)),
            draw("345", index=(slice(None), slice(1, None, 2))),
            draw("34", index=[0, 2, 0, 0]),  # one row three times
            draw("34", index=(np.array([0, 1, 0]), np.array([3, 3, 3]))),
            draw("3", index=np.array([True, False, True])),
            draw("34", index=(Ellipsis, None, 0)),
        ],
        keeps={(0,): ()},
    ),
    "concatenate": Row(
        lambda *arrays, axis=0: np.concatenate(arrays, axis),
        [draw("ab,cb,ab", axis=0), draw("abc,abd", axis=-1), draw("ab", axis=1)],
        keeps={(0, 1): ()},
    ),
    "linear": Row(
        plain_linear,
        [draw(s) for s in ("an,mn", "abn,mn", "n,mn", "abn,mn,m", "n,mn,m")],
        keeps={(0,): (1,), (1,): (0,), (0, 2): (1,), (0, 1, 2): (0, 1)},
        composed=composed_linear,
    ),
    "lora_linear": Row(
        lambda x, w, a, b, scale: plain_linear(x, w + scale * b @ a),
        [draw("abn,mn,rn,mr", scale=2.0), draw("an,mn,rn,mr", scale=0.5), draw("n,mn,1n,m1", scale=1), many_rows],
        keeps={(0, 2, 3): (0, 1, 2, 3), (2, 3): (0, 3), (3,): (), (0,): (1, 2, 3)},
        composed=lambda x, w, a, b, scale: x @ w.T + scale * ((x @ a.T) @ b.T),
    ),
    "mixed_lora_linear": Row(
        plain_mixed_lora_linear,
        [
            draw("3bn,mn,rn,mr,2n,m2", parts=[(np.array([2]), 2.0), (np.array([0, 1]), 0.5)]),
            draw("3bn,mn,rn,mr,2n,m2", parts=[(np.array([0, 2]), np.array([[[0.25]], [[3.0]]])), (np.array([2]), 1.5)]),
            draw("3bn,mn,rn,mr,2n,m2", parts=[(None, 0.5), (None, 0.25)]),
            draw("3bn,mn,rn,mr,2n,m2", parts=[(np.array([1]), 0.5), (np.zeros(0, int), np.zeros((0, 1, 1)))]),
        ],
        keeps={(0,): (1, 2, 3, 4, 5), (2, 3): (0, 3), (3,): (), (4,): (0, 5)},
        composed=composed_mixed_lora_linear,
    ),
    "embedding": Row(lambda w, ids: w[ids], [embedding_inputs], keeps={(0,): ()}, composed=lambda w, ids: w[ids]),
    "rms_norm": Row(
        lambda x, w, eps: x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * w,
        [draw("ab5,5", eps=1e-5), draw("a3,3", eps=0.1), draw("4,4", eps=1e-5), draw("an,n", eps=0.5)],
        keeps={(0,): (0, 1)},
        composed=lambda x, w, eps: x / ((x * x).mean(axis=-1, keepdims=True) + eps).sqrt() * w,
    ),
    "rope": Row(
        plain_rope, [rope_inputs(batch=False), rope_inputs(batch=True)], keeps={(0,): ()}, composed=composed_rope
    ),
    "swiglu": Row(
        lambda gate, up: gate / (1 + np.exp(-gate)) * up,
        [draw("abf,abf"), draw("f,f")],
        keeps={(0, 1): (0, 1)},
        composed=lambda gate, up: gate * gate.sigmoid() * up,
    ),
    "attention": Row(
        plain_attention,
        [
            attention_inputs(),
            attention_inputs(H=3, K=3),
            attention_inputs(H=3, K=1, block=3),
            attention_inputs(T=2, S=5),
            attention_inputs(T=1, S=3),
            attention_inputs(T=5, first=np.array([0, 2]), block=2),
            attention_inputs(T=2, S=5, first=np.array([1, 4])),
            attention_inputs(B=1, T=8, packing=PACKED),
            attention_inputs(B=1, T=8, packing=PACKED, block=2),
            attention_inputs(B=1, T=6, packing=Packing(prefix=0, ends=(3, 6))),
        ],
        keeps={(0, 1, 2): (0, 1, 2)},
        composed=composed_attention,
    ),
    "cross_entropy": Row(
        plain_cross_entropy, [labelled("abv"), labelled("av")], keeps={(0,): ()}, composed=composed_cross_entropy
    ),
    "linear_cross_entropy": Row(
        lambda x, w, labels, **blocks: plain_cross_entropy(plain_linear(x, w), labels),
        [
            labelled("abc,vc"),
            labelled("ac,vc", block=1),
            labelled("abc,vc", block=3),
            labelled("abc,vc", block=2, vocab_block=3),
        ],
        keeps={(0,): (), (0, 1): (1,)},
        composed=lambda x, w, labels, **blocks: composed_cross_entropy(x @ w.T, labels),
    ),
}

CASES = [
    pytest.param(OPS[name], row.expected, make, id=f"{name}-{i}")
    for name, row in ROWS.items()
    for i, make in enumerate([EXAMPLES[name], *row.cases])
]
each_operation = pytest.mark.parametrize(("operation", "expected", "make"), CASES)


def test_every_operation_has_a_row_and_an_example():
    for part in ("engine", "nn", "lora"):
        folder = importlib.import_module(f"{minilora.__name__}.{part}")
        for module in pkgutil.iter_modules(folder.__path__):
            importlib.import_module(f"{folder.__name__}.{module.name}")
    registered = {name for name, operation in OPS.items() if operation.__module__.startswith("minilora.")}
    assert registered == set(ROWS) == set(EXAMPLES)


# -- what is checked of each -------------------------------------------------------------------------------------------


def gradients(operation, arrays, settings, g, trained=None):
    tensors = [Tensor(a, requires_grad=trained is None or i in trained) for i, a in enumerate(arrays)]
    operation(*tensors, **settings).backward(g)
    return [t.grad for t in tensors]


@each_operation
def test_value_equals_plain_numpy(operation, expected, make, rng):
    for _ in range(3):
        arrays, settings = make(rng)
        value = operation(*arrays, **settings).data
        np.testing.assert_allclose(value, expected(*arrays, **settings), rtol=1e-12, atol=1e-12)
        assert isinstance(value, np.ndarray)


@pytest.mark.parametrize(
    ("operation", "composed", "make"),
    [
        pytest.param(OPS[name], row.composed, make, id=f"{name}-{i}")
        for name, row in ROWS.items()
        if row.composed
        for i, make in enumerate([EXAMPLES[name], *row.cases])
    ],
)
def test_value_and_gradients_equal_those_of_the_composition(operation, composed, make, rng):
    arrays, settings = make(rng)
    one, other = ([Tensor(a, requires_grad=True) for a in arrays] for _ in range(2))
    y, z = operation(*one, **settings), composed(*other, **settings)
    np.testing.assert_allclose(y.data, z.data, rtol=1e-10, atol=1e-12)
    g = rng.standard_normal(y.shape)
    y.backward(g)
    z.backward(g)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_every_fused_operation_has_a_composition():
    modules = {fused.__name__, attention.__name__}
    assert all(ROWS[name].composed for name, f in OPS.items() if f.__module__ in modules)


KEPT = [
    pytest.param(name, trained, kept, id=f"{name}-{''.join(map(str, trained))}")
    for name, row in ROWS.items()
    for trained, kept in row.keeps.items()
]


@pytest.mark.parametrize(("name", "trained", "kept"), KEPT)
def test_an_operation_keeps_exactly_the_arrays_its_gradients_need(no_gc, rng, name, trained, kept):
    arrays, settings = EXAMPLES[name](rng)
    alive = [weakref.ref(array) for array in arrays]
    y = OPS[name](*[Tensor(array, requires_grad=i in trained) for i, array in enumerate(arrays)], **settings)
    del arrays
    assert tuple(i for i, array in enumerate(alive) if array() is not None) == kept
    y.backward(np.ones(y.shape))
    del y
    assert all(array() is None for array in alive)


@each_operation
def test_gradient_equals_the_measured_derivative(operation, expected, make, rng):
    for seed in range(3):
        arrays, settings = make(rng)
        gradcheck(lambda *inputs: operation(*inputs, **settings), *arrays, tolerance=1e-6, seed=seed)  # noqa: B023


@each_operation
def test_neither_inputs_nor_g_are_written_to(operation, expected, make, rng):
    arrays, settings = make(rng)
    for array in arrays:
        array.setflags(write=False)
    value, *vjps = operation.forward(*arrays, **settings)
    g = rng.standard_normal(np.shape(value))
    g.setflags(write=False)
    for array, vjp in zip(arrays, vjps, strict=False):
        assert vjp(g).shape == array.shape


@each_operation
def test_float32_in_means_float32_out_and_back(operation, expected, make, rng):
    arrays, settings = make(rng)
    singles = [array.astype(np.float32) for array in arrays]
    settings = {k: v.astype(np.float32) if k in ("cos", "sin") else v for k, v in settings.items()}
    value = operation(*singles, **settings).data
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, expected(*arrays, **settings), rtol=1e-3, atol=1e-4)
    for grad in gradients(operation, singles, settings, np.ones_like(value)):
        assert grad.dtype == np.float32


@each_operation
def test_freezing_the_other_inputs_does_not_change_a_gradient(operation, expected, make, rng):
    arrays, settings = make(rng)
    g = rng.standard_normal(np.shape(expected(*arrays, **settings)))
    for i, together in enumerate(gradients(operation, arrays, settings, g)):
        alone = gradients(operation, arrays, settings, g, trained=[i])
        np.testing.assert_array_equal(alone[i], together)
        assert [grad is None for grad in alone] == [j != i for j in range(len(arrays))]


@each_operation
def test_memory_layout_does_not_matter(operation, expected, make, rng):
    arrays, settings = make(rng)
    strided = [np.array(array, order="F") for array in arrays]
    shape = np.shape(expected(*arrays, **settings))
    dense = gradients(operation, arrays, settings, np.full(shape, 0.7))
    stretched = gradients(operation, strided, settings, np.broadcast_to(0.7, shape))  # g as the gradient of sum is
    for a, b in zip(dense, stretched, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


# -- single promises ---------------------------------------------------------------------------------------------------


def test_equal_largest_elements_share_the_gradient_of_max():
    x = Tensor(np.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]), requires_grad=True)
    x.max(axis=1).sum().backward()
    np.testing.assert_array_equal(x.grad, [[0, 0.5, 0.5], [1, 0, 0]])


@pytest.mark.parametrize("operation", [ops.softmax, ops.sigmoid, ops.tanh])
def test_large_numbers_do_not_overflow(operation):
    with np.errstate(all="raise", under="ignore"):
        x = Tensor(np.array([-1e4, 0, 1e4]), requires_grad=True)
        y = operation(x)
        y.backward(np.ones(3))
    assert np.isfinite(y.data).all() and np.isfinite(x.grad).all()


METHODS = {
    "x.T": (lambda x: x.T, lambda x: ops.transpose(x)),
    "x[0]": (lambda x: x[0], lambda x: ops.getitem(x, index=0)),
    "-x": (lambda x: -x, ops.neg),
    "x @ x.T": (lambda x: x @ x.T, lambda x: ops.matmul(x, ops.transpose(x))),
    "x.reshape(3, 2)": (lambda x: x.reshape(3, 2), lambda x: ops.reshape(x, (3, 2))),
    "x.reshape((3, 2))": (lambda x: x.reshape((3, 2)), lambda x: ops.reshape(x, (3, 2))),
    "x.sum(axis=0)": (lambda x: x.sum(axis=0), lambda x: ops.sum(x, axis=0)),
    "x.softmax()": (lambda x: x.softmax(), ops.softmax),
    "x.transpose((1, 0))": (lambda x: x.transpose((1, 0)), lambda x: ops.transpose(x, (1, 0))),
}


@pytest.mark.parametrize(("method", "function"), METHODS.values(), ids=METHODS)
def test_operators_and_methods_are_the_operations(method, function, rng):
    a, b = (Tensor(rng.standard_normal((2, 3)), requires_grad=True) for _ in range(2))
    b.data = a.data
    y, z = method(a), function(b)
    np.testing.assert_array_equal(y.data, z.data)
    y.backward(np.ones(y.shape))
    z.backward(np.ones(z.shape))
    np.testing.assert_array_equal(a.grad, b.grad)

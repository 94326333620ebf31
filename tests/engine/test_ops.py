"""Every operation has a row in a table; its values, gradients, dtypes, saved arrays and side effects are checked."""

import importlib
import math
import pkgutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

import minilora
from minilora.engine import fused, ops
from minilora.engine.attention import Packing, attention, textbook_attention
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


def dora_inputs(spec, magnitude=None, **settings):
    """Inputs of a DoRA layer. magnitude: of one row, from which V x cannot be computed back."""

    def make(rng):
        arrays, _ = draw(spec)(rng)
        if magnitude is not None:
            arrays[4][0] = magnitude
        return arrays, {"norms": positive(rng, arrays[4].shape), **settings}

    return make


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


# -- what operations should compute: elementary ones in NumPy, fused ones composed of elementary ones -----------------


def plain_softmax(a, axis=-1):
    return np.exp(a) / np.exp(a).sum(axis=axis, keepdims=True)


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


def holes(like):
    """A mask: every third value is dropped."""
    return (np.arange(like.size).reshape(like.shape) % 3 > 0) * like.dtype.type(1.5)


def composed_mixed_lora_linear(x, w, *thin, parts):
    y = x @ w.T
    for a, b, (at, scale) in zip(thin[::2], thin[1::2], parts, strict=True):
        each = np.zeros((len(x.data), *x.shape[1:-1], 1))  # a scale for every row
        each[slice(None) if at is None else at] = scale
        y = y + ((x @ a.T) @ b.T) * each
    return y


def composed_attention(q, k, v, first=None, packing=None, block=None, window=None, scale=None):
    T, S, D = q.shape[1], *k.shape[1::2]
    mask = mask_of(T, S, first, packing)
    if window is not None:
        at = np.array(packing.positions()) if packing else np.arange(S)
        mask = np.where(at <= at[S - T :, None] - window, -np.inf, mask)
    return textbook_attention(q if scale is None else q * (scale * D**0.5), k, v, mask)


def composed_layer_norm(x, w, bias, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / ((centred * centred).mean(axis=-1, keepdims=True) + eps).sqrt() * w + bias


def composed_gelu(x, block=None):
    return x * 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def composed_rope(x, cos, sin):
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    return ops.concatenate(x1 * cos - x2 * sin, x2 * cos + x1 * sin, axis=-1)


def composed_cross_entropy(logits, labels):
    scored = np.flatnonzero(labels != -100)
    return -logits.reshape(-1, logits.shape[-1]).softmax().log()[scored, labels.reshape(-1)[scored]].mean()


def pairs(count):
    def make(rng):
        numbers = {name: rng.uniform(0.1, 2, count) for name in ("reference", "beta")}
        return [rng.standard_normal(()) for _ in range(2 * count)], numbers

    return make


def composed_preference_loss(*log_p, reference, beta):
    margins = [
        b * (c - r - at) for c, r, at, b in zip(log_p[::2], log_p[1::2], reference.tolist(), beta.tolist(), strict=True)
    ]
    return sum(-margin.sigmoid().log() for margin in margins) / len(margins)


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One operation; its example in minilora/engine/examples.py is the first of its cases."""

    cases: list  # makers of random inputs
    keeps: dict  # for the example, by the inputs that are trained: the inputs whose arrays outlive the forward pass
    plain: Callable | None = None  # an elementary operation: the same function of NumPy arrays
    composed: Callable | None = None  # a fused one: the same function of tensors, made of elementary operations

    def expected(self, *arrays, **settings):
        return self.plain(*arrays, **settings) if self.plain else self.composed(*map(Tensor, arrays), **settings).data


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

EACH = [draw("ab"), draw("")]
FIRST = {(0,): (0,)}
NOTHING = {(0,): ()}

ROWS = {
    "add": Row([draw(s) for s in BROADCAST], {(0, 1): ()}, np.add),
    "sub": Row([draw(s) for s in BROADCAST], {(0, 1): ()}, np.subtract),
    "mul": Row([draw(s) for s in BROADCAST], {(0,): (1,), (1,): (0,), (0, 1): (0, 1)}, np.multiply),
    "div": Row([draw(s, not_zero) for s in BROADCAST], {(0,): (1,), (1,): (1,)}, np.divide),
    "neg": Row(EACH, NOTHING, np.negative),
    "pow": Row(
        [draw("ab", exponent=2), draw("abc", exponent=1), draw("ab", not_zero, exponent=-1),
         draw("a", positive, exponent=0.5)],
        FIRST, lambda a, exponent: a**exponent,
    ),
    "matmul": Row([draw(s) for s in MATRICES], {(0,): (1,), (1,): (0,)}, np.matmul),
    "exp": Row(EACH, NOTHING, np.exp),
    "log": Row([draw("ab", positive), draw("", positive)], FIRST, np.log),
    "sqrt": Row([draw("ab", positive), draw("", positive)], NOTHING, np.sqrt),
    "tanh": Row(EACH, NOTHING, np.tanh),
    "relu": Row([draw("ab", not_zero), draw("", not_zero)], FIRST, lambda a: np.where(a > 0, a, 0)),
    "sigmoid": Row(EACH, NOTHING, lambda a: 1 / (1 + np.exp(-a))),
    "sum": Row(REDUCED, NOTHING, np.sum),
    "mean": Row(REDUCED, NOTHING, np.mean),
    "max": Row(REDUCED, FIRST, np.max),
    "softmax": Row([draw("ab"), draw("abc", axis=0), draw("abc", axis=1)], NOTHING, plain_softmax),
    "log_softmax": Row(
        [draw("ab"), draw("abc", axis=0), draw("abc", axis=1)],
        NOTHING, lambda x, axis=-1: np.log(plain_softmax(x, axis)),
    ),
    "reshape": Row(
        [draw("234", shape=(4, 6)), draw("234", shape=(-1, 2)), draw("1", shape=())],
        FIRST, lambda x, shape: x.reshape(shape),
    ),
    "transpose": Row(
        [draw("abc"), draw("abc", axes=(1, 2, 0)), draw("abc", axes=(-1, 0, 1)), draw("abcd", axes=(0, 2, 1, 3))],
        FIRST, np.transpose,
    ),
    "getitem": Row(
        [
            draw("34", index=1),
            draw("34", index=(2, -1)),
            draw("345", index=(slice(None), slice(1, None, 2))),
            draw("34", index=[0, 2, 0, 0]),  # one row three times
            draw("34", index=(np.array([0, 1, 0]), np.array([3, 3, 3]))),
            draw("3", index=np.array([True, False, True])),
            draw("34", index=(Ellipsis, None, 0)),
        ],
        NOTHING, lambda a, index: a[index],
    ),
    "concatenate": Row(
        [draw("ab,cb,ab", axis=0), draw("abc,abd", axis=-1), draw("ab", axis=1)],
        {(0, 1): ()}, lambda *arrays, axis=0: np.concatenate(arrays, axis),
    ),
    "linear": Row(
        [draw(s) for s in ("an,mn", "abn,mn", "n,mn", "abn,mn,m", "n,mn,m")],
        {(0,): (1,), (1,): (0,), (0, 2): (1,), (0, 1, 2): (0, 1)},
        composed=lambda x, w, bias=0.0: x @ w.T + bias,
    ),
    "masked": Row(
        [draw("abn", mask=holes), draw("n", mask=holes)],
        {(0,): ()}, composed=lambda x, mask: x * mask(x.data),
    ),
    "lora_linear": Row(
        [
            draw("abn,mn,rn,mr", scale=2.0),
            draw("an,mn,rn,mr", scale=0.5),
            draw("n,mn,1n,m1", scale=1),
            many_rows,
            draw("abn,mn,rn,mr", scale=2.0, mask=holes),
            draw("n,mn,1n,m1", scale=0.5, mask=holes),
        ],
        {(0, 2, 3): (0, 1, 2, 3), (2, 3): (0, 3), (3,): (), (0,): (1, 2, 3)},
        composed=lambda x, w, a, b, scale, mask=np.ones_like: x @ w.T + scale * (((x * mask(x.data)) @ a.T) @ b.T),
    ),
    "dora_linear": Row(
        [
            dora_inputs("abn,mn,rn,mr,m", scale=2.0),
            dora_inputs("an,mn,rn,mr,m", scale=0.5),
            dora_inputs("n,mn,1n,m1,m", scale=1),
            dora_inputs("abn,mn,rn,mr,m", magnitude=0.0, scale=2.0),
            dora_inputs("abn,mn,rn,mr,m", magnitude=1e-30, scale=2.0),
        ],
        {(0, 2, 3, 4): (0, 1, 2, 3, 4), (2, 3): (0, 3), (3,): (), (0,): (1, 2, 3), (4,): (4,)},
        composed=lambda x, w, a, b, magnitude, norms, scale: x @ (w + scale * (b @ a)).T * (magnitude / norms),
    ),
    "mixed_lora_linear": Row(
        [
            draw("3bn,mn,rn,mr,2n,m2", parts=[(np.array([2]), 2.0), (np.array([0, 1]), 0.5)]),
            draw("3bn,mn,rn,mr,2n,m2", parts=[(np.array([0, 2]), np.array([[[0.25]], [[3.0]]])), (np.array([2]), 1.5)]),
            draw("3bn,mn,rn,mr,2n,m2", parts=[(None, 0.5), (None, 0.25)]),
            draw("3bn,mn,rn,mr,2n,m2", parts=[(np.array([1]), 0.5), (np.zeros(0, int), np.zeros((0, 1, 1)))]),
            draw("3n,mn,rn,mr,2n,m2", parts=[(np.array([0, 2]), np.array([[0.25], [3.0]])), (np.array([1, 2]), 0.5)]),
            draw("3bn,mn,rn,mr,2n,m2,1n,m1", parts=[(np.array([2]), 2.0), (None, 0.5), (np.array([0, 1]), 1.5)]),
            draw("3abn,mn,rn,mr,2n,m2", parts=[(np.array([0, 2]), np.full((2, 1, 1, 1), 0.25)), (None, 1.5)]),
        ],
        {(0,): (1, 2, 3, 4, 5), (2, 3): (0, 3), (3,): (), (4,): (0, 5)},
        composed=composed_mixed_lora_linear,
    ),
    "embedding": Row([embedding_inputs], NOTHING, composed=lambda w, ids: w[ids]),
    "rms_norm": Row(
        [
            draw("ab5,5", eps=1e-5),
            draw("a3,3", eps=0.1),
            draw("4,4", eps=1e-5),
            draw("an,n", eps=0.5),
            draw("ab3,3", eps=0.2, offset=1.0),
        ],
        {(0,): (0, 1)},
        composed=lambda x, w, eps, offset=0.0: x / ((x * x).mean(axis=-1, keepdims=True) + eps).sqrt() * (w + offset),
    ),
    "layer_norm": Row(
        [draw("ab5,5,5", eps=1e-5), draw("a3,3,3", eps=0.1), draw("4,4,4", eps=1e-5), draw("an,n,n", eps=0.5)],
        {(0,): (0, 1, 2), (1,): (0, 1, 2), (2,): (0, 1, 2)},
        composed=composed_layer_norm,
    ),
    "rope": Row([rope_inputs(batch=False), rope_inputs(batch=True)], NOTHING, composed=composed_rope),
    "gelu": Row([draw("abf"), draw("f"), draw("4bf", block=3)], FIRST, composed=composed_gelu),
    "swiglu": Row(
        [draw("abf,abf"), draw("f,f"), draw("4bf,4bf", block=3)],
        {(0, 1): (0, 1)},
        composed=lambda gate, up, block=64: gate * gate.sigmoid() * up,
    ),
    "geglu": Row(
        [draw("abf,abf"), draw("f,f"), draw("4bf,4bf", block=3)],
        {(0, 1): (0, 1)},
        composed=lambda gate, up, block=64: composed_gelu(gate) * up,
    ),
    "attention": Row(
        [
            attention_inputs(H=3, K=3),
            attention_inputs(T=1, S=3, H=3, K=1),
            attention_inputs(T=2, S=5, first=np.array([1, 4])),
            attention_inputs(B=1, T=8, packing=PACKED, block=2),
            attention_inputs(B=1, T=6, packing=Packing(prefix=0, ends=(3, 6))),
            attention_inputs(T=1, S=5, window=2, scale=0.3),
            attention_inputs(T=7, window=3, block=2),
            attention_inputs(T=3, S=7, first=np.array([1, 3]), window=2, block=2),
            *(attention_inputs(B=1, T=8, packing=PACKED, block=2, window=n) for n in (1, 2, 3, 5)),
            attention_inputs(B=1, T=11, packing=Packing(prefix=4, ends=(7, 11)), block=2, window=3),
        ],
        {(0, 1, 2): (0, 1, 2)},
        composed=composed_attention,
    ),
    "cross_entropy": Row([labelled("abv"), labelled("av")], NOTHING, composed=composed_cross_entropy),
    "preference_loss": Row([pairs(1), pairs(3)], NOTHING, composed=composed_preference_loss),
    "linear_cross_entropy": Row(
        [
            labelled("abc,vc"),
            labelled("ac,vc", block=1),
            labelled("abc,vc", block=3),
            labelled("abc,vc", block=2, vocab_block=3),
        ],
        {(0,): (), (0, 1): (1,)},
        composed=lambda x, w, labels, **blocks: composed_cross_entropy(x @ w.T, labels),
    ),
}  # fmt: skip

each_operation = pytest.mark.parametrize("name", ROWS)


def cases(name, rng):
    """The arrays and settings of an operation's cases, its example first; a case that fails tells its number."""
    for number, make in enumerate([EXAMPLES[name], *ROWS[name].cases]):
        print(f"case {number} of {name}")
        yield make(rng)


def test_every_operation_has_a_row_and_an_example_and_every_fused_one_a_composition():
    for part in ("engine", "nn", "lora"):
        folder = importlib.import_module(f"{minilora.__name__}.{part}")
        for module in pkgutil.iter_modules(folder.__path__):
            importlib.import_module(f"{folder.__name__}.{module.name}")
    registered = {name: f.__module__ for name, f in OPS.items() if f.__module__.startswith("minilora.")}
    for table, place in ((ROWS, "ROWS of this file"), (EXAMPLES, "EXAMPLES of minilora/engine/examples.py")):
        assert (missing := set(registered) - set(table)) == set(), f"{missing} need a row in {place}"
        assert (unknown := set(table) - set(registered)) == set(), f"{unknown} of {place} are no operations"
    for name, module in registered.items():
        needed = "plain" if module == ops.__name__ else "composed"
        assert getattr(ROWS[name], needed), f"{name} in {module} needs {needed}= in its row"


# -- what is checked of each -------------------------------------------------------------------------------------------


def gradients(operation, arrays, settings, g, trained=None):
    tensors = [Tensor(a, requires_grad=trained is None or i in trained) for i, a in enumerate(arrays)]
    operation(*tensors, **settings).backward(g)
    return [t.grad for t in tensors]


def assert_all_close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@each_operation
def test_values_and_gradients_are_right(name, rng):
    operation, row = OPS[name], ROWS[name]
    for _ in range(2):
        for arrays, settings in cases(name, rng):
            value = operation(*arrays, **settings).data
            assert isinstance(value, np.ndarray)
            np.testing.assert_allclose(value, row.expected(*arrays, **settings), rtol=1e-11, atol=1e-12)
            if row.composed:
                g = rng.standard_normal(value.shape)
                found, expected = (gradients(f, arrays, settings, g) for f in (operation, row.composed))
                assert_all_close(found, expected, rtol=1e-9, atol=1e-12)
    for arrays, settings in cases(name, rng):
        gradcheck(partial(operation, **settings), *arrays, tolerance=1e-6)


@each_operation
def test_inputs_and_g_stay_as_they_are_and_float32_stays_float32(name, rng):
    for arrays, settings in cases(name, rng):
        for array in arrays:
            array.setflags(write=False)
        value, *vjps = OPS[name].forward(*arrays, **settings)
        g = rng.standard_normal(np.shape(value))
        g.setflags(write=False)
        for array, vjp in zip(arrays, vjps, strict=False):
            assert vjp(g).shape == array.shape
        singles = [array.astype(np.float32) for array in arrays]
        settings = {k: v.astype(np.float32) if k in ("cos", "sin", "norms") else v for k, v in settings.items()}
        single = OPS[name](*singles, **settings).data
        np.testing.assert_allclose(single, value, rtol=1e-3, atol=1e-4)
        found = gradients(OPS[name], singles, settings, np.ones_like(single))
        assert {x.dtype for x in (single, *found)} == {single.dtype} and single.dtype == np.float32


@each_operation
def test_neither_memory_layout_nor_freezing_other_inputs_changes_a_gradient(name, rng):
    for arrays, settings in cases(name, rng):
        shape = np.shape(ROWS[name].expected(*arrays, **settings))
        together = gradients(OPS[name], arrays, settings, np.full(shape, 0.7))
        strided = [np.array(array, order="F") for array in arrays]
        stretched = gradients(OPS[name], strided, settings, np.broadcast_to(0.7, shape))  # as the gradient of sum
        assert_all_close(together, stretched, rtol=1e-12, atol=1e-12)
        for i, one in enumerate(together):
            alone = gradients(OPS[name], arrays, settings, np.full(shape, 0.7), trained=[i])
            np.testing.assert_array_equal(alone[i], one)
            assert [grad is None for grad in alone] == [j != i for j in range(len(arrays))]


@each_operation
def test_an_operation_saves_exactly_the_arrays_its_gradients_need(no_gc, rng, name):
    for trained, kept in ROWS[name].keeps.items():
        arrays, settings = EXAMPLES[name](rng)
        alive = [weakref.ref(array) for array in arrays]
        y = OPS[name](*[Tensor(array, requires_grad=i in trained) for i, array in enumerate(arrays)], **settings)
        del arrays
        found = tuple(i for i, array in enumerate(alive) if array() is not None)
        assert found == kept, f"with inputs {trained} trained, {name} saves inputs {found}; its row says {kept}"
        y.backward(np.ones(y.shape))
        del y
        assert all(array() is None for array in alive)


@pytest.mark.parametrize(("name", "shapes"), [("masked", "an"), ("lora_linear", "an,mn,rn,mr")])
def test_a_mask_is_not_held_but_made_again(no_gc, rng, name, shapes):
    made = []

    def mask(like):
        made.append(weakref.ref(values := holes(like)))
        return values

    arrays, settings = draw(shapes, mask=mask, **({} if name == "masked" else {"scale": 2.0}))(rng)
    y = OPS[name](*[Tensor(array, requires_grad=True) for array in arrays], **settings)
    assert len(made) == 1 and made[0]() is None
    y.backward(np.ones(y.shape))
    assert len(made) == 2


# -- single promises ---------------------------------------------------------------------------------------------------


def test_gradients_at_kinks_and_ties():
    x = Tensor([-1.0, 0.0, 1.0], requires_grad=True)
    x.relu().sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 0, 1])
    x = Tensor(np.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]), requires_grad=True)
    x.max(axis=1).sum().backward()
    np.testing.assert_array_equal(x.grad, [[0, 0.5, 0.5], [1, 0, 0]])
    x = Tensor([0.0, 2.0], requires_grad=True)
    (x**0).sum().backward()
    assert x.grad.tolist() == [0, 0]


@pytest.mark.parametrize("operation", [ops.softmax, ops.log_softmax, ops.sigmoid, ops.tanh, attention])
def test_large_values_do_not_overflow(operation, rng):
    inputs = [100 * rng.standard_normal((2, 5, heads, 4)) for heads in (4, 2, 2)]
    inputs = [Tensor(x, requires_grad=True) for x in (inputs if operation is attention else [np.array([-1e4, 0, 1e4])])]
    with np.errstate(all="raise", under="ignore"):
        y = operation(*inputs)
        y.backward(np.ones(y.shape))
    assert np.isfinite(y.data).all() and all(np.isfinite(x.grad).all() for x in inputs)


@pytest.mark.parametrize(
    ("operation", "values"),
    [(ops.div, (1e30, 1e30)), (ops.div, (1e-30, -1e-30)), *((ops.sigmoid, (x,)) for x in (-20, -80, 5)),
     *((fused.gelu, ([x],)) for x in (-1e15, 1e15))],
)  # fmt: skip
@np.errstate(over="ignore")  # in tanh(z³)
def test_float32_is_as_good_for_huge_and_tiny_values_as_float64(operation, values):
    found = []
    for dtype in (np.float32, np.float64):
        inputs = [Tensor(np.array(x, dtype), requires_grad=True) for x in values]
        y = operation(*inputs)
        y.backward(np.ones(y.shape, dtype))
        found.append([y.data.item(), *(x.grad.item() for x in inputs)])
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-44)


def test_the_mean_of_nothing_is_nan_and_has_a_gradient_of_its_shape():
    x = Tensor(np.empty((0, 3)), requires_grad=True)
    with pytest.warns(RuntimeWarning):
        y = x.mean()
    y.backward()
    assert np.isnan(y.data) and x.grad.shape == (0, 3)


METHODS = {
    "x.T": (lambda x: x.T, ops.transpose),
    "x[0]": (lambda x: x[0], lambda x: ops.getitem(x, index=0)),
    "-x": (lambda x: -x, ops.neg),
    "x @ x.T": (lambda x: x @ x.T, lambda x: ops.matmul(x, ops.transpose(x))),
    "x.reshape(3, 2)": (lambda x: x.reshape(3, 2), lambda x: ops.reshape(x, (3, 2))),
    "x.reshape(np.int64(3), -1)": (lambda x: x.reshape(np.int64(3), -1), lambda x: ops.reshape(x, (3, 2))),
    "x.reshape(np.int64(6))": (lambda x: x.reshape(np.int64(6)), lambda x: ops.reshape(x, (6,))),
    "x.sum().reshape()": (lambda x: x.sum().reshape(), lambda x: x.sum()),
    "x.reshape((3, 2))": (lambda x: x.reshape((3, 2)), lambda x: ops.reshape(x, (3, 2))),
    "x.sum(axis=0)": (lambda x: x.sum(axis=0), lambda x: ops.sum(x, axis=0)),
    "x.softmax()": (lambda x: x.softmax(), ops.softmax),
    "x.log_softmax()": (lambda x: x.log_softmax(), ops.log_softmax),
    "x.transpose((1, 0))": (lambda x: x.transpose((1, 0)), lambda x: ops.transpose(x, (1, 0))),
}


@pytest.mark.parametrize(("method", "function"), METHODS.values(), ids=METHODS)
def test_operators_and_methods_are_the_operations(method, function, rng):
    x = rng.standard_normal((2, 3))
    y, z = method(Tensor(x)).data, function(Tensor(x)).data
    np.testing.assert_array_equal(y, z)
    found, expected = (gradients(f, [x], {}, np.ones(y.shape)) for f in (method, function))
    np.testing.assert_array_equal(found[0], expected[0])

"""What fused operations promise beyond their gradients: attention's masks, no overflow, and little memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.engine import factors, fused
from minilora.engine.attention import Packing, attention
from minilora.engine.tensor import Tensor, no_grad
from minilora.measure.ledger import peak


def run(f, *arrays, g=None):
    """f's value and the gradients of its inputs; g defaults to fixed random values."""
    tensors = [Tensor(a, requires_grad=True) for a in arrays]
    y = f(*tensors)
    y.backward(np.random.default_rng(1).standard_normal(y.shape) if g is None else g)
    return y.data, [t.grad for t in tensors]


def assert_same(one, other):
    for a, b in zip((one[0], *one[1]), (other[0], *other[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


# -- matmuls -----------------------------------------------------------------------------------------------------------


class Recorder:
    """A packed matrix that records how many of its rows were asked for at a time."""

    def __init__(self, w):
        self.w, self.shape, self.asked = w, w.shape, []

    def __len__(self):
        return len(self.w)

    def unpack(self, start=0, stop=None):
        self.asked.append(len(self.w[start:stop]))
        return self.w[start:stop]

    factor = unpack


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_packed_head_is_never_unpacked_whole(rng, tokens):
    w, x = rng.standard_normal((2 * fused.VOCAB_BLOCK + 7, 3)), rng.standard_normal((tokens, 3))
    packed = Recorder(w)
    np.testing.assert_allclose(fused.product(x, packed), x @ w.T, rtol=1e-12)
    assert packed.asked == [fused.VOCAB_BLOCK, fused.VOCAB_BLOCK, 7]


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_without_blas_products_and_the_loss_are_the_same(rng, monkeypatch, tokens):
    x, w, a, b = (rng.standard_normal(shape) for shape in ((tokens, 80), (90, 80), (3, 80), (90, 3)))
    head, labels = rng.standard_normal((fused.VOCAB_BLOCK + 7, 80)), rng.integers(0, fused.VOCAB_BLOCK, tokens)
    ways = [
        lambda: run(lambda *each: fused.lora_linear(*each, scale=2.0), x, w, a, b),
        lambda: run(lambda *each: fused.linear_cross_entropy(*each, labels), x, head),
    ]
    with_blas = [way() for way in ways]
    assert type(factors.factor(w)) is np.ndarray
    monkeypatch.setattr(factors, "HAS_BLAS", False)
    assert type(factors.factor(w)) is type(factors.factor(w).T) is factors.EinsumFactor
    for order in "CF":
        y = fused.product(np.asarray(x, order=order), w)
        np.testing.assert_allclose(y, x @ w.T, rtol=1e-11, atol=1e-11)
        assert y.flags.c_contiguous and fused.product_back(np.asarray(y, order=order), w).flags.c_contiguous
    for one, other in zip(with_blas, (way() for way in ways), strict=True):
        assert_same(one, other)
    monkeypatch.setattr(factors.EinsumFactor, "__rmatmul__", lambda factor, x: "by einsum")
    assert fused.product(x, w) == fused.product_back(y, w) == "by einsum"


@pytest.mark.parametrize("rows", [1, 2, 32, 33])
def test_a_product_of_few_rows_is_the_product(rng, rows):
    x, w = rng.standard_normal((rows, 300)), rng.standard_normal((300, 300))
    y = fused.product(x, w)
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-10, atol=1e-10)
    assert y.flags.c_contiguous


# -- attention ---------------------------------------------------------------------------------------------------------


@st.composite
def attention_inputs(draw):
    """q, k, v of any sizes, with a cache or without, and the size of a block."""
    B, T, cached, K, G, half = (
        draw(st.integers(low, high)) for low, high in ((1, 2), (1, 6), (0, 3), (1, 2), (1, 3), (1, 2))
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shapes = (B, T, K * G, 2 * half), *[(B, cached + T, K, 2 * half)] * 2
    return [rng.standard_normal(shape) for shape in shapes], draw(st.integers(1, 7))


@given(attention_inputs(), st.data())
@settings(max_examples=60)
def test_a_beginning_held_once_is_the_same_as_one_in_every_row(inputs, data):
    (q, k, v), block = inputs
    B, S, T = len(q), k.shape[1], q.shape[1]
    P, window = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([None, 1, 2, 4]))
    padding = np.array(data.draw(st.lists(st.integers(0, S - 1), min_size=B, max_size=B)))
    k0, v0 = np.random.default_rng(3).standard_normal((2, 1, P, *k.shape[2:]))
    settings = {"window": window, "block": block, "scale": 0.7}
    y = attention(q, k, v, first=padding if padding.any() else None, beginning=(k0, v0), **settings).data
    for row, pad in enumerate(padding):
        whole = [np.concatenate((first, x[row : row + 1, pad:]), axis=1) for first, x in ((k0, k), (v0, v))]
        new = min(T, S - pad)  # the queries that are not padding
        alone = attention(q[row : row + 1, T - new :], *whole, **settings).data
        np.testing.assert_allclose(y[row : row + 1, T - new :], alone, rtol=1e-12, atol=1e-12)
    assert np.isfinite(y).all()


def test_a_beginning_held_once_has_no_gradient_and_says_so(rng):
    q, k = rng.standard_normal((2, 1, 1, 1, 2))
    y = attention(Tensor(q, requires_grad=True), k, k, beginning=(k, k))
    with pytest.raises(ValueError, match="no gradient: leave the cache out, or use no_grad"):
        y.backward(np.ones(y.shape))


@given(st.integers(0, 3), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=40)
def test_packed_sequences_are_the_sequences_alone(prefix, lengths, block):
    packing = Packing(prefix, tuple(prefix + int(end) for end in np.cumsum(lengths)))
    rng = np.random.default_rng(len(lengths))
    row = [rng.standard_normal((1, packing.ends[-1], heads, 4)) for heads in (4, 2, 2)]
    packed = attention(*row, packing=packing, block=block).data
    positions = packing.positions()
    for start, end in packing.own_spans():
        own = [*range(prefix), *range(start, end)]
        np.testing.assert_allclose(packed[:, own], attention(*[x[:, own] for x in row]).data, rtol=1e-12, atol=1e-12)
        assert [positions[i] for i in own] == list(range(len(own)))
    assert packing.spans() == ([(0, prefix)] if prefix else []) + packing.own_spans()


@pytest.mark.parametrize(
    ("prefix", "ends"), [(0, ()), (0, (3, 2, 4)), (3, (2, 4)), (-1, (2, 4)), (0, np.array([4, 1]))]
)
def test_ends_that_do_not_rise_from_the_prefix_are_refused_as_lengths_would_be(prefix, ends):
    with pytest.raises(ValueError, match="must rise from 0"):
        Packing(prefix, ends)
    assert Packing(1, np.array([1, 4])).positions() == [0, 1, 2, 3]  # the first sequence is the prefix alone


# -- activation and losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [fused.swiglu, fused.geglu])
def test_a_gate_does_not_overflow(gated):
    gate = np.array([-1e4, -50, 0, 50, 1e4])
    with np.errstate(all="raise", under="ignore"):
        y, gradients = run(gated, gate, np.ones(5))
    np.testing.assert_allclose(y, [0, 0, 0, 50, 1e4], atol=1e-12)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_cross_entropy_of_equal_logits_is_log_v_and_of_large_ones_does_not_overflow():
    assert fused.cross_entropy(np.zeros((3, 8)), np.array([0, 1, 7])).item() == pytest.approx(np.log(8))
    logits = np.array([[1e4, 0, -1e4], [0, 1e4, 0]], np.float32)
    loss, (dlogits,) = run(lambda z: fused.cross_entropy(z, np.array([0, 0])), logits, g=np.array(1, np.float32))
    assert loss == 5e3 and np.isfinite(dlogits).all()
    loss, _ = run(
        lambda z: fused.linear_cross_entropy(z, np.eye(3, dtype=np.float32), np.array([0, 0])),
        logits,
        g=np.array(1, np.float32),
    )
    assert loss == 5e3


@pytest.mark.parametrize(
    "loss", [fused.cross_entropy, lambda z, *of, **known: fused.linear_cross_entropy(z, z, *of, **known)]
)
def test_a_loss_over_no_token_of_an_impossible_label_or_of_too_few_labels_raises(loss):
    for labels, message in (
        ([[-100, -100]], "no token is scored"),
        ([[-100, -1]], r"in 0\.\.1, or be -100 .* got -1\.\.-1"),
        ([[1, 2]], r"in 0\.\.1, or be -100 .* got 1\.\.2"),
        ([[1]], "a label for each of 2 tokens, got 1"),
        ([[1], [0], [1]], "a label for each of 2 tokens, got 3"),
    ):
        for known in (None, np.array([0])) if "for each" in message else (None,):
            with pytest.raises(ValueError, match=message):
                loss(Tensor(np.zeros((2, 2)), requires_grad=True), np.array(labels), scored=known)


@pytest.mark.parametrize("trained", [[0], [0, 1]], ids=["w frozen", "w trained"])
def test_linear_cross_entropy_never_holds_the_logits_and_without_gradients_gives_the_same_loss(rng, trained):
    tokens, words = 200, 6000
    labels = rng.integers(0, words, (1, tokens))
    x, w = (
        Tensor(rng.standard_normal(shape), requires_grad=i in trained)
        for i, shape in enumerate([(1, tokens, 6), (words, 6)])
    )

    def loss():
        return fused.linear_cross_entropy(x, w, labels, block=20, vocab_block=300)

    assert peak(lambda: loss().backward()) < tokens * words * 8 / 5
    with_gradients = loss().item()
    with no_grad():
        assert loss().item() == with_gradients

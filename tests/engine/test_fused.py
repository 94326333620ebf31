"""Fused operations equal their composition from elementary ones, and keep the promises that are theirs alone."""

import tracemalloc

import numpy as np
import pytest

from minilora.engine import fused
from minilora.engine.attention import Packing, attention
from minilora.engine.tensor import Tensor, no_grad


def run(f, *arrays, g=None, trained=None):
    """f's value and the gradients of its inputs, in float64; g defaults to fixed random numbers."""
    tensors = [Tensor(a, requires_grad=trained is None or i in trained) for i, a in enumerate(arrays)]
    y = f(*tensors)
    y.backward(np.random.default_rng(1).standard_normal(y.shape) if g is None else g)
    return y.data, [t.grad for t in tensors]


def assert_same(one, other, tolerance=1e-12):
    np.testing.assert_allclose(one[0], other[0], rtol=tolerance, atol=tolerance)
    for a, b in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


B, T, C, F, V, R = 2, 5, 6, 7, 8, 3
H, K, D = 4, 2, 4
LABELS = np.array([[1, -100, 3, 7, 0], [-100, -100, 2, 2, -100]])
ANGLES = np.arange(T)[:, None, None] * np.array([1.0, 0.1])  # (T, 1, D/2)
PACKED = Packing(prefix=2, ends=(4, 7, 8))


# -- packed matrices ---------------------------------------------------------------------------------------------------


class Recorder:
    """A packed matrix that remembers how many of its rows were asked for at a time."""

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


# -- lora_linear -------------------------------------------------------------------------------------------------------


def test_lora_with_b_zero_is_bit_identical_to_linear_and_gives_a_no_gradient(rng):
    x, w, a = rng.standard_normal((3, C)), rng.standard_normal((F, C)), rng.standard_normal((R, C))
    y, (_, _, da, db) = run(lambda *t: fused.lora_linear(*t, scale=2.0), x, w, a, np.zeros((F, R)))
    np.testing.assert_array_equal(y, fused.linear(x, w).data)
    assert not da.any() and db.any()


def test_lora_equals_linear_with_the_merged_matrix(rng):
    x, w, a, b = (rng.standard_normal(shape) for shape in ((B, T, C), (F, C), (R, C), (F, R)))
    merged = fused.linear(x, w + 0.25 * b @ a).data
    np.testing.assert_allclose(fused.lora_linear(x, w, a, b, 0.25).data, merged, rtol=1e-12, atol=1e-12)


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def qkv(rng):
    return [rng.standard_normal(shape) for shape in ((B, T, H, D), (B, T, K, D), (B, T, K, D))]


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("changed", range(3), ids="qkv")
def test_a_later_token_changes_no_earlier_output(qkv, changed, block):
    before = attention(*qkv, block=block).data
    qkv[changed] = qkv[changed].copy()
    qkv[changed][:, 3:] += 5
    after = attention(*qkv, block=block).data
    np.testing.assert_allclose(after[:, :3], before[:, :3], rtol=1e-12)
    assert not np.allclose(after[:, 3:], before[:, 3:])


def test_an_earlier_output_gives_later_tokens_no_gradient(qkv):
    g = np.zeros((B, T, H, D))
    g[:, :3] = 1
    _, gradients = run(attention, *qkv, g=g)
    assert all(not gradient[:, 3:].any() and gradient[:, :3].any() for gradient in gradients)


@pytest.mark.parametrize("block", [1, 2, 3, 5])
@pytest.mark.parametrize("first", [None, np.array([0, 3])], ids=["unpadded", "padded"])
@pytest.mark.parametrize("queries", [5, 3])
def test_attention_in_blocks_equals_attention_whole(qkv, block, first, queries):
    qkv[0] = qkv[0][:, -queries:]
    whole = run(lambda *t: attention(*t, first=first), *qkv)
    assert_same(run(lambda *t: attention(*t, first=first, block=block), *qkv), whole)


@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize("first", [None, np.array([0, 3])], ids=["unpadded", "padded"])
def test_with_more_keys_than_queries_the_queries_are_the_last(qkv, queries, first):
    q, k, v = qkv
    full = attention(q, k, v, first=first).data
    last = attention(q[:, -queries:], k, v, first=first).data
    np.testing.assert_allclose(last, full[:, -queries:], rtol=1e-12, atol=1e-12)


def test_a_row_padded_on_the_left_equals_the_row_alone(qkv, rng):
    pad = 2
    short = [x[1:, pad:] for x in qkv]
    alone, gradients = run(attention, *short)
    g = np.zeros((B, T, H, D))
    g[1:, pad:] = np.random.default_rng(1).standard_normal(alone.shape)
    padded, padded_gradients = run(lambda *t: attention(*t, first=np.array([0, pad])), *qkv, g=g)
    assert_same((padded[1:, pad:], [x[1:, pad:] for x in padded_gradients]), (alone, gradients))
    assert not any(x[1, :pad].any() for x in padded_gradients)
    assert np.isfinite(padded).all()  # padding itself computes something harmless


@pytest.mark.parametrize("block", [2, 256])
def test_packed_sequences_equal_each_sequence_in_a_row_of_its_own(rng, block):
    row = [rng.standard_normal((1, 8, heads, D)) for heads in (H, K, K)]
    packed = attention(*row, packing=PACKED, block=block).data
    for start, end in PACKED.spans()[1:]:
        own = [0, 1, *range(start, end)]
        alone = attention(*[x[:, own] for x in row]).data
        np.testing.assert_allclose(packed[:, own], alone, rtol=1e-12, atol=1e-12)


def test_packing_counts_positions_from_the_prefix():
    assert PACKED.spans() == [(0, 2), (2, 4), (4, 7), (7, 8)]
    assert PACKED.positions() == [0, 1, 2, 3, 2, 3, 4, 2]
    assert Packing(prefix=0, ends=(2, 3)).positions() == [0, 1, 0]


def test_grouped_queries_equal_repeated_keys_and_values(qkv):
    q, k, v = qkv
    repeated = [np.repeat(x, H // K, axis=2) for x in (k, v)]
    np.testing.assert_allclose(attention(q, k, v).data, attention(q, *repeated).data, rtol=1e-12)


def test_attention_does_not_overflow(qkv):
    y, gradients = run(attention, *[100 * x for x in qkv])
    assert np.isfinite(y).all() and all(np.isfinite(gradient).all() for gradient in gradients)


# -- positions, activation, embedding ----------------------------------------------------------------------------------


def test_rope_scores_depend_on_the_distance_alone(rng):
    q, k = rng.standard_normal((2, 1, 1, 1, D))

    def score(m, n):
        turned = [fused.rope(x, np.cos(p * ANGLES[1:2]), np.sin(p * ANGLES[1:2])).data for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum()

    assert score(9, 4) == pytest.approx(score(5, 0), rel=1e-12)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


def test_swiglu_does_not_overflow():
    gate = np.array([-1e4, -50, 0, 50, 1e4])
    with np.errstate(all="raise", under="ignore"):
        y, gradients = run(fused.swiglu, gate, np.ones(5))
    np.testing.assert_allclose(y, [0, 0, 0, 50, 1e4], atol=1e-12)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_embedding_adds_up_the_gradients_of_a_repeated_token():
    _, (dw,) = run(lambda w: fused.embedding(w, np.array([[1, 1, 2]])), np.zeros((4, 2)), g=np.ones((1, 3, 2)))
    np.testing.assert_array_equal(dw, [[0, 0], [2, 2], [1, 1], [0, 0]])


# -- losses ------------------------------------------------------------------------------------------------------------


def test_cross_entropy_ignores_tokens_labelled_minus_100(rng):
    logits, scored = rng.standard_normal((B, T, V)), LABELS != -100
    loss, (dlogits,) = run(lambda z: fused.cross_entropy(z, LABELS), logits, g=np.array(1.0))
    alone, (gradient,) = run(lambda z: fused.cross_entropy(z, LABELS[scored]), logits[scored], g=np.array(1.0))
    assert loss == pytest.approx(alone, rel=1e-14)
    np.testing.assert_allclose(dlogits[scored], gradient, rtol=1e-14)
    assert not dlogits[~scored].any()


def test_cross_entropy_of_equal_logits_is_log_v():
    assert fused.cross_entropy(np.zeros((3, V)), np.array([0, 1, 7])).item() == pytest.approx(np.log(V))


def test_cross_entropy_does_not_overflow():
    logits = np.array([[1e4, 0, -1e4], [0, 1e4, 0]], np.float32)
    loss, (dlogits,) = run(lambda z: fused.cross_entropy(z, np.array([0, 0])), logits, g=np.array(1, np.float32))
    assert loss == 5e3 and np.isfinite(dlogits).all()


@pytest.mark.parametrize("loss", [fused.cross_entropy, lambda z, labels: fused.linear_cross_entropy(z, z, labels)])
def test_a_loss_over_no_token_raises(loss):
    with pytest.raises(ValueError, match="no token is scored"):
        loss(Tensor(np.zeros((2, 3)), requires_grad=True), np.array([-100, -100]))


@pytest.mark.parametrize(("block", "vocab_block"), [(1, 1), (2, 4), (3, V), (6, 2), (512, 4096)])
@pytest.mark.parametrize("trained", [[0], [1], [0, 1]], ids=["w frozen", "x frozen", "both trained"])
def test_linear_cross_entropy_equals_cross_entropy_of_linear(rng, block, vocab_block, trained):
    arrays = rng.standard_normal((B, T, C)), rng.standard_normal((V, C))
    g = np.array(0.7)
    pieces = {"block": block, "vocab_block": vocab_block}
    loss, blocked = run(lambda x, w: fused.linear_cross_entropy(x, w, LABELS, **pieces), *arrays, g=g, trained=trained)
    expected, whole = run(lambda x, w: fused.cross_entropy(fused.linear(x, w), LABELS), *arrays, g=g, trained=trained)
    assert [x is None for x in blocked] == [x is None for x in whole] == [i not in trained for i in range(2)]
    assert_same((loss, [blocked[i] for i in trained]), (expected, [whole[i] for i in trained]))
    with no_grad():
        alone = fused.linear_cross_entropy(*[Tensor(a, requires_grad=True) for a in arrays], LABELS, **pieces)
    assert alone.item() == loss and not alone.requires_grad


@pytest.mark.parametrize("trained", [[0], [0, 1]], ids=["w frozen", "w trained"])
def test_linear_cross_entropy_never_holds_the_logits(rng, trained):
    tokens, words = 200, 6000
    labels = rng.integers(0, words, (1, tokens))
    x, w = (
        Tensor(rng.standard_normal(shape), requires_grad=i in trained)
        for i, shape in enumerate([(1, tokens, C), (words, C)])
    )
    tracemalloc.start()
    fused.linear_cross_entropy(x, w, labels, block=20, vocab_block=300).backward()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < tokens * words * 8 / 5

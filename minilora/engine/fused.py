"""The transformer's operations, each with its gradient derived by hand.

Every one equals a composition of elementary operations (the tests hold it to that); written as one, it keeps less for
backward and passes over memory fewer times. What an operation keeps is said in its docstring: it is the memory bill.

Shapes: B batch, T tokens, S keys (cached ones included), C model width, H query heads, K key/value heads, G = H / K
queries per key head, D head width, F feed-forward width, V vocabulary, r rank; m outputs and n inputs of a linear map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .backend import Array, array_module
from .tensor import is_recording, op, shared_backward

NOT_SCORED = -100  # the label of a token that is not part of the loss, as in Hugging Face and PyTorch


def rows(x: Array) -> Array:
    """(..., n) -> (N, n): all leading axes as one."""
    return x.reshape(-1, x.shape[-1])


def blocks(length: int, size: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of consecutive blocks of at most `size` that cover `range(length)`."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


def computed_once(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """For what two VJPs of one operation both need: the second call returns the first one's result, and frees it."""
    kept: list[Array] = []

    def once(g: Array) -> Array:
        if kept:
            return kept.pop()
        kept.append(f(g))
        return kept[0]

    return once


# -- linear maps -----------------------------------------------------------------------------------------------------


@op
def linear(x, w, bias=None):
    """y = x wᵀ + bias      x (..., n)  w (m, n)  bias (m)  ->  y (..., m)

    Keeps w for dx and x for dw: with w frozen, x is not kept.
    """
    shape, x = x.shape, rows(x)  # one product of N rows is faster than B products of T
    y = x @ w.T  # (N, m)
    if bias is not None:
        y += bias

    def dx(g):
        return (rows(g) @ w).reshape(shape)

    def dw(g):
        return rows(g).T @ x

    return y.reshape(*shape[:-1], len(w)), dx, dw, lambda g: rows(g).sum(axis=0)


@op
def lora_linear(x, w, a, b, scale: float):
    """y = x wᵀ + scale (x aᵀ) bᵀ      x (..., n)  w (m, n)  a (r, n)  b (m, r)  ->  y (..., m)

    The frozen product and, beside it, the low-rank update of Hu et al. 2021 (arXiv 2106.09685), section 4.1:
    a projects down to r numbers per token, b projects up again. The matrix b a (m, n) is never formed.
    Keeps x for da and, per token, the r numbers x aᵀ for db.
    """
    shape, x = x.shape, rows(x)
    xa = x @ a.T  # (N, r)
    xa *= scale
    y = x @ w.T  # (N, m)
    add_product(y, xa, b.T)
    gb_of = computed_once(lambda g: (rows(g) @ b) * scale)  # (N, r): shared by dx and da

    def dx(g):
        out = rows(g) @ w
        add_product(out, gb_of(g), a)
        return out.reshape(shape)

    def dw(g):  # w is frozen in LoRA: the engine drops this VJP, and it never runs
        return rows(g).T @ x

    def da(g):
        return gb_of(g).T @ x  # (r, n)

    def db(g):
        return rows(g).T @ xa  # (m, r)

    return y.reshape(*shape[:-1], len(w)), dx, dw, da, db


def add_product(out: Array, thin: Array, wide: Array, block: int = 64) -> None:
    """out += thin @ wide, a block of rows at a time: the product of a block is added while it is still in the cache."""
    for i, j in blocks(len(out), block):
        out[i:j] += thin[i:j] @ wide


@op
def embedding(w, ids):
    """w[ids]      w (V, C)  ids (B, T) integers  ->  (B, T, C)

    Keeps the ids. A token that occurs several times collects all its gradients.
    """
    xp, shape, dtype = array_module(w), w.shape, w.dtype

    def dw(g):
        out = xp.zeros(shape, dtype)
        xp.add.at(out, ids.reshape(-1), rows(g))
        return out

    return w[ids], dw


# -- normalisation, positions, activation ------------------------------------------------------------------------------


@op
def rms_norm(x, w, eps: float):
    """y = x / rms(x) * w,  rms(x) = sqrt(mean(x²) + eps) over the last axis      x (..., C)  w (C)  ->  (..., C)

    Zhang & Sennrich 2019 (arXiv 1910.07467). Keeps x and one number per row.
    """
    xp = array_module(x)
    inv = xp.einsum("...c,...c->...", x, x)[..., None]  # (..., 1): Σ x² without an array of squares
    inv /= x.shape[-1]
    inv += eps
    xp.sqrt(inv, out=inv)
    xp.divide(1, inv, out=inv)
    y = x * inv
    y *= w

    def dx(g):  # x̂ = x · inv moves with x in two ways: through x, and through the length that inv measures
        out = g * w
        along = xp.einsum("...c,...c->...", out, x)[..., None]  # how much of the gradient points along x
        along *= inv * inv / x.shape[-1]
        out -= x * along
        out *= inv
        return out

    def dw(g):
        return (rows(g) * (rows(x) * rows(inv))).sum(axis=0)

    return y, dx, dw


@op
def rope(x, cos: Array, sin: Array):
    """Rotate the pairs (x[i], x[i + D/2]) by their position's angle      x (B, T, H, D)  cos, sin (·, T, 1, D/2)

    Su et al. 2021 (arXiv 2104.09864), in the halves layout that Hugging Face uses. Keeps nothing but cos and sin:
    the gradient of a rotation is the rotation back.
    """

    def rotate(x: Array, sin: Array) -> Array:
        half = x.shape[-1] // 2
        x1, x2 = x[..., :half], x[..., half:]  # (B, T, H, D/2) each
        y = array_module(x).empty_like(x)
        y1, y2 = y[..., :half], y[..., half:]
        y1[...] = x1 * cos
        y1 -= x2 * sin
        y2[...] = x2 * cos
        y2 += x1 * sin
        return y

    return rotate(x, sin), lambda g: rotate(g, -sin)


@op
def swiglu(gate, up):
    """silu(gate) * up,  silu(z) = z / (1 + e⁻ᶻ)      gate, up (..., F)  ->  (..., F)

    Shazeer 2020 (arXiv 2002.05202). Keeps its two inputs and computes the sigmoid again in backward.
    """
    xp = array_module(gate)

    def sigmoid() -> Array:
        s = gate * 0.5
        xp.tanh(s, out=s)
        s *= 0.5
        s += 0.5
        return s

    def backward(g):
        s = sigmoid()
        silu = gate * s
        dup = g * silu
        s += silu * (1 - s)  # d silu / d gate = s + gate s (1 - s)
        s *= g
        s *= up
        return s, dup

    y = sigmoid()
    y *= gate
    y *= up
    return y, *shared_backward(backward, 2)


# -- attention ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """Several sequences in one row, without padding: a common beginning once, then each sequence's own rest.

    prefix: how many tokens all sequences begin with. ends: where each one's rest ends in the row; the first rest begins
    at `prefix`. Every token sees the prefix and what came before it in its own sequence, and so has exactly the value
    it would have in a row of its own, while the prefix is computed once instead of once per sequence.
    """

    prefix: int
    ends: tuple[int, ...]

    def spans(self) -> list[tuple[int, int]]:
        """(start, end) in the row of the prefix, if there is one, and of each sequence's rest."""
        starts = (self.prefix, *self.ends[:-1])
        own = list(zip(starts, self.ends, strict=True))
        return [(0, self.prefix), *own] if self.prefix else own

    def ranges(self) -> list[range]:
        """For each of the spans, its tokens' positions in their own sequence."""
        starts = [(min(start, self.prefix), end - start) for start, end in self.spans()]
        return [range(first, first + length) for first, length in starts]

    def positions(self) -> list[int]:
        """Each token's position in its own sequence."""
        return [n for positions in self.ranges() for n in positions]


@op
def attention(q, k, v, first: Array | None = None, block: int = 256, packing: Packing | None = None):
    """softmax(q kᵀ / √D) v for every head, each token seeing itself and what came before.

    q (B, T, H, D)  k, v (B, S, K, D)  ->  (B, T, H, D). Query t stands at position S - T + t: with a cache there are
    more keys than queries. Head h reads key/value head h // G (grouped queries, Ainslie et al. 2023, arXiv 2305.13245).
    first: (B) integers, the first key that is not padding, for prompts padded on the left.
    block: queries worked on at a time, so that the (T, S) scores never exist whole.
    packing: sequences that share the row without seeing each other.

    Keeps q, k and v; the weights are computed again in backward, a block at a time.
    """
    xp = array_module(q)
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    G, scale = H // K, 1 / math.sqrt(D)
    keys = k.transpose(0, 2, 1, 3)  # (B, K, S, D)
    values = v.transpose(0, 2, 1, 3)  # (B, K, S, D)
    prefix = packing.prefix if packing else 0
    # Queries i..j see keys 0..prefix and low..high.
    spans = packing.spans() if packing else [(0, T)]
    windows = [(i + s, j + s, s, S - T + j + s) for s, e in spans for i, j in blocks(e - s, block)]

    def grouped(x: Array, i: int, j: int) -> Array:  # rows i..j of (B, T, H, D) -> (B, K, G t, D)
        x = x[:, i:j].reshape(B, j - i, K, G, D).transpose(0, 2, 3, 1, 4)  # (B, K, G, t, D)
        return x.reshape(B, K, G * (j - i), D)

    def ungrouped(x: Array, t: int) -> Array:  # the way back: (B, K, G t, D) -> (B, t, H, D)
        return x.reshape(B, K, G, t, D).transpose(0, 3, 1, 2, 4).reshape(B, t, H, D)

    def seen(x: Array, low: int, high: int) -> Array:  # (B, K, S, D) -> (B, K, s, D)
        if low <= prefix:
            return x[:, :, :high]
        return xp.concatenate((x[:, :, :prefix], x[:, :, low:high]), axis=2) if prefix else x[:, :, low:high]

    def add_seen(
        total: Array, part: Array, low: int, high: int
    ) -> None:  # the way back: total += part where it belongs
        if low <= prefix:
            total[:, :, :high] += part
        else:
            total[:, :, :prefix] += part[:, :, :prefix]
            total[:, :, low:high] += part[:, :, prefix:]

    def hidden(i: int, j: int, low: int, high: int) -> Array:  # -inf where a query must not look, (B or 1, 1, 1, t, s)
        key = xp.arange(high)
        if low > prefix:
            key = xp.concatenate((key[:prefix], key[low:]))
        query = xp.arange(S - T + i, S - T + j)[:, None]
        masked = key > query  # the future, (t, s)
        if first is None:
            return xp.where(masked, -xp.inf, 0)[None, None, None]
        padding = (key < first[:, None, None]) & (key != query)  # padding sees itself, so that no row is empty
        return xp.where(masked | padding, -xp.inf, 0)[:, None, None]

    def weights(queries: Array, own_keys: Array, i: int, j: int, low: int, high: int) -> Array:
        p = queries @ own_keys.swapaxes(-1, -2)  # (B, K, G t, s)
        p *= scale
        if first is not None or j - i > 1:
            p = p.reshape(B, K, G, j - i, -1)
            p += hidden(i, j, low, high).astype(p.dtype)
            p = p.reshape(B, K, G * (j - i), -1)
        p -= p.max(axis=-1, keepdims=True)
        xp.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        return p

    def backward(g):
        dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)
        dkeys, dvalues = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)  # (B, K, S, D)
        for i, j, low, high in windows:
            queries, gi, own_keys = grouped(q, i, j), grouped(g, i, j), seen(keys, low, high)
            p = weights(queries, own_keys, i, j, low, high)  # (B, K, G t, s)
            add_seen(dvalues, p.swapaxes(-1, -2) @ gi, low, high)
            ds = gi @ seen(values, low, high).swapaxes(-1, -2)  # dL/dp, turned into dL/d(scores) in place
            ds -= xp.einsum("bkts,bkts->bkt", ds, p)[..., None]
            ds *= p
            ds *= scale
            dq[:, i:j] = ungrouped(ds @ own_keys, j - i)
            add_seen(dkeys, ds.swapaxes(-1, -2) @ queries, low, high)
        return dq, dk, dv

    y = xp.empty_like(q)
    for i, j, low, high in windows:
        p = weights(grouped(q, i, j), seen(keys, low, high), i, j, low, high)
        y[:, i:j] = ungrouped(p @ seen(values, low, high), j - i)
    return y, *shared_backward(backward, 3)


# -- losses ------------------------------------------------------------------------------------------------------------


def _softmax_loss(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Turn logits (N, V) into softmax minus one-hot, in place; return it and the N losses, -log p(label)."""
    xp = array_module(logits)
    each = xp.arange(len(labels))
    logits -= logits.max(axis=-1, keepdims=True)
    picked = logits[each, labels]  # a copy, (N)
    xp.exp(logits, out=logits)
    total = logits.sum(axis=-1)  # (N)
    logits /= total[:, None]
    logits[each, labels] -= 1
    return logits, xp.log(total) - picked


@op
def cross_entropy(logits, labels: Array, scored: Array | None = None):
    """The mean of -log softmax(logits)[label] over the tokens that are scored.

    logits (..., V), labels (...) integers, -100 where a token is not scored  ->  a scalar. Raises ValueError when
    nothing is scored. Keeps (N, V) probabilities: for a large V use `linear_cross_entropy`.
    scored: where the scored labels stand, if that is known already; a GPU's answer must be waited for.
    """
    xp, shape = array_module(logits), logits.shape
    labels = labels.reshape(-1)
    scored = _scored(labels, scored)
    delta, losses = _softmax_loss(rows(logits)[scored], labels[scored])

    def dlogits(g):
        out = xp.zeros((len(labels), shape[-1]), delta.dtype)
        out[scored] = delta * (g / len(losses))
        return out.reshape(shape)

    return losses.mean(), dlogits


@op
def linear_cross_entropy(x, w, labels: Array, block: int = 512, scored: Array | None = None):
    """cross_entropy(x wᵀ, labels) without ever holding the logits      x (..., C)  w (V, C)  labels (...)  ->  scalar

    Works on `block` scored tokens at a time: logits, loss and dx of a block are computed together, then the block's
    logits are gone. Keeps dx (N, C), and for a trainable w also x, from which dw computes the logits a second time.
    scored: as in `cross_entropy`.
    """
    xp, shape = array_module(x), x.shape
    labels = labels.reshape(-1)
    scored = _scored(labels, scored)
    hidden, targets = rows(x)[scored], labels[scored]  # (N, C), (N)
    count = len(targets)
    wanted = is_recording()
    kept = xp.empty_like(hidden if wanted else hidden[:0])  # dx, (N, C)
    total = xp.zeros((), x.dtype)
    for i, j in blocks(count, block):
        delta, losses = _softmax_loss(hidden[i:j] @ w.T, targets[i:j])  # (n, V), (n)
        total += losses.sum()
        if wanted:
            kept[i:j] = delta @ w
        del delta

    def dx(g):
        out = xp.zeros((len(labels), shape[-1]), kept.dtype)
        out[scored] = kept * (g / count)
        return out.reshape(shape)

    def dw(g):
        out = xp.zeros_like(w)
        for i, j in blocks(count, block):
            delta, _ = _softmax_loss(hidden[i:j] @ w.T, targets[i:j])
            out += delta.T @ (hidden[i:j] * (g / count))
            del delta  # before the next block's logits exist
        return out

    return total / count, dx, dw


def _scored(labels: Array, known: Array | None) -> Array:
    scored = (labels != NOT_SCORED).nonzero()[0] if known is None else known
    if len(scored) == 0:
        raise ValueError("no token is scored: every label is -100")
    return scored

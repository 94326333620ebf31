"""The transformer's operations, each with its gradient derived by hand.

Each equals a composition of elementary operations (the tests check this), but saves fewer activations for the backward
pass and reads memory fewer times. Each docstring states what the operation saves: that is its cost in memory.

Shapes: B batch, T tokens, N = B T, C model width, H heads, D head width, F feed-forward width, V vocabulary, r rank;
m outputs and n inputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .backend import Array, array_module, is_packed
from .factors import adds_products, factor, fast_factor
from .tensor import is_recording, op, shared_backward

Recompute = Callable[[], Array] | None
TOKEN_BLOCK, VOCAB_BLOCK = 256, 2048  # logits are computed in blocks of this shape, which fit the processor's cache
NOT_SCORED = -100  # the label of a token that is not part of the loss, as in Hugging Face and PyTorch


def rows(x: Array) -> Array:
    """(..., n) -> (N, n): all leading axes flattened into one."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def blocks(length: int, size: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of consecutive blocks of at most `size` that cover `range(length)`."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


def next_labels(labels: Array) -> Array:
    """What each token has to predict: the label of the token after it. The last one, nothing. (B, T) -> (B, T)"""
    shifted = array_module(labels).full_like(labels, NOT_SCORED)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


def computed_once(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """f, for two VJPs of one operation that both need it: the second call returns and frees the result of the first."""
    found: list[Array] = []

    def once(g: Array) -> Array:
        if found:
            return found.pop()
        found.append(f(g))
        return found[0]

    return once


# -- linear layers -----------------------------------------------------------------------------------------------------


Thin = tuple[Array, Array] | None


def product(x: Array, w: Array, thin: Thin = None) -> Array:
    """x wᵀ, plus s t if thin = (s, t)      x (N, n)  w (m, n), maybe packed  s (N, r)  t (r, m)  ->  (N, m)

    A packed w is unpacked `VOCAB_BLOCK` rows at a time, so that a whole head never exists; for a few rows of x, as in
    generation, it is not unpacked at all. With a few rows of x, a dense w is multiplied as (w xᵀ)ᵀ: BLAS then copies x
    into the order it needs instead of the far larger w.
    """
    if thin is not None:
        if adds_products(w):
            return factor(w).T.onto(thin[0] @ thin[1], x)
        return add_product(product(x, w), *thin)
    if is_packed(w):
        if not is_recording() and (y := w.product_of_few(x)) is not None:
            return y
        parts = [product(x, factor(w, a, b)) for a, b in blocks(len(w), VOCAB_BLOCK)]
        return parts[0] if len(parts) == 1 else array_module(x).concatenate(parts, axis=1)
    if 1 < len(x) <= 32 and len(x) * w.size > 1 << 17 and not adds_products(w):
        return array_module(x).ascontiguousarray((w @ x.T).T)
    return x @ fast_factor(w).T


def product_back(g: Array, w: Array, thin: Thin = None) -> Array:
    """g w, plus s t if thin = (s, t)      g (N, m)  w (m, n), maybe packed  s (N, r)  t (r, n)  ->  (N, n)"""
    if thin is not None:
        if adds_products(w):
            return factor(w).onto(thin[0] @ thin[1], g)
        return add_product(product_back(g, w), *thin)
    if adds_products(w) or not is_packed(w):
        return g @ factor(w)
    parts = (g[:, a:b] @ factor(w, a, b) for a, b in blocks(len(w), VOCAB_BLOCK))
    out = next(parts)
    for part in parts:
        out += part
    return out


def add_product(out: Array, thin: Array, wide: Array, block: int = 128) -> Array:
    """out += thin @ wide, a block of rows at a time: each block's product is added while it is still in the cache."""
    # With a transposed view, each of the small products would cost more.
    wide = fast_factor(array_module(wide).ascontiguousarray(wide))
    for i, j in blocks(len(out), block):
        out[i:j] += thin[i:j] @ wide
    return out


@op(wants_recompute=True)
def linear(x, w, bias=None, recompute: Recompute = None):
    """y = x wᵀ + bias      x (..., n)  w (m, n), maybe packed  bias (m)  ->  y (..., m)

    Saves w for dx and x for dw: if w is frozen, x is not saved.
    recompute: computes x again; dw then saves this function instead of x (see `op`).
    """
    shape, x = x.shape, rows(x)  # one matmul with N rows is faster than B matmuls with T rows
    y = product(x, w)  # (N, m)
    if bias is not None:
        y += bias
    x_of = recompute or (lambda: x)

    def dx(g):
        return product_back(rows(g), w).reshape(shape)

    def dw(g):
        return rows(g).T @ rows(x_of())

    return y.reshape(*shape[:-1], len(w)), dx, dw, lambda g: rows(g).sum(axis=0)


Mask = Callable[[Array], Array]  # the factors of an array's values, (1 / (1 - p)) or 0, in its shape: always the same


@op
def masked(x, mask: Mask):
    """x * mask      x (..., n)  ->  (..., n)

    Saves nothing: the mask is drawn again, from its seed.
    """
    return x * mask(x), lambda g: g * mask(g)


@op(wants_recompute=True)
def lora_linear(x, w, a, b, scale: float, mask: Mask | None = None, recompute: Recompute = None):
    """y = x wᵀ + scale (x aᵀ) bᵀ      x (..., n)  w (m, n), maybe packed  a (r, n)  b (m, r)  ->  y (..., m)

    The frozen product plus the low-rank update of Hu et al. 2021 (arXiv 2106.09685), section 4.1: a projects each
    token down to r values, b projects up again. The matrix b a (m, n) is never formed.
    mask: dropout. The update then gets x * mask; the frozen product gets x.
    Saves x for da (or `recompute`, as in `linear`) and x aᵀ, r values per token, for db. A mask is not saved.
    """
    shape, x = x.shape, rows(x)
    xa = (x if mask is None else x * mask(x)) @ a.T  # (N, r)
    xa *= scale
    y = product(x, w, (xa, b.T))  # (N, m)
    x_of = recompute or (lambda: x)
    gb_of = computed_once(lambda g: (rows(g) @ b) * scale)  # (N, r): shared by dx and da
    mask_of = computed_once(mask) if mask is not None else None  # (N, n), so is the mask

    def dx(g):
        if mask_of is None:
            return product_back(rows(g), w, (gb_of(g), a)).reshape(shape)
        low = gb_of(g) @ a  # (N, n)
        low *= mask_of(low)
        low += product_back(rows(g), w)
        return low.reshape(shape)

    def dw(g):  # w is frozen in LoRA: the engine drops this VJP, and it never runs
        return rows(g).T @ rows(x_of())

    def da(g):
        x = rows(x_of())
        return gb_of(g).T @ (x if mask_of is None else x * mask_of(x))  # (r, n)

    def db(g):
        return rows(g).T @ xa  # (m, r)

    return y.reshape(*shape[:-1], len(w)), dx, dw, da, db


@op
def mixed_lora_linear(x, w, *thin, parts: Sequence[tuple[Array | None, float | Array]]):
    """y = x wᵀ, and for every part y[rows] += scale (x[rows] aᵀ) bᵀ      x (B, ..., n)  w (m, n), maybe packed

    thin: a (r, n) and b (m, r) of the first part, of the second, and so on; the ranks may differ.
    parts: for each, its rows of the batch, (k) integers or None for all, and its scale: a number, or one for each of
    these rows, (k, 1, ..., 1). The frozen product is computed once for all rows, each low-rank one for its own rows.
    Saves x for all a and, per part, x aᵀ, r values per token, for b.
    """
    shape, dtype = x.shape, x.dtype
    y = product(rows(x), w).reshape(*shape[:-1], len(w))  # (B, T, m)

    def through(z: Array, matrix: Array, scale: float | Array = 1.0) -> Array:  # scale z matrix, for (k, ..., n)
        out = (rows(z) @ matrix).reshape(*z.shape[:-1], matrix.shape[1])  # k may be 0
        out *= scale if isinstance(scale, float) else scale.astype(dtype)
        return out

    every = [
        (a, b, slice(None) if at is None else at, scale)
        for a, b, (at, scale) in zip(thin[::2], thin[1::2], parts, strict=True)
    ]
    lows = [through(x[at], a.T, scale) for a, _, at, scale in every]  # x aᵀ, each (k, T, r)
    for (_, b, at, _), low in zip(every, lows, strict=True):
        y[at] += through(low, b.T)

    def dx(g):
        out = product_back(rows(g), w).reshape(shape)
        for a, b, at, scale in every:
            out[at] += through(through(g[at], b, scale), a)
        return out

    def dw(g):
        return rows(g).T @ rows(x)

    def da_of(b, at, scale):
        return lambda g: rows(through(g[at], b, scale)).T @ rows(x[at])  # (r, n)

    def db_of(at, low):
        return lambda g: rows(g[at]).T @ rows(low)  # (m, r)

    pairs = zip(every, lows, strict=True)
    return y, dx, dw, *(vjp for (_, b, at, scale), low in pairs for vjp in (da_of(b, at, scale), db_of(at, low)))


@op
def embedding(w, ids):
    """w[ids]      w (V, C)  ids (B, T) integers  ->  (B, T, C)

    Saves the ids. A token that occurs several times accumulates all its gradients. Raises ValueError for an id outside
    of 0..V - 1.
    """
    xp, shape, dtype = array_module(w), w.shape, w.dtype
    ids = xp.asarray(ids)
    if xp is np and ids.size and (ids.min() < 0 or ids.max() >= len(w)):  # NumPy would count the former from the end
        raise ValueError(f"ids must lie in 0..{len(w) - 1}, got {ids.min()}..{ids.max()}")

    def dw(g):
        out = xp.zeros(shape, dtype)
        xp.add.at(out, ids.reshape(-1), rows(g))
        return out

    return w[ids], dw


# -- normalisation, positions, activation ------------------------------------------------------------------------------


def inverse_rms(x: Array, eps: float) -> Array:
    """1 / sqrt(mean(x²) + eps) over the last axis      x (..., C)  ->  (..., 1)"""
    xp = array_module(x)
    inv = xp.einsum("...c,...c->...", x, x)[..., None]  # Σ x² without an array of squares
    inv /= x.shape[-1]
    inv += eps
    xp.sqrt(inv, out=inv)
    xp.divide(1, inv, out=inv)
    return inv


@op(recomputable=True)
def rms_norm(x, w, eps: float, offset: float = 0.0):
    """y = x / rms(x) * (w + offset),  rms(x) = sqrt(mean(x²) + eps) over the last axis      x (..., C)  w (C)

    Zhang & Sennrich 2019 (arXiv 1910.07467). offset: 1 in Gemma, whose w starts at 0. Saves x and one value per row.
    """
    xp, inv = array_module(x), inverse_rms(x, eps)  # inv (..., 1)
    y = x * inv
    y *= w + offset if offset else w

    def dx(g):  # x · inv depends on x in two ways: directly, and through inv
        out = g * (w + offset if offset else w)
        along = xp.einsum("...c,...c->...", out, x)[..., None]  # the gradient's component along x
        along *= inv * inv / x.shape[-1]
        out -= x * along
        out *= inv
        return out

    def dw(g):
        return (rows(g) * (rows(x) * rows(inv))).sum(axis=0)

    return y, dx, dw


@op(recomputable=True)
def layer_norm(x, w, bias, eps: float):
    """y = (x - mean(x)) / std(x) * w + bias,  std(x) = sqrt(var(x) + eps) over the last axis      x (..., C)  w (C)

    Ba, Kiros & Hinton 2016 (arXiv 1607.06450). Saves x and two values per row.
    """
    xp = array_module(x)
    mean = x.mean(axis=-1, keepdims=True)  # (..., 1)

    def centred() -> Array:  # computed again in the backward pass instead of saved
        return x - mean

    y = centred()
    inv = inverse_rms(y, eps)  # (..., 1)
    y *= inv
    y *= w
    y += bias

    def dx(g):  # what a shift of x, or a stretch of x - mean, would change, is removed: y does not depend on either
        out, z = g * w, centred()
        along = xp.einsum("...c,...c->...", out, z)[..., None]
        along *= inv * inv / x.shape[-1]
        out -= out.mean(axis=-1, keepdims=True)
        z *= along
        out -= z
        out *= inv
        return out

    def dw(g):
        return (rows(g) * (rows(centred()) * rows(inv))).sum(axis=0)

    return y, dx, dw, lambda g: rows(g).sum(axis=0)


@op
def rope(x, cos: Array, sin: Array):
    """Rotate the pairs (x[i], x[i + D/2]) by their position's angle      x (B, T, H, D)  cos, sin (·, T, 1, D/2)

    Su et al. 2021 (arXiv 2104.09864), in the halves layout that Hugging Face uses. Saves only cos and sin: the VJP of
    a rotation is the inverse rotation.
    """

    def rotate(x: Array, sin: Array) -> Array:
        xp, halves = array_module(x), x.reshape(*x.shape[:-1], 2, -1)  # (B, T, H, 2, D/2)
        y = xp.multiply(halves, cos[..., None, :], out=xp.empty_like(halves))
        y += halves[..., ::-1, :] * xp.stack((-sin, sin), axis=-2)
        return y.reshape(x.shape)

    return rotate(x, sin), lambda g: rotate(g, -sin)


def silu(z: Array) -> tuple[Array, Callable[[], Array]]:
    """z σ(z), where σ(z) = 1 / (1 + e⁻ᶻ), and a function that returns its derivative."""
    s = z * 0.5
    array_module(z).tanh(s, out=s)
    s *= 0.5
    s += 0.5
    y = z * s
    return y, lambda: s + y * (1 - s)


def gelu_tanh(z: Array) -> tuple[Array, Callable[[], Array]]:
    """z Φ(z), Φ the normal distribution function in the approximation by tanh, and a function for its derivative.

    Hendrycks & Gimpel 2016 (arXiv 1606.08415). Hugging Face calls it gelu_new and gelu_pytorch_tanh.
    """
    c, cubic = (2 / math.pi) ** 0.5, 0.044715
    square = z * z
    phi = square * (c * cubic)
    phi += c
    phi *= z
    array_module(z).tanh(phi, out=phi)  # tanh(c (z + 0.044715 z³))
    phi += 1
    phi *= 0.5  # Φ(z)

    def slope() -> Array:  # Φ + z dΦ/dz, with dΦ/dz = 2 Φ (1 - Φ) c (1 + 3 · 0.044715 z²)
        return phi + phi * (1 - phi) * z * (square * (6 * c * cubic) + 2 * c)

    return z * phi, slope


Activation = Callable[[Array], tuple[Array, Callable[[], Array]]]


@op(recomputable=True)
def gelu(x, block: int = 64):
    """x Φ(x), see `gelu_tanh`      x (..., F)  ->  (..., F)

    Saves its input. block: as for `swiglu`.
    """
    shape, x = x.shape, rows(x)  # (N, F)
    y = array_module(x).empty_like(x)
    for i, j in blocks(len(x), block):
        y[i:j] = gelu_tanh(x[i:j])[0]

    def dx(g):
        out = array_module(x).array(rows(g))
        for i, j in blocks(len(x), block):
            out[i:j] *= gelu_tanh(x[i:j])[1]()
        return out.reshape(shape)

    return y.reshape(shape), dx


@op(recomputable=True)
def swiglu(gate, up, block: int = 64):
    """silu(gate) * up,  silu(z) = z / (1 + e⁻ᶻ)      gate, up (..., F)  ->  (..., F)

    Shazeer 2020 (arXiv 2002.05202). Saves its two inputs and computes the sigmoid again in the backward pass.
    block: rows computed at a time, so that temporary arrays stay in the processor's cache.
    """
    return _gated(silu, gate, up, block)


@op(recomputable=True)
def geglu(gate, up, block: int = 64):
    """gelu(gate) * up, with `gelu_tanh`      gate, up (..., F)  ->  (..., F)

    Shazeer 2020 (arXiv 2002.05202). Saves its two inputs. block: as for `swiglu`.
    """
    return _gated(gelu_tanh, gate, up, block)


def _gated(activation: Activation, gate: Array, up: Array, block: int) -> tuple:
    """The value of activation(gate) * up and its two VJPs."""
    xp, shape, gate, up = array_module(gate), gate.shape, rows(gate), rows(up)  # (N, F)

    def backward(g):
        g = rows(g)
        dgate, dup = xp.empty_like(gate), xp.empty_like(up)
        for i, j in blocks(len(gate), block):
            value, slope = activation(gate[i:j])
            xp.multiply(g[i:j], value, out=dup[i:j])
            s = slope()
            s *= g[i:j]
            xp.multiply(s, up[i:j], out=dgate[i:j])
        return dgate.reshape(shape), dup.reshape(shape)

    y = xp.empty_like(gate)
    for i, j in blocks(len(gate), block):
        xp.multiply(activation(gate[i:j])[0], up[i:j], out=y[i:j])
    return y.reshape(shape), *shared_backward(backward, 2)


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
    """The mean of -log softmax(logits)[label] over the scored tokens.

    logits (..., V), labels (...) integers, -100 for a token that is not scored  ->  a scalar. Raises ValueError if no
    token is scored, for another label outside of 0..V - 1, and for another number of labels than of tokens. Saves
    (N, V) probabilities: for a large V use `linear_cross_entropy`.
    scored: the indices of the scored labels, if they are known already; finding them makes the host wait for a GPU.
    """
    xp, shape = array_module(logits), logits.shape
    labels = labels.reshape(-1)
    scored = _scored(labels, scored, logits.shape)
    delta, losses = _softmax_loss(rows(logits).take(scored, axis=0), labels.take(scored))

    def dlogits(g):
        own = delta * (g / len(losses))
        if len(own) == len(labels):  # every token is scored
            return own.reshape(shape)
        out = xp.zeros((len(labels), shape[-1]), delta.dtype)
        out[scored] = own
        return out.reshape(shape)

    return losses.sum() / len(losses), dlogits


@op
def preference_loss(*log_p, reference: Array, beta: Array):
    """The mean of -log σ(margin) over N pairs of answers      log_p: 2 N scalars  reference (N)  beta (N)  ->  scalar

    margin = beta (log π(chosen) - log π(rejected) - reference): direct preference optimisation, Rafailov et al. 2023
    (arXiv 2305.18290), equation 7.
    log_p: the log-probability of each whole answer, summed over its tokens: chosen, rejected, chosen, ...
    reference: log π(chosen) - log π(rejected) of the model before training.
    Saves σ(-margin), one number per pair.
    """
    xp = array_module(log_p[0])
    each = xp.stack(log_p)  # (2 N)
    beta = xp.asarray(beta, each.dtype)
    margin = beta * (each[::2] - each[1::2] - xp.asarray(reference, each.dtype))  # (N)
    wrong = xp.exp(-xp.logaddexp(0, margin))  # σ(-margin): the probability of the other order
    slope = beta * wrong / len(margin)  # of the loss, towards the rejected answer

    def vjp(i: int, sign: float):
        return lambda g: g * sign * slope[i]

    vjps = [vjp(i, sign) for i in range(len(margin)) for sign in (-1.0, 1.0)]
    return xp.logaddexp(0, -margin).mean(), *vjps


@op
def linear_cross_entropy(
    x, w, labels: Array, scored: Array | None = None, block: int = TOKEN_BLOCK, vocab_block: int = VOCAB_BLOCK
):
    """cross_entropy(x wᵀ, labels) without ever holding the logits      x (..., C)  w (V, C)  labels (...)  ->  scalar

    Computes `block` scored tokens and `vocab_block` rows of w at a time. dx is computed in the same pass, so that every
    logit is computed once. Saves dx (N, C), and for a trainable w also x and log Σ exp(logits) of every token, for dw.
    w may be packed. scored: as in `cross_entropy`.
    """
    xp, shape, (V, C) = array_module(x), x.shape, w.shape
    labels = labels.reshape(-1)
    scored = _scored(labels, scored, (*shape[:-1], V))
    h, targets = rows(x)[scored], labels[scored]  # (N, C), (N)
    N = len(targets)
    lse, logit = xp.empty(N, x.dtype), xp.empty(N, x.dtype)  # log Σ exp(logits), logit of the target
    dh = xp.zeros_like(h)  # (N, C)
    for i, j in blocks(N, block):
        mean = dh[i:j] if is_recording() else None
        lse[i:j], logit[i:j] = running_softmax(h[i:j], w, targets[i:j], mean, vocab_block)
    dh -= w[targets]
    loss = (lse - logit).sum()

    def dx(g):
        out = xp.zeros((len(labels), C), dh.dtype)
        out[scored] = dh * (g / N)
        return out.reshape(shape)

    def dw(g):
        out, scaled = xp.empty_like(w), h * (g / N)
        for a, b in blocks(V, vocab_block):
            p = h @ factor(w, a, b).T  # (N, v): logits, and then probabilities
            p -= lse[:, None]
            xp.exp(p, out=p)
            out[a:b] = p.T @ scaled
        xp.subtract.at(out, targets, scaled)
        return out

    return loss / N, dx, dw


def running_softmax(h: Array, w: Array, targets: Array, mean: Array | None, vocab_block: int) -> tuple[Array, Array]:
    """log Σ exp(logits) (n) and the targets' logits (n) of logits = h wᵀ, never held whole      h (n, C)  w (V, C)

    h, w: the factors. targets: (n) integers.
    mean: None, or zeros (n, C), to which softmax(logits) w is added.
    vocab_block: rows of w computed at a time, with a running maximum and sum (Milakov & Gimelshein 2018, arXiv
        1805.02867).
    """
    xp, n, dtype = array_module(h), len(h), h.dtype
    top, total, logit = xp.full((n, 1), -xp.inf, dtype), xp.zeros((n, 1), dtype), xp.zeros(n, dtype)
    for a, b in blocks(len(w), vocab_block):
        m = factor(w, a, b)  # (v, C)
        e = h @ m.T  # (n, v): logits, and then exp(logits - top)
        here = (targets >= a) & (targets < b)
        logit += xp.where(here, e[xp.arange(n), xp.where(here, targets - a, 0)], 0)
        higher = xp.maximum(top, e.max(axis=-1, keepdims=True))
        e -= higher
        xp.exp(e, out=e)
        shrink = xp.exp(top - higher)  # the sums so far are relative to the lower maximum
        total *= shrink
        total += e.sum(axis=-1, keepdims=True)
        if mean is not None:
            mean *= shrink
            mean += e @ m
        top = higher
    if mean is not None:
        mean /= total  # C values per token instead of V
    return (top + xp.log(total))[:, 0], logit


def _scored(labels: Array, known: Array | None, shape: tuple[int, ...]) -> Array:
    """The indices of the scored ones of all labels, (N), of logits of this shape. known: these indices, unchecked."""
    if len(labels) != math.prod(shape[:-1]):
        raise ValueError(f"expected a label for each of {math.prod(shape[:-1])} tokens, got {len(labels)}")
    scored = (labels != NOT_SCORED).nonzero()[0] if known is None else known
    if len(scored) == 0:
        raise ValueError("no token is scored: every label is -100 (in a sequence, every label but the first)")
    if known is None and array_module(labels) is np:  # a GPU would make the host wait once more
        least, most, last = int(labels[scored].min()), int(labels[scored].max()), shape[-1] - 1
        if least < 0 or most > last:  # NumPy would count the former from the end
            raise ValueError(f"labels must lie in 0..{last}, or be -100 where nothing is scored, got {least}..{most}")
    return scored

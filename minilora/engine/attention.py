"""Attention, in windows of queries: over plain and padded batches, a KV cache, and sequences packed into one row.

Shapes: B batch, T tokens (queries), S keys (cached ones included), H query heads, K key/value heads, G = H / K queries
per key head, D head width, P tokens that all rows begin with; t and s are the queries and keys of one window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .backend import Array, array_module
from .fused import blocks
from .tensor import Tensor, op, shared_backward


@dataclass(frozen=True)
class Packing:
    """Several sequences in one row, without padding: their common prefix once, then the rest of each sequence.

    prefix: the number of tokens that all sequences begin with. ends: where the rest of each sequence ends in the row;
    the first rest begins at `prefix`. Every token sees the prefix and the earlier tokens of the same sequence, so it
    has exactly the value it would have in a separate row, but the prefix is computed once instead of once per sequence.
    Raises ValueError for ends that do not rise from the prefix on, such as lengths.
    """

    prefix: int
    ends: tuple[int, ...]

    def __post_init__(self):
        places = [0, self.prefix, *self.ends]
        if not len(self.ends) or places != sorted(places):
            raise ValueError(f"prefix and ends must rise from 0, such as 0 and (3, 5) for 3 and 2 tokens, got {self}")

    def spans(self) -> list[tuple[int, int]]:
        """(start, end) in the row of the prefix, if there is one, and of the rest of each sequence."""
        own = self.own_spans()
        return [(0, self.prefix), *own] if self.prefix else own

    def own_spans(self) -> list[tuple[int, int]]:
        """(start, end) in the row of the rest of each sequence."""
        return list(zip((self.prefix, *self.ends[:-1]), self.ends, strict=True))

    def ranges(self) -> list[range]:
        """For each of the spans, its tokens' positions in their own sequence."""
        starts = [(min(start, self.prefix), end - start) for start, end in self.spans()]
        return [range(first, first + length) for first, length in starts]

    def positions(self) -> list[int]:
        """Each token's position in its own sequence."""
        return [n for positions in self.ranges() for n in positions]


def textbook_attention(q: Tensor, k: Tensor, v: Tensor, mask: Array | None = None) -> Tensor:
    """softmax(q kᵀ / √D + mask) v for every head, as in a textbook: for readers, and for tests to compare with.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1. Equals `attention`, which never holds the (T, S) weights.

    q: (B, T, H, D)
    k, v: (B, S, K, D)  ->  (B, T, H, D)
    mask: (T, S) or (B, 1, T, S), -inf where a query must not see a key, 0 elsewhere; None for a causal mask.
    """
    T, S, D = q.shape[1], k.shape[1], q.shape[3]
    group = np.arange(q.shape[2]) // (q.shape[2] // k.shape[2])  # query head h reads key/value head group[h]
    q, k, v = (x.transpose((0, 2, 1, 3)) for x in (q, k[:, :, group], v[:, :, group]))  # (B, H, T or S, D)
    scores = q @ k.transpose((0, 1, 3, 2)) * (1 / math.sqrt(D))  # (B, H, T, S)
    mask = np.triu(np.full((T, S), -np.inf), k=S - T + 1) if mask is None else mask
    weights = (scores + mask.astype(q.dtype)).softmax()  # (B, H, T, S): each row sums to 1
    return (weights @ v).transpose((0, 2, 1, 3))  # (B, T, H, D)


class Window(NamedTuple):
    """Queries start..stop of a row, and the keys that any of them sees: those at the positions low..high.

    position: of the first query in its sequence. origin: a key that is not of the prefix is at the index
    origin + position.
    """

    start: int
    stop: int
    position: int
    low: int
    high: int
    origin: int


@lru_cache(maxsize=256)
def later_keys(xp: Any, t: int, dtype: Any) -> Array:
    """The causal mask of t tokens, (t, t): -inf where a key comes later than the query, 0 elsewhere."""
    return xp.where(xp.arange(t) > xp.arange(t)[:, None], -xp.inf, 0).astype(dtype)


@op
def attention(
    q,
    k,
    v,
    first: Array | None = None,
    block: int = 64,
    packing: Packing | None = None,
    window: int | None = None,
    scale: float | None = None,
    beginning: tuple[Array, Array] | None = None,
):
    """softmax(scale q kᵀ) v for every head, with a causal mask: each token sees itself and the tokens before it.

    Saves q, k, v and log Σ exp(scores) of every query; the weights are computed again in the backward pass, a block at
    a time.

    q: (B, T, H, D). Query t is at position S - T + t: with a KV cache there are more keys than queries.
    k, v: (B, S, K, D)  ->  (B, T, H, D). Head h reads key/value head h // G (grouped-query attention, Ainslie et al.
        2023, arXiv 2305.13245).
    first: (B) integers, the first key that is not padding, for prompts padded on the left.
    block: queries computed at a time, so that the whole (T, S) scores never exist.
    packing: the sequences that share the row without seeing each other.
    window: how many tokens each token sees, itself included; None for all. Keys outside of it are not even computed
        with (sliding window attention, Beltagy et al. 2020, arXiv 2004.05150; Mistral 7B, arXiv 2310.06825).
    scale: of the scores; None for 1 / √D.
    beginning: keys and values (1, P, K, D) of P tokens with which every row begins, before `first` and k, held once:
        all rows' queries meet them in one product (Juravsky et al. 2024, arXiv 2402.05099). Without gradients.
    """
    xp = array_module(q)
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    G, scale = H // K, 1 / math.sqrt(D) if scale is None else scale
    keys = k.transpose(0, 2, 1, 3)  # (B, K, S, D)
    values = v.transpose(0, 2, 1, 3)  # (B, K, S, D)
    k0, v0 = (x[0].transpose(1, 0, 2) for x in beginning or (k[:1, :0], v[:1, :0]))  # (K, P, D)
    P = k0.shape[1]
    prefix = packing.prefix if packing else 0
    spans = [(0, range(S - T, S), 0)]  # of each: its start in the row, its tokens' positions, and their origin
    if packing:
        found = zip(packing.spans(), packing.ranges(), strict=True)
        spans = [(start, at, start - at.start) for (start, _), at in found]

    def window_of(start: int, at: range, origin: int, i: int, j: int) -> Window:  # queries i..j of a span
        low = 0 if window is None else max(0, at.start + i - window + 1)
        return Window(start + i, start + j, at.start + i, low, at.start + j, origin)

    windows = [window_of(*span, i, j) for span in spans for i, j in blocks(len(span[1]), block)]

    def grouped(x: Array, at: Window) -> Array:  # the window's queries of (B, T, H, D) -> (B, K, G t, D)
        t = at.stop - at.start
        x = x[:, at.start : at.stop].reshape(B, t, K, G, D).transpose(0, 2, 3, 1, 4)  # (B, K, G, t, D)
        return x.reshape(B, K, G * t, D)

    def ungrouped(x: Array, at: Window) -> Array:  # the inverse: (B, K, G t, D) -> (B, t, H, D)
        t = at.stop - at.start
        return x.reshape(B, K, G, t, D).transpose(0, 3, 1, 2, 4).reshape(B, t, H, D)

    def seen(x: Array, at: Window) -> Array:  # (B, K, S, D) -> (B, K, s, D)
        if at.origin == 0:
            return x[:, :, at.low : at.high]
        own = x[:, :, at.origin + max(at.low, prefix) : at.origin + at.high]
        return xp.concatenate((x[:, :, at.low : prefix], own), axis=2) if at.low < prefix else own

    def add_seen(total: Array, part: Array, at: Window) -> None:  # the VJP of seen: adds part at its place in total
        if at.origin == 0:
            total[:, :, at.low : at.high] += part
        else:
            common = max(prefix - at.low, 0)  # of the keys, those of the prefix
            total[:, :, at.low : at.low + common] += part[:, :, :common]
            total[:, :, at.origin + max(at.low, prefix) : at.origin + at.high] += part[:, :, common:]

    def first_hidden(at: Window) -> int:  # every query sees the keys before this position
        return at.position if first is None and window is None else at.low

    def hidden(at: Window) -> Array:  # -inf where a query must not see a key, from the first such key on
        if first is None and window is None:
            return later_keys(xp, at.stop - at.start, q.dtype)
        query = xp.arange(at.position, at.high)[:, None]
        key = xp.arange(first_hidden(at), at.high)
        masked = key > query  # the future, (t, s)
        if window is not None:
            masked |= key <= query - window
        if first is None:
            return xp.where(masked, -xp.inf, 0)
        padding = (key < first[:, None, None]) & (key != query)  # padding sees itself, so that no row is all -inf
        return xp.where(masked | padding, -xp.inf, 0)[:, None, None]

    def scores(queries: Array, own_keys: Array, at: Window) -> Array:  # (B, K, G t, s)
        t = at.stop - at.start
        x = queries @ own_keys.swapaxes(-1, -2)
        if first is not None or t > 1:
            x = x.reshape(B, K, G, t, -1)
            x[..., first_hidden(at) - at.low :] += hidden(at).astype(x.dtype, copy=False)
            x = x.reshape(B, K, G * t, -1)
        return x

    def before(queries: Array, at: Window) -> Array:  # the scores of the keys that all rows begin with, (B, K, G t, P)
        x = of_all_rows(queries, k0.swapaxes(-1, -2))
        if window is not None:
            query = P + xp.arange(at.position, at.position + at.stop - at.start)[:, None]
            query = query if first is None else query - first[:, None, None]
            masked = xp.arange(P) <= query - window  # (t, P) or (B, t, P)
            x = x.reshape(B, K, G, -1, P) + xp.where(masked, -xp.inf, 0).reshape(-1, 1, 1, *masked.shape[-2:])
        return x.reshape(B, K, -1, P).astype(queries.dtype, copy=False)

    def of_all_rows(x: Array, y: Array) -> Array:  # x (B, K, n, m) @ y (K, m, p) -> (B, K, n, p), one product per K
        rows = x.transpose(1, 0, 2, 3).reshape(K, -1, x.shape[3])  # (K, B n, m)
        return (rows @ y).reshape(K, B, -1, y.shape[2]).transpose(1, 0, 2, 3)

    def backward(g):
        if beginning is not None:
            raise ValueError("attention over a KV cache has no gradient: leave the cache out, or use no_grad")
        dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)
        dkeys, dvalues = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)  # (B, K, S, D)
        for at, less in zip(windows, lse, strict=True):
            queries, own_g, own_keys = grouped(q, at) * scale, grouped(g, at), seen(keys, at)
            p = scores(queries, own_keys, at)
            p -= less
            xp.exp(p, out=p)  # the weights (B, K, G t, s)
            add_seen(dvalues, p.swapaxes(-1, -2) @ own_g, at)
            ds = own_g @ seen(values, at).swapaxes(-1, -2)  # dL/dp, and then dL/d(scores) in place
            ds -= xp.einsum("bkts,bkts->bkt", ds, p)[..., None]
            ds *= p
            dqueries = ds @ own_keys
            dqueries *= scale
            dq[:, at.start : at.stop] = ungrouped(dqueries, at)
            add_seen(dkeys, ds.swapaxes(-1, -2) @ queries, at)
        return dq, dk, dv

    y, lse = xp.empty_like(q), []
    for at in windows:
        queries = grouped(q, at) * scale
        e = scores(queries, seen(keys, at), at)
        if P:
            e = xp.concatenate((before(queries, at), e), axis=-1)  # (B, K, G t, P + s)
        top = e.max(axis=-1, keepdims=True)
        e -= top
        xp.exp(e, out=e)
        total = e.sum(axis=-1, keepdims=True)  # (B, K, G t, 1)
        mean = e[..., P:] @ seen(values, at)
        if P:
            mean += of_all_rows(e[..., :P], v0)
        mean /= total  # D values per query instead of s
        y[:, at.start : at.stop] = ungrouped(mean, at)
        lse.append(top + xp.log(total))
    return y, *shared_backward(backward, 3)

"""x wᵀ for a few rows of x, as in generation: w is read once from memory, and multiplied with four rows at a time.

BLAS is made for large matrices. For 2 to 16 rows of x it reaches half of the memory's speed at best, since it first
copies one of the factors into another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from llvmlite import ir

from .compiled import BYTE, EIGHT, FLOAT, FLOATS, HALF, INT, INTS, LONG, Code, Value, compiled

TOGETHER, OF_W = 4, 3  # rows of x and of w that are multiplied with each other in registers
TILE = 8 * OF_W  # rows of w that stay in the cache while all of x is multiplied with them
KINDS = {"F32": FLOAT, "F16": HALF, "BF16": ir.IntType(16)}  # how a weight is stored


def product(x: np.ndarray, w: np.ndarray, kind: str = "F32") -> np.ndarray | None:
    """x wᵀ      x (N, n) float32, w (m, n) of a type of 4 bytes or 2  ->  (N, m) float32

    kind: how w is stored, one of KINDS. None for shapes that are not computed here.
    """
    (N, n), m = x.shape, len(w)
    if not N or n % EIGHT or not w.flags.c_contiguous:
        return None
    groups = -(-N // TOGETHER)
    together = -(-N // groups)
    padded = np.zeros((groups * together, n), np.float32)
    padded[:N] = x
    out = np.empty((len(padded), m), np.float32)
    tiles, rest = divmod(m, TILE)
    multiply = _multiply(kind, together, OF_W)
    multiply(w.ctypes.data, padded.ctypes.data, out.ctypes.data, m, n, groups, tiles, TILE // OF_W)
    if rest:  # one row of w at a time
        start = m - rest
        multiply = _multiply(kind, together, 1)
        multiply(w[start:].ctypes.data, padded.ctypes.data, out[:, start:].ctypes.data, m, n, groups, 1, rest)
    return out[:N]


@cache
def _multiply(kind: str, together: int, of_w: int) -> Callable[..., None]:
    """multiply(w, x, out, m, n, groups of `together` rows of x, tiles, groups of `of_w` rows of w in each)"""

    def write(code: Code, arguments: Sequence[Value]) -> None:
        w, x, out, m, n, groups, tiles, rows = arguments
        w = code.inttoptr(w, KINDS[kind].as_pointer())
        x, out = (code.inttoptr(each, FLOAT.as_pointer()) for each in (x, out))
        tile = code.mul(rows, LONG(of_w))
        with code.loop(tiles) as t, code.loop(groups) as g, code.loop(rows) as q:
            first = code.add(code.mul(t, tile), code.mul(q, LONG(of_w)))  # row of w
            from_x = [code.add(code.mul(g, LONG(together)), LONG(i)) for i in range(together)]
            ws = [code.at(w, code.mul(code.add(first, LONG(j)), n)) for j in range(of_w)]
            xs = [code.at(x, code.mul(i, n)) for i in from_x]
            totals = [[code.total() for _ in xs] for _ in ws]
            with code.loop(code.udiv(n, LONG(EIGHT))) as k:
                start = code.mul(k, LONG(EIGHT))
                for pointer in ws:
                    _fetch(code, code.at(pointer, code.add(start, code.mul(n, tile))))  # of the next tile
                weights = [_weights(code, code.at(pointer, start), kind) for pointer in ws]
                for i, pointer in enumerate(xs):
                    values = code.read(code.at(pointer, start), FLOATS)
                    for weight, total in zip(weights, totals, strict=True):
                        code.add_to(total[i], code.times(weight, values))
            for j, total in enumerate(totals):
                for i, each in zip(from_x, total, strict=True):
                    place = code.at(out, code.add(code.mul(i, m), code.add(first, LONG(j))))
                    code.write(code.sum(each), place)

    return compiled(8, write)


def _weights(code: Code, pointer: Value, kind: str) -> Value:
    """Eight weights as float32."""
    stored = code.read(pointer, ir.VectorType(KINDS[kind], EIGHT))
    if kind == "BF16":  # the upper half of a float32
        return code.bitcast(code.shl(code.zext(stored, INTS), ir.Constant(INTS, [16] * EIGHT)), FLOATS)
    return code.fpext(stored, FLOATS) if kind == "F16" else stored


def _fetch(code: Code, pointer: Value) -> None:
    """Let the processor load what is at an address, which may be none of ours, into its cache."""
    place = code.bitcast(pointer, BYTE.as_pointer())
    code.intrinsic("llvm.prefetch.p0", ir.VoidType(), [place, INT(0), INT(2), INT(1)])  # to read, often, data

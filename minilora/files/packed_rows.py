"""x wᵀ for a few rows of x and a w in one of the block formats: codes are multiplied as they are read.

A word of 32 bits holds four or eight codes. A mask leaves one code in each of eight words: the code itself times a
power of two, for which the values of x are divided once, at the beginning. So a code costs one AND, one conversion to
float and one multiply-add. Within a group of values with one scale, x wᵀ = scale (x codesᵀ) + offset Σ x. blocks.py has
the formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
from llvmlite import ir

from ..engine.compiled import BYTE, EIGHT, FLOAT, FLOATS, HALF, INT, INTS, LONG, Code, Value, compiled, floats, ints
from .blocks import LAYOUTS
from .levels import LEVELS

TOGETHER = 4  # rows of x for which a code is converted once
Group = tuple[Value, Value | None, list[Value]]  # scale, offset, codes times powers of two, eight in a vector


def product(x: np.ndarray, raw: np.ndarray, kind: str) -> np.ndarray:
    """x wᵀ      x (N, n) float32, raw: the packed w, (m, bytes per row) uint8  ->  (N, m) float32"""
    (N, n), m, layout = x.shape, len(raw), LAYOUTS[kind]
    raw, x = np.ascontiguousarray(raw), np.ascontiguousarray(x)
    size = len(_ORDER[kind][0])
    groups = n // size
    ordered = np.empty((min(N, TOGETHER), groups, size + EIGHT), np.float32)  # and the sums of each group
    out = np.empty((N, m), np.float32)
    for i in range(0, N, TOGETHER):
        rows, y = x[i : i + TOGETHER], out[i : i + TOGETHER]
        multiply = _multiply(kind, len(rows))
        places = (each.ctypes.data for each in (raw, rows, ordered, y))
        multiply(*places, m, n // layout.values, groups)
    return out


# -- the groups of a block at an address -------------------------------------------------------------------------------


def _q4_0(code: Code, block: Value) -> Iterator[Group]:
    d = _half(code, block, 0)
    yield d, code.times(d, floats(-8.0)), _sixteen_bytes(code, code.at(block, 2))


def _q4_1(code: Code, block: Value) -> Iterator[Group]:
    yield _half(code, block, 0), _half(code, block, 2), _sixteen_bytes(code, code.at(block, 4))


def _q5_0(code: Code, block: Value) -> Iterator[Group]:
    d, bits = _half(code, block, 0), code.read(code.at(block, 2), INT)
    fifths = code.lanes(code.insert_element(ir.Constant(INTS, ir.Undefined), bits, INT(0)), *[0] * EIGHT)
    yield d, code.times(d, floats(-16.0)), _sixteen_bytes(code, code.at(block, 6), fifths)


def _q8_0(code: Code, block: Value) -> Iterator[Group]:
    words = code.read(code.at(block, 2), INTS)
    highest = [code.shl(words, ints(24 - 8 * j)) for j in range(4)]  # a signed byte where the sign of an integer is
    yield _half(code, block, 0), None, [_masked(code, v, 0xFF << 24) for v in highest]


def _q4_k(code: Code, block: Value) -> Iterator[Group]:
    four = ir.VectorType(INT, 4)
    first, more, rest = (code.zext(code.read(code.at(block, i), ir.VectorType(BYTE, 4)), four) for i in (4, 8, 12))

    def each(v: int) -> Value:
        return ir.Constant(four, [v] * 4)

    def steps(own: Value, low: Value) -> Value:
        """Of four groups the six bits of `own`, of four the low bits given and the two highest of `own`."""
        joined = code.or_(low, code.and_(code.lshr(own, each(2)), each(48)))
        both = ir.Constant(INTS, list(range(EIGHT)))
        return code.sitofp(code.shuffle_vector(code.and_(own, each(63)), joined, both), FLOATS)

    scales = code.times(steps(first, code.and_(rest, each(15))), _half(code, block, 0))
    offsets = code.times(steps(more, code.lshr(rest, each(4))), code.fneg(_half(code, block, 2)))
    for g in range(8):
        words = code.read(code.at(block, 16 + g // 2 * 32), INTS)
        own = code.lshr(words, ints(4)) if g % 2 else words
        codes = [_masked(code, own, 0xF << 8 * j) for j in range(4)]
        yield code.lanes(scales, *[g] * EIGHT), code.lanes(offsets, *[g] * EIGHT), codes


def _q6_k(code: Code, block: Value) -> Iterator[Group]:
    signed, d = code.read(code.at(block, 192), ir.VectorType(BYTE, 16)), _half(code, block, 208)
    for g in range(8):  # 32 values, with two scales
        part, row = divmod(g, 4)
        low = code.read(code.at(block, 64 * part + 32 * (row % 2)), INTS)
        low = code.lshr(low, ints(4)) if row > 1 else low
        high = code.read(code.at(block, 128 + 32 * part), INTS)
        high = code.lshr(high, ints(2)) if row == 3 else code.shl(high, ints([4, 2, 0][row]))
        words = code.or_(code.and_(low, ints(0x0F0F0F0F)), code.and_(high, ints(0x30303030)))
        pair = code.sext(code.lanes(signed, *[2 * g] * 4, *[2 * g + 1] * 4), INTS)
        scale = code.times(code.sitofp(pair, FLOATS), d)
        yield scale, code.times(scale, floats(-32.0)), [_masked(code, words, 0xFF << 8 * j) for j in range(4)]


def _levels(kind: str) -> Callable[[Code, Value], Iterator[Group]]:
    low, high = (floats(*LEVELS[kind][i : i + EIGHT].tolist()) for i in (0, EIGHT))

    def groups(code: Code, block: Value) -> Iterator[Group]:
        words, found = code.read(code.at(block, 4), INTS), []
        for k in range(8):  # each code chooses by its lowest three bits of both halves, by its highest between these
            index = code.lshr(words, ints(4 * k))
            is_high = code.icmp_signed("<", code.shl(words, ints(28 - 4 * k)), ints(0))
            low_one, high_one = (code.intrinsic("llvm.x86.avx2.permps", FLOATS, [half, index]) for half in (low, high))
            found.append(code.select(is_high, high_one, low_one))
        yield code.everywhere(code.read(block, FLOAT)), None, found

    return groups


def _half(code: Code, block: Value, i: int) -> Value:
    """The float16 at byte i, in every lane."""
    return code.everywhere(code.fpext(code.read(code.at(block, i), HALF), FLOAT))


def _masked(code: Code, words: Value, *masks: int) -> Value:
    return code.sitofp(code.and_(words, ints(*masks)), FLOATS)


def _sixteen_bytes(code: Code, place: Value, fifths: Value | None = None) -> list[Value]:
    """Lanes 0 to 3: the low halves of four bytes, times 2^8j or 2^20. Lanes 4 to 7: the high ones, times 16 of that.

    fifths: 32 bits, the fifth of each code.
    """
    words = code.lanes(code.read(place, ir.VectorType(INT, 4)), 0, 1, 2, 3, 0, 1, 2, 3)
    shifted = [(words, 0), (words, 8), (words, 16), (code.lshr(words, ints(4)), 20)]  # the sign stays free
    found = []
    for j, (v, bits) in enumerate(shifted):
        v = code.and_(v, ints(*[0xF << bits] * 4, *[0xF0 << bits] * 4))
        if fifths is not None:
            bit = code.and_(code.lshr(fifths, ints(*_HALVES[0][j == _J].tolist())), ints(1))
            v = code.or_(v, code.shl(bit, ints(*[bits + 4] * 4, *[bits + 8] * 4)))
        found.append(code.sitofp(v, FLOATS))
    return found


# Of each kind the groups, and for each value in the vectors of a group its place in x, and the factor of x.
_J, _L = np.divmod(np.arange(32), EIGHT)  # vector, lane
_BYTES = 4 * _L + _J, 2.0 ** (-8 * _J)
_HALVES = 4 * (_L % 4) + _J + 16 * (_L // 4), 2.0 ** -(np.minimum(8 * _J, 20) + 4 * (_L // 4))
_K, _W = np.divmod(np.arange(64), EIGHT)
_ORDER = {
    "Q4_0": _HALVES, "Q4_1": _HALVES, "Q5_0": _HALVES,
    "Q8_0": (_BYTES[0], np.full(32, 2.0**-24)), "Q4_K": _BYTES, "Q6_K": _BYTES,
} | {kind: (EIGHT * _W + (_K ^ 1), np.ones(64)) for kind in LEVELS}  # fmt: skip
_GROUPS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}
KINDS = frozenset(_ORDER)


# -- the function ------------------------------------------------------------------------------------------------------


@cache
def _multiply(kind: str, count: int) -> Callable[..., None]:
    """multiply(w, x, ordered, out, rows of w, blocks and groups of a row), for `count` rows of x"""
    groups_of = _GROUPS.get(kind) or _levels(kind)
    vectors = len(_ORDER[kind][0]) // EIGHT  # of a group

    def write(code: Code, arguments: Sequence[Value]) -> None:
        w, x, ordered, out, rows, blocks, groups = arguments
        w, x, out = (code.inttoptr(a, t.as_pointer()) for a, t in ((w, BYTE), (x, FLOAT), (out, FLOAT)))
        ordered = code.inttoptr(ordered, FLOATS.as_pointer())  # (count, groups, vectors), then sums (count, groups)
        sums = code.at(ordered, code.mul(groups, LONG(count * vectors)))
        _reorder(code, kind, x, ordered, sums, code.mul(groups, LONG(count)))
        with code.loop(rows) as row:
            totals = [code.total() for _ in range(count)]
            with code.loop(blocks) as k:
                number = code.add(code.mul(row, blocks), k)
                block = code.at(w, code.mul(number, LONG(LAYOUTS[kind].nbytes)))
                found = list(groups_of(code, block))
                for g, (scale, offset, codes) in enumerate(found):
                    for i, total in enumerate(totals):
                        of_x = code.add(code.mul(blocks, LONG(i)), k)  # block of row i
                        group = code.add(code.mul(of_x, LONG(len(found))), LONG(g))
                        first = code.mul(group, LONG(vectors))
                        y = floats(0.0)
                        for j, each in enumerate(codes):
                            values = code.read(code.at(ordered, code.add(first, LONG(j))), FLOATS)
                            y = code.plus(y, code.times(each, values))
                        y = code.times(y, scale)
                        if offset is not None:
                            y = code.plus(y, code.times(offset, code.read(code.at(sums, group), FLOATS)))
                        code.add_to(total, y)
            for i, total in enumerate(totals):
                code.write(code.sum(total), code.at(out, code.add(code.mul(rows, LONG(i)), row)))

    return compiled(7, write)


def _reorder(code: Code, kind: str, x: Value, ordered: Value, sums: Value, groups: Value) -> None:
    """Write the values of x in the order of the codes, times their factors, and the sums of each lane before that."""
    places, factors = _ORDER[kind]
    vectors = len(places) // EIGHT
    with code.loop(groups) as g:
        own, total = code.at(x, code.mul(g, LONG(len(places)))), code.total()
        for j in range(vectors):
            v = ir.Constant(FLOATS, ir.Undefined)
            for lane, place in enumerate(places[EIGHT * j : EIGHT * (j + 1)]):
                v = code.insert_element(v, code.read(code.at(own, int(place)), FLOAT), INT(lane))
            code.add_to(total, v)
            v = code.times(v, floats(*factors[EIGHT * j : EIGHT * (j + 1)].tolist()))
            code.write(v, code.at(ordered, code.add(code.mul(g, LONG(vectors)), LONG(j))))
        code.write(code.load(total), code.at(sums, g))

"""Matmuls in bfloat16, against the bound that rounding gives; and the message on machines without them."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.engine import bfloat16, onednn
from minilora.engine.bfloat16 import BFloat16, rounded, to_float32
from minilora.engine.parallel import has_one_core

U = 2.0**-8  # rounding to the nearest bfloat16 moves a number by at most this part of it
STEP = 2.0**-23  # adding one more term in float32 moves the sum of magnitudes by at most this part of it

here = pytest.mark.skipif(bfloat16.why_not() is not None, reason=str(bfloat16.why_not()))


def matrix(rng, *shape):
    """A float32 matrix, and the same with rounded values."""
    w = rng.standard_normal(shape, dtype=np.float32)
    return w, BFloat16(rounded(w))


def assert_within_rounding(found, x, w):
    """found = x w, as far as rounding both to bfloat16 and adding up in float32 allows."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    bound = ((2 * U + U * U) + len(w) * STEP) * (abs(x) @ abs(w))
    assert found.dtype == np.float32
    assert np.all(abs(found - x @ w) <= bound)


# -- rounding ----------------------------------------------------------------------------------------------------------


def test_every_bfloat16_is_the_float32_with_its_bits_and_16_zeros():
    bits = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(to_float32(bits).view(np.uint32), np.arange(1 << 16, dtype=np.uint32) << 16)


@here
def test_what_is_a_bfloat16_already_is_not_moved():
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = to_float32(bits)
    normal = np.isfinite(x) & (abs(x) >= 2.0**-126)
    np.testing.assert_array_equal(rounded(x[normal]), bits[normal])
    assert not to_float32(rounded(x[abs(x) < 2.0**-126])).any()  # processors take the smallest for 0
    assert np.isnan(to_float32(rounded(np.float32([np.nan])))).all()
    np.testing.assert_array_equal(to_float32(rounded(np.float32([np.inf, -np.inf, 3.4e38]))), [np.inf, -np.inf, np.inf])


@here
@given(st.lists(st.floats(width=32, min_value=2.0**-100, max_value=2.0**100), min_size=1, max_size=40), st.booleans())
def test_rounding_finds_the_nearest_and_of_two_the_even_one(values, negative):
    x = np.float32(values) * (-1 if negative else 1)
    bits = rounded(x)
    below = x.view(np.uint32) >> 16  # towards zero
    for one, low, chosen in zip(x, below, bits, strict=True):
        lower, upper = to_float32(np.uint16([low, low + 1]))
        to_lower, to_upper = (abs(Fraction(float(one)) - Fraction(float(end))) for end in (lower, upper))
        even = low if low % 2 == 0 else low + 1
        assert chosen == (even if to_lower == to_upper else low if to_lower < to_upper else low + 1)
        assert abs(float(to_float32(np.uint16([chosen]))[0]) - float(one)) <= U * abs(float(one))


@here
def test_rounding_reads_what_is_not_in_order(rng):
    x = rng.standard_normal((6, 10), dtype=np.float32)
    np.testing.assert_array_equal(rounded(x.T[::2]), rounded(x).T[::2])
    assert rounded(np.empty((0, 4), np.float32)).shape == (0, 4)


@here
def test_roundings_of_many_sizes_are_freed(rng, monkeypatch):
    alive = []

    class Watched(onednn._Made):
        def __init__(self, *inputs):
            alive.append(None)
            super().__init__(*inputs)

        def __del__(self):
            alive.pop()
            super().__del__()

    monkeypatch.setattr(onednn, "_Made", Watched)
    x = rng.standard_normal(1000, dtype=np.float32)
    for size in range(1, 1000):
        rounded(x[:size])
    assert len(alive) < 2_000  # of about 6,000


# -- products ----------------------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1), (1, 576, 192), (3, 33, 17), (8, 64, 96), (64, 1537, 31)]  # N, n, m


@here
@pytest.mark.parametrize(("rows", "n", "m"), SIZES)
def test_a_product_is_as_near_as_rounding_allows(rows, n, m, rng):
    x, g = rng.standard_normal((rows, n), dtype=np.float32), rng.standard_normal((rows, m), dtype=np.float32)
    w, in_bfloat16 = matrix(rng, m, n)
    assert_within_rounding(x @ in_bfloat16.T, x, w.T)
    assert_within_rounding(g @ in_bfloat16, g, w)
    assert_within_rounding((in_bfloat16 @ x.T).T, x, w.T)


@here
def test_values_of_any_size_keep_the_bound_and_of_bfloat16_values_only_the_sum_is_rounded(rng):
    x, (w, in_bfloat16) = rng.standard_normal((16, 96), dtype=np.float32), matrix(rng, 40, 96)
    scales = np.float32(10) ** rng.integers(-12, 12, (16, 1)).astype(np.float32)
    assert_within_rounding(x * scales @ in_bfloat16.T, x * scales, w.T)
    x, w = to_float32(rounded(x)), to_float32(rounded(w))
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    assert np.all(abs(x @ in_bfloat16.T - exact) <= 96 * STEP * (abs(x) @ abs(w.T)))


@here
def test_a_product_is_added_to_what_is_there(rng):
    x, (_, in_bfloat16) = rng.standard_normal((16, 96), dtype=np.float32), matrix(rng, 40, 96)
    start = rng.standard_normal((16, 40), dtype=np.float32)
    out = start.copy()
    assert in_bfloat16.T.onto(out, x) is out
    np.testing.assert_allclose(out - start, x @ in_bfloat16.T, atol=1e-5)
    zero = in_bfloat16.T.onto(np.zeros_like(start), x)
    np.testing.assert_array_equal(zero, x @ in_bfloat16.T)


@here
def test_the_same_product_has_the_same_bits_in_every_thread_and_every_run(rng, monkeypatch):
    x, (_, in_bfloat16) = rng.standard_normal((130, 576), dtype=np.float32), matrix(rng, 192, 576)
    once = x @ in_bfloat16.T

    def alone(_):
        has_one_core.set(True)
        return x @ in_bfloat16.T

    library, threads = onednn.library(), []
    monkeypatch.setattr(library, "_cores", 2)
    monkeypatch.setattr(library, "_set_threads", threads.append)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(alone, range(12)))
    assert set(threads) == {1}
    monkeypatch.undo()
    assert all(np.array_equal(each, found[0]) for each in found)
    assert all(np.array_equal(x @ in_bfloat16.T, once) for _ in range(5))


@here
def test_shapes_that_do_not_fit_are_refused(rng):
    with pytest.raises(ValueError, match=r"x of shape \(2, 7\) cannot be multiplied by \(4, 8\)ᵀ"):
        np.zeros((2, 7), np.float32) @ matrix(rng, 4, 8)[1].T
    with pytest.raises(ValueError, match=r"x of shape \(2, 7\) cannot be multiplied by \(4, 8\)$"):
        np.zeros((2, 7), np.float32) @ matrix(rng, 4, 8)[1]


# -- where there are none ----------------------------------------------------------------------------------------------


@here
def test_a_processor_without_the_matmul_says_so():
    command = [sys.executable, "-c", "from minilora.engine import bfloat16; print(bfloat16.why_not())"]
    run = subprocess.run(
        command, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, capture_output=True, text=True
    )
    assert run.stdout == "this processor has no matmul in bfloat16 (AMX, AVX512-BF16)\n"


@pytest.mark.parametrize(
    ("flags", "told"), [("fpu avx2 avx512f", False), ("fpu avx512_bf16", True), ("amx_bf16 fpu", True)]
)
def test_a_processor_that_could_be_faster_is_told_how(flags, told, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"flags: {flags}")
    monkeypatch.setattr(bfloat16, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(onednn, "library", None)  # is not loaded
    assert ("--bf16" in (bfloat16.hint() or "")) == told
    monkeypatch.setattr(bfloat16, "CPUINFO", tmp_path / "absent")
    assert bfloat16.hint() is None

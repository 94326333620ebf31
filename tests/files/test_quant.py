"""Packing and unpacking quantised blocks: the same as the gguf library, and as worked out by hand."""

import sys

import gguf
import numpy as np
import pytest
import strictarray
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minilora.engine.backend import array_module
from minilora.files.quant import BYTES_PER_BLOCK, PIECE, Packed, codes_of, dequantize, quantize

KINDS = ["F32", "F16", "Q8_0", "Q4_1"]


def half(*values):
    return np.array(values, np.float16).view(np.uint8)


def finite_steps(raw, kind):
    """Replace non-finite floats in random bytes, which have no equal."""
    if kind in ("F32", "F16"):
        floats = raw.view(np.float32 if kind == "F32" else np.float16)
        floats[~np.isfinite(floats)] = 1
    else:
        steps = 1 if kind == "Q8_0" else 2
        for i in range(0, raw.shape[1], BYTES_PER_BLOCK[kind]):
            halves = raw[:, i : i + 2 * steps].copy().view(np.float16)
            halves[~np.isfinite(halves)] = 1
            raw[:, i : i + 2 * steps] = halves.view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), rows=st.integers(1, 4), blocks=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_any_block_gives_the_numbers_of_the_gguf_library(kind, data, rows, blocks):
    raw = finite_steps(data.draw(arrays(np.uint8, (rows, blocks * BYTES_PER_BLOCK[kind]))), kind)
    w = dequantize(raw, kind)
    assert w.shape == (rows, 32 * blocks) and w.dtype == np.float32
    np.testing.assert_array_equal(w, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))


def test_q8_0_by_hand_is_step_times_signed_byte():
    codes = np.arange(-16, 16, dtype=np.int8)
    raw = np.concatenate([half(0.5), codes.view(np.uint8)])[None]
    np.testing.assert_array_equal(dequantize(raw, "Q8_0")[0], 0.5 * np.arange(-16, 16))


def test_q8_0_reaches_both_ends_of_the_signed_byte():
    raw = np.concatenate([half(0.25), np.array([-128, 127] * 16, np.int8).view(np.uint8)])[None]
    assert dequantize(raw, "Q8_0")[0, :2].tolist() == [-32.0, 31.75]


def test_q4_1_by_hand_has_low_halves_first_then_high_halves():
    codes = np.array([(15 - i) << 4 | i for i in range(16)], np.uint8)  # element i is i, element i + 16 is 15 - i
    raw = np.concatenate([half(0.5, -2.0), codes])[None]
    expected = [0.5 * i - 2 for i in range(16)] + [0.5 * (15 - i) - 2 for i in range(16)]
    assert dequantize(raw, "Q4_1")[0].tolist() == expected


def test_every_block_has_its_own_step_and_every_row_its_own_blocks():
    steps = np.array([[1, 2], [4, 8]])
    rows = [np.concatenate([np.concatenate([half(d), np.ones(32, np.uint8)]) for d in row]) for row in steps]
    np.testing.assert_array_equal(dequantize(np.array(rows), "Q8_0"), np.repeat(steps, 32, axis=1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_bytes_are_neither_changed_nor_shared(kind, rng):
    raw = finite_steps(rng.integers(0, 256, (2, BYTES_PER_BLOCK[kind]), np.uint8), kind)
    before = raw.copy()
    w = dequantize(raw, kind)
    w[:] = 7
    np.testing.assert_array_equal(raw, before)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_0", "q8_0", ""])
def test_an_unknown_kind_is_refused_with_the_known_ones(kind):
    with pytest.raises(ValueError, match="F32, F16, BF16, Q8_0, Q4_1"):
        dequantize(np.zeros((1, 34), np.uint8), kind)


@pytest.mark.parametrize(("kind", "width"), [("Q8_0", 33), ("Q8_0", 35), ("Q4_1", 34), ("Q4_1", 10)])
def test_a_row_that_is_no_whole_number_of_blocks_is_refused(kind, width):
    with pytest.raises(ValueError, match="not a multiple"):
        dequantize(np.zeros((2, width), np.uint8), kind)


@pytest.mark.parametrize(("kind", "bits"), [("F32", 32), ("F16", 16), ("Q8_0", 8.5), ("Q4_1", 5)])
def test_bits_per_number(kind, bits):
    assert BYTES_PER_BLOCK[kind] * 8 / 32 == bits


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), rows=st.integers(1, 4), blocks=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_packing_gives_the_bytes_of_the_gguf_library(kind, data, rows, blocks):
    numbers = st.floats(-60000, 60000, width=32, allow_subnormal=False) | st.floats(-2, 2, width=32)
    w = data.draw(arrays(np.float32, (rows, 32 * blocks), elements=numbers))
    w[np.abs(w) < 1e-30] = 0  # there the library divides by a step that is no number
    if kind == "Q4_1":
        w /= 2  # the range of a block, too, must fit float16
    expected = gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(quantize(w, kind), np.ascontiguousarray(expected).view(np.uint8))


@pytest.mark.parametrize(("kind", "steps"), [("F32", 0), ("F16", 2**-11), ("Q8_0", 1 / 254), ("Q4_1", 1 / 15)])
def test_what_is_packed_comes_back_within_half_a_step(kind, steps, rng):
    w = rng.uniform(-1, 1, (5, 96)).astype(np.float32)
    rounded = 2 * 2**-11 if kind.startswith("Q") else 0  # step and minimum, in float16
    assert np.abs(dequantize(quantize(w, kind), kind) - w).max() <= steps + rounded


@pytest.mark.parametrize("kind", KINDS)
def test_packing_takes_any_layout_and_float_type_and_changes_nothing(kind, rng):
    w = rng.standard_normal((64, 7), np.float32)
    before = w.copy()
    np.testing.assert_array_equal(quantize(w.T, kind), quantize(np.ascontiguousarray(w.T), kind))
    np.testing.assert_array_equal(quantize(w.T.astype(np.float64), kind), quantize(w.T, kind))
    np.testing.assert_array_equal(w, before)


def test_many_rows_are_packed_as_each_alone(rng):
    w = rng.standard_normal((700, 1024), np.float32)  # more than one piece
    for kind in ("Q8_0", "Q4_1"):
        np.testing.assert_array_equal(quantize(w, kind)[-3:], quantize(w[-3:], kind))


def test_codes_of_q4_1_are_the_nibbles_in_order():
    w = np.concatenate([np.arange(16), np.arange(16)[::-1]]).astype(np.float32)[None]
    np.testing.assert_array_equal(codes_of(quantize(w, "Q4_1")), w)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_block_of_equal_numbers_is_packed_without_a_division_by_zero(kind):
    for value in (0.0, 1e-42, 0.5):
        w = np.full((1, 32), value, np.float32)
        np.testing.assert_allclose(dequantize(quantize(w, kind), kind), w, atol=3e-3)


@pytest.mark.parametrize(("kind", "value"), [("F16", 1e6), ("Q8_0", 1e8), ("Q4_1", 1e6), ("F16", np.nan)])
def test_numbers_that_float16_cannot_hold_are_refused(kind, value):
    w = np.zeros((1, 32), np.float32)
    w[0, 3] = value
    with pytest.raises(ValueError, match="too large"):
        quantize(w, kind)


def test_a_minimum_that_float16_cannot_hold_is_refused_though_the_step_fits():
    w = np.linspace(-1e6, -1e6 + 150, 32, dtype=np.float32)[None]  # a range of 150, a step of 10
    with pytest.raises(ValueError, match="too large for Q4_1"):
        quantize(w, "Q4_1")
    assert np.isfinite(dequantize(quantize(w / 100, "Q4_1"), "Q4_1")).all()


def test_exact_ties_of_q8_0_round_away_from_zero():
    codes = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 126.5])
    w = np.concatenate([codes, np.zeros(23, np.float32), np.float32([127])])[None]  # the step is 1
    expected = [-3, -2, -1, 1, 2, 3, 4, 127]
    assert dequantize(quantize(w, "Q8_0"), "Q8_0")[0, :8].tolist() == expected
    np.testing.assert_array_equal(quantize(w, "Q8_0"), gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0))


def test_exact_ties_of_q4_1_round_up():
    w = np.concatenate([np.float32([0.5, 1.5, 2.5, 14.5]), np.zeros(27, np.float32), np.float32([15])])[None]
    assert codes_of(quantize(w, "Q4_1"))[0, :4].tolist() == [1, 2, 3, 15]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 127.0, -65504.0, 2.0**-5])
def test_a_constant_that_float16_holds_comes_back_exactly(kind, value):
    w = np.full((2, 64), value, np.float32)
    tolerance = 0 if kind == "Q4_1" else 2**-11 * abs(value)  # the step of Q8_0 is a 127th, rounded to float16
    np.testing.assert_allclose(dequantize(quantize(w, kind), kind), w, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_rows_that_are_no_whole_blocks_cannot_be_packed(kind):
    with pytest.raises(ValueError, match="not a multiple of 32"):
        quantize(np.zeros((2, 33), np.float32), kind)


def test_packing_into_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="Q4_K"):
        quantize(np.zeros((1, 32), np.float32), "Q4_K")


# -- packed matrices ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["Q8_0", "Q4_1"])
def packed(request, rng):
    """A matrix (150, 1056) of more blocks than are unpacked at a time."""
    return Packed(quantize(rng.standard_normal((150, 1056), dtype=np.float32), request.param), request.param)


def numbers(packed):
    return gguf.quants.dequantize(packed.raw, gguf.GGMLQuantizationType[packed.kind])


def test_a_packed_matrix_has_the_shape_and_size_of_its_numbers_and_the_bytes_of_its_blocks(packed):
    w = numbers(packed)
    assert len(packed.raw) * packed.raw.shape[1] // BYTES_PER_BLOCK[packed.kind] > PIECE
    assert (packed.shape, packed.ndim, packed.size, packed.dtype, len(packed)) == (w.shape, 2, w.size, w.dtype, len(w))
    assert packed.nbytes == w.size // 32 * BYTES_PER_BLOCK[packed.kind]


def test_a_packed_matrix_unpacks_whole_in_slices_and_by_rows(packed, rng):
    w, ids = numbers(packed), rng.integers(0, 150, (3, 5))
    np.testing.assert_array_equal(packed.unpack(), w)
    np.testing.assert_array_equal(packed.unpack(7, 99), w[7:99])
    np.testing.assert_array_equal(packed.unpack(140), w[140:])
    np.testing.assert_array_equal(packed[ids], w[ids])
    np.testing.assert_array_equal(packed[3], w[3])


def test_a_packed_matrix_unpacks_on_the_device_that_holds_its_bytes(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", strictarray)
    there = packed.to("cuda")
    assert type(there.raw) is strictarray.ndarray and array_module(there) is strictarray and there.is_finite()
    np.testing.assert_array_equal(there.unpack().get(), numbers(packed))
    np.testing.assert_array_equal(there[strictarray.asarray([5, 2])].get(), numbers(packed)[[5, 2]])


def test_a_packed_matrix_is_finite_unless_a_step_or_a_minimum_is_not(packed):
    assert packed.is_finite()
    for place in range(0, 4 if packed.kind == "Q4_1" else 2, 2):
        for value in (np.nan, np.inf, -np.inf):
            damaged = Packed(packed.raw.copy(), packed.kind)
            damaged.raw[3, place : place + 2] = half(value)
            assert not damaged.is_finite() and not np.isfinite(damaged.unpack()).all()


def test_numpy_does_not_unpack_a_packed_matrix_on_its_own(packed):
    for use in (np.asarray, lambda w: np.ones(150, np.float32) @ w, lambda w: w.raw[0, 0] * w):
        with pytest.raises(TypeError):
            use(packed)


@pytest.mark.parametrize(("kind", "words"), [("F16", "not packed"), ("Q4_K", "Q4_K"), ("Q4_1", "not a multiple of 20")])
def test_what_is_not_packed_is_no_packed_matrix(kind, words):
    with pytest.raises(ValueError, match=words):
        Packed(np.zeros((2, 34), np.uint8), kind)

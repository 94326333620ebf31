"""Unpacking quantised blocks: the same numbers as the gguf library, and as worked out by hand."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minilora.nn.quant import BYTES_PER_BLOCK, dequantize

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
    with pytest.raises(ValueError, match="F32, F16, Q8_0, Q4_1"):
        dequantize(np.zeros((1, 34), np.uint8), kind)


@pytest.mark.parametrize(("kind", "width"), [("Q8_0", 33), ("Q8_0", 35), ("Q4_1", 34), ("Q4_1", 10)])
def test_a_row_that_is_no_whole_number_of_blocks_is_refused(kind, width):
    with pytest.raises(ValueError, match="no multiple"):
        dequantize(np.zeros((2, width), np.uint8), kind)


@pytest.mark.parametrize(("kind", "bits"), [("F32", 32), ("F16", 16), ("Q8_0", 8.5), ("Q4_1", 5)])
def test_bits_per_number(kind, bits):
    assert BYTES_PER_BLOCK[kind] * 8 / 32 == bits

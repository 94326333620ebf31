"""Quantisation: GGUF's kinds equal the gguf library's, 4 bits are the nearest levels, packed matrices are matrices."""

import re
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import strictarray
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from modelfiles import STEPS, codes_of, random_blocks

from minilora.engine import bfloat16, fused
from minilora.engine.backend import array_module, dense
from minilora.engine.gradcheck import gradcheck
from minilora.engine.tensor import no_grad
from minilora.files import levels
from minilora.files.blocks import LAYOUTS, half_to_float32
from minilora.files.quant import FEW, PIECE, ROUNDED, Packed, bytes_of_row, dequantize, in_float32, quantize

WRITTEN, LEVELS = ("F32", "F16", "Q8_0", "Q4_1"), ("NF4", "FP4", "INT4")
each_written = pytest.mark.parametrize("kind", WRITTEN)
each_in_gguf = pytest.mark.parametrize("kind", ("F32", "F16", "BF16", *STEPS))
each_of_levels = pytest.mark.parametrize("kind", LEVELS)
each_rounded = pytest.mark.parametrize("kind", ROUNDED)
PUBLISHED = [  # NF4 in bitsandbytes: functional.py, get_4bit_type
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def in_library(w, kind):
    return np.ascontiguousarray(gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])).view(np.uint8)


def steps_of(raw, kind):
    """The floats in packed rows, as a view to write to: (rows, blocks, floats per block)."""
    if kind in ("F32", "F16", *LEVELS):
        blocks = raw.reshape(len(raw), -1, {"F32": 128, "F16": 64}.get(kind, levels.BYTES))
        return blocks.view(np.float16 if kind == "F16" else np.float32)[..., : 1 if kind in LEVELS else 32]
    size, places = STEPS[kind]
    return raw.reshape(len(raw), -1, size)[..., places[0] : places[-1] + 2].view(np.float16)


# -- the kinds of GGUF files -------------------------------------------------------------------------------------------


@each_in_gguf
@given(data=st.data(), rows=st.integers(1, 4), blocks=st.integers(1, 3))
@settings(max_examples=25)
def test_any_block_has_the_values_of_the_gguf_library(kind, data, rows, blocks):
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = data.draw(arrays(np.uint8, (rows, blocks * size)))
    if kind in STEPS:
        steps = steps_of(raw, kind)
        steps[~np.isfinite(steps)] = 1
    before = raw.copy()
    w = dequantize(raw, kind)
    assert w.shape == (rows, values * blocks) and w.dtype == np.float32
    np.testing.assert_array_equal(w, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    w[:] = 7
    np.testing.assert_array_equal(raw, before)  # neither changed nor shared


def test_every_float16_has_its_value():
    bits = np.arange(-(2**15), 2**15).astype(np.int16)
    np.testing.assert_array_equal(half_to_float32(bits), bits.view(np.float16).astype(np.float32))
    finite = bits[np.isfinite(bits.view(np.float16))]
    np.testing.assert_array_equal(half_to_float32(finite), finite.view(np.float16).astype(np.float32))


def test_every_kind_that_the_library_dequantises_is_read_and_no_other(rng):
    known = set()
    for kind, (values, size) in gguf.GGML_QUANT_SIZES.items():
        raw = rng.integers(0, 256, (2, 2 * size), dtype=np.uint8)
        try:
            with np.errstate(all="ignore"):
                expected = gguf.quants.dequantize(raw, kind)
        except NotImplementedError:
            with pytest.raises(ValueError, match=f"cannot read quantisation type {kind.name}"):
                dequantize(raw, kind.name)
            continue
        known.add(kind.name)
        got = dequantize(raw, kind.name)
        assert got.shape == (2, 2 * values) and got.dtype == np.float32
        np.testing.assert_array_equal(got, expected, err_msg=kind.name)
    assert {"Q2_K", "Q3_K", "Q5_1", "Q5_K", "IQ4_XS"} <= known and "I32" not in known


@each_written
@given(data=st.data(), rows=st.integers(1, 4), blocks=st.integers(1, 3))
@settings(max_examples=30)
def test_packing_gives_the_bytes_of_the_gguf_library(kind, data, rows, blocks):
    values = st.floats(-60000, 60000, width=32, allow_subnormal=False) | st.floats(-2, 2, width=32)
    w = data.draw(arrays(np.float32, (rows, 32 * blocks), elements=values))
    w[np.abs(w) < 1e-30] = 0  # there the library divides by a step that is NaN
    if kind == "Q4_1":
        w /= 2  # the range of a block, too, must fit float16
    np.testing.assert_array_equal(quantize(w, kind), in_library(w, kind))


def test_ties_are_rounded_as_in_llama_cpp():
    codes = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 126.5])
    w = np.concatenate([codes, np.zeros(23, np.float32), np.float32([127])])[None]  # the step is 1
    assert dequantize(quantize(w, "Q8_0"), "Q8_0")[0, :8].tolist() == [-3, -2, -1, 1, 2, 3, 4, 127]
    np.testing.assert_array_equal(quantize(w, "Q8_0"), in_library(w, "Q8_0"))
    w = np.concatenate([np.float32([0.5, 1.5, 2.5, 14.5]), np.zeros(27, np.float32), np.float32([15])])[None]
    assert codes_of(quantize(w, "Q4_1"), "Q4_1")[0, :4].tolist() == [1, 2, 3, 15]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("value", [0.0, 1e-42, 0.5, -3.0, 127.0, -65504.0, 2.0**-5])
def test_a_constant_comes_back_without_a_division_by_zero(kind, value):
    w = np.full((2, 64), value, np.float32)
    tolerance = max(1e-38, 2**-11 * abs(value) * (kind == "Q8_0"))  # Q8_0's step is a 127th, rounded to float16
    np.testing.assert_allclose(dequantize(quantize(w, kind), kind), w, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "value"), [("F16", 1e6), ("Q8_0", 1e8), ("Q4_1", 1e6), ("F16", np.nan), ("Q8_0", np.nan), ("Q4_1", np.inf)]
)
def test_values_too_large_for_float16_are_refused(kind, value):
    w = np.zeros((1, 32), np.float32)
    w[0, 3] = value
    with pytest.raises(ValueError, match=f"some values are NaN or too large for {kind}"):
        quantize(w, kind)
    w = np.linspace(-1e6, -1e6 + 150, 32, dtype=np.float32)[None]  # here the step fits, but not the minimum
    with pytest.raises(ValueError, match="too large for Q4_1"):
        quantize(w, "Q4_1")


# -- every kind --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits"), [("F32", 32), ("F16", 16), ("Q8_0", 8.5), ("Q4_1", 5),
                                            *((kind, 4.5) for kind in LEVELS)])  # fmt: skip
def test_bits_per_value_and_errors_of_at_most_half_a_step(kind, bits, rng):
    w = rng.uniform(-1, 1, (5, 192)).astype(np.float32)
    raw = quantize(w, kind)
    assert raw.nbytes * 8 == w.size * bits and bytes_of_row(192, kind) == raw.shape[1]
    step = {"F32": 0, "F16": 2**-11, "Q8_0": 1 / 254, "Q4_1": 1 / 15, "NF4": 0.16, "FP4": 1 / 6, "INT4": 1 / 14}[kind]
    rounded = 2 * 2**-11 if kind.startswith("Q") else 1e-6  # of step and minimum, to float16
    assert np.abs(dequantize(raw, kind) - w).max() <= step + rounded


@pytest.mark.parametrize("kind", (*WRITTEN, *LEVELS))
def test_packing_takes_any_layout_float_type_and_number_of_rows_and_changes_nothing(kind, rng):
    w = rng.standard_normal((1024, 300), np.float32)  # more than one piece
    before = w.copy()
    raw = quantize(w.T, kind)
    np.testing.assert_array_equal(raw, quantize(np.ascontiguousarray(w.T), kind))
    np.testing.assert_array_equal(raw, quantize(w.T.astype(np.float64), kind))
    np.testing.assert_array_equal(raw[-3:], quantize(w.T[-3:], kind))
    np.testing.assert_array_equal(w, before)


@pytest.mark.parametrize("kind", (*WRITTEN, "BF16", *LEVELS))
def test_rows_that_are_no_whole_blocks_are_refused_in_one_line(kind):
    whole = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q4_1": 32}.get(kind, 64)
    size = bytes_of_row(whole, kind)
    for wrong in (whole // 2, whole + 1, 2 * whole - 1) if whole > 1 else ():
        message = f"^a row of {wrong} values cannot be stored as {kind}: {wrong} is not a multiple of {whole}$"
        for call in (
            lambda n=wrong: bytes_of_row(n, kind),
            lambda n=wrong: quantize(np.zeros((2, n), np.float32), kind),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    for call in (dequantize, *([Packed] if kind != "F32" else [])):
        with pytest.raises(ValueError, match=f"^a {kind} row of {size + 1} bytes is not a multiple of {size}$"):
            call(np.zeros((2, size + 1), np.uint8), kind)


@pytest.mark.parametrize("kind", ["Q9_9", "q8_0", "I32", ""])
def test_an_unknown_kind_is_refused_and_one_that_is_only_read_is_not_written(kind):
    raw, w = np.zeros((1, 34), np.uint8), np.zeros((1, 256), np.float32)
    with pytest.raises(ValueError, match=f"^cannot read quantisation type {kind}$"):
        dequantize(raw, kind)
    with pytest.raises(ValueError, match=f"a matrix of kind {kind} is not kept packed"):
        Packed(raw, kind)
    for call in (lambda: bytes_of_row(32, kind), lambda: quantize(w, kind)):
        with pytest.raises(ValueError, match=re.escape(f"type {kind}; known: F32, F16, BF16, Q4_0, Q4_1")):
            call()
    for only_read in ("Q4_0", "Q6_K"):
        with pytest.raises(ValueError, match=f"cannot write {only_read}; it writes F32, F16, BF16, Q8_0, Q4_1, NF4"):
            quantize(w, only_read)


# -- sixteen levels ----------------------------------------------------------------------------------------------------


def test_the_levels_are_those_of_their_formats():
    np.testing.assert_allclose(levels.LEVELS["NF4"], PUBLISHED, rtol=0, atol=1e-6)
    half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert levels.LEVELS["FP4"] * 6 == pytest.approx([*(-x for x in half[:0:-1]), *half, 6])
    assert levels.LEVELS["INT4"] * 7 == pytest.approx([*range(-7, 8), 7])


def test_a_block_is_a_scale_and_two_codes_to_a_byte_the_first_in_the_high_half():
    w = np.zeros((1, 64), np.float32)
    w[0, :4] = [2, -2, 0, 2 * PUBLISHED[10]]
    raw = quantize(w, "NF4")
    assert raw.shape == (1, 36) and raw[0, :4].view(np.float32)[0] == 2
    assert raw[0, 4:7].tolist() == [0xF0, 0x7A, 0x77]
    assert codes_of(raw, "NF4")[0, :5].tolist() == [15, 0, 7, 10, 7]


@each_of_levels
def test_a_byte_is_two_levels(kind):
    raw = np.zeros((8, 36), np.uint8)
    steps_of(raw, kind)[:] = 3
    raw[:, 4:] = np.arange(256, dtype=np.uint8).reshape(8, 32)
    own = levels.LEVELS[kind] * np.float32(3)
    pairs = [(own[byte >> 4], own[byte & 15]) for byte in range(256)]
    np.testing.assert_array_equal(dequantize(raw, kind).reshape(256, 2), pairs)


@each_of_levels
@given(data=st.data(), rows=st.integers(1, 3), blocks=st.integers(1, 3))
@settings(max_examples=25)
def test_every_value_becomes_the_nearest_level_of_its_block_and_stays_there(kind, data, rows, blocks):
    values = st.floats(-1e4, 1e4, width=32, allow_subnormal=False) | st.floats(-2, 2, width=32)
    w = data.draw(arrays(np.float32, (rows, 64 * blocks), elements=values))
    raw = quantize(w, kind)
    back = dequantize(raw, kind)
    each, got = w.reshape(-1, 64).astype(np.float64), back.reshape(-1, 64)
    scale = np.abs(each).max(axis=1, keepdims=True)
    nearest = np.abs(each[:, :, None] - levels.LEVELS[kind] * scale[:, :, None]).min(axis=2)
    assert (np.abs(got - each) <= nearest + 1e-6 * scale).all()
    np.testing.assert_array_equal(quantize(back, kind), raw)
    codes = codes_of(raw, kind).reshape(-1, 64)
    np.testing.assert_array_equal(levels.LEVELS[kind][codes] * scale.astype(np.float32), got)


def test_of_normal_values_nf4_loses_least(rng):
    w = rng.standard_normal((64, 1024), dtype=np.float32)
    lost = {kind: float(np.square(dequantize(quantize(w, kind), kind) - w).mean()) for kind in LEVELS}
    assert lost["NF4"] < 0.9 * lost["FP4"] and lost["NF4"] < 0.9 * lost["INT4"]


# -- packed matrices ---------------------------------------------------------------------------------------------------


def new_packed(kind, rng, shape=(150, 2112)):  # of more blocks than are dequantised at a time
    raw = quantize(rng.standard_normal(shape, dtype=np.float32), kind)
    return Packed(raw, kind), dequantize(raw, kind)


@each_rounded
def test_a_packed_matrix_has_the_shape_and_values_of_its_matrix_and_the_bytes_of_its_blocks(kind, rng, monkeypatch):
    packed, w = new_packed(kind, rng)
    assert w.size // 64 > PIECE
    assert (packed.shape, packed.ndim, packed.size, packed.dtype, len(packed)) == (w.shape, 2, w.size, w.dtype, len(w))
    assert packed.nbytes == len(w) * bytes_of_row(w.shape[1], kind)
    assert dense(w) is w
    ids = rng.integers(0, 150, (3, 5))
    for got, expected in ((packed.unpack(), w), (packed.unpack(7, 99), w[7:99]), (packed.unpack(140), w[140:]),
                          (dense(packed, 140), w[140:]), (dense(w, 140), w[140:]),
                          (packed[ids], w[ids]), (packed[3], w[3]), (packed.factor(2, 5), w[2:5])):  # fmt: skip
        np.testing.assert_array_equal(got, expected)
    monkeypatch.setitem(sys.modules, "cupy", strictarray)
    there = packed.to("cuda")
    assert type(there.raw) is strictarray.ndarray and array_module(there) is strictarray and there.is_finite()
    np.testing.assert_array_equal(there.unpack().get(), w)
    np.testing.assert_array_equal(there[strictarray.asarray([5, 2])].get(), w[[5, 2]])


@pytest.mark.parametrize("in_bfloat16", [True, False])
@each_rounded
def test_all_that_a_packed_matrix_says_of_itself_moves_with_it(kind, in_bfloat16, rng):
    packed = Packed(new_packed(kind, rng, (3, 64))[0].raw, kind, in_bfloat16)
    moved = vars(packed.to("cpu"))
    assert moved.pop("raw") is packed.raw and moved == {k: v for k, v in vars(packed).items() if k != "raw"}
    assert moved["in_bfloat16"] is in_bfloat16


@pytest.mark.skipif(bfloat16.why_not() is not None, reason="no matmul in bfloat16 here")
def test_rows_of_a_matrix_in_bfloat16_are_its_own_and_one_that_is_stored_so_is_not_widened(rng, monkeypatch):
    monkeypatch.setattr("minilora.files.quant.PIECE", 4)  # two rows at a time
    packed = Packed(new_packed("Q8_0", rng, (7, 64))[0].raw, "Q8_0", in_bfloat16=True)
    for start, stop in ((0, 7), (1, 4), (2, 3)):
        np.testing.assert_array_equal(packed.factor(start, stop).stored, bfloat16.rounded(packed.unpack(start, stop)))
    stored = Packed(quantize(packed.unpack(), "BF16"), "BF16", in_bfloat16=True)
    assert stored.product_of_few(np.ones((1, 64), np.float32)) is None


def test_in_float32_ends_with_its_block_and_changes_no_other_matrix(rng):
    settings = [True, False, True, False]
    matrices = [Packed(new_packed("Q8_0", rng, (3, 64))[0].raw, "Q8_0", each) for each in settings]
    with pytest.raises(KeyError), in_float32([*matrices, np.ones(3)]):
        assert not any(w.in_bfloat16 for w in matrices)
        raise KeyError
    assert [w.in_bfloat16 for w in matrices] == settings


@each_rounded
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_packed_matrix_is_finite_unless_a_step_a_minimum_or_a_scale_is_not(kind, value, rng):
    packed, _ = new_packed(kind, rng, (5, 192))
    assert packed.is_finite()
    for place in range(steps_of(packed.raw, kind).shape[-1]):
        damaged = Packed(packed.raw.copy(), kind)
        steps_of(damaged.raw, kind)[4, -1, place] = value
        assert not damaged.is_finite() and not np.isfinite(damaged.unpack()).all()
    if kind in LEVELS:  # a value that is not finite arrives there
        w = np.ones((2, 64), np.float32)
        w[1, 5] = value
        assert not Packed(quantize(w, kind), kind).is_finite()


def test_numpy_does_not_unpack_a_packed_matrix_by_itself_and_a_plain_one_is_none(rng):
    packed, _ = new_packed("Q4_1", rng, (150, 64))
    assert repr(packed) == "Packed(150 x 64, Q4_1, 6,000 bytes)"
    for use in (np.asarray, lambda w: np.ones(150, np.float32) @ w, lambda w: w.raw[0, 0] * w):
        with pytest.raises(TypeError):
            use(packed)
    for kind in ("F32", "Q5_K"):
        with pytest.raises(ValueError, match=f"a matrix of kind {kind} is not kept packed"):
            Packed(np.zeros((2, 64), np.uint8), kind)


@pytest.mark.parametrize("kind", [*LAYOUTS, "F16", "BF16"])
@pytest.mark.parametrize("shape", [(1, 256), (300, 512), (2, 2**17 + 256)])  # the last has rows longer than a tile
def test_a_product_with_few_rows_is_computed_without_the_whole_matrix_and_close_to_it(kind, shape, rng):
    if kind in STEPS:
        raw = random_blocks(shape, kind, rng)
    elif kind == "BF16":
        raw = rng.standard_normal(shape, np.float32).view(np.uint8).reshape(*shape, 4)[..., 2:].reshape(shape[0], -1)
    else:
        raw = quantize(rng.standard_normal(shape, np.float32), kind)
    w, packed = dequantize(raw, kind), Packed(raw, kind)
    for rows in (1, 2, 3, FEW) if kind in ("Q6_K", "BF16") else (1, FEW):
        x = rng.standard_normal((rows, shape[1])).astype(np.float32)
        y = packed.product_of_few(x)
        exact, bound = x.astype(np.float64) @ w.T, np.abs(x) @ np.abs(w.T)
        assert y.shape == (rows, shape[0]) and y.dtype == np.float32
        assert (np.abs(y - exact) <= 1e-5 * bound + 1e-30).all()
        np.testing.assert_array_equal(y, packed.product_of_few(x))
        with no_grad():
            np.testing.assert_array_equal(y, fused.product(x, packed))
    assert packed.product_of_few(np.ones((FEW + 1, shape[1]), np.float32)) is None


def test_a_product_with_few_rows_holds_a_small_part_of_the_matrix(rng):
    packed = Packed(random_blocks((4096, 1024), "Q4_K", rng), "Q4_K")
    x = np.ones((1, 1024), np.float32)
    packed.product_of_few(x)
    tracemalloc.start()
    packed.product_of_few(x)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 0.4 * packed.size * 4  # of the matrix in float32


@each_rounded
def test_gradients_through_a_packed_matrix_agree_with_measured_ones(kind, rng):
    w, _ = new_packed(kind, rng, (6, 64))
    x, a, b = rng.standard_normal((2, 3, 64)), rng.standard_normal((2, 64)), rng.standard_normal((6, 2))
    labels = np.array([[1, 5, -100], [0, 0, 3]])
    gradcheck(lambda x, a, b: fused.linear(x, w) + fused.lora_linear(x, w, a, b, scale=2.0), x[:1], a, b)
    gradcheck(lambda x: fused.linear_cross_entropy(x, w, labels[:1]), x[:1])

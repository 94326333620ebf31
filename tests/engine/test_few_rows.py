"""Compiled loops for few rows of x: the product itself, for every shape, and only where it is meant."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora as ml
from minilora.engine import factors, fused
from minilora.engine.tensor import no_grad

if not factors.compiles():
    pytest.skip("needs pip install '.[fast]', and a processor with AVX2", allow_module_level=True)

from minilora.engine import compiled, few_rows


def stored(w, kind):
    """The weights as a file stores them, and their values."""
    if kind == "F16":
        return (half := w.astype(np.float16)), half.astype(np.float32)
    if kind == "BF16":
        bits = w.view(np.uint32) >> 16
        return bits.astype(np.uint16), (bits << 16).view(np.float32)
    return w, w


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 16), st.integers(1, 80), st.integers(1, 9), st.sampled_from(list(few_rows.KINDS)), st.data())
def test_the_product_is_that_of_float64_up_to_rounding(rows, m, eights, kind, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    start, n = data.draw(st.integers(0, 3)), 8 * eights
    x = rng.standard_normal((rows, 2 * n)).astype(np.float32)[:, ::2]  # not one value after another
    buffer, values = stored(rng.standard_normal(start + m * n).astype(np.float32), kind)
    w, values = buffer[start:].reshape(m, n), values[start:].reshape(m, n)  # at any address
    y = few_rows.product(x, w, kind)
    bound = np.abs(x).astype(float) @ np.abs(values).T.astype(float)
    assert y.shape == (rows, m) and y.dtype == np.float32
    assert (np.abs(y - x.astype(float) @ values.T.astype(float)) <= 1e-6 * bound).all()
    np.testing.assert_array_equal(y, few_rows.product(x, w, kind))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_and_in_its_row_and_column(value, rng):
    x, w = rng.standard_normal((6, 64)).astype(np.float32), rng.standard_normal((50, 64)).astype(np.float32)
    x[4, 9] = w[31, 2] = value
    wrong = np.zeros((6, 50), bool)
    wrong[4], wrong[:, 31] = True, True
    np.testing.assert_array_equal(~np.isfinite(few_rows.product(x, w)), wrong)


@pytest.mark.parametrize(("rows", "m", "n"), [(4, 32, 36), (0, 32, 32)])
def test_other_shapes_and_rows_that_do_not_follow_each_other_are_not_computed(rows, m, n):
    assert few_rows.product(np.ones((rows, n), np.float32), np.ones((m, n), np.float32)) is None
    assert few_rows.product(np.ones((2, 32), np.float32), np.ones((64, 64), np.float32)[:, :32]) is None


@pytest.fixture
def used(monkeypatch):
    """The shapes of x that the loop was given."""
    shapes, product = [], few_rows.product
    monkeypatch.setattr(few_rows, "product", lambda x, w: shapes.append(x.shape) or product(x, w))
    monkeypatch.setattr(factors, "processors", lambda: 2)
    return shapes


def test_generation_uses_it_and_training_does_not(used, rng):
    w = rng.standard_normal((300, 256)).astype(np.float32)
    thin = rng.standard_normal((5, 3)).astype(np.float32), rng.standard_normal((3, 300)).astype(np.float32)
    x = rng.standard_normal((5, 256)).astype(np.float32)
    trained = fused.product(x, w, thin)
    assert used == []
    with no_grad():
        np.testing.assert_allclose(fused.product(x, w, thin), trained, rtol=1e-4, atol=1e-4)
        assert used == [(5, 256)]
        for rows, dtype in ((factors.COMPILED_ROWS + 1, np.float32), (5, np.float64)):
            x = rng.standard_normal((rows, 256)).astype(dtype)
            np.testing.assert_allclose(fused.product(x, w.astype(dtype)), x @ w.T, rtol=1e-4, atol=1e-4)
        for m, n in ((200, 256), (600, 248)):  # few weights, or short rows
            fused.product(np.ones((5, n), np.float32), np.ones((m, n), np.float32))
        assert fused.product(np.ones((5, 256)), w).dtype == np.float64
        assert used == [(5, 256)]
        fused.product(np.ones((factors.COMPILED_ROWS, 256), np.float32), w)
    assert used[1:] == [(factors.COMPILED_ROWS, 256)]


def test_several_cores_are_left_to_blas(used, monkeypatch):
    monkeypatch.setattr(factors, "processors", lambda: 3)
    with no_grad():
        fused.product(np.ones((5, 256), np.float32), np.ones((300, 256), np.float32))
    assert used == []


@pytest.mark.parametrize("quantized", [False, "nf4"])
def test_the_tiny_base_computes_without_a_loop(monkeypatch, quantized):
    monkeypatch.setattr(factors, "compiles", lambda: pytest.fail("asked for LLVM"))
    with no_grad():
        ml.load("tiny", quantized)[0](np.ones((2, 3), int))


class Unloadable:
    """llvmlite on Windows without Microsoft's runtime."""

    def __getattr__(self, name):
        raise OSError("Could not find/load shared object file 'llvmlite.dll'")


@pytest.mark.parametrize("missing", ["llvmlite", "its library", "avx2", "fma", "f16c"])
def test_without_llvmlite_or_on_another_processor_numpy_computes(monkeypatch, missing):
    factors.compiles.cache_clear()
    if missing in ("llvmlite", "its library"):
        monkeypatch.delitem(sys.modules, "minilora.engine.compiled")
        monkeypatch.setitem(sys.modules, "llvmlite", None if missing == "llvmlite" else Unloadable())
        monkeypatch.delattr("minilora.engine.compiled")
    else:
        features = compiled.binding.get_host_cpu_features()
        monkeypatch.setattr(compiled.binding, "get_host_cpu_features", lambda: features | {missing: False})
    assert not factors.compiles()
    with no_grad():
        assert factors.product_of_few(np.ones((5, 256), np.float32), np.ones((300, 256), np.float32)) is None
    monkeypatch.undo()
    factors.compiles.cache_clear()
    assert factors.compiles()

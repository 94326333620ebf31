"""oneDNN's float32 products, which threads of training use, and the message on machines without the library."""

import ctypes.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora.engine import bfloat16, factors, fused, onednn
from minilora.engine.onednn import Factor
from minilora.engine.parallel import has_one_core

here = pytest.mark.skipif(not onednn._is_faster(), reason="needs oneDNN, and AVX-512")


@pytest.fixture
def one_core():
    """This thread is one of several."""
    token = has_one_core.set(True)
    yield
    has_one_core.reset(token)


@pytest.fixture
def fresh():
    """Forget what was found about this machine, before and after."""
    for found in (onednn.library, onednn._is_faster, bfloat16.why_not):
        found.cache_clear()
    yield
    for found in (onednn.library, onednn._is_faster, bfloat16.why_not):
        found.cache_clear()


def floats(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


# -- products ----------------------------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (1, 576, 192), (3, 33, 17), (64, 1537, 31), (0, 8, 4)])
def test_a_product_is_numpys_up_to_rounding(rows, k, n, rng):
    x, w, out = floats(rng, rows, k), floats(rng, k, n), floats(rng, rows, n)
    turned = np.ascontiguousarray(w.T)
    exact = x.astype(np.float64) @ w
    bound = (k + 2) * 2.0**-23 * (abs(x).astype(np.float64) @ abs(w)) + 1e-30
    for left in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
        for factor in (Factor(w), Factor(turned).T, Factor(turned, transposed=True)):
            found, start = left @ factor, out.copy()
            assert found.dtype == np.float32 and np.all(abs(found - exact) <= bound)
            assert factor.onto(start, left) is start
            assert np.all(abs(start - out - exact) <= 2 * bound + 1e-6 * abs(out))


@here
@pytest.mark.parametrize(
    ("status", "error", "words"), [(1, MemoryError, "^$"), (2, RuntimeError, "multiply: status 2")]
)
def test_lack_of_memory_is_told_from_another_failure(status, error, words, rng, monkeypatch):
    monkeypatch.setattr(onednn.library(), "_gemms", {np.dtype(np.float32): lambda *how: status})
    with pytest.raises(error, match=words):
        floats(rng, 2, 4) @ Factor(floats(rng, 4, 8))


@here
def test_shapes_and_types_that_do_not_fit_are_refused(rng):
    w = Factor(floats(rng, 4, 8))
    with pytest.raises(ValueError, match=r"x of shape \(2, 7\) cannot be multiplied by \(4, 8\)ᵀ"):
        floats(rng, 2, 7) @ w.T
    with pytest.raises(ValueError, match="x is float64 and the other factor float32"):
        np.zeros((2, 4)) @ w


@here
def test_a_thread_that_has_one_core_multiplies_large_float32_matrices_so_and_nothing_else_does(rng, one_core):
    w = floats(rng, 256, 256)
    factor = factors.fast_factor(w)
    assert type(factor) is Factor and factor.stored is w and factors.adds_products(w)
    np.testing.assert_allclose(np.eye(256, dtype=np.float32) @ factor, w)
    for other in (w.T, w[:, ::2], w[:16], w.astype(np.float64), floats(rng, 4, 256, 256)):
        assert factors.fast_factor(other) is other and not factors.adds_products(other)
    has_one_core.set(False)
    assert factors.fast_factor(w) is w and not factors.adds_products(w)


def test_without_the_library_or_avx512_a_matrix_is_its_own_factor(rng, one_core, monkeypatch):
    w = floats(rng, 256, 256)
    monkeypatch.setattr(onednn, "_is_faster", lambda: False)
    assert factors.fast_factor(w) is w and not factors.adds_products(w)


@here
@pytest.mark.parametrize("rows", [1, 20, 300])
def test_operations_are_the_same_whichever_library_multiplies(rng, rows, one_core, monkeypatch):
    x, w, a, b = floats(rng, rows, 300), floats(rng, 320, 300), floats(rng, 4, 300), floats(rng, 320, 4)
    g, used = floats(rng, rows, 320), []
    multiply = onednn.Library.multiply
    monkeypatch.setattr(onednn.Library, "multiply", lambda *each: used.append(each[-1]) or multiply(*each))

    def everything():
        y, *vjps = fused.lora_linear.forward(x, w, a, b, 2.0)
        return [y, *(vjp(g) for vjp in vjps)]

    found = everything()
    assert 1.0 in used  # the low-rank product first, and the other added to it
    has_one_core.set(False)
    del used[:]
    for one, other in zip(found, everything(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)
    assert not used


@here
def test_loaded_by_a_thread_that_has_one_core_it_uses_all_cores_elsewhere(fresh, one_core, monkeypatch):
    monkeypatch.setattr(onednn, "cores", lambda: 1)  # as NumPy's library has in such a thread
    limited, used = onednn.library(), []
    limited._set_threads = used.append
    x = np.ones((4, 4), np.float32)
    x @ Factor(x)
    monkeypatch.setattr(onednn, "cores", lambda: 5)
    has_one_core.set(False)
    x @ Factor(x)
    assert used == [1, 5]


# -- where there are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "machine", "reason"),
    [
        (["libno-such-thing.so"], ["Linux", "x86_64"], r"libno-such-thing\.so.*pip install onednn-cpu-gomp"),
        (
            ["libm.so.6"],
            ["Linux", "x86_64"],
            r"^oneDNN cannot be loaded \(libm\.so\.6 is built in another way.*pip install",
        ),
        (["libgomp.so.0"], ["Linux", "x86_64"], r"libgomp\.so\.0.*\): install GCC's OpenMP library.*libgomp1\)$"),
        ([], ["Darwin", "arm64"], "^it needs Linux on x86_64, this is Darwin on arm64$"),  # nothing to install
    ],
)
def test_a_machine_without_the_library_says_why(fresh, monkeypatch, names, machine, reason):
    if sys.platform != "linux" and names:
        pytest.skip("needs Linux's libraries")
    monkeypatch.setattr(onednn, "_NAMES", names)
    monkeypatch.setattr(onednn.platform, "system", lambda: machine[0])
    monkeypatch.setattr(onednn.platform, "machine", lambda: machine[1])
    assert re.search(reason, bfloat16.why_not()) and not onednn._is_faster()


INSTALLED = any(Path(sys.prefix, "lib").glob("libdnnl.so.3")) and ctypes.util.find_library("gomp") is not None


@pytest.mark.skipif(not INSTALLED, reason="needs oneDNN")
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3)])
def test_rounded_values_have_the_shape_of_what_is_rounded(shape):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert bfloat16.rounded(x).shape == shape
    np.testing.assert_array_equal(bfloat16.rounded(x.T), bfloat16.rounded(x).T)


@pytest.mark.skipif(not INSTALLED or not bfloat16.CPUINFO.exists(), reason="needs oneDNN")
@pytest.mark.parametrize("most", ["ALL", "AVX512_CORE", "AVX2"])
def test_what_the_processor_has_decides(most):
    code = "from minilora.engine import bfloat16 as b, onednn; print(b.why_not() is None, onednn._is_faster())"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": most}, capture_output=True, text=True
    )
    flags = bfloat16.CPUINFO.read_text()
    has = most == "ALL" and ("avx512_bf16" in flags or "amx_bf16" in flags), most != "AVX2" and "avx512f" in flags
    assert run.stdout.split() == [str(each) for each in has], run.stderr


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_idle_threads_spin_for_a_short_time_unless_the_environment_says_otherwise(given, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with onednn._patience():
        assert os.environ.get("GOMP_SPINCOUNT") == given.get("GOMP_SPINCOUNT", None if given else "10000")
    assert dict(os.environ) == before

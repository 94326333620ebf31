"""One adapted layer: its formula, its gradients, how its weights start; and the embedding."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smallmodels import DTYPES, one_layer, tolerance
from smallmodels import lora_config as config

from minilora.engine.gradcheck import gradcheck
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoraLinear, new_weights
from minilora.lora.variants import Dropout
from minilora.nn.layers import Linear

# -- one layer ---------------------------------------------------------------------------------------------------------


SIZES = st.integers(1, 12)


@given(m=SIZES, n=SIZES, rows=SIZES, data=st.data(), alpha=st.floats(0.1, 64), dtype=DTYPES,
       factor=st.sampled_from([1.0, 0.5]), rslora=st.booleans(), dora=st.booleans(), bias=st.booleans())  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_a_layer_computes_its_formula_and_merging_it_changes_nothing(
    m, n, rows, data, alpha, dtype, factor, rslora, dora, bias
):
    rng = np.random.default_rng(0)
    r = data.draw(st.integers(1, min(m, n)))
    base = Linear(n, m, bias=bias, rng=rng, std=1.0)
    base.weight.data = base.weight.data.astype(dtype)
    if bias:
        base.bias.data = rng.standard_normal(m).astype(dtype)
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, use_dora=dora, init_lora_weights=False)
    lora = LoraLinear(base)
    share = lora.adapters["a"] = new_weights("x", base, config, rng)
    x, w = rng.standard_normal((rows, n)).astype(dtype), base.weight.data.copy()
    assert np.array_equal(lora(x).data, base(x).data)  # nothing is active
    lora.active = {"a": factor}
    if dora:
        share.lora_magnitude_vector.data *= rng.uniform(0.5, 2, m).astype(dtype)
    y = lora(x).data
    assert y.dtype == dtype and y.shape == (rows, m)
    full = w + alpha / (r**0.5 if rslora else r) * share.lora_B.data @ share.lora_A.data
    if dora:
        full *= (share.lora_magnitude_vector.data / np.linalg.norm(full, axis=1))[:, None]
    full = w + factor * (full - w)
    scale = max(1.0, float(np.abs(full).max())) * n
    expected = x @ full.T + (base.bias.data if bias else 0)
    np.testing.assert_allclose(y / scale, expected / scale, **tolerance(dtype))
    for _ in range(2):  # twice is once
        lora.merge()
        np.testing.assert_allclose(lora(x).data / scale, y / scale, **tolerance(dtype))
    lora.unmerge()
    assert lora.weight.data.tobytes() == w.tobytes() and lora(x).data.tobytes() == y.tobytes()


# -- gradients ---------------------------------------------------------------------------------------------------------


class Holes(Dropout):
    """Dropout whose holes are always the same, also where nothing is recorded, so that a derivative can be measured."""

    active = True

    def _draw(self):
        return self.seed


def assert_gradients(layer, share, w, parts, ids=None, **x):
    """By x, A, B and what the variant adds. DoRA's norms are held, since they take no part in its gradient."""
    if share.lora_magnitude_vector is not None:
        norms = share.norms(w)
        share.norms = lambda w: norms
        parts["lora_magnitude_vector"] = share.lora_magnitude_vector.data * 1.3

    def adapted(*values):
        given = dict(zip([*x, *parts], values, strict=True))
        for name in parts:
            setattr(share, name, given[name])
        return layer(given.get("x", ids))

    layer.requires_grad_(False)
    gradcheck(adapted, *x.values(), *parts.values())


@pytest.mark.parametrize("bias", [False, True], ids=["", "with bias"])
@pytest.mark.parametrize("drop", [False, True], ids=["", "with dropout"])
@pytest.mark.parametrize("pissa", [False, True], ids=["", "from PiSSA"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_gradients_of_an_adapted_layer(rng, dora, pissa, drop, bias):
    start, factor = "pissa" if pissa else False, 1.0 if bias == drop else 0.7
    layer, share = one_layer(rng, bias=bias, use_dora=dora, init_lora_weights=start)
    layer.active = {"a": factor}
    if drop:
        share.dropout = Holes(0.3, seed=5)
    parts = {"lora_A": share.lora_A.data, "lora_B": share.lora_B.data + 0.3}
    assert_gradients(layer, share, layer.weight.data, parts, x=rng.standard_normal((2, 3, 6)))


# -- initialisation ----------------------------------------------------------------------------------------------------


def test_the_initial_values_of_a_and_b():
    """A is uniform within ±1/√n or, with "gaussian", from N(0, 1/r²); B is zero; with False both are random."""
    r, n, m = 16, 400, 300
    found = {}
    for init in (True, "gaussian", False):
        share = new_weights("x", Linear(n, m, rng=None), config(r=r, init_lora_weights=init), np.random.default_rng(0))
        found[init] = a, b = share.lora_A.data, share.lora_B.data
        assert a.shape == (r, n) and b.shape == (m, r) and a.dtype == b.dtype == np.float32
        assert b.any() == (init is False)
    assert 0.0499 < np.abs(found[True][0]).max() <= 0.05  # 1 / sqrt(400)
    assert found[True][0].std() == pytest.approx(0.05 / math.sqrt(3), rel=0.03)
    assert found["gaussian"][0].std() == pytest.approx(1 / r, rel=0.03)
    assert np.abs(found["gaussian"][0]).max() > 3 / r
    assert found[False][0].std() > 0 and found[False][1].std() == pytest.approx(1 / math.sqrt(r), rel=0.03)

"""Rotary frequencies: Llama 3's scaling, and which layers rotate."""

from dataclasses import replace

import numpy as np
from smallmodels import SMALL

from minilora.engine.tensor import Tensor
from minilora.nn.language_model import rotary_angles
from minilora.nn.llama import Context, Llama
from minilora.nn.rope import RopeScaling, frequencies


def test_llama_3_slows_long_waves_and_keeps_short_ones():
    scaling, plain = RopeScaling(32.0, 1.0, 4.0, 8192), frequencies(500000.0, 64)
    expected = []
    for f in plain:
        turns = 8192 * f / (2 * np.pi)  # in the original context
        share = min(max((turns - 1) / 3, 0), 1)  # 0: slowed 32 times, 1: kept
        expected.append(f * share + f / 32 * (1 - share))
    np.testing.assert_allclose(frequencies(500000.0, 64, scaling), expected, rtol=1e-12)
    np.testing.assert_allclose(plain / scaling.divisors(plain), expected, rtol=1e-12)


def test_the_layers_without_rotation_are_every_second_counted_from_one(rng):
    model, x = Llama(replace(SMALL, no_rope_layer_interval=2), 0), Tensor(rng.standard_normal((1, 5, 8)))
    turned = [Context(*rotary_angles(np.arange(5)[None], f * np.ones(2), np.float64)) for f in (0.0, 1.0)]
    for layer, block in enumerate(model.model.layers):
        still, moved = (block.self_attn(x, context, layer).data for context in turned)
        assert np.array_equal(still, moved) == (layer == 1)

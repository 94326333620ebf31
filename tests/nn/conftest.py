"""A small model in float64, and tokens for it."""

import pytest
from smallmodels import SMALL, in_float64

from minilora.nn.llama import Llama


@pytest.fixture
def model(rng):
    return in_float64(Llama(SMALL, rng))


@pytest.fixture
def ids(rng):
    return rng.integers(0, SMALL.vocab_size, (2, 7))

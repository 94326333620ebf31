"""The shop's model and tokenizer, for a test each."""

import pytest

import minilora as ml


@pytest.fixture
def model(loaded):
    """The base with both adapters; none is active at the beginning."""
    ml.set_adapter(loaded[0], None)
    return loaded[0]


@pytest.fixture(scope="session")
def tokenizer(loaded):
    return loaded[1]

"""Small models and samples that several test files use."""

import numpy as np

from minilora.engine.backend import beside, to_numpy
from minilora.engine.fused import NOT_SCORED
from minilora.engine.tensor import no_grad
from minilora.nn.llama import Llama
from minilora.nn.parts import Sample


def new_model(config, seed=0):
    """A random model whose embeddings are large enough for its logits to say something."""
    model = Llama(config, np.random.default_rng(seed))
    model.model.embed_tokens.weight.data *= 10
    return model


def logits(model, ids):
    """What the model says of ids (B, T): (B, T, V) on the host, wherever its weights are."""
    with no_grad():
        return to_numpy(model(beside(model.head_weight.data, ids)[0]).data)


def random_samples(rng, sizes=(12, 9, 15, 10, 8, 14), vocabulary=64):
    rows = [rng.integers(0, vocabulary, n).tolist() for n in sizes]
    return [Sample(tuple(row), (NOT_SCORED, NOT_SCORED, *row[2:])) for row in rows]

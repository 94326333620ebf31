"""Random keys with random values, to be memorised: how many bits does a model store?

Nothing in the pairs follows from anything else, so each value must be stored: N log2(V) bits for N values, each one of
V. What is stored, the loss tells: to write down a value to which the model gives the probability p still takes
-log2 p bits. Guessing among the values stores nothing.

Source: Physics of Language Models, part 3.3 (arXiv 2404.05405), measures in this way what models know.
"""

from math import log2

import numpy as np

RESERVED = 3  # the first token ids, which tokenizers use as marks


def random_pairs(count: int, keys: int, values: int, vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` different keys, out of `keys` token ids, and for each a value, out of `values` others: (N,) and (N,).

    Raises ValueError where there are too few keys, or too few tokens.
    """
    if not 0 < count <= keys or keys + values > vocab_size - RESERVED:
        raise ValueError(
            f"expected 1 to {keys} pairs and at least {keys + values + RESERVED} tokens, got {count} and {vocab_size}"
        )
    rng = np.random.default_rng(seed)
    symbols = rng.permutation(vocab_size - RESERVED)[: keys + values] + RESERVED
    different: dict[int, None] = {}
    while len(different) < count:
        different[int(rng.choice(symbols[:keys], 1)[0])] = None
    return np.array(list(different)), symbols[keys:][rng.integers(0, values, count)]


def bits_stored(logits: np.ndarray, answers: np.ndarray, values: int) -> tuple[float, float]:
    """How many bits of the answers (N,), each one of `values`, the logits (N, V) hold; and how many there are."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    nats = np.log(np.exp(x).sum(axis=1)) - x[np.arange(len(answers)), answers]
    whole = len(answers) * log2(values)
    return max(0.0, whole - float(nats.sum()) / np.log(2)), whole

"""Models that know everything, or nothing: what a task's ceiling and chance are tested with."""

import numpy as np

from minilora.engine.tensor import Tensor

SURE = 50.0  # logits so far apart are certainty


class Oracle:
    """Knows some sequences by heart: of each, what comes next is certain."""

    def __init__(self, samples, vocab_size):
        self.vocab_size = vocab_size
        self.after = {s.ids[:i]: s.ids[i] for s in samples for i in range(1, len(s.ids))}

    def __call__(self, ids):
        logits = np.zeros((*ids.shape, self.vocab_size))
        for row, out in zip(ids.tolist(), logits, strict=True):
            for t in range(len(row)):
                if (following := self.after.get(tuple(row[: t + 1]))) is not None:
                    out[t, following] = SURE
        return Tensor(logits)


class Guesser:
    """Finds some tokens equally likely, wherever it is asked; the likeliest changes by chance."""

    def __init__(self, tokens, vocab_size, seed=0):
        self.tokens, self.vocab_size, self.rng = list(tokens), vocab_size, np.random.default_rng(seed)

    def __call__(self, ids):
        logits = np.full((*ids.shape, self.vocab_size), -SURE)
        logits[..., self.tokens] = 1e-6 * self.rng.random((*ids.shape, len(self.tokens)))
        return Tensor(logits)


def answers(samples):
    """All tokens that are scored in some samples."""
    return sorted({label for sample in samples for label in sample.labels if label >= 0})

"""Generation on a dense and on a packed base: tokens per second of processor time, in turns in one process.

    OPENBLAS_NUM_THREADS=1 python tests/benchmarks/packed.py dense packed nf4

dense: SmolLM2 in float32. packed: as its file stores it, Q4_1 and Q8_0. Another word is a kind for `quantized`.
"""

import sys
import time

import numpy as np

import minilora as ml
from minilora.engine.tensor import no_grad

TOKENS, ROUNDS = 8, 5


def tokens_per_second(model):
    with no_grad():
        cache = model.new_cache(1, 64)
        model(np.arange(1, 11)[None], cache, last=True)
        start = time.process_time()
        for _ in range(TOKENS):
            model(np.array([[11]]), cache, last=True)
        return TOKENS / (time.process_time() - start)


def main(kinds):
    models = {kind: ml.load("smollm2", {"dense": False, "packed": True}.get(kind, kind))[0] for kind in kinds}
    found = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, model in models.items():
            found[kind].append(tokens_per_second(model))
    for kind, each in found.items():
        print(f"{kind:8} median {np.median(each):5.1f}  best {max(each):5.1f}  tokens per second of processor time")


if __name__ == "__main__":
    main(sys.argv[1:] or ["dense", "packed"])

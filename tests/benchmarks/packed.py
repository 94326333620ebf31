"""Generation on a dense and on a packed base: tokens per second, in turns in one process.

    python tests/benchmarks/packed.py dense packed nf4
    python tests/benchmarks/packed.py dense nf4 --base FOLDER/llama3      # the folder that big.py writes

dense: the base in float32. packed: as its GGUF file stores it. Another word is a kind for `quantized`. Processor time
counts the seconds of every core, so it says what a core does even where other programs run; a clock says what is felt.
"""

import argparse
import time

import numpy as np

import minilora as ml
from minilora.engine.tensor import no_grad

TOKENS, ROUNDS = 8, 5


def tokens_per_second(model):
    """By the clock, and of processor time."""
    with no_grad():
        cache = model.new_cache(1, 64)
        model(np.arange(1, 11)[None], cache, last=True)
        start, used = time.perf_counter(), time.process_time()
        for _ in range(TOKENS):
            model(np.array([[11]]), cache, last=True)
        return TOKENS / (time.perf_counter() - start), TOKENS / (time.process_time() - used)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--base", default="smollm2")
    arguments = parser.parse_args()
    quantized = {"dense": False, "packed": True}
    models = {kind: ml.load(arguments.base, quantized.get(kind, kind))[0] for kind in arguments.kinds}
    found = {kind: [] for kind in models}
    for _ in range(ROUNDS):
        for kind, model in models.items():
            found[kind].append(tokens_per_second(model))
    print("tokens per second     by the clock: median   best     of processor time: median   best")
    for kind, each in found.items():
        clock, processor = np.transpose(each)
        print(
            f"{kind:<28}{np.median(clock):12.2f} {max(clock):6.2f} {np.median(processor):27.2f} {max(processor):6.2f}"
        )


if __name__ == "__main__":
    main()

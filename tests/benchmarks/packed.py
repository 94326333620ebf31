"""Generation on a dense and on a packed base: tokens per second, in turns.

    python tests/benchmarks/packed.py float32 packed nf4 --streams 1 8

float32: the base in this type. packed: as its GGUF file stores it. Another word is a kind for `quantized`.
Processor time counts the seconds of every core, so it says what a core does even where other programs run; a clock says
what is felt.
"""

import argparse
import time

import numpy as np

import minilora as ml
from minilora.engine.tensor import no_grad

TOKENS, ROUNDS = 8, 5


def tokens_per_second(model, streams):
    """By the clock, and of processor time."""
    with no_grad():
        cache = model.new_cache(streams, 64)
        model(np.arange(1, 11)[None].repeat(streams, axis=0), cache, last=True)
        start, used = time.perf_counter(), time.process_time()
        for _ in range(TOKENS):
            model(np.full((streams, 1), 11), cache, last=True)
        tokens = TOKENS * streams
        return tokens / (time.perf_counter() - start), tokens / (time.process_time() - used)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--streams", nargs="+", type=int, default=[1])
    parser.add_argument("--base", default="smollm2")
    arguments = parser.parse_args()
    models = {
        kind: ml.load(arguments.base, {"float32": False, "packed": True}.get(kind, kind))[0] for kind in arguments.kinds
    }
    print("tokens per second                by the clock: median   best     of processor time: median   best")
    for streams in arguments.streams:
        found = {kind: [] for kind in models}
        for _ in range(ROUNDS):
            for kind in found:
                found[kind].append(tokens_per_second(models[kind], streams))
        for kind, each in found.items():
            clock, processor = np.transpose(each)
            row = f"{streams} streams, {kind}"
            print(f"{row:<36}{np.median(clock):10.1f} {max(clock):6.1f}", end="")
            print(f"{np.median(processor):27.1f} {max(processor):6.1f}")


if __name__ == "__main__":
    main()

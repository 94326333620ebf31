"""What each idea buys: seconds and peak memory of one training step, from the reference to the package.

    python tests/benchmarks/one_step.py            # SmolLM2, 4 texts of 128 tokens; about three minutes on two cores

Each row is a process of its own; the rows take turns, and each keeps its fastest step. Memory is the process's peak,
libraries and weights included. The ratios are to LoRA in the reference.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

ROWS = {
    "reference, full fine-tuning": {},
    "reference, LoRA": {},
    "package, float32": {"dtype": "float32"},
    "package, activation checkpointing": {"recompute": True},
    "package, 4-bit base": {"quantized": True},
    "package, bfloat16": {"dtype": "bfloat16"},
}


def steps_of(name):
    """A function that takes one training step and returns its loss."""
    import minilora as ml
    from minilora import reference as ref

    model, _ = ml.load("smollm2", **ROWS[name])
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 128))
    if name.startswith("reference"):
        full = name.endswith("full fine-tuning")
        weights = {n: ref.Tensor(p.data, ref.Node() if full else None) for n, p in model.named_parameters()}
        lora = None if full else ref.LoRA(weights)
        endless = ref.train(iter(lambda: (ids, ids), None), weights, model.config, lora)
        return lambda: next(endless)
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = ml.AdamW(model.trainable_parameters(), lr=1e-3, weight_decay=0.0)

    def step():
        optimizer.zero_grad()
        loss = ml.loss_and_grad(model, ids, ids)
        optimizer.step()
        return loss.item()

    return step


def serve(name):
    """In a process of its own: a step for each line of input, answered with its seconds, loss and the peak so far."""
    step = steps_of(name)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps([time.perf_counter() - began, loss, peak]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        return serve(options.row)
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    found = {name: [] for name in ROWS}
    processes = {name: subprocess.Popen([sys.executable, __file__, "--row", name], **pipe) for name in ROWS}
    for _ in range(options.rounds):
        for name, process in processes.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            found[name].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    fastest = {name: min(seconds for seconds, _, _ in rows) for name, rows in found.items()}
    peaks = {name: rows[-1][2] for name, rows in found.items()}
    one = "reference, LoRA"
    print(f"{'':36}{'seconds':>9}{'ratio':>7}{'MB':>8}{'ratio':>7}   losses")
    for name in ROWS:
        losses = " ".join(f"{loss:.4f}" for _, loss, _ in found[name][:3])
        seconds, peak = fastest[name], peaks[name]
        ratios = f"{seconds / fastest[one]:7.2f}{peak / 1e6:8,.0f}{peak / peaks[one]:7.2f}"
        print(f"{name:36}{seconds:9.2f}{ratios}   {losses}")


if __name__ == "__main__":
    main()

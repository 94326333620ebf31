"""A LoRA step of models as large as Qwen3-0.6B and Llama-3.2-1B, with random weights: its seconds and its memory.

    python tests/benchmarks/big.py write FOLDER          # both models in bfloat16: 3.7 GB
    python tests/benchmarks/big.py step FOLDER/qwen3     # one process for each way to train it, a line of a table each
    python tests/benchmarks/big.py step FOLDER/llama3 --ways bf16 peft-bfloat16

A step is that of LoRA on every linear layer with r=8, of one sequence of 256 tokens, all of which are scored. The
memory is the peak of the process, from its start, and with it the loading.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from contenders import peft_model, torch_training

from minilora.engine.parallel import cores
from minilora.files.disk import write_json
from minilora.measure.bench import Settings, lora
from minilora.measure.environment import machine
from minilora.measure.process import peak_memory
from minilora.models.load import locate
from minilora.nn.families import config_to_json, empty_model
from minilora.nn.llama import Config
from minilora.nn.rope import RopeScaling

SHAPES = {
    "qwen3": Config(151936, 1024, 3072, 28, 16, 8, 128, 40960, 1e-6, 1e6, model_type="qwen3", qk_norm=True),
    "llama3": Config(128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, 5e5, rope_scaling=RopeScaling(32, 1, 4, 8192)),
}
WAYS = {  # by name, from the settings to a function that takes a step
    "float32": lambda s: lora(s),
    "bf16": lambda s: lora(s, dtype="bfloat16"),
    "nf4-recompute": lambda s: lora(s, quantized="nf4", recompute=True),
    "peft-float32": lambda s: torch_training(peft_model(s.base), s),
    "peft-bfloat16": lambda s: torch_training(peft_model(s.base, "bfloat16"), s),
}


def write(folder, config, shards=2):
    """A folder of a model with random weights in bfloat16, N(0, 0.02²), in several files, with the tiny tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, weight_map = np.random.default_rng(0), {}
    shapes = {name: w.shape for name, w in empty_model(config).state_dict().items()}
    for i in range(shards):
        name_of_file, header, end = f"model-{i + 1:05}-of-{shards:05}.safetensors", {}, 0
        for name in list(shapes)[i::shards]:
            start, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name_of_file).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in header:
                w = np.ones(shapes[name], np.float32)
                if w.ndim == 2:
                    w = rng.standard_normal(w.shape, np.float32) * np.float32(0.02)
                file.write((w.view(np.uint32) >> 16).astype(np.uint16))
        weight_map |= dict.fromkeys(header, name_of_file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config_to_json(config) | {"dtype": "bfloat16"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate("tiny") / name, folder)


def take_steps(way, folder, length, steps):
    """Seconds of each step, and the peak memory of this process."""
    step = WAYS[way](Settings(str(folder), batch_size=1, length=length))
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "peak": peak_memory()}


def main():
    """Write the models, or take the steps, each way in its own process."""
    parser = argparse.ArgumentParser(description="A LoRA step of big models with random weights.")
    parser.add_argument("what", choices=("write", "step", "one"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--length", type=int, default=256, help="tokens of the sequence (default: 256)")
    parser.add_argument("--steps", type=int, default=3, help="the fastest of which counts (default: 3)")
    asked = parser.parse_args()
    if asked.what == "write":
        for name, config in SHAPES.items():
            write(asked.folder / name, config)
        return
    if asked.what == "one":
        warnings.simplefilter("ignore")
        print(json.dumps(take_steps(asked.ways[0], asked.folder, asked.length, asked.steps)))
        return
    print(f"{machine()['processor']}, {cores()} threads, 1 x {asked.length} tokens\n")
    print("| way | s | peak GB |\n|---|--:|--:|", flush=True)
    for way in asked.ways:
        more = ["--length", str(asked.length), "--steps", str(asked.steps)]
        command = [sys.executable, __file__, "one", str(asked.folder), "--ways", way, *more]
        out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        found = json.loads(out.splitlines()[-1])
        print(f"| {way} | {min(found['seconds']):.1f} | {found['peak'] / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()

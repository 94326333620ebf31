"""Adapters for mlx-lm, which runs models on Apple's GPUs: a folder of `adapters.safetensors` and `adapter_config.json`.

mlx-lm computes y = x Wᵀ + scale (x lora_a) lora_b: its matrices are PEFT's transposed, and one rank and one scale hold
for all modules. Lower ranks are filled up with zeros, and another scale is multiplied into lora_b. It gives an adapter
to every module of a block that is named in "keys"; those without tensors in the file have no effect, since a new lora_b
is zero.
Source: mlx-lm's tuner/utils.py (load_adapters, linear_to_lora_layers) and tuner/lora.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ..files.disk import replacing_folder, write_json
from ..files.tensors import in_dtype, write_tensors
from ..nn.language_model import LanguageModel
from .adapters import adapter_weights, factors_for

_BLOCKS = "model.layers."
CONFIG_FILE, WEIGHTS_FILE = FILES = "adapter_config.json", "adapters.safetensors"


def save_mlx_adapter(model: LanguageModel, folder: str | Path, name: str = "default", dtype: str = "float32") -> Path:
    """Write one adapter as mlx-lm reads it, in float32 or float16; return the folder. It appears whole or not at all.

    Raises ValueError for an unknown name, for values too large for `dtype`, and for an adapter that mlx-lm's files
    cannot express and must be merged.
    """
    folder = Path(folder)
    weights, pairs = adapter_weights(model, name), factors_for("mlx-lm", model, name)
    if others := [module for module in pairs if not module.startswith(_BLOCKS)]:
        what = "an adapter outside of the blocks in this form"
        raise ValueError(f"{others[0]}: mlx-lm's adapter files cannot hold {what}: merge the adapter instead")
    rank = max(len(a) for a, _ in pairs.values())
    scale = Counter(float(own.scale) for own in weights.values()).most_common(1)[0][0]
    tensors = {}
    for module, (a, b) in pairs.items():
        missing = rank - len(a)
        tensors[f"{module}.lora_a"] = np.pad(a.T, ((0, 0), (0, missing)))  # (n, r)
        quotient = b.dtype.type(float(weights[module].scale) / scale)
        tensors[f"{module}.lora_b"] = np.pad(b.T * quotient, ((0, missing), (0, 0)))  # (r, m)
    keys = sorted({module.removeprefix(_BLOCKS).partition(".")[2] for module in pairs})
    settings = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    tensors = in_dtype(tensors, dtype, "--dtype float32")
    with replacing_folder(folder) as partial:
        write_json(partial / CONFIG_FILE, {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": settings})
        write_tensors(partial / WEIGHTS_FILE, tensors)
    return folder

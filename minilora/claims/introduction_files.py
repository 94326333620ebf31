"""The usual introduction: an adapter takes little storage."""

import tempfile
from pathlib import Path
from typing import Any

from ..experiments.claim import FEW, Claim, Effect, Setting
from ..lora.adapters import add_adapter
from ..lora.config import LoraConfig
from ..lora.layer import LoraLinear
from ..lora.peft import save_adapter
from ..models.load import load
from ._introduction import SOURCE, bars_figure

CLAIM = Claim(
    source=SOURCE,
    where="LoRA (arXiv 2106.09685), section 4.2, has the number",
    says="An adapter takes little storage, so that one base can have many: GPT-3's goes from 350 GB to 35 MB.",
    here="The folder of an adapter (r = 8, all linear layers) as it is saved, compared with all weights in float32,"
    " which full fine-tuning has to store. Little is defined as at most a tenth. Nothing in it is random: one number.",
    switch="The same update is stored multiplied out, as a whole matrix for each one that it changes.",
    base="smollm2",
    minutes=0.2,
    band=FEW.of("bytes of an adapter, as a share of all weights"),
    seeds=(0,),
    effect=Effect(paper=1e-4, none=1, std=0),
)


def run(setting: Setting) -> dict[str, Any]:
    """The adapter's share of the bytes."""
    model, _ = load("tiny" if setting.small else "smollm2")
    whole = 4 * sum(parameter.size for _, parameter in model.named_parameters())
    add_adapter(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="adapter", seed=0)
    if setting.switched:
        layers = [module for _, module in model.named_modules() if isinstance(module, LoraLinear)]
        size = 4 * sum(layer.weight.size for layer in layers)
    else:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, Path(folder) / "adapter", name="adapter")
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"measured": [size / whole] * len(setting.seeds), "adapter, bytes": size, "all weights, bytes": whole}


def picture(numbers: dict[str, Any]) -> Any:
    """Storage of one adapter and of ten, the base counted once for LoRA."""
    adapter, whole = numbers["adapter, bytes"] / 1e6, numbers["all weights, bytes"] / 1e6
    rows = {"one adapter": (adapter, whole), "a base and ten": (whole + 10 * adapter, 11 * whole)}
    return bars_figure(rows, "MB", "What is stored")

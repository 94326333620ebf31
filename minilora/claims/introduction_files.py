"""The usual introduction: what is stored of a version is small."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..experiments.claim import FEW, Claim, Setting
from ..lora.adapters import add_adapter
from ..lora.config import LoraConfig
from ..lora.layer import LoraLayer
from ..lora.peft import save_adapter
from ..models.load import load
from ._introduction import SOURCE, draw_bars

CLAIM = Claim(
    source=SOURCE,
    where="LoRA (arXiv 2106.09685), section 4.2, has the number",
    says="A version takes little storage, so that one base can have many: GPT-3's goes from 350 GB to 35 MB.",
    here="The folder of an adapter (r = 8, all linear maps) as it is saved, beside the float32 numbers of all weights,"
    " which full fine-tuning has to store. Small is fixed as a tenth at most. Nothing in it is random: one number.",
    switch="The same update is stored multiplied out, a whole matrix for each that it changes.",
    base="smollm2",
    minutes=0.2,
    band=FEW.of("bytes of a version with LoRA, as a share of full fine-tuning's"),
    seeds=(0,),
)


def run(setting: Setting) -> dict[str, Any]:
    """The adapter's share of the bytes."""
    model, _ = load("tiny" if setting.small else "smollm2")
    whole = 4 * sum(parameter.size for _, parameter in model.named_parameters())
    add_adapter(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="version", seed=0)
    if setting.switched:
        layers = [module for _, module in model.named_modules() if isinstance(module, LoraLayer)]
        version = 4 * sum(layer.weight.size for layer in layers)
    else:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, Path(folder) / "version", name="version")
            version = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"measured": [version / whole] * len(setting.seeds), "version, bytes": version, "whole, bytes": whole}


def picture(numbers: dict[str, Any]) -> Any:
    """Storage of ten versions, the base counted once for LoRA."""
    from ..pages.style import panels

    figure, axes = panels(width=7, height=3)
    version, whole = numbers["version, bytes"] / 1e6, numbers["whole, bytes"] / 1e6
    rows = {"one version": (version, whole), "a base and ten": (whole + 10 * version, 11 * whole)}
    draw_bars(axes, rows, "MB")
    axes.set_title("What is stored")
    return figure

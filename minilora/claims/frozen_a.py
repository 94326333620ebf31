"""LoRA-FA: with A frozen as it was initialised, an adapter ends close to LoRA."""

from typing import Any

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import tiny_run
from ..experiments.tuned import as_numbers
from ..pages.rates import losses_figure

CLAIM = Claim(
    source="LoRA-FA (Zhang et al. 2023, arXiv 2308.03303)",
    where="abstract",
    says="The projection-down A is frozen and only the projection-up B is trained. The accuracy is close to that of"
    " LoRA and of full fine-tuning, and the total memory is up to 1.4 times smaller than LoRA's, because the layers'"
    " inputs need not be saved. (The memory is counted in lesson 14.)",
    here="LoRA with and without a frozen A, r = 8 on every linear layer; 60 steps on law, each at its own best learning"
    " rate by validation loss. Measured: the test loss with A frozen above that of LoRA.",
    switch="With A frozen the learning rate is 0.000316.",
    base="tiny",
    minutes=2,
    band=Band("test loss with A frozen above LoRA's, %", high=2, against_above=4),
    small_band=Band("the same with eight steps, at rates that were best for sixty", high=4, against_above=6),
    effect=Effect(paper=0, none=4, std=0.64),
)
NAMES = {"lora": "LoRA", "lora-fa": "LoRA-FA"}
ONE_RATE = 3.16e-4


def run(setting: Setting) -> dict[str, Any]:
    """Tune both, and compare them seed by seed."""
    few = {"steps": 8, "batch_size": 2, "held_out": 4} if setting.small else {}
    rates = {"lora": 1e-2, "lora-fa": ONE_RATE if setting.switched else 1e-2}
    contenders = {NAMES[variant]: {"lr": lr, "variant": variant, **few} for variant, lr in rates.items()}
    numbers = as_numbers(setting.tuned(tiny_run, contenders, not setting.switched))
    losses = numbers["loss on the test"]
    pairs = zip(losses["LoRA-FA"], losses["LoRA"], strict=True)
    return {"measured": [100 * (frozen / lora - 1) for frozen, lora in pairs], **numbers}


picture = losses_figure  # losses by learning rate, and with each seed

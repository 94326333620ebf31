"""Learning Rate Matters: with tuned learning rates, LoRA and its variants end within one or two percent."""

from typing import Any

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import tiny_run
from ..experiments.tuned import as_numbers
from ..pages.rates import losses_figure

CLAIM = Claim(
    source="Lee, Ko, Chen & Yeh 2026, Learning Rate Matters: Vanilla LoRA May Suffice for LLM Fine-tuning "
    "(arXiv 2602.04998)",
    where="abstract",
    says="Variants prefer different ranges of learning rates. With tuned rates all of them, plain LoRA included,"
    " reach about the same: within 1 to 2 %. (There it is accuracy in mathematics, code and others; here it is the"
    " loss.)",
    here="LoRA, rsLoRA, LoRA+, DoRA and PiSSA with r = 8 on every linear layer; 60 steps on law, each at its own best"
    " learning rate by validation loss. Measured: the test loss of the worst above that of the best.",
    switch="All take one learning rate, 0.000316.",
    base="tiny",
    minutes=3,
    band=Band("loss of the worst of five variants above that of the best, %", high=2, against_above=4),
    small_band=Band("the same with eight steps, at rates that were best for sixty", high=3.5, against_above=8),
    effect=Effect(paper=1.5, none=4, std=0.42),
)
BEGIN = {"lora": 1e-2, "rslora": 3.16e-3, "lora+": 1e-3, "dora": 1e-2, "pissa": 3.16e-3}
NAMES = {"lora": "LoRA", "rslora": "rsLoRA", "lora+": "LoRA+", "dora": "DoRA", "pissa": "PiSSA"}
ONE_RATE = 3.16e-4


def run(setting: Setting) -> dict[str, Any]:
    """Tune all five, and compare the worst with the best for each seed."""
    few = {"steps": 8, "batch_size": 2, "held_out": 4} if setting.small else {}
    contenders = {
        NAMES[variant]: {"lr": ONE_RATE if setting.switched else lr, "variant": variant, **few}
        for variant, lr in BEGIN.items()
    }
    found = setting.tuned(tiny_run, contenders, not setting.switched)
    numbers = as_numbers(found)
    losses = numbers["loss on the test"]
    return {
        "measured": [100 * (max(of_seed) / min(of_seed) - 1) for of_seed in zip(*losses.values(), strict=True)],
        **numbers,
    }


picture = losses_figure  # losses by learning rate, and with each seed

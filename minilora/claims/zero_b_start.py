"""The Impact of Initialization on LoRA: B zero and A random allows larger learning rates, and ends better."""

from typing import Any

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import tiny_run
from ..experiments.tuned import as_numbers, vertex
from ..pages import style
from ..pages.rates import losses_figure

CLAIM = Claim(
    source="Hayou, Ghosh & Yu 2024, The Impact of Initialization on LoRA Finetuning Dynamics (arXiv 2406.08447)",
    where="abstract",
    says="Either factor may be initialised to zero, so that the update is zero at first. With B zero and A random,"
    " training ends better on average than with A zero and B random, probably because larger learning rates stay"
    " stable.",
    here="LoRA with r = 8 on every linear layer, with B zero (A uniform in ±1/sqrt(n), n inputs) and with A zero (B"
    " normal, with variance 1/r); 30 steps on law, each at its own best learning rate by validation loss. Measured:"
    " the test loss with A zero above that with B zero.",
    switch="B is zero in both, which differ only in the seed.",
    base="tiny",
    minutes=1,
    band=Band("test loss with A zero above that with B zero, %", low=0.5, against_below=0),
    small_band=Band("the same with a few steps and records, which vary more", low=0.5, against_below=-4),
    effect=Effect(paper=1, none=0, std=0.13, assumed=True),
)
B_ZERO, A_ZERO = "B zero, A random", "A zero, B random"
BEGIN = {"lora": 1e-2, "zero-a": 1e-3}


def run(setting: Setting) -> dict[str, Any]:
    """Tune both, and compare their losses and their best learning rates."""
    few: dict[str, Any] = {"steps": 6, "batch_size": 2, "held_out": 4} if setting.small else {"steps": 30}
    variants = {B_ZERO: "lora", A_ZERO: "lora" if setting.switched else "zero-a"}
    contenders = {name: {"lr": BEGIN[variant], "variant": variant, **few} for name, variant in variants.items()}
    found = setting.tuned(tiny_run, contenders)
    rates = {name: vertex(one["tried"]) for name, one in found.items()}
    numbers = as_numbers(found)
    losses = numbers["loss on the test"]
    if setting.switched:
        other = [{"lr": found[B_ZERO]["lr"], "seed": seed + 100, **few} for seed in setting.seeds]
        losses[A_ZERO] = [result["test"] for result in setting.each(tiny_run, other)]
    return {
        "measured": [100 * (a / b - 1) for a, b in zip(losses[A_ZERO], losses[B_ZERO], strict=True)],
        "best rate by parabola": rates,
        **numbers,
    }


def picture(numbers: dict[str, Any]) -> Any:
    """Losses by learning rate, and with each seed."""
    colors = {B_ZERO: style.B, A_ZERO: style.A}
    return losses_figure(numbers, colors)

"""The usual introduction: experiments are much cheaper."""

from statistics import median
from typing import Any

from ..experiments.claim import LOW, Claim, Effect, OnSmolLM2, Setting
from ..experiments.tuned import first_step
from ._introduction import SOURCE, best_runs, curves_figure, losses_of
from .introduction_speed import products, timed

DEARER = 10  # times the price: the machine for full fine-tuning, with the effect put in by hand

CLAIM = Claim(
    source=SOURCE,
    where="why LoRA matters: high cost, much cheaper experiments",
    says="Experiments are much cheaper with LoRA than with full fine-tuning.",
    here="A machine is paid by time. Both methods teach the tiny base legal answers, each at its best"
    " learning rate, until the validation loss that both reach. Measured: the steps of each, times the time of one"
    " step, which is timed in turns (in the smallest form, its multiplications). Much cheaper is defined as at most a"
    " third of the cost.",
    switch="The effect is put in by hand: full fine-tuning needs a machine of ten times the price.",
    base="tiny",
    minutes=4,
    band=LOW.of("cost of the same loss with LoRA, as a share of full fine-tuning's"),
    explained={
        "contradicted": "LoRA cost three to four times as much: it reached its lowest loss after 96 steps and full"
        " fine-tuning the same loss after 25, and a step of LoRA takes nearly as long here (0.87 of the time on an idle"
        " AMD EPYC). That LoRA needs all its 96 steps follows"
        " from the measure: the loss that both reach is LoRA's lowest. And time is not the whole price: where memory"
        " is paid for as well, byte-seconds count. On SmolLM2 LoRA costs half. It is cheap where it runs on a machine"
        " that is too small for full fine-tuning, as the switch shows.",
        "not at this size": "On one machine LoRA is hardly cheaper than full fine-tuning: its steps take less time,"
        " at best two thirds, but it needs as many. It is cheap where it runs on a machine that is too small for full"
        " fine-tuning: there memory decides the cost, as the switch shows.",
    },
    effect=Effect(paper=0.25, none=1, std=0.057, assumed=True),
    on_smollm2=OnSmolLM2(
        here="The same with SmolLM2, 40 steps of 8, with the validation loss every 10 steps, interpolated linearly in"
        " between; each best learning rate is that of the first seed.",
        minutes=3,
        shares_with="forgets-less",
        effect=Effect(paper=0.25, none=1, std=0.057, assumed=True),
        explained={
            "not at this size": "LoRA reaches the same loss in as many steps (33 to 40, full fine-tuning 39 to 40), and"
            " a step of it takes 0.58 of the time: half of the cost, where a third would be much cheaper. At 0.38 of"
            " the memory ([introduction-memory](#introduction-memory)) it is a fifth of the byte-seconds. That both"
            " need nearly all of their steps follows from the measure, the loss that both reach.",
        },
    ),
)


def run(setting: Setting) -> dict[str, Any]:
    """LoRA's share of the cost, seed by seed."""
    runs = best_runs(setting)
    steps = []
    for lora, full in zip(runs["lora"], runs["full"], strict=True):
        both = max(min(loss for _, loss in run["curve"]) for run in (lora, full))
        steps.append([first_step(run["curve"], both) for run in (lora, full)])
    pairs = [products("tiny")] if setting.small else timed(setting.base, len(setting.seeds))
    pace = median(lora / full for lora, full in pairs)
    price = 1 / DEARER if setting.switched else 1.0
    measured = [price * pace * lora / full for lora, full in steps]
    of_steps = {"steps of LoRA": [lora for lora, _ in steps], "steps of full": [full for _, full in steps]}
    return {"measured": measured, "one step, LoRA over full": pace, **of_steps, **losses_of(runs)}


def picture(numbers: dict[str, Any]) -> Any:
    """Both validation losses during training."""
    pace = numbers["one step, LoRA over full"]
    return curves_figure(numbers["curves"], f"A step of LoRA takes {pace:.2f} of the time of a full one")

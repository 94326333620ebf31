"""QLoRA: an adapter that learns over a base in NF4 learns as much as over the base itself."""

from typing import Any

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import lora_config, samples_of
from ..lora.adapters import add_adapter
from ..lora.config import ALL_LINEAR
from ..measure.loss import evenly, mean_loss
from ..models.load import load
from ..train.loop import fit

CLAIM = Claim(
    source="QLoRA (Dettmers et al. 2023, arXiv 2305.14314)",
    where="section 4, tables 3 and 4",
    says="What rounding to 4 bits loses is fully recovered by fine-tuning an adapter over the rounded base: mean MMLU"
    " of LLaMA 7B to 65B is 53.1 with NF4 and double quantisation, 53.0 with BF16 and 52.2 with FP4.",
    here="LoRA of rank 8 on every linear layer of the tiny base, 60 steps on law over the base in 32 bits and over the"
    " base in NF4, each at its own best learning rate, with the same initialisation and batches. Measured: of the test"
    " loss that rounding costs before training, the share that is gone after it. (An earlier band was about the final"
    " losses, within 1 %. It could not fail: rounding costs less than that before any training.)",
    switch="The effect is put in by hand: nothing is rounded, so that all is recovered.",
    base="tiny",
    minutes=4,
    band=Band("share of the loss by rounding that training recovers", low=0.8, against_below=0.2),
    seeds=tuple(range(9)),
    effect=Effect(paper=1, none=0, std=0.6),
    explained={
        "not at this size": "Rounding costs 0.013 nats before training and 0.009 after it, on average: a third is gone."
        " But seeds differ by as much as the whole cost, which is 0.3 % of the loss: this base in NF4 has hardly"
        " anything to recover. A base that loses more, at 3 bits or of another size, was not tried."
    },
)


def train(quantized: bool | str, lr: float, seed: int, steps: int, held_out: int) -> dict[str, Any]:
    """The losses of every step, on the test before and after, and on validation."""
    model, _ = load("tiny", quantized=quantized)
    sets = samples_of("legal")
    held = evenly(sets["test"], held_out)
    before = mean_loss(model, held)
    add_adapter(model, lora_config(8, 32, ALL_LINEAR), seed=seed)
    losses = fit(model, sets["train"], steps, lr, 4, seed).losses
    model.eval()
    validation = mean_loss(model, evenly(sets["validation"], held_out))
    return {"before": before, "after": mean_loss(model, held), "validation": validation, "train": losses}


def run(setting: Setting) -> dict[str, Any]:
    """Both ends, for every seed."""
    steps, held_out = (6, 10) if setting.small else (60, 60)
    common: dict[str, Any] = {"lr": 1e-2, "steps": steps, "held_out": held_out}
    contenders = {"32 bits": common | {"quantized": False}, "NF4": common | {"quantized": "nf4"}}
    found = setting.tuned(train, contenders)
    whole, nf4 = (one["runs"] for one in found.values())
    costs = [[own[at] - one[at] for own, one in zip(nf4, whole, strict=True)] for at in ("before", "after")]
    left = [0.0] * len(nf4) if setting.switched else costs[1]
    return {
        "measured": [1 - after / before for before, after in zip(costs[0], left, strict=True)],
        "cost before, nats": costs[0][0],
        "cost after, nats": costs[1],
        "rates": {name: one["lr"] for name, one in found.items()},
        "whole": whole,
        "nf4": nf4,
    }


def picture(numbers: dict[str, Any]) -> Any:
    """The training losses of the first seed, and for each seed what rounding costs before and after training."""
    from ..pages.style import BASE, LORA, VALIDATION, panels

    figure, (curves, costs) = panels(2, width=9)
    for name, color, label in (("whole", LORA, "over 32 bits"), ("nf4", VALIDATION, "over NF4")):
        curves.plot(numbers[name][0]["train"], color=color, label=label)
    curves.set(xlabel="step", ylabel="training loss (nats per token)")
    curves.legend(frameon=False)
    for after in numbers["cost after, nats"]:
        costs.plot([0, 1], [numbers["cost before, nats"], after], "o-", color=VALIDATION, linewidth=1)
    costs.axhline(0, color=BASE, linewidth=1)
    costs.set_xticks([0, 1], ["before training", "after"])
    costs.set(xlim=(-0.3, 1.3), ylabel="cost of rounding (nats per token)")
    return figure

"""LoRA Without Regret: large batches hurt LoRA more than full fine-tuning."""

from statistics import mean
from typing import Any

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import tiny_run

CLAIM = Claim(
    source="Schulman et al. 2025, LoRA Without Regret, Thinking Machines",
    where="Batch size effects, figure 3",
    says="In some settings LoRA tolerates large batches less well: with 10,000 examples of OpenThoughts3, the gap in"
    " loss between LoRA and full fine-tuning is small at batch size 32 and grows with the batch size, whatever the"
    " rank.",
    here="The tiny base on law: the same 480 samples in 120 steps of 4 and in 15 steps of 32, by LoRA (r = 8, all"
    " linear layers) and by full fine-tuning, each of the four at its own best learning rate. Measured: LoRA's test"
    " loss minus full fine-tuning's at batch size 32, minus the same at batch size 4.",
    switch="Full fine-tuning replaces LoRA.",
    base="tiny",
    minutes=12,
    band=Band("growth of LoRA's gap from small to large batches (nats)", low=0.02, against_below=0),
    small_band=Band("growth of LoRA's gap from small to large batches (nats)", low=-0.01),
    seeds=tuple(range(9)),
    explained={
        "reproduced": "LoRA's gap grows from 0.153 to 0.175 nats, by little more than the band asks for: with three"
        " seeds the interval reached below zero, with nine it does not. The paper's gap grows at batch"
        " sizes above 32, with 10,000 examples; here there are 240.",
    },
    effect=Effect(paper=0.03, none=0, std=0.011, assumed=True),
)


def run(setting: Setting) -> dict[str, Any]:
    """The test's loss of both methods with small and large batches."""
    samples, batches = (32, (2, 16)) if setting.small else (480, (4, 32))
    size: dict[str, Any] = {"held_out": 6} if setting.small else {}
    start = {"lora": (3e-3, 1e-2), "full": (1e-3, 2e-3)}  # for small and large batches
    contenders: dict[str, dict[str, Any]] = {
        f"{name}, {batch}": {"method": method, "lr": lr, "batch_size": batch, "steps": samples // batch, **size}
        for name, method in (("LoRA", "full" if setting.switched else "lora"), ("full", "full"))
        for batch, lr in zip(batches, start[method], strict=True)
    }
    found = setting.tuned(tiny_run, contenders, per_decade=4)
    loss = {name: [each["test"] for each in one["runs"]] for name, one in found.items()}
    small, large = ([a - b for a, b in zip(loss[f"LoRA, {n}"], loss[f"full, {n}"], strict=True)] for n in batches)
    return {
        "measured": [b - a for a, b in zip(small, large, strict=True)],
        "batches": list(batches),
        "loss": loss,
        "lr": {name: one["lr"] for name, one in found.items()},
        "gap": [mean(small), mean(large)],
    }


def picture(numbers: dict[str, Any]) -> Any:
    """Loss against batch size."""
    from ..pages.style import FULL, LORA, name_lines, panels

    figure, axes = panels(width=6)
    ends = []
    for name, color, marker in (("LoRA", LORA, "o"), ("full", FULL, "s")):
        losses = [numbers["loss"][f"{name}, {batch}"] for batch in numbers["batches"]]
        for batch, some in zip(numbers["batches"], losses, strict=True):
            axes.plot([batch] * len(some), some, marker, color=color)
        means = [mean(some) for some in losses]
        axes.plot(numbers["batches"], means, color=color, linewidth=2)
        ends.append((means[-1], "LoRA" if name == "LoRA" else "full\nfine-tuning", color))
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers["batches"], [str(batch) for batch in numbers["batches"]])
    axes.set(xlabel="batch size; the number of samples is the same", ylabel="test loss (nats)")
    axes.set_title("A dot for each seed, each line at its best rates")
    name_lines(axes, ends)
    return figure

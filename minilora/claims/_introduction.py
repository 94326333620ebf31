"""What the claims of the usual introduction to LoRA share: their source, and a run that several of them look at."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data.records import read_records
from ..data.samples import encode_records
from ..data.splits import split_records
from ..experiments.claim import Setting
from ..lora.adapters import add_adapter
from ..lora.config import LoraConfig
from ..measure.loss import evenly, mean_loss
from ..models.load import load
from ..nn.parts import Sample
from ..train.loop import fit
from .planted_rank import train as train_matrix

SOURCE = "The usual introduction to LoRA"
RATES = {"lora": (5e-3, 1e-2, 2e-2), "full": (5e-4, 1e-3, 2e-3)}  # tried for each; the best on validation is taken
COMPLEX_RATES = {"lora": (5e-3, 1e-2, 2e-2), "full": (2e-3, 4e-3, 8e-3)}


def train(
    method: str, lr: float, seed: int, steps: int, every: int, held_out: int, shuffled: bool = False
) -> dict[str, Any]:
    """Teach the tiny base legal answers, and return its loss on the test records, before and after, and on validation
    as (step, loss).

    shuffled: every token of the vocabulary means another one, the same everywhere: a language that has to be learned
    anew. every: so many steps from one validation to the next.
    """
    model, tokenizer = load("tiny")
    splits = split_records(read_records("legal", tokenizer))
    train, test = (encode_records(splits[name], tokenizer) for name in ("train", "test"))
    if shuffled:
        means = np.random.default_rng(0).permutation(model.config.vocab_size).tolist()
        train, test = ([_in_other_words(sample, means) for sample in samples] for samples in (train, test))
    validation, test = (evenly(part, held_out) for part in (test[::2], test[1::2]))
    if method == "lora":
        add_adapter(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), seed=seed)
    else:
        model.requires_grad_(True)
    curve = [(0, mean_loss(model, validation))]
    before = mean_loss(model, test)

    def look(step: int) -> None:
        if step % every == 0:
            model.eval()
            curve.append((step, mean_loss(model, validation)))
            model.train()

    fit(model, train, steps, lr=lr, batch_size=4, seed=seed, each_step=look)
    return {"before": before, "after": mean_loss(model, test), "curve": curve}


def _in_other_words(sample: Sample, means: list[int]) -> Sample:
    ids, labels = ([means[i] if i >= 0 else i for i in row] for row in (sample.ids, sample.labels))
    return Sample(tuple(ids), tuple(labels), tuple(_in_other_words(other, means) for other in sample.others))


def best_runs(setting: Setting, shuffled: bool = False) -> dict[str, list[dict[str, Any]]]:
    """For each method, the run of every seed at the learning rate that is best on validation, over all seeds."""
    rates = COMPLEX_RATES if shuffled else RATES
    sizes = {"steps": 8, "every": 4, "held_out": 4} if setting.small else {"steps": 96, "every": 8, "held_out": 24}
    sizes |= {"shuffled": shuffled}
    found = {}
    for method in ("lora", "full"):
        tried = rates[method][-1:] if setting.small else rates[method]
        trials = [{"method": method, "lr": lr, "seed": seed, **sizes} for lr in tried for seed in setting.seeds]
        runs, n = setting.each(train, trials), len(setting.seeds)
        by_rate = [runs[i : i + n] for i in range(0, len(runs), n)]
        best = min(range(len(by_rate)), key=lambda i: sum(run["curve"][-1][1] for run in by_rate[i]))
        found[method] = [run | {"lr": tried[best]} for run in by_rate[best]]
    return found


def shares(runs: dict[str, list[dict[str, Any]]]) -> list[float]:
    """Of what full fine-tuning gains on the test records, the share that LoRA gains, seed by seed."""
    gains = ([run["before"] - run["after"] for run in runs[method]] for method in ("lora", "full"))
    return [lora / full for lora, full in zip(*gains, strict=True)]


def matrix_shares(setting: Setting, full_rank: bool) -> dict[str, Any]:
    """The same in its smallest form: a matrix learns an update of its own rank, or of full rank, with r = 4. Full
    fine-tuning gains all of it."""
    trials = [{"d": 24, "k": 4, "r": 4, "seed": seed, "full_rank": full_rank, "steps": 200} for seed in setting.seeds]
    left = [one["loss"] / one["energy"] for one in setting.each(train_matrix, trials)]
    curves = {"lora": [[(0, 1.0), (200, loss)] for loss in left], "full": [[(0, 1.0), (200, 0.0)]]}
    return {"measured": [1 - loss for loss in left], "curves": curves}


def told(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The numbers that a page shows of such runs, and their curves."""
    return {
        "before": runs["full"][0]["before"],
        **{f"{method} after": [run["after"] for run in runs[method]] for method in runs},
        **{f"{method} learning rate": runs[method][0]["lr"] for method in runs},
        "curves": {method: [run["curve"] for run in runs[method]] for method in runs},
    }


def draw_curves(axes: Any, curves: dict[str, Any]) -> None:
    """Validation loss against steps, a line for each seed."""
    from ..pages.style import FULL, LORA, name_lines

    lines = {"lora": ("LoRA", LORA, "-"), "full": ("full\nfine-tuning", FULL, "--")}
    for method, (_, color, style) in lines.items():
        for curve in curves[method]:
            axes.plot(*zip(*curve, strict=True), color=color, linestyle=style)
    axes.set(xlabel="step", ylabel="validation loss (nats)")
    name_lines(axes, [(curves[m][0][-1][1], name, color) for m, (name, color, _) in lines.items()])


def draw_bars(axes: Any, rows: dict[str, tuple[float, float]], unit: str) -> None:
    """For each thing, a bar of LoRA's and one of full fine-tuning's, with their numbers."""
    from ..pages.style import FULL, LORA, ink

    for y, (_name, numbers) in enumerate(rows.items()):
        for number, color, method, shift in zip(numbers, (LORA, FULL), ("LoRA", "full"), (-0.2, 0.2), strict=True):
            axes.barh(y + shift, number, height=0.36, color=color, alpha=0.9)
            shown = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
            axes.text(number, y + shift, f" {method} {shown}", va="center", color=ink(color))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel=unit, xlim=(0, 1.35 * max(max(numbers) for numbers in rows.values())))
    axes.invert_yaxis()

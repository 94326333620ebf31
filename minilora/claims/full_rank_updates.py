"""Learns Less and Forgets Less: the update of full fine-tuning has at least ten times the rank of a usual LoRA."""

from typing import Any

import numpy as np

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.updates import KEPT, base_matrices, read_update
from ..lora.spectra import rank_for_variance, singular_values
from ._shared import shared_runs

CLAIM = Claim(
    source="LoRA Learns Less and Forgets Less (Biderman et al. 2024, arXiv 2405.09673)",
    where="section 4.6 and figure 6",
    says="The rank that explains 90 % of the variance of full fine-tuning's update is 10 to 100 times a usual LoRA's,"
    " from the first checkpoint on (Llama-2-7B, 0.25 billion tokens of code). It is higher in MLPs than in attention.",
    here="The rank for 90 % of Σ s² of ΔW = W after - W before, over r = 8: the median over W_q, W_v and W_down of"
    " every layer, whose ranks are at most 24 to 72 times 8. Each method has the learning rate that is"
    " best for its first seed. Random matrices of the same shapes are shown for comparison: the paper notes that small"
    " Gaussian noise has such a spectrum as well.",
    switch="LoRA's update replaces that of full fine-tuning.",
    base="smollm2",
    minutes=0.1,
    shares_with="dora-directions",
    band=Band("rank for 90 % of full fine-tuning's variance, over LoRA's r (median)", low=10, against_below=1),
    effect=Effect(paper=30, none=1, std=0.11),
)


def ranks(base: str, file: str, seed: int) -> dict[str, dict[str, int]]:
    """The rank for 90 % of the variance by module: of the update in a file, and of a random matrix of its shape."""
    rng = np.random.default_rng(seed)
    shapes = {kind: next(w.shape for name, w in base_matrices(base).items() if kind in name) for kind in KEPT}
    noise = {kind: rng.standard_normal(shape) for kind, shape in shapes.items()}
    return {
        "update": {name: rank_for_variance(singular_values(one)) for name, one in read_update(file).items()},
        "noise": {kind: rank_for_variance(singular_values(x)) for kind, x in noise.items()},
    }


def run(setting: Setting) -> dict[str, Any]:
    """The ranks of full fine-tuning's update and of LoRA's."""
    base, r = ("tiny", 2) if setting.small else ("smollm2", 8)
    contenders: dict[str, dict[str, Any]] = {
        "full": {"method": "lora" if setting.switched else "full", "r": r},
        "lora": {"method": "lora", "r": r},
    }
    runs = shared_runs(setting, contenders)
    trials = [
        {"base": base, "file": one["file"], "seed": seed}
        for name in contenders
        for seed, one in zip(setting.seeds, runs[name]["runs"], strict=True)
    ]
    found = setting.each(ranks, trials)
    full, lora = found[: len(setting.seeds)], found[len(setting.seeds) :]
    return {
        "measured": [float(np.median(list(one["update"].values()))) / r for one in full],
        "r": r,
        "rates": {name: one["lr"] for name, one in runs.items()},
        "full": full[0]["update"],
        "lora": lora[0]["update"],
        "noise": full[0]["noise"],
    }


def picture(numbers: dict[str, Any]) -> Any:
    """The ranks by layer, one panel for each kind of matrix."""
    from ..pages.style import BASE, FULL, LORA, ink, panels

    figure, axes = panels(len(numbers["noise"]), width=11)
    for place, (kind, random) in zip(axes, numbers["noise"].items(), strict=True):
        for method, color, name in (("full", FULL, "full fine-tuning"), ("lora", LORA, f"LoRA, r = {numbers['r']}")):
            found = {int(module.split(".")[2]): k for module, k in numbers[method].items() if kind in module}
            place.plot(sorted(found), [found[layer] for layer in sorted(found)], "o-", color=color, label=name)
        place.axhline(random, color=BASE, linestyle="--", label="a random matrix")
        place.axhline(10 * numbers["r"], color=ink(BASE), linewidth=0.8, label="10 r")
        place.xaxis.get_major_locator().set_params(integer=True)
        place.set(xlabel="layer", title=kind, ylim=(0, 1.5 * random))
    axes[0].set(ylabel="rank for 90 % of the variance")
    axes[0].legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    return figure

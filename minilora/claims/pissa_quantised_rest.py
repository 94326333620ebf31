"""PiSSA: four bits lose less of a matrix if its largest part is kept out of them."""

from typing import Any

import numpy as np

from ..experiments.claim import Band, Claim, Effect, Setting
from ..files.quant import dequantize, quantize
from ..models.load import load

CLAIM = Claim(
    source="PiSSA (Meng et al. 2024, arXiv 2404.02948)",
    where="abstract; section 4 (QPiSSA) and its table of reduced errors",
    says="With W = A B + rest, where A B has the r largest singular directions, rounding the rest to NF4 loses less"
    " of W than rounding W: the nuclear norm of rest - nf4(rest) is below that of W - nf4(W).",
    here="The same for every linear layer of the tiny base (128 to 384 wide), rank 8. Measured: the share by which the"
    " nuclear norm of the error is smaller, the mean over the layers.",
    switch="The r smallest singular directions are kept out instead of the r largest.",
    base="tiny",
    minutes=0.2,
    second_hand=True,
    band=Band("share of the error's nuclear norm that is saved (mean)", low=0.02, against_below=0),
    seeds=(0,),
    explained={
        "reproduced": "The band only asks whether anything is saved. The paper's own share is 19.4 % on average; here"
        " it is 23 %, with matrices that are smaller, so that 8 directions are a larger part of them."
    },
    effect=Effect(paper=0.194, none=0, std=0),
)


def saved(seed: int, layers: int, ranks: list[int], smallest: bool) -> dict[str, list[float]]:
    """By module: 1 - error with this many directions kept out / error with none, for each rank."""
    found: dict[str, list[float]] = {}
    for name, w in load("tiny")[0].state_dict().items():
        if not name.endswith("_proj.weight") or int(name.split(".")[2]) >= layers:
            continue
        u, s, v = np.linalg.svd(w, full_matrices=False)
        found[name] = []
        for r in ranks:
            part = slice(len(s) - r, None) if smallest else slice(r)
            rest = w - (u[:, part] * s[part]) @ v[part]
            found[name].append(1 - _error(rest) / _error(w))
    return found


def _error(w: np.ndarray) -> float:
    w = np.ascontiguousarray(w, np.float32)
    return float(np.linalg.norm(w - dequantize(quantize(w, "NF4"), "NF4"), ord="nuc"))


def run(setting: Setting) -> dict[str, Any]:
    """What is saved at rank 8, and at other ranks for the picture."""
    ranks = [8] if setting.small else [1, 2, 4, 8, 16, 32]
    common: dict[str, Any] = {"layers": 1 if setting.small else 4, "ranks": ranks, "smallest": setting.switched}
    found = setting.each(saved, [common | {"seed": seed} for seed in setting.seeds])
    at = ranks.index(8)
    return {
        "measured": [float(np.mean([values[at] for values in one.values()])) for one in found],
        "ranks": ranks,
        "saved": found[0],
    }


def picture(numbers: dict[str, Any]) -> Any:
    """What is saved against rank, a line for each kind of map: the mean over layers."""
    from ..pages.rates import MARKS
    from ..pages.style import BASE, PALETTE, panels

    figure, axes = panels(width=6)
    kinds = dict.fromkeys(name.split(".")[-2] for name in numbers["saved"])
    for color, mark, kind in zip(PALETTE, MARKS, kinds, strict=False):
        mean = np.mean([values for name, values in numbers["saved"].items() if kind in name], axis=0)
        axes.plot(numbers["ranks"], 100 * mean, marker=mark, color=color, label=kind, markersize=4)
    axes.axhline(0, color=BASE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers["ranks"], numbers["ranks"])
    axes.set(xlabel="rank of the part that is not rounded", ylabel="error saved (%)")
    axes.legend(frameon=False, fontsize=9, ncols=2)
    return figure

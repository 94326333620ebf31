"""LoRA, section 7.2: the first directions of an adapter with r = 8 are those of one with r = 64."""

from dataclasses import replace
from typing import Any

import numpy as np

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.updates import read_update
from ..lora.spectra import chance_similarity, subspace_similarities
from ._shared import shared_runs

CLAIM = Claim(
    source="LoRA (Hu et al. 2021, arXiv 2106.09685)",
    where="section 7.2, figures 3 and 4",
    says="Of the A's of two adapters of GPT-3, r = 8 and r = 64, the first singular direction overlaps, φ(1, 1) above"
    " 0.5 for W_q and W_v, in other layers as well, while later ones do not. Random matrices share no direction.",
    here="Trained on the same data from different initialisations, each rank at its best learning rate: φ(1, 1) of"
    " their A's, the mean over W_q and W_v of every layer. For comparison: that of B A's right and left singular"
    " vectors, on the sides of A and of B.",
    switch="A random Gaussian matrix replaces the A with r = 64, as in the paper's figure 4.",
    base="smollm2",
    minutes=25,
    shares_with="dora-directions",
    band=Band("φ(1, 1) of A, r = 8 and r = 64 (mean over layers)", low=0.5, high=1, against_below=0.05),
    small_band=Band("φ(1, 1) of A, r = 8 and r = 16, after 16 steps", low=0.03),
    explained={
        "not at this size": "Far above chance (0.002). B, which starts from zero, has 0.47 to 0.54; A started at"
        " random. At 2e-3, two thirds of the best rate, φ(1, 1) of A was 0.14 and 0.16 (seeds 0 and 1), and of B 0.58"
        " and 0.59."
    },
    effect=Effect(paper=0.6, none=0.002, std=0.023),
)
OTHER_START = 100  # added to the seed of the adapter with the larger rank
SHOWN = 16  # its directions in the picture


def compare(few: str, many: str, seed: int, random: bool) -> dict[str, Any]:
    """φ(1, 1) by module, of A and of B A on both sides; and the mean table of φ(i, j). few, many: files of updates."""
    few_by_module, many_by_module = read_update(few), read_update(many)
    rng = np.random.default_rng(seed)
    tables: dict[str, Any] = {}
    right: dict[str, Any] = {}
    left: dict[str, Any] = {}
    for name in sorted(few_by_module, key=lambda name: ("v_proj" in name, int(name.split(".")[2]))):
        if "down_proj" in name:
            continue
        (own_b, own_a), (b, a) = few_by_module[name], many_by_module[name]
        a = rng.standard_normal(a.shape) if random else a
        tables[name] = subspace_similarities(own_a, a)
        right[name] = subspace_similarities((own_b, own_a), (b, a))
        left[name] = subspace_similarities((own_a.T, own_b.T), (a.T, b.T))
    n = a.shape[1]
    sides = {"a": tables, "right": right, "left": left}
    return {
        **{side: {name: float(table[0, 0]) for name, table in found.items()} for side, found in sides.items()},
        "table": np.mean([table[:, :SHOWN] for table in tables.values()], axis=0).round(4).tolist(),
        "chance": chance_similarity(1, 1, n),
    }


def run(setting: Setting) -> dict[str, Any]:
    """φ(1, 1) of A, and of the whole updates for comparison."""
    ranks, runs = ([8, 16] if setting.small else [8, 64]), []
    for r, seeds in zip(ranks, (setting.seeds, tuple(OTHER_START + seed for seed in setting.seeds)), strict=True):
        contender = {"A": {"method": "lora", "r": r}}
        runs.append(shared_runs(replace(setting, seeds=seeds), contender)["A"])
    files = zip(*([run["file"] for run in one["runs"]] for one in runs), strict=True)
    trials = zip(setting.seeds, files, strict=True)
    random = setting.switched
    found = setting.each(compare, [{"few": a, "many": b, "seed": seed, "random": random} for seed, (a, b) in trials])
    means = {side: [float(np.mean(list(one[side].values()))) for one in found] for side in ("a", "right", "left")}
    return {"measured": means["a"], "means": means, "ranks": ranks, "rates": [one["lr"] for one in runs]} | found[0]


def picture(numbers: dict[str, Any]) -> Any:
    """φ(1, 1) by layer over chance, and the table of φ(i, j)."""
    from ..pages.style import BASE, A, B, panels

    figure, (lines, table) = panels(2, width=11)
    for side, text, marker, color in (("a", "A", "o", A), ("left", "B A, left", "s", B)):
        for kind, filled in (("q_proj", "full"), ("v_proj", "none")):
            ys = [y for name, y in numbers[side].items() if kind in name]
            look = {"color": color, "marker": marker, "fillstyle": filled, "label": f"{text}, {kind}"}
            lines.plot(ys, markersize=5, linewidth=0.8, **look)
    lines.axhline(numbers["chance"], color=BASE, linestyle="--", label=f"chance for A: {numbers['chance']:.4f}")
    lines.axhline(0.5, color=BASE, linewidth=0.8)
    lines.xaxis.get_major_locator().set_params(integer=True)
    lines.set(xlabel="layer", ylabel="φ(1, 1)", ylim=(0, 1.02), title="The first direction of both adapters")
    lines.legend(frameon=False, ncols=2, loc="upper right", fontsize=9)
    phi = np.array(numbers["table"])
    image = table.pcolormesh(range(1, phi.shape[1] + 1), range(1, len(phi) + 1), phi, vmin=0, vmax=1)
    table.invert_yaxis()
    figure.colorbar(image, ax=table, label="φ(i, j) of A, mean over layers")
    few, many = (f"directions of r = {r}" for r in numbers["ranks"])
    table.set(xlabel=f"first j {many}", ylabel=f"first i {few}", title="How much is shared")
    return figure

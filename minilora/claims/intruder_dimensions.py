"""An Illusion of Equivalence: LoRA brings singular directions that the base lacks; full fine-tuning does not."""

from typing import Any

import numpy as np

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.updates import RATES, base_matrices, read_update, train_update
from ..lora.spectra import intruder_dimensions, svd

CLAIM = Claim(
    source="LoRA vs Full Fine-tuning: An Illusion of Equivalence (Shuttleworth et al. 2024, arXiv 2410.21228)",
    where="definition 1, section 3",
    says="With LoRA of r up to 16, some of the first 10 left singular vectors of W + ΔW resemble none of W's (every"
    " cosine below ε), at low ε as well; with full fine-tuning hardly any do (RoBERTa-base on six tasks, larger"
    " models).",
    here="Directions whose every |cosine| is below 0.5, among the first 10 of W_q and W_v, per matrix: LoRA with r ="
    " 8 minus full fine-tuning, 60 steps on law, each at its best learning rate by validation loss. Controls of the"
    " same Frobenius norm as LoRA's update: full fine-tuning's update, random noise of full rank, and LoRA's own"
    " singular values along random directions.",
    switch="The effect is put in by hand: LoRA's update is three times as large.",
    base="tiny",
    minutes=2,
    band=Band("intruders per matrix: LoRA less full", low=0.5, against_below=0),
    small_band=Band("intruders per matrix: LoRA less full", low=1),
    second_hand=True,
    explained={
        "not at this size": "The sign is the paper's in all three seeds: LoRA at its best rate (1e-2) has 0.46"
        " intruders per matrix, full fine-tuning (1e-3) none, and noise 0.08. The mean is just below the band. And"
        " the update's size explains it as well as its rank: full fine-tuning's update, scaled to LoRA's norm, has"
        " 0.54, and random directions with LoRA's singular values have 0.58. An earlier form on SmolLM2, 40 steps at"
        " an untuned rate, found none: its update was too small (largest singular value 0.4 to 1.4, W's 3 to 82)."
    },
    effect=Effect(paper=1, none=0, std=0.2),
)
TOLD = {
    "lora": "LoRA, r = 8",
    "full": "full",
    "full, scaled": "full, as large\nas LoRA's",
    "noise": "noise, as large",
    "low rank": "random directions,\nLoRA's values",
}
BEGIN = {"lora": 1e-2, "full": 1e-3}


def count(lora: str, full: str, seed: int, times: float = 1) -> dict[str, list[int]]:
    """Intruders in each matrix, by update. lora, full: the files of both updates. times: how large LoRA's is."""
    lora_update, full_update, rng = read_update(lora), read_update(full), np.random.default_rng(seed)
    found: dict[str, list[int]] = {name: [] for name in TOLD}
    for name, w in base_matrices("tiny").items():
        if "down_proj" in name:
            continue
        (b, a), (m, n) = lora_update[name], w.shape
        s = times * svd((b, a)).s
        norm, delta, noise = float(np.linalg.norm(s)), full_update[name], rng.standard_normal((m, n))
        u, v = (np.linalg.qr(rng.standard_normal((d, len(s))))[0] for d in (m, n))
        updates = (times * (b @ a), delta, _scaled(delta, norm), _scaled(noise, norm), (u * s) @ v.T)
        for kind, update in zip(TOLD, updates, strict=True):
            found[kind].append(intruder_dimensions(w, w + update.astype(w.dtype), k=10, epsilon=0.5))
    return found


def _scaled(update: np.ndarray, norm: float) -> np.ndarray:
    return update * (norm / np.linalg.norm(update))


def run(setting: Setting) -> dict[str, Any]:
    """Intruders per matrix with LoRA less those with full fine-tuning."""
    begin, steps = (RATES["tiny"], 16) if setting.small else (BEGIN, 60)
    common = {"base": "tiny", "data": "legal", "steps": steps, "batch_size": 4, "folder": setting.updates}
    contenders = {method: common | {"method": method, "lr": begin[method]} for method in BEGIN}
    runs = setting.tuned(train_update, contenders)
    files = zip(*([run["file"] for run in runs[method]["runs"]] for method in BEGIN), strict=True)
    more: dict[str, Any] = {"times": 3} if setting.switched else {}
    trials = [more | {"lora": a, "full": b, "seed": seed} for seed, (a, b) in zip(setting.seeds, files, strict=True)]
    means = [{kind: float(np.mean(counts)) for kind, counts in one.items()} for one in setting.each(count, trials)]
    measured, rates = [one["lora"] - one["full"] for one in means], {name: one["lr"] for name, one in runs.items()}
    return {"measured": measured, "means": means, "rates": rates}


def picture(numbers: dict[str, Any]) -> Any:
    """Intruders per matrix, by update."""
    from ..pages.style import BASE, BLACK, FULL, LORA, PALE, ink, panels

    figure, axes = panels(width=9)
    for x, kind in enumerate(TOLD):
        ys = [one[kind] for one in numbers["means"]]
        color = LORA if kind == "lora" else FULL if "full" in kind else BASE
        axes.bar(x, np.mean(ys), color=color, alpha=PALE if kind == "full, scaled" else 1, width=0.6)
        axes.plot([x] * len(ys), ys, "o", color=ink(BLACK), markersize=4)
        axes.text(x, max(ys), f"{np.mean(ys):.2f}\n", ha="center")
    axes.set_xticks(range(len(TOLD)), list(TOLD.values()))
    axes.set(ylabel="new among the first 10, per matrix", ylim=(0, 1.2 * axes.get_ylim()[1]))
    axes.set_title("Singular directions that the base lacks (cosines below 0.5)")
    return figure

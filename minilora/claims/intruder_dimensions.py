"""An Illusion of Equivalence: LoRA brings singular directions that the base lacks; full fine-tuning does not."""

from typing import Any

import numpy as np

from ..experiments.claim import Band, Claim, Setting
from ..experiments.updates import base_matrices, read_update, shared_run
from ..lora.spectra import intruder_dimensions, svd

CLAIM = Claim(
    source="LoRA vs Full Fine-tuning: An Illusion of Equivalence (Shuttleworth et al. 2024, arXiv 2410.21228)",
    where="definition 1, section 3",
    says="With LoRA of r up to 16, some of the first 10 left singular vectors of W + ΔW resemble none of W's (every"
    " cosine below ε), at low ε as well; with full fine-tuning hardly any do (RoBERTa-base on six tasks, larger"
    " models).",
    here="Directions whose every |cosine| is below 0.5, among the first 10 of W_q and W_v, per matrix: LoRA with r ="
    " 8 minus full fine-tuning. Controls of the same Frobenius norm as LoRA's update: full fine-tuning's update,"
    " random noise of full rank, and LoRA's own singular values along random directions.",
    switch="Random noise of full rank with the same Frobenius norm replaces LoRA's update.",
    base="smollm2",
    minutes=8,
    band=Band("intruders per matrix: LoRA less full", low=0.5, against_below=0),
    small_band=Band("intruders per matrix: LoRA less full", low=0.4),
    seeds=(0, 1),
    one_rate="The learning rates of the shared runs on SmolLM2 were not searched: each run takes minutes.",
    second_hand=True,
    explained={
        "not at this size": "The update is too small: after 40 steps at an untuned rate of 2e-3, LoRA's largest"
        " singular value is 0.4 to 1.4, W's 3 to 82. On the tiny base, each method at its best rate (LoRA 1e-2, full"
        " 1e-3, 60 steps), LoRA has 2.25, 2.0 and 2.38 intruders per matrix with three seeds, full fine-tuning none,"
        " and noise as large at most 0.25.",
    },
)
TOLD = {
    "lora": "LoRA, r = 8",
    "full": "full",
    "full, scaled": "full, as large\nas LoRA's",
    "noise": "noise, as large",
    "low rank": "random directions,\nLoRA's values",
}


def count(base: str, seed: int, folder: str | None) -> dict[str, list[int]]:
    """Intruders in each matrix, by update."""
    lora = read_update(shared_run(base, "lora", seed, folder=folder)["file"])
    full = read_update(shared_run(base, "full", 0, folder=folder)["file"])
    rng = np.random.default_rng(seed)
    found: dict[str, list[int]] = {name: [] for name in TOLD}
    for name, w in base_matrices(base).items():
        if "down_proj" in name:
            continue
        m, n = w.shape
        s = svd(lora[name]).s
        norm, delta, noise = float(np.linalg.norm(s)), full[name], rng.standard_normal((m, n))
        u, v = (np.linalg.qr(rng.standard_normal((d, len(s))))[0] for d in (m, n))
        updates = (np.matmul(*lora[name]), delta, _scaled(delta, norm), _scaled(noise, norm), (u * s) @ v.T)
        for kind, update in zip(TOLD, updates, strict=True):
            found[kind].append(intruder_dimensions(w, w + update.astype(w.dtype), k=10, epsilon=0.5))
    return found


def _scaled(update: np.ndarray, norm: float) -> np.ndarray:
    return update * (norm / np.linalg.norm(update))


def run(setting: Setting) -> dict[str, Any]:
    """Intruders per matrix with LoRA less those with full fine-tuning."""
    common = {"base": "tiny" if setting.small else "smollm2", "folder": setting.updates}
    found = setting.each(count, [common | {"seed": seed} for seed in setting.seeds])
    means = [{kind: float(np.mean(counts)) for kind, counts in one.items()} for one in found]
    tried = "noise" if setting.switched else "lora"
    return {"measured": [one[tried] - one["full"] for one in means], "means": means}


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

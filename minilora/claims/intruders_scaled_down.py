"""An Illusion of Equivalence: with LoRA's intruder dimensions scaled down, the model forgets less and knows as much."""

from typing import Any

import numpy as np

from ..data.samples import encode_text
from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import lora_config, reset, samples_of, tiny_base
from ..lora.adapters import add_adapter, delta_weight, lora_modules
from ..lora.spectra import closest_cosines, svd
from ..measure.loss import evenly, mean_loss
from ..models.load import TINY
from ..train.loop import fit

CLAIM = Claim(
    source="LoRA vs Full Fine-tuning: An Illusion of Equivalence (Shuttleworth et al. 2024, arXiv 2410.21228)",
    where="abstract of versions 2 and 3",
    says="LoRA's forgetting lies in the intruder dimensions: if their singular values are scaled down after training,"
    " the model fits the pre-training distribution much better, at a minimal cost in the new task.",
    here="LoRA (r = 8, all linear layers of the tiny base), 60 steps on law at its best rate. Intruders: of the first"
    " 10 left singular vectors of W + ΔW, those whose every |cosine| with W's is below 0.5; their singular values are"
    " halved. Forgetting: the rise of the loss on presidents' addresses, the base's own data. Measured: the share of it"
    " that is undone minus the share of the gain that is lost. For comparison: ΔW times a factor.",
    switch="As many others of the first 10, those with the smallest singular values, are scaled down instead.",
    base="tiny",
    minutes=2,
    band=Band("share of the forgetting undone minus share of the gain lost", low=0.1, against_below=0),
    explained={
        "not at this size": "The 3.3 intruders per matrix hold as much of the gain as of the forgetting. At a third of"
        " the rate there are 0.1, without an effect. The whole ΔW halved undoes 75 % for 1 to 3 %.",
    },
    second_hand=True,
    effect=Effect(paper=0.3, none=0, std=0.047, assumed=True),
)
FACTORS, KINDS = [1.0, 0.5, 0.0], {"intruders": "intruders", "others": "as many others", "all": "all of ΔW"}


def train(lr: float, seed: int = 0, steps: int = 60, held_out: int = 30, factors: Any = FACTORS) -> dict[str, Any]:
    """The validation loss, intruders per matrix, and the losses on (new, old) texts: before, and by kind and factor."""
    (model, tokenizer), sets, text = tiny_base(), samples_of("legal"), (TINY / "validation.txt").read_text("utf-8")
    held = [evenly(each, held_out) for each in (sets["test"], encode_text(text, tokenizer, max_length=128))]
    found: dict[str, Any] = {"before": [mean_loss(model, samples) for samples in held], **{kind: [] for kind in KINDS}}
    try:
        add_adapter(model, lora_config(8, 32, "all-linear"), "trial", seed)
        fit(model, sets["train"], steps, lr, batch_size=4, seed=seed)
        found["validation"] = mean_loss(model, evenly(sets["validation"], held_out))
        deltas = {name: delta_weight(model, name) for name in lora_modules(model)}
        reset(model)
        weights = {name: dict(model.named_parameters())[f"{name}.weight"] for name in deltas}
        trained = {name: weights[name].data + delta for name, delta in deltas.items()}
        parts = {name: directions(weights[name].data, trained[name]) | {"all": deltas[name]} for name in deltas}
        for kind, factor in ((kind, factor) for kind in KINDS for factor in factors):
            for name, weight in weights.items():
                weight.data[...] = trained[name] - (1 - factor) * parts[name][kind]
            found[kind].append([mean_loss(model, samples) for samples in held])
    finally:
        reset(model)
    return found | {"count": float(np.mean([each["count"] for each in parts.values()]))}


def directions(w: np.ndarray, tuned: np.ndarray, k: int = 10) -> dict[str, Any]:
    """The parts of `tuned` (m, n) in its intruders among the first k and in as many others, and their number."""
    (u, s, vt), new = svd(tuned), closest_cosines(w, tuned, k) < 0.5
    chosen = {"intruders": np.flatnonzero(new), "others": np.flatnonzero(~new)[::-1][: new.sum()]}
    return {kind: (u[:, i] * s[i]) @ vt[i] for kind, i in chosen.items()} | {"count": int(new.sum())}


def run(setting: Setting) -> dict[str, Any]:
    """What halving the intruders undoes and costs at the best rate, and one seed's paths over all factors."""
    few: dict[str, Any] = {"lr": 1.5e-2, "steps": 20, "held_out": 6, "factors": [1.0, 0.5]} if setting.small else {}
    found = setting.tuned(train, {"LoRA": {"lr": 1e-2} | few})["LoRA"]
    kind, half = "others" if setting.switched else "intruders", few.get("factors", FACTORS).index(0.5)
    undone, lost = zip(*(_shares(one, kind)[half] for one in found["runs"]), strict=True)
    numbers = {"measured": [own - cost for own, cost in zip(undone, lost, strict=True)], "undone": undone, "lost": lost}
    numbers |= {"intruders per matrix": [one["count"] for one in found["runs"]], "lr": found["lr"]}
    return numbers | {"paths": {kind: _shares(found["runs"][0], kind) for kind in KINDS}}


def _shares(found: dict[str, Any], kind: str) -> list[list[float]]:
    """For each factor, the share of the forgetting that is undone and the share of the gain that is lost."""
    (new, old), (learned, worse) = found["before"], found[kind][0]
    return [[(worse - b) / (worse - old), (a - learned) / (new - learned)] for a, b in found[kind]]


def picture(numbers: dict[str, Any]) -> Any:
    """Forgetting undone against gain lost, a path for each thing that is scaled."""
    from ..pages.style import BASE, LORA, ORANGE, panels

    figure, axes = panels(width=6)
    for (kind, path), color in zip(numbers["paths"].items(), (LORA, ORANGE, BASE), strict=True):
        undone, lost = zip(*path, strict=True)
        axes.plot(lost, undone, "o-", color=color, label=KINDS[kind])
    axes.set(xlabel="share of the gain that is lost", ylabel="share of the forgetting that is undone")
    axes.legend(frameon=False, title="scaled by 1, 0.5, 0")
    return figure

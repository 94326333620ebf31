"""QLoRA: with the scales of NF4 quantised as well, a parameter takes 0.373 bits less, and nothing gets worse."""

from math import log2
from typing import Any

import numpy as np

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import reset, samples_of, tiny_base
from ..files.levels import scales, unscaled
from ..files.quant import quantize
from ..measure.loss import evenly, mean_loss

CLAIM = Claim(
    source="QLoRA (Dettmers et al. 2023, arXiv 2305.14314)",
    where="section 3, double quantisation; table 2",
    says="A float32 scale for each 64 values costs 0.5 bits per parameter. If the scales, less their mean, are rounded"
    " to 8 bits, with a float32 scale for each 256 of them, they cost 0.127: 0.373 bits less, and no worse results.",
    here="The linear layers of the tiny base in NF4; their scales, less the mean, in 8-bit integers (8-bit floats in"
    " the paper), in groups of 256. Measured: the bits saved per parameter, less what the larger rounding error is"
    " worth: half of log2 of the ratio of the squared errors, because one bit more divides a squared error by four.",
    switch="The scales stay in 32 bits.",
    base="tiny",
    minutes=0.3,
    band=Band("bits saved per parameter, less the precision lost in bits", 0.36, 0.375, against_below=0.25),
    explained={
        "reproduced": "Six bits would do: such scales save 0.403 bits and lose precision worth 0.004. The loss is"
        " 4.0237 with scales of 8 bits and 4.0236 with 32.",
    },
    second_hand=True,
    seeds=(0,),
    effect=Effect(paper=0.373, none=0, std=0),
)
PLAIN, GROUP = 32, 256


def quantised(bits: int, seed: int, records: int) -> dict[str, float]:
    """Bits per parameter of the scales, squared error of all matrices, and the loss, with scales of this many bits."""
    model, _ = tiny_base()
    stored, error, count = 0, 0.0, 0
    try:
        for name, p in model.named_parameters():
            if name.endswith("_proj.weight"):
                blocks = quantize(p.data, "NF4").reshape(-1, 36)
                own, cost = second(scales(blocks)[:, 0], bits)
                w = (unscaled(blocks, "NF4") * own[:, None]).reshape(p.shape)
                stored, error, count = stored + cost, error + float(((w - p.data) ** 2).sum()), count + w.size
                p.data[...] = w
        loss = mean_loss(model, evenly(samples_of("legal")["test"], records))
    finally:
        reset(model)
    return {"bits": stored / count, "error": error, "loss": loss}


def second(scale: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """Scales (blocks) rounded to this many bits and back, and their bits, with the groups' and the mean."""
    if bits == PLAIN:
        return scale, PLAIN * len(scale)
    mean, most = scale.mean(), 2 ** (bits - 1) - 1
    groups = [scale[i : i + GROUP] - mean for i in range(0, len(scale), GROUP)]
    steps = [np.abs(group).max() / most for group in groups]
    back = [np.round(group / step) * step + mean for group, step in zip(groups, steps, strict=True)]
    return np.concatenate(back), bits * len(scale) + PLAIN * (len(groups) + 1)


def run(setting: Setting) -> dict[str, Any]:
    """What is saved and lost with scales of 8 bits, and of other widths for the picture."""
    widths = [8, PLAIN] if setting.small else [2, 3, 4, 6, 8, 12, 16, PLAIN]
    records = {"records": 4 if setting.small else 30}
    trials = [{"bits": bits, "seed": seed, **records} for seed in setting.seeds for bits in widths]
    found, n = setting.each(quantised, trials), len(widths)
    each = [found[i : i + n] for i in range(0, len(found), n)]  # by seed
    saved = [[some[-1]["bits"] - one["bits"] for one in some] for some in each]
    lost = [[log2(one["error"] / some[-1]["error"]) / 2 for one in some] for some in each]
    at = widths.index(PLAIN if setting.switched else 8)
    return {
        "measured": [own[at] - cost[at] for own, cost in zip(saved, lost, strict=True)],
        "widths": widths,
        "saved": saved[0],
        "lost": lost[0],
        "loss": [one["loss"] for one in each[0]],
    }


def picture(numbers: dict[str, Any]) -> Any:
    """Bits saved, and saved less lost, against the width of the scales."""
    from ..pages.style import BASE, LORA, panels

    figure, axes = panels(width=6)
    saved, lost = np.array(numbers["saved"]), np.array(numbers["lost"])
    axes.plot(numbers["widths"], saved, "o--", color=BASE, label="saved")
    axes.plot(numbers["widths"], saved - lost, "o-", color=LORA, label="saved less precision lost")
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers["widths"], numbers["widths"])
    axes.set(xlabel="bits of a scale", ylabel="bits per parameter", ylim=(-0.5, 0.55))
    axes.legend(frameon=False)
    return figure

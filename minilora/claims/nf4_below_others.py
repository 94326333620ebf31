"""QLoRA: of three kinds of four bits, NF4 costs the least perplexity."""

from typing import Any

import numpy as np

from ..data.records import DOMAINS
from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import samples_of
from ..measure.loss import mean_loss
from ..models.load import load

CLAIM = Claim(
    source="QLoRA (Dettmers et al. 2023, arXiv 2305.14314)",
    where="section 4 and table 2",
    says="The mean perplexity of models of 125M to 13B on Pile Common Crawl is 34.34 with Int4, 31.07 with FP4 (E2M1),"
    " 29.48 with FP4 (E3M0) and 27.41 with NF4 and double quantisation.",
    here="The loss of the tiny base on records of four domains and everyday questions, with its linear layers in NF4,"
    " in FP4 and in Int4, in blocks of 64 with a float32 scale (no double quantisation, and no"
    " E3M0). Measured: what NF4 adds to the loss of the base in 32 bits, as a share of what the better of the other two"
    " adds. A seed draws the records.",
    switch="The levels of Int4 replace those of NF4.",
    base="tiny",
    minutes=1,
    band=Band("loss that NF4 adds over what the better of FP4 and Int4 adds", high=0.95, against_above=1),
    effect=Effect(paper=0.8, none=1, std=0.011, assumed=True),
)
KINDS = ("nf4", "fp4", "int4")


def losses(seed: int, records: int) -> dict[str, float]:
    """The base's loss on this many records, in 32 bits and in each kind of four."""
    every = [sample for data in DOMAINS for name in ("train", "test", "general") for sample in samples_of(data)[name]]
    chosen = np.random.default_rng(seed).choice(len(every), min(records, len(every)), replace=False)
    drawn = [every[i] for i in chosen]
    kinds: tuple[bool | str, ...] = (False, *KINDS)
    return {str(kind): mean_loss(load("tiny", quantized=kind)[0], drawn) for kind in kinds}


def run(setting: Setting) -> dict[str, Any]:
    """What each kind adds to the loss, for every seed."""
    records = 60 if setting.small else 600
    found = setting.each(losses, [{"seed": seed, "records": records} for seed in setting.seeds])
    added = {kind: [one[kind] - one["False"] for one in found] for kind in KINDS}
    tried = added["int4" if setting.switched else "nf4"]
    others = [min(pair) for pair in zip(added["fp4"], added["int4"], strict=True)]
    return {
        "measured": [own / other for own, other in zip(tried, others, strict=True)],
        "added": added,
        "base": [one["False"] for one in found],
    }


def picture(numbers: dict[str, Any]) -> Any:
    """What each kind adds to the loss, a dot for each seed."""
    from ..pages.style import BASE, BLACK, LORA, ink, panels

    figure, axes = panels(width=6)
    for y, (kind, values) in enumerate(numbers["added"].items()):
        axes.barh(y, np.mean(values), color=LORA if kind == "nf4" else BASE, height=0.6)
        axes.plot(values, [y] * len(values), "o", color=ink(BLACK), markersize=4)
    axes.set_yticks(range(len(KINDS)), [kind.upper() for kind in KINDS])
    axes.invert_yaxis()
    axes.set(
        xlabel=f"added to the loss of {np.mean(numbers['base']):.2f} (nats per token)", title="A dot for each seed"
    )
    return figure

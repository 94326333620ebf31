"""Asymmetry in low-rank adapters: B alone, with a random A, learns nearly as much as both; A alone learns less."""

from typing import Any

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import tiny_run
from ..experiments.tuned import as_numbers
from ..pages import style
from ..pages.rates import losses_figure

CLAIM = Claim(
    source="Zhu et al. 2024, Asymmetry in Low-Rank Adapters of Foundation Models (arXiv 2402.16842)",
    where="abstract",
    says="A extracts features of the input, and B makes the output of them. Training B alone is more effective than"
    " training A alone, and a random A that is never trained does nearly as well as a trained one.",
    here="LoRA with r = 8 on every linear layer: both factors trained; B alone, from zero, over a frozen random A; and"
    " A alone, from zero, over a frozen random B. B has a tenth more parameters than A. 30 steps on law, each at its"
    " own best learning rate by validation loss. Measured: the share of LoRA's gain on the test set that B alone"
    " keeps, less the share that A alone keeps.",
    switch="A alone is trained in both.",
    base="tiny",
    minutes=1.5,
    band=Band("share of LoRA's gain: B alone less A alone", low=0.05, against_below=0),
    effect=Effect(paper=0.1, none=0, std=0.023, assumed=True),
)
BOTH, B_ALONE, A_ALONE = "A and B", "B alone", "A alone"
TRAINED: dict[str, dict[str, Any]] = {
    BOTH: {"lr": 1e-2},
    B_ALONE: {"lr": 1e-2, "variant": "lora-fa"},
    A_ALONE: {"lr": 1e-3, "variant": "zero-a", "frozen": ["lora_B"]},
}


def run(setting: Setting) -> dict[str, Any]:
    """Tune all three, and compare their gains on the test set."""
    few: dict[str, Any] = {"steps": 6, "batch_size": 2, "held_out": 4} if setting.small else {"steps": 30}
    trained = TRAINED | ({B_ALONE: TRAINED[A_ALONE]} if setting.switched else {})
    contenders = {name: one | few for name, one in trained.items()}
    found = setting.tuned(tiny_run, contenders)
    gains = {name: [run["before"]["test"] - run["test"] for run in one["runs"]] for name, one in found.items()}
    shares = {
        name: [gain / both for gain, both in zip(gains[name], gains[BOTH], strict=True)] for name in (B_ALONE, A_ALONE)
    }
    return {
        "measured": [b - a for b, a in zip(shares[B_ALONE], shares[A_ALONE], strict=True)],
        "share of LoRA's gain": shares,
        **as_numbers(found),
    }


def picture(numbers: dict[str, Any]) -> Any:
    """Losses by learning rate, and with each seed."""
    colors = {BOTH: style.LORA, B_ALONE: style.B, A_ALONE: style.A}
    return losses_figure(numbers, colors)

"""LoRA Without Regret: adapters on the MLP beat adapters on attention with as many parameters."""

from typing import Any

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import tiny_run
from ..experiments.tuned import as_numbers
from ..pages.rates import losses_figure
from ..pages.style import A, B

ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 12)
MLP = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 7)  # as many parameters, 10,752 in a block

CLAIM = Claim(
    source="Schulman et al. 2025, LoRA Without Regret (thinkingmachines.ai/blog/lora)",
    where="the section on the layers, and the authors' primer on LoRA (tinker-docs.thinkingmachines.ai)",
    says="Adapters on attention alone fall behind those on the MLP, even if a higher rank gives them as many"
    " parameters.",
    here="Attention alone with r = 12 and the MLP alone with r = 7: 43,008 parameters each. 60 steps on law, each at"
    " its own best learning rate by validation loss; the test loss.",
    switch="Both adapters are on the MLP, and differ only in the seed.",
    base="tiny",
    minutes=1,
    band=Band("loss of attention alone above that of the MLP alone, %", low=0.5, against_below=0),
    small_band=Band("the same with a few steps and records, which vary more", low=0.5, against_below=-4),
    effect=Effect(paper=2, none=0, std=0.26, assumed=True),
)
BEGIN = 1e-2


def run(setting: Setting) -> dict[str, Any]:
    """Tune both, and compare them with each seed."""
    few = {"steps": 16, "batch_size": 2, "held_out": 6} if setting.small else {}
    contenders = {
        "attention, r = 12": {"lr": BEGIN, "targets": ATTENTION, **few},
        "MLP, r = 7": {"lr": BEGIN, "targets": MLP, **few},
    }
    if setting.switched:
        contenders["attention, r = 12"]["targets"] = MLP
    found = setting.tuned(tiny_run, contenders)
    numbers = as_numbers(found)
    losses = numbers["loss on the test"]
    if setting.switched:
        rate = found["attention, r = 12"]["lr"]
        other = [{"lr": rate, "targets": MLP, "seed": seed + 100, **few} for seed in setting.seeds]
        losses["attention, r = 12"] = [result["test"] for result in setting.each(tiny_run, other)]
    return {"measured": [100 * (a / m - 1) for a, m in zip(*losses.values(), strict=True)], **numbers}


def picture(numbers: dict[str, Any]) -> Any:
    """Losses by learning rate, and with each seed."""
    return losses_figure(numbers, dict(zip(numbers["tried"], (A, B), strict=True)))

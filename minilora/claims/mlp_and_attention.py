"""LoRA Without Regret: adapters on attention add nothing to adapters on the MLP."""

from typing import Any

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import tiny_run
from ..experiments.tuned import as_numbers
from ..lora.config import ALL_LINEAR
from ..pages.rates import losses_figure

CLAIM = Claim(
    source="Schulman et al. 2025, LoRA Without Regret (thinkingmachines.ai/blog/lora)",
    where="Layers where LoRA is applied",
    says="With Llama-3.1-8B and with a mixture of experts, LoRA on the MLP and on attention (r = 256, 0.70 billion"
    " parameters) is no better than LoRA of the same rank on the MLP alone (0.49 billion).",
    here="LoRA on the MLP alone, and on the MLP and attention, with r = 8, a sixteenth of the width as in the source;"
    " 30 steps on law, each at its own best learning rate by validation loss. Measured: the test loss of the MLP"
    " alone above that of both.",
    switch="Attention alone replaces the MLP alone: what is added is the MLP.",
    base="tiny",
    minutes=1,
    band=Band("test loss of the MLP alone above that of the MLP and attention, %", high=0.5, against_above=1),
    effect=Effect(paper=0, none=2, std=0.15),
)
MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BEGIN = 1e-2


def run(setting: Setting) -> dict[str, Any]:
    """Tune both, and compare them with each seed."""
    few: dict[str, Any] = {"steps": 6, "batch_size": 2, "held_out": 4} if setting.small else {"steps": 30}
    contenders = {
        "MLP": {"lr": BEGIN, "targets": ATTENTION if setting.switched else MLP, **few},
        "MLP and attention": {"lr": BEGIN, "targets": ALL_LINEAR, **few},
    }
    numbers = as_numbers(setting.tuned(tiny_run, contenders))
    pairs = zip(*(numbers["loss on the test"][name] for name in contenders), strict=True)
    return {"measured": [100 * (one / both - 1) for one, both in pairs], **numbers}


picture = losses_figure  # losses by learning rate, and with each seed

"""LoRA Learns Less and Forgets Less: LoRA forgets less than full fine-tuning."""

from statistics import mean
from typing import Any

import numpy as np

from ..experiments.claim import Band, Claim, Effect, OnSmolLM2, Setting
from ..experiments.followed import FULL, LORA_8, followed_run
from ..experiments.tuned import first_step
from ..pages import style
from ._shared import followed_on_smollm2

CLAIM = Claim(
    source="Biderman et al. 2024, LoRA Learns Less and Forgets Less, arXiv 2405.09673",
    where="version 2, sections 4.2 and 4.3, figures 2 and 3",
    says="Llama-2-7B on code and mathematics, each method at its best learning rate: LoRA forgets less of what the base"
    " could do. Where both have learned as much, they have forgotten about as much; on code some of LoRA's points have"
    " forgotten less.",
    here="LoRA (r = 8, all linear layers) and full fine-tuning of the tiny base on law: 40 steps of 8, each at its best"
    " constant rate by the loss on legal terms. Measured: how much less LoRA has forgotten at the end (the rise of the"
    " loss on presidents' addresses), as a share of full's. Also stored: the same at the lowest loss on legal terms"
    " that both reach.",
    switch="LoRA is replaced by full fine-tuning: no low rank holds the update.",
    base="tiny",
    minutes=5,
    band=Band("forgotten less by LoRA at the end (share of full's)", low=0.1, against_below=0),
    explained={
        "reproduced": "It forgets less because it learns less: it has learned 17 to 21 % less, and forgotten 13 to 17 %"
        " less. At the lowest loss on legal terms that both reach, it has forgotten 61 to 76 % more: the two are not on"
        " one curve here. The band is that of an earlier form, which compared at this loss and was not reproduced.",
    },
    effect=Effect(paper=0.2, none=0, std=0.021, assumed=True),
    on_smollm2=OnSmolLM2(
        here="The same with SmolLM2, except that the learning rate falls to zero along a cosine, that the best one is"
        " that of the first seed, and that losses are measured every 10 steps.",
        minutes=75,
        effect=Effect(paper=0.5, none=0, std=0.14, assumed=True),
        explained={
            "reproduced": "Here LoRA has learned as much as full fine-tuning (the gains differ by at most 0.6 %), and"
            " forgotten 67 to 93 % less. But the rate decides as well: at a third of its best one, full fine-tuning"
            " ends with the same loss on the test (2.498 and 2.498, first seed), and its loss on presidents' addresses"
            " is below the base's (3.527 and 3.572): it forgets nothing. So how much is forgotten depends on the"
            " rate at least as much as on the method.",
        },
    ),
)
BEGIN = {"lora": 1e-2, "full": 2.15e-3}


def run(setting: Setting) -> dict[str, Any]:
    """The paths of both methods at their best rates, and what each has forgotten: at the end, and at the same loss."""
    names = {"LoRA": LORA_8, "full": FULL}
    found = followed_on_smollm2(setting, names) if setting.on_smollm2 else _on_tiny(setting)
    pairs = list(zip(found["LoRA"]["runs"], found["full"]["runs"], strict=True))
    change = lambda losses: losses[-1] - losses[0]
    less = {of: [1 - change(lora[of]) / change(full[of]) for lora, full in pairs] for of in ("new", "old")}
    return {
        "measured": less["old"],
        "learned less at the end": less["new"],
        "forgotten less at the same loss": [1 - _lost(lora, full) / _lost(full, lora) for lora, full in pairs],
        "rates": {name: one["lr"] for name, one in found.items()},
        "tried": {name: one["tried"] for name, one in found.items()},
        "paths": {name: [[run["new"], run["old"]] for run in one["runs"]] for name, one in found.items()},
    }


def _on_tiny(setting: Setting) -> dict[str, Any]:
    size: dict[str, Any] = {"steps": 4, "every": 2, "held_out": 6} if setting.small else {"every": 5}
    same = {"base": "tiny", "alpha": 32, "schedule": "constant", **size}
    methods = {"LoRA": "full" if setting.switched else "lora", "full": "full"}
    contenders = {name: {"lr": BEGIN[method], "method": method, **same} for name, method in methods.items()}
    return setting.tuned(followed_run, contenders, search=setting.seeds, per_decade=3)


def _lost(path: dict[str, Any], other: dict[str, Any]) -> float:
    at = max(min(path["new"]), min(other["new"]))  # the lowest new loss that both reach
    step = first_step(list(enumerate(path["new"])), at)
    return float(np.interp(step, range(len(path["old"])), path["old"]) - path["old"][0])


def picture(numbers: dict[str, Any]) -> Any:
    """Old loss against new, a path for each seed."""
    (figure, axes), ends = style.panels(width=7, height=4), []
    for name, color in (("LoRA", style.LORA), ("full", style.FULL)):
        for new, old in numbers["paths"][name]:
            axes.plot(new, old, "o-", color=color)
        ends.append((mean(old[-1] for _, old in numbers["paths"][name]), f"{name}, lr {numbers['rates'][name]}", color))
    axes.set(xlabel="loss on legal terms (nats)", ylabel="loss on presidents' addresses (nats)", xmargin=0.05)
    style.name_lines(axes, ends)
    return figure

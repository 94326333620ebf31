"""The usual introduction: training needs much less memory."""

from typing import Any

from ..experiments.claim import LOW, Claim, Effect, Setting
from ..measure.memory import Job, report, step_of
from ..measure.predict import Memory, predict_memory
from ._introduction import SOURCE, bars_figure

CLAIM = Claim(
    source=SOURCE,
    where="LoRA (arXiv 2106.09685), abstract, has the number",
    says="Training needs much less memory, since only small matrices are trained: a third (GPT-3 175B: 350 GB instead"
    " of 1.2 TB).",
    here="The peak of a process that takes steps of 4 x 128 tokens with AdamW, by LoRA (r = 8, all linear layers) and"
    " by full fine-tuning, divided among its owners. Nothing in it is random: one number. In the smallest form it is"
    " predicted from shapes.",
    switch="Gradients and optimizer state of all weights are held all the same: full fine-tuning replaces LoRA.",
    base="smollm2",
    minutes=2,
    band=LOW.of("peak memory with LoRA, as a share of full fine-tuning's"),
    seeds=(0,),
    explained={
        "not at this size": "Freezing saves gradients and optimizer state, and nothing else. The weights stay, and so"
        " do the activations, since every layer still passes a gradient on. The paper's 350 GB are 175 billion"
        " weights of two bytes, with next to nothing for activations; here the activations of 512 tokens, and the"
        " program, are a good part of the peak. With activation checkpointing on both sides (`minilora memory"
        " --recompute`) the share is 0.28, inside the band; with a base in NF4 for LoRA as well it is 0.12."
    },
    effect=Effect(paper=0.29, none=1, std=0),
)
OWNERS = ("weights", "gradients", "moments", "activations")


def run(setting: Setting) -> dict[str, Any]:
    """LoRA's share of the peak."""
    base = "tiny" if setting.small else "smollm2"
    jobs = [Job(base=base, method="full" if setting.switched else "lora"), Job(base=base, method="full")]
    if setting.small:
        held = [predict_memory(step_of(job)) for job in jobs]
        peaks = [memory.total for memory in held]
    else:
        reports = [report(job) for job in jobs]
        held = [Memory(**one["predicted"]) for one in reports]
        peaks = [one["process_peak"] for one in reports]
    owned = {owner: [getattr(memory, owner) for memory in held] for owner in OWNERS}
    return {"measured": [peaks[0] / peaks[1]] * len(setting.seeds), "peak, bytes": peaks, **owned}


def picture(numbers: dict[str, Any]) -> Any:
    """The bytes at the peak, by owner."""
    rows = {owner: numbers[owner] for owner in OWNERS} | {"peak": numbers["peak, bytes"]}
    in_mb = {name: (lora / 1e6, full / 1e6) for name, (lora, full) in rows.items()}
    return bars_figure(in_mb, "MB", "At the peak: full fine-tuning in its optimizer, LoRA in its backward pass", 4)

"""The usual introduction: training is faster."""

from statistics import median
from typing import Any

from ..experiments.claim import Band, Claim, Effect, Setting
from ..measure.bench import Settings, contender
from ..measure.predict import Step, base_parameters
from ..measure.turns import take_turns
from ._introduction import SOURCE, bars_figure

CLAIM = Claim(
    source=SOURCE,
    where="LoRA (arXiv 2106.09685), section 4.2, has the number",
    says="Training is faster: 25 % less time on GPT-3 175B, 43.1 tokens a second for each V100 instead of 32.5.",
    here="A step of 4 x 128 tokens by LoRA (r = 8, all linear layers) and by full fine-tuning, with AdamW, in processes"
    " that take turns; three turns each for every measured number. Faster is defined as at most nine tenths of the"
    " time. In the smallest form, the multiplications of the matmuls are counted and nothing is timed.",
    switch="Full fine-tuning replaces LoRA.",
    base="smollm2",
    minutes=4,
    band=Band("time of a step with LoRA, as a share of full fine-tuning's", high=0.9, against_above=1.0 - 1e-9),
    effect=Effect(paper=0.75, none=1, std=0.011),
)
TURNS = 3


def products(base: str) -> tuple[float, float]:
    """Multiplications per token: y and dx for every frozen matrix, and dw as well for every trained one."""
    config = Settings(base).config()
    adapter = Step(config, 1, 1, rank=8).adapter_parameters
    return 2 * base_parameters(config) + 3 * adapter, 3 * base_parameters(config)


def timed(base: str, seeds: int, same: bool = False) -> list[tuple[float, float]]:
    """Seconds of a step of LoRA (or of full fine-tuning in its place) and of full fine-tuning, each a median."""
    settings = Settings(base)
    one, other = contender("full" if same else "lora", settings), contender("full", settings)
    contenders = [type(one)("one", one.command), type(one)("other", other.command)]
    found = take_turns(contenders, TURNS * seeds)
    parts = [slice(i * TURNS, (i + 1) * TURNS) for i in range(seeds)]
    return [(median(found["one"].seconds[part]), median(found["other"].seconds[part])) for part in parts]


def run(setting: Setting) -> dict[str, Any]:
    """LoRA's share of a step's time, or of its multiplications."""
    counted = {base: products(base) for base in ("tiny",) + ("smollm2",) * (not setting.small)}
    shares = {f"share of multiplications, {base}": lora / full for base, (lora, full) in counted.items()}
    if setting.small:
        lora, full = counted["tiny"]
        pairs, seconds = [(full if setting.switched else lora, full)] * len(setting.seeds), {}
    else:
        both = {base: timed(base, len(setting.seeds), setting.switched) for base in ("tiny", "smollm2")}
        pairs = both["smollm2"]
        seconds = {f"seconds of a step, {base}": list(map(list, found)) for base, found in both.items()}
        shares["share of the time, tiny"] = median(lora / full for lora, full in both["tiny"])
    return {"measured": [lora / full for lora, full in pairs], **shares, "pairs": list(map(list, pairs)), **seconds}


def picture(numbers: dict[str, Any]) -> Any:
    """Bars of the share."""
    shares = [share for name, share in numbers.items() if name.startswith("share of multi")]
    rows = {"counted": (shares[-1], 1.0), "measured": (median(numbers["measured"]), 1.0)}
    return bars_figure(rows, "share of full fine-tuning's step", "A step of LoRA and one of full fine-tuning")

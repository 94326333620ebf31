"""LoRA+: a larger learning rate for B reaches the same loss in fewer steps."""

from typing import Any

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import tiny_run
from ..experiments.tuned import first_step, without_defaults
from ..pages.rates import draw_rates
from ..pages.style import LORA, A, name_lines, panels

WHY = (
    "The paper is about wide models, where the good ratio grows with the width, and about rates that are set together"
    " with the ratio. The tiny base is 128 wide. With each method at its own best rate the two end within two percent"
    " of each other, and LoRA+ is not faster: B's rate, 16 times as large, asks for a base rate that is a tenth of"
    " LoRA's or less, at which A hardly leaves its random initialisation. At one low rate for both, as the switch has"
    " it, LoRA+ is far faster: it brings a rate that is too low nearer to a good one. A search over the rate does"
    " that for LoRA as well."
)
CLAIM = Claim(
    source="Hayou, Ghosh & Yu 2024, LoRA+ (arXiv 2402.12354)",
    where="abstract; the authors' repository for how the ratio is to be set",
    says="One learning rate for A and B is not efficient in wide models. With a larger one for B, in a well-chosen"
    " ratio, results are 1 to 2 % better and fine-tuning is up to about twice as fast. Ratio and rate are set"
    " together, so the claim is about each method at a rate that suits it.",
    here="LoRA and LoRA+ with a ratio of 16, r = 8, on every linear layer; 60 steps on law, each method at its own"
    " best learning rate by validation loss. Then again with the validation loss every three steps. Measured: the"
    " steps that LoRA takes to the higher of the two final losses, over the steps that LoRA+ takes.",
    switch="The effect is put in by hand: both take one learning rate, 0.001, which is too low for LoRA.",
    base="tiny",
    minutes=1.5,
    band=Band("steps LoRA takes, over the steps LoRA+ takes, to the loss that both reach", low=1.2, against_below=1.0),
    explained=dict.fromkeys(("not at this size", "contradicted"), WHY),
    effect=Effect(paper=2, none=1, std=0.21),
)
KINDS: dict[str, dict[str, Any]] = {"LoRA": {"variant": "lora"}, "LoRA+": {"variant": "lora+", "ratio": 16}}
BEST = {"LoRA": 1e-2, "LoRA+": 1e-3}  # where the search begins, and what the small form takes
TOO_LOW = 1e-3


def run(setting: Setting) -> dict[str, Any]:
    """Tune both, then train them with validations: which is sooner at the same loss?"""
    few: dict[str, Any] = {"steps": 10, "batch_size": 2, "held_out": 4} if setting.small else {}
    begin: dict[str, dict[str, Any]] = {name: {"lr": BEST[name], **kind, **few} for name, kind in KINDS.items()}
    found, rates = dict[str, Any](), dict.fromkeys(KINDS, TOO_LOW)
    if not setting.switched:
        found = setting.tuned(tiny_run, begin)
        rates = {name: found[name]["lr"] for name in KINDS}
    every = 2 if setting.small else 3
    trials = [dict(begin[name], lr=rates[name], every=every, seed=s) for s in setting.seeds for name in KINDS]
    runs = setting.each(tiny_run, [without_defaults(tiny_run, trial) for trial in trials])
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    return {
        "measured": [sooner(plain["curve"], plus["curve"]) for plain, plus in pairs],
        "rates": rates,
        "tried": {name: found[name]["tried"] for name in found},
        "curves": {"LoRA": [plain["curve"] for plain, _ in pairs], "LoRA+": [plus["curve"] for _, plus in pairs]},
        "better by, % of the test's loss": [100 * (1 - plus["test"] / plain["test"]) for plain, plus in pairs],
    }


def sooner(plain: list[list[float]], plus: list[list[float]]) -> float:
    """The steps to the higher of the two final losses: those of the first curve, over those of the second."""
    reached = max(plain[-1][1], plus[-1][1])
    return first_step(plain, reached) / first_step(plus, reached)


def picture(numbers: dict[str, Any]) -> Any:
    """The losses during training, and those by learning rate."""
    colors = {"LoRA": LORA, "LoRA+": A}
    figure, panel = panels(2 if numbers["tried"] else 1, width=10)
    figure.get_layout_engine().set(wspace=0.08)
    axes = panel[0] if numbers["tried"] else panel
    for name, curves in numbers["curves"].items():
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=colors[name], linewidth=1.5, alpha=0.7)
    name_lines(axes, [(curves[0][-1][1], name, colors[name]) for name, curves in numbers["curves"].items()])
    axes.set(xlabel="step", ylabel="validation loss (nats per token)", title="Each at its rate, a line per seed")
    if numbers["tried"]:
        draw_rates(panel[1], numbers["tried"], colors)
    return figure

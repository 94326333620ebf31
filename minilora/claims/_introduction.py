"""What the claims of the usual introduction to LoRA share: their source, and a run that several of them look at."""

from typing import Any

from ..experiments.claim import Setting
from ..experiments.followed import FULL, LORA_8
from ..experiments.tiny import tiny_run
from ._shared import followed_on_smollm2
from .planted_rank import train as train_matrix

SOURCE = "The usual introduction to LoRA"
BEGIN = {"lora": 1e-2, "full": 1e-3}  # the learning rates where the search begins
BEGIN_COMPLEX = {"lora": 1e-2, "full": 4.64e-3}
FROZEN = "full, embedding frozen"


def best_runs(setting: Setting, shuffled: bool = False, frozen: bool = False) -> dict[str, list[dict[str, Any]]]:
    """For each method, the run of every seed at the learning rate that is best on validation, over all seeds.

    frozen: also full fine-tuning of all but the embedding, which LoRA does not train either; not on SmolLM2.
    """
    if setting.on_smollm2:
        found = followed_on_smollm2(setting, {"lora": LORA_8, "full": FULL})
    else:
        found = _tuned_on_tiny(setting, shuffled, frozen)
    return {name: [run | {"lr": one["lr"]} for run in one["runs"]] for name, one in found.items()}


def _tuned_on_tiny(setting: Setting, shuffled: bool, frozen: bool) -> dict[str, Any]:
    begin = BEGIN_COMPLEX if shuffled else BEGIN
    sizes = {"steps": 8, "every": 4, "held_out": 4} if setting.small else {"steps": 96, "every": 8, "held_out": 24}
    contenders: dict[str, dict[str, Any]] = {
        method: {"method": method, "lr": begin[method], "alpha": 16.0, "shuffled": shuffled, **sizes}
        for method in ("lora", "full")
    }
    if frozen:
        contenders[FROZEN] = contenders["full"] | {"frozen": ["embed_tokens"]}
    return setting.tuned(tiny_run, contenders, search=setting.seeds, per_decade=3)


def shares(runs: dict[str, list[dict[str, Any]]]) -> list[float]:
    """Of what full fine-tuning gains on the test records, the share that LoRA gains, seed by seed."""
    gains = ([run["before"]["test"] - run["test"] for run in runs[method]] for method in ("lora", "full"))
    return [lora / full for lora, full in zip(*gains, strict=True)]


def matrix_shares(setting: Setting, full_rank: bool) -> dict[str, Any]:
    """The same in its smallest form: a matrix learns an update of rank 4, or of full rank, with r = 4. Full fine-tuning
    gains all of it."""
    trials = [{"d": 24, "k": 4, "r": 4, "seed": seed, "full_rank": full_rank, "steps": 200} for seed in setting.seeds]
    left = [one["loss"] / one["whole"] for one in setting.each(train_matrix, trials)]
    curves = {"lora": [[(0, 1.0), (200, loss)] for loss in left], "full": [[(0, 1.0), (200, 0.0)]]}
    return {"measured": [1 - loss for loss in left], "curves": curves}


def gain(setting: Setting, complex_change: bool) -> dict[str, Any]:
    """The share of full fine-tuning's gain that LoRA gains, for a change that is complex or one that is not."""
    if setting.on_smollm2:
        return {"measured": shares(runs := best_runs(setting)), **losses_of(runs)}
    if setting.small:
        return matrix_shares(setting, full_rank=complex_change)
    runs = best_runs(setting, shuffled=complex_change, frozen=True)
    of_frozen = shares({"lora": runs["lora"], "full": runs[FROZEN]})
    return {"measured": shares(runs), "share of the gain with a frozen embedding": of_frozen, **losses_of(runs)}


def losses_of(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The losses and learning rates of such runs, and their curves."""
    return {
        "before": runs["full"][0]["before"]["test"],
        **{f"{method} after": [run["test"] for run in runs[method]] for method in runs},
        **{f"{method} learning rate": runs[method][0]["lr"] for method in runs},
        "curves": {method: [run["curve"] for run in runs[method]] for method in runs},
    }


def curves_figure(curves: dict[str, Any], title: str) -> Any:
    """Validation loss against steps, a line for each seed."""
    from ..pages.style import FULL, LORA, name_lines, panels

    figure, axes = panels(width=7)
    lines = {"lora": ("LoRA", LORA, "-"), "full": ("full\nfine-tuning", FULL, "--")}
    for method, (_, color, style) in lines.items():
        for curve in curves[method]:
            axes.plot(*zip(*curve, strict=True), color=color, linestyle=style)
    axes.set(xlabel="step", ylabel="validation loss (nats)", title=title)
    name_lines(axes, [(curves[m][0][-1][1], name, color) for m, (name, color, _) in lines.items()])
    return figure


def bars_figure(rows: dict[str, tuple[float, float]], unit: str, title: str, height: float = 3) -> Any:
    """For each row a bar of LoRA and one of full fine-tuning, with their numbers."""
    from ..pages.style import FULL, LORA, ink, panels

    figure, axes = panels(width=7, height=height)
    for y, (_name, numbers) in enumerate(rows.items()):
        for number, color, method, shift in zip(numbers, (LORA, FULL), ("LoRA", "full"), (-0.2, 0.2), strict=True):
            axes.barh(y + shift, number, height=0.36, color=color, alpha=0.9)
            shown = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
            axes.text(number, y + shift, f" {method} {shown}", va="center", color=ink(color))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel=unit, title=title, xlim=(0, 1.35 * max(max(numbers) for numbers in rows.values())))
    axes.invert_yaxis()
    return figure

"""The usual introduction: a slight loss of quality at times, and no more."""

from __future__ import annotations

from typing import Any

from ..experiments.claim import SLIGHT, Claim, Setting
from ._introduction import SOURCE, best_runs, draw_curves, matrix_shares, shares, told

CLAIM = Claim(
    source=SOURCE,
    where="limitations",
    says="LoRA's quality is at times slightly below that of full fine-tuning.",
    here="The tiny base learns legal answers, by LoRA (r = 8, all linear maps) and by full fine-tuning, the same"
    " batches in the same order, each at the best of three learning rates by its validation loss. Measured: LoRA's"
    " share of what full fine-tuning gains on the test records (nats). Slight is fixed as a twentieth of the gain. In"
    " its smallest form, a matrix learns an update of rank 4.",
    switch="What is learned is no longer simple: every token means another one, and LoRA cannot move the embedding; in"
    " the smallest form, an update of full rank.",
    base="tiny",
    minutes=4,
    band=SLIGHT.of("share of full fine-tuning's gain that LoRA reaches"),
    explained={
        "not at this size": "LoRA came to four fifths of full fine-tuning's gain, both at learning rates inside of what"
        " was tried: behind, and by more than slightly. A quarter of the tiny base is its embedding, which full"
        " fine-tuning moves, word by word, and LoRA leaves; and of a matrix 128 wide a rank of 8 is all that legal"
        " answers may change. Larger bases know the words already, and have more room in the same rank: papers that"
        " find no loss look at those.",
    },
)


def run(setting: Setting) -> dict[str, Any]:
    """LoRA's share of the gain."""
    if setting.small:
        return matrix_shares(setting, full_rank=setting.switched)
    runs = best_runs(setting, shuffled=setting.switched)
    return {"measured": shares(runs), **told(runs)}


def picture(numbers: dict[str, Any]) -> Any:
    """Both on their way."""
    from ..pages.style import panels

    figure, axes = panels(width=7)
    draw_curves(axes, numbers["curves"])
    axes.set_title("Each at its best learning rate, a line per seed")
    return figure

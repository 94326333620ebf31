"""The usual introduction: LoRA is not for very complex changes."""

from typing import Any

from ..experiments.claim import Band, Claim, Effect, Setting
from ._introduction import SOURCE, curves_figure, gain

CLAIM = Claim(
    source=SOURCE,
    where="limitations",
    says="LoRA is not ideal for extremely complex transformations.",
    here="As complex as a change of a language model can be: every token of the vocabulary means another one, so that"
    " the tiny base has to learn a language anew. LoRA (r = 8, all linear layers) and full fine-tuning, each at"
    " its best learning rate by validation loss. Measured: LoRA's share of what full fine-tuning gains on the test"
    " records in the same 96 steps (nats). Not ideal is defined as less than four fifths. In the smallest form, a"
    " matrix learns an update of full rank with r = 4.",
    switch="The same records in the language that the base knows; in the smallest form, an update of rank 4.",
    base="tiny",
    minutes=6,
    band=Band("share of full fine-tuning's gain that LoRA reaches", high=0.8, against_above=0.95),
    explained={
        "reproduced": "The difference is not the rank alone: LoRA leaves the embedding frozen, and a language in"
        " which every token means another one is learned most easily there. LoRA reaches 0.89 of what full fine-tuning"
        " with a frozen embedding gains. The switch turns the verdict by little:"
        " with the language that the base knows, LoRA reaches 0.81 of the gain (introduction-quality), and the band"
        " ends at 0.8.",
    },
    effect=Effect(paper=0.5, none=1, std=0.0046, assumed=True),
)


def run(setting: Setting) -> dict[str, Any]:
    """LoRA's share of the gain."""
    return gain(setting, complex_change=not setting.switched)


def picture(numbers: dict[str, Any]) -> Any:
    """Both validation losses during training."""
    return curves_figure(numbers["curves"], "A language learned anew, a line per seed")

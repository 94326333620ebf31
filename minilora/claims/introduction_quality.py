"""The usual introduction: a slight loss of quality at times, and no more."""

from typing import Any

from ..experiments.claim import SLIGHT, Claim, Effect, OnSmolLM2, Setting
from ._introduction import SOURCE, curves_figure, gain

CLAIM = Claim(
    source=SOURCE,
    where="limitations",
    says="LoRA's quality is at times slightly below that of full fine-tuning.",
    here="The tiny base learns legal answers, by LoRA (r = 8, all linear layers) and by full fine-tuning, with the same"
    " batches in the same order, each at its best learning rate by validation loss. Measured: LoRA's share"
    " of what full fine-tuning gains on the test records (nats). Slightly is defined as a twentieth of the gain. In"
    " the smallest form, a matrix learns an update of rank 4.",
    switch="What is learned is no longer simple: every token means another one, and LoRA cannot move the embedding; in"
    " the smallest form, an update of full rank.",
    base="tiny",
    minutes=6,
    shares_with="introduction-cost",
    band=SLIGHT.of("share of full fine-tuning's gain that LoRA reaches"),
    explained={
        "not at this size": "LoRA reached four fifths of full fine-tuning's gain: it is behind by more than slightly."
        " A large part of the difference is the embedding, a quarter of the tiny base, which full fine-tuning changes"
        " word by word, and LoRA leaves frozen. LoRA reaches 0.92 of what full fine-tuning with a frozen embedding"
        " gains."
        " Larger bases know the words already: papers that find no loss look at those.",
    },
    effect=Effect(paper=0.975, none=0.73, std=0.014, assumed=True),
    on_smollm2=OnSmolLM2(
        here="The same with SmolLM2, 40 steps of 8; each best learning rate is that of the first seed.",
        minutes=0.1,
        shares_with="forgets-less",
        effect=Effect(paper=0.975, none=0.73, std=0.0083, assumed=True),
        explained={
            "reproduced": "On a pretrained base LoRA with 1.8 % of the parameters reaches the loss of full fine-tuning:"
            " what the two add to the base is the same within 1.4 %. So it is the base that decides: the tiny one"
            " still has to learn its words.",
        },
    ),
)


def run(setting: Setting) -> dict[str, Any]:
    """LoRA's share of the gain."""
    return gain(setting, complex_change=setting.switched)


def picture(numbers: dict[str, Any]) -> Any:
    """Both validation losses during training."""
    return curves_figure(numbers["curves"], "Each at its best learning rate, a line per seed")

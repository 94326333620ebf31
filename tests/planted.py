"""A labelled data set with a label that is easy to learn: one word of each text decides it."""

import itertools
import json

LABELS = {"bill": ("invoice", "pay"), "parcel": ("courier", "late"), "other": ("music", "lunch")}
FRAMES = (
    "the {} please",
    "it is {} again",
    "{} and you",
    "my {} now",
    "why {} here",
    "no {} today",
    "is {} so",
    "a {}",
)


def planted(path, train=6):
    """Write it: of eight frames around each word the first `train` are trained on, one validates and one tests."""
    rows = []
    for (label, words), (i, frame) in itertools.product(LABELS.items(), enumerate(FRAMES)):
        split = "train" if i < train else "validation" if i == train else "test"
        rows += [{"text": frame.format(word), "label": label, "split": split} for word in words]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path

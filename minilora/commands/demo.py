"""Four specialists of the tiny base, for who wants to see them before teaching any: trained once, kept in runs/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..train.job import finetune
from ..train.options import Options
from ..train.run_folder import METRICS_FILE
from .domains import DOMAINS

BASE = "tiny"
STEPS = 150
LEARNING_RATE = 5e-3


def demo_folders(say: Callable[[str], None] = lambda line: None) -> tuple[str, dict[str, Path]]:
    """The base, and a folder for each domain; those that are not there yet are trained first, under two minutes."""
    named = {name: Path("runs", f"demo-{name}") for name in DOMAINS}
    missing = [name for name, folder in named.items() if not (folder / METRICS_FILE).is_file()]
    for i, name in enumerate(missing, 1):
        say(f"training {name} on the {BASE} base ({i} of {len(missing)})")
        options = Options(
            base=BASE, data=name, out=str(named[name]), steps=STEPS, lr=LEARNING_RATE, max_length=256, overwrite=True
        )
        finetune(options, say, measure=False)
    return BASE, named

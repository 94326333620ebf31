"""Progress bars on stderr."""

from __future__ import annotations

import sys
from typing import Any


class Bars:
    """Makes one bar per stage of a job."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet

    def __call__(self, title: str, total: int, unit: str, initial: int = 0) -> Any:
        """A new bar, at `initial` of `total`. On something that is no terminal it prints a line now and then."""
        from tqdm import tqdm

        pace = 0.2 if sys.stderr.isatty() else 20.0
        return tqdm(
            desc=f"{title:<28}",
            total=total,
            initial=initial,
            unit=unit,
            mininterval=pace,
            disable=self.quiet or total == 0,  # of nothing there is nothing to show
            dynamic_ncols=True,
        )

"""Progress bars on stderr."""

from __future__ import annotations

import functools
import sys
from typing import Any

# What is told of a stage (its loss, and the like) stands before the bar, which takes what room is left.
TOLD = "{desc:<14}  {told}  {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
SPEED = "{desc:<14}  {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


class Bars:
    """Makes one bar per stage of a job."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet

    def __call__(self, title: str, total: int, unit: str, initial: int = 0) -> Any:
        """A new bar, at `initial` of `total`. On something that is no terminal it prints a line now and then."""
        pace = 0.2 if sys.stderr.isatty() else 20.0
        return _bar_class()(
            desc=title,
            total=total,
            initial=initial,
            unit=unit,
            mininterval=pace,
            disable=self.quiet or total == 0,  # of nothing there is nothing to show
            dynamic_ncols=True,
        )


@functools.cache
def _bar_class() -> Any:
    from tqdm import tqdm

    class Bar(tqdm):
        """Shows what it was told with `set_postfix`, or else its speed."""

        @property
        def format_dict(self) -> dict[str, Any]:
            return super().format_dict | {"bar_format": TOLD if self.postfix else SPEED, "told": self.postfix}

    return Bar

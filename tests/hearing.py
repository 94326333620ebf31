"""What functions do and report while they work: tokens they read, lines they log, counts for a progress bar."""

import logging
from contextlib import contextmanager

from minilora.progress import log, progress


@contextmanager
def counts_of(unit):
    """A list of the counts of work in this unit that the block reports. The block must run in this thread."""
    counts = []
    with progress("heard", 0, unit) as bar:
        bar.update = lambda count=1, text=None, **values: counts.append(count) if count else None
        yield counts


@contextmanager
def lines_of():
    """A list that receives each line that the block logs, for fixtures of a module, where there is no `caplog`."""
    lines, before = [], log.level

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    keep = Keep()
    log.addHandler(keep)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(keep)
        log.setLevel(before)


def counted(model, monkeypatch):
    """The tokens of every forward pass from here on."""
    tokens, forward = [], type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, ids, *a, **k: tokens.append(ids.size) or forward(self, ids, *a, **k)
    )
    return tokens

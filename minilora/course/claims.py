"""A claim: a number that a lesson states, with a band that was fixed before it was computed."""

import math

from .compare import digits
from .predictions import measured

AGAIN = (
    "Was a cell skipped or run twice? Then choose Kernel > Restart Kernel and Run All Cells. "
    "With your own values, a claim may fail."
)


def claim(name: str, value: float, low: float, high: float) -> None:
    """Print one line: name, value, band and verdict. Raises AssertionError with that line outside the band,
    and with what to do about it.

    If the reader was asked for a guess with `predict(name)`, a second line says whether the value is inside it.

    low, high: the band, both ends included; equal for a number that must be exact. math.inf leaves one side open.

    >>> claim("parameters of SmolLM2", 134_515_008, 134_515_008, 134_515_008)
    parameters of SmolLM2: 134,515,008 (claimed: exactly that): holds
    >>> claim("loss on law", 3.2581, 3.1, 3.4)
    loss on law: 3.258 (claimed: 3.1 to 3.4): holds
    """
    if low > high:
        raise ValueError(f"claim {name!r}: the band goes from {low} to {high}; give the smaller end first")
    holds = bool(low <= value <= high)  # False for NaN
    if low == high:
        band = "exactly that" if holds else f"exactly {digits(low)}"
    elif math.isinf(high):
        band = f"at least {digits(low)}"
    elif math.isinf(low):
        band = f"at most {digits(high)}"
    else:
        band = f"{digits(low)} to {digits(high)}"
    line = f"{name}: {digits(value)} (claimed: {band}): {'holds' if holds else 'DOES NOT HOLD'}"
    if not holds:
        raise AssertionError(f"{line}\n{AGAIN}")
    print(line)
    measured(name, value)

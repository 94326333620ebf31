"""What is served, to whom, and how much at a time. The fields are the flags of `minilora serve`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..options import BASE, BF16, PACKED, option

_BOUNDS: dict[str, Any] = {"group": "bounds"}
_MACHINE: dict[str, Any] = {"group": "memory and device"}


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What is served, to whom, and how much at a time. Raises ValueError for values that mean nothing."""

    adapter: Sequence[str] = option(
        (), "folders of adapters, such as runs/legal or legal=runs/legal", metavar="[NAME=]DIR"
    )
    base: str | None = option(None, f"{BASE} (default: the one that the adapters' folders name, or smollm2)")
    demo: bool = option(
        False, "serve four specialists of the tiny base, trained first where they are not there yet, and open the page"
    )
    no_open: bool = option(False, "do not open the page in a browser", only={"demo": True})
    host: str = option("127.0.0.1", "address to listen on; others than this machine's own let others in")
    port: int = option(8000, "port to listen on; 0 takes a free one")

    slots: int = option(16, "answers that are computed at a time; more wait", **_BOUNDS)
    queue: int = option(64, "answers that may wait; more are refused", **_BOUNDS)
    context: int = option(2048, "tokens of a conversation and its answer, at most what the model can see", **_BOUNDS)
    max_new_tokens: int = option(256, "tokens of an answer, where a request does not say", **_BOUNDS)
    connections: int = option(256, "connections at a time; more are refused", **_BOUNDS)

    quantized: bool | str = option(False, **PACKED, **_MACHINE)
    bf16: bool = option(False, BF16, **_MACHINE)
    device: str = option("cpu", "where to compute", choices=("cpu", "cuda"), **_MACHINE)
    force: bool = option(False, "accept adapters of another base of the same shape")

    def __post_init__(self):
        if self.demo and (self.adapter or self.base):
            raise ValueError("--demo brings base and adapters of its own: leave out --adapter and --base, or --demo")
        for name, least in (("slots", 1), ("queue", 0), ("context", 2), ("max_new_tokens", 1), ("connections", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must lie between 0 and 65535, got {self.port}")

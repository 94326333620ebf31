"""What to fine-tune on what, and how; whom to talk to. The fields are the flags of `minilora finetune` and `chat`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..flags import BASE, PACKED, RECOMPUTE, option
from ..lora.config import LoraConfig
from .streams import check_settings

_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".gguf")
_LORA: dict[str, Any] = {"group": "adapter", "only": {"method": "lora"}}
_TRAINING: dict[str, Any] = {"group": "training"}
_MACHINE: dict[str, Any] = {"group": "memory and device"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to fine-tune on what, and how. Raises ValueError for values that mean nothing."""

    base: str = option("smollm2", BASE)
    data: str = option(
        "legal",
        "legal, medical, support, finance; a .jsonl, .json, .csv, .txt file; a folder of train, valid, test",
    )
    field: Mapping[str, str] | None = None  # columns of the data under other names
    method: str = option("lora", "what is trained: an adapter, or all of the model", choices=("lora", "full"))
    out: str | None = option(None, "folder for the results (default: runs/<data>, <data>-<base>, <data>-full)")
    overwrite: bool = option(False, "replace a finished run in that folder, or forget one that was interrupted")

    r: int = option(8, "rank of the update", **_LORA)
    lora_alpha: float = option(16.0, "scale is alpha / r", **_LORA)
    target_modules: str | Sequence[str] = option(
        "all-linear", "modules to adapt: names such as q_proj v_proj, or all-linear", metavar="NAME", **_LORA
    )

    epochs: float = option(4.0, "passes over the data", only={"steps": None}, **_TRAINING)
    steps: int | None = option(None, "number of steps, instead of --epochs", **_TRAINING)
    lr: float | None = option(None, "peak learning rate (default: 2e-3 for lora, 2e-4 for full)", **_TRAINING)
    batch_size: int = option(8, "records per step", **_TRAINING)
    max_length: int = option(512, "tokens per record, cut beyond", **_TRAINING)
    eval_records: int = option(80, "paraphrases measured, evenly chosen", **_TRAINING)
    seed: int = option(0, "decides the adapter's start and the order of the records", **_TRAINING)

    quantized: bool = option(False, PACKED, only={"method": "lora"}, **_MACHINE)
    recompute: bool = option(False, RECOMPUTE, **_MACHINE)
    device: str = option("cpu", "where to compute", choices=("cpu", "cuda"), **_MACHINE)

    def __post_init__(self):
        if self.method not in ("lora", "full"):
            raise ValueError(f"method must be 'lora' or 'full', got {self.method!r}")
        if self.method == "full" and self.quantized:
            raise ValueError("packed weights cannot be trained: leave out quantized, or use method lora")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        for name, value in (("epochs", self.epochs), ("lr", self.learning_rate)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        for name, value, least in (
            ("steps", 1 if self.steps is None else self.steps, 1),
            ("batch_size", self.batch_size, 1),
            ("eval_records", self.eval_records, 1),
            ("max_length", self.max_length, 8),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.lora_config()  # refuses what no adapter can be

    @property
    def learning_rate(self) -> float:
        """lr, or the method's own: LoRA takes about ten times what full fine-tuning does."""
        return self.lr if self.lr is not None else (2e-3 if self.method == "lora" else 2e-4)

    @property
    def folder(self) -> Path:
        """Where results go: `out`, or runs/<data>, with the base's name unless it is the default, and with -full."""
        if self.out:
            return Path(self.out)
        base = [] if self.base == Options.base else [_name_of(self.base)]
        return Path("runs", "-".join([_name_of(self.data), *base, *([] if self.method == "lora" else [self.method])]))

    def lora_config(self) -> LoraConfig:
        """The adapter these options ask for."""
        return LoraConfig(r=self.r, lora_alpha=self.lora_alpha, target_modules=self.target_modules)


def _name_of(source: str) -> str:
    """A word for a data set or a base: the last part of its path, without what tells the format of a file."""
    path = Path(source)
    name = path.name or path.resolve().name  # of "."
    return Path(name).stem if path.suffix.lower() in _FORMATS else name


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Whom to talk to, and how it answers. Raises ValueError for values that mean nothing."""

    base: str = option("smollm2", BASE)
    adapter: str | None = option(None, "folder of an adapter, such as runs/legal")
    quantized: bool = option(False, PACKED)
    prompt: str | None = option(None, "ask one question and end")
    max_new_tokens: int = option(128, "tokens of an answer, at most")
    temperature: float = option(0.0, "0 takes the likeliest token")
    seed: int = option(0, "for a temperature above 0")
    device: str = option("cpu", "where to compute", choices=("cpu", "cuda"))

    def __post_init__(self):
        check_settings(self.max_new_tokens, self.temperature, self.seed)

"""What to fine-tune on what, and how. The fields are the flags of `minilora finetune`."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import toml
from ..data.formats import check_field
from ..lora.config import LoraConfig
from ..models.rounded import rounded_to
from ..nn.optim import SCHEDULES
from ..options import BASE, BF16, PACKED, RECOMPUTE, beside, option
from .run_folder import OPTIONS_FILE, RunFolder

_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".gguf")
FIELD = "columns of the data that have other names: question=q answer=a reads q and a"
_ANYHOW = ("out", "overwrite", "resume", "save_every")  # these do not change what is learned
_LORA: dict[str, Any] = {"group": "lora", "only": {"method": "lora"}}
_NEW: dict[str, Any] = {"group": "lora", "only": {"method": "lora", "adapter": None}}  # what a trained adapter has
_TRAINING: dict[str, Any] = {"group": "training"}
_MEASURING: dict[str, Any] = {"group": "measuring"}
_MACHINE: dict[str, Any] = {"group": "memory and device"}
_STARTS = (True, False, "gaussian", "pissa")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to fine-tune on what, and how. Raises ValueError for values that mean nothing."""

    base: str = option("smollm2", BASE)
    data: str = option(
        "legal",
        "legal, medical, support, finance; a .jsonl, .json, .csv, .txt file; a folder of train, valid, test",
    )
    field: Mapping[str, str] | None = option(None, FIELD, metavar="NAME=COLUMN", follows=("data",))
    method: str = option("lora", "what is trained: an adapter, or all of the model", choices=("lora", "full"))
    out: str | None = option(None, "folder for the results (default: runs/<data>, <data>-<base>, <data>-full)")
    overwrite: bool = option(
        False, "replace a finished run in that folder, or forget one that was interrupted", recorded=False
    )
    resume: bool = option(False, "go on with the run in that folder that was interrupted", recorded=False)
    save_every: int | None = option(
        None, "steps from one checkpoint to the next (default: a pass; with full on Ctrl-C alone)"
    )

    adapter: str | None = option(
        None, "start from the trained adapter in this folder, with its settings", only={"method": "lora"}
    )
    r: int = option(8, "rank of the update", **_NEW)
    lora_alpha: float = option(16.0, "scale is alpha / r", **_NEW)
    target_modules: str | Sequence[str] = option(
        "all-linear", "modules to adapt: names such as q_proj v_proj, or all-linear", metavar="NAME", **_NEW
    )

    exclude_modules: str | Sequence[str] | None = option(
        None, "modules of these names to leave out again", metavar="NAME", **_NEW
    )
    layers_to_transform: Sequence[int] | None = option(None, "adapt these blocks only", metavar="N", **_NEW)
    rank_pattern: Mapping[str, int] | None = option(
        None, "another rank for modules whose name ends so", metavar="NAME=R", **_NEW
    )
    alpha_pattern: Mapping[str, float] | None = option(
        None, "another alpha for modules whose name ends so", metavar="NAME=ALPHA", **_NEW
    )
    lora_dropout: float = option(0.0, "share of its input that the update does not see in training", **_NEW)
    bias: str = option(
        "none",
        "biases that learn, too: of the adapted modules, or all (a Llama has none)",
        choices=("none", "lora_only", "all"),
        **_NEW,
    )
    use_rslora: bool = option(False, "rsLoRA: scale is alpha / sqrt(r)", **_NEW)
    use_dora: bool = option(False, "DoRA: the length of each row of a weight learns apart from its direction", **_NEW)
    init_lora_weights: bool | str = option(
        True,
        "how the update starts: as nothing (true, gaussian), as the largest part of the weight (pissa), or at random "
        "(false; for tests) (default: true)",
        choices=_STARTS,
        metavar="{true,gaussian,pissa,false}",
        **_NEW,
    )
    lora_plus: float | None = option(
        None, "LoRA+: B learns so many times faster than A, such as 16", metavar="RATIO", **_LORA
    )
    strength: float | None = option(
        None,
        "share of the trained update that is kept: less of it forgets less "
        "(default: 0.65; with --adapter, DoRA or PiSSA 1)",
        follows=("method", "adapter", "use_dora", "init_lora_weights"),
        **_LORA,
    )

    epochs: float = option(4.0, "passes over the data", only={"steps": None}, **_TRAINING)
    steps: int | None = option(None, "number of steps, instead of --epochs", **_TRAINING)
    lr: float | None = option(
        None, "peak learning rate (default: 2e-3 for lora, 2e-4 for full)", follows=("method",), **_TRAINING
    )
    warmup: float = option(0.1, "share of the steps in which the learning rate rises to its peak", **_TRAINING)
    schedule: str = option("cosine", "how it falls from there", choices=tuple(SCHEDULES), **_TRAINING)
    weight_decay: float = option(0.0, "AdamW's, on all that is trained", **_TRAINING)
    max_grad_norm: float = option(1.0, "gradients are clipped to this common norm; inf: never", **_TRAINING)
    batch_size: int = option(8, "records per step", **_TRAINING)
    grad_accumulation: int = option(
        1, "batches per step, one after another: the numbers of a larger batch, the memory of one", **_TRAINING
    )
    max_length: int = option(512, "tokens per record, cut beyond", **_TRAINING)
    seed: int = option(0, "decides the adapter's start and the order of the records", **_TRAINING)

    eval_records: int = option(80, "paraphrases measured, evenly chosen", **_MEASURING)
    eval_every: int | None = option(
        None, "steps from one validation to the next, on what is held out (default: a pass)", **_MEASURING
    )
    patience: int | None = option(None, "stop after so many validations that found nothing better", **_MEASURING)
    keep: str = option(
        "best", "which weights are the result: best in validation, or last", choices=("best", "last"), **_MEASURING
    )

    quantized: bool | str = option(False, **PACKED, only={"method": "lora"}, **_MACHINE)
    bf16: bool = option(False, BF16, only={"method": "lora"}, **_MACHINE)
    recompute: bool = option(False, RECOMPUTE, **_MACHINE)
    device: str = option("cpu", "where to compute", choices=("cpu", "cuda"), **_MACHINE)

    def __post_init__(self):
        check_field(self.field or {})
        rounded_to(self.quantized)  # refuses an unknown kind
        if self.method not in ("lora", "full"):
            raise ValueError(f"method must be 'lora' or 'full', got {self.method!r}")
        if self.method == "full" and self.quantized:
            raise ValueError("packed weights cannot be trained: leave out quantized, or use method lora")
        if self.method == "full" and self.bf16:
            raise ValueError("weights in bfloat16 cannot be trained: leave out bf16, or use method lora")
        if self.device == "cuda" and self.bf16:
            raise ValueError("bf16 is for device 'cpu': leave out one of the two")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep must be 'best' or 'last', got {self.keep!r}")
        for name in ("adapter", "strength"):
            if self.method == "full" and getattr(self, name) is not None:
                raise ValueError(f"method full trains no adapter: leave out {name}, or use method lora")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        for name, value in (
            ("epochs", self.epochs),
            ("lr", self.learning_rate),
            ("lora_plus", 1.0 if self.lora_plus is None else self.lora_plus),
            ("strength", self.kept_strength),
        ):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if self.kept_strength != 1 and not self._plain:
            raise ValueError(f"strength {self.kept_strength:g} is for plain LoRA: with DoRA or PiSSA leave it out")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be a positive number, or inf for none, got {self.max_grad_norm}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be a number from 0 on, got {self.weight_decay}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be a share of the steps, from 0 to 1, got {self.warmup}")
        for name, value, least in (
            ("steps", 1 if self.steps is None else self.steps, 1),
            ("batch_size", self.batch_size, 1),
            ("grad_accumulation", self.grad_accumulation, 1),
            ("eval_records", self.eval_records, 1),
            ("eval_every", 1 if self.eval_every is None else self.eval_every, 1),
            ("save_every", 1 if self.save_every is None else self.save_every, 1),
            ("patience", 1 if self.patience is None else self.patience, 1),
            ("max_length", self.max_length, 8),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.lora_config()  # refuses what no adapter can be

    @classmethod
    def read(cls, path: str | Path, **change: Any) -> Options:
        """The options in a TOML file, such as a run's run.toml, but for those that are given here, and for what means
        nothing beside them, as at the command line.

        Raises ValueError naming the file for what it cannot say.
        """
        return cls(**beside(cls, change, toml.read(cls, Path(path))) | change)

    def text(self) -> str:
        """The same as TOML, with all defaults written out: a later version repeats the run even if it has others."""
        file = shlex.quote((self.folder / OPTIONS_FILE).as_posix())
        again = f"minilora finetune --config {file} --out ANOTHER_FOLDER"
        comments = (f"What this run was told. The same again: {again}", "A flag given beside --config goes first.")
        return toml.write(self.in_effect(), *comments)

    def in_effect(self) -> Options:
        """The same with what is usual written out, where nothing was given."""
        return replace(self, lr=self.learning_rate, strength=self.kept_strength if self.method == "lora" else None)

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result of a run, those in effect, as JSON stores them."""
        values = asdict(self.in_effect())
        return json.loads(json.dumps({name: value for name, value in values.items() if name not in _ANYHOW}))

    def begun(self) -> dict[str, Any]:
        """What the interrupted run in the same folder was told when it began; nothing where there is none."""
        file = RunFolder(self.folder).partial / OPTIONS_FILE
        return toml.read(Options, file) if file.is_file() else {}

    @property
    def learning_rate(self) -> float:
        """lr, or the method's own: LoRA takes about ten times what full fine-tuning does."""
        return self.lr if self.lr is not None else (2e-3 if self.method == "lora" else 2e-4)

    @property
    def kept_strength(self) -> float:
        """strength, or what is usual: 0.65 of a new, plain LoRA. DoRA and PiSSA are kept whole; an adapter that was
        trained before has been weakened already.
        """
        if self.strength is not None:
            return self.strength
        return 0.65 if self._plain and self.method == "lora" and self.adapter is None else 1.0

    @property
    def _plain(self) -> bool:
        return not self.use_dora and self.init_lora_weights != "pissa"

    @property
    def records_per_step(self) -> int:
        """The samples of one step: `grad_accumulation` batches of `batch_size`."""
        return self.batch_size * self.grad_accumulation

    @property
    def folder(self) -> Path:
        """Where results go: `out`, or runs/<data>, with the base's name unless it is the default, and with -full."""
        if self.out:
            return Path(self.out)
        base = [] if self.base == Options.base else [_name_of(self.base)]
        return Path("runs", "-".join([_name_of(self.data), *base, *([] if self.method == "lora" else [self.method])]))

    def lora_config(self) -> LoraConfig:
        """The adapter these options ask for."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
            rank_pattern=dict(self.rank_pattern or {}),
            alpha_pattern=dict(self.alpha_pattern or {}),
            lora_dropout=self.lora_dropout,
            bias=self.bias,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=self.init_lora_weights,
        )


def _name_of(source: str) -> str:
    """A word for a data set or a base: the last part of its path, without what tells the format of a file."""
    path = Path(source)
    name = path.name or path.resolve().name  # of "."
    return Path(name).stem if path.suffix.lower() in _FORMATS else name

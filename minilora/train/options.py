"""What to fine-tune on what, and how. The fields are the flags of `minilora finetune`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from .. import toml
from ..data.formats import check_field, with_label
from ..data.repository import SUFFIXES, is_dataset
from ..data.rows import TEXT_SUFFIXES
from ..data.samples import check_mix
from ..lora.config import FROM_BASE, LoraConfig, can_be_scaled
from ..models.with_adapters import DEFAULT_BASE, base_of
from ..nn.optim import SCHEDULES
from ..options import (
    BASE,
    BF16,
    PACKED,
    RECOMPUTE,
    check,
    flag_fields,
    has_meaning,
    option,
    short_repr,
    without_conflicts,
)
from ..terminal import quote
from .run_folder import OPTIONS_FILE, RunFolder

_FORMATS = (*SUFFIXES, *TEXT_SUFFIXES, ".gguf")
FIELD = "names of your columns: question=q answer=a reads the question from q and the answer from a"
LABEL = "to classify: the column with the label of each text (default: label, intent or category, next to a text)"
SCHEMA = "to extract fields: their JSON Schema (default: NAME.schema.json next to the data"
MAX_LENGTH = "tokens per record; longer conversations are truncated, longer texts are divided"
RATE = 2e-3  # LoRA's learning rate for SmolLM2 and for tiny; rate.py has that of another base
ANYHOW = ("out", "overwrite", "resume", "save_every", "report_to")  # these do not change what is learned
_LORA: dict[str, Any] = {"group": "lora", "only": {"method": "lora"}}
_NEW: dict[str, Any] = {"group": "lora", "only": {"method": "lora", "adapter": None}}  # what a trained adapter has
_TRAINING: dict[str, Any] = {"group": "training"}
_MEASURING: dict[str, Any] = {"group": "measuring"}
_MACHINE: dict[str, Any] = {"group": "memory and device"}


@dataclass(frozen=True, kw_only=True)
class Training:
    """The hyperparameters of a training. Raises ValueError for values that are not allowed."""

    epochs: float = option(4.0, "epochs of training", only={"steps": None}, above=0, **_TRAINING)
    steps: int | None = option(None, "steps of training, instead of --epochs", least=1, **_TRAINING)
    lr: float | None = option(
        None,
        "peak learning rate (default: for lora 2e-3 on smollm2 and tiny, on another base a hundredth of the root mean "
        "square of its matrices; for full a tenth of it, and with dpo a tenth of that)",
        above=0,
        follows=("method", "loss"),
        **_TRAINING,
    )
    warmup: float = option(
        0.1, "share of the steps in which the learning rate rises to its peak; 0: none", least=0, most=1, **_TRAINING
    )
    schedule: str = option(
        "cosine", "how the learning rate falls after the warmup", choices=tuple(SCHEDULES), **_TRAINING
    )
    weight_decay: float = option(0.0, "weight decay of AdamW, on all trainable parameters", least=0, **_TRAINING)
    max_grad_norm: float = option(
        1.0, "gradients are clipped to this global norm; inf: no clipping", above=0, infinite=True, **_TRAINING
    )
    batch_size: int = option(8, "records per batch", least=1, **_TRAINING)
    grad_accumulation: int = option(
        1, "batches per step: the result of a larger batch size, in the memory of one batch", least=1, **_TRAINING
    )
    seed: int = option(0, "seed of the adapter's initialisation and of the order of the records", least=0, **_TRAINING)

    eval_every: int | None = option(
        None, "steps between measurements of the validation loss (default: an epoch or 500)", least=1, **_MEASURING
    )
    patience: int | None = option(
        None, "early stopping: the number of validations in a row without a lower loss", least=1, **_MEASURING
    )
    keep: str = option(
        "best",
        "which weights are saved: those with the lowest validation loss (best), or the last",
        choices=("best", "last"),
        **_MEASURING,
    )

    def __post_init__(self):
        check(self)

    @property
    def records_per_step(self) -> int:
        """The samples of one step: `grad_accumulation` batches of `batch_size`."""
        return self.batch_size * self.grad_accumulation


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a job trains on what, and where its results go."""

    base: str = option(
        None, f"{BASE} (default: {DEFAULT_BASE}; with --adapter, the one that its folder names)", path=True
    )
    data: str = option(
        "legal",
        "legal, medical, support, finance, or one of these with -labels, -fields or -pairs; a .jsonl, .json, .csv, "
        ".tsv, .parquet, .txt or .md file; a folder of train, valid and test files, or of texts; a name on "
        "huggingface.co, org/set or org/set:train",
        path=True,
    )
    field: Mapping[str, str] | None = option(None, FIELD, metavar="NAME=COLUMN", follows=("data",))
    label: str | None = option(None, LABEL, metavar="COLUMN", follows=("data",))
    schema: str | None = option(
        None, f"{SCHEMA}, or that of the adapters)", metavar="FILE", path=True, follows=("data",)
    )
    context: str | None = option(
        None,
        "to answer from passages: each question is trained with the right one in its prompt; support-handbook, a .txt "
        "or .md file (a passage per paragraph), or rows with a column text",
        metavar="FILE",
        path=True,
        follows=("data",),
    )
    mix: Mapping[str, float] | None = option(
        None,
        "other data to train on as well: SHARE of the records of each epoch, such as 0.2, comes from DATA",
        metavar="DATA=SHARE",
        only={"loss": "sft"},
        why="DPO learns from pairs of answers alone",
        path=True,
    )
    method: str = option(
        "lora", "what is trained: an adapter (lora), or the whole model (full)", choices=("lora", "full")
    )
    out: str | None = option(None, "folder for the results (default: runs/<data>, <data>-<base>, <data>-full)")
    overwrite: bool = option(
        False, "replace a finished run in that folder, or discard an interrupted one", recorded=False
    )
    resume: bool = option(False, "continue the interrupted run in that folder", recorded=False)
    save_every: int | None = option(
        None, "steps between checkpoints for --resume (default: an epoch or 500; with full only on Ctrl-C)", least=1
    )

    adapter: str | None = option(
        None,
        "train the adapter in this folder further, with its rank and its other LoRA options; one that began as PiSSA "
        "continues as the plain LoRA of twice the rank that it was saved as",
        only={"method": "lora"},
        path=True,
    )
    r: int = option(8, "rank of the update, its capacity; facts and many labels take 16 to 32", **_NEW)
    lora_alpha: float = option(16.0, "the update is multiplied by alpha / r; usually alpha is 2 r", **_NEW)
    target_modules: str | Sequence[str] = option(
        "all-linear", "modules to adapt: names such as q_proj v_proj, or all-linear", metavar="NAME", **_NEW
    )

    exclude_modules: str | Sequence[str] | None = option(None, "names of modules not to adapt", metavar="NAME", **_NEW)
    layers_to_transform: Sequence[int] | None = option(
        None,
        "adapt only these blocks, counted from 0; the last ones alone take less time and memory",
        metavar="N",
        **_NEW,
    )
    rank_pattern: Mapping[str, int] | None = option(
        None, "another rank for modules whose name ends with NAME, such as q_proj=16", metavar="NAME=R", **_NEW
    )
    alpha_pattern: Mapping[str, float] | None = option(
        None, "another alpha for modules whose name ends with NAME", metavar="NAME=ALPHA", **_NEW
    )
    lora_dropout: float = option(0.0, "against overfitting: dropout probability on the input of the update", **_NEW)
    use_rslora: bool = option(False, "rsLoRA, for high ranks: the update is multiplied by alpha / sqrt(r)", **_NEW)
    use_dora: bool = option(
        False, "DoRA: train the magnitude of each row of a weight apart from its direction; slower", **_NEW
    )
    freeze_A: bool = option(False, "LoRA-FA: train B only; A stays as it was initialised", **_NEW)
    init_lora_weights: bool | str = option(
        True,
        "the update before training: zero (true, gaussian), the weight's best part of rank r (pissa), or random "
        "(false; for tests) (default: true)",
        choices=(True, "gaussian", *FROM_BASE, False),
        **_NEW,
    )
    lora_plus: float | None = option(
        None, "LoRA+: the learning rate of B, as a multiple of A's, such as 16", metavar="RATIO", above=0, **_LORA
    )
    strength: float | None = option(
        None,
        "adapter scale: after training, the update is multiplied by it; a lower one forgets less and recalls less "
        "(default: 0.65; for labels and fields, with --adapter, DPO, DoRA or PiSSA 1)",
        above=0,
        follows=("method", "adapter", "loss", "use_dora", "init_lora_weights"),
        **_LORA,
    )

    loss: str = option(
        "sft",
        "what is minimised: the cross-entropy of the answers (sft), or DPO's loss on chosen and rejected ones (dpo)",
        choices=("sft", "dpo"),
        **_TRAINING,
    )
    beta: float = option(
        0.1,
        "DPO: the higher it is, the closer the model stays to the model before training",
        only={"loss": "dpo"},
        above=0,
        **_TRAINING,
    )


@dataclass(frozen=True, kw_only=True)
class Options(Training, Subject):
    """The options of a fine-tuning job. Raises ValueError for values that are not allowed, alone or together."""

    max_length: int = option(512, MAX_LENGTH, least=8, **_TRAINING)

    eval_records: int = option(40, "records of each set that are measured, evenly chosen", least=1, **_MEASURING)
    report_to: str | None = option(
        None,
        "also log loss, gradient norm and learning rate of each step to OUT/tensorboard, trackio or wandb; all stays "
        "on this machine unless WANDB_MODE or TRACKIO_SPACE_ID is set",
        choices=("tensorboard", "trackio", "wandb"),
        **_MEASURING,
    )

    quantized: bool | str = option(False, **PACKED, only={"method": "lora"}, **_MACHINE)
    bf16: bool = option(False, BF16, only={"method": "lora"}, **_MACHINE)
    recompute: bool = option(False, RECOMPUTE, **_MACHINE)
    device: str = option("cpu", "where to compute", choices=("cpu", "cuda"), **_MACHINE)

    def __post_init__(self):
        if self.base is None and self.adapter is None:
            object.__setattr__(self, "base", DEFAULT_BASE)
        check(self, "mix", "quantized", "bf16", "adapter", "strength")
        check_field(self.field or {})
        check_mix(self.mix or {})
        if self.data in (self.mix or {}):
            raise ValueError(f"mix is for other data than {self.data}: leave it out there")
        for name, sources in (("mix", self.mix or {}), ("data", (self.data,))):
            if "general" in sources:
                raise ValueError(f"{name}: general measures forgetting and has no training records: choose other data")
        if self.device == "cuda" and self.bf16:
            raise ValueError("bf16 is for device 'cpu': leave out one of the two")
        if self.adapter_scale != 1 and not can_be_scaled(vars(self)):
            raise ValueError(f"strength {self.adapter_scale:g} is for plain LoRA: with DoRA or PiSSA leave it out")
        self.lora_config()  # refuses what no adapter can have

    def __repr__(self) -> str:
        """base, data, and every other option whose value is not the default."""
        return short_repr(self, "base", "data")

    @classmethod
    def read(cls, path: str | Path, **change: Any) -> Options:
        """The options in a TOML file, such as a run's run.toml, changed by those that are given here.

        As on the command line, options of the file that mean nothing with a given one are dropped. Raises ValueError
        naming the file for what is not allowed.
        """
        return cls(**without_conflicts(cls, change, toml.read(cls, Path(path))) | change)

    def text(self) -> str:
        """The same as TOML, for a file in `folder`, with all defaults: a later version may have others."""
        file = quote((self.folder / OPTIONS_FILE).as_posix())
        again = f"minilora finetune --config {file} --out ANOTHER_FOLDER"
        comments = (f"The options of this run. To repeat it: {again}", "Flags take precedence over this file.")
        paths = {
            item.name: toml.moved(getattr(self, item.name), Path(), self.folder)
            for item in flag_fields(Options)
            if item.metadata["path"]
        }
        return toml.write(replace(self.in_effect(), **paths), *comments)

    def on_its_base(self) -> Options:
        """The same with the base that the adapter's folder names, where none was given. Raises as `base_of` does."""
        if self.base is not None or self.adapter is None:
            return self
        return replace(self, base=str(base_of({"adapter": Path(self.adapter)})))

    def in_effect(self) -> Options:
        """The same with the learning rate and the adapter scale that are used where none was given."""
        return replace(self, lr=self.learning_rate, strength=self.adapter_scale if self.method == "lora" else None)

    def for_task(self) -> Options:
        """The same for labels and fields, where the update is not scaled down: no other text can be an answer."""
        return self if self.strength is not None or self.method == "full" else replace(self, strength=1.0)

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result of a run, those in effect, as JSON stores them.

        Paths are relative to `folder`, so that the run is the same from wherever it is resumed.
        """
        values = asdict(self.in_effect())
        chosen = [item for item in flag_fields(Options) if item.name not in ANYHOW and has_meaning(item, values)]
        for item in chosen:
            if item.metadata["path"]:
                values[item.name] = toml.moved(values[item.name], Path(), self.folder)
        return json.loads(json.dumps({item.name: values[item.name] for item in chosen}))

    def begun(self) -> dict[str, Any]:
        """The options of the interrupted run in the same folder; none where there is no such run."""
        file = RunFolder(self.folder).partial / OPTIONS_FILE
        return toml.read(Options, file) if file.is_file() else {}

    @property
    def columns(self) -> dict[str, str]:
        """`field`, with the column of the labels."""
        return with_label(self.field, self.label)

    @property
    def learning_rate(self) -> float:
        """lr, or the default on smollm2 and tiny."""
        return cast(float, self.on_base(RATE).lr)

    def on_base(self, rate: float) -> Options:
        """The same with the learning rate for a base, where none was given: LoRA's `rate`, for full fine-tuning a tenth
        of it, and with DPO a tenth of that.
        """
        if self.lr is not None:
            return self
        return replace(self, lr=rate / (10 if self.method == "full" else 1) / (10 if self.loss == "dpo" else 1))

    @property
    def adapter_scale(self) -> float:
        """strength, or its default: 0.65 for a new, plain LoRA. It is 1 for DPO, for DoRA and PiSSA, which cannot be
        scaled, and for an adapter that was trained before, which has been scaled already.
        """
        if self.strength is not None:
            return self.strength
        new = can_be_scaled(vars(self)) and self.method == "lora" and self.adapter is None
        return 0.65 if new and self.loss == "sft" else 1.0

    @property
    def folder(self) -> Path:
        """The folder for results: `out`, or runs/<data>, with the base's name unless it is the default or not known yet
        (see `on_its_base`), and -full.
        """
        if self.out:
            return Path(self.out)
        base = [] if self.base in (None, DEFAULT_BASE) else [_name_of(self.base)]
        return Path("runs", "-".join([_name_of(self.data), *base, *([] if self.method == "lora" else [self.method])]))

    def lora_config(self) -> LoraConfig:
        """The configuration of the adapter that these options describe."""
        given = {item.name: getattr(self, item.name) for item in fields(LoraConfig)}
        return LoraConfig(**{name: value for name, value in given.items() if value is not None})


def _name_of(source: str) -> str:
    """A word for a data set or a base: the last part of its path, without the ending of a file; on huggingface.co its
    name and its split.
    """
    if is_dataset(source):
        name, _, split = source.partition(":")
        return "-".join([name.partition("@")[0].partition("/")[2], *filter(None, split.split("/"))])
    path = Path(source)
    name = path.name or path.resolve().name  # of "."
    return Path(name).stem if path.suffix.lower() in _FORMATS else name

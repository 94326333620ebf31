"""What a sweep tries: options of `finetune` with several values each, and the trials that they make together."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from ..options import check_value, flag, flag_fields, has_meaning, kinds_of, option
from ..train.options import ANYHOW, Options

TARGETS = {  # what papers call these modules -> their names
    "qv": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
USUAL = {"base": "tiny", "strength": 1.0}  # defaults other than finetune's: an update is compared unscaled
FOUND = {item.name: item for item in flag_fields(Options) if item.name not in ANYHOW}
MOST = 10_000  # combinations of values: more are a slip of the hand

_SWEEP: dict[str, Any] = {"group": "sweep"}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Options of the sweep itself."""

    out: str | None = option(None, "folder for table and pictures (default: runs/sweep-<data>[-<base>])", **_SWEEP)
    overwrite: bool = option(False, "delete the sweep in that folder first", recorded=False, **_SWEEP)
    jobs: int | None = option(
        None, "trials at a time, each with its share of the cores (default: one per core)", least=1, **_SWEEP
    )

    def __post_init__(self):
        check_value(Sweep, "jobs", self.jobs)
        for name in FOUND:
            if (values := getattr(self, name)) is not None and not len(values):
                raise ValueError(f"{name} has no values: give it one or more, or leave it out")

    @property
    def folder(self) -> Path:
        """The folder of all results: `out`, or runs/sweep-<data>[-<base, if another than the default>]."""
        base, own = self.values("base")[0], Options(data=self.values("data")[0]).folder
        named = "" if base == USUAL["base"] else f"-{Options(data=base).folder.name}"
        return Path(self.out) if self.out else own.with_name(f"sweep-{own.name}{named}")

    def values(self, name: str) -> list[Any]:
        """The values of an option of finetune, each once."""
        given = getattr(self, name)
        if given is None or isinstance(given, Mapping):
            return [USUAL.get(name, FOUND[name].default) if given is None else given]
        return [value for i, value in enumerate(given) if value not in given[:i]]

    @property
    def varied(self) -> list[str]:
        """The options that have several values."""
        return [name for name in FOUND if len(self.values(name)) > 1]

    def given(self) -> dict[str, Any]:
        """The options that were given, which decide the trials, as JSON stores them."""
        named = {name: getattr(self, name) for name in FOUND if getattr(self, name) is not None}
        return json.loads(json.dumps(named))  # an inf stays one

    def settings(self) -> list[dict[str, Any]]:
        """Every trial: the options that mean something in it, by name. Two that would be the same are one.

        Raises ValueError for too many, for an option that means nothing in all of them, and for values that finetune
        does not accept.
        """
        values = {name: self.values(name) for name in FOUND}
        if len(values["loss"]) > 1:
            raise ValueError("loss: those of sft and of dpo cannot be compared: make a sweep for each")
        if len(values["beta"]) > 1:
            raise ValueError("beta: it is a factor in DPO's loss, so that trials cannot be compared: give one value")
        if (count := math.prod(map(len, values.values()))) > MOST:
            raise ValueError(f"{count:,} combinations of these values are too many: give fewer values")
        combinations = [dict(zip(values, one, strict=True)) for one in product(*values.values())]
        meant = ({name: one[name] for name in one if has_meaning(FOUND[name], one)} for one in combinations)
        found = list({json.dumps(one): one for one in meant}.values())
        for name in FOUND:
            if getattr(self, name) is not None and not any(name in one for one in found):
                raise ValueError(f"{flag(name)} means nothing in any of these trials: leave it out")
        for one in found:
            as_options(one)
        return found


def word(value: Any) -> str:
    """A value as a table shows it, and as a flag takes it: names joined by commas, nothing for None. A number has as
    many digits as it takes to read the same number again.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(float(value))
    return "" if value is None else str(value)


def as_options(setting: Mapping[str, Any], **change: Any) -> Options:
    """A trial's options for finetune. Raises ValueError for values that it does not accept."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(value := setting.get(name), str):
            change[name] = TARGETS.get(value, value)
    return Options(**{**setting, **change})


def _several(name: str, hint: Any) -> tuple[str, Any, Any]:
    """finetune's option with several values, as a field; one that is a mapping has one."""
    about = {key: value for key, value in FOUND[name].metadata.items() if key not in ("only", "follows")}
    default = USUAL.get(name, FOUND[name].default)
    if name == "target_modules":
        about["help"] += f"; {', '.join(TARGETS)} are groups; join several for one trial with commas"
    if name in USUAL:
        about["help"] = f"{about['help'].partition(' (default')[0]} (default: {word(default)})"
    elif "(default" not in about["help"] and default is not None and default is not False:
        about["help"] += f" (default: {word(default)})"
    if any(get_origin(kind) is not None and issubclass(get_origin(kind), Mapping) for kind in kinds_of(hint)):
        return name, hint, field(default=None, metadata=about)
    return name, Sequence[Any] | None, field(default=None, metadata=about | {"several": hint})


_HINTS = get_type_hints(Options)
SweepOptions = make_dataclass(
    "SweepOptions", [_several(name, _HINTS[name]) for name in FOUND], bases=(Sweep,), frozen=True, kw_only=True
)
SweepOptions.__doc__ = "Options of finetune, each with several values."

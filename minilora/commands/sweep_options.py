"""What a sweep tries: the options of `finetune`, each with several values, and the trials that they make together."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from ..options import flag, flag_fields, kinds_of, option
from ..train.options import Options

TARGETS = {  # what papers call these modules -> their names
    "qv": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
USUAL = {  # where it is not finetune's own
    "base": "tiny",
    "strength": 1.0,  # an update is compared as it was trained, and not a part of it
}
NOT_TRIED = ("out", "overwrite", "resume", "save_every")  # of finetune's options: where its results go
MOST = 1000  # trials that are made without being asked for by number
FOUND = {item.name: item for item in flag_fields(Options) if item.name not in NOT_TRIED}

_SEARCH: dict[str, Any] = {"group": "sweep"}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Options of the sweep itself."""

    out: str | None = option(None, "folder for table and pictures (default: runs/sweep-<data>[-<base>])", **_SEARCH)
    overwrite: bool = option(False, "forget the sweep in that folder", recorded=False, **_SEARCH)
    search: str = option(
        "grid", "every combination of the values, or --trials of them at random", choices=("grid", "random"), **_SEARCH
    )
    trials: int | None = option(None, f"how many: for random, and for a grid of more than {MOST}", **_SEARCH)
    jobs: int | None = option(
        None, "trials at a time, each with its share of the cores (default: one per core)", **_SEARCH
    )

    def __post_init__(self):
        for name in ("trials", "jobs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.search not in ("grid", "random"):
            raise ValueError(f"search must be 'grid' or 'random', got {self.search!r}")
        if self.search == "random" and self.trials is None:
            raise ValueError("how many at random? give --trials N with --search random")
        for name in FOUND:
            if (values := getattr(self, name)) is not None and not len(values):
                raise ValueError(f"{name} has no values: give it one or more, or leave it out")

    @property
    def folder(self) -> Path:
        """Where everything goes: `out`, or runs/sweep-<data>[-<base, if another than the default>]."""
        base = self.values("base")[0]
        own = Options(data=self.values("data")[0], **({} if base == USUAL["base"] else {"base": base})).folder
        return Path(self.out) if self.out else own.with_name(f"sweep-{own.name}")

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

    def told(self) -> dict[str, Any]:
        """What decides the trials, as JSON keeps it: the options that were given, and how they are searched."""
        given = {name: getattr(self, name) for name in FOUND if getattr(self, name) is not None}
        return json.loads(json.dumps(given | {"search": self.search, "trials": self.trials}))

    def settings(self) -> list[dict[str, Any]]:
        """Every trial: the options that mean something in it, by name. Two that would be the same are one.

        Raises ValueError for too many, for an option that means nothing in all of them, and for values that no
        finetune takes.
        """
        values = {name: self.values(name) for name in FOUND}
        if (count := math.prod(map(len, values.values()))) > 100 * MOST:
            raise ValueError(f"{count:,} combinations of these values are too many: give fewer values")
        combinations = (_meaningful(dict(zip(values, one, strict=True))) for one in product(*values.values()))
        distinct = {json.dumps(one): one for one in combinations}
        found = list(distinct.values())
        for name in FOUND:
            if getattr(self, name) is not None and not any(name in one for one in found):
                raise ValueError(f"{flag(name)} means nothing in any of these trials: leave it out")
        if self.search == "random":
            chosen = random.Random(0).sample(range(len(found)), min(self.trials or 1, len(found)))
            found = [found[i] for i in sorted(chosen)]
        for one in found:
            as_options(one)
        return found


def word(value: Any) -> str:
    """A value as a table shows it, and as a flag takes it: names joined by commas, nothing for None."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _several(name: str, hint: Any) -> tuple[str, Any, Any]:
    """finetune's option with several values, as a field; one that is a mapping has one."""
    told = {key: value for key, value in FOUND[name].metadata.items() if key not in ("only", "follows")}
    default = USUAL.get(name, FOUND[name].default)
    if name == "target_modules":
        told["help"] += f"; {', '.join(TARGETS)} stand for those; several for one trial are joined by commas"
    if name in USUAL:
        told["help"] = f"{told['help'].partition(' (default')[0]} (default: {word(default)})"
    elif "(default" not in told["help"] and default not in (None, False):
        told["help"] += f" (default: {word(default)})"
    if any(get_origin(kind) is not None and issubclass(get_origin(kind), Mapping) for kind in kinds_of(hint)):
        return name, hint, field(default=None, metadata=told)
    return name, Sequence[Any] | None, field(default=None, metadata=told | {"several": hint})


_HINTS = get_type_hints(Options)
SweepOptions = make_dataclass(
    "SweepOptions", [_several(name, _HINTS[name]) for name in FOUND], bases=(Sweep,), frozen=True, kw_only=True
)
SweepOptions.__doc__ = "Options of finetune, each with several values, and how they are searched."


def _meaningful(values: dict[str, Any]) -> dict[str, Any]:
    """Of a combination what means something: no rank with method full, no epochs beside steps."""

    def counts(name: str) -> bool:
        return all(values[other] == needed for other, needed in FOUND[name].metadata.get("only", {}).items())

    return {name: value for name, value in values.items() if counts(name)}


def as_options(setting: Mapping[str, Any], **change: Any) -> Options:
    """A trial as finetune takes it. Raises ValueError for what it does not take."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(value := setting.get(name), str):
            change[name] = TARGETS.get(value, value)
    return Options(**{**setting, **change})

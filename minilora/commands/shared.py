"""What several commands share: flags with their help, options from flags and a file, adapters by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .. import toml
from ..options import BASE, BF16, PACKED, UsageError, from_flags, option, suggestion, usage_errors

if TYPE_CHECKING:
    from ..models.tokenizer import Tokenizer
    from ..nn.language_model import LanguageModel

Given = TypeVar("Given")
RECIPES = Path(__file__).parents[1] / "train"

_MACHINE: dict[str, Any] = {"group": "memory and device"}
AS_JSON: dict[str, Any] = {"action": "store_true", "help": "print the result as JSON"}
BASE_OF_ADAPTER: dict[str, Any] = {"help": f"{BASE} (default: the one that the adapter's folder names)"}
ADAPTER: dict[str, Any] = {
    "action": "append",
    "metavar": "DIR",
    "required": True,
    "help": "folder of an adapter, such as runs/legal",
}
FORCE: dict[str, Any] = {"action": "store_true", "help": "accept an adapter of another base of the same shape"}
OVERWRITE: dict[str, Any] = {"action": "store_true", "help": "replace a model or file that is there already"}


class Outcome(NamedTuple):
    """What a command's `run` returns and cli.py shows. page: makes a text of the result. figures: what draws them, by
    their files, for light and dark pages. failed: why the command fails, although it has a result.
    """

    result: Any
    page: Callable[[Any], str]
    figures: Mapping[Path, Callable[[], Any]] = {}
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a base and its adapters are loaded: options that several commands have."""

    quantized: bool | str = option(False, **PACKED, **_MACHINE)
    bf16: bool = option(False, BF16, **_MACHINE)
    device: str = option("cpu", "where to compute", choices=("cpu", "cuda"), **_MACHINE)
    force: bool = option(False, "accept adapters of another base of the same shape", **_MACHINE)

    def load(self, folders: Mapping[str, Path], base: str | Path | None) -> tuple[LanguageModel, Tokenizer]:
        """The base with these adapters, by name; without a base, the one that they name."""
        from ..models.load import dtype_of
        from ..models.with_adapters import load_with_adapters

        given = (self.quantized, self.device, self.force, dtype_of(self))
        return load_with_adapters(folders, base, *given)


class Instead(argparse.Action):
    """A flag that a user may try, and what to type instead, `const`."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise UsageError(f"{parser.prog} has no {option_string}: {self.const}")


def read_options(options: type[Given], arguments: argparse.Namespace, below: Mapping[str, Any] | None = None) -> Given:
    """The options that flags and the file of --config ask for, the flags first. below: what holds besides."""
    below = dict(below or {})
    if arguments.config is not None:
        here, recipes = Path(arguments.config), {path.stem: path for path in RECIPES.glob("*.toml")}
        file = here if here.exists() and not here.is_dir() else recipes.get(arguments.config)
        if file is None:
            expected = f"give a TOML file, such as the run.toml of a run, or one of {', '.join(sorted(recipes))}"
            raise UsageError(f"--config {here}: no such file{suggestion(arguments.config, recipes)}; {expected}")
        with usage_errors():
            below |= toml.read(options, file)
    return from_flags(options, arguments, below)


def adapters(words: Sequence[str]) -> dict[str, Path]:
    """Adapters as a command is given them, DIR or NAME=DIR, by name."""
    from ..models.with_adapters import named_folders

    with usage_errors():
        return named_folders(words)


def one_adapter(words: Sequence[str]) -> tuple[str, Path]:
    """Name and folder of the one adapter that a command takes."""
    named = adapters(words)
    if len(named) > 1:
        raise UsageError(f"one adapter at a time: {', '.join(named)} are {len(named)}")
    return named.popitem()

"""The command line: minilora finetune | compare | sweep | chat | serve | data | eval | audit | merge | export |
report | memory | pull | bench | reproduce | gradcheck | course | progress. What each of them does stands in
commands.py.

Exit status: 0, 1 (the job failed; one line says why), 2 (bad arguments), 130 (interrupted). A user's mistake never
shows a traceback; MINILORA_TRACEBACK=1 shows it all the same, for those who look for a fault in minilora.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from functools import partial
from io import StringIO
from typing import Any

from . import commands
from .flags import BASE, PACKED, Parser, UsageError, add_flags, parse, settings_of
from .train.ranks import ALONE, Ranks, Several, world
from .version import __version__

SHARED = ("finetune",)  # what several processes can do together, started by mpiexec
HANDED_OUT = ("sweep", "reproduce")  # and what the first of them can hand out to the others


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    ranks: Ranks = ALONE
    try:
        try:
            ranks = world()
            with redirect_stderr(StringIO()) if ranks.number else nullcontext():  # the first rank says it
                arguments = parse(build_parser(), argv)
            name = arguments.run.__name__.removeprefix("run_")
            if isinstance(ranks, Several) and name in HANDED_OUT:
                with ranks.hand_out() as first:
                    if first:
                        arguments.run(arguments)
                return 0
            if ranks.size > 1 and name not in SHARED:
                raise UsageError(f"{arguments.parser.prog} is for one process: leave out mpiexec")
            arguments.run(arguments)
        finally:
            sys.stdout.flush()  # what cannot be written must show here, not when Python ends
    except KeyboardInterrupt:
        return ranks.fail("\nminilora: interrupted", 130)
    except BrokenPipeError:  # `minilora report | head`: nothing more can be said, not even at exit
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except (UsageError, ValueError, OSError, RuntimeError, MemoryError, ImportError, AssertionError) as error:
        if os.environ.get("MINILORA_TRACEBACK"):
            raise
        return ranks.fail(f"minilora: {str(error) or type(error).__name__}", 2 if isinstance(error, UsageError) else 1)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags; those of a command with options are the fields of their dataclass."""
    from .cost.bench import Settings
    from .cost.process import Job
    from .experiments.reproduce import ReproduceOptions
    from .experiments.sweepoptions import SweepOptions
    from .serve.options import ServeOptions
    from .train.compare import CompareOptions
    from .train.domains import DomainsOptions
    from .train.look import LookOptions
    from .train.matrix import EvalOptions
    from .train.options import ChatOptions, Options

    parser = Parser(
        prog="minilora",
        description="LoRA written out in NumPy: fine-tune a real language model on a laptop.",
        epilog="Start with: minilora finetune",
    )
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    add = partial(_command, parser.add_subparsers(title="commands", metavar="COMMAND", required=True))
    theirs: dict[str, Any] = {"help": f"{BASE} (default: the one that the adapter's folder names)"}
    adapter: dict[str, Any] = {"action": "append", "metavar": "DIR", "required": True}
    adapter["help"] = "folder of an adapter, such as runs/legal"
    other: dict[str, Any] = {"action": "store_true", "help": "accept an adapter of another base of the same shape"}
    as_json: dict[str, Any] = {"action": "store_true", "help": "the numbers as JSON"}
    replace: dict[str, Any] = {"action": "store_true", "help": "replace a model or file that is there already"}

    teach = add(commands.run_finetune, "teach a model from a data file and report what it cost", Options)
    teach.add_argument("--config", metavar="FILE", help="a TOML file of options, such as runs/legal/run.toml")
    beside = add(commands.run_compare, "measure LoRA beside full fine-tuning, claim by claim", CompareOptions)
    beside.add_argument("--json", **as_json)
    four = beside.add_argument_group("four domains")
    told = "instead, train legal, medical, support and finance, and measure each adapter on all of them"
    four.add_argument("--domains", action="store_true", help=told)
    least = f"records of each set that are measured (default: {DomainsOptions.limit})"
    four.add_argument("--limit", type=int, default=argparse.SUPPRESS, help=least)
    told = "try options of finetune with several values, in many short runs, and tabulate what they came to"
    tries = add(commands.run_sweep, told, SweepOptions)
    tries.usage = "minilora sweep [--OPTION VALUE [VALUE ...]] ... [--config FILE] [--out DIR] [--json]"
    tries.epilog = "Such as: minilora sweep --r 1 4 16 --lr 1e-3 3e-3 1e-2 --seed 0 1 2 --steps 60 --out runs/ranks"
    tries.add_argument("--config", metavar="FILE", help="a TOML file of options, whose values may be lists")
    tries.add_argument("--json", **as_json)
    add(commands.run_chat, "talk to a model, with or without an adapter", ChatOptions)
    add(commands.run_serve, "let a page and OpenAI's clients ask a base and its adapters", ServeOptions)

    told = "show what is understood of a data file: format, lengths, what is cut, what is scored"
    understood = add(commands.run_data, told, LookOptions)
    understood.add_argument("source", metavar="FILE", help="a data file, a folder of train, valid and test, or legal")
    understood.add_argument("--json", action="store_true", help="the facts as JSON")

    measures = "measure the loss and keyword recall of adapters and their base on data sets, with intervals"
    add(commands.run_eval, measures, EvalOptions).add_argument("--json", **as_json)

    prove = add(commands.run_audit, "check every promise that an adapter makes")
    prove.add_argument("adapter", nargs="?", default="runs/legal", metavar="DIR", help="default: %(default)s")
    alone = "the folder stands by itself, minilora audit DIR"
    prove.add_argument("--adapter", dest="instead", action=_Instead, const=alone, help=argparse.SUPPRESS)
    prove.add_argument("--base", **theirs)
    prove.add_argument("--quantized", default=False, help=PACKED["help"], **settings_of(bool | str, PACKED))
    prove.add_argument("--force", **other)

    whole = add(commands.run_merge, "write base and adapter as one model")
    whole.add_argument("--base", **theirs)
    whole.add_argument("--adapter", **adapter | {"help": adapter["help"] + ", or a .gguf file"})
    whole.add_argument("--out", required=True, help="a new folder, or a file that ends in .gguf")
    whole.add_argument(
        "--format", choices=("hf", "gguf"), help="a Hugging Face folder, or GGUF (default: as --out ends)"
    )
    whole.add_argument(
        "--type",
        choices=("f32", "f16", "q8_0", "q4_1"),
        help="how matrices are stored (default: f32 in a folder, f16 in GGUF; q8_0 and q4_1 in GGUF only)",
    )
    whole.add_argument("--overwrite", **replace)
    whole.add_argument("--force", **other)

    hand_on = add(commands.run_export, "write an adapter as a file for llama.cpp")
    hand_on.add_argument("--base", **theirs)
    hand_on.add_argument("--adapter", **adapter)
    hand_on.add_argument("--out", required=True, help="a file that ends in .gguf")
    hand_on.add_argument("--overwrite", **replace)
    hand_on.add_argument("--force", **other)

    show = add(commands.run_report, "show the page of a finished run again")
    show.add_argument("run_folder", nargs="?", default="runs/legal", metavar="RUN", help="default: %(default)s")
    show.add_argument("--json", **as_json)
    show.add_argument(
        "--picture", metavar="FILE", help="draw it: a .png or .svg file, and NAME-dark beside it for dark pages"
    )
    show.add_argument("--memory", nargs=0, action=_Instead, const="use minilora memory", help=argparse.SUPPRESS)

    owners = "take a training step and compare the memory it holds, owner by owner, with the prediction"
    add(commands.run_memory, owners, Job).add_argument("--json", **as_json)

    fetch = add(commands.run_pull, "download a model, or check the one that is there")
    fetch.add_argument("name", nargs="?", default="smollm2", help="default: %(default)s")

    speed = add(commands.run_bench, "measure time and memory of every way to run a model", Settings)
    speed.add_argument("--random-weights", action="store_true", help="a random model of SmolLM2's shape: no download")
    speed.add_argument("--modes", nargs="+", metavar="MODE", help="such as floor lora full (default: all)")
    speed.add_argument("--rounds", type=int, default=7, help="turns of each mode (default: %(default)s)")
    speed.add_argument("--json", **as_json)
    speed.add_argument(
        "--growth", metavar="FOLDER", help="draw how cost grows with length, batch, rank, width and adapters instead"
    )

    told = "run what papers say about LoRA, claim by claim, and write a page with the verdicts"
    papers = add(commands.run_reproduce, told, ReproduceOptions)
    papers.add_argument("names", nargs="*", metavar="NAME", help="claims, such as planted-rank (default: all)")
    papers.add_argument("--list", action="store_true", help="name all claims, with source, base and minutes")
    papers.add_argument("--json", **as_json)

    check = add(commands.run_gradcheck, "compare every operation's gradient with a measured derivative")
    check.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    course = add(commands.run_course, "copy the lessons and exercises into a folder of your own")
    course.add_argument("folder", metavar="DIR", help="a folder, made if it is not there; nothing in it is overwritten")

    done = add(commands.run_progress, "check the exercises you have solved, and say where to go on")
    done.add_argument("folder", nargs="?", default=".", metavar="DIR", help="where mine.py lies (default: here)")
    return parser


class _Instead(argparse.Action):
    """A flag that somebody may try, and what to type in its place, `const`."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise UsageError(f"{parser.prog} has no {option_string}: {self.const}")


def _command(
    commands: Any, run: Callable[[argparse.Namespace], None], text: str, options: type | None = None
) -> argparse.ArgumentParser:
    """A command called as its function: run_finetune is `minilora finetune`."""
    parser = commands.add_parser(
        run.__name__.removeprefix("run_"),
        help=text,
        description=text[0].upper() + text[1:] + ".",
    )
    parser.set_defaults(run=run, parser=parser)
    if options is not None:
        add_flags(parser, options)
    return parser

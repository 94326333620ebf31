"""The command line: minilora finetune | compare | chat | serve | data | eval | audit | merge | export | report |
memory | pull | bench | gradcheck | course | progress.

Exit status: 0, 1 (the job failed; one line says why), 2 (bad arguments), 130 (interrupted). A user's mistake never
shows a traceback; MINILORA_TRACEBACK=1 shows it all the same, for those who look for a fault in minilora.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from .flags import BASE, PACKED, Parser, UsageError, add_flags, flag, flag_fields, from_flags, parse
from .version import __version__

Given = TypeVar("Given")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        try:
            arguments = parse(build_parser(), argv)
            arguments.run(arguments)
        finally:
            sys.stdout.flush()  # what cannot be written must show here, not when Python ends
    except KeyboardInterrupt:
        print("\nminilora: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minilora report | head`: nothing more can be said, not even at exit
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except (UsageError, ValueError, OSError, RuntimeError, MemoryError, ImportError, AssertionError) as error:
        if os.environ.get("MINILORA_TRACEBACK"):
            raise
        print(f"minilora: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags; those of a command with options are the fields of their dataclass."""
    from .cost.bench import Settings
    from .cost.process import Job
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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    theirs: dict[str, Any] = {"help": f"{BASE} (default: the one that the adapter's folder names)"}
    adapter: dict[str, Any] = {"action": "append", "metavar": "DIR", "required": True}
    adapter["help"] = "folder of an adapter, such as runs/legal"
    other: dict[str, Any] = {"action": "store_true", "help": "accept an adapter of another base of the same shape"}
    replace: dict[str, Any] = {"action": "store_true", "help": "replace a model or file that is there already"}

    teach = _command(commands, run_finetune, "teach a model from a data file and report what it cost", Options)
    teach.add_argument("--config", metavar="FILE", help="a TOML file of options, such as runs/legal/run.toml")
    beside = _command(commands, run_compare, "measure LoRA beside full fine-tuning, claim by claim", CompareOptions)
    beside.add_argument("--json", action="store_true", help="the numbers as JSON")
    four = beside.add_argument_group("four domains")
    told = "instead, train legal, medical, support and finance, and measure each adapter on all of them"
    four.add_argument("--domains", action="store_true", help=told)
    least = f"records of each set that are measured (default: {DomainsOptions.limit})"
    four.add_argument("--limit", type=int, default=argparse.SUPPRESS, help=least)
    _command(commands, run_chat, "talk to a model, with or without an adapter", ChatOptions)
    _command(commands, run_serve, "let a page and OpenAI's clients ask a base and its adapters", ServeOptions)

    told = "show what is understood of a data file: format, lengths, what is cut, what is scored"
    understood = _command(commands, run_data, told, LookOptions)
    understood.add_argument("source", metavar="FILE", help="a data file, a folder of train, valid and test, or legal")
    understood.add_argument("--json", action="store_true", help="the facts as JSON")

    measures = "measure the loss and keyword recall of adapters and their base on data sets, with intervals"
    _command(commands, run_eval, measures, EvalOptions).add_argument(
        "--json", action="store_true", help="the numbers as JSON"
    )

    prove = _command(commands, run_audit, "check every promise that an adapter makes")
    prove.add_argument("adapter", nargs="?", default="runs/legal", metavar="DIR", help="default: %(default)s")
    alone = "the folder stands by itself, minilora audit DIR"
    prove.add_argument("--adapter", dest="instead", action=_Instead, const=alone, help=argparse.SUPPRESS)
    prove.add_argument("--base", **theirs)
    prove.add_argument("--quantized", action="store_true", help=PACKED)
    prove.add_argument("--force", **other)

    whole = _command(commands, run_merge, "write base and adapter as one model")
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

    hand_on = _command(commands, run_export, "write an adapter as a file for llama.cpp")
    hand_on.add_argument("--base", **theirs)
    hand_on.add_argument("--adapter", **adapter)
    hand_on.add_argument("--out", required=True, help="a file that ends in .gguf")
    hand_on.add_argument("--overwrite", **replace)
    hand_on.add_argument("--force", **other)

    show = _command(commands, run_report, "show the page of a finished run again")
    show.add_argument("run_folder", nargs="?", default="runs/legal", metavar="RUN", help="default: %(default)s")
    show.add_argument("--json", action="store_true", help="the numbers as JSON")
    show.add_argument(
        "--picture", metavar="FILE", help="draw it: a .png or .svg file, and NAME-dark beside it for dark pages"
    )
    show.add_argument("--memory", nargs=0, action=_Instead, const="use minilora memory", help=argparse.SUPPRESS)

    owners = "take a training step and compare the memory it holds, owner by owner, with the prediction"
    _command(commands, run_memory, owners, Job).add_argument("--json", action="store_true", help="the numbers as JSON")

    fetch = _command(commands, run_pull, "download a model, or check the one that is there")
    fetch.add_argument("name", nargs="?", default="smollm2", help="default: %(default)s")

    speed = _command(commands, run_bench, "measure time and memory of every way to run a model", Settings)
    speed.add_argument("--random-weights", action="store_true", help="a random model of SmolLM2's shape: no download")
    speed.add_argument("--modes", nargs="+", metavar="MODE", help="such as floor lora full (default: all)")
    speed.add_argument("--rounds", type=int, default=7, help="turns of each mode (default: %(default)s)")
    speed.add_argument("--json", action="store_true", help="the numbers as JSON")
    speed.add_argument(
        "--growth", metavar="FOLDER", help="draw how cost grows with length, batch, rank, width and adapters instead"
    )

    check = _command(commands, run_gradcheck, "compare every operation's gradient with a measured derivative")
    check.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    course = _command(commands, run_course, "copy the lessons and exercises into a folder of your own")
    course.add_argument("folder", metavar="DIR", help="a folder, made if it is not there; nothing in it is overwritten")

    done = _command(commands, run_progress, "check the exercises you have solved, and say where to go on")
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


def _options(options: type[Given], arguments: argparse.Namespace, below: Mapping[str, Any] | None = None) -> Given:
    """The options that flags and the file of --config ask for, the flags first. below: what holds besides."""
    from . import toml

    below = dict(below or {})
    if arguments.config is not None:
        try:
            below |= toml.read(options, Path(arguments.config))
        except ValueError as error:
            raise UsageError(error) from error
    return from_flags(options, arguments, below)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def run_finetune(arguments: argparse.Namespace) -> None:
    """minilora finetune: run the job, print its page."""
    from .train.finetune import finetune
    from .train.options import Options
    from .train.report import page, terminal_width

    options = _options(Options, arguments)
    if options.resume and (begun := options.begun()):  # what is not given is what the run was told when it began
        options = _options(Options, arguments, begun)
    print(page(finetune(options, say=_tell), terminal_width()))


def run_compare(arguments: argparse.Namespace) -> None:
    """minilora compare: make the runs that are not there yet, draw the picture, print the table."""
    if arguments.domains:
        return _compare_domains(arguments)
    from .pictures.compare import compare_pictures
    from .train.compare import CompareOptions, compare
    from .train.report import terminal_width
    from .train.table import page

    if "limit" in arguments:
        raise UsageError("--limit means nothing without --domains: leave out one, or give both")
    options = from_flags(CompareOptions, arguments)
    result = compare(options, say=_tell)
    compare_pictures(result, options.folder / "picture.png")
    print(json.dumps(result, indent=2) if arguments.json else page(result, terminal_width()))


def _compare_domains(arguments: argparse.Namespace) -> None:
    from .pictures.matrix import matrix_pictures
    from .train.compare import CompareOptions
    from .train.domains import PICTURE_FILE, DomainsOptions, compare_domains, domains_page, drawn
    from .train.report import terminal_width

    own = {item.name for item in flag_fields(DomainsOptions)}
    if other := [item.name for item in flag_fields(CompareOptions) if item.name in arguments and item.name not in own]:
        raise UsageError(f"{flag(other[0])} means nothing with --domains: leave out one of the two")
    options = from_flags(DomainsOptions, arguments)
    result = compare_domains(options, say=_tell)
    matrix_pictures(drawn(result), options.folder / PICTURE_FILE)
    print(json.dumps(result, indent=2) if arguments.json else domains_page(result, terminal_width()))


def run_chat(arguments: argparse.Namespace) -> None:
    """minilora chat: one answer of each adapter for --prompt, else a talk in the terminal, or an answer per line."""
    from .chat.run import run
    from .io.versions import load_versions
    from .train.options import ChatOptions

    options = from_flags(ChatOptions, arguments)
    named = _adapters(options.adapter)
    model, tokenizer = load_versions(named, options.base, options.quantized, options.device, options.force, say=_tell)
    run(model, tokenizer, list(named), options)


def run_serve(arguments: argparse.Namespace) -> None:
    """minilora serve: a page, and what OpenAI's clients ask, until Ctrl-C."""
    from importlib.util import find_spec

    from .serve.options import ServeOptions

    options = from_flags(ServeOptions, arguments)
    _adapters(options.adapter)  # refuses names that cannot be
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise RuntimeError(f"minilora serve needs {' and '.join(missing)}: pip install 'minilora[serve]'")
    from .serve.run import run

    run(options, _tell)


def run_data(arguments: argparse.Namespace) -> None:
    """minilora data: what is understood of a file; in a terminal what is scored is underlined."""
    from .train.look import BRACKETS, UNDERLINED, WIDTH, LookOptions, look, page

    seen = look(arguments.source, from_flags(LookOptions, arguments), say=_tell)
    if arguments.json:
        print(json.dumps(seen, indent=2, ensure_ascii=False))
        return
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    print(page(seen, shutil.get_terminal_size((WIDTH, 24)).columns, BRACKETS if plain else UNDERLINED))


def run_eval(arguments: argparse.Namespace) -> None:
    """minilora eval: a table of versions on data sets, or its numbers; with --matrix a heat map, too."""
    from .pictures.matrix import matrix_picture
    from .train.matrix import EvalOptions, evaluate_versions, table

    options = from_flags(EvalOptions, arguments)
    if options.matrix:  # before minutes are spent
        Path(options.matrix).parent.mkdir(parents=True, exist_ok=True)
    result = evaluate_versions(options, say=_tell)
    if options.matrix:
        matrix_picture(result, Path(options.matrix))
    print(json.dumps(result, indent=2) if arguments.json else table(result))


def run_audit(arguments: argparse.Namespace) -> None:
    """minilora audit: one line per promise, one per kind of module."""
    from .io.versions import load_versions
    from .lora.audit import audit

    name, folder = _one_adapter([arguments.adapter])
    model, _ = load_versions({name: folder}, arguments.base, arguments.quantized, force=arguments.force, say=_tell)
    print(audit(model, name))


def _adapters(words: Sequence[str]) -> dict[str, Path]:
    """Adapters as a command is given them, DIR or NAME=DIR, by name."""
    from .io.versions import named_folders

    try:
        return named_folders(words)
    except ValueError as error:
        raise UsageError(error) from error


def _one_adapter(words: list[str]) -> tuple[str, Path]:
    """Name and folder of the one adapter that a command takes."""
    named = _adapters(words)
    if len(named) > 1:
        raise UsageError(f"one adapter at a time: {', '.join(named)} are {len(named)}")
    return named.popitem()


def run_merge(arguments: argparse.Namespace) -> None:
    """minilora merge: one whole model, what reading it back gave, and what 4 bits would have lost."""
    from .io.merge import merge, resolve

    try:
        resolve(Path(arguments.out), arguments.format, arguments.type)
    except ValueError as error:
        raise UsageError(error) from error
    _, folder = _one_adapter(arguments.adapter)
    given = (arguments.out, arguments.format, arguments.type, arguments.overwrite, arguments.force)
    print(merge(arguments.base, folder, *given))


def run_export(arguments: argparse.Namespace) -> None:
    """minilora export: an adapter for llama.cpp, and what reading it back gave."""
    from .io.merge import export

    _, folder = _one_adapter(arguments.adapter)
    print(export(arguments.base, folder, arguments.out, arguments.overwrite, arguments.force))


def run_report(arguments: argparse.Namespace) -> None:
    """minilora report: the page, the metrics, or the pictures of a finished run."""
    from .train.report import page, read_metrics, terminal_width

    metrics = read_metrics(arguments.run_folder)
    if arguments.picture:
        from .pictures.run import run_pictures

        print(*run_pictures(metrics, Path(arguments.picture)), sep="\n")
        return
    print(json.dumps(metrics, indent=2) if arguments.json else page(metrics, terminal_width()))


def run_memory(arguments: argparse.Namespace) -> None:
    """minilora memory: where a step's bytes go, prediction beside measurement."""
    from .cost.process import STAGES, Job, report, step_of, table
    from .train.bars import Bars

    job = from_flags(Job, arguments)
    step_of(job)  # pulls the base and refuses what no model can take, before there is a bar
    with Bars()("memory", len(STAGES), "stage") as bar:

        def done(stage: str) -> None:
            bar.set_postfix_str(stage, refresh=False)
            bar.update()

        result = report(job, done)
    print(json.dumps(result, indent=2) if arguments.json else table(result))


def run_pull(arguments: argparse.Namespace) -> None:
    """minilora pull: make sure a model is here, and say where."""
    from .io.zoo import pull

    print(pull(arguments.name, say=_tell))


def run_bench(arguments: argparse.Namespace) -> None:
    """minilora bench: a table of modes, measured in turns, or the pictures of how cost grows."""
    from .cost import bench, growth, many
    from .train.bars import Bars

    if arguments.growth:
        folder = Path(arguments.growth)
        with Bars()("growth", growth.turns() + many.turns(), "turn") as bar:
            for path in chain(growth.draw_all(folder, done=bar.update), many.draw(folder, done=bar.update)):
                print(path)
        return
    if arguments.random_weights and "base" in arguments:
        raise UsageError("--random-weights takes the shape of SmolLM2: leave out --base")
    modes = arguments.modes or list(bench.MODES)
    settings = from_flags(bench.Settings, arguments)
    try:
        bench.check(modes, arguments.rounds)
    except ValueError as error:
        raise UsageError(error) from error
    run = modes if arguments.random_weights else bench.possible(settings, modes)
    measure = bench.measure_random if arguments.random_weights else bench.measure
    with Bars()("bench", len(run) * (1 + arguments.rounds), "turn") as bar:

        def done(mode: str) -> None:
            bar.set_postfix_str(mode, refresh=False)
            bar.update()

        result = measure(settings, modes=modes, rounds=arguments.rounds, done=done)
    print(json.dumps(result, indent=2) if arguments.json else bench.table(result))


def run_gradcheck(arguments: argparse.Namespace) -> None:
    """minilora gradcheck: one line per operation."""
    from .engine.examples import check_all

    worst = 0.0
    for report in check_all(arguments.seed):
        print(report)
        worst = max(worst, report.max_relative_error)
    print(f"all gradients agree with central differences in float64; largest relative error {worst:.1e}")


def run_course(arguments: argparse.Namespace) -> None:
    """minilora course: lessons and exercises, out of the installed package."""
    from .course.commands import copy_course

    print(copy_course(Path(arguments.folder)))


def run_progress(arguments: argparse.Namespace) -> None:
    """minilora progress: a table of the exercises, checked on the functions in mine.py."""
    from .course.commands import progress

    print(progress(Path(arguments.folder)))

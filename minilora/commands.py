"""What the commands do, one function each: `minilora finetune` is run_finetune. Their flags stand in cli.py.

Each imports what it needs when it runs, so that a short command is not kept waiting by what a long one needs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

from .flags import UsageError, flag, flag_fields, from_flags

Given = TypeVar("Given")


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
    from .train.ranks import world
    from .train.report import page, terminal_width

    ranks = world()
    options: Options | None = None  # the first rank reads them
    if not ranks.number:
        options = _options(Options, arguments)
        if options.resume and (begun := options.begun()):  # what is not given is what the run was told when it began
            options = _options(Options, arguments, begun)
    if metrics := finetune(cast(Options, ranks.same(options)), say=_tell, ranks=ranks):
        print(page(metrics, terminal_width()))


def run_compare(arguments: argparse.Namespace) -> None:
    """minilora compare: make the runs that are not there yet, draw the picture, print the table."""
    if arguments.domains:
        return _compare_domains(arguments)
    from .pictures.compare import compare_figure
    from .pictures.style import save_themes
    from .train.compare import CompareOptions, compare
    from .train.report import terminal_width
    from .train.table import page

    if "limit" in arguments:
        raise UsageError("--limit means nothing without --domains: leave out one, or give both")
    options = from_flags(CompareOptions, arguments)
    result = compare(options, say=_tell)
    save_themes(lambda: compare_figure(result), options.folder / "picture.png")
    print(json.dumps(result, indent=2) if arguments.json else page(result, terminal_width()))


def _compare_domains(arguments: argparse.Namespace) -> None:
    from .pictures.matrix import matrix_figure
    from .pictures.style import save_themes
    from .train.compare import CompareOptions
    from .train.domains import PICTURE_FILE, DomainsOptions, compare_domains, domains_page, drawn
    from .train.report import terminal_width

    own = {item.name for item in flag_fields(DomainsOptions)}
    if other := [item.name for item in flag_fields(CompareOptions) if item.name in arguments and item.name not in own]:
        raise UsageError(f"{flag(other[0])} means nothing with --domains: leave out one of the two")
    options = from_flags(DomainsOptions, arguments)
    result = compare_domains(options, say=_tell)
    save_themes(lambda: matrix_figure(drawn(result)), options.folder / PICTURE_FILE)
    print(json.dumps(result, indent=2) if arguments.json else domains_page(result, terminal_width()))


def run_sweep(arguments: argparse.Namespace) -> None:
    """minilora sweep: make the trials that are not there yet, draw the picture, print the table."""
    from .experiments.summary import page
    from .experiments.sweep import PICTURE_FILE, sweep
    from .experiments.sweepoptions import Sweep, SweepOptions
    from .pictures.style import save_themes
    from .pictures.sweep import sweep_figure
    from .train.report import terminal_width

    options: Sweep = _options(SweepOptions, arguments)
    try:
        options.settings()
    except ValueError as error:
        raise UsageError(error) from error
    result = sweep(options, say=_tell)
    print(json.dumps(result, indent=2) if arguments.json else page(result, terminal_width()))
    if sweep_figure(result) is not None:
        save_themes(lambda: sweep_figure(result), options.folder / PICTURE_FILE)


def run_chat(arguments: argparse.Namespace) -> None:
    """minilora chat: one answer of each adapter for --prompt, else a talk in the terminal, or an answer per line."""
    from .chat.run import run
    from .io.versions import load_versions
    from .io.zoo import dtype_of
    from .train.options import ChatOptions

    options = from_flags(ChatOptions, arguments)
    named = _adapters(options.adapter)
    model, tokenizer = load_versions(
        named, options.base, options.quantized, options.device, options.force, _tell, dtype_of(options.bf16)
    )
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
    from .pictures.matrix import matrix_figure
    from .pictures.style import save
    from .train.matrix import EvalOptions, evaluate_versions, table

    options = from_flags(EvalOptions, arguments)
    if options.matrix:  # before minutes are spent
        Path(options.matrix).parent.mkdir(parents=True, exist_ok=True)
    result = evaluate_versions(options, say=_tell)
    if options.matrix:
        save(matrix_figure(result), Path(options.matrix))
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
        from .pictures.run import run_figure
        from .pictures.style import save_themes

        print(*save_themes(lambda: run_figure(metrics), Path(arguments.picture)), sep="\n")
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
    run = len(modes) - len(bench.impossible(modes, None if arguments.random_weights else settings))
    measure = bench.measure_random if arguments.random_weights else bench.measure
    with Bars()("bench", run * (1 + arguments.rounds), "turn") as bar:

        def done(mode: str) -> None:
            bar.set_postfix_str(mode, refresh=False)
            bar.update()

        result = measure(settings, modes=modes, rounds=arguments.rounds, done=done)
    print(json.dumps(result, indent=2) if arguments.json else bench.table(result))


def run_reproduce(arguments: argparse.Namespace) -> None:
    """minilora reproduce: run the claims that have changed, write the page, print the verdicts."""
    from .experiments import reproduce
    from .experiments.page import summary, write_page
    from .train.bars import Bars
    from .train.report import terminal_width

    if arguments.list:
        print(reproduce.listing(terminal_width()))
        return
    options = from_flags(reproduce.ReproduceOptions, arguments)
    try:
        reproduce.chosen(arguments.names)
    except ValueError as error:
        raise UsageError(error) from error
    result = reproduce.reproduce(arguments.names, options, say=_tell, bars=Bars())
    path = write_page(result, options.folder)
    print(json.dumps(result, indent=2) if arguments.json else f"{summary(result)}\n\nWritten to {path}")
    if failed := reproduce.failures(result):
        raise RuntimeError(f"{len(failed)} of {len(result['claims'])} claims could not be run: {', '.join(failed)}")


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

"""The command line: minilora finetune | chat | audit | merge | export | report | pull | bench | gradcheck.

Exit status: 0, 1 (the job failed; one line says why), 2 (bad arguments), 130 (interrupted). A user's mistake never
shows a traceback; MINILORA_TRACEBACK=1 shows it all the same, for those who look for a fault in minilora.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .version import __version__


class UsageError(Exception):
    """Arguments that parse but mean nothing: exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
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
        print(f"minilora: {error or type(error).__name__}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(
        prog="minilora",
        description="LoRA written out in NumPy: fine-tune a real language model on a laptop.",
        epilog="Start with: minilora finetune",
    )
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    base: dict[str, Any] = {
        "default": "smollm2",
        "help": "tiny, smollm2, a .gguf file, or a Hugging Face folder (default: %(default)s)",
    }

    packed: dict[str, Any] = {
        "action": "store_true",
        "help": "keep the base's matrices packed, as its .gguf file holds them: less memory, more time",
    }

    job = _command(commands, "finetune", run_finetune, "teach a model from a data file and report what it cost")
    job.add_argument("--base", **base)
    job.add_argument("--data", default="legal", help="legal, or a .jsonl or .txt file (default: %(default)s)")
    job.add_argument("--method", choices=("lora", "full"), default="lora", help="default: %(default)s")
    job.add_argument("--r", type=int, default=8, help="rank of the update (default: %(default)s)")
    job.add_argument("--lora-alpha", type=float, default=16.0, help="scale is alpha / r (default: %(default)s)")
    job.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="modules to adapt: names such as q_proj v_proj, or all-linear (default)",
    )
    job.add_argument("--epochs", type=float, default=4.0, help="passes over the data (default: %(default)s)")
    job.add_argument("--steps", type=int, help="number of steps, instead of --epochs")
    job.add_argument("--lr", type=float, help="peak learning rate (default: 2e-3 for lora, 2e-4 for full)")
    job.add_argument("--batch-size", type=int, default=8, help="records per step (default: %(default)s)")
    job.add_argument("--max-length", type=int, default=512, help="tokens per record, cut beyond (default: %(default)s)")
    job.add_argument(
        "--eval-records", type=int, default=80, help="paraphrases measured, evenly chosen (default: %(default)s)"
    )
    job.add_argument("--quantized", **packed)
    job.add_argument("--recompute", action="store_true", help="keep less for the way back, for a third more time")
    job.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    job.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    job.add_argument("--out", help="folder for adapter, metrics.json and picture (default: runs/<data>)")

    talk = _command(commands, "chat", run_chat, "talk to a model, with or without an adapter")
    talk.add_argument("--base", **base)
    talk.add_argument("--adapter", help="folder of an adapter, such as runs/legal")
    talk.add_argument("--quantized", **packed)
    talk.add_argument("--prompt", help="ask one question and end")
    talk.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    talk.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)"
    )
    talk.add_argument("--seed", type=int, default=0, help="for a temperature above 0 (default: %(default)s)")
    talk.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")

    prove = _command(commands, "audit", run_audit, "check every promise that an adapter makes")
    prove.add_argument("adapter", nargs="?", default="runs/legal", metavar="ADAPTER", help="default: %(default)s")
    prove.add_argument("--base", **base)
    prove.add_argument("--quantized", **packed)

    whole = _command(commands, "merge", run_merge, "write base and adapter as one model")
    whole.add_argument("--base", **base)
    whole.add_argument("--adapter", required=True, help="folder of an adapter, such as runs/legal, or a .gguf file")
    whole.add_argument("--out", required=True, help="a new folder, or a file that ends in .gguf")
    whole.add_argument(
        "--format", choices=("hf", "gguf"), help="a Hugging Face folder, or GGUF (default: as --out ends)"
    )
    whole.add_argument(
        "--type",
        choices=("f32", "f16", "q8_0", "q4_1"),
        help="how matrices are stored (default: f32 in a folder, f16 in GGUF; q8_0 and q4_1 in GGUF only)",
    )

    hand_on = _command(commands, "export", run_export, "write an adapter as a file for llama.cpp")
    hand_on.add_argument("--base", **base)
    hand_on.add_argument("--adapter", required=True, help="folder of an adapter, such as runs/legal")
    hand_on.add_argument("--out", required=True, help="a file that ends in .gguf")

    show = _command(commands, "report", run_report, "show the page of a finished run again, or where memory goes")
    show.add_argument("run_folder", nargs="?", metavar="RUN", help="default: runs/legal")
    show.add_argument("--json", action="store_true", help="the numbers as JSON")
    show.add_argument(
        "--memory",
        action="store_true",
        help="instead: take a training step and compare the memory it holds, owner by owner, with the prediction",
    )
    step = show.add_argument_group("the step of --memory", "its tokens are random")
    step.add_argument("--base", help=base["help"].replace("%(default)s", "smollm2"))
    step.add_argument("--method", choices=("lora", "full"), help="default: lora")
    step.add_argument("--r", type=int, help="rank of the update (default: 8)")
    step.add_argument("--target-modules", nargs="+", metavar="NAME", help="q_proj v_proj ..., or all-linear (default)")
    step.add_argument("--batch-size", type=int, help="sequences (default: 4)")
    step.add_argument("--length", type=int, help="tokens per sequence (default: 128)")
    step.add_argument("--quantized", action="store_true", default=None, help=packed["help"])
    step.add_argument("--recompute", action="store_true", default=None, help="keep each block's input alone")

    fetch = _command(commands, "pull", run_pull, "download a model, or check the one that is there")
    fetch.add_argument("name", nargs="?", default="smollm2", help="default: %(default)s")

    speed = _command(commands, "bench", run_bench, "measure time and memory of every way to run a model")
    speed.add_argument("--base", **base)
    speed.add_argument("--random-weights", action="store_true", help="a random model of SmolLM2's shape: no download")
    speed.add_argument("--modes", nargs="+", metavar="MODE", help="such as floor lora full (default: all)")
    speed.add_argument("--batch-size", type=int, default=4, help="sequences per step (default: %(default)s)")
    speed.add_argument("--length", type=int, default=128, help="tokens per sequence (default: %(default)s)")
    speed.add_argument("--rounds", type=int, default=7, help="turns of each mode (default: %(default)s)")
    speed.add_argument("--json", action="store_true", help="the numbers as JSON")
    speed.add_argument(
        "--growth", metavar="FOLDER", help="draw how cost grows with length, batch, rank, width and adapters instead"
    )

    check = _command(
        commands, "gradcheck", run_gradcheck, "compare every operation's gradient with a measured derivative"
    )
    check.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def run_finetune(arguments: argparse.Namespace) -> None:
    """minilora finetune: run the job, draw its picture, print its page."""
    from .pictures.run import run_picture
    from .train.finetune import Options, finetune
    from .train.report import page

    values = {name: value for name, value in vars(arguments).items() if name != "run"}
    targets = values.pop("target_modules")
    try:
        options = Options(target_modules="all-linear" if targets == ["all-linear"] else targets, **values)
        options.lora_config()
    except ValueError as error:
        raise UsageError(error) from error
    metrics = finetune(options, say=lambda line: print(line, file=sys.stderr))
    run_picture(metrics, options.folder / "picture.png")
    print(page(metrics))


def run_chat(arguments: argparse.Namespace) -> None:
    """minilora chat: one answer for --prompt, else a conversation until an empty line or Ctrl-D."""
    from .io.zoo import load
    from .lora.peft import load_adapter
    from .train.generate import generate

    if arguments.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if not 0 <= arguments.temperature < math.inf:
        raise UsageError(f"--temperature must be 0 or a positive number, got {arguments.temperature}")
    if arguments.seed < 0:
        raise UsageError(f"--seed must not be negative, got {arguments.seed}")
    model, tokenizer = load(arguments.base, arguments.quantized, device=arguments.device)
    if arguments.adapter:
        load_adapter(model, arguments.adapter)
    settings = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
    }
    if arguments.prompt is not None:
        print(generate(model, tokenizer, arguments.prompt, **settings))
        return
    print("Ask something; an empty line or Ctrl-D ends.", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("you> ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        try:
            answer = generate(model, tokenizer, messages, **settings)
        except ValueError as error:  # too long, or a character the model has no token for: the talk goes on
            print(f"minilora: {error}", file=sys.stderr)
            messages.pop()
            continue
        print(answer)
        messages.append({"role": "assistant", "content": answer})


def run_audit(arguments: argparse.Namespace) -> None:
    """minilora audit: one line per promise, one per kind of module."""
    from .io.zoo import load
    from .lora.audit import audit
    from .lora.peft import load_adapter

    model, _ = load(arguments.base, arguments.quantized)
    load_adapter(model, arguments.adapter)
    print(audit(model, "default"))


def run_merge(arguments: argparse.Namespace) -> None:
    """minilora merge: one whole model, what reading it back gave, and what 4 bits would have lost."""
    from .io.merge import merge, resolve

    try:
        resolve(Path(arguments.out), arguments.format, arguments.type)
    except ValueError as error:
        raise UsageError(error) from error
    print(merge(arguments.base, arguments.adapter, arguments.out, arguments.format, arguments.type))


def run_export(arguments: argparse.Namespace) -> None:
    """minilora export: an adapter for llama.cpp, and what reading it back gave."""
    from .io.merge import export

    print(export(arguments.base, arguments.adapter, arguments.out))


def run_report(arguments: argparse.Namespace) -> None:
    """minilora report: the page, or the metrics, of a finished run; with --memory, where a step's bytes go."""
    from .train.report import page, read_metrics

    flags = {name: value for name, value in vars(arguments).items() if value is not None}
    folder = flags.pop("run_folder", None)
    job = {name: value for name, value in flags.items() if name not in ("run", "json", "memory")}
    if arguments.memory:
        if folder is not None:
            raise UsageError("--memory takes a step of its own and reads no run: leave out the folder")
        show_memory(job, arguments.json)
        return
    if job:
        raise UsageError(f"--{min(job).replace('_', '-')} is for --memory")
    metrics = read_metrics(folder or "runs/legal")
    print(json.dumps(metrics, indent=2) if arguments.json else page(metrics))


def show_memory(flags: dict[str, Any], as_json: bool) -> None:
    """minilora report --memory: prediction beside measurement."""
    from .cost.process import Job, report, table

    if flags.get("target_modules") == ["all-linear"]:
        del flags["target_modules"]  # the default
    try:
        job = Job(**flags)
    except ValueError as error:
        raise UsageError(error) from error
    result = report(job)
    print(json.dumps(result, indent=2) if as_json else table(result))


def run_pull(arguments: argparse.Namespace) -> None:
    """minilora pull: make sure a model is here, and say where."""
    from .io.zoo import pull

    print(pull(arguments.name, say=lambda line: print(line, file=sys.stderr)))


def run_bench(arguments: argparse.Namespace) -> None:
    """minilora bench: a table of modes, measured in turns, or the pictures of how cost grows."""
    from .cost import bench, growth
    from .train.finetune import Bars

    if arguments.growth:
        with Bars()("growth", growth.turns(), "turn") as bar:
            for path in growth.draw_all(Path(arguments.growth), done=bar.update):
                print(path)
        return
    modes = arguments.modes or list(bench.MODES)
    try:
        settings = bench.Settings(arguments.base, arguments.batch_size, arguments.length)
        bench.check(modes, arguments.rounds)
    except ValueError as error:
        raise UsageError(error) from error
    measure = bench.measure_random if arguments.random_weights else bench.measure
    with Bars()("bench", len(modes) * (1 + arguments.rounds), "turn") as bar:

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

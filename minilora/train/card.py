"""The model card of a run: README.md in its folder, as Hugging Face's hub shows it, written from the run's metrics.

Its head is YAML as the hub reads it (huggingface.co/docs/hub/model-cards); every string there is written as JSON, which
YAML contains. Commands are written out with this run's names, so that they can be copied.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.records import BUILT_IN
from ..files.disk import replacing
from ..models.hub import SOURCES, known_as
from ..pages.run import megabytes
from ..version import __version__
from .options import Options

CARD_FILE = "README.md"
_LOSSES = {
    "paraphrase": "loss, trained records asked in other words",
    "unseen": "loss, records never seen",
    "general": "loss, general text",
}
_RECALLS = {"paraphrase": "keyword recall, in other words", "unseen": "keyword recall, records never seen"}
_SHAPE = ("r", "lora_alpha", "target_modules")
_ALWAYS = (*_SHAPE, "lr", "batch_size", "max_length", "seed")  # told even where they are defaults
_NEVER = ("base", "data", "method", "out", "steps", "epochs", "device", "overwrite", "resume", "eval_records")


def write_card(folder: str | Path, metrics: dict[str, Any]) -> Path:
    """Write the model card of a finished run into its folder and return the file, which appears whole or not at all.

    metrics: what `finetune` returns. Where the adapter stands in the commands, it is as `metrics["options"]["out"]`.
    """
    path = Path(folder) / CARD_FILE
    lines = [*_head(metrics), "", *_body(metrics, repeats=(Path(folder) / "run.toml").is_file())]
    with replacing(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _head(metrics: dict[str, Any]) -> Iterator[str]:
    options = metrics["options"]
    lora, source = options["method"] == "lora", SOURCES.get(known_as(options["base"]) or "")
    head: dict[str, Any] = {}
    if source is not None:
        head["base_model"] = source.hub
        if options["data"] in BUILT_IN:  # whose texts are in the public domain: nothing but the base's licence holds
            head["license"] = source.licence.lower()
    head |= {"library_name": "peft" if lora else "transformers", "pipeline_tag": "text-generation"}
    tags = ["minilora", "lora"] if lora else ["minilora"]
    if lora and source is not None:
        tags.append(f"base_model:adapter:{source.hub}")
    yield "---"
    yield from (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in (head | {"tags": tags}).items())
    yield "---"


def _body(metrics: dict[str, Any], repeats: bool) -> Iterator[str]:
    options = metrics["options"]
    lora, variant = options["method"] == "lora", "DoRA" if options.get("use_dora") else "LoRA"
    what = f"a {variant} adapter for" if lora else "fine-tuned from"
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    yield f"# {_file_name(options['out'])}: {what} {_base_name(options)}"
    yield ""
    yield from _wrapped(
        f"Made on {metrics['created'][:10]} with minilora {__version__}, which trained {trained:,} of {total:,} "
        f"parameters ({100 * trained / total:.3g} %) on {metrics['records']['train']:,} records of "
        f"{_code(_file_name(options['data']))} for {metrics['steps']:,} steps."
    )
    yield from ("", "## How to use it", "", *_use(options))
    if metrics["loss"]:
        yield from ("", "## What it learned", "", *_learned(metrics))
    yield from ("", "## Data", "", *_data(metrics))
    yield from ("", "## Settings", "", *_settings(metrics, repeats))
    yield from ("", "## Cost", "", *_cost(metrics))
    yield from ("", "## Limits", "", *_limits(metrics))


# -- how to use it -----------------------------------------------------------------------------------------------------


def _use(options: dict[str, Any]) -> Iterator[str]:
    out, lora = shlex.quote(options["out"]), options["method"] == "lora"
    yield "minilora:"
    flag = "--adapter" if lora else "--base"
    yield from ("", "```bash", f"minilora chat {flag} {out}", "```", "")
    if not lora:
        yield from ("transformers:", "")
        yield from _python(options["out"], None)
        return
    yield from _peft(options)
    yield from ("", "llama.cpp:", "", "```bash", *_llama_cpp(options), "```")


def _peft(options: dict[str, Any]) -> Iterator[str]:
    base, out = options["base"], options["out"]
    source = SOURCES.get(known_as(base) or "")
    if known_as(base) is None and Path(base).suffix == ".gguf":
        whole = f"{_file_name(out)}-merged"
        yield from ("transformers, after base and adapter have become one model:", "", "```bash")
        yield from (f"minilora merge --adapter {shlex.quote(out)} --out {shlex.quote(whole)}", "```", "")
        yield from _python(whole, None)
        return
    yield from ("PEFT:", "")
    yield from _python(source.hub if source else base, out)
    if source is not None:
        yield ""
        yield from _wrapped(
            f"The hub's weights are the unrounded ones; this adapter was trained beside the rounded copy of them that "
            f"minilora uses, {source.file}. For exactly what was measured here, let `minilora merge` write the two as "
            "one model."
        )


def _python(base: str, adapter: str | None) -> Iterator[str]:
    """Lines that load a model in transformers, with an adapter through PEFT, and let it answer."""
    yield "```python"
    if adapter is not None:
        yield "from peft import PeftModel"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    if known_as(base) == "tiny":
        yield from ("import minilora", "", 'base = str(minilora.pull("tiny"))  # it comes with minilora')
    else:
        yield f"base = {json.dumps(base, ensure_ascii=False)}"
    yield from ("tokenizer = AutoTokenizer.from_pretrained(base)", "model = AutoModelForCausalLM.from_pretrained(base)")
    if adapter is not None:
        yield f"model = PeftModel.from_pretrained(model, {json.dumps(adapter, ensure_ascii=False)})"
    yield 'messages = [{"role": "user", "content": "..."}]'
    yield "inputs = tokenizer.apply_chat_template("
    yield '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
    yield ")"
    yield 'answer = model.generate(**inputs, max_new_tokens=128, do_sample=False)[0, inputs["input_ids"].shape[1] :]'
    yield from ("print(tokenizer.decode(answer, skip_special_tokens=True))", "```")


def _llama_cpp(options: dict[str, Any]) -> Iterator[str]:
    """An adapter of its own where llama.cpp can hold it and has the base as a file; else one whole model."""
    base, out = options["base"], shlex.quote(options["out"])
    file = shlex.quote(f"{_file_name(options['out'])}.gguf")
    beside = not options.get("use_dora") and "embed_tokens" not in str(options["target_modules"])
    if known_as(base) in SOURCES:
        whole = f'"$(minilora pull {known_as(base)})"'
    else:
        whole = shlex.quote(base) if Path(base).suffix == ".gguf" else ""
    if beside and whole:
        yield from (f"minilora export --adapter {out} --out {file}", f"llama-cli -m {whole} --lora {file}")
    else:
        yield from (f"minilora merge --adapter {out} --out {file}", f"llama-cli -m {file}")


# -- what was measured -------------------------------------------------------------------------------------------------


def _learned(metrics: dict[str, Any]) -> Iterator[str]:
    yield from ("| | before | after | change |", "|---|--:|--:|--:|")
    for name, (before, after) in metrics["loss"].items():
        yield f"| {_LOSSES.get(name, name)} | {before:.3f} | {after:.3f} | {_change(before, after)} |"
    for name, (before, after) in metrics["keyword_recall"].items():
        points = f"{100 * (after - before):+.1f} points"
        yield f"| {_RECALLS.get(name, name)} | {100 * before:.1f} % | {100 * after:.1f} % | {points} |"
    yield ""
    yield from _wrapped(
        "Loss is in nats per token of the answers: lower is better. Keyword recall is the share of the words that a "
        "right answer must contain which the model's answers do contain."
    )
    kept = metrics.get("kept") or {}
    if kept.get("which") == "best" and kept.get("loss") is not None:
        part = metrics["options"].get("strength") or 1
        of_it = f", with {part:g} of their update" if part != 1 else ""
        yield ""
        yield from _wrapped(
            f"Kept are the weights of step {kept['step']:,}, the best in validation (loss {kept['loss']:.3f}){of_it}."
        )
    if metrics["answers"]:
        yield from ("", "Answers of the base and of this model:")
    for example in metrics["answers"]:
        yield from ("", f"    {' '.join(example['question'].split())}")
        for when in ("before", "after"):
            answer = " ".join(example[when].split()) or "(nothing)"
            yield from textwrap.wrap(answer, 96, initial_indent=f"      {when:<7}", subsequent_indent=" " * 13)


def _data(metrics: dict[str, Any]) -> Iterator[str]:
    data, records = metrics["options"]["data"], metrics["records"]
    if data in BUILT_IN:
        yield from _wrapped(
            f"`{data}` comes with minilora: questions and answers written by hand for it, in the public domain (CC0)."
        )
    else:
        yield from _wrapped(
            f"{_code(_file_name(data))}, which whoever ran this brought along. Its rights hold for the adapter, too."
        )
    yield ""
    told = {"train": "trained on", "paraphrase": "of these asked in other words, to measure",
            "validation": "held out, to choose by",
            "unseen": "held out, to measure", "general": "of general text, to measure forgetting"}  # fmt: skip
    yield from ("| records | |", "|--:|---|")
    yield from (f"| {count:,} | {told.get(name, name)} |" for name, count in records.items() if count)


def _settings(metrics: dict[str, Any], repeats: bool) -> Iterator[str]:
    options, lora = metrics["options"], metrics["options"]["method"] == "lora"
    yield from ("| setting | |", "|---|---|")
    for name, value in options.items():
        default = getattr(Options, name, None)
        always = name in _ALWAYS and (lora or name not in _SHAPE)
        if name not in _NEVER and (always or (name not in _ALWAYS and value not in (default, None))):
            yield f"| {_code(name)} | {_code(_file_name(value) if name == 'adapter' else _plain(value))} |"
    if repeats:
        yield from (
            "",
            "`minilora finetune --config run.toml --out NEW` with the file beside this one repeats the run.",
        )


def _cost(metrics: dict[str, Any]) -> Iterator[str]:
    memory, lora = metrics["peak_memory_bytes"], metrics["options"]["method"] == "lora"
    yield from ("| | |", "|---|---|")
    yield f"| training | {_duration(metrics['training_seconds'])}, {metrics['seconds_per_step']:.2f} s per step |"
    yield f"| memory of a step, predicted | {megabytes(memory['predicted'])} |"
    if memory.get("measured") is not None:
        yield f"| memory of the whole process at its peak | {megabytes(memory['measured'])} |"
    what = "adapter on disk" if lora else "model on disk"
    yield f"| {what} | {megabytes(metrics['adapter_bytes'])}, beside {megabytes(metrics['base_bytes'])} of base |"


def _limits(metrics: dict[str, Any]) -> Iterator[str]:
    options = metrics["options"]
    lora = options["method"] == "lora"
    total = metrics["total_parameters"]
    yield from _bullet(
        f"A model of {_count(total)} parameters learns the form of the answers and a part of their content. What it "
        "says can be fluent and wrong, and is no advice."
    )
    if "unseen" in metrics["keyword_recall"]:
        missed = 1 - metrics["keyword_recall"]["unseen"][1]
        yield from _bullet(
            f"Asked about what it was not trained on, it misses {100 * missed:.0f} % of the expected words."
        )
    if "general" in metrics["loss"]:
        before, after = metrics["loss"]["general"]
        yield from _bullet(
            f"Its loss on general text, a measure of what it forgot, is {_change(before, after)} against the base's."
        )
    if lora:
        rounded = metrics.get("base_rounded_to")
        also = f", rounded to {rounded}; or the same before rounding" if rounded else ""
        yield from _bullet(
            f"It belongs to one base, the one with sha256 {metrics['base_sha256'][0]} (of the weights as "
            f"float32{also}; `minilora.json` has it, too). minilora refuses another; PEFT and llama.cpp do not notice."
        )
    if failed := metrics.get("audit_failed"):
        yield from _bullet(f"The audit after training found a broken promise: {failed}.")


# -- words -------------------------------------------------------------------------------------------------------------


def _base_name(options: dict[str, Any]) -> str:
    source = SOURCES.get(known_as(options["base"]) or "")
    return source.hub.rpartition("/")[2] if source else _file_name(options["base"]).removesuffix(".gguf")


def _file_name(path: str) -> str:
    """Its last part: where it lies on the machine of whoever trained is nobody's business."""
    return Path(path).name or Path(path).resolve().name


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _code(text: str) -> str:
    """Text as code in Markdown, also in a table, whatever is in it."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "``" if "`" in text else "`"
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.0f} %" if before else "from 0"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"


def _count(number: int) -> str:
    return f"{number / 1e6:,.0f} million" if number >= 1e6 else f"{number:,}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


def _bullet(text: str) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )

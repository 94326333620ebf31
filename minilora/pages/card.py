"""The model card of a run: README.md in its folder, in the form that the Hugging Face hub shows, from its metrics.

The text is templates/card.md.jinja. Its head is YAML for the hub (huggingface.co/docs/hub/model-cards); every value
there is written as JSON, which YAML contains. The commands carry this run's own names, so that they can be copied.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.labels import TEXT
from ..data.passages import PASSAGE, QUESTION
from ..data.records import BUILT_IN
from ..data.repository import is_dataset
from ..files.disk import write_bytes
from ..files.gguf_header import is_gguf
from ..files.tensors import stored_tensors
from ..lora.peft import WEIGHTS_FILE
from ..lora.provenance import read_provenance
from ..models.hub import SOURCES, known_as
from ..version import __version__
from .labels import shown
from .template import TEMPLATES, template
from .text import counted, wrapped

CARD_FILE = "README.md"
HELD_OUT = {
    "reworded": "training questions, reworded",
    "paraphrase": "training questions, paraphrased",
    "unseen": "questions not in the training data",
}
USES = {
    "train": "training",
    "reworded": "testing: training questions, reworded with some of the same words",
    "paraphrase": "testing: training questions, paraphrased",
    "validation": "validation",
    "validation_paraphrase": "validation: training questions, paraphrased",
    "unseen": "testing: not in the training data",
    "general": "testing: general text, to measure forgetting",
}
_SHARES = {
    "labels": (("accuracy", "accuracy, %"), ("macro_f1", "macro-F1, %")),
    "fields": (("fields_right", "fields right, %"), ("objects_right", "whole objects right, %")),
}
_SHAPE = ("r", "lora_alpha", "target_modules")
_ALWAYS = (*_SHAPE, "lr", "batch_size", "max_length", "seed")  # shown even if they are defaults
_NEVER = (
    "base", "data", "method", "out", "steps", "epochs", "device", "overwrite", "resume", "eval_records",
    "report_to",
)  # fmt: skip


def write_card(folder: str | Path, metrics: Mapping[str, Any], defaults: Mapping[str, Any]) -> Path:
    """Write the model card of a finished run and return the file, which appears whole or not at all.

    folder: the run's. The commands name it as `metrics["options"]["out"]` does.
    metrics: what `finetune` returns.
    defaults: of the options. Options that have their default are left out of the card.
    """
    path = Path(folder) / CARD_FILE
    values = _values(path.parent, metrics, defaults) | _asked(read_provenance(path.parent).get("data", {}))
    repeats = (path.parent / "run.toml").is_file()
    page = template(TEMPLATES / "card.md.jinja").render(**values, answer=_answer, repeats=repeats)
    write_bytes(path, page.encode())
    return path


def _values(folder: Path, metrics: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What the template needs beyond the metrics."""
    options, total = metrics["options"], metrics["total_parameters"]
    lora, base, known = options["method"] == "lora", options["base"], known_as(options["base"])
    source, kept = SOURCES.get(known or ""), metrics.get("kept") or {}
    variant = "DoRA" if options.get("use_dora") else "LoRA"
    return {
        "metrics": metrics,
        "options": options,
        "head": _head(options, source),
        "version": __version__,
        "lora": lora,
        "name": _file_name(options["out"]),
        "before": "the adapter that it was trained from" if options.get("adapter") else "the base",
        "kind": f"a {variant} adapter for" if lora else "fine-tuned from",
        "out": options["out"],
        "known": known,
        "source": source,
        "base_name": source.hub.rpartition("/")[2] if source else _file_name(base).removesuffix(".gguf"),
        "data_name": options["data"] if is_dataset(options["data"]) else _file_name(options["data"]),
        "context": _file_name(options["context"]) if options.get("context") else None,
        "built_in": options["data"] in BUILT_IN,
        "trained": metrics["trainable_parameters"],
        "total": total,
        "size": f"{total / 1e6:,.0f} million" if total >= 1e6 else f"{total:,}",
        "memory": metrics["peak_memory_bytes"],
        "merged_first": known is None and is_gguf(Path(base)),  # PEFT cannot load the base
        "beside_base": _llama_cpp_base(options, known, folder / WEIGHTS_FILE) if lora else None,
        "kept_best": kept.get("which") == "best",
        "strength": options.get("strength") or 1,
        "settings": _settings(options, defaults),
        "sets": HELD_OUT | {"general": "general text"},
        "uses": USES,
        "tasks": [_compared(metrics[name], *shares) for name, shares in _SHARES.items() if metrics.get(name)],
    }


def _asked(data: Mapping[str, Any]) -> dict[str, Any]:
    """How the training data asked: the template of their prompts and its places, and their system prompt."""
    asked = data.get("template") or data.get("context_template")
    places = [place for place in (TEXT, PASSAGE, QUESTION) if asked and place in asked]
    flags = _llama_cpp_flags(data, asked, places)
    return {"template": asked, "places": places, "system": data.get("system"), "for_llama_cpp": flags}


def _llama_cpp_flags(data: Mapping[str, Any], asked: str | None, places: list[str]) -> list[str]:
    """llama.cpp's flags for the system prompt, the question, the answers that are possible, and the likeliest one."""
    for place in places:
        asked = asked and asked.replace(place, "...")
    flags = {"-sys": data.get("system"), "-p": asked}
    if "labels" in data:
        flags["--grammar"] = "root ::= " + " | ".join(json.dumps(label, ensure_ascii=False) for label in data["labels"])
    elif "schema" in data:
        flags["--json-schema"] = json.dumps(data["schema"], ensure_ascii=False)
    return [f"{flag} {shlex.quote(value)}" for flag, value in flags.items() if value is not None] + ["--temp 0"]


def _compared(report: Mapping[str, Any], *shares: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
    """The heads and rows of a table of contenders, from a report of labels or fields."""
    rows = [row for row in report["rows"] if "missing" not in row]
    heads = [counted(report["records"], "text"), *(head for _, head in shares)]
    return heads, [[row["name"], *(shown(row[share]) for share, _ in shares)] for row in rows]


def _head(options: Mapping[str, Any], source: Any) -> dict[str, Any]:
    lora, head = options["method"] == "lora", {}
    if source is not None:
        head["base_model"] = source.hub
        if options["data"] in BUILT_IN:  # their texts are in the public domain: only the base's licence applies
            head["license"] = source.licence.lower()
    head |= {"library_name": "peft" if lora else "transformers", "pipeline_tag": "text-generation"}
    tags = ["minilora", "lora"] if lora else ["minilora"]
    return head | {"tags": [*tags, f"base_model:adapter:{source.hub}"] if lora and source is not None else tags}


def _llama_cpp_base(options: Mapping[str, Any], known: str | None, adapter: Path) -> str | None:
    """The base as an argument of llama.cpp; None where the adapter must be merged first: it holds more than A and B of
    matrices, or the base is no GGUF file.
    """
    if not all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in stored_tensors(adapter)):
        return None
    if known in SOURCES:
        return f'"$(minilora pull {known})"'
    return shlex.quote(options["base"]) if is_gguf(Path(options["base"])) else None


def _settings(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    shown = {}
    for name, value in options.items():
        always = name in _ALWAYS and (options["method"] == "lora" or name not in _SHAPE)
        if name not in _NEVER and (always or (name not in _ALWAYS and value != defaults.get(name))):
            word = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            shown[name] = _file_name(word) if name in ("adapter", "context", "schema") else word
    return shown


# -- words -------------------------------------------------------------------------------------------------------------


def _file_name(path: str) -> str:
    """The last part of a path: the rest of it is nobody's business."""
    return Path(path).name or Path(path).resolve().name


def _answer(words: str, when: str) -> str:
    """An answer as an indented block."""
    said = " ".join(words.split()) or "(nothing)"
    return "\n".join(wrapped(said, 96, first=f"      {when:<7}", indent=" " * 13))

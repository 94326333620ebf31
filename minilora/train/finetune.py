"""The main job: teach a pretrained model from a file, and measure what it learned, what it forgot and what it cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..cost.counts import count_parameters
from ..cost.predict import SHAPES, alive_at_once, predict_memory
from ..cost.process import peak_memory, program_memory
from ..files.disk import write_json
from ..io.folder import save_folder
from ..io.tokenizer import Tokenizer
from ..io.zoo import load
from ..lora.adapters import base_state, install_adapter, plan_adapter
from ..lora.audit import audit
from ..lora.peft import WEIGHTS_FILE, save_adapter
from ..nn.llama import Llama
from ..nn.module import sha256_of
from .bars import Bars
from .data import Batch, Record, Sample, cut, encode_record, encode_text, epochs, read_records, split_records
from .evaluate import ANSWER_TOKENS, answer_all, keyword_recall, mean_loss
from .loop import History, TrainingError, train
from .options import Options

METRICS_FILE = "metrics.json"
ADAPTER = "default"


@dataclass
class Material:
    """The data, read and encoded: what is trained on, the sets that are measured, the questions that are asked."""

    train: list[Sample]
    validation: list[Sample]
    scored: dict[str, list[Sample]]  # "paraphrase", "unseen", "general"
    asked: dict[str, list[Record]]  # the same for keyword recall


def finetune(
    options: Options, say: Callable[[str], None] = lambda line: None, bars: Bars | None = None
) -> dict[str, Any]:
    """Run the whole job and return its metrics, which also stand in `<out>/metrics.json`.

    Writes the adapter (or with method "full" the model) as soon as it is trained. Raises ValueError for bad input
    before anything is written, TrainingError when the loss is no number, KeyboardInterrupt after keeping what there is.
    """
    bars = bars or Bars()
    config = options.lora_config() if options.method == "lora" else None
    model, tokenizer = load(options.base, options.quantized, options.recompute, options.device, say)
    base_bytes = sum(array.nbytes for array in base_state(model).values())
    program = program_memory(base_bytes)
    material = prepare(options, tokenizer, say)
    _refuse_too_long(material, tokenizer, options, model.config.max_position_embeddings)
    steps = options.steps or math.ceil(options.epochs * len(material.train) / options.batch_size)
    planned = plan_adapter(model, config, ADAPTER, options.seed) if config else {}  # refuses what does not fit
    _make_folder(options.folder)

    before_hash = sha256_of(base_state(model))
    before = evaluate(model, tokenizer, material, options, bars, "before")
    if config is None:
        model.requires_grad_(True)
    else:
        install_adapter(model, config, ADAPTER, planned)
    counts = count_parameters(model)
    history = History()
    try:
        _train(model, material, steps, options, history, bars)
    except (KeyboardInterrupt, TrainingError):
        if history.losses and (config is not None or _finite(model)):
            _save(model, tokenizer, options)
            say(f"kept what {len(history.losses)} of {steps} steps had learned in {options.folder}")
        raise
    _save(model, tokenizer, options)
    trained_peak = peak_memory()
    promises = audit(model, ADAPTER).checks if config else []
    after = evaluate(model, tokenizer, material, options, bars, "after")
    after_hash = sha256_of(base_state(model))

    file = options.folder / (WEIGHTS_FILE if config else "model.safetensors")
    metrics = {
        "options": asdict(options) | {"lr": options.learning_rate, "out": str(options.folder)},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": steps,
        "records": {"train": len(material.train), **{name: len(part) for name, part in material.scored.items()}},
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "audit": dict(promises),
        "base_sha256": [before_hash, after_hash],
        "loss": _pairs(before["loss"], after["loss"]),
        "keyword_recall": _pairs(before["recall"], after["recall"]),
        "answers": _examples(material, before["answers"], after["answers"]),
        "train_loss": history.losses,
        "validation_loss": history.validation,
        "seconds_per_step": history.seconds_per_step,
        "tokens_per_second": history.tokens_per_second,
        "training_seconds": sum(history.seconds),
        "peak_memory_bytes": _memory(model, material, options, program, trained_peak),
        "adapter_bytes": file.stat().st_size,
        "base_bytes": base_bytes,
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
    }
    write_json(options.folder / METRICS_FILE, metrics)
    return metrics


# -- the stages --------------------------------------------------------------------------------------------------------


def prepare(options: Options, tokenizer: Tokenizer, say: Callable[[str], None]) -> Material:
    """Read and encode the data. Raises DataError listing every bad line; says how many records had to be cut."""
    records = read_records(options.data, tokenizer)
    general = read_records("general", tokenizer)
    parts: dict[str, list[Record]] = {"validation": [], "test": []}
    if records[0].text:
        chunks = encode_text(records[0].text, tokenizer, options.max_length)
        held = len(chunks) // 10
        samples = {"train": chunks[: len(chunks) - held], "unseen": chunks[len(chunks) - held :], "validation": []}
        paraphrased: list[Record] = []
    else:
        parts = split_records(records)
        paraphrased = [r.asked_otherwise() for r in parts["train"] if r.paraphrase is not None]
        paraphrased = paraphrased[:: math.ceil(len(paraphrased) / options.eval_records) or 1]
        samples = {
            "train": _encode(parts["train"], tokenizer),
            "validation": _encode(parts["validation"], tokenizer),
            "unseen": _encode(parts["test"], tokenizer),
            "paraphrase": _encode(paraphrased, tokenizer),
        }
    for name, part in samples.items():
        samples[name], longer, dropped = cut(part, options.max_length)
        if longer:
            lost = f", {dropped} of them lost their whole answer and were left out" if dropped else ""
            limit = f"--max-length {options.max_length}"
            say(f"{name}: {longer} of {len(part)} records are longer than {limit} and were cut{lost}")
    if not samples["train"]:
        raise ValueError(f"{options.data}: nothing is left to train on within --max-length {options.max_length}")
    samples["general"] = _encode(general, tokenizer)  # never cut: the same measure for every run
    scored = {name: samples[name] for name in ("paraphrase", "unseen", "general") if samples.get(name)}
    asked = {"paraphrase": paraphrased, "unseen": parts["test"]}
    asked = {name: [r for r in part if r.keywords] for name, part in asked.items()}
    return Material(samples["train"], samples["validation"], scored, {k: v for k, v in asked.items() if v})


def evaluate(
    model: Llama, tokenizer: Tokenizer, material: Material, options: Options, bars: Bars, when: str
) -> dict[str, dict[str, Any]]:
    """Losses, keyword recall and the answers themselves, by set."""
    result: dict[str, dict[str, Any]] = {"loss": {}, "recall": {}, "answers": {}}
    with bars(f"loss {when}", sum(map(len, material.scored.values())), "record") as bar:
        for name, samples in material.scored.items():
            result["loss"][name] = mean_loss(model, samples, done=bar.update)
    with bars(f"answers {when}", sum(map(len, material.asked.values())), "answer") as bar:
        for name, records in material.asked.items():
            answers = answer_all(model, tokenizer, records, done=bar.update)
            result["answers"][name] = answers
            result["recall"][name] = keyword_recall(answers, records)
    return result


def _train(model: Llama, material: Material, steps: int, options: Options, history: History, bars: Bars) -> None:
    per_epoch = math.ceil(len(material.train) / options.batch_size)
    with bars("training", steps, "step") as bar:

        def each_step(step: int) -> None:
            speed = f"{history.tokens_per_second:.0f}"
            bar.set_postfix({"loss": f"{history.losses[-1]:.3f}", "tokens/s": speed}, refresh=False)
            bar.update()
            if material.validation and (step % per_epoch == 0 or step == steps):
                history.validation.append((step, mean_loss(model, material.validation)))

        train(
            model,
            material.train,
            steps,
            history,
            lr=options.learning_rate,
            batch_size=options.batch_size,
            seed=options.seed,
            each_step=each_step,
        )


def _encode(records: Sequence[Record], tokenizer: Tokenizer) -> list[Sample]:
    return [encode_record(record, tokenizer) for record in records]


def _refuse_too_long(material: Material, tokenizer: Tokenizer, options: Options, limit: int) -> None:
    samples = [*material.train, *material.validation, *(s for part in material.scored.values() for s in part)]
    longest = max(len(sample.ids) for sample in samples)
    if longest > limit:
        raise ValueError(f"a record has {longest} tokens, the model can see {limit}: use --max-length {limit}")
    for record in (record for part in material.asked.values() for record in part):
        length = len(tokenizer.encode_chat(record.prompt, answer_next=True))
        if length + ANSWER_TOKENS > limit:
            raise ValueError(
                f"{options.data}: record {record.id}: a question of {length} tokens and an answer of {ANSWER_TOKENS} "
                f"are more than the {limit} the model can see: shorten it, or leave out its keywords"
            )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ValueError(f"{folder}: cannot write results there ({error}); choose another --out") from error


def _save(model: Llama, tokenizer: Tokenizer, options: Options) -> None:
    if options.method == "lora":
        save_adapter(model, options.folder, ADAPTER, base_model=options.base)
    else:
        save_folder(options.folder, model.config, model.state_dict(), tokenizer)


def _finite(model: Llama) -> bool:
    return all(bool(np.isfinite(float(p.data.sum()))) for _, p in model.named_parameters())


# -- the numbers -------------------------------------------------------------------------------------------------------


def _pairs(before: dict[str, float], after: dict[str, float]) -> dict[str, list[float]]:
    return {name: [before[name], after[name]] for name in before}


def _examples(material: Material, before: dict[str, list[str]], after: dict[str, list[str]]) -> list[dict[str, str]]:
    """Three questions with both answers: two on trained terms asked in other words, one on an unseen term."""
    wanted = [("paraphrase", 0), ("paraphrase", 1), ("unseen", 0)]
    chosen = []
    for name, position in wanted:
        records = material.asked.get(name, [])
        if position < len(records):
            i = position * (len(records) // 2)
            question = records[i].prompt[-1]["content"]
            chosen.append({"set": name, "question": question, "before": before[name][i], "after": after[name][i]})
    return chosen


def _memory(
    model: Llama, material: Material, options: Options, program: int | None, measured: int | None
) -> dict[str, Any]:
    """Predicted for the largest of the first batches, and measured for the process, which tells nothing of a GPU."""
    on_host = options.device == "cpu"

    def alive(batch: Batch) -> dict[str, int]:  # a GPU takes a batch undivided
        if on_host:
            return alive_at_once(batch.input_ids, batch.labels, batch.packing)
        return {"tokens": batch.input_ids.size, "scored": batch.scored}

    batches = zip(epochs(material.train, options.batch_size, options.seed), range(20), strict=False)
    settings: dict[str, Any] = max((alive(batch) for batch, _ in batches), key=lambda shape: shape["tokens"])
    settings |= {"recompute": options.recompute, "program": program or 0 if on_host else 0}
    full = mine = predict_memory(model.config, **settings)
    if options.method == "lora":
        adapted = {name.rpartition(".")[2] for name, m in model.named_modules() if getattr(m, "adapters", None)}
        base_bytes = sum(array.nbytes for array in base_state(model).values())
        targets = adapted & set(SHAPES)
        mine = predict_memory(model.config, rank=options.r, targets=targets, base_bytes=base_bytes, **settings)
    return {
        "predicted": mine.total,
        "measured": measured if on_host else None,
        "full_predicted": full.total,
        "by_owner": mine.by_owner(),
        "full_by_owner": full.by_owner(),
    }

"""The main job: teach a pretrained model from a file, and measure what it learned, what it forgot and what it cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..cost.counts import count_parameters
from ..cost.predict import Step, kept_activations, predict_memory, recomputed_activations
from ..cost.process import peak_memory, program_memory
from ..files.disk import replacing, write_json
from ..io.folder import save_folder
from ..io.tokenizer import Tokenizer
from ..io.zoo import load
from ..lora.adapters import base_state, install_adapter, plan_adapter
from ..lora.audit import audit
from ..lora.peft import WEIGHTS_FILE, save_adapter
from ..lora.variants import lora_plus
from ..nn.llama import Llama
from ..nn.module import sha256_of
from ..nn.optim import AdamW
from ..pictures.run import run_picture
from .bars import Bars
from .card import write_card
from .data import epochs, sha256_of_data
from .evaluate import mean_loss
from .log import LOG_FILE, Log
from .loop import History, TrainingError, fit
from .material import Material, Measured, evaluate, prepare
from .options import Options
from .place import METRICS_FILE, MODEL_FILE, PICTURE_FILE, RunFolder

OPTIONS_FILE = "run.toml"
ADAPTER = "default"


def finetune(
    options: Options,
    say: Callable[[str], None] = lambda line: None,
    bars: Bars | None = None,
    measure: bool = True,
) -> dict[str, Any]:
    """Run the whole job and return its metrics, which also stand in `<out>/metrics.json`.

    Results are written aside, in `<out>.partial`: the adapter (or with method "full" the model) as soon as it is
    trained, then metrics and picture. In the end all of it takes the place of `<out>`, whole. say: hears what a user
    should know. bars: where progress is shown, on stderr if left out. measure: without it there is training and
    validation alone, for a search over settings, and the metrics hold no losses, recalls and answers from before and
    after. Raises ValueError for bad input, or for results that are there already, before anything is written;
    TrainingError when the loss is no number; KeyboardInterrupt after keeping what there is.
    """
    bars = bars or Bars()
    place = RunFolder(options.folder, options.overwrite, say)
    place.refuse()
    config = options.lora_config() if options.method == "lora" else None
    model, tokenizer = load(options.base, options.quantized, options.recompute, options.device, say)
    base_bytes = sum(array.nbytes for array in base_state(model).values())
    program = program_memory(base_bytes)
    material = prepare(options, tokenizer, say)
    material.refuse_what_is_longer(model.config.max_position_embeddings, options.data, tokenizer)
    if not measure:
        material = replace(material, scored={}, asked={}, shown={})
    steps = options.steps or math.ceil(options.epochs * len(material.train) / options.records_per_step)
    planned = plan_adapter(model, config, ADAPTER, options.seed) if config else {}  # refuses what does not fit

    with place:
        with replacing(place.partial / OPTIONS_FILE) as partial:
            partial.write_text(options.text(), encoding="utf-8")
        before_hash = sha256_of(base_state(model))
        before = evaluate(model, tokenizer, material, bars, "before")
        if config is None:
            model.requires_grad_(True)
        else:
            install_adapter(model, config, ADAPTER, planned)
            learned = {"name": options.data, "sha256": sha256_of_data(options.data), "records": len(material.train)}
            model.adapters[ADAPTER].data = learned  # for its folder's minilora.json
        counts = count_parameters(model)
        history = _learn(model, tokenizer, material, steps, options, place.partial, bars, say)
        trained_peak = peak_memory()
        promises = audit(model, ADAPTER).checks if config else []
        after = evaluate(model, tokenizer, material, bars, "after")
        after_hash = sha256_of(base_state(model))
        file = place.partial / (WEIGHTS_FILE if config else MODEL_FILE)
        metrics = {
            "options": asdict(options) | {"lr": options.learning_rate, "out": str(options.folder)},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "steps": steps,
            "records": {
                "train": len(material.train),
                "validation": len(material.validation),
                **{name: len(scored) for name, scored in material.scored.items()},
            },
            "trainable_parameters": counts.trainable,
            "total_parameters": counts.total,
            "audit": dict(promises),
            "base_sha256": [before_hash, after_hash],
            **_learned(material, before, after),
            **_trained(history),
            "peak_memory_bytes": _memory(model, material, options, program, trained_peak),
            "adapter_bytes": file.stat().st_size,
            "base_bytes": base_bytes,
            "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
        }
        write_json(place.partial / METRICS_FILE, metrics)
        write_card(place.partial, metrics)
        run_picture(metrics, place.partial / PICTURE_FILE)
        place.finish()
    return metrics


# -- the stages --------------------------------------------------------------------------------------------------------


def _learn(
    model: Llama,
    tokenizer: Tokenizer,
    material: Material,
    steps: int,
    options: Options,
    folder: Path,
    bars: Bars,
    say: Callable[[str], None],
) -> History:
    """Train and save; what was learned until training broke off is saved, too, if it is usable."""
    history = History()
    try:
        _train(model, material, steps, options, history, folder, bars)
    except (KeyboardInterrupt, TrainingError):
        if history.losses and (options.method == "lora" or _finite(model)):
            _save(model, tokenizer, options, folder)
            say(f"stopped after {len(history.losses)} of {steps} steps")
        raise
    _save(model, tokenizer, options, folder)
    return history


def _train(
    model: Llama, material: Material, steps: int, options: Options, history: History, folder: Path, bars: Bars
) -> None:
    per_epoch = math.ceil(len(material.train) / options.records_per_step)
    log = Log(folder / LOG_FILE, history)
    with bars("training", steps, "step") as bar:

        def each_step(step: int) -> None:
            speed = f"{history.tokens_per_second:.0f}"
            bar.set_postfix({"loss": f"{history.losses[-1]:.3f}", "tokens/s": speed}, refresh=False)
            bar.update()
            log.row(peak_memory() if options.device == "cpu" else None)
            if material.validation and (step % per_epoch == 0 or step == steps):
                history.validation.append((step, mean_loss(model, material.validation)))

        fit(
            model,
            material.train,
            steps,
            batch_size=options.batch_size,
            seed=options.seed,
            warmup=options.warmup,
            max_norm=options.max_grad_norm,
            optimizer=_optimizer(model, options),
            each_step=each_step,
            history=history,
            schedule=options.schedule,
            grad_accumulation=options.grad_accumulation,
        )


def _optimizer(model: Llama, options: Options) -> AdamW:
    parameters = model.trainable_parameters()
    scale = None if options.lora_plus is None else lora_plus(parameters, options.lora_plus)
    return AdamW(parameters, options.learning_rate, weight_decay=options.weight_decay, lr_scale=scale)


def _save(model: Llama, tokenizer: Tokenizer, options: Options, folder: Path) -> None:
    if options.method == "lora":
        save_adapter(model, folder, ADAPTER)
    else:
        save_folder(folder, model.config, model.state_dict(), tokenizer)


def _finite(model: Llama) -> bool:
    return all(bool(np.isfinite(float(p.data.sum()))) for _, p in model.named_parameters())


# -- the numbers -------------------------------------------------------------------------------------------------------


def _learned(material: Material, before: Measured, after: Measured) -> dict[str, Any]:
    return {
        "loss": {name: [loss, after.loss[name]] for name, loss in before.loss.items()},
        "keyword_recall": {name: [recall, after.recall[name]] for name, recall in before.recall.items()},
        "answers": _examples(material, before.answers, after.answers),
    }


def _trained(history: History) -> dict[str, Any]:
    return {
        "train_loss": history.losses,
        "validation_loss": history.validation,
        "seconds_per_step": history.seconds_per_step,
        "tokens_per_second": history.tokens_per_second,
        "training_seconds": sum(history.seconds),
    }


def _examples(material: Material, before: dict[str, list[str]], after: dict[str, list[str]]) -> list[dict[str, str]]:
    """Three questions with both answers: two on what was trained, asked in other words if there are, one unseen."""
    questions = material.asked | material.shown
    trained = "paraphrase" if "paraphrase" in questions else "train"
    wanted = [(trained, 0), (trained, 1), ("unseen", 0)]
    chosen = []
    for name, position in wanted:
        records = questions.get(name, [])
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
    batches = zip(epochs(material.train, options.batch_size, options.seed), range(20), strict=False)
    known = {"program": program or 0 if on_host else 0}
    step = max((Step.of(model, samples, **known) for samples, _ in batches), key=lambda step: step.tokens)
    mine, full = predict_memory(step), predict_memory(replace(step, rank=None, base_bytes=None))
    kept = recomputed_activations(step) if step.recompute else kept_activations(step)
    return {
        "predicted": mine.total,
        "measured": measured if on_host else None,
        "full_predicted": full.total,
        "by_owner": mine.by_owner(),
        "full_by_owner": full.by_owner(),
        "activations": sum(kept.values()),  # as the way back begins: of full fine-tuning the peak may come later
    }

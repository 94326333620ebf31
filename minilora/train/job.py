"""The main job: teach a pretrained model from a file, and measure what it learned, what it forgot and what it cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.records import sha256_of_data
from ..data.samples import epochs
from ..files.disk import remove_folder, replacing, write_json
from ..lora.adapters import base_state, install_adapter, plan_adapter, scale_adapter
from ..lora.audit import AuditError, audit
from ..lora.peft import WEIGHTS_FILE, load_adapter, save_adapter
from ..lora.variants import lora_plus
from ..measure.counts import count_parameters
from ..measure.predict import Step, kept_activations, predict_memory, recomputed_activations
from ..measure.process import peak_memory, program_memory
from ..models.folder import save_folder
from ..models.load import dtype_of, load
from ..models.tokenizer import Tokenizer
from ..nn.llama import Llama
from ..nn.module import sha256_of
from ..nn.optim import AdamW
from ..nn.ranks import ALONE, Order, Ranks, Several
from ..pages.run import run_picture
from ..progress import Bars
from ..version import __version__
from . import checkpoint
from .card import write_card
from .checkpoint import State
from .follow import follow, level, score, start
from .learn import learn
from .log import Log
from .loop import History, Trainer, TrainingError
from .material import Material, Measured, evaluate, learned, prepare
from .options import Options
from .run_folder import CHECKPOINT, LAST, LOG_FILE, METRICS_FILE, MODEL_FILE, OPTIONS_FILE, PICTURE_FILE, RunFolder

ADAPTER = "default"


def finetune(
    options: Options,
    say: Callable[[str], None] = lambda line: None,
    bars: Bars | None = None,
    measure: bool = True,
    answers: bool = True,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Run the whole job and return its metrics, which also stand in `<out>/metrics.json`.

    Results are written aside, in `<out>.partial`: the adapter (or with method "full" the model) as soon as it is
    trained, then metrics and picture. In the end all of it takes the place of `<out>`, whole. say: hears what a user
    should know. bars: where progress is shown, on stderr if left out. measure: without it there is training and
    validation alone, for a search over settings, and the metrics hold no losses, recalls and answers from before and
    after. answers: without them losses are measured, but nothing is asked, and there is no card and no picture. ranks:
    `nn.ranks.world()` in a program that mpiexec starts: all of them call this, the first one alone writes and says
    anything, and the others get no metrics.

    Raises ValueError for bad input, or for results that are there already, before anything is written; TrainingError
    when the loss is no number; KeyboardInterrupt after keeping what there is.
    """
    if isinstance(ranks, Several) and ranks.number:
        _follow(options, measure, answers, ranks)
        return {}
    bars = bars or Bars()
    with RunFolder(options.folder, options.overwrite, options.resume, say) as place:
        state = None
        if options.resume:
            state = checkpoint.read_state(place.partial)
            checkpoint.refuse_other(state, options)
        job = _set_up(options, measure, answers, ranks, say)
        model, tokenizer, material = job.model, job.tokenizer, job.material
        if state is None:
            before = evaluate(model, tokenizer, material, bars, "before", ranks)
            state = State(checkpoint.told(options), job.base, material.sha256, before)
        else:
            checkpoint.refuse_others_data(state, job.base, material.sha256, options)
        ranks.tell(Order.BEGIN)
        job.begin()
        if options.method == "lora":
            source = {"name": options.data, "sha256": sha256_of_data(options.data), "records": len(material.train)}
            source |= {key: text for key in ("system", "split") if (text := getattr(material, key)) is not None}
            model.adapters[ADAPTER].data = source  # for its folder's minilora.json
        trainer = _trainer(job, options, ranks)
        if not state.trained:
            _learn(trainer, tokenizer, material, options, state, place, bars, say)
        else:
            place.began = True
            checkpoint.read_weights(place.partial, trainer.parameters)
        memory = _memory(job, options, ranks, peak_memory())
        level(trainer)
        after = evaluate(model, tokenizer, material, bars, "after", ranks)
        ranks.tell(Order.END)
        metrics = _metrics(trainer, material, options, state, after, memory, place.partial)
        write_json(place.partial / METRICS_FILE, metrics)
        if answers:
            write_card(place.partial, metrics)
            run_picture(metrics, place.partial / PICTURE_FILE)
        place.finish()
    return metrics


# -- the stages --------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What a job works with, the same on every rank.

    begin: puts what is to be trained in place. base: the fingerprint of the base's weights. program: the bytes that the
    process held before it had a model, where that is known.
    """

    model: Llama
    tokenizer: Tokenizer
    material: Material
    steps: int
    begin: Callable[[], object]
    base: str
    program: int | None


def _set_up(
    options: Options, measure: bool, answers: bool, ranks: Ranks, say: Callable[[str], None] = lambda line: None
) -> Job:
    """Load the base and the data, and refuse what does not fit, before anything is computed."""
    if ranks.size > 1 and options.device != "cpu":
        raise ValueError(f"several ranks compute on the cpu alone: leave out mpiexec, or device {options.device}")
    model, tokenizer = load(options.base, options.quantized, options.recompute, options.device, dtype_of(options.bf16))
    program = program_memory(_base_bytes(model))
    material = prepare(options, tokenizer, say)
    material.refuse_what_is_longer(model.config.max_position_embeddings, options.data, tokenizer)
    if options.patience is not None and not material.validation_sets:
        raise ValueError(f"{options.data}: nothing is held out for validation, so patience has nothing to go by")
    if not measure:
        material = replace(material, scored={}, asked={}, shown={})
    elif not answers:
        material = replace(material, asked={}, shown={})
    steps = options.steps or math.ceil(options.epochs * len(material.train) / options.records_per_step)
    begin = _start(model, options)
    base = sha256_of(base_state(model))
    ranks.ready(minilora=__version__, base=base, data=material.sha256)
    return Job(model, tokenizer, material, steps, begin, base, program)


def _follow(options: Options, measure: bool, answers: bool, ranks: Several) -> None:
    """The job of every rank but the first."""
    job = _set_up(options, measure, answers, ranks)

    def begin() -> Trainer:
        job.begin()
        return _trainer(job, options, ranks)

    follow(job.model, job.tokenizer, job.material, options, ranks, begin)


def _start(model: Llama, options: Options) -> Callable[[], object]:
    """Read or plan what is to be trained, and refuse what does not fit. Returns what puts it in place."""
    if options.method == "full":
        return lambda: model.requires_grad_(True)
    if options.adapter is not None:
        load_adapter(model, options.adapter, ADAPTER)
        if options.kept_strength != 1:
            scale_adapter(model, ADAPTER, 1.0)  # refuses now what could not be scaled in the end
        return lambda: None
    config = options.lora_config()
    planned = plan_adapter(model, config, ADAPTER, options.seed)
    return lambda: install_adapter(model, config, ADAPTER, planned)


def _trainer(job: Job, options: Options, ranks: Ranks) -> Trainer:
    parameters = job.model.trainable_parameters()
    scale = None if options.lora_plus is None else lora_plus(parameters, options.lora_plus)
    return Trainer(
        job.model,
        job.material.train,
        job.steps,
        AdamW(parameters, options.learning_rate, weight_decay=options.weight_decay, lr_scale=scale),
        batch_size=options.batch_size,
        seed=options.seed,
        warmup=options.warmup,
        max_norm=options.max_grad_norm,
        schedule=options.schedule,
        grad_accumulation=options.grad_accumulation,
        ranks=ranks,
    )


def _learn(
    trainer: Trainer,
    tokenizer: Tokenizer,
    material: Material,
    options: Options,
    state: State,
    place: RunFolder,
    bars: Bars,
    say: Callable[[str], None],
) -> None:
    """Train, from the start or from the checkpoint, and keep what is to be kept; also where training breaks off."""
    save = partial(_save, trainer.model, tokenizer, options, state.base)
    if options.resume:
        checkpoint.restore(place.partial, state, trainer, ADAPTER)
    else:
        with replacing(place.partial / OPTIONS_FILE) as file:
            file.write_text(options.text(), encoding="utf-8")
    start(trainer)
    trainer.history, place.began = state.history, True
    log = Log(place.partial / LOG_FILE, state.history)
    try:
        learn(
            trainer,
            material,
            options,
            place.partial,
            save=lambda: checkpoint.save(place.partial, state, trainer, save, ADAPTER),
            each_step=lambda: log.row(peak_memory() if options.device == "cpu" else None),
            bars=bars,
            say=say,
        )
    except KeyboardInterrupt:
        say(f"stopped after {trainer.done} of {trainer.steps} steps")
        raise
    except TrainingError:
        kept = _kept(state.history, options)
        if kept["step"] != trainer.done:
            checkpoint.read_best(place.partial, kept["step"], trainer.parameters)
        if kept["step"] and (options.method == "lora" or _finite(trainer.model)):
            say(f"stopped after {trainer.done} of {trainer.steps} steps")
            _weaken(trainer.model, options)
            save(place.partial)
        remove_folder(place.partial / CHECKPOINT)  # it would lead there again
        checkpoint.forget_best(place.partial)
        raise
    _keep(trainer, material, options, state, place.partial, save)


def _keep(
    trainer: Trainer,
    material: Material,
    options: Options,
    state: State,
    folder: Path,
    save: Callable[[Path], None],
) -> None:
    """Write what training has led to where it will stay: the best weights, and where the last are others, those, too.
    The model has the kept ones then.
    """
    kept = _kept(state.history, options)
    if kept["step"] != trainer.done:
        _weaken(trainer.model, options)
        save(folder / LAST)
        level(trainer)
        state.last_loss = score(trainer, material)
        checkpoint.read_best(folder, kept["step"], trainer.parameters)
    _weaken(trainer.model, options)
    save(folder)
    state.trained = True
    checkpoint.save_trained(folder, state)


def _weaken(model: Llama, options: Options) -> None:
    """What was trained becomes what is kept of it."""
    if options.kept_strength != 1:
        scale_adapter(model, ADAPTER, options.kept_strength)


def _kept(history: History, options: Options) -> dict[str, Any]:
    """Which weights are kept: of which step, whether as the best or as the last, with which validation loss."""
    if options.keep == "best" and history.best is not None:
        step, loss = history.best
        return {"step": step, "which": "best", "loss": loss}
    losses = dict(history.validation)
    return {"step": len(history.losses), "which": "last", "loss": losses.get(len(history.losses))}


def _save(model: Llama, tokenizer: Tokenizer, options: Options, base_sha256: str, folder: Path) -> None:
    if options.method == "lora":
        save_adapter(model, folder, ADAPTER, base_sha256=base_sha256, overwrite=True)
    else:
        save_folder(folder, model.config, model.state_dict(), tokenizer)


def _finite(model: Llama) -> bool:
    return all(bool(np.isfinite(float(p.data.sum()))) for _, p in model.named_parameters())


# -- the numbers -------------------------------------------------------------------------------------------------------


def _metrics(
    trainer: Trainer,
    material: Material,
    options: Options,
    state: State,
    after: Measured,
    memory: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """All that is known of a run in the end. folder: where its weights are."""
    model, history, counts = trainer.model, state.history, count_parameters(trainer.model)
    return {
        "options": _told(model, options),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": len(history.losses),
        "planned_steps": trainer.steps,
        "records": {
            "train": len(material.train),
            "validation": sum(map(len, material.validation_sets.values())),
            **{name: len(scored) for name, scored in material.scored.items()},
        },
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        **_proved(model, options, state.base),
        **learned(material, state.before, after),
        **_trained(history),
        "kept": _kept(history, options),
        "last": {"loss": state.last_loss or after.loss},
        "peak_memory_bytes": memory,
        "adapter_bytes": (folder / (WEIGHTS_FILE if options.method == "lora" else MODEL_FILE)).stat().st_size,
        "base_bytes": _base_bytes(model),
        "base_rounded_to": model.rounded_to,
        "ranks": trainer.ranks.size,
        "bytes_per_step": _sent(trainer),
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
    }


def _sent(trainer: Trainer) -> dict[str, int]:
    """What a rank sends for each step, and what it would if the whole model were trained."""
    whole = sum(array.size for array in base_state(trainer.model).values())
    mine = sum(p.size for p in trainer.parameters.values())
    return {"sent": trainer.ranks.bytes_per_step(mine), "full_sent": trainer.ranks.bytes_per_step(whole)}


def _base_bytes(model: Llama) -> int:
    return sum(array.nbytes for array in base_state(model).values())


def _proved(model: Llama, options: Options, before: str) -> dict[str, Any]:
    """What the audit of an adapter found, or which promise is broken: that is told, and the run's numbers are kept.

    before: the base's fingerprint when the run began, beside which stands that of now.
    """
    found: dict[str, Any] = {"audit": {}}
    if options.method == "lora":
        try:
            found["audit"] = dict(audit(model, ADAPTER, base_sha256=before).checks)
        except AuditError as error:
            found["audit_failed"] = str(error)
    after = before if "base" in found["audit"] else sha256_of(base_state(model))  # the audit has just compared
    return found | {"base_sha256": [before, after]}


def _told(model: Llama, options: Options) -> dict[str, Any]:
    """The options as they took effect: of an adapter that was trained before, its own settings."""
    values = asdict(options.in_effect()) | {"out": str(options.folder)}
    if options.adapter is not None:
        values |= {name: value for name, value in asdict(model.adapters[ADAPTER].config).items() if name in values}
    return values


def _trained(history: History) -> dict[str, Any]:
    return {
        "train_loss": history.losses,
        "validation_loss": history.validation,
        "validation": history.validation_sets,
        "seconds_per_step": history.seconds_per_step,
        "tokens_per_second": history.tokens_per_second,
        "training_seconds": sum(history.seconds),
    }


def _memory(job: Job, options: Options, ranks: Ranks, measured: int | None) -> dict[str, Any]:
    """Predicted for the largest of the first batches, as this rank computes it, and measured for the process, which
    tells nothing of a GPU.
    """
    on_host = options.device == "cpu"
    batches = zip(epochs(job.material.train, options.batch_size, options.seed), range(20), strict=False)
    known = {"program": job.program or 0 if on_host else 0}
    steps = (Step.of(job.model, ranks.share(samples), **known) for samples, _ in batches)
    step = max(steps, key=lambda step: step.tokens)
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

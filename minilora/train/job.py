"""The main job: fine-tune a pretrained model on a file, and measure what it learned, what it forgot and what it cost.

Under mpiexec every rank runs this program: the first one measures, and reads and writes the run's folder; the others
train along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..data.fields import stored_tasks
from ..data.records import BUILT_IN, revision_of_data, sha256_of_data
from ..data.repository import is_dataset
from ..data.samples import steps_per_epoch
from ..data.trained import data_of, is_same, warning_of_change, warning_of_trained
from ..engine import bfloat16
from ..engine.backend import release_memory
from ..engine.tensor import no_grad
from ..files.disk import remove_folder, write_bytes, write_json
from ..generate.conversation import TOY
from ..lora.adapters import base_state, install_adapter, plan_adapter, scale_adapter
from ..lora.peft import WEIGHTS_FILE, load_adapter, save_adapter
from ..lora.provenance import FORMAT, PROVENANCE_FILE, path_from
from ..lora.variants import lora_plus
from ..measure.counts import count_parameters
from ..measure.loss import mean_loss
from ..measure.process import added_memory, free_memory, peak_memory, program_memory
from ..models.folder import save_folder
from ..models.hub import known_as
from ..models.load import dtype_of, load
from ..models.tokenizer import Tokenizer
from ..nn.language_model import LanguageModel
from ..nn.module import sha256_of
from ..nn.optim import AdamW
from ..nn.parts import Example
from ..nn.ranks import Ranks, world
from ..nn.step import loss_without_grad
from ..pages.card import write_card
from ..pages.figures import run_picture, task_figures
from ..pages.style import save
from ..pages.text import megabytes
from ..progress import hide_progress, log, progress
from ..version import __version__
from . import checkpoint
from .checkpoint import State
from .interrupts import noted_interrupts
from .log import Log
from .loop import Trainer, TrainingError, begin_together
from .material import Material, Measured, evaluate, prepare
from .metrics import base_bytes, memory_of, metrics_of, sizes_of
from .options import Options
from .rate import usual_rate
from .reporting import reporter_to
from .run_folder import CHECKPOINT, LAST, LOG_FILE, METRICS_FILE, MODEL_FILE, OPTIONS_FILE, PICTURE_FILE, RunFolder

ADAPTER = "default"
LARGE = 1e8  # bytes of a base for which bfloat16 and a lower learning rate are suggested
SAME = 0.99  # of the peak: Linux's counter lags a little behind
HIGH = 1e-3  # a learning rate of full fine-tuning
OFTEN = 500  # steps between validations, and between checkpoints, at most: of many records an epoch is long
REHEARSED = 3  # steps whose median is taken: the first one is slower


@np.errstate(over="ignore", invalid="ignore")  # a run that diverges says so itself
def finetune(options: Options, measure: bool = True, answers: bool = True) -> dict[str, Any]:
    """Run the whole job and return its metrics, which are also in `<out>/metrics.json`.

    Results gather in `<out>.partial`: the adapter (or with method "full" the model) as soon as it is trained, then
    metrics and picture. In the end the folder replaces `<out>` as a whole. Lines and progress bars are shown where
    `show_progress` was called.

    options: what to fine-tune on what, and how.
    measure: False only trains and validates, for a search over hyperparameters: the metrics have no losses, keyword
        recalls and answers from before and after.
    answers: False measures losses, and with labels the accuracy on the validation set, but asks no questions and makes
        no card and no picture.

    Where mpiexec has started several ranks, all call this with the same options, and only the first gets metrics.
    Raises ValueError for bad input, or for results that are there already, before anything is written; TrainingError
    when the loss is not finite; KeyboardInterrupt after writing a checkpoint.
    """
    if not isinstance(options, Options):
        raise TypeError(f"expected minilora.Options(data=..., ...), got a {type(options).__name__}")
    options = options.on_its_base()
    if world().number:
        with hide_progress(), suppress(TrainingError):  # as the first rank, which says so
            _train_along(_set_up(options, False, False))
        return {}
    with RunFolder(options.folder, options.overwrite, options.resume) as place:
        return _run(options, measure, answers, place)


def _run(options: Options, measure: bool, answers: bool, place: RunFolder) -> dict[str, Any]:
    """Set up, measure, train, measure, and write what came out."""
    state = checkpoint.read_state(place.partial) if options.resume else None
    job = _set_up(options, measure, answers)
    options = job.options
    if state is not None:
        checkpoint.refuse_other(state, options.folder, options=options.decisive())
        checkpoint.refuse_other(state, options.folder, base=job.base, data=job.material.sha256)
    _agree(job, world())
    job.material.refer_to(job.model)  # a new adapter changes nothing yet, and one that is trained further is in place
    if state is None:
        before = evaluate(job.model, job.tokenizer, job.material, "before")
        job.ended("measuring the base")
        state = State(options.decisive(), job.base, job.material.sha256, before)
    trainer = job.begin(state)
    if not world().same(state.trained):
        _train(job, trainer, state, place)
        job.ended("training")
    else:
        place.began = True
        checkpoint.read_weights(place.partial, job.model, ADAPTER)
    after = evaluate(job.model, job.tokenizer, job.material, "after")
    job.ended("measuring the result")
    weights = place.partial / (WEIGHTS_FILE if options.method == "lora" else MODEL_FILE)
    metrics = {
        "options": _in_effect(job.model, options),
        **metrics_of(trainer, job.material, state, after, state.history.kept(options.keep)),
        "peak_memory_bytes": _memory(job),  # audit and all
        "adapter_bytes": weights.stat().st_size,
    }
    write_json(place.partial / METRICS_FILE, metrics)
    if answers:
        write_card(place.partial, metrics, vars(Options()))
        run_picture(metrics, place.partial / PICTURE_FILE)
        for name, draw in task_figures(metrics).items():
            save(draw(), (place.partial / PICTURE_FILE).with_stem(f"picture-{name}"))
    place.finish()
    return metrics


def _agree(job: Job, ranks: Ranks) -> None:
    """Raise ValueError on a rank that would train something else than the first one."""
    options, data = job.options.decisive(), job.material.sha256
    own = {"minilora": __version__, "options": options, "base": job.base, "data": data}
    first = ranks.same(own)
    if other := [name for name, fact in own.items() if first[name] != fact]:
        raise ValueError(f"another {other[0]} than rank 0 has: they must be the same everywhere")


def _train_along(job: Job) -> None:
    """The job of every rank but the first."""
    _agree(job, world())
    job.material.refer_to(job.model)
    trainer = job.begin(State(job.options.decisive(), job.base, job.material.sha256, Measured()))
    if not world().same(False):  # whether the first rank has the trained weights already
        begin_together(trainer)
        trainer.run({}, lambda done: None, lambda: None)


def rehearse(options: Options) -> dict[str, Any]:
    """Set a job up, take its first steps, and return the plan of the whole job: the first entries of its metrics, with
    the predicted memory, what is free, and the seconds of a step. Nothing is written: if the job could not write its
    results, a line says so.

    Raises the other errors of `finetune`.
    """
    options = options.on_its_base()
    try:
        RunFolder(options.folder, options.overwrite, options.resume).refuse()
    except ValueError as error:
        log.warning("%s", error)
    job = _set_up(options, True, True)
    job.material.refer_to(job.model)
    trainer = job.begin(State(job.options.decisive(), job.base, job.material.sha256, Measured()))
    with trainer, progress("first steps", min(REHEARSED, trainer.steps), "step") as bar:
        while trainer.done < min(REHEARSED, trainer.steps):
            trainer.step()
            bar.update()
    counts = count_parameters(job.model)
    return {
        "options": _in_effect(job.model, job.options),
        "planned_steps": trainer.steps,
        **sizes_of(job.material),
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "seconds_per_step": trainer.history.seconds_per_step,
        "free_memory_bytes": job.free,
        "peak_memory_bytes": job.predicted,
    }


# -- set up ------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """The parts of a job.

    install: puts the trainable parameters in place. base: the fingerprint of the base's weights. program: the bytes
    that the process held before training besides the base, where they are known. peaks: its peak so far, by phase.
    """

    options: Options
    model: LanguageModel
    tokenizer: Tokenizer
    material: Material
    install: Callable[[], object]
    base: str
    program: int | None
    peaks: dict[str, int | None] = field(default_factory=dict)

    @cached_property
    def predicted(self) -> dict[str, Any]:
        """The predicted memory of a training step. The trainable parameters must be in place."""
        size = -(-self.options.batch_size // world().size)
        return memory_of(self.model, self.material, size, self.options.seed, self.program)

    @property
    def free(self) -> int | None:
        """The bytes that this process can have in all, where they are known."""
        return free_memory() if self.options.device == "cpu" else None

    def ended(self, phase: str) -> None:
        """Note the process's peak, and give back what the phase no longer needs, so that the next one is not on top."""
        self.peaks[phase] = peak_memory()
        release_memory()

    def begin(self, state: State) -> Trainer:
        """Put the trainable parameters in place, warn if memory is short, and return their trainer."""
        self.install()
        needed, free = self.predicted["predicted"], self.free
        if free is not None and needed > free and not state.trained:
            shown = f"{megabytes(needed)} predicted, {megabytes(free)} free"
            log.warning(f"memory of a step: {shown}; `minilora memory` shows what other options would take")
        options, material = self.options, self.material
        self.model.adapters.get(ADAPTER, self.model).data = _entry_of_data(options, material)
        parameters = self.model.trainable_parameters()
        scale = None if options.lora_plus is None else lora_plus(parameters, options.lora_plus)
        epoch = steps_per_epoch(material.train, options.records_per_step)
        settings = replace(options, eval_every=options.eval_every or min(epoch, OFTEN))
        optimizer = AdamW(parameters, options.learning_rate, weight_decay=options.weight_decay, lr_scale=scale)
        return Trainer(self.model, material.train, settings, optimizer, state.history)

    def scale(self) -> None:
        """Give the trained adapter the scale with which it is saved."""
        if self.options.adapter_scale != 1:
            scale_adapter(self.model, ADAPTER, self.options.adapter_scale)

    def save(self, folder: Path) -> None:
        """Write the adapter, or the model, into a folder."""
        if self.options.method == "lora":
            save_adapter(self.model, folder, ADAPTER, base_sha256=self.base, overwrite=True)
        else:
            save_folder(folder, self.model.config, self.model.state_dict(), self.tokenizer)
            write_json(folder / PROVENANCE_FILE, {"format": FORMAT, "data": self.model.data})


def _entry_of_data(options: Options, material: Material) -> dict[str, Any]:
    """The entry "data" of `minilora.json`: see lora/provenance.py."""
    entry: dict[str, Any] = {
        "name": options.data,
        "sha256": sha256_of_data(options.data),
        "revision": revision_of_data(options.data),
        "records": material.own,
        "field": options.columns or None,
        "system": material.system,
        "split": material.split,
    }
    if material.task is not None:
        entry |= material.task.entry()
    entry |= {"context_template": material.template, "context": options.context}
    for key, source in (("path", options.data), ("context_path", options.context)):
        if source is not None and source not in BUILT_IN and not is_dataset(source):
            entry[key] = path_from(options.folder, source)
    return {name: value for name, value in entry.items() if value is not None}


def _set_up(options: Options, measure: bool, answers: bool) -> Job:
    """Load the base and the data, and refuse what does not fit, before anything is computed."""
    if options.report_to is not None and find_spec(options.report_to) is None:
        raise ValueError(f"report_to {options.report_to} needs its library: pip install {options.report_to}")
    if world().size > 1 and options.device != "cpu":
        raise ValueError(f"several ranks compute on the cpu alone: leave out mpiexec, or device {options.device}")
    model, tokenizer = load(options.base, options.quantized, options.recompute, options.device, dtype_of(options))
    if known_as(options.base) == "tiny":
        log.info(TOY)
    size = base_bytes(model)
    slow = options.method == "lora" and options.device == "cpu" and not options.bf16 and size > LARGE
    if slow and (faster := bfloat16.hint()):
        log.info(faster)
    if options.method == "full" and size > LARGE and (lr := options.learning_rate) >= HIGH:
        log.info(f"lr {lr:g} is high for full fine-tuning, which mostly takes a tenth of LoRA's (--lr {lr / 10:g})")
    material = prepare(
        options.data,
        tokenizer,
        field=options.columns,
        context=options.context,
        mix=options.mix,
        max_length=options.max_length,
        eval_records=options.eval_records,
        beta=options.beta if options.loss == "dpo" else None,
        schema=options.schema,
        stored=stored_tasks([Path(options.adapter or options.base)]),
    )
    if options.adapter is not None:
        for line in _warnings_of_adapter(Path(options.adapter), options.data, material, tokenizer):
            log.warning(line)
    if material.task is not None:
        options = options.for_task()
    if options.patience is not None and not material.validation_sets:
        raise ValueError(f"{options.data}: no records are held out for validation, so leave out patience")
    if not measure:
        material = replace(material, scored={}, asked={}, shown={}, checked=None)
    elif not answers:
        material = replace(material, asked={}, shown={}, checked=material.validated)
    material.refuse_what_is_longer(model.config.max_position_embeddings, options.data, tokenizer)
    program = program_memory(size) if options.device == "cpu" else None
    if program is not None and size > LARGE:  # for small models it is little
        program += added_memory(lambda: _use_libraries(model, material.train[: options.batch_size]))
    install = _installer(model, options)
    if options.lr is None and known_as(options.base) is None:
        options = options.on_base(usual_rate(model))
        log.info(f"learning rate {options.lr:g}, which follows from the size of the base's weights (--lr: another)")
    return Job(options, model, tokenizer, material, install, sha256_of(base_state(model)), program)


def _use_libraries(model: LanguageModel, examples: Sequence[Example]) -> None:
    """Compute as the job will: losses of a batch, and one token.

    What the libraries of matmuls hold from then on is a part of the program.
    """
    loss_without_grad(model, [sequence for example in examples for sequence in example.sequences])
    with no_grad():
        model(np.array([[examples[0].sequences[0].ids[0]]]))
    release_memory()


def _warnings_of_adapter(folder: Path, data: str, material: Material, tokenizer: Tokenizer) -> list[str]:
    """What to know of an adapter that is trained further, if it has seen what will measure it."""
    if is_same(data_of(folder), data):
        return warning_of_change(data, folder)
    records = material.asked.get("unseen", []) if material.checked is None else material.checked.records
    return warning_of_trained([(data, records, material.task)], folder, tokenizer)


def _installer(model: LanguageModel, options: Options) -> Callable[[], object]:
    """Read or plan what will be trained, and refuse what does not fit. Returns the function that puts it in place."""
    if options.method == "full":
        return lambda: model.requires_grad_(True)
    if options.adapter is not None:
        load_adapter(model, options.adapter, ADAPTER)
        if options.adapter_scale != 1:
            scale_adapter(model, ADAPTER, 1.0)  # raises now for an adapter that could not be scaled in the end
        return lambda: None
    config = options.lora_config()
    planned = plan_adapter(model, config, ADAPTER, options.seed)
    return lambda: install_adapter(model, config, ADAPTER, planned)


# -- train -------------------------------------------------------------------------------------------------------------


def _train(job: Job, trainer: Trainer, state: State, place: RunFolder) -> None:
    """Train, from the start or from the checkpoint, and save the result; also where training breaks off."""
    options, partial = job.options, place.partial
    rows, report = _files(job, trainer, state, place)
    begin_together(trainer)
    # A checkpoint of a whole model is three times its size: by default, only Ctrl-C writes one.
    usual = min(trainer.steps_per_epoch, OFTEN) if options.method == "lora" else math.inf

    def each_step(done: int) -> None:
        bar.update(text=f"loss={trainer.history.losses[-1]:.3f}, tokens/s={trainer.history.tokens_per_second:.0f}")
        rows.row(peak_memory() if options.device == "cpu" else None)
        if report is not None:
            report.log(values_of(trainer), step=done)
        interrupted = bool(signals)
        if interrupted or done % (options.save_every or usual) == 0:
            with _named_errors(done):
                checkpoint.save(partial, state, trainer, job.save, ADAPTER)
        if interrupted:
            raise KeyboardInterrupt

    def save_best() -> None:
        with _named_errors(trainer.done):
            checkpoint.save_best(partial, trainer)

    try:
        with noted_interrupts() as signals, progress("training", trainer.steps, "step", trainer.done) as bar:
            trainer.run(job.material.validation_sets, each_step, save_best, options.adapter_scale)
    except KeyboardInterrupt:
        log.info(f"stopped after {trainer.done} of {trainer.steps} steps")
        raise
    except TrainingError:
        _save_good_weights(job, trainer, partial)
        raise
    finally:
        if report is not None:
            report.finish()
    _save_result(job, trainer, state, partial)


def _files(job: Job, trainer: Trainer, state: State, place: RunFolder) -> tuple[Log, Any]:
    """Begin or restore the files of a run; return its log, and its report if one is asked for."""
    partial, options = place.partial, job.options
    if options.resume:
        checkpoint.restore(partial, state, trainer, ADAPTER)
    else:
        write_bytes(partial / OPTIONS_FILE, options.text().encode())
    place.began = True
    rows = Log(partial / LOG_FILE, state.history)
    if options.report_to is None:
        return rows, None
    config = _in_effect(job.model, options)
    return rows, reporter_to(options.report_to, partial, options.folder.name, config, trainer.done)


def values_of(trainer: Trainer) -> dict[str, float]:
    """The values of the last step, under the names of Hugging Face's Trainer: train/loss, train/grad_norm before
    clipping, train/learning_rate, train/epoch; after a validation eval/loss, and eval/NAME_loss of each set.
    """
    history, step = trainer.history, trainer.done
    values = {
        "train/loss": history.losses[-1],
        "train/grad_norm": history.norms[-1],
        "train/learning_rate": history.rates[-1],
        "train/epoch": step / trainer.steps_per_epoch,
    }
    sets = {"loss": history.validation} | {f"{name}_loss": each for name, each in history.validation_sets.items()}
    return values | {f"eval/{name}": each[-1][1] for name, each in sets.items() if each and each[-1][0] == step}


@contextmanager
def _named_errors(step: int) -> Iterator[None]:
    """In this block an OSError gets a message that names the step whose weights are not saved."""
    try:
        yield
    except OSError as error:
        raise OSError(f"the weights of step {step} cannot be saved: {error}") from error


def _save_result(job: Job, trainer: Trainer, state: State, partial: Path) -> None:
    """Write the weights that are the result, and in another folder the last ones, where those are others.

    The model has the weights of the result then.
    """
    kept = state.history.kept(job.options.keep)
    if kept["step"] != trainer.done:
        job.scale()
        job.save(partial / LAST)
        state.last_loss = {name: mean_loss(job.model, samples) for name, samples in job.material.scored.items()}
        checkpoint.read_best(partial, kept["step"], trainer.parameters)
    job.scale()
    job.save(partial)
    state.trained = True
    checkpoint.save_trained(partial, state)


def _save_good_weights(job: Job, trainer: Trainer, partial: Path) -> None:
    """After a loss that was not finite: write the best weights, or the last finite ones, and no checkpoint.

    A checkpoint would lead to the same error again.
    """
    kept = trainer.history.kept(job.options.keep)
    if kept["step"] != trainer.done:
        checkpoint.read_best(partial, kept["step"], trainer.parameters)
    finite = all(bool(np.isfinite(float(p.data.sum()))) for _, p in job.model.named_parameters())
    if kept["step"] and (job.options.method == "lora" or finite):
        log.info(f"stopped after {trainer.done} of {trainer.steps} steps")
        job.scale()
        job.save(partial)
    remove_folder(partial / CHECKPOINT)
    checkpoint.forget_best(partial)


# -- metrics -----------------------------------------------------------------------------------------------------------


def _memory(job: Job) -> dict[str, Any]:
    """Predicted for a training step, and measured for the process, where it computes on the CPU."""
    measured = peak_memory() if job.options.device == "cpu" else None
    held = {phase: peak for phase, peak in job.peaks.items() if peak and measured and peak >= SAME * measured}
    reached = next(iter(held), "checking the result")
    return {"measured": measured, "reached": reached if measured else None, **job.predicted}


def _in_effect(model: LanguageModel, options: Options) -> dict[str, Any]:
    """The options that took effect: of an adapter that was trained before, its own."""
    values = asdict(options.in_effect()) | {"out": str(options.folder)}
    if options.adapter is not None:
        values |= {name: value for name, value in asdict(model.adapters[ADAPTER].config).items() if name in values}
    return values

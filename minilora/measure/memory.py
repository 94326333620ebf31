"""The memory of a training step: predicted from shapes, then measured in its own process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import numpy as np

from ..engine import bfloat16
from ..engine.parallel import cores
from ..engine.tensor import no_grad
from ..files.stored import stays_packed
from ..lora.adapters import add_adapter
from ..lora.config import LoraConfig
from ..models.folder import read_config
from ..models.gguf import GGUF
from ..models.load import dtype_of, load, locate
from ..models.rounded import rounded_bytes, rounded_to
from ..nn.llama import Config
from ..nn.optim import AdamW
from ..nn.parts import Batch
from ..nn.step import divided, training_step
from ..options import BASE, BF16, PACKED, RECOMPUTE, check, option
from ..progress import progress
from .ledger import ledger, peak
from .predict import FLOAT, Memory, Step, alive_at_once, base_parameters, predict_memory
from .process import apart, peak_memory, program_memory

STEPS = 2  # the first one writes the optimizer state for the first time


@dataclass(frozen=True)
class Job:
    """A training step on random tokens, all of which are scored."""

    base: str = option("smollm2", BASE, path=True)
    method: str = option("lora", "what is trained", choices=("lora", "full"))
    r: int = option(8, "rank of the update", only={"method": "lora"}, least=1)
    target_modules: str | Sequence[str] = option(
        "all-linear", "q_proj v_proj ..., or all-linear", metavar="NAME", only={"method": "lora"}
    )
    batch_size: int = option(4, "sequences of random tokens", least=1)
    length: int = option(128, "tokens per sequence", least=2)
    quantized: bool | str = option(False, **PACKED, only={"method": "lora"})
    bf16: bool = option(False, BF16, only={"method": "lora"})
    recompute: bool = option(False, RECOMPUTE)

    def __post_init__(self):
        check(self, "quantized", "bf16")

    @property
    def targets(self) -> Sequence[str] | None:
        """The names of the adapted modules; None for all of a block."""
        if self.target_modules == "all-linear":
            return None
        return (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)

    @property
    def rank(self) -> int | None:
        """The adapter's rank; None for full fine-tuning."""
        return self.r if self.method == "lora" else None

    def batch(self, config: Config) -> Batch:
        """Random token ids (batch_size, length), all scored. Raises ValueError if the model cannot read as many."""
        if self.length > config.max_position_embeddings:
            raise ValueError(
                f"{self.length} tokens are more than the {config.max_position_embeddings} the model can read: "
                "give a lower length"
            )
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (self.batch_size, self.length))
        return Batch(ids, ids)


def report(job: Job) -> dict[str, Any]:
    """Predict, measure in its own process, and return both: what `minilora memory --json` prints.

    Raises ValueError for what cannot be predicted, RuntimeError with the reason when the measured step fails.
    """
    step = step_of(job)  # refuses what cannot be predicted
    answer = apart(measure_step, asdict(job))
    measured = Memory(**answer["memory"])
    return {
        "job": asdict(job),
        "threads": cores(),
        "rounds": step.rounds,
        "predicted": asdict(predict_memory(replace(step, program=measured.program))),
        "measured": asdict(measured),
        "process_peak": answer["process_peak"],
    }


def step_of(job: Job) -> Step:
    """The step, from the header of the model's file alone. Raises ValueError for one that the model cannot take."""
    dtype = dtype_of(job)
    config, base_bytes = shape_of(job.base, job.quantized, dtype)
    as_it_is = dtype == "bfloat16" and not job.quantized and bfloat16.why_not() is None
    unpacks = base_bytes is not None and base_bytes < FLOAT * base_parameters(config) and not as_it_is
    known: dict[str, Any] = {"rank": job.rank, "targets": job.targets, "recompute": job.recompute}
    return Step.of(config, job.batch(config), base_bytes=base_bytes, unpacks=unpacks, **known)


def shape_of(base: str, quantized: bool | str = False, dtype: str = "float32") -> tuple[Config, int | None]:
    """A base's shape, from its file's header, and the bytes of its weights if they are not float32 (else None)."""
    kind, path = rounded_to(quantized), locate(base)
    if dtype == "bfloat16" and not quantized and bfloat16.why_not() is None:
        kind = "BF16"
    if kind is not None:
        config = read_config(path) if path.is_dir() else GGUF(path).config()
        try:
            return config, rounded_bytes(config, kind)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if path.is_dir():
        if quantized:
            what = "a Hugging Face folder holds no quantised matrices"
            raise ValueError(f"{path}: {what}: leave out --quantized, or quantise them: --quantized nf4")
        return read_config(path), None
    file = GGUF(path)
    packed = [tensor for tensor in file.tensors.values() if quantized and stays_packed(tensor)]
    if not packed:
        return file.config(), None
    size = sum(prod(tensor.shape) for tensor in file.tensors.values()) - sum(prod(tensor.shape) for tensor in packed)
    return file.config(), FLOAT * size + sum(tensor.nbytes for tensor in packed)  # what does not stay packed is float32


def measure_step(given: dict[str, Any]) -> dict[str, Any]:
    """Take the step of a Job, and return the process's peak and the ledger: for a process that does nothing else.

    Gradients are measured after the backward pass, activations before it, of the micro-batches that exist at the same
    time. Scratch is what the step's own peak has beyond both.
    """
    job = Job(**given)
    with progress("memory", STEPS + 3, "stage") as bar:
        bar.update(0, text="loading")
        model, _ = load(job.base, job.quantized, job.recompute, dtype=dtype_of(job))
        batch = job.batch(model.config)
        few = batch.input_ids[:1, :16]
        with no_grad():
            model.loss(few, few)  # gives the matrix library its work space, which it keeps
        program = program_memory(sum(parameter.data.nbytes for _, parameter in model.named_parameters()))
        if job.rank:
            add_adapter(model, LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules=job.target_modules))
        optimizer = AdamW(model.trainable_parameters(), lr=1e-4)

        def step() -> None:
            training_step(model, optimizer, batch)

        for i in range(STEPS):
            bar.update(text=f"step {i + 1}")
            step()
        process_peak = peak_memory()  # before anything else is looked at
        bar.update(text="step under watch")
        held = ledger(model, optimizer)
        optimizer.zero_grad()
        at_most = peak(step)
        bar.update(text="graph")
        kept = Counter[str]()
        for each in alive_at_once(divided(model, batch))[0]:
            kept.update(ledger(model, None, model.loss(each.input_ids, each.labels)).by_operation)
        bar.update()
    memory = replace(
        held,
        program=program or 0,
        activations=kept.total(),
        scratch=max(0, at_most - held.gradients - kept.total()),
        by_operation=dict(kept.most_common()),
    )
    return {"memory": asdict(memory), "process_peak": process_peak}

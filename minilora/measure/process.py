"""`minilora memory`: a training step predicted from shapes, then taken and measured, side by side.

The measuring process, `python -m minilora.measure.process JOB`, does nothing else, so its peak is the step's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import bfloat16
from ..engine.parallel import cores
from ..engine.tensor import no_grad
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
from ..options import BASE, BF16, PACKED, RECOMPUTE, option
from .ledger import ledger, peak
from .predict import FLOAT, SHAPES, Memory, Step, alive_at_once, check_targets, predict_memory

STEPS = 2  # in the first, Adam's moments are written for the first time
STAGES = ("loaded", *(f"step {i + 1}" for i in range(STEPS)), "watched step", "graph")  # of the measurement


@dataclass(frozen=True)
class Job:
    """The training step in question. Its tokens are random, and all are scored."""

    base: str = option("smollm2", BASE)
    method: str = option("lora", "what is trained", choices=("lora", "full"))
    r: int = option(8, "rank of the update", only={"method": "lora"})
    target_modules: str | Sequence[str] = option(
        "all-linear", "q_proj v_proj ..., or all-linear", metavar="NAME", only={"method": "lora"}
    )
    batch_size: int = option(4, "sequences of random tokens")
    length: int = option(128, "tokens per sequence")
    quantized: bool | str = option(False, **PACKED, only={"method": "lora"})
    bf16: bool = option(False, BF16, only={"method": "lora"})
    recompute: bool = option(False, RECOMPUTE)

    def __post_init__(self):
        if self.method not in ("lora", "full"):
            raise ValueError(f"method must be 'lora' or 'full', got {self.method!r}")
        if self.method == "full" and self.quantized:
            raise ValueError("packed weights cannot be trained: leave out --quantized, or use --method lora")
        if self.method == "full" and self.bf16:
            raise ValueError("weights in bfloat16 cannot be trained: leave out --bf16, or use --method lora")
        for name, least in (("r", 1), ("batch_size", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        check_targets(self.targets)

    @property
    def targets(self) -> Sequence[str]:
        """The names of the adapted modules."""
        if self.target_modules == "all-linear":
            return tuple(SHAPES)
        return (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)

    @property
    def rank(self) -> int | None:
        """The adapter's rank; None for full fine-tuning."""
        return self.r if self.method == "lora" else None

    def batch(self, config: Config) -> Batch:
        """Random token ids (batch_size, length), all scored. Raises ValueError when the model cannot see as many."""
        if self.length > config.max_position_embeddings:
            raise ValueError(f"{self.length} tokens are more than the {config.max_position_embeddings} it can see")
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (self.batch_size, self.length))
        return Batch(ids, ids)


def report(job: Job, done: Callable[[str], object] = lambda stage: None) -> dict[str, Any]:
    """Predict, measure in a process of its own, and return both: what `minilora memory --json` prints.

    done: called with the name of each of STAGES when it is over. Raises ValueError for what cannot be predicted,
    RuntimeError with the reason when the measured step fails.
    """
    step = step_of(job)
    answer = _measured_apart(job, done)
    measured = Memory(**answer["memory"])
    return {
        "job": asdict(job),
        "threads": cores(),
        "rounds": step.rounds,
        "predicted": asdict(predict_memory(replace(step, program=measured.program))),
        "measured": asdict(measured),
        "process_peak": answer["process_peak"],
    }


def _measured_apart(job: Job, done: Callable[[str], object]) -> dict[str, Any]:
    """What `measure` returns in a process that does nothing else. It says each stage on a line, and the result last."""
    command = [sys.executable, "-m", __name__, json.dumps(asdict(job))]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
            assert process.stdout
            answer: Any = None
            for line in process.stdout:
                answer = json.loads(line)
                if isinstance(answer, str):
                    done(answer)
        if process.returncode:
            stderr.seek(0)
            lines = stderr.read().strip().splitlines() or [f"its process ended with status {process.returncode}"]
            raise RuntimeError(f"the step could not be measured: {lines[-1]}")
    return answer


def step_of(job: Job) -> Step:
    """The step, as the header of the model's file describes it. Raises ValueError for one that no model can take."""
    config, base_bytes = shape_of(job.base, job.quantized, job.bf16 and bfloat16.why_not() is None)
    return Step.of(
        config,
        job.batch(config),
        rank=job.rank,
        targets=job.targets,
        base_bytes=base_bytes,
        recompute=job.recompute,
    )


def shape_of(base: str, quantized: bool | str = False, bf16: bool = False) -> tuple[Config, int | None]:
    """A base's shape, from its file's header, and the bytes of its weights where they are not float32 (else None)."""
    kind, path = rounded_to(quantized), locate(base)
    if bf16 and not quantized:
        kind = "BF16"
    if kind is not None:
        config = read_config(path) if path.is_dir() else GGUF(path).config()
        try:
            return config, rounded_bytes(config, kind)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if path.is_dir():
        if quantized:
            what = "a Hugging Face folder holds no packed matrices"
            raise ValueError(f"{path}: {what}: leave out --quantized, or round them: --quantized nf4")
        return read_config(path), None
    file = GGUF(path)
    if not quantized:
        return file.config(), None
    packed = {name: tensor.tensor_type.name.startswith("Q") for name, tensor in file.tensors.items()}
    sizes = (int(t.n_bytes) if packed[name] else FLOAT * int(t.n_elements) for name, t in file.tensors.items())
    return file.config(), sum(sizes)


def measure(job: Job, done: Callable[[str], object] = lambda stage: None) -> dict[str, Any]:
    """Take the step, and return the process's peak and the ledger: for a process that does nothing else.

    gradients as they are after the way back, activations as they are before it, of the micro-batches that are alive
    together; scratch is what the step's own peak has beyond both.
    """
    model, _ = load(job.base, job.quantized, job.recompute, dtype=dtype_of(job.bf16))
    done("loaded")
    batch = job.batch(model.config)
    few = batch.input_ids[:1, :16]
    with no_grad():
        model.loss(few, few)  # gives the matrix library its work space, which it keeps
    program = program_memory(sum(parameter.data.nbytes for _, parameter in model.named_parameters()))
    if job.rank:
        add_adapter(model, LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules=list(job.targets)))
    optimizer = AdamW(model.trainable_parameters(), lr=1e-4)

    def step() -> None:
        training_step(model, optimizer, batch)

    for i in range(STEPS):
        step()
        done(f"step {i + 1}")
    process_peak = peak_memory()  # before anything else is looked at
    held = ledger(model, optimizer)
    optimizer.zero_grad()
    at_most = peak(step)
    done("watched step")
    kept = Counter[str]()
    for each in alive_at_once(divided(model, batch))[0]:
        kept.update(ledger(model, None, model.loss(each.input_ids, each.labels)).by_operation)
    done("graph")
    memory = replace(
        held,
        program=program or 0,
        activations=kept.total(),
        scratch=max(0, at_most - held.gradients - kept.total()),
        by_operation=dict(kept.most_common()),
    )
    return {"memory": asdict(memory), "process_peak": process_peak}


# -- the process -------------------------------------------------------------------------------------------------------


def program_memory(arrays: int) -> int | None:
    """What Python, libraries and tokenizer take: what the process holds just now beyond its own arrays' bytes.

    Where the system tells only the peak so far (macOS), that is taken. None where it tells nothing.
    """
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") - arrays
    peak = peak_memory()
    return None if peak is None else peak - arrays


def peak_memory() -> int | None:
    """The most memory this process has held so far, in bytes; None where the system does not tell."""
    status = Path("/proc/self/status")  # Linux, where getrusage may tell the peak of the program that started this one
    if status.is_file() and (line := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(line[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# -- for people --------------------------------------------------------------------------------------------------------

NOTES = {
    "program": "Python, libraries; measured",
    "weights": "of the base",
    "adapter": "A and B",
    "gradients": "one for each number trained",
    "moments": "two more, for Adam",
    "activations": "kept for the way back, by",
    "scratch": "for a moment: logits and such",
}


def table(result: dict[str, Any]) -> str:
    """What `report` returned, in megabytes, owner by owner, in 80 columns."""
    job, peak_bytes = Job(**result["job"]), result["process_peak"]
    predicted, measured = Memory(**result["predicted"]), Memory(**result["measured"])
    what = "all parameters" if job.rank is None else f"LoRA of rank {job.r} on {', '.join(job.targets)}"
    extras = [f"quantized {job.quantized}" if isinstance(job.quantized, str) else "quantized"] * bool(job.quantized)
    extras += ["bf16"] * job.bf16 + ["recompute"] * job.recompute
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    lines = [
        f"What a training step of {job.base} holds at its peak, in MB (millions of bytes):",
        *textwrap.wrap("; ".join([what, f"{job.batch_size} x {job.length} tokens", threads, *extras]), 80),
        "",
        f"{'':<26}{'predicted':>11}{'measured':>11}",
    ]
    for owner, note in NOTES.items():
        mine, real = getattr(predicted, owner), getattr(measured, owner)
        if mine or real:
            lines.append(f"{owner:<26}{_mb(mine)}{_mb(real)}   {note}")
        if owner == "activations":
            names = sorted(measured.by_operation, key=lambda name: -measured.by_operation[name])
            lines += [
                f"    {name:<22}{_mb(predicted.by_operation.get(name, 0))}{_mb(measured.by_operation[name])}"
                for name in names
            ]
    # In full fine-tuning in one round, gradients grow while activations go; each was measured where it is whole.
    apart = job.rank is None and result["rounds"] == 1
    together = f"{'':>11}   not all is held together" if apart else _mb(measured.total)
    lines += [f"{'':<26}{'-' * 22:>22}", f"{'together':<26}{_mb(predicted.total)}{together}"]
    if peak_bytes is None:
        return "\n".join([*lines, "The peak of the process is not told by this system."])
    error = 100 * (predicted.total / peak_bytes - 1)
    lines.append(f"{'peak of the process':<26}{'':>11}{_mb(peak_bytes)}   prediction {error:+.1f} %")
    return "\n".join(lines)


def _mb(size: int) -> str:
    return f"{size / 1e6:>11,.{1 if size < 99.95e6 else 0}f}"


if __name__ == "__main__":
    try:
        job = Job(**json.loads(sys.argv[1]))
        print(json.dumps(measure(job, lambda stage: print(json.dumps(stage), flush=True))))
    except (ValueError, OSError, RuntimeError, MemoryError) as reason:
        sys.exit(str(reason) or type(reason).__name__)

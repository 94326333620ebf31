"""Checkpoints: all that the next step of a run depends on, so that a run which was stopped goes on as if never stopped.

    runs/legal.partial/checkpoint/
      adapter_config.json ...     the adapter in PEFT's format, to be talked to (or model.safetensors and so on)
      moments_m, moments_v        AdamW's moments, as .safetensors
      state.json                  the step, dropout's counts, the history, and what the run was told and has measured

The data's order needs no more than seed and step. The folder is replaced whole: a process killed while it writes leaves
the checkpoint before. Of a run that is trained and not yet measured, only state.json is left. The best weights so far
stand beside it, in best-<step>.safetensors: on the disk, since a whole model may not have room in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..engine.backend import Array, array_module
from ..files.disk import ModelFileError, read_json, replacing_folder, write_json
from ..files.tensors import each_tensor, write_tensors
from ..lora.adapters import adapter_weights
from ..lora.peft import WEIGHTS_FILE, peft_name
from ..nn.llama import Llama
from ..nn.module import Parameter
from ..nn.optim import AdamW
from ..version import __version__
from .loop import History, Trainer
from .material import Measured
from .options import Options
from .run_folder import CHECKPOINT, MODEL_FILE, STATE_FILE

FORMAT = 1  # of state.json and what belongs to it: another number is another format
ANYHOW = ("out", "overwrite", "resume", "save_every")  # options that may differ: they do not change what is learned


@dataclass
class State:
    """Where a run stands, beside its weights.

    told: its options. base, data: fingerprints. before: what the model knew before the first step. trained: whether
    only the measurement afterwards is left to do. last_loss: by set, of the adapter of the last step, known then.
    """

    told: dict[str, Any]
    base: str
    data: str
    before: Measured
    history: History = field(default_factory=History)
    trained: bool = False
    last_loss: dict[str, float] = field(default_factory=dict)


def told(options: Options) -> dict[str, Any]:
    """What decides a run, as JSON has it."""
    values = asdict(options.in_effect())
    return {name: value for name, value in values.items() if name not in ANYHOW}


# -- writing -----------------------------------------------------------------------------------------------------------


def save(partial: Path, state: State, trainer: Trainer, save_weights: Callable[[Path], object], adapter: str) -> None:
    """Write the checkpoint of a run whose results gather in `partial`. save_weights: writes them into a folder."""
    with replacing_folder(partial / CHECKPOINT) as folder:
        save_weights(folder)
        optimizer = _adamw(trainer)
        for name, arrays in (("m", optimizer.m), ("v", optimizer.v)):
            write_tensors(folder / f"moments_{name}.safetensors", dict(zip(trainer.parameters, arrays, strict=True)))
        dropout = {path: layer.state() for path, layer in _dropouts(trainer.model, adapter).items()}
        _write_state(folder, state, {"step": trainer.done, "dropout": dropout})
    forget_best(partial, but=state.history.best)


def save_trained(partial: Path, state: State) -> None:
    """Write the state of a run whose adapter is where it will stay: weights and moments are no longer needed."""
    with replacing_folder(partial / CHECKPOINT) as folder:
        _write_state(folder, state, {"step": len(state.history.losses)})
    forget_best(partial)


def _write_state(folder: Path, state: State, more: Mapping[str, Any]) -> None:
    write_json(folder / STATE_FILE, {"format": FORMAT, "minilora": __version__, **asdict(state), **more}, indent=1)


# -- the best so far ---------------------------------------------------------------------------------------------------


def save_best(partial: Path, trainer: Trainer) -> None:
    """Write what is trained as it is now: the best so far. The one before is left to `forget_best`."""
    write_tensors(_best(partial, trainer.done), {name: p.data for name, p in trainer.parameters.items()})


def read_best(partial: Path, step: int, parameters: Mapping[str, Parameter]) -> None:
    """Put what was best back into the model."""
    _fill(_best(partial, step), {name: p.data for name, p in parameters.items()})


def forget_best(partial: Path, but: tuple[int, float] | None = None) -> None:
    """Remove what was the best once, but for that of one (step, loss)."""
    for path in partial.glob("best-*.safetensors"):
        if but is None or path != _best(partial, but[0]):
            path.unlink()


def _best(partial: Path, step: int) -> Path:
    return partial / f"best-{step}.safetensors"


# -- reading -----------------------------------------------------------------------------------------------------------


def read_state(partial: Path) -> State:
    """The state of the run that left its checkpoint in `partial`.

    Raises ValueError when there is none, or one of another format.
    """
    path = partial / CHECKPOINT / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{partial}: no checkpoint to go on from; leave out --resume to start from the beginning")
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{path}: a checkpoint of minilora {record.get('minilora')}, of another format "
            f"({record.get('format')}) than that of {__version__} ({FORMAT}): --overwrite starts anew"
        )
    try:
        history = History(**record["history"])
        history.validation = [(step, loss) for step, loss in history.validation]
        history.validation_sets = {
            name: [(step, loss) for step, loss in losses] for name, losses in history.validation_sets.items()
        }
        before = Measured(**record["before"])
        names = ("told", "base", "data", "trained", "last_loss")
        return State(history=history, before=before, **{name: record[name] for name in names})
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: not the state of a run ({error})") from error


def refuse_other(state: State, options: Options) -> None:
    """Raise ValueError that names each option which is not what the run was told when it began."""
    import json

    now = json.loads(json.dumps(told(options)))
    names = dict.fromkeys([*state.told, *now])
    if other := [name for name in names if state.told.get(name) != now.get(name)]:
        told_then = "; ".join(f"{name} was {state.told.get(name)}, is {now.get(name)}" for name in other)
        raise ValueError(f"the run in {options.folder} was told something else: {told_then}; --overwrite starts anew")


def refuse_others_data(state: State, base: str, data: str, options: Options) -> None:
    """Raise ValueError when base or data are not those with which the run began."""
    for what, name, then, now in (("base", options.base, state.base, base), ("data", options.data, state.data, data)):
        if then != now:
            raise ValueError(
                f"the run in {options.folder} began with another {what}: sha256 of {name} was {then[:16]}, "
                f"is {now[:16]}; --overwrite starts anew"
            )


def restore(partial: Path, state: State, trainer: Trainer, adapter: str) -> None:
    """Put everything where it was when the checkpoint was written. Raises ModelFileError for one that is damaged."""
    folder = partial / CHECKPOINT
    record = read_json(folder / STATE_FILE)
    read_weights(folder, trainer.parameters)
    optimizer = _adamw(trainer)
    for name, arrays in (("m", optimizer.m), ("v", optimizer.v)):
        _fill(folder / f"moments_{name}.safetensors", dict(zip(trainer.parameters, arrays, strict=True)))
    optimizer.steps = record["step"]
    try:
        for path, layer in _dropouts(trainer.model, adapter).items():
            layer.restore(record["dropout"][path])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(f"{folder / STATE_FILE}: dropout is not that of this run ({error})") from error
    trainer.history = state.history
    trainer.go_to(record["step"])


def read_weights(folder: Path, parameters: Mapping[str, Parameter]) -> None:
    """Read what is trained from the files of an adapter's or a model's folder into these parameters of a model."""
    if (folder / WEIGHTS_FILE).is_file():
        _fill(folder / WEIGHTS_FILE, {peft_name(_without_adapter(name)): p.data for name, p in parameters.items()})
    else:
        _fill(folder / MODEL_FILE, {name: p.data for name, p in parameters.items()})


def _fill(path: Path, places: dict[str, Array]) -> None:
    """Copy a file's tensors into these arrays, one at a time.

    Of PiSSA's A and B, which are saved with those that they began as behind them, it is the first part.
    """
    for key, found in each_tensor(path):
        place = places.pop(key, None)
        if (
            place is None
            or place.ndim != found.ndim
            or any(n > m for n, m in zip(place.shape, found.shape, strict=True))
        ):
            raise ModelFileError(f"{path}: {key} {found.shape} is nothing that this run trains")
        place[...] = array_module(place).asarray(found[tuple(slice(n) for n in place.shape)])
    if places:
        raise ModelFileError(f"{path}: {next(iter(places))} is missing")


def _without_adapter(name: str) -> str:
    """model.layers.0.q_proj.adapters.default.lora_A -> model.layers.0.q_proj.lora_A"""
    module, _, rest = name.partition(".adapters.")
    return f"{module}.{rest.partition('.')[2]}"


def _dropouts(model: Llama, adapter: str) -> dict[str, Any]:
    own = adapter_weights(model, adapter) if adapter in model.adapters else {}
    return {path: weights.dropout for path, weights in own.items() if weights.dropout is not None}


def _adamw(trainer: Trainer) -> AdamW:
    assert isinstance(trainer.optimizer, AdamW)  # the job trains with no other
    return trainer.optimizer

"""Checkpoints: everything that the next step of a run depends on, so that a stopped run continues as if uninterrupted.

    runs/legal.partial/checkpoint/
      adapter_config.json ...     the adapter in PEFT's format, ready for chat (or model.safetensors and so on)
      moments_m, moments_v        AdamW's moments, as .safetensors
      state.json                  the step, the state of dropout, the history, the options, the losses before training

The order of the data follows from seed and step. The folder is replaced whole: a process killed while it writes leaves
the previous checkpoint. Of a run that is trained but not yet measured, only state.json is left. The best weights so far
are in best-<step>.safetensors next to it: on disk, since memory may not have room for a whole model twice.
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
from ..lora.peft import WEIGHTS_FILE, peft_parameters
from ..nn.families import FAMILIES
from ..nn.language_model import LanguageModel
from ..nn.module import Parameter
from ..nn.optim import AdamW
from ..options import refuse_other_settings
from ..version import __version__
from .loop import History, Trainer
from .material import Measured
from .run_folder import CHECKPOINT, MODEL_FILE, STATE_FILE

FORMAT = 3  # of state.json and the files next to it


@dataclass
class State:
    """The state of a run, apart from its weights.

    options: those that decide its result. base, data: fingerprints. before: losses and answers before the first
    step. trained: whether only the measurement afterwards is left to do. last_loss: by set, of the last step's weights
    where others are the result.
    """

    options: dict[str, Any]
    base: str
    data: str
    before: Measured
    history: History = field(default_factory=History)
    trained: bool = False
    last_loss: dict[str, float] = field(default_factory=dict)


# -- writing -----------------------------------------------------------------------------------------------------------


def save(partial: Path, state: State, trainer: Trainer, save_weights: Callable[[Path], object], adapter: str) -> None:
    """Write the checkpoint of a run.

    partial: the folder where the results of the run gather.
    state, trainer: everything that the next step depends on.
    save_weights: writes the weights into a folder.
    adapter: the name of the adapter in the model.
    """
    with replacing_folder(partial / CHECKPOINT) as folder:
        save_weights(folder)
        for name, moments in _moments(trainer).items():
            write_tensors(folder / name, moments)
        dropout = {path: layer.state() for path, layer in _dropouts(trainer.model, adapter).items()}
        _write_state(folder, state, {"step": trainer.done, "dropout": dropout})
    forget_best(partial, but=state.history.best)


def save_trained(partial: Path, state: State) -> None:
    """Write the state of a run whose weights are in their final place: a checkpoint of them is no longer needed."""
    with replacing_folder(partial / CHECKPOINT) as folder:
        _write_state(folder, state, {"step": len(state.history.losses)})
    forget_best(partial)


def _write_state(folder: Path, state: State, more: Mapping[str, Any]) -> None:
    write_json(folder / STATE_FILE, {"format": FORMAT, "minilora": __version__, **asdict(state), **more}, indent=1)


# -- the best so far ---------------------------------------------------------------------------------------------------


def save_best(partial: Path, trainer: Trainer) -> None:
    """Write the trainable parameters as the best so far. `forget_best` removes the previous ones."""
    write_tensors(_best(partial, trainer.done), {name: p.data for name, p in trainer.parameters.items()})


def read_best(partial: Path, step: int, parameters: Mapping[str, Parameter]) -> None:
    """Read the best weights, those of this step, into the model."""
    _fill(_best(partial, step), {name: p.data for name, p in parameters.items()})


def forget_best(partial: Path, but: tuple[int, float] | None = None) -> None:
    """Remove the files of best weights, except those of one (step, loss)."""
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
        other = "give the --out of the run that was interrupted, or leave out --resume to start from the beginning"
        raise ValueError(f"{partial}: there is no checkpoint to resume; {other}")
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{path}: a checkpoint of minilora {record.get('minilora')} in format {record.get('format')}; minilora "
            f"{__version__} reads format {FORMAT}: --overwrite starts again"
        )
    try:
        history = History(**record["history"])
        history.validation = [(step, loss) for step, loss in history.validation]
        by_set = history.validation_sets.items()
        history.validation_sets = {name: [(step, loss) for step, loss in losses] for name, losses in by_set}
        before = Measured(**record["before"])
        names = ("options", "base", "data", "trained", "last_loss")
        return State(history=history, before=before, **{name: record[name] for name in names})
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: not the state of a run ({error})") from error


def refuse_other(state: State, folder: Path, **now: Any) -> None:
    """Raise ValueError when the run in `folder` has another value of one of State's fields: options, base, data."""
    for name, value in now.items():
        then = getattr(state, name)
        if name != "options":
            then, value = {f"sha256 of {name}": then}, {f"sha256 of {name}": value}
        refuse_other_settings(f"the run in {folder}", then, value, "--overwrite starts again")


def restore(partial: Path, state: State, trainer: Trainer, adapter: str) -> None:
    """Restore weights, optimizer state, dropout and history. Raises ModelFileError for a damaged checkpoint."""
    folder = partial / CHECKPOINT
    record = read_json(folder / STATE_FILE)
    read_weights(folder, trainer.model, adapter)
    for name, moments in _moments(trainer).items():
        _fill(folder / name, moments)
    _adamw(trainer).steps = [record["step"]] * len(trainer.parameters)
    try:
        for path, layer in _dropouts(trainer.model, adapter).items():
            layer.restore(record["dropout"][path])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(f"{folder / STATE_FILE}: dropout is not that of this run ({error})") from error
    trainer.history = state.history
    trainer.go_to(record["step"])


def read_weights(folder: Path, model: LanguageModel, adapter: str) -> None:
    """Read the files of an adapter's or a model's folder into the adapter, or into the trainable parameters."""
    if (folder / WEIGHTS_FILE).is_file():
        own = peft_parameters(adapter_weights(model, adapter))
        _fill(folder / WEIGHTS_FILE, {name: p.data for name, p in own.items()})
    else:
        trained = {name: p.data for name, p in model.trainable_parameters().items()}
        _fill(folder / MODEL_FILE, FAMILIES[model.config.model_type].to_hugging_face(trained))  # views


def _fill(path: Path, places: dict[str, Array]) -> None:
    """Copy a file's tensors into these arrays, one at a time.

    PiSSA's A and B are saved with their initial values appended: the first part is read.
    """
    for key, found in each_tensor(path):
        place = places.pop(key, None)
        fits = place is not None and place.ndim == found.ndim
        if not fits or any(n > m for n, m in zip(place.shape, found.shape, strict=True)):
            raise ModelFileError(f"{path}: {key} {found.shape} does not fit the trainable parameters of this run")
        place[...] = array_module(place).asarray(found[tuple(slice(n) for n in place.shape)])
    if places:
        raise ModelFileError(f"{path}: {next(iter(places))} is missing")


def _dropouts(model: LanguageModel, adapter: str) -> dict[str, Any]:
    own = adapter_weights(model, adapter) if adapter in model.adapters else {}
    return {path: weights.dropout for path, weights in own.items() if weights.dropout is not None}


def _moments(trainer: Trainer) -> dict[str, dict[str, Array]]:
    """AdamW's moments by file and by parameter."""
    files = {"moments_m.safetensors": _adamw(trainer).m, "moments_v.safetensors": _adamw(trainer).v}
    return {file: dict(zip(trainer.parameters, arrays, strict=True)) for file, arrays in files.items()}


def _adamw(trainer: Trainer) -> AdamW:
    assert isinstance(trainer.optimizer, AdamW)  # the job trains with no other
    return trainer.optimizer

"""What training added to the weights of a base, kept in a file: one run for all who look at its update.

run = train_update("tiny", "legal", "lora", steps=60, lr=5e-3, seed=0, r=8)
updates = read_update(run["file"])                          # by module
updates["model.layers.0.self_attn.q_proj"].of()             # (B, A), the scale in B; or a matrix

The same settings find the same file again, as long as the code that decides the numbers is the same.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..data.records import read_records
from ..data.samples import encode_records
from ..data.splits import split_records
from ..engine.backend import dense, to_numpy
from ..files.disk import ModelFileError
from ..files.tensors import read_tensors, write_tensors
from ..lora.adapters import add_adapter, lora_modules
from ..lora.config import LoraConfig
from ..lora.layer import LoraWeights
from ..lora.spectra import Update, row_changes
from ..lora.variants import dora_delta, row_norms
from ..models.load import load
from ..nn.llama import Llama
from ..train.loop import fit
from .memo import code_sha256, keep, path_of, recall

METHODS = ("lora", "dora", "full")
KEPT = ("q_proj", "v_proj", "down_proj")  # all linear maps are trained; of full fine-tuning all would be 425 MB
LOOKS = 4  # at the changes of length and direction: three on the way and one at the end, as in DoRA's section 3.2
ADAPTER = "default"

# The runs that claims share. On tiny they are for a look in seconds: few steps, and so large ones.
SHARED: dict[str, dict[str, Any]] = {
    "smollm2": {"data": "legal", "steps": 40, "batch_size": 8},
    "tiny": {"data": "legal", "steps": 16, "batch_size": 4},
}
RATES = {"smollm2": {"lora": 2e-3, "dora": 2e-3, "full": 2e-4}, "tiny": {"lora": 2e-2, "dora": 2e-2, "full": 2e-3}}


@dataclass(frozen=True)
class Kept:
    """What is kept of one module: of full fine-tuning `delta` (m, n); of LoRA and DoRA `lora_B` (m, r), the scale in
    it, and `lora_A` (r, n); of DoRA the learned lengths of the rows, `magnitude` (m), as well.
    """

    delta: np.ndarray | None = None
    lora_A: np.ndarray | None = None
    lora_B: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    def of(self, w: np.ndarray | None = None) -> Update:
        """The update as `lora/spectra.py` takes it: a pair (B, A), or a matrix. DoRA's needs the base's w (m, n)."""
        if self.lora_A is None or self.lora_B is None:
            return self.delta
        if self.magnitude is None:
            return self.lora_B, self.lora_A
        if w is None:
            raise ValueError("DoRA's update depends on the base's matrix: give of() that matrix")
        return dora_delta(w, self.lora_B @ self.lora_A, self.magnitude, row_norms(w, self.lora_A, self.lora_B, 1.0))

    def matrix(self, w: np.ndarray | None = None) -> np.ndarray:
        """The same as one matrix (m, n)."""
        update = self.of(w)
        return update[0] @ update[1] if isinstance(update, tuple) else update


def train_update(
    base: str,
    data: str,
    method: str,
    steps: int,
    lr: float,
    seed: int,
    r: int = 8,
    lora_alpha: float = 16.0,
    batch_size: int = 8,
    modules: Sequence[str] = KEPT,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """Train a base on the train split of `data`, or find that this was done before, and say where the update is.

    method: "lora", "dora" (both on all linear maps) or "full". lr: the peak; the rest is as in `fit`. r, lora_alpha:
    LoRA's and DoRA's. modules: names of the modules whose update is kept. folder: where; None is a folder that lasts as
    long as this process. Two processes that want one run train it once.

    Returns `file` for `read_update`, `losses` of each step, and `changes`: for the steps of four looks, by module,
    (ΔM, ΔD) as `row_changes` measures them. Raises ValueError for another method.
    """
    from filelock import FileLock

    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    settings: dict[str, Any] = dict(
        base=base, data=data, method=method, steps=steps, lr=lr, seed=seed, batch_size=batch_size
    )
    settings |= {"modules": list(modules)} | ({} if method == "full" else {"r": r, "lora_alpha": lora_alpha})
    place = Path(folder) if folder else _passing_folder()
    place.mkdir(parents=True, exist_ok=True)
    decides = settings | {"code": code_sha256(Path(__file__))}
    report = path_of(place, f"{method}-{Path(base).name}", decides)
    path = report.with_suffix(".safetensors")
    with FileLock(path.with_suffix(".lock")):
        if (record := recall(report, decides)) is None or not path.is_file():
            tensors, found = _train(**settings)
            write_tensors(path, tensors)
            record = keep(report, decides, found)  # last: it says that the file beside it is whole
    return {"file": str(path)} | record["result"]


def shared_run(base: str, method: str, seed: int, r: int = 8, folder: str | None = None) -> dict[str, Any]:
    """`train_update` with the settings that claims share, for "smollm2" or "tiny"."""
    return train_update(base, method=method, lr=RATES[base][method], seed=seed, r=r, folder=folder, **SHARED[base])


def read_update(file: str | Path) -> dict[str, Kept]:
    """What `train_update` kept, by module. Raises ModelFileError for a file that is not there, or of another kind."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in read_tensors(Path(file)).items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = array
    try:
        return {module: Kept(**found) for module, found in parts.items()}
    except TypeError as error:
        raise ModelFileError(f"{file}: holds no update of train_update ({error})") from error


@cache
def base_matrices(base: str, modules: tuple[str, ...] = KEPT) -> dict[str, np.ndarray]:
    """The base's own matrices (m, n) of the modules whose names end so, by module."""
    return _matrices(load(base)[0], modules)


def _matrices(model: Llama, modules: Sequence[str]) -> dict[str, np.ndarray]:
    found = {name.removesuffix(".weight"): dense(p.data) for name, p in model.named_parameters()}
    return {name: to_numpy(w) for name, w in found.items() if name.rpartition(".")[2] in modules}


def _train(
    base: str,
    data: str,
    method: str,
    steps: int,
    lr: float,
    seed: int,
    batch_size: int,
    modules: Sequence[str],
    **lora: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of the file, and what is told of the run."""
    model, tokenizer = load(base)
    samples = encode_records(split_records(read_records(data))["train"], tokenizer)
    start = {name: w.copy() for name, w in _matrices(model, modules).items()}
    if method != "full":
        add_adapter(model, LoraConfig(**lora, use_dora=method == "dora"), ADAPTER, seed)
    looks = {round(steps * look / LOOKS) for look in range(1, LOOKS + 1)}
    changes: dict[str, dict[str, tuple[float, float]]] = {}

    def look(step: int) -> None:
        if step in looks:
            changes[str(step)] = {name: row_changes(w, _now(model, name, w, method)) for name, w in start.items()}

    history = fit(model, samples, steps, lr, batch_size, seed, each_step=look)
    if method == "full":
        kept = {f"{name}.delta": _now(model, name, w, method) - w for name, w in start.items()}
    else:
        kept = {f"{name}.{part}": x for name in start for part, x in _parts(_carried(model, name)).items()}
    return kept, {"losses": history.losses, "changes": changes}


def _now(model: Llama, module: str, w: np.ndarray, method: str) -> np.ndarray:
    if method == "full":
        return to_numpy(dict(model.named_parameters())[f"{module}.weight"].data)
    return w + to_numpy(_carried(model, module).delta(w))


def _carried(model: Llama, module: str) -> LoraWeights:
    return lora_modules(model)[module].adapters[ADAPTER]


def _parts(weights: LoraWeights) -> Mapping[str, np.ndarray]:
    parts = {"lora_A": to_numpy(weights.lora_A.data), "lora_B": to_numpy(weights.lora_B.data) * weights.scale}
    if weights.lora_magnitude_vector is not None:
        parts["magnitude"] = to_numpy(weights.lora_magnitude_vector.data)
    return parts


@cache
def _passing_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="minilora-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder

"""What training added to the weights of a base, kept in a file: one run for all claims that look at its update.

run = train_update("tiny", "legal", "lora", steps=60, lr=5e-3, seed=0, r=8)
updates = read_update(run["file"])                          # by module, as lora/spectra.py takes them:
updates["model.layers.0.self_attn.q_proj"]                  # a pair (B, A), the scale in B, or a matrix

The same settings find the same file again, as long as the code that decides the numbers is the same.
"""

import atexit
import shutil
import tempfile
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
from ..lora.spectra import Update, row_changes
from ..measure.loss import evenly, mean_loss
from ..models.load import load
from ..nn.language_model import LanguageModel
from ..train.loop import fit
from .memo import code_sha256, keep, path_of, recall

METHODS = ("lora", "dora", "full")
ALPHA = 16.0
KEPT = ("q_proj", "v_proj", "down_proj")  # all linear layers are trained; of full fine-tuning all would be 425 MB
HELD_OUT = 30  # records of the validation set
LOOKS = 4  # at the changes of length and direction: a quarter of the steps, a half, ..., as in DoRA's section 3.2
ADAPTER = "default"

# The runs that claims share, and the rates where their search begins. On tiny they take seconds: few steps, and
# therefore large ones.
SHARED: dict[str, dict[str, Any]] = {
    "smollm2": {"data": "legal"},
    "tiny": {"data": "legal", "steps": 16, "batch_size": 4},
}
RATES = {"smollm2": {"lora": 3e-3, "dora": 3e-3, "full": 3e-4}, "tiny": {"lora": 2e-2, "dora": 2e-2, "full": 2e-3}}


def train_update(
    base: str,
    data: str,
    method: str,
    lr: float,
    seed: int,
    steps: int = 40,
    r: int = 8,
    batch_size: int = 8,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """Train a base on the train split of `data`, or find that this was done before, and say where the update is.

    base, data: as `load` and `read_records` take them.
    method: "lora", "dora" (both on all linear layers) or "full".
    steps, lr, batch_size, seed: `fit`'s.
    r: LoRA's and DoRA's.
    folder: where; None is a folder that lasts as long as this process. Two processes that ask for one run train once.

    Returns `file` for `read_update`, `losses` of each step, `validation`, the loss afterwards, by which `tuned` chooses
    a rate, and `changes`: for the steps of four looks, by module, (ΔM, ΔD) as `row_changes` measures them. Raises
    ValueError for another method.
    """
    from filelock import FileLock

    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    settings: dict[str, Any] = {"base": base, "data": data, "method": method, "steps": steps, "lr": lr, "seed": seed}
    settings |= {"batch_size": batch_size, "r": 0 if method == "full" else r}
    place = Path(folder) if folder else _passing_folder()
    place.mkdir(parents=True, exist_ok=True)
    decides = settings | {"code": code_sha256(Path(__file__))}
    report = path_of(place, f"{method}-{Path(base).name}", decides)
    path = report.with_suffix(".safetensors")
    with FileLock(path.with_suffix(".lock")):
        if (record := recall(report, decides)) is None or not path.is_file():
            tensors, found = _train(**settings)
            write_tensors(path, tensors)
            record = keep(report, decides, found)  # last: it says that the file next to it is complete
    return {"file": str(path)} | record["result"]


def read_update(file: str | Path) -> dict[str, Update]:
    """What `train_update` kept, by module: a pair (B (m, r), A (r, n)) of LoRA, a matrix (m, n) of the others.

    Raises ModelFileError for a file that is missing, or of another kind.
    """
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in read_tensors(Path(file)).items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = array
    if any(set(found) not in ({"delta"}, {"lora_A", "lora_B"}) for found in parts.values()):
        raise ModelFileError(f"{file}: holds no update of train_update")
    return {name: found["delta"] if "delta" in found else (found["lora_B"], found["lora_A"])
            for name, found in parts.items()}  # fmt: skip


@cache
def base_matrices(base: str) -> dict[str, np.ndarray]:
    """The base's own matrices (m, n) of the modules that are KEPT, by module."""
    return _matrices(load(base)[0])


def _matrices(model: LanguageModel) -> dict[str, np.ndarray]:
    found = {name.removesuffix(".weight"): dense(p.data) for name, p in model.named_parameters()}
    return {name: to_numpy(w) for name, w in found.items() if name.rpartition(".")[2] in KEPT}


def _train(
    base: str, data: str, method: str, steps: int, lr: float, seed: int, batch_size: int, r: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of the file, and the record of the run."""
    model, tokenizer = load(base)
    splits = split_records(read_records(data))
    samples, held = (encode_records(splits[name], tokenizer) for name in ("train", "validation"))
    start = {name: w.copy() for name, w in _matrices(model).items()}
    if method != "full":
        add_adapter(model, LoraConfig(r=r, lora_alpha=ALPHA, use_dora=method == "dora"), ADAPTER, seed)
    adapters = {name: module.adapters[ADAPTER] for name, module in lora_modules(model).items() if name in start}
    changes: dict[str, dict[str, tuple[float, float]]] = {}

    def now() -> dict[str, np.ndarray]:
        if method == "full":
            return _matrices(model)
        return {name: start[name] + to_numpy(adapter.delta(start[name])) for name, adapter in adapters.items()}

    def look(step: int) -> None:
        if step in looks:
            changes[str(step)] = {name: row_changes(start[name], w) for name, w in now().items()}

    looks = {round(steps * look / LOOKS) for look in range(1, LOOKS + 1)}
    history = fit(model, samples, steps, lr, batch_size, seed, each_step=look)
    if method == "lora":
        kept = {f"{name}.lora_A": to_numpy(one.lora_A.data) for name, one in adapters.items()}
        kept |= {f"{name}.lora_B": to_numpy(one.lora_B.data) * one.scale for name, one in adapters.items()}
    else:
        kept = {f"{name}.delta": w - start[name] for name, w in now().items()}
    model.eval()
    return kept, {
        "losses": history.losses, "changes": changes, "validation": mean_loss(model, evenly(held, HELD_OUT))
    }  # fmt: skip


@cache
def _passing_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="minilora-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder

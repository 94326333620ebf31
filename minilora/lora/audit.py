"""Does an adapter keep its promises? Each check is one that a shipped LoRA implementation has failed.

base        the base's arrays are what they were: the same SHA-256 before and after everything done here
trainable   nothing learns but the adapter's A and B
scale       each module's factor is alpha / r (alpha / sqrt(r) with rsLoRA), computed here from the config again
count       the adapter has r (m + n) parameters for every adapted matrix
off         with the adapter off, the output is the base's, bit for bit
start       while B is zero: output bit-identical to the base, dL/dA exactly zero, dL/dB not zero
gradient    once B has moved: every A and every B receives a gradient
merge       merged and unmerged outputs agree; unmerging restores the base bit for bit; merging twice adds once
file        saved and loaded again, the adapter is the same, bit for bit
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..engine.backend import Array, array_module, dense, to_numpy
from ..engine.tensor import no_grad
from ..nn.llama import Llama
from ..nn.module import sha256_of
from .adapters import (
    adapter_state,
    base_state,
    configs_of,
    disable_adapter,
    lora_modules,
    merge_adapter,
    set_adapter,
    unmerge_adapter,
)
from .layer import EmbeddingWeights, LoraLayer, LoraWeights
from .peft import WEIGHTS_FILE, read_adapter_config, read_tensors, save_adapter, saved_state

Modules = dict[str, LoraLayer]


class AuditError(AssertionError):
    """An adapter breaks a promise; the message says which, where, and by how much."""


@dataclass(frozen=True)
class AuditReport:
    """What was checked: (check, what was found) in order, and each module's (rank, alpha, scale)."""

    adapter: str
    checks: list[tuple[str, str]]
    scales: dict[str, tuple[int, float, float]]

    def __str__(self) -> str:
        lines = [f"audit of adapter {self.adapter!r}"]
        lines += [f"  {name:<10} ok   {found}" for name, found in self.checks]
        kinds: dict[tuple[str, int, float, float], int] = {}
        for path, numbers in self.scales.items():
            kind = (path.rpartition(".")[2], *numbers)
            kinds[kind] = kinds.get(kind, 0) + 1
        lines += [
            f"  {kind:<12} r={r:<4} alpha={alpha:<6g} scale={scale:<8.4g} x {n} modules"
            for (kind, r, alpha, scale), n in kinds.items()
        ]
        return "\n".join(lines)


def audit(model: Llama, name: str, input_ids: Array | None = None) -> AuditReport:
    """Check every promise of the adapter called `name` on `model`; the model is left as it was, but for gradients.

    input_ids: (B, T) tokens to compute with; a fixed few if left out. Raises AuditError on the first broken promise,
    ValueError when the model has no such adapter.
    """
    modules = {path: module for path, module in lora_modules(model).items() if name in module.adapters}
    if name not in configs_of(model):
        raise ValueError(f"the model has no adapter called {name!r}; it has: {', '.join(configs_of(model)) or 'none'}")
    before = {path: module.active for path, module in lora_modules(model).items()}
    trained = set(model.trainable_parameters())
    unmerge_adapter(model)
    set_adapter(model, name)
    if input_ids is None:
        xp = array_module(model.head_weight.data)
        input_ids = (xp.arange(24) * 7919 % model.config.vocab_size).reshape(2, 12)
    weights = base_state(model)
    digest = sha256_of(weights)
    checks: list[tuple[str, str]] = []
    try:
        for title, check in _CHECKS.items():
            checks.append((title, check(model, name, modules, input_ids)))
        if sha256_of(base_state(model)) != digest:
            raise AuditError(f"base: the weights changed during the audit, sha256 {digest[:16]}")
        checks.append(("base", f"sha256 {digest[:16]} before and after"))
    finally:
        for path, module in lora_modules(model).items():
            module.active = before[path]
        for path, parameter in model.named_parameters():
            parameter.requires_grad = path in trained
    scales = {
        path: (m.adapters[name].rank, _alpha(model, name, path), m.adapters[name].scale) for path, m in modules.items()
    }
    return AuditReport(name, checks, scales)


def moved(before: dict[str, Array], after: dict[str, Array]) -> tuple[int, int]:
    """(n, m): how many of the m B matrices differ between two `adapter_state`s. After one training step, n must be m:
    a B that stays behind receives no gradient.
    """
    names = [key for key in before if key.endswith("lora_B")]
    return sum(not bool((before[key] == after[key]).all()) for key in names), len(names)


# -- the checks: each returns what it found, or raises AuditError ------------------------------------------------------


def _trainable(model: Llama, name: str, modules: Modules, ids: Array) -> str:
    learning = model.trainable_parameters()
    if foreign := [path for path in learning if f".adapters.{name}." not in path]:
        raise AuditError(f"trainable: {foreign[0]} requires a gradient and is no part of adapter {name!r}")
    expected = sum(len(adapter.state_dict()) for adapter in (m.adapters[name] for m in modules.values()))
    if len(learning) != expected:
        raise AuditError(f"trainable: {len(learning)} of the adapter's {expected} matrices require a gradient")
    return f"{len(learning)} matrices of the adapter, nothing else"


def _alpha(model: Llama, name: str, path: str) -> float:
    return configs_of(model)[name].alpha_of(path)


def _scale(model: Llama, name: str, modules: Modules, ids: Array) -> str:
    config = configs_of(model)[name]
    for path, module in modules.items():
        adapter = module.adapters[name]
        rank, rule = adapter.lora_A.shape[0], "alpha / sqrt(r)" if config.use_rslora else "alpha / r"
        expected = config.alpha_of(path) / (math.sqrt(rank) if config.use_rslora else rank)
        if not math.isclose(adapter.scale, expected, rel_tol=1e-6):
            raise AuditError(f"scale: {path} is scaled by {adapter.scale:g}, {rule} is {expected:g}")
    return f"{'alpha / sqrt(r)' if config.use_rslora else 'alpha / r'} in all {len(modules)} modules"


def _count(model: Llama, name: str, modules: Modules, ids: Array) -> str:
    got, expected, more = sum(array.size for array in adapter_state(model, name).values()), 0, 0
    for module in modules.values():
        share = module.adapters[name]
        expected += share.rank * (module.in_features + module.out_features)
        more += sum(part.size for part in (share.lora_magnitude_vector, share.bias) if part is not None)
    if got != expected + more:
        raise AuditError(
            f"count: the adapter has {got:,} parameters, r (m + n) summed over its modules is {expected:,}"
            + (f", and its vectors have {more:,}" if more else "")
        )
    vectors = f" + {more:,} in vectors" if more else ""
    return f"{got:,} parameters = r (m + n) summed over {len(modules)} matrices{vectors}"


def _off(model: Llama, name: str, modules: Modules, ids: Array) -> str:
    with disable_adapter(model):
        off = _logits(model, ids)
    plain = {path: module.base_layer() for path, module in lora_modules(model).items()}
    wrapped = lora_modules(model)
    for path, layer in plain.items():
        model.set_submodule(path, layer)
    try:
        base = _logits(model, ids)
    finally:
        for path, module in wrapped.items():
            model.set_submodule(path, module)
    if not np.array_equal(off, base):
        raise AuditError(f"off: with the adapter off, logits differ from the base by {np.abs(off - base).max():g}")
    return "adapter off is the base, bit for bit"


def _start(model: Llama, name: str, modules: Modules, ids: Array) -> str:
    """Put every weight back to what it starts as, look, and restore. What is zero at the start is B, on an embedding A;
    DoRA's magnitudes start as the row norms; PiSSA's A and B as what they are measured against.
    """
    shares = {path: module.adapters[name] for path, module in modules.items()}
    kept = {(path, key): p.data for path, share in shares.items() for key, p in share.named_parameters()}
    pissa = any(share.start is not None for share in shares.values())
    try:
        for path, share in shares.items():
            _restart(share, modules[path])
        with disable_adapter(model):
            base = _logits(model, ids)
        gap = float(np.abs(_logits(model, ids) - base).max())
        if gap > (1e-4 * float(np.abs(base).max()) if pissa else 0):
            raise AuditError(f"start: at its start the adapter changes the output by {gap:g}")
        for path, (da, db) in _gradients(model, name, modules, ids).items():
            (zero, dzero), (other, dother) = (("A", da), ("B", db))[:: -1 if _starts_at_b(shares[path]) else 1]
            if not pissa and bool(dother.any()):
                largest = float(abs(dother).max())
                raise AuditError(f"start: with {zero} = 0 dL/d{other} of {path} must be 0, its largest is {largest:g}")
            if not bool(dzero.any()):
                raise AuditError(f"start: dL/d{zero} of {path} is zero: this module will never learn")
    finally:
        for (path, key), array in kept.items():
            dict(shares[path].named_parameters())[key].data = array
    if pissa:
        return f"PiSSA's first A and B: output as the base's within {gap:.1e}, every gradient not 0"
    return "B = 0: output bit-identical, dL/dA = 0, dL/dB not 0"


def _starts_at_b(share: LoraWeights) -> bool:
    return not isinstance(share, EmbeddingWeights)


def _restart(share: LoraWeights, module: LoraLayer) -> None:
    if share.start is not None:
        share.lora_A.data, share.lora_B.data = (array.copy() for array in share.start)
    else:
        zero = share.lora_B if _starts_at_b(share) else share.lora_A
        zero.data = array_module(zero.data).zeros_like(zero.data)
    if share.lora_magnitude_vector is not None:
        share.lora_magnitude_vector.data = share.norms(module.matrix(dense(module.weight.data)))
    if share.bias is not None and module.bias is not None:
        share.bias.data = module.bias.data


def _gradient(model: Llama, name: str, modules: Modules, ids: Array) -> str:
    if not all(bool(m.adapters[name].lora_B.data.any()) for m in modules.values()):
        return "B has not moved yet: nothing to see"
    for path, (da, db) in _gradients(model, name, modules, ids).items():
        if not (bool(da.any()) and bool(db.any())):
            raise AuditError(f"gradient: A or B of {path} receives none")
    return f"all {2 * len(modules)} matrices receive one"


def _merge(model: Llama, name: str, modules: Modules, ids: Array) -> str:
    digest, beside = sha256_of(base_state(model)), _logits(model, ids)
    merge_adapter(model)
    try:
        inside = _logits(model, ids)
        merge_adapter(model)
        again = _logits(model, ids)
    finally:
        unmerge_adapter(model)
    if not np.array_equal(inside, again):
        raise AuditError("merge: merging twice is not merging once")
    gap, size = float(np.abs(inside - beside).max()), float(np.abs(beside).max())
    if not gap <= 1e-4 * max(size, 1.0):
        raise AuditError(f"merge: merged and unmerged logits differ by {gap:g} (largest logit {size:g})")
    if sha256_of(base_state(model)) != digest:
        raise AuditError("merge: unmerging did not restore the base bit for bit")
    return f"merged = unmerged within {gap:.1e}; base restored bit for bit"


def _file(model: Llama, name: str, modules: Modules, ids: Array) -> str:
    import tempfile  # here, where it is used: `import minilora` shall be quick

    state = saved_state(model, name)
    with tempfile.TemporaryDirectory(prefix="minilora-audit-") as folder:
        save_adapter(model, folder, name)
        tensors = read_tensors(Path(folder) / WEIGHTS_FILE)
        config = read_adapter_config(Path(folder))
    for key, array in state.items():
        if not np.array_equal(tensors.pop(key, np.empty(0)), to_numpy(array)):
            raise AuditError(f"file: {key} did not come back from the file as it was")
    if tensors:
        raise AuditError(f"file: {next(iter(tensors))} was saved and is no part of the adapter")
    for path, module in modules.items():
        if not math.isclose(config.scale_of(path), module.adapters[name].scale, rel_tol=1e-6):
            raise AuditError(f"file: the saved settings scale {path} by {config.scale_of(path):g}")
    return f"{len(state)} tensors saved and read back, bit for bit"


_CHECKS: dict[str, Callable[[Llama, str, Modules, Array], str]] = {
    "trainable": _trainable,
    "scale": _scale,
    "count": _count,
    "off": _off,
    "start": _start,
    "gradient": _gradient,
    "merge": _merge,
    "file": _file,
}


def _logits(model: Llama, ids: Array) -> np.ndarray:
    with no_grad():
        return to_numpy(model(ids).data)


def _gradients(model: Llama, name: str, modules: Modules, ids: Array) -> dict[str, tuple[Array, Array]]:
    adapters = {path: module.adapters[name] for path, module in modules.items()}
    for adapter in adapters.values():
        adapter.lora_A.grad = adapter.lora_B.grad = None
    model.loss(ids, ids).backward()
    result = {}
    for path, adapter in adapters.items():
        a, b = adapter.lora_A, adapter.lora_B
        zero_a, zero_b = array_module(a.data).zeros_like(a.data), array_module(b.data).zeros_like(b.data)
        result[path] = (zero_a if a.grad is None else a.grad, zero_b if b.grad is None else b.grad)
        a.grad = b.grad = None
    return result

"""Checks of what every LoRA adapter must satisfy. Each check is one that a published implementation has failed.

trainable   no other parameter than the adapter's is trainable
scale       each module's factor is alpha / r (alpha / sqrt(r) with rsLoRA), recomputed here from the config
count       the adapter has r (m + n) parameters for each adapted matrix
off         with the adapter off, the output is the base's, bit for bit
initial     with B = 0 the output is bit-identical to the base's, dL/dA is exactly zero, and dL/dB is not zero
gradient    where B is not zero, B and an A that is not frozen have a gradient
merge       merged and unmerged outputs agree, unmerging restores the base's own arrays, and merging twice adds once
file        after saving and loading the adapter is identical, bit for bit
base        the base's arrays have the same SHA-256 before and after all other checks
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import Array, array_module, dense, to_numpy
from ..engine.tensor import Tensor, no_grad
from ..files.quant import in_float32
from ..nn.language_model import LanguageModel, check_language_model
from ..nn.module import sha256_of
from .adapters import (
    activate,
    active_factors,
    adapter_state,
    adapter_weights,
    base_state,
    disable_adapter,
    is_merged,
    lora_modules,
    merge_adapter,
    set_adapter,
    unmerge_adapter,
)
from .layer import LoraLinear, LoraWeights
from .peft import WEIGHTS_FILE, read_adapter_config, read_tensors, save_adapter, saved_state


class AuditError(AssertionError):
    """A check of an adapter failed. The message says which one, where, and by how much."""


@dataclass(frozen=True, repr=False)
class AuditReport:
    """The results of an audit that passed.

    adapter: its name.
    checks: (check, result) in order.
    scales: (rank, alpha, scale) by module name.
    base_sha256: the base's `sha256_of(base_state(model))`, which did not change.
    """

    adapter: str
    checks: list[tuple[str, str]]
    scales: dict[str, tuple[int, float, float]]
    base_sha256: str

    def __repr__(self) -> str:
        lines = [f"audit of adapter {self.adapter!r}"]
        lines += [f"  {name:<10} ok   {found}" for name, found in self.checks]
        kinds = Counter((path.rpartition(".")[2], *numbers) for path, numbers in self.scales.items())
        lines += [
            f"  {kind:<12} r={r:<4} alpha={alpha:<6g} scale={scale:<8.4g} x {n} modules"
            for (kind, r, alpha, scale), n in kinds.items()
        ]
        return "\n".join(lines)


def audit(
    model: LanguageModel, name: str, input_ids: Array | None = None, base_sha256: str | None = None
) -> AuditReport:
    """Check that an adapter satisfies what every LoRA adapter must. See the list at the top of audit.py.

    model: afterwards it is as before, except that gradients are cleared.
    input_ids: (B, T) tokens to compute with; 24 fixed ones if left out.
    base_sha256: an earlier `sha256_of(base_state(model))`, such as from before training, which must still hold.

    Dropout is off during the audit. Raises AuditError at the first check that fails, ValueError for an unknown name,
    TypeError for a module that is not a language model.
    """
    check_language_model(model, "audit")
    weights = adapter_weights(model, name)
    active, merged = active_factors(model), is_merged(model)
    trained = set(model.trainable_parameters())
    training = [(module, module.training) for _, module in model.named_modules()]
    if input_ids is None:
        xp = array_module(model.head_weight.data)
        input_ids = (xp.arange(24) * 7919 % model.config.vocab_size).reshape(2, 12)
    try:
        unmerge_adapter(model)
        set_adapter(model, name)
        model.eval()
        return _Audit(model, name, weights, input_ids, base_sha256 or sha256_of(base_state(model))).run()
    finally:
        activate(model, active)
        for module, mode in training:
            module.training = mode
        for path, parameter in model.named_parameters():
            parameter.requires_grad, parameter.grad = path in trained, None
        if merged:
            merge_adapter(model)


class _Audit:
    """One audit. Each check returns its result as text, or raises AuditError."""

    CHECKS = ("trainable", "scale", "count", "off", "initial", "gradient", "merge", "file")

    def __init__(self, model: LanguageModel, name: str, weights: dict[str, LoraWeights], ids: Array, digest: str):
        self.model, self.name, self.weights, self.ids, self.digest = model, name, weights, ids, digest
        self.config = model.adapters[name].config
        self.modules = {path: module for path, module in lora_modules(model).items() if path in weights}
        self.rule = "alpha / sqrt(r)" if self.config.use_rslora else "alpha / r"

    def run(self) -> AuditReport:
        checks = [(check, getattr(self, check)()) for check in self.CHECKS]
        if (now := sha256_of(base_state(self.model))) != self.digest:
            raise AuditError(f"base: the weights changed: sha256 was {self.digest[:16]}, is {now[:16]}")
        checks.append(("base", f"sha256 {self.digest[:16]} before and after"))
        scales = {path: (own.rank, self.config.alpha_of(path), own.scale) for path, own in self.weights.items()}
        return AuditReport(self.name, checks, scales, self.digest)

    # -- the checks ----------------------------------------------------------------------------------------------------
    def trainable(self) -> str:
        learning = self.model.trainable_parameters()
        if foreign := [path for path in learning if f".adapters.{self.name}." not in path]:
            raise AuditError(f"trainable: {foreign[0]} is trainable and not part of adapter {self.name!r}")
        expected = len(adapter_state(self.model, self.name)) - sum(own.freeze_A for own in self.weights.values())
        if len(learning) != expected:
            raise AuditError(f"trainable: only {len(learning)} of the adapter's {expected} matrices are trainable")
        return f"{len(learning)} matrices of the adapter, nothing else"

    def scale(self) -> str:
        for path, own in self.weights.items():
            rank = own.lora_A.shape[0]
            expected = self.config.alpha_of(path) / (math.sqrt(rank) if self.config.use_rslora else rank)
            if not math.isclose(own.scale, expected, rel_tol=1e-6):
                raise AuditError(f"scale: {path} has scale {own.scale:g}, but {self.rule} is {expected:g}")
        return f"{self.rule} in all {len(self.weights)} modules"

    def count(self) -> str:
        got = sum(array.size for array in adapter_state(self.model, self.name).values())
        expected = more = 0
        for path, own in self.weights.items():
            module = self.modules[path]
            expected += own.rank * (module.in_features + module.out_features)
            more += 0 if own.lora_magnitude_vector is None else own.lora_magnitude_vector.size
        if got != expected + more:
            raise AuditError(
                f"count: the adapter has {got:,} parameters, but r (m + n) summed over its modules is {expected:,}"
                + (f" and its vectors have {more:,}" if more else "")
            )
        vectors = f" + {more:,} in vectors" if more else ""
        return f"{got:,} parameters = r (m + n) summed over {len(self.weights)} matrices{vectors}"

    def off(self) -> str:
        with disable_adapter(self.model):
            off = self.logits()
        wrapped = lora_modules(self.model)
        for path, module in wrapped.items():
            self.model.set_submodule(path, module.base_layer())
        try:
            base = self.logits()
        finally:
            for path, module in wrapped.items():
                self.model.set_submodule(path, module)
        if not np.array_equal(off, base):
            gap = np.abs(off - base).max()
            raise AuditError(f"off: with the adapter off, logits differ from the base by {gap:g}")
        return "adapter off is the base, bit for bit"

    def initial(self) -> str:
        """Set every weight to its initial value, check, and restore. Initially B is zero; DoRA's magnitudes are
        the row norms; PiSSA's A and B are its initial factors.
        """
        kept = [(p, p.data) for own in self.weights.values() for _, p in own.named_parameters()]
        pissa = any(own.initial is not None for own in self.weights.values())
        try:
            for path, own in self.weights.items():
                self.reset(path, own)
            with disable_adapter(self.model):
                base = self.logits()
            gap = float(np.abs(self.logits() - base).max())
            if gap > (1e-4 * float(np.abs(base).max()) if pissa else 0):
                raise AuditError(f"initial: a newly initialised adapter changes the output by {gap:g}")
            for path, (da, db) in self.gradients().items():
                if not pissa and bool(da.any()):
                    largest = float(abs(da).max())
                    raise AuditError(f"initial: with B = 0, dL/dA of {path} must be 0, but its largest is {largest:g}")
                if not bool(db.any()):
                    raise AuditError(f"initial: dL/dB of {path} is zero: this module cannot learn")
        finally:
            for parameter, array in kept:
                parameter.data = array
        if pissa:
            return f"A and B from the base: output within {gap:.1e} of the base's, no gradient is 0"
        return "B = 0: output bit-identical, dL/dA = 0, dL/dB not 0"

    def gradient(self) -> str:
        moved = {path: own for path, own in self.weights.items() if bool(own.lora_B.data.any())}
        if not moved:
            return "B is still zero: nothing to check"
        gradients = self.gradients()
        for path, own in moved.items():
            da, db = gradients[path]
            if not bool(db.any()) or not (bool(da.any()) or own.freeze_A):
                raise AuditError(f"gradient: the gradient of A or B of {path} is zero")
        frozen = sum(own.freeze_A for own in moved.values())
        return f"all {2 * len(moved) - frozen} trainable matrices have one"

    def merge(self) -> str:
        base = base_state(self.model)
        with in_float32(base.values()):  # products with a merged matrix are computed in float32
            unmerged = self.logits()
            merged = self.merged_logits()
        gap, largest = float(np.abs(merged - unmerged).max()), float(np.abs(unmerged).max())
        if not gap <= 1e-4 * max(largest, 1.0):
            raise AuditError(f"merge: merged and unmerged logits differ by {gap:g} (largest logit {largest:g})")
        after = base_state(self.model)
        if changed := [path for path in base if after[path] is not base[path]]:
            raise AuditError(f"merge: unmerging did not restore the base's own {changed[0]}")
        return f"merged = unmerged within {gap:.1e}; the base's own arrays are restored"

    def file(self) -> str:
        import tempfile  # here, so that `import minilora` is quick

        state = saved_state(self.model, self.name)
        with tempfile.TemporaryDirectory(prefix="minilora-audit-") as folder:
            adapter = self.model.adapters[self.name]
            own_folder = adapter.folder
            save_adapter(self.model, folder, self.name, base_sha256=self.digest)
            adapter.folder = own_folder
            tensors = read_tensors(Path(folder) / WEIGHTS_FILE)
            config = read_adapter_config(Path(folder))
        for key, array in state.items():
            if not np.array_equal(tensors.pop(key, np.empty(0)), to_numpy(array)):
                raise AuditError(f"file: {key} in the saved file differs from the adapter's")
        if tensors:
            raise AuditError(f"file: {next(iter(tensors))} was saved and is not part of the adapter")
        for path, own in self.weights.items():
            if not math.isclose(config.scale_of(path), own.scale, rel_tol=1e-6):
                raise AuditError(f"file: the saved config gives {path} scale {config.scale_of(path):g}")
        return f"{len(state)} tensors saved and read back, bit for bit"

    # -- helpers -------------------------------------------------------------------------------------------------------
    def logits(self) -> np.ndarray:
        with no_grad():
            return to_numpy(self.model(self.ids).data)

    def merged_logits(self) -> np.ndarray:
        """With each layer merged while it is computed, so that one merged matrix exists at a time."""

        def merged(module: LoraLinear, *inputs: Any) -> Tensor:
            try:
                module.merge()
                once = type(module).forward(module, *inputs)
                module.merge()
                twice = type(module).forward(module, *inputs)
            finally:
                module.unmerge()
            if not bool((once.data == twice.data).all()):
                raise AuditError("merge: merging twice differs from merging once")
            return twice

        for module in self.modules.values():
            vars(module)["forward"] = partial(merged, module)
        try:
            return self.logits()
        finally:
            for module in self.modules.values():
                del vars(module)["forward"]

    def gradients(self) -> dict[str, tuple[Array, Array]]:
        """dL/dA and dL/dB by module; zero for a missing gradient."""
        for parameter in self.model.trainable_parameters().values():
            parameter.grad = None
        loss = self.model.loss(self.ids, self.ids)
        if loss.requires_grad:
            loss.backward()
        found = {}
        for path, own in self.weights.items():
            pair = (own.lora_A, own.lora_B)
            da, db = (array_module(p.data).zeros_like(p.data) if p.grad is None else p.grad for p in pair)
            found[path] = da, db
        for parameter in self.model.trainable_parameters().values():
            parameter.grad = None
        return found

    def reset(self, path: str, own: LoraWeights) -> None:
        module = self.modules[path]
        if own.initial is not None:
            own.lora_A.data, own.lora_B.data = (array.copy() for array in own.initial)
        else:
            own.lora_B.data = array_module(own.lora_B.data).zeros_like(own.lora_B.data)
        if own.lora_magnitude_vector is not None:
            own.lora_magnitude_vector.data = own.norms(dense(module.weight.data))

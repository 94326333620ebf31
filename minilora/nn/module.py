"""Modules: named parameters in a tree, and the switch that freezes them.

Attribute names are the names in the checkpoint. A Llama built from these modules has exactly the tensor names of a
Hugging Face checkpoint, so its state dict needs no translation table.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ..engine.backend import Array, dense_rows, is_packed, to_numpy
from ..engine.tensor import Tensor
from ..files.tensors import check_fit

_HASHED = 1 << 20  # numbers hashed at a time: what is packed is never unpacked whole


class Parameter(Tensor):
    """A tensor that belongs to a module. It starts trainable; `requires_grad = False` freezes it.

    Where `data` is a packed matrix (quant.py), it is frozen for good: asking for a gradient is a ValueError.
    """

    __slots__ = ()

    def __init__(self, data: Array, requires_grad: bool = True):
        super().__init__(data, requires_grad=requires_grad)

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if wanted and is_packed(self.data):
            raise ValueError(
                "a packed matrix is frozen: load the model without quantized, and in float32, to train its weights"
            )
        Tensor.requires_grad.fset(self, wanted)  # type: ignore[attr-defined]


class Module:
    """A node of the tree: parameters and other modules are its attributes; lists of modules are numbered."""

    training: bool = True
    adapters: Mapping[str, Any] = MappingProxyType({})  # the adapters that a model has, by name: see lora/adapters.py
    rows_differ: bool = False  # does a row's place in the batch decide how it is computed? Then batches stay whole

    def __call__(self, *inputs, **settings):
        """Compute the module's output: `forward`, which every subclass defines."""
        return self.forward(*inputs, **settings)

    def forward(self, *inputs, **settings):
        """What the module computes; defined by each subclass."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    # -- the tree --------------------------------------------------------------------------------------------------
    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly below this one, as (name, module).

        Items of a list or dict of modules are named `layers.0`, `adapters.legal`.
        """
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, (list, dict)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from ((f"{name}.{key}", module) for key, module in items if isinstance(module, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module (named `prefix`) and every module below it, with dotted names."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter once, as (dotted name, parameter)."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def trainable_parameters(self) -> dict[str, Parameter]:
        """The parameters that require a gradient, by name: what an optimizer is given."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def get_submodule(self, path: str) -> Module:
        """The module with this dotted name. Raises KeyError when there is none."""
        return dict(self.named_modules())[path]

    def set_submodule(self, path: str, module: Module) -> None:
        """Put `module` in the place that `path` names: an attribute, or an item of a list."""
        parent_path, _, name = path.rpartition(".")
        if name.isdigit():
            owner_path, _, list_name = parent_path.rpartition(".")
            getattr(self.get_submodule(owner_path), list_name)[int(name)] = module
        else:
            setattr(self.get_submodule(parent_path), name, module)

    # -- for people --------------------------------------------------------------------------------------------------
    def summary(self) -> str:
        """What stands in a module's brackets where a model is printed: its own parameters and their shapes."""
        own = [(name, value) for name, value in vars(self).items() if isinstance(value, Parameter)]
        return ", ".join(f"{name} {p.shape}{'' if p.requires_grad else ' frozen'}" for name, p in own)

    def __repr__(self) -> str:
        """The tree below this module. Neighbours in a list that print the same stand there once, with their number."""
        inside, children = [self.summary()] if self.summary() else [], list(self.named_children())
        for text, alike in itertools.groupby(children, key=lambda child: repr(child[1])):
            names = [name for name, _ in alike]
            if len(names) > 1 and names[0].rpartition(".")[2].isdigit():
                inside.append(f"({names[0]} to {names[-1].rpartition('.')[2]}): {len(names)} x {text}")
            else:
                inside += [f"({name}): {text}" for name in names]
        if not children:
            return f"{type(self).__name__}({', '.join(inside)})"
        return f"{type(self).__name__}(\n{textwrap.indent(chr(10).join(inside), '  ')}\n)"

    # -- switches ----------------------------------------------------------------------------------------------------
    def requires_grad_(self, wanted: bool = True) -> Module:
        """Freeze (`False`) or unfreeze (`True`) every parameter below this module; returns the module."""
        for _, parameter in self.named_parameters():
            parameter.requires_grad = wanted
        return self

    def train(self, mode: bool = True) -> Module:
        """Switch training behaviour (dropout) on or off for the whole tree; returns the module."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Switch training behaviour off; returns the module."""
        return self.train(False)

    # -- state -------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Array]:
        """Every parameter's array by its dotted name. The arrays are the model's own, not copies."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Set every parameter from `state`, strictly. Dtypes follow `state`, packed stays packed; shapes must agree.

        Raises ModelFileError that lists missing, unexpected, misshapen and non-finite tensors; nothing changes then.
        """
        own = dict(self.named_parameters())
        check_fit(state, {name: p.shape for name, p in own.items()}, "the tensors do not fit this model")
        for name, parameter in own.items():
            parameter.data = state[name]
            if is_packed(parameter.data):
                parameter.requires_grad = False


def sha256_of(arrays: Mapping[str, Array]) -> str:
    """The SHA-256 over names, dtypes, shapes and bytes, in the order of the names: a fingerprint of weights.

    A packed matrix counts as the float32 numbers that it stands for. So one model has one fingerprint, whether it is
    packed in memory or not, is in one file or in several, carries adapters or none; a file's own SHA-256 would change
    with each of these, and could not tell whether a model in memory has moved.
    """
    fingerprint = Fingerprint()
    for name in sorted(arrays):
        fingerprint.add(name, arrays[name])
    return fingerprint.hexdigest()


class Fingerprint:
    """`sha256_of` arrays that are not in memory together: `add` each of them, in the order of their names."""

    def __init__(self):
        import hashlib

        self._digest = hashlib.sha256()

    def add(self, name: str, w: Array) -> None:
        """Take in the next array."""
        self._digest.update(f"{name} {np.dtype(w.dtype).str} {w.shape}\n".encode())
        rows = max(1, _HASHED // max(1, math.prod(w.shape[1:]))) if w.shape else 1
        for piece in (dense_rows(w, i, i + rows) for i in range(0, len(w), rows)) if w.shape else (w,):
            self._digest.update(np.ascontiguousarray(to_numpy(piece)).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """The fingerprint of all that was added."""
        return self._digest.hexdigest()

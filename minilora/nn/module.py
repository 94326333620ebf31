"""Modules: a tree of named parameters, which can be frozen.

Attribute names are the names in the checkpoint. A Llama built from these modules has exactly the tensor names of a
Hugging Face checkpoint, so its state dict needs no translation table.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Self, TypeVar, cast

import numpy as np

from ..engine.backend import Array, dense, is_packed, to_numpy
from ..engine.tensor import Tensor
from ..files.tensors import check_fit

Held = TypeVar("Held")
Hook = Callable[["Module", tuple[Any, ...], Tensor], Any]
_HASHED = 1 << 20  # values hashed at a time: a packed matrix is never dequantised whole


class Parameter(Tensor):
    """A tensor that belongs to a module. It is trainable at first; `requires_grad = False` freezes it.

    If `data` is a packed matrix (quant.py), the parameter is always frozen: requiring a gradient is a ValueError.
    """

    __slots__ = ()
    changes_in_place = True

    def __init__(self, data: Array, requires_grad: bool = True):
        super().__init__(data, requires_grad=requires_grad)

    @Tensor.requires_grad.setter  # type: ignore[attr-defined]
    def requires_grad(self, wanted: bool) -> None:
        if wanted and is_packed(self.data):
            raise ValueError(
                'a packed matrix is frozen: load the model without quantized, and with dtype="float32", to train it'
            )
        Tensor.requires_grad.fset(self, wanted)  # type: ignore[attr-defined]


class RemovableHandle:
    """A hook of `register_forward_hook`, until `remove()` or the end of a `with` block."""

    def __init__(self, hooks: dict[RemovableHandle, Hook], hook: Hook):
        self.hooks = hooks
        hooks[self] = hook

    def remove(self) -> None:
        """Call the hook no more."""
        self.hooks.pop(self, None)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class Module:
    """A part of a model: its attributes are parameters and other modules, or lists, tuples and dicts of them, which may
    be nested. The names below (training, adapters, merged, forward_hooks, rows_differ) have a meaning of their own.
    """

    training: bool = True
    adapters: Mapping[str, Any] = MappingProxyType({})  # a model's adapters by name: see lora/adapters.py
    merged: bool = False  # True while an adapter's update is added to the weights
    forward_hooks: Mapping[RemovableHandle, Hook] = MappingProxyType({})
    rows_differ: bool = False  # True if a row's index decides how it is computed: then batches are not divided

    def __call__(self, *inputs: Any, **settings: Any) -> Tensor:
        """Compute the module's output, a tensor: `forward`, which every subclass defines."""
        output = self.forward(*inputs, **settings)
        for hook in tuple(self.forward_hooks.values()):
            changed = hook(self, inputs, output)
            output = output if changed is None else changed
        return output

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        """The module's output; defined by each subclass."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def register_forward_hook(self, hook: Hook) -> RemovableHandle:
        """Call hook(module, inputs, output) whenever this module has computed its output, as PyTorch does.

        inputs: a tuple. What the hook returns, unless None, replaces the output. Remove it with the handle's `remove`,
        or use the handle in a `with` statement. `loss_and_grad` and `fit` call it for each micro-batch, in threads.
        With `recompute`, a hook on a block or inside one is called again in the backward pass, and must not use tensors
        from outside of the block. A hook on a language model itself makes its losses compute all logits, which takes
        more time and memory.
        """
        if not self.forward_hooks:
            self.forward_hooks = {}
        return RemovableHandle(cast(dict, self.forward_hooks), hook)

    # -- the tree --------------------------------------------------------------------------------------------------
    def _held(self, kind: type[Held]) -> Iterator[tuple[str, Held]]:
        """The attributes of this kind, and those in lists, tuples and dicts, with names such as `layers.0`."""
        for name, value in vars(self).items():
            if isinstance(value, kind):  # as most are, so that the others alone take a second generator
                yield name, value
            elif isinstance(value, (list, tuple, dict)):
                yield from _inside(name, value, kind)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly below this one, as (name, module), such as `head`, `layers.0` or `adapters.legal`."""
        return self._held(Module)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module (named `prefix`) and every module below it, with dotted names."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter once, as (dotted name, parameter), even if two modules hold it."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, value in module._held(Parameter):
                if id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter once, frozen ones as well."""
        return (parameter for _, parameter in self.named_parameters())

    def trainable_parameters(self) -> dict[str, Parameter]:
        """The parameters that require a gradient, by name: the argument of an optimizer."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def _find(self, path: str) -> Module | None:
        """The module with this dotted name, or None; only the modules on its path are looked through."""
        if not path:
            return self
        for name, child in self.named_children():
            if f"{path}.".startswith(f"{name}.") and (found := child._find(path[len(name) + 1 :])) is not None:
                return found
        return None

    def get_submodule(self, path: str) -> Module:
        """The module with this dotted name. Raises KeyError if there is none."""
        if (found := self._find(path)) is None:
            raise KeyError(path)
        return found

    def set_submodule(self, path: str, module: Module) -> None:
        """Replace the module with this dotted name: an attribute, or an item of a list, tuple or dict.

        Raises KeyError if there is none, and TypeError for what is no module.
        """
        self.get_submodule(path)
        if not isinstance(module, Module):
            raise TypeError(f"expected a module, of a class derived from ml.Module, got a {type(module).__name__}")
        parent, _, name = path.rpartition(".")
        keys: list[str] = []  # in the lists, tuples and dicts between the module's owner and the module
        while (holder := self._find(parent)) is None:
            keys.insert(0, name)
            parent, _, name = parent.rpartition(".")
        setattr(holder, name, _replaced(getattr(holder, name), keys, module))

    # -- printing ----------------------------------------------------------------------------------------------------
    def summary(self) -> str:
        """The text in a module's brackets when a model is printed: its own parameters and their shapes."""
        own = self._held(Parameter)
        return ", ".join(f"{name} {p.shape}{'' if p.requires_grad else ' frozen'}" for name, p in own)

    def __repr__(self) -> str:
        """The tree below this module. Neighbours in a list with the same text are printed once, with their number."""
        inside, children = [self.summary()] if self.summary() else [], list(self.named_children())
        for (text, _), alike in itertools.groupby(children, key=lambda child: (repr(child[1]), _list_of(child[0]))):
            names = [name for name, _ in alike]
            if len(names) > 1 and _list_of(names[0]):
                inside.append(f"({names[0]} to {names[-1].rpartition('.')[2]}): {len(names)} x {text}")
            else:
                inside += [f"({name}): {text}" for name in names]
        if not children:
            return f"{type(self).__name__}({', '.join(inside)})"
        return f"{type(self).__name__}(\n{textwrap.indent(chr(10).join(inside), '  ')}\n)"

    # -- switches ----------------------------------------------------------------------------------------------------
    def requires_grad_(self, wanted: bool = True) -> Self:
        """Freeze (`False`) or unfreeze (`True`) every parameter below this module; returns the module."""
        for _, parameter in self._held(Parameter):
            parameter.requires_grad = wanted
        for _, child in self.named_children():
            child.requires_grad_(wanted)
        return self

    def train(self, mode: bool = True) -> Self:
        """Switch training behaviour (dropout) on or off for the whole tree; returns the module."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Switch training behaviour off; returns the module."""
        return self.train(False)

    # -- state -------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Array]:
        """Every parameter's array by its dotted name: the model's own arrays, not copies."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Set every parameter from `state`, strictly. Dtypes follow `state`, packed stays packed; shapes must agree.
        The arrays become the model's own: give copies where another model is trained with them. Of torch tensors, the
        memory is used. To set some parameters only: `model.load_state_dict(model.state_dict() | some)`.

        Raises ModelFileError that lists missing, unexpected, misshapen and non-finite tensors, or those of integers,
        before any change; ValueError while an adapter is merged, since unmerging would take the new weights away.
        """
        if any(module.merged for _, module in self.named_modules()):
            raise ValueError("an adapter is merged into the weights: call unmerge_adapter before load_state_dict")
        own, state = dict(self.named_parameters()), {name: Tensor(w).data for name, w in state.items()}
        check_fit(state, {name: p.shape for name, p in own.items()}, "the tensors do not fit this model")
        for name, parameter in own.items():
            parameter.data = state[name]
            if is_packed(parameter.data):
                parameter.requires_grad = False


def _inside(name: str, value: Any, kind: type[Held]) -> Iterator[tuple[str, Held]]:
    if isinstance(value, kind):
        yield name, value
    elif isinstance(value, (list, tuple, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _inside(f"{name}.{key}", item, kind)


def _list_of(name: str) -> str:
    """The name of the list that holds a module with this name; empty if none does."""
    held_in, _, index = name.rpartition(".")
    return held_in if index.isdigit() else ""


def _replaced(value: Any, keys: list[str], module: Module) -> Any:
    """The value of an attribute in which the module with these keys is replaced; a tuple is a new one."""
    if not keys:
        return module
    if isinstance(value, dict):
        key = next(key for key in value if str(key) == keys[0])
        value[key] = _replaced(value[key], keys[1:], module)
        return value
    items, i = list(value), int(keys[0])
    items[i] = _replaced(items[i], keys[1:], module)
    if isinstance(value, tuple):
        return tuple(items)
    value[:] = items
    return value


def computes_as(module: Module, kind: type[Module]) -> bool:
    """Whether calling the module is calling the `forward` of this class: it has no other one, and no hooks."""
    return type(module).forward is kind.forward and "forward" not in vars(module) and not module.forward_hooks


def check_module(model: Any) -> None:
    """Raise TypeError for what is no module, such as another library's model, or the pair that `load` returns."""
    if not isinstance(model, Module):
        raise TypeError(
            f"expected a minilora model, got a {type(model).__name__}: load one, and its tokenizer, with "
            "model, tokenizer = ml.load(FOLDER)"
        )


def sha256_of(arrays: Mapping[str, Array]) -> str:
    """The SHA-256 of names, dtypes, shapes and bytes, in the order of the names: a fingerprint of weights.

    A packed matrix counts as its float32 values. So a model has one fingerprint, packed in memory or not, in one file
    or several, with adapters or without. A file's own SHA-256 would differ for each of these, and could not tell
    whether a model in memory has changed.
    """
    import hashlib  # here, so that `import minilora` is quick

    digest = hashlib.sha256()
    for name in sorted(arrays):
        add_to_hash(digest, name, arrays[name])
    return digest.hexdigest()


def add_to_hash(digest: Any, name: str, w: Array) -> None:
    """Add the next array of `sha256_of`, where they are not in memory together: in the order of their names."""
    digest.update(f"{name} {np.dtype(w.dtype).str} {w.shape}\n".encode())
    rows = max(1, _HASHED // max(1, math.prod(w.shape[1:]))) if w.shape else 1
    for piece in (dense(w, i, i + rows) for i in range(0, len(w), rows)) if w.shape else (w,):
        digest.update(np.ascontiguousarray(to_numpy(piece)).reshape(-1).view(np.uint8).data)

"""The life of an adapter on a model: add, choose, remove. The base model's arrays are never written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from ..engine.backend import Array
from ..nn.layers import Linear
from ..nn.module import Module
from .config import LoraConfig, find_targets
from .layer import LoraLinear, LoraWeights, new_weights


def add_adapter(model: Module, config: LoraConfig, name: str = "default", seed: int = 0) -> list[str]:
    """Freeze the model, put a fresh adapter on every module that `config` selects, and make it the active one.

    Returns the names of the adapted modules. Raises ValueError, before anything is changed, when the name is taken, a
    target matches nothing, or a rank is larger than a matrix.
    """
    weights = plan_adapter(model, config, name, seed)
    install_adapter(model, config, name, weights)
    return list(weights)


def plan_adapter(model: Module, config: LoraConfig, name: str, seed: int = 0) -> dict[str, LoraWeights]:
    """The fresh weights that `add_adapter` would put in place, by module name. The model is not touched."""
    if name in adapter_names(model):
        raise ValueError(f"the model has an adapter called {name!r} already; remove it or choose another name")
    _refuse_merged(model, "adding an adapter")
    if not name or "." in name:
        raise ValueError(f"an adapter's name must be non-empty and without dots, got {name!r}")
    linear = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
    _refuse_tied_head(config, linear)
    rng = np.random.default_rng(seed)
    return {path: new_weights(path, linear[path], config, rng) for path in find_targets(list(linear), config)}


def install_adapter(model: Module, config: LoraConfig, name: str, weights: Mapping[str, LoraWeights]) -> None:
    """Put planned weights in place, freeze the base, and make the adapter the active one."""
    if not adapter_names(model):
        model.requires_grad_(False)
    for path, share in weights.items():
        module = model.get_submodule(path)
        assert isinstance(module, Linear)  # planned from linear layers
        if not isinstance(module, LoraLinear):
            module = LoraLinear(module)
            model.set_submodule(path, module)
        module.adapters[name] = share
    configs_of(model)[name] = config
    set_adapter(model, name)


def set_adapter(model: Module, which: str | Mapping[str, float] | None) -> None:
    """Choose what is active: one adapter by name (it becomes trainable), a weighted mix, or None for the base alone.

    A mix such as {"legal": 0.7, "support": 0.3} adds the weighted updates and is for inference: nothing is trainable.
    Raises ValueError for a name that the model does not have.
    """
    if which is None:
        active: dict[str, float] = {}
    else:
        active = {which: 1.0} if isinstance(which, str) else dict(which)
    check_known(model, active)
    _refuse_merged(model, "choosing another adapter")
    trained = which if isinstance(which, str) else None
    for module in lora_modules(model).values():
        module.active = active
        for name, weights in module.adapters.items():
            weights.requires_grad_(name == trained)


@contextmanager
def disable_adapter(model: Module) -> Iterator[None]:
    """The base model alone inside this block; afterwards what was active (and merged) is so again."""
    modules = lora_modules(model).values()
    before = [(module, module.active, module.unmerged is not None) for module in modules]
    for module in modules:
        module.unmerge()
        module.active = {}
    try:
        yield
    finally:
        for module, active, merged in before:
            module.active = active
            if merged:
                module.merge()


def remove_adapter(model: Module, name: str) -> None:
    """Take an adapter off the model. With the last one gone, the plain layers are back in their places.

    The base stays frozen. Raises ValueError for a name that the model does not have, or while an update is merged.
    """
    check_known(model, [name])
    _refuse_merged(model, "removing an adapter")
    for path, module in lora_modules(model).items():
        module.adapters.pop(name, None)
        module.active = {other: factor for other, factor in module.active.items() if other != name}
        if not module.adapters:
            model.set_submodule(path, module.base_layer())
    del configs_of(model)[name]


def merge_adapter(model: Module) -> None:
    """Add the active update into the weights, so that the model computes as fast as the base and can be exported.

    Merging twice changes nothing. Each adapted matrix exists twice while merged, since the base's own array is kept
    for `unmerge_adapter`. Raises ValueError when no adapter is active.
    """
    modules = lora_modules(model).values()
    if not any(module.parts() for module in modules):
        raise ValueError("no adapter is active, so there is nothing to merge: choose one with set_adapter")
    for module in modules:
        module.merge()


def unmerge_adapter(model: Module) -> None:
    """Undo `merge_adapter`: the base's weights are back, bit for bit. Without a merge, nothing changes."""
    for module in lora_modules(model).values():
        module.unmerge()


def is_merged(model: Module) -> bool:
    """Is an update added into the weights at the moment?"""
    return any(module.unmerged is not None for module in lora_modules(model).values())


def lora_modules(model: Module) -> dict[str, LoraLinear]:
    """The modules that carry adapters, by name."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_names(model: Module) -> list[str]:
    """The names of the model's adapters, in the order in which they came."""
    return list(configs_of(model))


def configs_of(model: Module) -> dict[str, LoraConfig]:
    """The model's own record of its adapters: LoraConfig by name."""
    return vars(model).setdefault("adapter_configs", {})


def adapter_state(model: Module, name: str) -> dict[str, Array]:
    """One adapter's arrays by `<module>.lora_A` and `<module>.lora_B`: the model's own, not copies."""
    return {
        f"{path}.{key}": parameter.data
        for path, module in lora_modules(model).items()
        if name in module.adapters
        for key, parameter in module.adapters[name].named_parameters()
    }


def base_state(model: Module) -> dict[str, Array]:
    """The base model's arrays by name, without any adapter's: what must not change."""
    state = {name: array for name, array in model.state_dict().items() if ".adapters." not in name}
    for path, module in lora_modules(model).items():
        if module.unmerged is not None:
            state[f"{path}.weight"] = module.unmerged
    return state


def check_known(model: Module, names: Iterable[str]) -> None:
    """Raise ValueError, listing what there is, for a name that no adapter of the model has."""
    known = adapter_names(model)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"the model has no adapter called {unknown[0]!r}; it has: {', '.join(known) or 'none'}")


def _refuse_merged(model: Module, what: str) -> None:
    if is_merged(model):
        raise ValueError(f"an adapter is merged into the weights: call unmerge_adapter before {what}")


def _refuse_tied_head(config: LoraConfig, linear: Mapping[str, Linear]) -> None:
    wanted = config.target_modules
    if "lm_head" not in linear and not isinstance(wanted, str) and "lm_head" in wanted:
        raise ValueError(
            "lm_head shares its matrix with the input embedding in this model, so it cannot be adapted alone: "
            "leave 'lm_head' out of target_modules"
        )

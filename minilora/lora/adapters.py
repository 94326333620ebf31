"""Adapters of a model: add, choose, merge and remove them. The base model's arrays are never written to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..engine.backend import Array, to_numpy
from ..nn.layers import Embedding, Linear
from ..nn.module import Module, Parameter, check_module
from ..progress import log
from .config import ALL_LINEAR, LoraConfig, can_be_scaled, find_targets
from .layer import Factor, LoraLinear, LoraWeights, new_weights

_FORWARDS = {Linear.forward, LoraLinear.forward}

Choice = str | Mapping[str, float] | None  # an adapter, a weighted combination, or None for the base alone


@dataclass
class Adapter:
    """What a model stores about one of its adapters, in `model.adapters["legal"]`.

    config: its hyperparameters.
    record: the contents of the `adapter_config.json` that it was loaded from.
    data: what it was trained on, if its folder says so.
    folder: where it was loaded from or saved last.
    factor: the factor of its update, if it is active; otherwise None.

    Its weights are in the adapted modules: see `adapter_weights`.
    """

    config: LoraConfig
    record: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    factor: Factor | None = None

    def __repr__(self) -> str:
        factor = self.factor
        state = "off" if factor is None else "in a mixed batch" if isinstance(factor, tuple) else f"active x {factor:g}"
        return f"<{state}: {self.config}>"


def add_adapter(model: Module, config: LoraConfig, name: str = "default", seed: int = 0) -> list[str]:
    """Freeze the base, add a new adapter to every module that `config` selects, and make it the active one.

    model: any `Module`. Its `Linear` layers can be adapted.
    config: rank, scale, target modules and variant.
    name: the adapter's name; it must be new and without dots.
    seed: of the random initialisation.

    Returns the names of the adapted modules. Raises ValueError, before anything is changed, if the name is taken, a
    target matches nothing, is an embedding or has its own `forward`, or a rank is too large for a matrix; TypeError
    for another config, such as PEFT's.
    """
    weights = plan_adapter(model, config, name, seed)
    install_adapter(model, config, name, weights)
    return list(weights)


def plan_adapter(
    model: Module, config: LoraConfig, name: str, seed: int = 0, any_rank: bool = False
) -> dict[str, LoraWeights]:
    """The new weights that `add_adapter` would install, by module name. The model is not changed.

    any_rank: allow a rank above that of a matrix, which adapters in files may have: PiSSA's is doubled there.
    """
    refuse_new(model, name)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"expected a minilora.LoraConfig, got {type(config).__module__}.{type(config).__qualname__}")
    modules = {path: module for path, module in base_modules(model) if path}  # no module can replace the model itself
    linear = {path: module for path, module in modules.items() if isinstance(module, Linear)}
    _refuse_tied_head(config, linear)
    if not linear:
        needed = "an adapter needs a module with attributes that are minilora.Linear layers"
        raise ValueError(f"{type(model).__name__} has no layer that can be adapted: {needed}")
    tables = [path for path, module in modules.items() if isinstance(module, Embedding)]
    targets = find_targets([*linear, *(tables if config.target_modules != ALL_LINEAR else [])], config)
    for path in targets:
        if path in tables:
            raise ValueError(f"{path} is an embedding, which gets no adapter: leave it out of target_modules")
        kind = type(linear[path])
        if kind.forward not in _FORWARDS or "forward" in vars(linear[path]):
            raise ValueError(
                f"{path} is a {kind.__name__} with its own forward, which an adapter would replace: derive the "
                "class from minilora.Module, with a Linear layer as an attribute, or name it in exclude_modules"
            )
    for pattern in config.unused_patterns(targets, list(modules)):
        log.warning("%s matches no module that gets an adapter, and changes nothing", pattern)
    try:
        rng = np.random.default_rng(seed)
    except (TypeError, ValueError):
        raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}") from None
    return {path: new_weights(path, linear[path], config, rng, any_rank) for path in targets}


def install_adapter(
    model: Module,
    config: LoraConfig,
    name: str,
    weights: Mapping[str, LoraWeights],
    record: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> None:
    """Install weights of `plan_adapter`, freeze the base, and make the adapter the active one.

    record, data, folder: what is known about the adapter's files (see `Adapter`).
    """
    modules = dict(base_modules(model))
    _freeze(modules.values())
    for path, own in weights.items():
        place = modules[path]
        if not isinstance(place, LoraLinear):
            place = LoraLinear(cast(Linear, place))
            model.set_submodule(path, place)
        place.adapters[name] = own
        own.train(place.training)
    model.adapters = {**model.adapters, name: Adapter(config, record or {}, data or {}, folder)}
    set_adapter(model, name)


def _freeze(modules: Iterable[Module]) -> None:
    """Freeze the parameters that these modules hold themselves: the base's, without looking through every adapter."""
    for module in modules:
        for _, parameter in module._held(Parameter):
            parameter.requires_grad, parameter.grad = False, None


def set_adapter(model: Module, which: Choice) -> None:
    """Choose the active adapter by name, a weighted combination of several, or None for the base alone.

    A single adapter becomes trainable. A combination such as {"legal": 0.7, "support": 0.3} adds the weighted updates
    and is for inference only: no adapter is trainable. Raises ValueError for an unknown name, or while an update is
    merged.
    """
    factors = factors_of(which)
    check_known(model, factors)
    refuse_merged(model, "choosing another adapter")
    modules, before = list(lora_modules(model).values()), active_factors(model)
    activate(model, {name: float(factor) for name, factor in factors.items()}, modules)
    for name in model.adapters:
        if name == which or name in before or _is_trainable(modules, name):  # a few of a thousand
            for weights in _weights_of(modules, name):
                weights.requires_grad_(name == which)


def _weights_of(modules: Iterable[LoraLinear], name: str) -> Iterator[LoraWeights]:
    return (module.adapters[name] for module in modules if name in module.adapters)


def _is_trainable(modules: Sequence[LoraLinear], name: str) -> bool:
    """Whether an adapter is trainable in the first or the last module that it has. Others may be frozen by hand."""
    ends = (next(_weights_of(ordered, name), None) for ordered in (modules, reversed(modules)))
    return any(own is not None and (own.lora_A.requires_grad or own.lora_B.requires_grad) for own in ends)


def scale_adapter(model: Module, name: str, factor: float) -> None:
    """Multiply an adapter's update by `factor`, in its own weights: B becomes factor · B. The base does not change.

    A factor below 1 interpolates between base and adapter: the model loses little of what it learned and forgets much
    less (Wortsman et al. 2022, arXiv 2109.01903, for whole models). Raises ValueError, before anything is changed, for
    an unknown name, a factor that is not finite, an adapter with DoRA or PiSSA, or while an update is merged.
    """
    check_known(model, [name])
    refuse_merged(model, "scaling an adapter")
    if not isinstance(factor, Real) or not math.isfinite(factor):
        raise ValueError(f"factor must be a finite number, got {factor!r}")
    own = adapter_weights(model, name)
    if not can_be_scaled(vars(model.adapters[name].config)):
        raise ValueError(
            f"adapter {name!r} has DoRA or PiSSA, and only a plain LoRA can be scaled: leave out strength, or use "
            f"set_adapter(model, {{{name!r}: {factor:g}}})"
        )
    for weights in {id(weights): weights for weights in own.values()}.values():  # each once
        weights.lora_B.data *= factor


def activate(model: Module, factors: Mapping[str, Factor], modules: Iterable[LoraLinear] | None = None) -> None:
    """Make exactly these adapters active, each with its factor. Unlike `set_adapter`, change nothing else.

    modules: the adapted ones, if they are known already.
    """
    for name, adapter in model.adapters.items():
        adapter.factor = factors.get(name)
    active = active_factors(model)
    for module in lora_modules(model).values() if modules is None else modules:
        module.active = active


def active_factors(model: Module) -> dict[str, Factor]:
    """The active adapters, each with its factor, in the order in which they were added."""
    check_module(model)
    return {name: adapter.factor for name, adapter in model.adapters.items() if adapter.factor is not None}


class disable_adapter:
    """Switch every adapter off, so that the model computes what the base does, bit for bit.

        with ml.disable_adapter(model): ...     # off inside the block; afterwards as before, whatever it chooses
        ml.disable_adapter(model)               # off until `set_adapter` chooses one

    Trainable parameters stay trainable, and get no gradient while the adapter is off.
    """

    def __init__(self, model: Module):
        self.before = Remembered(model)
        unmerge_adapter(model)
        activate(model, {})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.before.restore()


class Remembered:
    """Which adapters are active, trainable and merged, to restore that, whatever is chosen, added or removed since."""

    def __init__(self, model: Module):
        self.model, self.active, self.modules = model, active_factors(model), [*lora_modules(model).values()]
        self.merged = any(module.merged for module in self.modules)
        of_active = [own for name in self.active for own in _weights_of(self.modules, name)]
        self.trainable = {p: p.requires_grad for own in of_active for p in own.parameters()}

    def restore(self) -> None:
        """Make the adapters active, trainable and merged as they were. One that was removed is left out."""
        try:
            self._restore()
        except KeyboardInterrupt:
            self._restore()
            raise

    def _restore(self) -> None:
        modules, chosen = list(lora_modules(self.model).values()), active_factors(self.model)
        for module in modules:
            module.unmerge()
        activate(self.model, self.active, modules)
        for name, factor in chosen.items():  # by `set_adapter`, which makes it trainable; a mixed batch does not
            if name not in self.active and isinstance(factor, float) and _is_trainable(modules, name):
                for weights in _weights_of(modules, name):
                    weights.requires_grad_(False)
        for parameter, wanted in self.trainable.items():
            if parameter.requires_grad != wanted:
                parameter.requires_grad = wanted
        if self.merged and active_factors(self.model):
            merge_adapter(self.model)


def remove_adapter(model: Module, name: str) -> None:
    """Remove an adapter from the model. Removing the last one restores the plain layers.

    The base stays frozen. Raises ValueError for an unknown name, or while an update is merged.
    """
    check_known(model, [name])
    refuse_merged(model, "removing an adapter")
    for path, module in lora_modules(model).items():
        module.adapters.pop(name, None)
        if not module.adapters:
            model.set_submodule(path, module.base_layer())
    model.adapters = {other: adapter for other, adapter in model.adapters.items() if other != name}
    activate(model, active_factors(model))


def merge_adapter(model: Module) -> None:
    """Add the active update to the weights, so that the model is as fast as the base and can be exported.

    Merging twice has no further effect. While merged, each adapted matrix exists twice, because `unmerge_adapter`
    needs the base's own array. Raises ValueError if no adapter is active, in a mixed batch, or if an adapted matrix
    belongs to another module as well.
    """
    if not _one_update(model):
        raise ValueError("nothing to merge, because no adapter is active: choose one with set_adapter")
    _refuse_shared(model)
    for module in lora_modules(model).values():
        module.merge()


def unmerge_adapter(model: Module) -> None:
    """Undo `merge_adapter`, which restores the base's weights bit for bit. Without a merge, do nothing."""
    for module in lora_modules(model).values():
        module.unmerge()


def is_merged(model: Module) -> bool:
    """Whether an update is merged into the weights."""
    return any(module.merged for module in lora_modules(model).values())


def delta_weight(model: Module, module: str, name: str | None = None) -> Array:
    """What an adapter adds to the weight of one module, as a matrix of the weight's shape: scale · B A, (m, n).

    module: the module's name, such as "model.layers.0.self_attn.q_proj".
    name: of the adapter, active or not. If left out, the matrix is what `merge_adapter` would add.

    The matrix is zero if the module has no such adapter. For DoRA and PiSSA it is what they add to the base's
    weight. PEFT calls this `get_delta_weight`.

    Raises ValueError for a module without adapters, an unknown name, or a mixed batch without a name.
    """
    check_known(model, [] if name is None else [name])
    modules = lora_modules(model)
    if module not in modules:
        known = ", ".join(modules) or "none"
        raise ValueError(f"no module called {module!r} has an adapter; modules that have one: {known}")
    return modules[module].delta_weight(_one_update(model) if name is None else {name: 1.0})


def lora_modules(model: Module) -> dict[str, LoraLinear]:
    """The modules with adapters, by name."""
    check_module(model)
    return {path: module for path, module in base_modules(model) if isinstance(module, LoraLinear)}


def base_modules(module: Module, path: str = "") -> Iterator[tuple[str, Module]]:
    """Like `named_modules` without the adapters' own modules, so that the time does not grow with their number."""
    yield path, module
    if not isinstance(module, LoraLinear):
        for name, child in module.named_children():
            yield from base_modules(child, f"{path}.{name}" if path else name)


def adapter_weights(model: Module, name: str) -> dict[str, LoraWeights]:
    """One adapter's weights, by module name. Raises ValueError for an unknown adapter."""
    check_known(model, [name])
    return {path: module.adapters[name] for path, module in lora_modules(model).items() if name in module.adapters}


def factors_for(program: str, model: Module, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A (r, n) and B (m, r) of every module of an adapter, for the files of another program.

    PiSSA's update has twice the rank here, because the program adds it to the unchanged base. Raises ValueError for an
    unknown name, and for what such files cannot hold.
    """
    pairs = {}
    for path, weights in adapter_weights(model, name).items():
        if weights.lora_magnitude_vector is not None:
            what = "DoRA's magnitudes"
            raise ValueError(f"{path}: {program}'s adapter files cannot hold {what}: merge the adapter instead")
        a, b = weights.factors()
        pairs[path] = to_numpy(a), to_numpy(b)
    return pairs


def adapter_state(model: Module, name: str) -> dict[str, Array]:
    """One adapter's arrays, named `<module>.lora_A`, `<module>.lora_B` and so on. They are the model's own, not copies.

    Raises ValueError for an unknown name.
    """
    return {
        f"{path}.{key}": parameter.data
        for path, weights in adapter_weights(model, name).items()
        for key, parameter in weights.named_parameters()
    }


def base_state(model: Module) -> dict[str, Array]:
    """The base model's own arrays by name, without those of adapters. Quantised ones stay quantised."""
    state = _without_adapters(model)
    for path, module in lora_modules(model).items():
        if module.unmerged is not None and f"{path}.weight" in state:  # one with two names has it under the first
            state[f"{path}.weight"] = module.unmerged
    return state


def merged_state(model: Module) -> dict[str, Array]:
    """The arrays of a merged model under a checkpoint's names, for export. Raises ValueError if nothing is merged."""
    if not is_merged(model):
        raise ValueError("nothing is merged into the weights: call merge_adapter first")
    return _without_adapters(model)


def _without_adapters(model: Module) -> dict[str, Array]:
    check_module(model)
    return {name: array for name, array in model.state_dict().items() if ".adapters." not in name}


def factors_of(choice: Choice) -> Mapping[str, float]:
    """A choice as factors by adapter name.

    Raises TypeError for anything else, such as PEFT's list of names, and ValueError for a factor that is not finite.
    """
    if not isinstance(choice, str | Mapping | None):
        raise TypeError(f"expected an adapter's name, weights such as {{'legal': 0.5}}, or None, got {choice!r}")
    if isinstance(choice, Mapping) and not all(isinstance(x, Real) and math.isfinite(x) for x in choice.values()):
        raise ValueError(f"expected a finite number for each adapter, got {choice!r}")
    return {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice


def same_of_all(model: Any, choice: Choice, read: Callable[[Mapping[str, Any]], Any], alone: Any) -> Any:
    """What `read` finds in the entry "data" of every adapter of a choice; None if they differ.

    alone: the result for the base alone.
    """
    adapters = [model.adapters[name] for name in factors_of(choice) if name in model.adapters]
    found = {read(adapter.data) for adapter in adapters} or {alone}
    return found.pop() if len(found) == 1 else None


def check_known(model: Module, names: Iterable[str]) -> None:
    """Raise ValueError, with a list of the model's adapters, for an unknown name."""
    check_module(model)
    if unknown := [name for name in names if name not in model.adapters]:
        known = ", ".join(model.adapters) or "none"
        raise ValueError(f"the model has no adapter called {unknown[0]!r}; it has: {known}")


def _one_update(model: Module) -> dict[str, float]:
    """The active adapters, each with its one factor for all rows."""
    active = active_factors(model)
    one = {name: factor for name, factor in active.items() if isinstance(factor, float)}
    if len(one) < len(active):
        raise ValueError(
            "each row of a mixed batch has its own adapter, so there is no single update: leave the mixed_batch block"
        )
    return one


def refuse_new(model: Module, name: str) -> None:
    """Raise ValueError unless a new adapter with this name could be added now."""
    check_module(model)
    if name in model.adapters:
        raise ValueError(f"the model already has an adapter called {name!r}: remove it, or choose another name")
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"an adapter's name must be a non-empty text without dots, got {name!r}")
    refuse_merged(model, "adding an adapter")


def refuse_merged(model: Module, what: str) -> None:
    """Raise ValueError while an update is merged into the weights. what: the action that is refused."""
    if is_merged(model):
        raise ValueError(f"an adapter is merged into the weights: call unmerge_adapter before {what}")


def _refuse_shared(model: Module) -> None:
    """Raise ValueError if an update would be merged into a parameter that another module holds, too."""
    held: dict[int, tuple[str, Module]] = {}
    for path, module in base_modules(model):
        for name, parameter in module._held(Parameter):
            other, first = held.setdefault(id(parameter), (path, module))
            changed = (isinstance(each, LoraLinear) and each.active_adapters() for each in (first, module))
            if module is not first and any(changed):
                raise ValueError(
                    f"{other or 'the model'} and {path} share one {name}, and merging would change both: use the "
                    "adapter without merging it, or give each its own"
                )


def _refuse_tied_head(config: LoraConfig, linear: Mapping[str, Linear]) -> None:
    wanted = config.target_modules
    if "lm_head" not in linear and not isinstance(wanted, str) and "lm_head" in wanted:
        raise ValueError(
            "lm_head shares its matrix with the input embedding in this model and cannot be adapted alone: leave "
            "'lm_head' out of target_modules"
        )

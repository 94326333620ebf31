"""The life of an adapter on a model: add, choose, remove. The base model's arrays are never written to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.backend import Array
from ..nn.layers import Embedding, Linear
from ..nn.module import Module
from .config import ALL_LINEAR, LoraConfig, find_targets
from .layer import EmbeddingWeights, Factor, LoraEmbedding, LoraLayer, LoraLinear, LoraWeights, new_weights

Choice = str | Mapping[str, float] | None  # an adapter, a weighted mix of several, or None for the base alone


@dataclass
class Adapter:
    """What a model knows of one of its adapters: `model.adapters["legal"]`.

    config: its settings. record: what the PEFT file said that it was loaded from. data: what it was trained on, as far
    as its folder says. factor: how much of its update takes part at the moment; None when it does not. Its weights are
    in the modules that carry it (`adapter_weights`).
    """

    config: LoraConfig
    record: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    factor: Factor | None = None

    def __repr__(self) -> str:
        factor = self.factor
        state = "off" if factor is None else f"active x {factor:g}" if isinstance(factor, float) else "in a mixed batch"
        return f"<{state}: {self.config}>"


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
    refuse_new(model, name)
    modules = dict(_modules(model, ""))
    linear = {path: module for path, module in modules.items() if isinstance(module, Linear)}
    _refuse_tied_head(config, linear)
    candidates: dict[str, Linear | Embedding] = dict(linear)
    if config.target_modules != ALL_LINEAR:
        candidates |= {path: module for path, module in modules.items() if isinstance(module, Embedding)}
    targets = find_targets(list(candidates), config)
    _refuse_other_biases(config, linear, targets)
    rng = np.random.default_rng(seed)
    return {path: new_weights(path, candidates[path], config, rng) for path in targets}


def install_adapter(
    model: Module,
    config: LoraConfig,
    name: str,
    weights: Mapping[str, LoraWeights],
    record: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Put planned weights in place, freeze the base, and make the adapter the active one.

    record, data: what its folder said of it (`Adapter`). Raises ValueError, before anything is changed, for a name that
    is taken, while an update is merged, or for weights of another kind than the module or `config` asks for.
    """
    refuse_new(model, name)
    modules = dict(_modules(model, ""))
    for path, own in weights.items():
        _refuse_misfit(path, modules[path], config, own)
    if not model.adapters:
        model.requires_grad_(False)
    for path, own in weights.items():
        module = modules[path]
        if isinstance(module, LoraLayer):
            place = module
        elif isinstance(module, Embedding):
            place = LoraEmbedding(module, tied=_is_tied(model))
            model.set_submodule(path, place)
        else:
            assert isinstance(module, Linear)  # _refuse_misfit let nothing else through
            place = LoraLinear(module)
            model.set_submodule(path, place)
        place.adapters[name] = own
        own.train(place.training)
    model.adapters = {**model.adapters, name: Adapter(config, record or {}, data or {})}
    set_adapter(model, name)


def set_adapter(model: Module, which: Choice) -> None:
    """Choose what is active: one adapter by name (it becomes trainable), a weighted mix, or None for the base alone.

    A mix such as {"legal": 0.7, "support": 0.3} adds the weighted updates and is for inference: nothing is trainable.
    Raises ValueError for a name that the model does not have, or while an update is merged.
    """
    factors = factors_of(which)
    check_known(model, factors)
    refuse_merged(model, "choosing another adapter")
    modules = lora_modules(model).values()
    let_take_part(model, modules, {name: float(factor) for name, factor in factors.items()})
    for name in model.adapters:
        own = (module.adapters[name] for module in modules if name in module.adapters)
        if (first := next(own, None)) is None:
            continue
        if name == which or first.lora_A.requires_grad or first.lora_B.requires_grad:  # of a thousand, two at most
            for weights in (first, *own):
                weights.requires_grad_(name == which)


def scale_adapter(model: Module, name: str, factor: float) -> None:
    """Multiply an adapter's update by `factor`, in its own weights: B becomes factor · B. The base stays as it is.

    A factor below 1 goes a part of the way back to the base: it gives up little of what was learned and forgets much
    less (Wortsman et al. 2022, arXiv 2109.01903, for whole models). Raises ValueError, before anything is changed, for
    a name that the model does not have, a factor that is no finite number, an adapter that is no plain LoRA (DoRA,
    PiSSA or a bias), or while an update is merged.
    """
    check_known(model, [name])
    refuse_merged(model, "scaling an adapter")
    if not math.isfinite(factor):
        raise ValueError(f"factor must be a finite number, got {factor}")
    own = adapter_weights(model, name).values()
    if not all(weights.is_plain for weights in own):
        raise ValueError(
            f"adapter {name!r} is no plain LoRA (DoRA, PiSSA or a bias), whose update alone could be scaled: leave out "
            "strength, or give set_adapter a factor"
        )
    for weights in own:
        weights.lora_B.data *= factor


def activate(model: Module, factors: Mapping[str, Factor]) -> None:
    """Let exactly these adapters take part, each with its factor, in the order in which the model got them.

    What is trainable stays as it is: `set_adapter` is what a user wants.
    """
    let_take_part(model, lora_modules(model).values(), factors)


def let_take_part(model: Module, modules: Iterable[LoraLayer], factors: Mapping[str, Factor]) -> None:
    """`activate` for who knows the modules that carry adapters already: they need not be looked for."""
    for name, adapter in model.adapters.items():
        adapter.factor = factors.get(name)
    active = active_factors(model)
    for module in modules:
        module.active = active


def active_factors(model: Module) -> dict[str, Factor]:
    """The adapters that take part at the moment, each with its factor."""
    return {name: adapter.factor for name, adapter in model.adapters.items() if adapter.factor is not None}


class disable_adapter:
    """Switch every adapter off: the model is its base alone, to the last bit.

        with ml.disable_adapter(model): ...     # off inside the block; then all is as it was before, merged or not
        ml.disable_adapter(model)               # off from here on, until `set_adapter` chooses one

    What is trainable stays so, and gets no gradient while it is off.
    """

    def __init__(self, model: Module):
        self.model, self.before, self.merged = model, active_factors(model), is_merged(model)
        unmerge_adapter(model)
        activate(model, {})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        activate(self.model, self.before)
        if self.merged:
            merge_adapter(self.model)


def remove_adapter(model: Module, name: str) -> None:
    """Take an adapter off the model. With the last one gone, the plain layers are back in their places.

    The base stays frozen. Raises ValueError for a name that the model does not have, or while an update is merged.
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
    """Add the active update into the weights, so that the model computes as fast as the base and can be exported.

    Merging twice changes nothing. Each adapted matrix exists twice while merged, since the base's own array is kept
    for `unmerge_adapter`. Raises ValueError when no adapter is active, or in a mixed batch.
    """
    if not _one_update(model):
        raise ValueError("no adapter is active, so there is nothing to merge: choose one with set_adapter")
    for module in lora_modules(model).values():
        module.merge()


def unmerge_adapter(model: Module) -> None:
    """Undo `merge_adapter`: the base's weights are back, bit for bit. Without a merge, nothing changes."""
    for module in lora_modules(model).values():
        module.unmerge()


def is_merged(model: Module) -> bool:
    """Is an update added into the weights at the moment?"""
    return any(module.unmerged is not None for module in lora_modules(model).values())


def delta_weight(model: Module, module: str, name: str | None = None) -> Array:
    """What one adapter adds to the weight of one module, as a matrix of the weight's shape: scale · B A, (m, n).

    module: its name, such as "model.layers.0.self_attn.q_proj"; zero where it does not carry the adapter. name: which
    adapter, whether active or not; without a name, what `merge_adapter` would add. For an embedding the shape is
    (V, C). DoRA's and PiSSA's are what they add to the base's weight. PEFT calls it `get_delta_weight`.

    Raises ValueError for a module that carries no adapter, a name that the model does not have, or without a name in a
    mixed batch.
    """
    check_known(model, [] if name is None else [name])
    modules = lora_modules(model)
    if module not in modules:
        raise ValueError(
            f"no module called {module!r} carries an adapter; those that do: {', '.join(modules) or 'none'}"
        )
    return modules[module].delta_weight(_one_update(model) if name is None else {name: 1.0})


def lora_modules(model: Module) -> dict[str, LoraLayer]:
    """The modules that carry adapters, LoraLinear or LoraEmbedding, by name."""
    return {path: module for path, module in _modules(model, "") if isinstance(module, LoraLayer)}


def _modules(module: Module, path: str) -> Iterator[tuple[str, Module]]:
    """Like `named_modules`, but not into what carries adapters: the time does not grow with the number of adapters."""
    yield path, module
    if not isinstance(module, LoraLayer):
        for name, child in module.named_children():
            yield from _modules(child, f"{path}.{name}" if path else name)


def adapter_weights(model: Module, name: str) -> dict[str, LoraWeights]:
    """One adapter's weights by the name of the module that carries them.

    Raises ValueError for a name that the model does not have.
    """
    check_known(model, [name])
    return {path: module.adapters[name] for path, module in lora_modules(model).items() if name in module.adapters}


def adapter_state(model: Module, name: str) -> dict[str, Array]:
    """One adapter's arrays by `<module>.lora_A`, `<module>.lora_B` and so on: the model's own, not copies.

    Raises ValueError for a name that the model does not have.
    """
    return {
        f"{path}.{key}": parameter.data
        for path, weights in adapter_weights(model, name).items()
        for key, parameter in weights.named_parameters()
    }


def base_state(model: Module) -> dict[str, Array]:
    """The base model's arrays by name, packed ones as they are, without any adapter's: what must not change."""
    state = _without_adapters(model)
    for path, module in lora_modules(model).items():
        if module.unmerged is not None:
            state[f"{path}.weight"] = module.unmerged
        if module.unmerged_bias is not None:
            state[f"{path}.bias"] = module.unmerged_bias
    return state


def merged_state(model: Module) -> dict[str, Array]:
    """The arrays of a merged model under a checkpoint's names: what an export writes. Raises ValueError if not merged.

    An adapter on a tied embedding changes the lookup and not the head. The two are no longer one matrix then, and the
    state has an `lm_head.weight`: a checkpoint of it must say `tie_word_embeddings: false`.
    """
    if not is_merged(model):
        raise ValueError("nothing is merged into the weights: call merge_adapter first")
    state = _without_adapters(model)
    for path, module in lora_modules(model).items():
        if isinstance(module, LoraEmbedding) and module.merged_weight is not None:
            state["lm_head.weight"] = state[f"{path}.weight"]
            state[f"{path}.weight"] = module.merged_weight.data
    return state


def _without_adapters(model: Module) -> dict[str, Array]:
    foreign = (".adapters.", ".merged_weight")
    return {name: array for name, array in model.state_dict().items() if not any(part in name for part in foreign)}


def factors_of(choice: Choice) -> Mapping[str, float]:
    """A choice as the adapters that take part, each with its factor."""
    return {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice


def check_known(model: Module, names: Iterable[str]) -> None:
    """Raise ValueError, listing what there is, for a name that no adapter of the model has."""
    if unknown := [name for name in names if name not in model.adapters]:
        known = ", ".join(model.adapters) or "none"
        raise ValueError(f"the model has no adapter called {unknown[0]!r}; it has: {known}")


def _one_update(model: Module) -> dict[str, float]:
    """The active adapters, each with the one factor that it has for all rows."""
    active = active_factors(model)
    one = {name: factor for name, factor in active.items() if isinstance(factor, float)}
    if len(one) < len(active):
        raise ValueError(
            "each row of a mixed batch has its own adapter: leave mixed_batch before asking for one update"
        )
    return one


def refuse_new(model: Module, name: str) -> None:
    """Raise ValueError unless a new adapter of this name could be added now."""
    if name in model.adapters:
        raise ValueError(f"the model has an adapter called {name!r} already; remove it or choose another name")
    if not name or "." in name:
        raise ValueError(f"an adapter's name must be non-empty and without dots, got {name!r}")
    refuse_merged(model, "adding an adapter")


def refuse_merged(model: Module, what: str) -> None:
    """Raise ValueError, saying what cannot be done, while an update is merged into the weights."""
    if is_merged(model):
        raise ValueError(f"an adapter is merged into the weights: call unmerge_adapter before {what}")


def _refuse_tied_head(config: LoraConfig, linear: Mapping[str, Linear]) -> None:
    wanted = config.target_modules
    if "lm_head" not in linear and not isinstance(wanted, str) and "lm_head" in wanted:
        raise ValueError(
            "lm_head shares its matrix with the input embedding in this model, so it cannot be adapted alone: "
            "leave 'lm_head' out of target_modules"
        )


def _refuse_other_biases(config: LoraConfig, linear: Mapping[str, Linear], targets: Iterable[str]) -> None:
    """An adapter owns what it trains, so that the base never moves; it can own a bias only where it has weights."""
    others = [path for path, module in linear.items() if module.bias is not None and path not in targets]
    if config.bias == "all" and others:
        raise ValueError(
            f"bias='all' would train the bias of {others[0]}, which gets no adapter: name it in target_modules, "
            "or use bias='lora_only'"
        )


def _refuse_misfit(path: str, module: Module, config: LoraConfig, weights: LoraWeights) -> None:
    kind = Embedding if isinstance(weights, EmbeddingWeights) else Linear
    if not isinstance(module, kind):
        raise ValueError(f"{path} is no {kind.__name__}: these adapter weights are for another kind of module")
    for setting, asked, has in (
        ("use_dora", config.use_dora, weights.lora_magnitude_vector is not None),
        ("init_lora_weights='pissa'", config.init_lora_weights == "pissa", weights.start is not None),
    ):
        if asked != has:
            raise ValueError(
                f"{path}: the settings {'ask' if asked else 'do not ask'} for {setting}, the weights differ"
            )


def _is_tied(model: Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))

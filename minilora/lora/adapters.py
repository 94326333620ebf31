"""The life of an adapter on a model: add, choose, remove. The base model's arrays are never written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from ..engine.backend import Array, array_module
from ..nn.layers import Embedding, Linear
from ..nn.module import Module
from .config import ALL_LINEAR, LoraConfig, find_targets
from .layer import EmbeddingWeights, LoraEmbedding, LoraLayer, LoraLinear, LoraWeights, new_weights


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
    candidates: dict[str, Linear | Embedding] = dict(linear)
    if config.target_modules != ALL_LINEAR:
        candidates |= {path: module for path, module in model.named_modules() if isinstance(module, Embedding)}
    targets = find_targets(list(candidates), config)
    _refuse_other_biases(config, linear, targets)
    rng = np.random.default_rng(seed)
    return {path: new_weights(path, candidates[path], config, rng) for path in targets}


def install_adapter(model: Module, config: LoraConfig, name: str, weights: Mapping[str, LoraWeights]) -> None:
    """Put planned weights in place, freeze the base, and make the adapter the active one.

    Raises ValueError, before anything is changed, for weights of another kind than the module or `config` asks for.
    """
    modules = dict(model.named_modules())
    for path, share in weights.items():
        _refuse_misfit(path, modules[path], config, share)
    if not adapter_names(model):
        model.requires_grad_(False)
    for path, share in weights.items():
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
        place.adapters[name] = share
        share.train(place.training)
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
        active = {which: 1.0} if isinstance(which, str) else {name: float(factor) for name, factor in which.items()}
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


@contextmanager
def mixed_batch(model: Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside this block, row i of every batch (B, T) is computed with adapter `names[i]`, or None for the base alone.

    Each adapter's thin products run over the whole batch, with a factor of 0 or 1 for each row: little beside the
    frozen products, which all rows share. For calling the model and its loss; generation drops finished rows and needs
    one adapter. Raises ValueError for an unknown name or while an update is merged.
    """
    check_known(model, {name for name in names if name is not None})
    _refuse_merged(model, "mixing adapters in a batch")
    modules = lora_modules(model).values()
    before = [module.active for module in modules]
    divides = vars(model).get("divides", False)
    vars(model)["divides"] = False  # row i means names[i] only while all rows are together
    for module in modules:
        weight = module.weight.data
        xp = array_module(weight)
        module.active = {
            name: xp.asarray([[[other == name]] for other in names], dtype=weight.dtype)  # (B, 1, 1)
            for name in module.adapters
            if name in names
        }
    try:
        yield
    finally:
        vars(model)["divides"] = divides
        for module, active in zip(modules, before, strict=True):
            module.active = active


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


def lora_modules(model: Module) -> dict[str, LoraLayer]:
    """The modules that carry adapters, LoraLinear or LoraEmbedding, by name."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_names(model: Module) -> list[str]:
    """The names of the model's adapters, in the order in which they came."""
    return list(configs_of(model))


def configs_of(model: Module) -> dict[str, LoraConfig]:
    """The model's own record of its adapters: LoraConfig by name."""
    return vars(model).setdefault("adapter_configs", {})


def adapter_state(model: Module, name: str) -> dict[str, Array]:
    """One adapter's arrays by `<module>.lora_A`, `<module>.lora_B` and so on: the model's own, not copies."""
    return {
        f"{path}.{key}": parameter.data
        for path, module in lora_modules(model).items()
        if name in module.adapters
        for key, parameter in module.adapters[name].named_parameters()
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


def _refuse_other_biases(config: LoraConfig, linear: Mapping[str, Linear], targets: Iterable[str]) -> None:
    """An adapter owns what it trains, so that the base never moves; it can own a bias only where it has weights."""
    others = [path for path, module in linear.items() if module.bias is not None and path not in targets]
    if config.bias == "all" and others:
        raise ValueError(
            f"bias='all' would train the bias of {others[0]}, which gets no adapter: name it in target_modules, "
            "or use bias='lora_only'"
        )


def _refuse_misfit(path: str, module: Module, config: LoraConfig, share: LoraWeights) -> None:
    kind = Embedding if isinstance(share, EmbeddingWeights) else Linear
    if not isinstance(module, kind):
        raise ValueError(f"{path} is no {kind.__name__}: these adapter weights are for another kind of module")
    for setting, asked, has in (
        ("use_dora", config.use_dora, share.lora_magnitude_vector is not None),
        ("init_lora_weights='pissa'", config.init_lora_weights == "pissa", share.start is not None),
    ):
        if asked != has:
            raise ValueError(
                f"{path}: the settings {'ask' if asked else 'do not ask'} for {setting}, the weights differ"
            )


def _is_tied(model: Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))

"""The hyperparameters of an adapter: rank, scale, and which modules get one. Field names are PEFT's."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import wraps
from typing import Any

from ..options import as_python, short_repr

ALL_LINEAR = "all-linear"
FROM_BASE = ("pissa",)  # values of init_lora_weights that take A and B from the base's matrix, and subtract B A again
_INITIALISATIONS = (True, False, "gaussian", *FROM_BASE)
_HEAD = "lm_head"

# The keys of PEFT's adapter_config.json (0.21). LoraConfig's own fields are used. Keys in RECORDED do not affect the
# computation: fan_in_fan_out only says how the base's matrices are stored, and PEFT corrects it by the layer; the ranks
# that EVA (eva_config) has chosen are in rank_pattern; layers_pattern names the list of blocks, of which a model has
# one; qalora_group_size is for use_qalora. Other keys, in a file also unknown ones, are accepted only if they are off,
# and otherwise refused with the reason. All that a file has are stored, and written again by `save_adapter`.
RECORDED = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA, which works only after certain tokens",
    "arrow_config": "Arrow, which routes each token to one of several adapters",
    "bias": "trained biases",
    "corda_config": "CorDA, which changes the base weights",
    "ensure_weight_tying": "one update for both uses of a tied embedding",
    "kasa_config": "KaSA, which cuts the base weights",
    "layer_replication": "a base whose layers are repeated",
    "loftq_config": "LoftQ, which changes the base weights",
    "lora_bias": "a bias of B",
    "lora_ga_config": "LoRA-GA, which changes the base weights",
    "megatron_config": "Megatron's parallel layers",
    "modules_to_save": "whole layers trained together with the adapter",
    "monteclora_config": "MonteCLoRA's sampled weights",
    "target_parameters": "adapters on bare parameters, as in mixtures of experts",
    "trainable_token_indices": "single trained rows of the embedding",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA's compressed activations",
}

OURS = {"freeze_A": bool}  # fields of LoraConfig that PEFT does not know, and would ignore: minilora.json has them


def unsupported(settings: Mapping[str, Any]) -> str | None:
    """Why settings of PEFT that are not fields of `LoraConfig` are refused, in one line; None if all change nothing."""
    for key, value in settings.items():
        if value and key not in RECORDED and (key, value) != ("bias", "none"):
            return f"minilora does not support {key} = {value!r}: {UNSUPPORTED.get(key, 'an unknown option')}"
    return None


def can_be_scaled(settings: Mapping[str, Any]) -> bool:
    """Whether the update of an adapter with these fields of `LoraConfig` is proportional to B, as DoRA's is not."""
    return not settings.get("use_dora") and settings.get("init_lora_weights") not in FROM_BASE


_PLAIN_NAME = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The hyperparameters of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685), under PEFT's names.

    r: the rank of the update B A.
    lora_alpha: the update is scaled by lora_alpha / r. It has no default, which would be wrong as soon as r changes.
    target_modules: one or several name endings (["q_proj", "v_proj"]), a regular expression that matches whole names
        (".*_proj"), or "all-linear": every linear layer except the head. A single name is stored as a list of one,
        because PEFT would take it for a regular expression.
    exclude_modules: name endings or a regular expression of modules to leave out.
    layers_to_transform: the numbers of the blocks to adapt; all if None. Modules that are named in full are adapted
        in any case.
    rank_pattern, alpha_pattern: other values of r and lora_alpha for modules whose name ends with the key (a regex).
    lora_dropout: the dropout probability on the input of A, in training only.
    use_rslora: scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv 2312.03732).
    use_dora: train the magnitude of each row separately from its direction (arXiv 2402.09353; see variants.py).
    freeze_A: keep A as it was initialised and train B only: LoRA-FA (Zhang et al. 2023, arXiv 2308.03303). The layer's
        input is then not needed in the backward pass. PEFT has no such field, so it is saved in minilora.json.
    init_lora_weights: True: A uniform in ±1/sqrt(n) and B zero, so that the initial update is zero; "gaussian": A from
        N(0, 1/r²) and B zero; "pissa": both from the largest singular vectors of the base's matrix (arXiv 2404.02948;
        see variants.py); False: both random, for tests.
    task_type: "CAUSAL_LM", as in the files of all adapters; accepted so that configurations of PEFT can be copied.

    For the same reason PEFT's other fields are accepted, and not stored, where they change nothing, such as
    inference_mode, bias="none" and modules_to_save=None; any other value of theirs is a ValueError.

    Values of NumPy are stored as Python's. Raises ValueError or TypeError for invalid values.
    """

    r: int
    lora_alpha: float
    target_modules: str | Collection[str] = ALL_LINEAR
    exclude_modules: str | Collection[str] | None = None
    layers_to_transform: int | Collection[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    freeze_A: bool = False
    init_lora_weights: bool | str = True
    task_type: InitVar[str | None] = "CAUSAL_LM"

    def __post_init__(self, task_type: str | None):
        if task_type not in ("CAUSAL_LM", None):
            raise ValueError(f"task_type must be 'CAUSAL_LM', the only one that is known here, got {task_type!r}")
        for name, value in vars(self).items():
            object.__setattr__(self, name, as_python(value))
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be a dict with patterns as keys, got {getattr(self, name)!r}")
            object.__setattr__(self, name, {key: as_python(value) for key, value in getattr(self, name).items()})
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for where, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{where} must be a positive integer, got {rank!r}")
        for where, alpha in [("lora_alpha", self.lora_alpha), *self.alpha_pattern.items()]:
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha <= 0:
                raise ValueError(f"{where}: alpha must be a positive number, got {alpha!r}")
        for name, kind in (("target_modules", str), ("exclude_modules", str), ("layers_to_transform", int)):
            value = getattr(self, name)
            items = value if isinstance(value, Collection) else [value]
            if value is not None and not all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
                raise ValueError(f"{name} must be one {kind.__name__} or a list of them, got {value!r}")
            object.__setattr__(self, name, _as_list(value))
        for name in (f.name for f in fields(self) if f.type == "bool"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        p = self.lora_dropout
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
            raise ValueError(f"lora_dropout must be a number, at least 0 and below 1, got {p!r}")
        if not self.target_modules:
            raise ValueError("target_modules is empty: name modules, or use 'all-linear'")
        init = self.init_lora_weights
        if not isinstance(init, bool | str) or init not in _INITIALISATIONS:
            known = ", ".join(map(repr, _INITIALISATIONS))
            raise ValueError(f"init_lora_weights must be one of {known}, got {init!r}")
        for pattern, whole in self.patterns():
            if len(pattern) > 500 or re.search(r"\)[*+{]", pattern):  # ([\w.]+)+x takes years on a name of 30 letters
                raise ValueError(f"{pattern!r:.80} is too long or repeats a group: write names of modules instead")
            try:
                re.compile(pattern)
                re.compile(whole)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern!r:.80} is not a regular expression: {error}") from error

    def __repr__(self) -> str:
        """r, lora_alpha, target_modules, and every other field whose value is not the default."""
        return short_repr(self, "target_modules")

    def patterns(self) -> list[tuple[str, str]]:
        """Every regular expression as it was given, and as it is matched with whole names of modules."""
        whole = [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str)]
        return [*((p, p) for p in whole), *((p, ending_in(p)) for p in (*self.rank_pattern, *self.alpha_pattern))]

    def rank_of(self, module: str) -> int:
        """The rank in the module with this name."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """lora_alpha in the module with this name."""
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha)

    def scale_of(self, module: str) -> float:
        """The factor on B A in the module with this name: alpha / r, or alpha / sqrt(r) with rsLoRA; never alpha."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    @classmethod
    def of_ranks(cls, ranks: Mapping[str, int], alpha: float = 0.0) -> LoraConfig:
        """The config of an adapter with these ranks, by module: its scales are alpha / rank, or 1 if alpha is 0."""
        r = Counter(ranks.values()).most_common(1)[0][0]
        others = {re.escape(module): rank for module, rank in ranks.items() if rank != r}
        return cls(
            r=r,
            lora_alpha=alpha or float(r),
            target_modules=list(ranks),
            rank_pattern=others,
            alpha_pattern={} if alpha else {module: float(rank) for module, rank in others.items()},
        )

    def in_any_order(self, adapted: Collection[str]) -> LoraConfig:
        """The same config for these modules, with patterns that mean the same in any order. Files have them sorted,
        in PEFT as well, and of patterns that match the same module the first one counts.
        """
        named: dict[str, Any] = {}
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            values = {module: _by_pattern(patterns, module, None) for module in adapted}
            in_order = dict(sorted(patterns.items()))
            if any(_by_pattern(in_order, module, None) != value for module, value in values.items()):
                named[name] = {re.escape(module): value for module, value in values.items() if value is not None}
        return replace(self, **named)

    def patterns_in_order(self, adapted: Collection[str]) -> list[str]:
        """Which of rank_pattern and alpha_pattern has several values for one of these modules, so that order counts."""

        def several(patterns: Mapping[str, Any], module: str) -> bool:
            return len({x for key, x in patterns.items() if _by_pattern({key: x}, module, None)}) > 1

        both: dict[str, Mapping[str, Any]] = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        return [name for name, patterns in both.items() if any(several(patterns, module) for module in adapted)]

    def without_absent_targets(self, modules: Sequence[str]) -> LoraConfig:
        """The same config without names of targets that none of these modules has, which PEFT ignores if another one
        matches: adapters are trained with lists of names from several families. If none matches, all of them stay.
        """
        if isinstance(wanted := self.target_modules, str):
            return self
        absent = {*_unmatched(modules, wanted)} - {_HEAD}  # a tied head is refused
        return replace(self, target_modules=[name for name in wanted if name not in absent] or wanted)

    def unused_patterns(self, adapted: Collection[str], modules: Sequence[str]) -> list[str]:
        """What is named here and does not exist, such as "rank_pattern 'q_prj'": patterns that match none of the
        adapted modules, and names to leave out that none of the model's modules has. PEFT ignores the former, too.
        """
        named = (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
        unused = [
            f"{name} {pattern!r}"
            for name, patterns in named
            for pattern in patterns
            if not any(re.fullmatch(ending_in(pattern), module) for module in adapted)
        ]
        return unused + [f"exclude_modules {name!r}" for name in _unmatched(modules, self.exclude_modules or [])]


def _with_those_of_peft(init: Callable[..., None]) -> Callable[..., None]:
    """`__init__` with PEFT's other fields as well."""

    @wraps(init)
    def with_them(self: LoraConfig, **settings: Any) -> None:
        known = (RECORDED | UNSUPPORTED.keys()) - {"task_type"}
        theirs = {name: settings.pop(name) for name in [*settings] if name in known}
        if theirs.get("peft_type", "LORA") not in ("LORA", None):
            raise ValueError(f"peft_type must be 'LORA', the only one that is known here, got {theirs['peft_type']!r}")
        if refusal := unsupported(theirs):
            raise ValueError(refusal)
        init(self, **settings)

    return with_them


LoraConfig.__init__ = _with_those_of_peft(LoraConfig.__init__)  # type: ignore[method-assign]


def _as_list(value: Any) -> Any:
    """Turn collections into lists, for JSON, and a plain name into a list of one. Patterns and numbers stay."""
    if isinstance(value, str):
        return [value] if _PLAIN_NAME.fullmatch(value) else value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, Collection) else value


def ending_in(pattern: str) -> str:
    """A pattern for whole names that end with a match of this one, as in PEFT."""
    return rf"(.*\.)?({pattern})"


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.fullmatch(ending_in(pattern), module):
            return value
    return default


def find_targets(names: Sequence[str], config: LoraConfig) -> list[str]:
    """The module names that `config` selects from `names`, in the same order.

    Raises ValueError, with a list of the available names, if any target matches nothing or a block does not exist: a
    misspelled target must not pass because another target of the list matches.
    """
    wanted = config.target_modules
    if wanted == ALL_LINEAR:
        found = [name for name in names if name.rpartition(".")[2] != _HEAD]
    else:
        for target in _unmatched(names, wanted):
            raise ValueError(
                f"target {target!r} matches no module: give the end of a module's name, such as 'q_proj', or a "
                f"pattern for whole names, such as '.*_proj'; the modules here end in {_kinds(names)}"
            )
        found = _matching(names, wanted)
    if not found:
        raise ValueError(f"target_modules='all-linear' leaves out the head, and the model has only {_kinds(names)}")
    excluded = set(_matching(names, config.exclude_modules or []))
    if not (kept := [name for name in found if name not in excluded]):
        raise ValueError(f"exclude_modules={config.exclude_modules!r} leaves no module of {_kinds(found)} to adapt")
    if (layers := config.layers_to_transform) is None:
        return kept
    numbers = {layers} if isinstance(layers, int) else set(layers)
    whole = [] if isinstance(wanted, str) else wanted  # what is named in full stays, as in PEFT: lm_head is in no block
    chosen = [name for name in kept if name in whole or numbers & _numbers_in(name)]
    missing = sorted(numbers.difference(*map(_numbers_in, names)))
    if missing or not chosen:
        what = f": there is no block {missing[0]}" if chosen else " leaves no module to adapt"
        there = ", ".join(map(str, sorted(set().union(*map(_numbers_in, kept))))) or "none"
        raise ValueError(f"layers_to_transform={layers!r}{what}; numbers of their blocks: {there}")
    return chosen


def _numbers_in(name: str) -> set[int]:
    return {int(part) for part in name.split(".") if part.isdigit()}


def _matching(names: Sequence[str], wanted: str | Collection[str]) -> list[str]:
    """The names that a pattern matches as a whole, or that end in one of several names."""
    if isinstance(wanted, str):
        return [name for name in names if re.fullmatch(wanted, name)]
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in wanted)]


def _unmatched(names: Sequence[str], wanted: str | Collection[str]) -> list[str]:
    """The pattern, or those of several names, for which `_matching` finds none of these names."""
    if isinstance(wanted, str):
        return [] if _matching(names, wanted) else [wanted]
    return [target for target in wanted if not _matching(names, [target])]


def _kinds(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names)) or "none"

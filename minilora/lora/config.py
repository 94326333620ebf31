"""What an adapter looks like: rank, scale, and which modules get one. Field names are PEFT's."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

ALL_LINEAR = "all-linear"
_HEAD = "lm_head"
_PLAIN_NAME = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True, kw_only=True, repr=False)
class LoraConfig:
    """The settings of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685), under PEFT's names.

    r: the rank, the width between A and B.
    lora_alpha: the update is scaled by lora_alpha / r. No default: a silent one stays behind when r changes.
    target_modules: one name or several ("q_proj": every module whose name ends so), a regular expression for whole
        names (".*_proj"), or "all-linear": every linear layer but the head. A single name is kept and saved as a list
        of one, since PEFT would take it for a pattern.
    exclude_modules: names or a regular expression of modules to leave out again.
    layers_to_transform: only blocks with these numbers.
    rank_pattern, alpha_pattern: another r or lora_alpha where the module's name ends with the key (a regex).
    lora_dropout: in training, the share of x's elements that the low-rank branch does not see.
    bias: "none"; "lora_only": the biases of the adapted layers learn too; "all": every bias does. A Llama has none.
    use_rslora: scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv 2312.03732).
    use_dora: learn each row's length on its own, beside its direction (arXiv 2402.09353; see variants.py).
    init_lora_weights: True: A uniform in ±1/sqrt(n) and B zero, so that the adapter starts as no change; "gaussian":
        A from N(0, 1/r²), B zero; "pissa": both from the base's largest singular vectors (arXiv 2404.02948; see
        variants.py); False: both random, for tests. On the embedding, A starts at zero and B at N(0, 1), as in PEFT.

    Raises ValueError or TypeError for settings that mean nothing.
    """

    r: int
    lora_alpha: float
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self):
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be a dict of patterns, got {getattr(self, name)!r}")
        for where, rank in [
            ("r", self.r),
            *((f"rank_pattern[{key!r}]", rank) for key, rank in self.rank_pattern.items()),
        ]:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{where} must be a positive integer, got {rank!r}")
        for where, alpha in [("lora_alpha", self.lora_alpha), *self.alpha_pattern.items()]:
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha <= 0:
                raise ValueError(f"{where}: alpha must be a positive number, got {alpha!r}")
        for name, kind in (("target_modules", str), ("exclude_modules", str), ("layers_to_transform", int)):
            value = getattr(self, name)
            items = value if isinstance(value, Collection) else [value]
            if value is not None and not all(isinstance(item, kind) for item in items):
                raise ValueError(f"{name} must be one {kind.__name__} or several, got {value!r}")
            object.__setattr__(self, name, _as_list(value))
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        p = self.lora_dropout
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
            raise ValueError(f"lora_dropout must be a number from 0 to below 1, got {p!r}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        if not self.target_modules:
            raise ValueError("target_modules is empty: name modules, or use 'all-linear'")
        start = self.init_lora_weights
        if not isinstance(start, bool) and start not in ("gaussian", "pissa"):
            raise ValueError(f"init_lora_weights must be True, False, 'gaussian' or 'pissa', got {start!r}")
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        patterns += [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str)]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error

    def __repr__(self) -> str:
        """r, lora_alpha and target_modules, and of the rest what is not the default."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        always = ("r", "lora_alpha", "target_modules")
        usual = vars(LoraConfig(r=self.r, lora_alpha=self.lora_alpha))
        return f"LoraConfig({', '.join(f'{k}={v!r}' for k, v in shown.items() if k in always or v != usual[k])})"

    def rank_of(self, module: str) -> int:
        """The rank for the module of this name."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """lora_alpha for the module of this name."""
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha)

    def scale_of(self, module: str) -> float:
        """The factor on B A for the module of this name: alpha / r, or alpha / sqrt(r) with rsLoRA. Never alpha."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def _as_list(value: Any) -> Any:
    """Several as a list, which JSON can say, and a plain name as a list of one; patterns and numbers as they are."""
    if isinstance(value, str):
        return [value] if _PLAIN_NAME.fullmatch(value) else value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, Collection) else value


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def find_targets(names: Sequence[str], config: LoraConfig) -> list[str]:
    """Those of the candidate module `names` that `config` selects, in order.

    Raises ValueError, listing what there is, when a name or pattern matches nothing: a misspelled target must not pass
    because another one of the list matches.
    """
    wanted = config.target_modules
    if wanted == ALL_LINEAR:
        found = [name for name in names if name.rpartition(".")[2] != _HEAD]
    else:
        for target in [wanted] if isinstance(wanted, str) else wanted:
            if not _matching(names, wanted if target is wanted else [target]):
                raise ValueError(
                    f"target {target!r} matches no module; a name such as 'q_proj' means every module that "
                    f"ends so, a pattern such as '.*_proj' must match whole names; there are: {_kinds(names)}"
                )
        found = _matching(names, wanted)
    excluded = set(_matching(names, config.exclude_modules or []))
    found = [name for name in found if name not in excluded]
    if config.layers_to_transform is not None:
        layers = config.layers_to_transform
        numbers = {layers} if isinstance(layers, int) else set(layers)
        found = [name for name in found if numbers & {int(part) for part in name.split(".") if part.isdigit()}]
    if not found:
        raise ValueError("exclude_modules and layers_to_transform leave no module to adapt")
    return found


def _matching(names: Sequence[str], wanted: str | Sequence[str]) -> list[str]:
    """The names that match a pattern as a whole, or end in one of several names."""
    if isinstance(wanted, str):
        return [name for name in names if re.fullmatch(wanted, name)]
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in wanted)]


def _kinds(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names)) or "none"

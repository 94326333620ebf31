"""How many parameters there are, and how many of them learn: by counting a model, and by formula."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..nn.module import Module


@dataclass(frozen=True, repr=False)
class ParameterCounts:
    """total, trainable and frozen numbers of a model; `by_module` has (trainable, total) for each top-level kind."""

    total: int
    trainable: int
    by_module: dict[str, tuple[int, int]]

    @property
    def frozen(self) -> int:
        return self.total - self.trainable

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"trainable {self.trainable:,} of {self.total:,} parameters ({self.percent:.3f} %)"

    def __repr__(self) -> str:
        """The same, and below it a line for each kind of module."""
        wide = max((len(kind) for kind in self.by_module), default=0)
        rows = [f"{kind:<{wide}}{learns:>15,}{total:>15,}" for kind, (learns, total) in self.by_module.items()]
        return "\n".join([str(self), f"{'':<{wide}}{'trainable':>15}{'of':>15}", *rows])


def count_parameters(model: Module) -> ParameterCounts:
    """Count a model's parameters; one that is shared (a tied embedding) counts once.

    `by_module` groups by kind: "q_proj", "down_proj", "embed_tokens", ... summed over all blocks.
    """
    by_module: dict[str, tuple[int, int]] = {}
    total = trainable = 0
    for name, parameter in model.named_parameters():
        kind = name.split(".adapters.")[0].removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        learns = parameter.size if parameter.requires_grad else 0
        before = by_module.get(kind, (0, 0))
        by_module[kind] = (before[0] + learns, before[1] + parameter.size)
        total += parameter.size
        trainable += learns
    return ParameterCounts(total, trainable, by_module)


def lora_parameters(shapes: Iterable[tuple[int, int]], r: int) -> int:
    """The size of an adapter: r (m + n) for each adapted (m, n) matrix (Hu et al. 2021, section 4.2).

    >>> lora_parameters([(12288, 12288)] * 2 * 96, r=4)    # GPT-3 175B, q and v
    18874368
    """
    return sum(r * (m + n) for m, n in shapes)

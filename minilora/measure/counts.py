"""How many parameters a model has, and how many of them are trainable."""

from __future__ import annotations

from dataclasses import dataclass

from ..nn.module import Module, check_module


@dataclass(frozen=True, repr=False)
class ParameterCounts:
    """Total, trainable and frozen parameters of a model; `by_module` has (trainable, total) for each kind of module."""

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
        """The same, with a line for each kind of module."""
        wide = max((len(kind) for kind in self.by_module), default=0)
        rows = [f"{kind:<{wide}}{learns:>15,}{total:>15,}" for kind, (learns, total) in self.by_module.items()]
        return "\n".join([str(self), f"{'':<{wide}}{'trainable':>15}{'of':>15}", *rows])


def count_parameters(model: Module) -> ParameterCounts:
    """Count a model's parameters; one that is shared (a tied embedding) counts once.

    `by_module` groups by kind: "q_proj", "down_proj", "embed_tokens", ... summed over all blocks.
    """
    check_module(model)
    by_module: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        kind = name.split(".adapters.")[0].removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        trainable, total = by_module.get(kind, (0, 0))
        by_module[kind] = trainable + parameter.size * parameter.requires_grad, total + parameter.size
    trainable, total = (sum(counts[i] for counts in by_module.values()) for i in (0, 1))
    return ParameterCounts(total, trainable, by_module)

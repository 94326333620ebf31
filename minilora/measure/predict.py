"""The memory of one training step, predicted from shapes before anything runs.

Freezing saves gradients and optimizer state. It does not save activations, the arrays that operations save for the
backward pass: those depend on tokens and layers, and every layer still passes a gradient on. ledger.py measures what is
really held, in the same form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.backend import is_packed
from ..engine.fused import TOKEN_BLOCK, VOCAB_BLOCK
from ..engine.parallel import cores
from ..files.quant import BLOCK, PIECE
from ..lora.adapters import base_state
from ..lora.layer import LoraLayer
from ..nn.gpt2 import GPT2Config
from ..nn.language_model import LanguageModel, check_language_model
from ..nn.parts import Batch, Example, micro_batches
from ..nn.step import divided
from .blocks import Saves, block_of, matrices, names_of

FLOAT, INTEGER = 4, 8  # bytes of a float32, and of the int64 of ids and labels


@dataclass(frozen=True, repr=False)
class Memory:
    """Bytes by owner, at the moment when a step holds most: predicted or measured.

    moments: the optimizer state, AdamW's first and second moment.
    activations: what operations save for the backward pass; `by_operation` has the parts.
    scratch: what exists only while an operation runs, such as the logits of a block of tokens; with activation
        checkpointing, also what one block saves during its backward pass.
    program: Python, the libraries with their work space, and the tokenizer.
    """

    weights: int
    adapter: int = 0
    gradients: int = 0
    moments: int = 0
    activations: int = 0
    scratch: int = 0
    program: int = 0
    by_operation: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        owners = ", ".join(f"{name} {n / 1e6:,.1f}" for name, n in self.by_owner().items())
        return f"<Memory: {self.total / 1e6:,.1f} MB: {owners}>"

    def by_owner(self) -> dict[str, int]:
        """The owners that hold something, and their bytes."""
        owners = ("program", "weights", "adapter", "gradients", "moments", "activations", "scratch")
        return {name: n for name in owners if (n := getattr(self, name))}

    @property
    def total(self) -> int:
        return sum(self.by_owner().values())


def base_parameters(config: Any) -> int:
    """The number of parameters of a model with this shape."""
    tables = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    tables += config.max_position_embeddings if isinstance(config, GPT2Config) else 0
    block = block_of(config)
    last_norm = next(part.parameters for part in block if isinstance(part, Saves))
    return tables * config.hidden_size + config.num_hidden_layers * sum(p.parameters for p in block) + last_norm


def check_targets(names: Iterable[str], config: Any) -> None:
    """Raise ValueError for a module that is not one of a block's matrices."""
    known = names_of(config)
    if unknown := set(names) - set(known):
        raise ValueError(f"nothing is predicted for {min(unknown)!r}; known: all-linear, {', '.join(known)}")


@dataclass(frozen=True)
class Step:
    """What the memory of a training step with AdamW depends on. `Step.of` describes that of a batch.

    tokens, scored: those whose activations exist at the same time, in `rows` of equal length: the whole batch if it is
        computed at once; if it is divided, the micro-batches of all `threads`, which take `rounds` for the batch.
    rank: of the adapter on the modules named in `targets`, all of them if None, of the blocks with the numbers in
        `layers`, all if None; None for full fine-tuning.
    freeze_A: whether only B is trained.
    base_bytes: the size of the base's weights, if they are not float32.
    unpacks: whether matmuls dequantise its matrices, or widen those of 16 bits, before use.
    recompute: activation checkpointing: a block saves only its input.
    program: the size of Python and libraries, which shapes do not give.
    """

    config: Any
    tokens: int
    scored: int
    rank: int | None = None
    targets: Collection[str] | None = None
    layers: Collection[int] | None = None
    freeze_A: bool = False
    rows: int = 1
    threads: int = 1
    rounds: int = 1
    base_bytes: int | None = None
    unpacks: bool = False
    recompute: bool = False
    program: int = 0

    def __post_init__(self):
        check_targets(self.targets or (), self.config)

    @classmethod
    def of(
        cls, model: LanguageModel | Any, batch: Batch | Sequence[Example], threads: int | None = None, **known: Any
    ) -> Step:
        """The step of `loss_and_grad` on a batch, or on samples, and of AdamW.

        model: its shape; or the model itself, from which adapter, base and checkpointing are known, too.
        threads: None for all cores. On a GPU a batch is not divided.
        known: further fields, which replace what is known from the model.
        """
        if isinstance(model, LanguageModel):
            config, batches, known = model.config, divided(model, batch, threads), _fields_of(model) | known
        else:
            if not hasattr(model, "num_hidden_layers"):  # a shape has it
                check_language_model(model, "Step.of")
            config, batches = model, micro_batches(batch, threads or cores())
        alive, rounds = alive_at_once(batches, threads)
        tokens, scored = sum(each.input_ids.size for each in alive), sum(each.scored for each in alive)
        return cls(config, tokens, scored, rows=len(alive[0].input_ids), threads=len(alive), rounds=rounds, **known)

    def adapted(self, layer: int) -> set[str]:
        """The names of a block's modules that are trained, with an adapter or whole."""
        if self.rank is not None and self.layers is not None and layer not in self.layers:
            return set()
        return set(names_of(self.config) if self.rank is None or self.targets is None else self.targets)

    @property
    def adapter_parameters(self) -> int:
        """The number of parameters in all A and B."""
        return self._factors(True)

    @property
    def trained_parameters(self) -> int:
        """The number of parameters that get a gradient: the base's, those in all A and B, or those in all B."""
        return base_parameters(self.config) if self.rank is None else self._factors(not self.freeze_A)

    def _factors(self, with_A: bool) -> int:
        every = [self.adapted(layer) for layer in range(self.config.num_hidden_layers)]
        across = sum(
            (m + (n if with_A else 0)) * sum(name in names for names in every) for name, m, n in matrices(self.config)
        )
        return (self.rank or 0) * across


def alive_at_once(batches: Sequence[Batch], threads: int | None = None) -> tuple[list[Batch], int]:
    """The largest micro-batches that may exist at the same time, and the number of rounds in which all are computed.

    threads: None for as many as `loss_and_grad` would use now.
    """
    largest = sorted(batches, key=lambda batch: batch.input_ids.size, reverse=True)[: threads or cores()]
    return largest, math.ceil(len(batches) / len(largest))


def _fields_of(model: LanguageModel) -> dict[str, Any]:
    held = {
        name: weights.rank
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for weights in module.adapters.values()
    }
    ranks = {name.rpartition(".")[2]: rank for name, rank in held.items()}
    layers = {int(part) for name in held for part in name.split(".") if part.isdecimal()}
    targets, base = tuple(name for name in names_of(model.config) if name in ranks), base_state(model)
    return {
        "rank": max(ranks[name] for name in targets) if targets else None,
        "targets": targets or None,
        "layers": layers if 0 < len(layers) < model.config.num_hidden_layers else None,
        "freeze_A": any(adapter.config.freeze_A for adapter in model.adapters.values()),
        "base_bytes": sum(array.nbytes for array in base.values()),
        "unpacks": any(is_packed(array) and not array.multiplied_as_stored for array in base.values()),
        "recompute": model.decoder.recompute,
    }


def predict_memory(step: Step) -> Memory:
    """Predict the peak memory of a training step, in bytes by owner.

    In the backward pass gradients grow while activations are freed. An adapter's gradients, which are small, count in
    full; for full fine-tuning the result is the larger of both ends.
    """
    if not isinstance(step, Step):
        raise TypeError(f"expected a Step, got a {type(step).__name__}: ml.Step.of(model, samples) makes one")
    config, threads = step.config, step.threads
    base, adapter, trained = base_parameters(config), step.adapter_parameters, step.trained_parameters
    table = config.vocab_size * config.hidden_size
    activations = recomputed_activations(step) if step.recompute else kept_activations(step)
    of_loss, of_block = _scratch(step)

    def held(gradients: int, activations: Mapping[str, int], scratch: int) -> Memory:
        return Memory(
            weights=FLOAT * base if step.base_bytes is None else step.base_bytes,
            adapter=FLOAT * adapter,
            gradients=FLOAT * gradients,
            moments=FLOAT * 2 * trained,
            activations=sum(activations.values()),
            scratch=FLOAT * scratch,
            program=step.program,
            by_operation=dict(sorted(activations.items(), key=lambda item: -item[1])),
        )

    if step.rank is not None:
        return held(trained, activations, threads * max(of_loss, of_block))
    # Every thread computes the head's gradient first and the embedding's last; tied, the two are added. After a first
    # round all gradients exist.
    gradients, more = (base, threads * table) if step.rounds > 1 else (table, (threads - 1) * table)
    first = held(gradients, activations, more + threads * max(of_loss, of_block))
    last = held(base, {}, threads * table if config.tie_word_embeddings else (threads - 1) * table)
    return max(first, last, key=lambda memory: memory.total)


# -- activations, operation by operation: each operation's docstring says what it saves -------------------------------


def kept_activations(step: Step) -> dict[str, int]:
    """Bytes that the graph holds once the loss is computed, by operation."""
    kept, flows = Counter[str](), step.rank is None  # is anything trained so far, so that a gradient must flow to it?
    for layer in range(step.config.num_hidden_layers):
        block, flows = _kept_by_block(step, layer, step.tokens, flows)
        kept += block
    return dict(kept + _kept_around(step))


def recomputed_activations(step: Step) -> dict[str, int]:
    """The same with activation checkpointing: every block saves only its input (engine/recompute.py), from the first
    one that is trained on.
    """
    around, config = _kept_around(step), step.config
    first = next((layer for layer in range(config.num_hidden_layers) if step.adapted(layer)), 0)
    blocks = config.num_hidden_layers - first
    around["recomputed"] = around.pop("rope", 0) + FLOAT * blocks * step.tokens * config.hidden_size
    return dict(around)


def _kept_by_block(step: Step, layer: int, tokens: int, flows: bool) -> tuple[Counter[str], bool]:
    """What a block saves, and whether a gradient flows into it. flows: does one flow to what is before the block?

    A norm or activation to which a gradient flows saves its inputs, from which linear layers compute its output again.
    In a first block, with nothing trained before it, the linear layers save that output themselves.
    """
    numbers, computed_again = Counter[str](), False  # per token; is what the next linear layers read computed again?
    for part in block_of(step.config):
        if isinstance(part, Saves):
            numbers[part.operation] += part.values if flows else 0
            computed_again = part.again and flows
        else:
            mine = [name for name in part.outputs if name in step.adapted(layer)]
            saves_x = mine and not computed_again and not step.freeze_A
            kept = (step.rank or 0) * len(mine) + (part.width if saves_x else 0)  # x Aᵀ of each, and x
            numbers["linear" if step.rank is None else "lora_linear"] += kept
            flows, computed_again = bool(mine) or flows, False
    return Counter({name: FLOAT * tokens * n for name, n in numbers.items() if n}), flows


def _kept_around(step: Step) -> Counter[str]:
    """What is saved outside of the blocks: the rotary angles that all share, and what comes before and after."""
    config, tokens, scored = step.config, step.tokens, step.scored
    C, norm = config.hidden_size, next(part for part in block_of(config) if isinstance(part, Saves))
    kept = Counter(
        linear_cross_entropy=FLOAT * scored * C + INTEGER * (tokens + scored)  # dx, labels, where they stand
    )
    kept[norm.operation] = FLOAT * tokens * norm.values
    if step.rank is None:
        kept["embedding"] = INTEGER * tokens  # the ids
        kept["linear_cross_entropy"] += FLOAT * scored * (C + 1) + INTEGER * scored  # for dw: x, log Σ exp, the targets
    if not isinstance(config, GPT2Config):
        pairs = len(set(getattr(config, "layer_types", "1")))  # of cos and sin: one for each type of layer
        kept["rope"] = pairs * FLOAT * tokens // step.rows * config.head_dim
    elif step.rank is None:
        kept["embedding"] += INTEGER * tokens // step.rows  # the positions
    return kept


def _scratch(step: Step) -> tuple[int, int]:
    """Floats that exist only while an operation runs, in one thread: in the loss, and in a block. An estimate."""
    config, tokens, scored = step.config, step.tokens // step.threads, step.scored // step.threads
    C, F, vocabulary = config.hidden_size, config.intermediate_size, min(VOCAB_BLOCK, config.vocab_size)
    together = scored if step.rank is None else min(TOKEN_BLOCK, scored)  # dw takes all tokens at a time
    whole = together == scored and vocabulary == config.vocab_size
    logits = together * vocabulary
    in_blocks = step.base_bytes is not None and step.base_bytes < 2 * base_parameters(config)  # 16 bits widen at once
    piece = PIECE * BLOCK if in_blocks else 0  # values that are dequantised at a time
    of_loss = logits if whole else 2 * logits  # of a block of tokens and vocabulary, and the last
    if step.unpacks:  # the block's rows of the head, too, which are made before the last ones are freed
        of_loss = max(of_loss, logits + vocabulary * C) + vocabulary * C + piece
    of_loss += 2 * scored * C  # x, and the rows of the right answers
    saving = [part for part in block_of(config) if isinstance(part, Saves)]
    activation = next(part.values for part in saving if part.again and not part.parameters)
    unpacked = max(min(VOCAB_BLOCK, m) * n for _, m, n in matrices(config)) + piece if step.unpacks else 0
    # The gradients of its output and of the block's, and those of its inputs, before which a matrix is unpacked.
    of_block = tokens * (F + C) + max(tokens * activation, unpacked)
    if step.recompute:
        of_block += sum(_kept_by_block(step, config.num_hidden_layers - 1, tokens, True)[0].values()) // FLOAT
    return of_loss, of_block

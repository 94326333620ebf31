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
from ..lora.adapters import base_state, lora_modules
from ..lora.layer import LoraLinear, LoraWeights
from ..nn.gpt2 import GPT2Config
from ..nn.language_model import LanguageModel, check_language_model
from ..nn.parts import Batch, Example, check_samples, micro_batches
from ..nn.step import divided
from .blocks import Linears, Saves, block_of, matrices, names_of

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
class Update:
    """What memory depends on, of the weights that are trained in one module.

    stored, trained: the number of an adapter's parameters, and of those that get a gradient.
    rank: the number of values of x Aᵀ, which B's gradient needs.
    saves_x: whether x is saved, for the gradient of A or of the module's matrix.
    more: further values that are saved per token, by an operation of this module alone: with DoRA its output.
    once: values that are saved once, whatever the number of tokens: with DoRA a quotient for each output.
    operation: the operation that saves them.
    """

    stored: int
    trained: int
    rank: int
    saves_x: bool = True
    more: int = 0
    once: int = 0
    operation: str = "lora_linear"


@dataclass(frozen=True)
class Step:
    """What the memory of a training step with AdamW depends on. `Step.of` describes that of a batch.

    tokens, scored: those whose activations exist at the same time, in `rows` of equal length: the whole batch if it is
        computed at once; if it is divided, the micro-batches of all `threads`, which take `rounds` for the batch.
    rank: of the adapter on the modules named in `targets`, all of them if None, of the blocks with the numbers in
        `layers`, all if None; None for full fine-tuning.
    freeze_A, use_dora: whether only B is trained, and whether a magnitude is as well.
    modules: instead of these five, adapters that differ between modules: by the number of the block and the name of the
        module in it, (None, name) outside of the blocks. `Step.of` fills it in where the five do not suffice.
    others: bytes of what else is stored of adapters: those that are not active, and PiSSA's initial A and B.
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
    use_dora: bool = False
    modules: Mapping[tuple[int | None, str], Update] | None = field(default=None, repr=False)
    others: int = 0
    rows: int = 1
    threads: int = 1
    rounds: int = 1
    base_bytes: int | None = None
    unpacks: bool = False
    recompute: bool = False
    program: int = 0

    def __post_init__(self):
        check_targets(self.targets or (), self.config)
        fields = ("rank", "targets", "layers", "freeze_A", "use_dora")
        given = [name for name in fields if getattr(self, name) not in (None, False)]
        if self.modules is not None and given:
            raise ValueError(
                f"{given[0]} describes equal adapters in all modules, and here they differ: add modules=None"
            )

    @classmethod
    def of(
        cls, model: LanguageModel | Any, batch: Batch | Sequence[Example], threads: int | None = None, **known: Any
    ) -> Step:
        """The step of `loss_and_grad` on a batch, or on samples, and of AdamW.

        model: its shape; or the model itself, from which adapter, base and checkpointing are known, too.
        threads: None for all cores. On a GPU a batch is not divided.
        known: further fields, which replace what is known from the model.

        Of an adapter on an untied head (`lm_head`), the parameters count, but not the logits that the loss then holds.
        Raises ValueError if there is no sample, or for a field that contradicts the others.
        """
        if not isinstance(model, LanguageModel) and not hasattr(model, "num_hidden_layers"):  # a shape has it
            check_language_model(model, "Step.of")
        if not isinstance(batch, Batch):
            check_samples(batch)
            if not batch:
                raise ValueError("expected at least one sample, got none")
        if isinstance(model, LanguageModel):
            config, batches, known = model.config, divided(model, batch, threads), _fields_of(model) | known
        else:
            config, batches = model, micro_batches(batch, threads or cores())
        alive, rounds = alive_at_once(batches, threads)
        tokens, scored = sum(each.input_ids.size for each in alive), sum(each.scored for each in alive)
        return cls(config, tokens, scored, rows=len(alive[0].input_ids), threads=len(alive), rounds=rounds, **known)

    @property
    def is_full(self) -> bool:
        """Whether the base itself is trained: full fine-tuning."""
        return self.rank is None and self.modules is None

    def adapted(self, layer: int | None) -> dict[str, Update]:
        """What is trained in the modules of a block, by name, with an adapter or whole; None: outside of the blocks."""
        if self.modules is not None:
            return {name: update for (block, name), update in self.modules.items() if block == layer}
        if layer is None or (self.rank is not None and self.layers is not None and layer not in self.layers):
            return {}
        if self.rank is None:
            return {name: Update(0, m * n, 0, operation="linear") for name, m, n in matrices(self.config)}
        targets = names_of(self.config) if self.targets is None else self.targets
        return {
            name: _update(self.config, layer, name, self.rank, m, n, self.freeze_A, self.use_dora)
            for name, m, n in matrices(self.config)
            if name.rpartition(".")[2] in targets
        }

    @property
    def adapter_parameters(self) -> int:
        """The number of parameters of the adapter: of all A and B, and with DoRA all magnitudes."""
        return sum(update.stored for update in self._updates())

    @property
    def trained_parameters(self) -> int:
        """The number of parameters that get a gradient: the base's, or those of the adapter, with `freeze_A` less A."""
        return base_parameters(self.config) if self.is_full else sum(update.trained for update in self._updates())

    def _updates(self) -> list[Update]:
        blocks = (None, *range(self.config.num_hidden_layers))
        return [update for layer in blocks for update in self.adapted(layer).values()]


def _update(config: Any, layer: int, name: str, rank: int, m: int, n: int, freeze_A: bool, use_dora: bool) -> Update:
    """Of an adapter in a matrix (m, n) of the block with this number."""
    stored = rank * (m + n) + m * use_dora
    more = m if use_dora and not _is_saved(config, layer, name) else 0
    operation = "dora_linear" if use_dora else "lora_linear"
    return Update(stored, stored - rank * n * freeze_A, rank, not freeze_A, more, m * use_dora, operation)


def _is_saved(config: Any, layer: int | None, name: str) -> bool:
    """Whether the operation after this module of a block saves its output."""
    return any(name in part.saved for part in block_of(config, layer or 0) if isinstance(part, Linears))


def alive_at_once(batches: Sequence[Batch], threads: int | None = None) -> tuple[list[Batch], int]:
    """The largest micro-batches that may exist at the same time, and the number of rounds in which all are computed.

    threads: None for as many as `loss_and_grad` would use now.
    """
    largest = sorted(batches, key=lambda batch: batch.input_ids.size, reverse=True)[: threads or cores()]
    return largest, math.ceil(len(batches) / len(largest))


def _fields_of(model: LanguageModel) -> dict[str, Any]:
    base, config = base_state(model), model.config
    known: dict[str, Any] = {
        "base_bytes": sum(array.nbytes for array in base.values()),
        "unpacks": any(is_packed(array) and not array.multiplied_as_stored for array in base.values()),
        "recompute": model.decoder.recompute,
    }
    if not model.adapters:
        return known
    modules: dict[tuple[int | None, str], Update] = {}
    held = 0
    for path, module in lora_modules(model).items():
        for adapter, weights in module.adapters.items():
            held += sum(x.nbytes for x in (*(p.data for _, p in weights.named_parameters()), *(weights.initial or ())))
            if adapter in module.active and weights.lora_B.requires_grad:
                place = _place(config, path)
                modules[place] = _update_of(config, *place, module, weights)
    known["others"] = held - FLOAT * sum(update.stored for update in modules.values())
    return known | _alike(config, modules)


def _alike(config: Any, modules: Mapping[tuple[int | None, str], Update]) -> dict[str, Any]:
    """The fields of a Step that describe these modules: rank, targets and so on, if they are the same everywhere."""
    names, layers = {name for _, name in modules}, {layer for layer, _ in modules if layer is not None}
    first = next(iter(modules.values()), None)
    targets = tuple(t for t in names_of(config) if any(name.rpartition(".")[2] == t for name in names))
    if first is not None and targets:
        fields: dict[str, Any] = {
            "rank": first.rank,
            "targets": targets,
            "layers": layers if len(layers) < config.num_hidden_layers else None,
            "freeze_A": not first.saves_x,
            "use_dora": first.operation == "dora_linear",
        }
        step = Step(config, 1, 1, **fields)
        blocks = (None, *range(config.num_hidden_layers))
        if {(layer, name): update for layer in blocks for name, update in step.adapted(layer).items()} == modules:
            return fields
    return {"modules": modules}


def _place(config: Any, path: str) -> tuple[int | None, str]:
    """A module's block, None outside of the blocks, and its name in `block_of`."""
    block = next((int(part) for part in path.split(".") if part.isdecimal()), None)
    return block, next((name for name, _, _ in matrices(config) if path.endswith(f".{name}")), path.rpartition(".")[2])


def _update_of(config: Any, layer: int | None, name: str, module: LoraLinear, weights: LoraWeights) -> Update:
    """Of one adapter in a module of a model, as `LoraLinear.forward` computes it."""
    parameters = [parameter for _, parameter in weights.named_parameters()]
    stored, trained = (sum(p.size for p in parameters if p.requires_grad or not only) for only in (False, True))
    dora, saves_x = weights.lora_magnitude_vector is not None, weights.lora_A.requires_grad
    drops = weights.dropout is not None and weights.dropout.training
    fused = weights.is_plain or (weights.is_dora and not drops)
    more = module.out_features if dora and not (fused and _is_saved(config, layer, name)) else 0
    if drops and not fused and saves_x:  # x with its zeros, of each module
        saves_x, more = False, more + module.in_features
    once = module.out_features * dora * (1 if fused else 2)  # the quotients; apart from their operation, the norms, too
    operation = "linear" if not fused else "dora_linear" if dora else "lora_linear"
    return Update(stored, trained, weights.rank, saves_x, more, once, operation)


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
            adapter=FLOAT * adapter + step.others,
            gradients=FLOAT * gradients,
            moments=FLOAT * 2 * trained,
            activations=sum(activations.values()),
            scratch=FLOAT * scratch,
            program=step.program,
            by_operation=dict(sorted(activations.items(), key=lambda item: -item[1])),
        )

    if not step.is_full:
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
    kept = Counter[str]()
    flows = step.is_full  # is anything trained so far, so that a gradient must flow to it?
    for layer in range(step.config.num_hidden_layers):
        block, flows = _kept_by_block(step, layer, step.tokens, flows)
        kept += block
    return dict(kept + _kept_around(step))


def recomputed_activations(step: Step) -> dict[str, int]:
    """The same with activation checkpointing: every block saves only its input (engine/recompute.py), from the first
    one that is trained on.
    """
    around, config = _kept_around(step), step.config
    layers = range(config.num_hidden_layers)
    blocks = len(layers) - next((layer for layer in layers if step.adapted(layer)), len(layers))
    around["recomputed"] = around.pop("rope", 0) + FLOAT * blocks * step.tokens * config.hidden_size
    return dict(around)


def _kept_by_block(step: Step, layer: int, tokens: int, flows: bool) -> tuple[Counter[str], bool]:
    """What a block saves, and whether a gradient flows into it. flows: does one flow to what is before the block?

    A norm or activation to which a gradient flows saves its inputs, from which linear layers compute its output again.
    In a first block, with nothing trained before it, the linear layers save that output themselves.
    """
    adapted = step.adapted(layer)
    numbers, once = Counter[str](), Counter[str]()  # per token, and for all of them
    computed_again = False  # is what the next linear layers read computed again?
    for part in block_of(step.config):
        if isinstance(part, Saves):
            numbers[part.operation] += part.values if flows else 0
            computed_again = part.again and flows
        else:
            mine = [adapted[name] for name in part.outputs if name in adapted]
            for update in mine:
                numbers[update.operation] += update.rank + update.more  # x Aᵀ
                once[update.operation] += update.once
            if (saving := [update for update in mine if update.saves_x]) and not computed_again:
                numbers[saving[0].operation] += part.width  # x, which all of them read
            flows, computed_again = bool(mine) or flows, False
    return Counter({name: FLOAT * (tokens * n + once[name]) for name, n in numbers.items() if n}), flows


def _kept_around(step: Step) -> Counter[str]:
    """What is saved outside of the blocks: the rotary angles that all share, and what comes before and after."""
    config, tokens, scored = step.config, step.tokens, step.scored
    C, norm = config.hidden_size, next(part for part in block_of(config) if isinstance(part, Saves))
    kept = Counter(
        linear_cross_entropy=FLOAT * scored * C + INTEGER * (tokens + scored)  # dx, labels, where they stand
    )
    kept[norm.operation] = FLOAT * tokens * norm.values
    if step.is_full:
        kept["embedding"] = INTEGER * tokens  # the ids
        kept["linear_cross_entropy"] += FLOAT * scored * (C + 1) + INTEGER * scored  # for dw: x, log Σ exp, the targets
    if not isinstance(config, GPT2Config):
        pairs = len(set(getattr(config, "layer_types", "1")))  # of cos and sin: one for each type of layer
        kept["rope"] = pairs * FLOAT * tokens // step.rows * config.head_dim
    elif step.is_full:
        kept["embedding"] += INTEGER * tokens // step.rows  # the positions
    for update in step.adapted(None).values():
        kept[update.operation] += FLOAT * (tokens * (update.rank + update.more) + update.once)
    return kept


def _scratch(step: Step) -> tuple[int, int]:
    """Floats that exist only while an operation runs, in one thread: in the loss, and in a block. An estimate."""
    config, tokens, scored = step.config, step.tokens // step.threads, step.scored // step.threads
    C, F, vocabulary = config.hidden_size, config.intermediate_size, min(VOCAB_BLOCK, config.vocab_size)
    together = scored if step.is_full else min(TOKEN_BLOCK, scored)  # dw takes all tokens at a time
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
    if step.recompute:  # what the block saves that is computed again, when those after it have freed their inputs
        last = config.num_hidden_layers - 1
        saved = [sum(_kept_by_block(step, i, tokens, True)[0].values()) // FLOAT for i in range(last + 1)]
        of_block += max(n - (last - i) * tokens * C for i, n in enumerate(saved))
    return of_loss, of_block

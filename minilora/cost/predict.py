"""Where the bytes go: what one training step will hold, predicted from shapes before anything runs.

Freezing saves gradients and Adam's two moments. It does not save activations, the arrays that operations keep for
backward: those depend on tokens and layers, and every layer still passes a gradient on. What is really held is measured
in ledger.py, and is written down in the same form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..engine.fused import TOKENS, WORDS
from ..engine.parallel import cores
from ..nn.llama import Config
from ..nn.parts import Batch, Sample, micro_batches

FLOAT, INTEGER = 4, 8  # bytes of a float32, and of the int64 of ids and labels

SHAPES = {  # (outputs, inputs) of a block's matrices
    "q_proj": lambda c: (c.num_attention_heads * c.head_dim, c.hidden_size),
    "k_proj": lambda c: (c.num_key_value_heads * c.head_dim, c.hidden_size),
    "v_proj": lambda c: (c.num_key_value_heads * c.head_dim, c.hidden_size),
    "o_proj": lambda c: (c.hidden_size, c.num_attention_heads * c.head_dim),
    "gate_proj": lambda c: (c.intermediate_size, c.hidden_size),
    "up_proj": lambda c: (c.intermediate_size, c.hidden_size),
    "down_proj": lambda c: (c.hidden_size, c.intermediate_size),
}


@dataclass(frozen=True)
class Memory:
    """Bytes by owner: predicted for the moment when a step holds most, or measured.

    activations: what operations keep for backward; `by_operation` says which. scratch: what exists only while an
    operation runs, such as the logits of a block of tokens; with recomputation, also what one block keeps while it goes
    back. program: Python, the libraries with their work space, and the tokenizer.
    """

    weights: int
    adapter: int = 0
    gradients: int = 0
    moments: int = 0
    activations: int = 0
    scratch: int = 0
    program: int = 0
    by_operation: dict[str, int] = field(default_factory=dict)

    def by_owner(self) -> dict[str, int]:
        """The owners and their bytes, without those that hold nothing."""
        owners = ("program", "weights", "adapter", "gradients", "moments", "activations", "scratch")
        return {name: n for name in owners if (n := getattr(self, name))}

    @property
    def total(self) -> int:
        return sum(self.by_owner().values())


def base_parameters(config: Config) -> int:
    """The number of parameters of a Llama model with this shape."""
    C = config.hidden_size
    block = sum(m * n for m, n in (shape(config) for shape in SHAPES.values())) + 2 * C
    embeddings = config.vocab_size * C * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * block + C


def predict_memory(
    config: Config,
    tokens: int,
    scored: int,
    rank: int | None = None,
    targets: Collection[str] = tuple(SHAPES),
    *,
    rows: int = 1,
    threads: int = 1,
    rounds: int = 1,
    base_bytes: int | None = None,
    recompute: bool = False,
    program: int = 0,
) -> Memory:
    """What a training step with AdamW holds at its peak, by owner.

    tokens, scored: those whose activations exist at the same time, in rows of equal length: the whole batch where the
    model does not divide it; where it does, `alive_at_once` says how many, in how many threads and rounds.
    rank: of the adapter on the modules named in `targets` of every block; None for full fine-tuning.
    base_bytes: what the base's weights take, if they are not float32. program: what Python and libraries take.

    On the way back gradients grow while activations go. An adapter's gradients, which are small, are counted whole all
    the same; for full fine-tuning the larger of both ends is given.
    """
    base = base_parameters(config)
    adapted = set(SHAPES if rank is None else targets)
    thin = config.num_hidden_layers * sum(sum(SHAPES[name](config)) for name in adapted)  # an adapter of rank 1
    adapter = 0 if rank is None else thin * rank
    trained = base if rank is None else adapter
    table = config.vocab_size * config.hidden_size
    shape = (config, tokens, scored, rank, adapted, rows)
    activations = recomputed_activations(*shape) if recompute else kept_activations(*shape)
    of_loss, of_block = _scratch(config, tokens // threads, scored // threads, rank is None)
    if recompute:
        of_block += sum(_kept_by_block(config, tokens // threads, rank, adapted, True)[0].values()) // FLOAT
    if base_bytes is not None and base_bytes < FLOAT * base:  # packed: a matrix is unpacked for its product
        of_loss += 2 * min(WORDS, config.vocab_size) * config.hidden_size  # the next one, before the last one goes
        of_block += config.intermediate_size * config.hidden_size

    def held(gradients: int, activations: Mapping[str, int], scratch: int) -> Memory:
        return Memory(
            weights=FLOAT * base if base_bytes is None else base_bytes,
            adapter=FLOAT * adapter,
            gradients=FLOAT * gradients,
            moments=FLOAT * 2 * trained,
            activations=sum(activations.values()),
            scratch=FLOAT * scratch,
            program=program,
            by_operation=dict(sorted(activations.items(), key=lambda item: -item[1])),
        )

    if rank is not None:
        return held(adapter, activations, threads * max(of_loss, of_block))
    # Every thread makes the head's gradient, first of all, and the embedding's, last of all, to be added where they are
    # tied. After a first round all gradients are there.
    gradients, beside = (base, threads * table) if rounds > 1 else (table, (threads - 1) * table)
    first = held(gradients, activations, beside + threads * max(of_loss, of_block))
    last = held(base, {}, threads * table if config.tie_word_embeddings else (threads - 1) * table)
    return max(first, last, key=lambda memory: memory.total)


def parts_at_once(batch: Batch | Sequence[Sample], threads: int | None = None) -> tuple[list[Batch], int]:
    """Of the micro-batches of a batch, or of samples, the largest that may be alive together; how many rounds.

    threads: None for as many as `loss_and_grad` would use now.
    """
    threads = threads or cores()
    parts = micro_batches(batch, threads)
    largest = sorted(parts, key=lambda part: part.input_ids.size, reverse=True)[:threads]
    return largest, math.ceil(len(parts) / len(largest))


def alive_at_once(batch: Batch | Sequence[Sample], threads: int | None = None) -> dict[str, int]:
    """The same as arguments for `predict_memory`: tokens, scored, rows, threads and rounds."""
    parts, rounds = parts_at_once(batch, threads)
    return {
        "tokens": sum(part.input_ids.size for part in parts),
        "scored": sum(part.scored for part in parts),
        "rows": len(parts[0].input_ids),
        "threads": len(parts),
        "rounds": rounds,
    }


# -- activations, operation by operation: what each keeps is said in its docstring -------------------------------------


def kept_activations(
    config: Config, tokens: int, scored: int, rank: int | None, adapted: Collection[str], rows: int = 1
) -> dict[str, int]:
    """Bytes that the graph holds when the loss is computed, by operation. Arguments as for `predict_memory`."""
    kept, flows = Counter[str](), rank is None  # is there something trained so far, to which a gradient must flow?
    for _ in range(config.num_hidden_layers):
        block, flows = _kept_by_block(config, tokens, rank, adapted, flows)
        kept += block
    return dict(kept + _kept_around(config, tokens, scored, rank, rows))


def recomputed_activations(
    config: Config, tokens: int, scored: int, rank: int | None, adapted: Collection[str], rows: int = 1
) -> dict[str, int]:
    """The same where every block keeps its input alone (engine/recompute.py)."""
    around = _kept_around(config, tokens, scored, rank, rows)
    around["recomputed"] = around.pop("rope") + FLOAT * config.num_hidden_layers * tokens * config.hidden_size
    return dict(around)


def _kept_by_block(
    config: Config, tokens: int, rank: int | None, adapted: Collection[str], flows: bool
) -> tuple[Counter[str], bool]:
    """What one block keeps. flows: does a gradient flow on to what is before it? Also returned: does one flow into it?

    A norm or SwiGLU to which a gradient flows keeps its inputs, and linear maps compute its output again from there; in
    a first block, where nothing before is trained, they must keep it themselves.
    """
    C, F = config.hidden_size, config.intermediate_size
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    numbers = Counter[str]()  # per token

    def linear(width: int, again: bool, *names: str) -> bool:  # maps that share one input of this width
        mine = [name for name in names if name in adapted]
        kept = (rank or 0) * len(mine) + (width if mine and not again else 0)  # x Aᵀ of each, and x
        numbers["linear" if rank is None else "lora_linear"] += kept
        return bool(mine)

    def norm() -> None:
        numbers["rms_norm"] += C + 1 if flows else 0  # x and one number

    norm()
    if linear(C, flows, "q_proj", "k_proj", "v_proj") or flows:
        flows = True
        numbers["attention"] += heads + 2 * keys + config.num_attention_heads  # q, k, v, and one number per head
    flows = linear(heads, False, "o_proj") or flows
    norm()
    active = linear(C, flows, "gate_proj", "up_proj") or flows
    numbers["swiglu"] += 2 * F if active else 0
    flows = linear(F, active, "down_proj") or active
    return Counter({name: FLOAT * tokens * n for name, n in numbers.items() if n}), flows


def _kept_around(config: Config, tokens: int, scored: int, rank: int | None, rows: int) -> Counter[str]:
    """What is kept outside of the blocks: the rotary angles that all share, and what comes before and after."""
    C = config.hidden_size
    kept = Counter(
        rope=FLOAT * tokens // rows * config.head_dim,  # cos and sin
        rms_norm=FLOAT * tokens * (C + 1),
        linear_cross_entropy=FLOAT * scored * C + INTEGER * (tokens + scored),  # dx, labels, where they stand
    )
    if rank is None:
        kept["embedding"] = INTEGER * tokens  # the ids
        kept["linear_cross_entropy"] += FLOAT * scored * (C + 1) + INTEGER * scored  # for dw: x, log Σ exp, the targets
    return kept


def _scratch(config: Config, tokens: int, scored: int, full: bool) -> tuple[int, int]:
    """Numbers that exist only while an operation runs, of one thread: in the loss, and in a block. An estimate."""
    C, F, words = config.hidden_size, config.intermediate_size, min(WORDS, config.vocab_size)
    together = scored if full else min(TOKENS, scored)  # dw takes all tokens at a time
    logits = together * words * (2 if together < scored or words < config.vocab_size else 1)  # one is made, one goes
    of_loss = logits + 2 * scored * C  # x, and the rows of the right answers
    of_block = tokens * (3 * F + C)  # the gradients of SwiGLU's output and inputs, and of the block's output
    return of_loss, of_block

"""Where the bytes go: what one training step will hold, predicted from shapes before anything runs.

Freezing saves gradients and Adam's two moments. It does not save activations, the arrays that operations keep for
backward: those depend on tokens and layers, and every layer still passes a gradient on. What is really held is measured
in ledger.py, and is written down in the same form.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ..engine.attention import Packing
from ..engine.backend import Array
from ..engine.parallel import cores
from ..nn.llama import Config
from ..nn.parts import divide

FLOAT, INTEGER = 4, 8  # bytes of a float32, and of the int64 of ids and labels
LOSS_BLOCK, LOSS_WORDS = 256, 4096  # linear_cross_entropy works on so many tokens and words at a time

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
    operation runs, the logits of a block of tokens among it. program: Python, the libraries and the tokenizer.
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
    packed = base_bytes is not None and base_bytes < FLOAT * base
    shape = (config, tokens, scored, rank, adapted, rows)
    own = (config, tokens // threads, scored // threads, rank is None, packed)  # of one thread

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

    gradients, table = adapter, threads * config.vocab_size * config.hidden_size
    if rank is None:  # what a first round has left, and each thread's gradient of the head
        gradients = table + (base if rounds > 1 else 0)
    at_the_loss = recomputed_activations(*shape) if recompute else kept_activations(*shape)
    in_a_block = _computed_again(*shape) if recompute else at_the_loss
    moments = [
        held(gradients, at_the_loss, threads * _scratch_of_loss(*own)),
        held(gradients, in_a_block, threads * _scratch_of_block(*own)),
    ]
    if rank is None:  # the embedding's gradient comes last, to be added to the head's where the two are tied
        moments.append(held(base, {}, table if config.tie_word_embeddings else 0))
    return max(moments, key=lambda memory: memory.total)


def alive_at_once(
    input_ids: Array, labels: Array, packing: Packing | None = None, threads: int | None = None
) -> dict[str, int]:
    """How much of a batch is in memory at a time when `Llama.loss` divides it: arguments for `predict_memory`.

    input_ids, labels (B, T), packing: as for `Llama.loss`. threads: None for as many as it would use now.
    """
    threads = threads or cores()
    parts = divide(input_ids, labels, packing, threads)
    threads = min(threads, len(parts))
    largest = sorted(parts, key=lambda part: part.input_ids.size, reverse=True)[:threads]
    return {
        "tokens": sum(part.input_ids.size for part in largest),
        "scored": sum(part.scored for part in largest),
        "rows": len(largest[0].input_ids),
        "threads": threads,
        "rounds": math.ceil(len(parts) / threads),
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


def _computed_again(
    config: Config, tokens: int, scored: int, rank: int | None, adapted: Collection[str], rows: int
) -> dict[str, int]:
    """On the way back with recomputation: the inputs of all blocks, and all that one block keeps."""
    inputs = recomputed_activations(config, tokens, scored, rank, adapted, rows)["recomputed"]
    return {"recomputed": inputs} | _kept_by_block(config, tokens, rank, adapted, flows=True)[0]


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


# -- scratch: numbers that exist only while an operation runs, at its largest, in one thread; an estimate ---------------


def _scratch_of_loss(config: Config, tokens: int, scored: int, full: bool, packed: bool) -> int:
    """x, the rows of the right answers, and logits: the block at work, and the one before until it is done."""
    C, words = config.hidden_size, min(LOSS_WORDS, config.vocab_size)
    together = scored if full else min(LOSS_BLOCK, scored)  # dw takes all tokens at a time
    two = 2 if together < scored or words < config.vocab_size else 1
    return two * together * words + 2 * scored * C + (words * C if packed else 0)  # a packed matrix is unpacked


def _scratch_of_block(config: Config, tokens: int, scored: int, full: bool, packed: bool) -> int:
    """The gradients of the block's output, of SwiGLU's output and of its two inputs."""
    C, F = config.hidden_size, config.intermediate_size
    return tokens * (3 * F + C) + (F * C if packed else 0)


# -- the process -------------------------------------------------------------------------------------------------------


def peak_memory() -> int | None:
    """The most memory this process has held so far, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

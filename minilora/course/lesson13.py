"""Lesson 13's exercises: count an adapter, predict the memory of training, choose a rank."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from ..nn.llama import Config, Llama
from .exercises import Draw, exercise, variant

Shapes = dict[str, tuple[int, ...]]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def draw_shapes(rng: np.random.Generator, tied: bool) -> Shapes:
    """The parameters of a small Llama whose adapter is large beside it, so that no mistake hides within one percent."""
    config = Config(
        vocab_size=int(rng.integers(100, 140)),
        hidden_size=int(rng.choice([24, 32, 40])),
        intermediate_size=int(rng.choice(np.arange(51, 91, 2))),  # 3/2 of no width: there two mistakes come to the same
        num_hidden_layers=int(rng.integers(2, 4)),
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return {name: tuple(parameter.shape) for name, parameter in Llama(config, rng).named_parameters()}


def numbers(shapes: Shapes) -> int:
    """How many parameters the base has."""
    return sum(map(math.prod, shapes.values()))


def ends(shapes: Shapes, names: tuple[str, ...] = (*ATTENTION, *MLP), layer: str = "") -> int:
    """Σ (m + n) over the matrices of these names."""
    return sum(sum(shape) for name, shape in shapes.items() if name.split(".")[-2] in names and layer in name)


# -- 13.1 --------------------------------------------------------------------------------------------------------------


@exercise(
    "13.1",
    draw=lambda rng: Draw(shapes=draw_shapes(rng, tied=False), r=int(rng.integers(3, 9))),
    smallest=lambda rng: Draw(shapes=draw_shapes(rng, tied=True), r=0),
    returns="the count",
    tolerance=0,
    mistakes="""
        r is missing: an (m, n) matrix gets r (m + n) parameters
            r * sum(shape) -> sum(shape)
        an (m, n) matrix gets r (m + n) parameters, not r m n
            r * sum(shape) -> r * math.prod(shape)
        that counts the matrices themselves: an (m, n) matrix gets r (m + n) parameters
            r * sum(shape) -> math.prod(shape)
        you counted A alone, r n: B has m r more
            r * sum(shape) -> r * shape[1]
        you counted B alone, m r: A has r n more
            r * sum(shape) -> r * shape[0]
        2 r n is right only for square matrices: in general it is r (m + n)
            r * sum(shape) -> 2 * r * shape[1]
        2 r m is right only for square matrices: in general it is r (m + n)
            r * sum(shape) -> 2 * r * shape[0]
        "all-linear" leaves out the embedding and the head, and you counted both
            "_proj" in name -> "norm" not in name
        "all-linear" leaves out the embedding and the head, and you counted one of them
            "_proj" in name -> "norm" not in name and "lm_head" not in name
        you counted every parameter: norms, embedding and head get no adapter
            if "_proj" in name ->
        you counted q_proj and v_proj alone: all-linear is all seven of a block
            "_proj" in name -> "q_proj" in name or "v_proj" in name
        you counted attention alone: gate_proj, up_proj and down_proj get an adapter too
            "_proj" in name -> "self_attn" in name
        you counted the MLP alone: the four matrices of attention get an adapter too
            "_proj" in name -> "mlp" in name
        you counted one block: the model has several
            "_proj" in name -> "_proj" in name and "layers.0." in name
    """,
)
def adapter_parameters(shapes, r):
    """shapes: a dictionary of name -> shape, r: the rank -> how many parameters all A and B have together"""
    return sum(r * sum(shape) for name, shape in shapes.items() if "_proj" in name)


IN_ATTENTION = {  # words of the page in the form that adapts attention alone
    "*all linear layers* of the blocks, whose names contain `_proj`. Embedding,": (
        "*attention alone*, in the blocks, whose names contain `self_attn`. MLP, embedding,"
    ),
    "*all linear layers*": "*attention alone*",
    '"_proj" in name': '"self_attn" in name',
    "the count is 1,024. For SmolLM2-135M and r = 8 it is 2,442,240.": (
        "the count is 448. For SmolLM2-135M and r = 8 it is 921,600."
    ),
}


variant("adapter_parameters", IN_ATTENTION, "attention alone is adapted")


# -- 13.2 --------------------------------------------------------------------------------------------------------------


MEMORY_MISTAKES = """
    these are the weights alone: a trainable parameter also has a gradient and the optimizer's arrays
        (2 + moments) -> 1
    one array is missing: a trainable parameter has a weight, a gradient, and `moments` arrays of the optimizer
        2 + moments -> 1 + moments
    the optimizer's arrays are missing: `moments` per trainable parameter
        (2 + moments) -> 2
    that is Adam, which stores two arrays: here the optimizer stores `moments` arrays
        (2 + moments) -> 4
    one array is too many: a weight, a gradient, and `moments` arrays of the optimizer
        2 + moments -> 3 + moments
    LoRA: the base's weights are missing; frozen weights are in memory, too
        frozen_bytes * frozen + ->
    LoRA: a frozen weight takes `frozen_bytes`, and you count 4 bytes for it
        frozen_bytes * -> 4 *
    LoRA: the adapter is trained, so its weights take 4 bytes; only frozen weights take `frozen_bytes`
        4 * (2 + moments) -> (4 * (1 + moments) + (4 if r is None else frozen_bytes))
    LoRA: a frozen weight has no gradient, and you count one
        frozen_bytes * -> (frozen_bytes + 4) *
    LoRA: a frozen weight has neither gradient nor optimizer state, and you count them
        frozen_bytes * -> (frozen_bytes + 4 + 4 * moments) *
    LoRA: that is the base alone; the adapter has weights, gradients and optimizer state
        return -> return frozen_bytes * base if r is not None else
    LoRA: that is full fine-tuning; a frozen weight has no gradient and no optimizer state
        -> r = None
    full fine-tuning: nothing is frozen, so no weight takes `frozen_bytes`
        frozen = 0 if r is None else base -> frozen = base
    full fine-tuning: every weight is trained, so it takes 4 bytes and not `frozen_bytes`
        4 * (2 + moments) -> (4 * (1 + moments) + (frozen_bytes if r is None else 4))
    give bytes, not megabytes
        frozen_bytes * frozen + 4 * -> 1e-6 * frozen_bytes * frozen + 4e-6 *
    give bytes, not mebibytes
        frozen_bytes * frozen + 4 * -> 2**-20 * frozen_bytes * frozen + 2**-18 *
    give bytes, not bits
        frozen_bytes * frozen + 4 * -> 8 * frozen_bytes * frozen + 32 *
"""


def draw_step(rng: np.random.Generator, adapted: bool, frozen_bytes: float, moments: int) -> Draw:
    """A model, a rank or None, and what optimizer and base take."""
    r = int(rng.integers(4, 12)) if adapted else None
    shapes = draw_shapes(rng, bool(rng.integers(2)))
    return Draw(shapes=shapes, r=r, frozen_bytes=frozen_bytes, moments=moments)


@exercise(
    "13.2",
    draw=[
        partial(draw_step, adapted=True, frozen_bytes=2, moments=4),
        partial(draw_step, adapted=False, frozen_bytes=1, moments=4),
        partial(draw_step, adapted=True, frozen_bytes=0.625, moments=2),
    ],
    smallest=lambda rng: Draw(shapes=draw_shapes(rng, tied=True), r=0, frozen_bytes=2, moments=0),
    returns="the memory in bytes",
    tolerance=0.01,
    mistakes=MEMORY_MISTAKES,
)
def training_memory(shapes, r=None, frozen_bytes=4, moments=2):
    """shapes: a dictionary of name -> shape, r: the rank, None for full fine-tuning -> bytes"""
    base = sum(math.prod(shape) for shape in shapes.values())
    trained = base if r is None else adapter_parameters(shapes, r)
    frozen = 0 if r is None else base
    return frozen_bytes * frozen + 4 * (2 + moments) * trained


variant("training_memory", IN_ATTENTION, "attention alone is adapted")


# -- 13.3 --------------------------------------------------------------------------------------------------------------


def draw_budget(rng: np.random.Generator, kind: str, names: tuple[str, ...] = (*ATTENTION, *MLP)) -> Draw:
    """A budget that r fits to the last byte, one with something to spare, or one that holds no adapter at all."""
    shapes, r = draw_shapes(rng, bool(rng.integers(2))), int(rng.integers(2, 20))
    base, step = 4 * numbers(shapes), 16 * ends(shapes, names)
    budget = {
        "exact": base + r * step,
        "spare": base + r * step + step // 2,
        "none": base + step - 1,
        "tiny": base // 2,
    }
    return Draw(shapes=shapes, budget=budget[kind])


RANK_MISTAKES = """
    the base is missing: its frozen weights are part of the budget
        budget - base -> budget
    gradients and optimizer state are missing: an adapter takes four arrays, not one
        // one_more -> // (one_more // 4)
    Adam's two moments are missing: an adapter takes four arrays, not two
        // one_more -> // (one_more // 2)
    one array is missing: an adapter takes four, two of them moments
        // one_more -> // (one_more * 3 // 4)
    rounded up, it does not fit: round down
        (budget - base) // one_more -> math.ceil((budget - base) / one_more)
    a rank is a whole number: round down
        // one_more -> / one_more
    the base is frozen: it has neither gradients nor optimizer state
        budget - base -> budget - 4 * base
    where the budget is too small for the frozen base, the answer is 0
        max(0, (budget - base) // one_more) -> (budget - base) // one_more
    one more fits exactly: a budget may be used to the last byte
        budget - base -> budget - 1 - base
"""
BUDGETS = ("exact", "spare", "none", "tiny")


@exercise(
    "13.3",
    draw=[partial(draw_budget, kind=kind) for kind in BUDGETS],
    returns="the rank",
    tolerance=0,
    mistakes=RANK_MISTAKES,
)
def largest_rank(shapes, budget):
    """shapes: a dictionary of name -> shape, budget: bytes -> the largest r that fits, 0 if none does"""
    base = training_memory(shapes, 0)
    one_more = training_memory(shapes, 1) - base
    return max(0, (budget - base) // one_more)


variant(
    "largest_rank",
    IN_ATTENTION,
    "attention alone is adapted",
    draw=[partial(draw_budget, kind=kind, names=ATTENTION) for kind in BUDGETS],
)

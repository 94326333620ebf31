"""Lesson 13's exercises: count an adapter, predict the memory of training, choose a rank."""

import math
from functools import partial

import numpy as np

from ..nn.llama import Config, Llama
from .exercises import Draw, exercise, variant

Shapes = dict[str, tuple[int, ...]]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def draw_shapes(rng: np.random.Generator, tied: bool) -> Shapes:
    """A small Llama."""
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


def ends(shapes: Shapes, names: tuple[str, ...] = (*ATTENTION, *MLP)) -> int:
    """Σ (m + n) over the matrices of these names."""
    return sum(sum(shape) for name, shape in shapes.items() if name.split(".")[-2] in names)


# -- 13.1 --------------------------------------------------------------------------------------------------------------


@exercise(
    "13.1",
    draw=lambda rng: Draw(shapes=draw_shapes(rng, tied=False), r=int(rng.integers(3, 9))),
    smallest=lambda rng: Draw(shapes=draw_shapes(rng, tied=True), r=0),
    returns="the count",
    tolerance=0,
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


variant(
    "adapter_parameters",
    IN_ATTENTION,
    "attention alone is adapted",
    lines={
        "all-linear is all seven of a block": "attention has four matrices",
        '"all-linear" leaves out': "the adapter leaves out",
        "get an adapter too": "get an adapter, and it gets none",
    },
)


# -- 13.2 --------------------------------------------------------------------------------------------------------------


def draw_step(rng: np.random.Generator, adapted: bool, frozen_bytes: float, moments: int) -> Draw:
    """A model, a rank or None, and what optimizer and base take."""
    r = int(rng.integers(4, 12)) if adapted else None
    shapes = draw_shapes(rng, tied=not adapted)
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
    """A budget that r fits to the last byte, one with something to spare, one for a rank in the hundreds, or one that
    holds no adapter at all.
    """
    shapes, r = draw_shapes(rng, bool(rng.integers(2))), int(rng.integers(2, 20))
    base, step = 4 * numbers(shapes), 16 * ends(shapes, names)
    budget = {
        "exact": base + r * step,
        "spare": base + r * step + step // 2,
        "large": base + (256 + 97 * r) * step,
        "none": base + step - 1,
        "tiny": base // 2,
    }
    return Draw(shapes=shapes, budget=budget[kind])


BUDGETS = ("exact", "spare", "large", "none", "tiny")


@exercise("13.3", draw=[partial(draw_budget, kind=kind) for kind in BUDGETS], returns="the rank", tolerance=0)
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

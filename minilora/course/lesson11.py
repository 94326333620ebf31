"""Lesson 11's exercises: count an adapter, predict the memory of training, choose a rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..nn.llama import Config, Llama
from .exercises import Draw, exercise

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


# -- 11.1 --------------------------------------------------------------------------------------------------------------


def counting(count: Callable[[Shapes], int]) -> Callable:
    """r times another sum over the shapes."""
    return lambda shapes, r: r * count(shapes)


@exercise(
    "11.1",
    draw=lambda rng: Draw(shapes=draw_shapes(rng, tied=False), r=int(rng.integers(3, 9))),
    smallest=lambda rng: Draw(shapes=draw_shapes(rng, tied=True), r=0),
    returns="the count",
    tolerance=0,
    decisive=["r * sum(shape) for"],
    mistakes={
        "no r": (lambda shapes, r: ends(shapes), "r is missing: an (m, n) matrix gets r (m + n) parameters"),
        "product": (
            counting(lambda s: sum(math.prod(shape) for name, shape in s.items() if "_proj" in name)),
            "an (m, n) matrix gets r (m + n) parameters, not r m n",
        ),
        "the matrices": (
            lambda shapes, r: sum(math.prod(shape) for name, shape in shapes.items() if "_proj" in name),
            "that counts the matrices themselves: an (m, n) matrix gets r (m + n) parameters",
        ),
        "A alone": (
            counting(lambda s: sum(shape[1] for name, shape in s.items() if "_proj" in name)),
            "you counted A alone, r n: B has m r more",
        ),
        "B alone": (
            counting(lambda s: sum(shape[0] for name, shape in s.items() if "_proj" in name)),
            "you counted B alone, m r: A has r n more",
        ),
        "square": (
            counting(lambda s: 2 * sum(shape[1] for name, shape in s.items() if "_proj" in name)),
            "2 r n holds for square matrices alone: in general it is r (m + n)",
        ),
        "embedding and head": (
            counting(lambda s: ends(s, (*ATTENTION, *MLP, "embed_tokens", "lm_head"))),
            '"all-linear" leaves out the embedding and the head, and you counted both',
        ),
        "embedding": (
            counting(lambda s: ends(s, (*ATTENTION, *MLP, "embed_tokens"))),
            '"all-linear" leaves out the embedding and the head, and you counted one of them',
        ),
        "everything": (
            counting(lambda s: sum(map(sum, s.values()))),
            "you counted every parameter: norms, embedding and head get no adapter",
        ),
        "q and v": (
            counting(lambda s: ends(s, ("q_proj", "v_proj"))),
            "you counted q_proj and v_proj alone: all-linear is all seven of a block",
        ),
        "attention": (
            counting(lambda s: ends(s, ATTENTION)),
            "you counted attention alone: gate_proj, up_proj and down_proj get an adapter too",
        ),
        "the MLP": (
            counting(lambda s: ends(s, MLP)),
            "you counted the MLP alone: the four matrices of attention get an adapter too",
        ),
        "one block": (
            counting(lambda s: ends(s, layer="layers.0.")),
            "you counted one block: the model has several",
        ),
    },
)
def adapter_parameters(shapes: Shapes, r: int) -> int:
    """r Σ (m + n) over the linear layers, without embedding, head and norms."""
    return r * ends(shapes)


# -- 11.2 --------------------------------------------------------------------------------------------------------------


def memory(full: float = 4, base: float = 1, adapter: float = 4, unit: float = 4) -> Callable:
    """Bytes: so many arrays of the base in full fine-tuning; so many of the base and of the adapter with LoRA."""

    def answer(shapes: Shapes, r: int | None) -> float:
        P = numbers(shapes)
        return unit * (full * P if r is None else base * P + adapter * adapter_parameters(shapes, r))

    return answer


@exercise(
    "11.2",
    draw=[
        lambda rng: Draw(shapes=draw_shapes(rng, bool(rng.integers(2))), r=int(rng.integers(4, 12))),
        lambda rng: Draw(shapes=draw_shapes(rng, bool(rng.integers(2))), r=None),
    ],
    smallest=lambda rng: Draw(shapes=draw_shapes(rng, tied=True), r=0),
    returns="the memory in bytes",
    tolerance=0.01,
    decisive=["4 * (base + adapter + learns + 2 * learns)"],
    mistakes={
        "weights alone": (
            memory(full=1, adapter=1),
            "these are the weights alone: what learns has a gradient and Adam's two moments, too",
        ),
        "one moment": (
            memory(full=3, adapter=3),
            "one array is missing: weights, gradients, and Adam's two moments make four",
        ),
        "no moments": (memory(full=2, adapter=2), "Adam's two moments are missing: it keeps m and v for each number"),
        "too many": (memory(full=5, adapter=5), "one array is too many: weights, gradients, two moments make four"),
        "no base": (memory(base=0), "LoRA: the base's weights are missing; frozen, they are still held"),
        "base has moments": (
            memory(base=4),
            "LoRA: a frozen weight has no gradient and no moments, and you count them",
        ),
        "base has a gradient": (memory(base=2), "LoRA: a frozen weight has no gradient, either"),
        "no adapter": (
            memory(adapter=0),
            "LoRA: that is the base alone; the adapter has weights, gradients and two moments",
        ),
        "full for both": (
            lambda shapes, r: memory()(shapes, None),
            "LoRA: that is full fine-tuning; a frozen weight has no gradient and no moments",
        ),
        "numbers": (memory(unit=1), "that is how many numbers there are: a float32 takes 4 bytes"),
        "half": (memory(unit=2), "a float32 takes 4 bytes, not 2"),
        "double": (memory(unit=8), "a float32 takes 4 bytes, not 8"),
        "bits": (memory(unit=32), "a float32 takes 4 bytes; that counts its 32 bits"),
        "megabytes": (memory(unit=4e-6), "give bytes, not megabytes"),
        "mebibytes": (memory(unit=4 * 2**-20), "give bytes, not mebibytes"),
    },
)
def training_memory(shapes: Shapes, r: int | None = None) -> float:
    """Bytes of weights, gradients and moments, within 1 %; r None is full fine-tuning."""
    return memory()(shapes, r)


# -- 11.3 --------------------------------------------------------------------------------------------------------------


def draw_budget(rng: np.random.Generator, kind: str) -> Draw:
    """A budget that r fits to the last byte, one with something to spare, or one that holds no adapter at all."""
    shapes, r = draw_shapes(rng, bool(rng.integers(2))), int(rng.integers(2, 20))
    base, step = 4 * numbers(shapes), 16 * ends(shapes)
    budget = {
        "exact": base + r * step,
        "spare": base + r * step + step // 2,
        "none": base + step - 1,
        "tiny": base // 2,
    }
    return Draw(shapes=shapes, budget=budget[kind])


def affords(arrays: int = 4, base: int = 1, rounded: Callable[[float], Any] = math.floor, least: float = 0) -> Callable:
    """The rank that a budget gives where something is left out or rounded in another way."""

    def answer(shapes: Shapes, budget: int) -> Any:
        return max(least, rounded((budget - base * 4 * numbers(shapes)) / (4 * arrays * ends(shapes))))

    return answer


@exercise(
    "11.3",
    draw=[partial(draw_budget, kind=kind) for kind in ("exact", "spare", "none", "tiny")],
    returns="the rank",
    tolerance=0,
    decisive=["(budget - base) // one_more"],
    mistakes={
        "no base": (affords(base=0), "the base is missing: its frozen weights take their share of the budget"),
        "one array": (affords(arrays=1), "gradients and moments are missing: an adapter takes four arrays, not one"),
        "two arrays": (affords(arrays=2), "Adam's two moments are missing: an adapter takes four arrays, not two"),
        "three arrays": (affords(arrays=3), "one array is missing: an adapter takes four, two of them moments"),
        "rounded up": (affords(rounded=math.ceil), "rounded up, it does not fit: round down"),
        "not whole": (affords(rounded=float), "a rank is a whole number: round down"),
        "full base": (affords(base=4), "the base is frozen: it has neither gradients nor moments"),
        "below zero": (affords(least=-math.inf), "where the budget holds not even the frozen base, the answer is 0"),
        "one too few": (
            lambda shapes, budget: affords()(shapes, budget - 1),
            "one more fits, to the last byte: a budget may be used up",
        ),
    },
)
def largest_rank(shapes: Shapes, budget: int) -> int:
    """The largest r whose training fits the budget; 0 if none does."""
    return max(0, (budget - 4 * numbers(shapes)) // (16 * ends(shapes)))

"""Lesson 11's exercises: count an adapter, predict the memory of training, choose a rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

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
        "square, by rows": (
            counting(lambda s: 2 * sum(shape[0] for name, shape in s.items() if "_proj" in name)),
            "2 r m holds for square matrices alone: in general it is r (m + n)",
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


@variant("adapter_parameters", IN_ATTENTION)
def adapter_parameters_in_attention(shapes: Shapes, r: int) -> int:
    """r Σ (m + n) over attention's matrices."""
    return r * ends(shapes, ATTENTION)


# -- 11.2 --------------------------------------------------------------------------------------------------------------


def memory(
    state: Callable[[int], float] = lambda moments: 2 + moments,
    unit: float = 4,
    base: Callable[[float], float] = lambda frozen_bytes: frozen_bytes,
    adapter: Callable[[float], float] = lambda frozen_bytes: 4,
    names: tuple[str, ...] = (*ATTENTION, *MLP),
) -> Callable:
    """Bytes: state(moments) arrays of what learns, the first of which takes adapter(frozen_bytes) for a number and the
    others `unit`; and base(frozen_bytes) for a number of a frozen base.
    """

    def answer(shapes: Shapes, r: int | None, frozen_bytes: float, moments: int) -> float:
        P = numbers(shapes)
        learns, frozen = (P, 0) if r is None else (r * ends(shapes, names), P)
        first = 0 if r is None else adapter(frozen_bytes) - 4
        return base(frozen_bytes) * frozen + (unit * state(moments) + first) * learns

    return answer


def scaled(factor: float) -> Callable:
    """The right number of bytes in another unit."""
    return lambda *given: factor * memory()(*given)


def memory_mistakes(names: tuple[str, ...]) -> dict[str, tuple[Callable, str]]:
    """What goes wrong in 11.2, where these modules are adapted."""
    of = partial(memory, names=names)
    return {
        "weights alone": (
            of(lambda moments: 1),
            "these are the weights alone: what learns has a gradient, too, and the optimizer's arrays",
        ),
        "no gradient": (
            of(lambda moments: 1 + moments),
            "one array is missing: what learns has a weight, a gradient, and `moments` arrays of the optimizer",
        ),
        "no moments": (of(lambda moments: 2), "the optimizer's arrays are missing: `moments` for what learns"),
        "always Adam": (
            of(lambda moments: 4),
            "that is Adam, which keeps two: here the optimizer keeps `moments` arrays",
        ),
        "too many": (
            of(lambda moments: 3 + moments),
            "one array is too many: a weight, a gradient, and `moments` arrays of the optimizer",
        ),
        "no base": (of(base=lambda b: 0), "LoRA: the base's weights are missing; frozen, they are still held"),
        "base in float32": (
            of(base=lambda b: 4),
            "LoRA: a frozen weight takes `frozen_bytes`, and you count 4 bytes for it",
        ),
        "adapter in frozen bytes": (
            of(adapter=lambda b: b),
            "LoRA: the adapter learns, so its weights take 4 bytes; only what is frozen takes `frozen_bytes`",
        ),
        "base has a gradient": (of(base=lambda b: b + 4), "LoRA: a frozen weight has no gradient, and you count one"),
        "base has all": (
            lambda shapes, r, b, moments: (
                of()(shapes, r, b, moments) + (0 if r is None else 4 * (1 + moments) * numbers(shapes))
            ),
            "LoRA: a frozen weight has neither gradient nor moments, and you count them",
        ),
        "no adapter": (
            lambda shapes, r, b, moments: of()(shapes, r, b, moments) if r is None else b * numbers(shapes),
            "LoRA: that is the base alone; the adapter has weights, gradients and moments",
        ),
        "full for both": (
            lambda shapes, r, b, moments: of()(shapes, None, b, moments),
            "LoRA: that is full fine-tuning; a frozen weight has no gradient and no moments",
        ),
        "full has a frozen base": (
            lambda shapes, r, b, moments: of()(shapes, r, b, moments) + (b * numbers(shapes) if r is None else 0),
            "full fine-tuning: nothing is frozen, so no weight takes `frozen_bytes`",
        ),
        "full in frozen bytes": (
            lambda shapes, r, b, moments: (
                (b + 4 + 4 * moments) * numbers(shapes) if r is None else of()(shapes, r, b, moments)
            ),
            "full fine-tuning: every weight learns, so it takes 4 bytes and not `frozen_bytes`",
        ),
        "megabytes": (scaled(1e-6), "give bytes, not megabytes"),
        "mebibytes": (scaled(2**-20), "give bytes, not mebibytes"),
        "bits": (scaled(8), "give bytes, not bits"),
    }


def draw_step(rng: np.random.Generator, adapted: bool, frozen_bytes: float, moments: int) -> Draw:
    """A model, a rank or None, and what optimizer and base take."""
    r = int(rng.integers(4, 12)) if adapted else None
    shapes = draw_shapes(rng, bool(rng.integers(2)))
    return Draw(shapes=shapes, r=r, frozen_bytes=frozen_bytes, moments=moments)


@exercise(
    "11.2",
    draw=[
        partial(draw_step, adapted=True, frozen_bytes=2, moments=4),
        partial(draw_step, adapted=False, frozen_bytes=1, moments=4),
        partial(draw_step, adapted=True, frozen_bytes=0.625, moments=2),
    ],
    smallest=lambda rng: Draw(shapes=draw_shapes(rng, tied=True), r=0, frozen_bytes=2, moments=0),
    returns="the memory in bytes",
    tolerance=0.01,
    decisive=["frozen_bytes * frozen + 4 * (2 + moments) * learns"],
    mistakes=memory_mistakes((*ATTENTION, *MLP)),
)
def training_memory(shapes: Shapes, r: int | None = None, frozen_bytes: float = 4, moments: int = 2) -> float:
    """Bytes of weights, gradients and moments, within 1 %; r None is full fine-tuning."""
    return memory()(shapes, r, frozen_bytes, moments)


@variant("training_memory", IN_ATTENTION, mistakes=memory_mistakes(ATTENTION))
def training_memory_in_attention(
    shapes: Shapes, r: int | None = None, frozen_bytes: float = 4, moments: int = 2
) -> float:
    """With an adapter on attention alone."""
    return memory(names=ATTENTION)(shapes, r, frozen_bytes, moments)


# -- 11.3 --------------------------------------------------------------------------------------------------------------


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


def affords(
    arrays: int = 4,
    base: int = 1,
    rounded: Callable[[float], Any] = math.floor,
    least: float = 0,
    names: tuple[str, ...] = (*ATTENTION, *MLP),
) -> Callable:
    """The rank that a budget gives where something is left out or rounded in another way."""

    def answer(shapes: Shapes, budget: int) -> Any:
        return max(least, rounded((budget - base * 4 * numbers(shapes)) / (4 * arrays * ends(shapes, names))))

    return answer


def rank_mistakes(names: tuple[str, ...]) -> dict[str, tuple[Callable, str]]:
    """What goes wrong in 11.3, where these modules are adapted."""
    of = partial(affords, names=names)
    return {
        "no base": (of(base=0), "the base is missing: its frozen weights take their share of the budget"),
        "one array": (of(arrays=1), "gradients and moments are missing: an adapter takes four arrays, not one"),
        "two arrays": (of(arrays=2), "Adam's two moments are missing: an adapter takes four arrays, not two"),
        "three arrays": (of(arrays=3), "one array is missing: an adapter takes four, two of them moments"),
        "rounded up": (of(rounded=math.ceil), "rounded up, it does not fit: round down"),
        "not whole": (of(rounded=float), "a rank is a whole number: round down"),
        "full base": (of(base=4), "the base is frozen: it has neither gradients nor moments"),
        "below zero": (of(least=-math.inf), "where the budget holds not even the frozen base, the answer is 0"),
        "one too few": (
            lambda shapes, budget: of()(shapes, budget - 1),
            "one more fits, to the last byte: a budget may be used up",
        ),
    }


@exercise(
    "11.3",
    draw=[partial(draw_budget, kind=kind) for kind in ("exact", "spare", "none", "tiny")],
    returns="the rank",
    tolerance=0,
    decisive=["(budget - base) // one_more"],
    mistakes=rank_mistakes((*ATTENTION, *MLP)),
)
def largest_rank(shapes: Shapes, budget: int) -> int:
    """The largest r whose training fits the budget; 0 if none does."""
    return max(0, (budget - 4 * numbers(shapes)) // (16 * ends(shapes)))


@variant(
    "largest_rank",
    IN_ATTENTION,
    draw=[partial(draw_budget, kind=kind, names=ATTENTION) for kind in ("exact", "spare", "none", "tiny")],
    mistakes=rank_mistakes(ATTENTION),
)
def largest_rank_in_attention(shapes: Shapes, budget: int) -> int:
    """With an adapter on attention alone."""
    return max(0, (budget - 4 * numbers(shapes)) // (16 * ends(shapes, ATTENTION)))

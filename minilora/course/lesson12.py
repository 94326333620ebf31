"""Lesson 12's exercises: what layers keep, how much they compute, and where the saving ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .exercises import Draw, exercise
from .lesson11 import Shapes, draw_shapes, training_memory

Layers = list[tuple[str, int, int]]  # what the layer reads, m, n

# -- 12.1 --------------------------------------------------------------------------------------------------------------


def draw_layers(rng: np.random.Generator, r: int | None) -> Draw:
    """A block like a Llama's, whose sizes are all different, in another order each time."""
    C, keys, F = 24 + int(rng.integers(8)), 13 + int(rng.integers(5)), 53 + int(rng.integers(20))
    heads = C + 9 + int(rng.integers(4))
    layers = [("x", heads, C), ("x", keys, C), ("x", keys, C), ("heads", C, heads)]
    layers += [("y", F, C), ("y", F, C), ("active", C, F)]
    return Draw(layers=[layers[i] for i in rng.permutation(len(layers))], T=int(rng.integers(70, 120)), r=r)


def inputs(layers: Layers) -> int:
    """Numbers per token of all that the layers read, each array once."""
    return sum({name: n for name, _, n in layers}.values())


def keeps(
    full: Callable[[Layers], float] = inputs,
    frozen: Callable[[Layers], float] = lambda layers: 0,
    lora: Callable[[Layers, int], float] = lambda layers, r: inputs(layers) + r * len(layers),
    unit: float = 4,
) -> Callable:
    """Bytes for numbers per token, in each of the three cases."""

    def answer(layers: Layers, T: int, r: int | None) -> float:
        return unit * T * (full(layers) if r is None else lora(layers, r) if r else frozen(layers))

    return answer


def no_sharing(layers: Layers) -> int:
    """Numbers per token of what each layer reads."""
    return sum(n for _, _, n in layers)


def outputs(layers: Layers) -> int:
    """Numbers per token of what each layer gives."""
    return sum(m for _, m, _ in layers)


def matrices(layers: Layers) -> int:
    """Numbers of all W."""
    return sum(m * n for _, m, n in layers)


@exercise(
    "12.1",
    draw=[
        lambda rng: draw_layers(rng, int(rng.integers(3, 9))),
        lambda rng: draw_layers(rng, None),
        lambda rng: draw_layers(rng, 0),
    ],
    returns="the bytes",
    tolerance=0,
    decisive=["inputs = {name: n for name, m, n in layers}"],
    mistakes={
        "x dropped": (
            keeps(lora=lambda layers, r: r * len(layers)),
            "LoRA: x is missing; dA is (g B)ᵀ x times the scale, so A takes back what W lets go of",
        ),
        "u forgotten": (
            keeps(lora=lambda layers, r: inputs(layers)),
            "LoRA: u = x Aᵀ is missing; dB needs it, r numbers per token and layer",
        ),
        "u once": (
            keeps(lora=lambda layers, r: inputs(layers) + r * len({name for name, _, _ in layers})),
            "LoRA: every layer has an A of its own and so its own u, even where layers read the same x",
        ),
        "no sharing": (
            keeps(no_sharing, lora=lambda layers, r: no_sharing(layers) + r * len(layers)),
            "layers that read the same array keep it once: q, k and v share one x",
        ),
        "frozen keeps x": (
            keeps(frozen=inputs),
            "r = 0: nothing learns in these layers, so nobody asks for dW, and x is let go of",
        ),
        "outputs": (
            keeps(outputs, lora=lambda layers, r: outputs(layers) + r * len(layers)),
            "a linear layer keeps its input, n numbers per token, and not its output: y is in no gradient of it",
        ),
        "outputs too": (
            keeps(
                lambda layers: inputs(layers) + outputs(layers),
                lora=lambda layers, r: inputs(layers) + outputs(layers) + r * len(layers),
            ),
            "the outputs are not kept: neither dx = g W nor dW = gᵀ x asks for y",
        ),
        "update as wide as y": (
            keeps(lora=lambda layers, r: inputs(layers) + outputs(layers)),
            "LoRA: u is x Aᵀ, r numbers per token and layer; its product with Bᵀ is not kept",
        ),
        "matrices": (
            lambda layers, T, r: 4 * matrices(layers),
            "those are the matrices: activations have a row for each token",
        ),
        "numbers": (keeps(unit=1), "that is how many numbers are kept: a float32 takes 4 bytes"),
        "half": (keeps(unit=2), "a float32 takes 4 bytes, not 2"),
        "double": (keeps(unit=8), "a float32 takes 4 bytes, not 8"),
        "one token": (
            lambda layers, T, r: keeps()(layers, 1, r),
            "that is for one token: there are T of them",
        ),
    },
)
def kept_bytes(layers: Layers, T: int, r: int | None = None) -> float:
    """Each input once, and u of every layer."""
    return keeps()(layers, T, r)


# -- 12.2 --------------------------------------------------------------------------------------------------------------


def draw_matrix(rng: np.random.Generator, r: int | None, lowest: bool) -> Draw:
    """A matrix that is not square."""
    m, n = int(rng.integers(100, 200)), int(rng.integers(300, 400))
    if rng.integers(2):
        m, n = n, m
    return Draw(m=m, n=n, r=r, lowest=lowest)


def counts(
    full: Callable[[bool], int] = lambda lowest: 2 if lowest else 3,
    large: Callable[[bool], int] = lambda lowest: 1 if lowest else 2,
    down: Callable[[bool], int] = lambda lowest: 2 if lowest else 3,
    up: Callable[[bool], int] = lambda lowest: 3,
) -> Callable:
    """So many products of W's size, of A's and of B's."""

    def answer(m: int, n: int, r: int | None, lowest: bool) -> float:
        return full(lowest) * m * n if r is None else large(lowest) * m * n + r * (down(lowest) * n + up(lowest) * m)

    return answer


def adds(extra: Callable[[int, int, int], float]) -> Callable:
    """The right count, and something for LoRA beside it."""
    return lambda m, n, r, lowest: counts()(m, n, r, lowest) + (0 if r is None else extra(m, n, r))


@exercise(
    "12.2",
    draw=[
        lambda rng: draw_matrix(rng, int(rng.integers(3, 20)), False),
        lambda rng: draw_matrix(rng, None, False),
        lambda rng: draw_matrix(rng, int(rng.integers(3, 20)), True),
        lambda rng: draw_matrix(rng, None, True),
    ],
    smallest=lambda rng: draw_matrix(rng, 0, True),
    returns="the count",
    tolerance=0,
    decisive=["large + down + up", "(2 if lowest else 3) * r * n"],
    mistakes={
        "dx forgotten": (
            counts(lambda low: 2, lambda low: 1, lambda low: 2),
            "dx is forgotten: the layers below want g W, and du A",
        ),
        "dx through W forgotten": (
            counts(large=lambda low: 1),
            "LoRA: dx goes through W, too: g W is a large product, and freezing does not save it",
        ),
        "dx through A forgotten": (
            counts(down=lambda low: 2),
            "LoRA: dx goes through A, too: du A is one more thin product",
        ),
        "forward alone": (
            counts(lambda low: 1, lambda low: 1, lambda low: 1, lambda low: 1),
            "that is forward alone: going backward has products of its own",
        ),
        "dW in LoRA": (
            counts(large=lambda low: 2 if low else 3),
            "LoRA: W is frozen, so gᵀ x is never computed",
        ),
        "no thin ones": (
            counts(down=lambda low: 0, up=lambda low: 0),
            "LoRA: the products with A and B are missing, and their gradients",
        ),
        "thin ones forward alone": (
            counts(down=lambda low: 1, up=lambda low: 1),
            "LoRA: A and B have products on the way back, too: g B, duᵀ x, gᵀ u, and du A",
        ),
        "thin ones backward alone": (
            counts(down=lambda low: 1 if low else 2, up=lambda low: 2),
            "LoRA: going forward has two thin products, x Aᵀ and u Bᵀ",
        ),
        "square": (
            lambda m, n, r, low: counts()(m, n, None, low) if r is None else (1 if low else 2) * m * n + 6 * r * n,
            "LoRA: 6 r n holds where W is square and dx is needed: A has r n numbers and B has m r",
        ),
        "lowest ignored": (
            lambda m, n, r, low: counts()(m, n, r, False),
            "lowest: nobody wants dx, so neither g W nor du A is computed",
        ),
        "lowest keeps du A": (
            counts(down=lambda low: 3),
            "lowest, LoRA: du A is a part of dx, which nobody wants",
        ),
        "lowest without g B": (
            counts(up=lambda low: 2 if low else 3),
            "lowest, LoRA: g B is still needed, since dA is made from it",
        ),
        "forms B A": (adds(lambda m, n, r: m * n * r), "LoRA: B A is never formed"),
        "two for one": (
            lambda m, n, r, low: 2 * counts()(m, n, r, low),
            "count multiplications alone: additions are not asked for",
        ),
    },
)
def step_products(m: int, n: int, r: int | None = None, lowest: bool = False) -> float:
    """Three of W's size without an adapter; with one, two, three of A's and three of B's; fewer if lowest."""
    return counts()(m, n, r, lowest)


# -- 12.3 --------------------------------------------------------------------------------------------------------------


def draw_text(rng: np.random.Generator, at_once: bool = False) -> Draw:
    """A model, its activations, and a factor between that of no tokens and that of many; or one that holds at once."""
    r = int(rng.integers(2, 5))
    whole = draw_shapes(rng, bool(rng.integers(2)))
    shapes = {name: shape for name, shape in whole.items() if "mlp" not in name}  # 11.2 is alike in all its variants
    kept_full, kept_lora = int(rng.integers(400, 460)), int(rng.integers(470, 560))
    most = training_memory(shapes) / training_memory(shapes, r)
    factor = most + 0.5 if at_once else 1 + (0.3 + 0.4 * rng.random()) * (most - 1)
    return Draw(shapes=shapes, r=r, kept_full=kept_full, kept_lora=kept_lora, factor=round(float(factor), 3))


def until(
    full: Callable[[Shapes, int], float] = lambda shapes, r: training_memory(shapes),
    lora: Callable[[Shapes, int], float] = training_memory,
    of_full: float = 1,
    of_lora: float = 1,
    rounded: Callable[[float], Any] = math.ceil,
    least: float = 1,
) -> Callable:
    """Where something is left out of one side, or rounded in another way."""

    def answer(shapes: Shapes, r: int, kept_full: float, kept_lora: float, factor: float) -> Any:
        over = full(shapes, r) - factor * lora(shapes, r)
        return max(least, rounded(over / (factor * of_lora * kept_lora - of_full * kept_full)))

    return answer


def swapped(shapes: Shapes, r: int, kept_full: float, kept_lora: float, factor: float) -> Any:
    """The activations of one way put with the other."""
    return until()(shapes, r, kept_lora, kept_full, factor)


@exercise(
    "12.3",
    draw=[draw_text, draw_text, partial(draw_text, at_once=True)],
    returns="the number of tokens",
    tolerance=0,
    decisive=["(full - factor * lora) / (factor * kept_lora - kept_full)"],
    mistakes={
        "full without activations": (
            until(of_full=0),
            "full fine-tuning has activations, too: they grow with the text on both sides",
        ),
        "activations alike": (
            lambda shapes, r, kept_full, kept_lora, factor: until()(shapes, r, kept_full, kept_full, factor),
            "LoRA's activations are `kept_lora` for each token, and you take those of full fine-tuning for both",
        ),
        "LoRA's for both": (
            lambda shapes, r, kept_full, kept_lora, factor: until()(shapes, r, kept_lora, kept_lora, factor),
            "full fine-tuning's activations are `kept_full` for each token, and you take LoRA's for both",
        ),
        "swapped": (swapped, "kept_full and kept_lora are swapped"),
        "no adapter": (
            until(lora=lambda shapes, r: training_memory(shapes, 0)),
            "LoRA: that is the frozen base alone; the adapter is missing: training_memory(shapes, r)",
        ),
        "weights alone": (
            until(full=lambda shapes, r: training_memory(shapes, 0)),
            "full fine-tuning: gradients and moments are missing: training_memory(shapes) has them",
        ),
        "rounded down": (
            until(rounded=math.floor),
            "rounded down, LoRA still takes more than `factor` times less: round up",
        ),
        "not whole": (until(rounded=float), "a number of tokens is whole: round up"),
        "one too many": (
            lambda *given: until(rounded=lambda T: math.floor(T) + 2)(*given),
            "one less is enough already",
        ),
        "below one": (until(least=-math.inf), "where the factor is that small for one token already, the answer is 1"),
        "zero": (until(least=0), "a text has at least one token: the answer is 1, not 0"),
    },
)
def tokens_until(shapes: Shapes, r: int, kept_full: float, kept_lora: float, factor: float) -> int:
    """The smallest T with full + T kept_full <= factor (lora + T kept_lora)."""
    return until()(shapes, r, kept_full, kept_lora, factor)

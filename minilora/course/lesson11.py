"""The judges of lesson 11's exercises: count an adapter, predict the memory of training, choose a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cost.counts import lora_parameters
from ..lora.adapters import add_adapter
from ..lora.config import LoraConfig
from ..nn.llama import Config, Llama
from ..nn.optim import AdamW
from .judge import Answer, Wrong, exercise

Shapes = dict[str, tuple[int, ...]]
BYTES = 4  # of a float32
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def number(value: Any, what: str) -> float:
    """The answer as a Python number. Raises Wrong if it is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise Wrong(f"{what} must be one number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise Wrong(f"{what} is {value}: is something divided by zero?")
    return float(value)


def draw_config(rng: np.random.Generator, tied: bool) -> Config:
    """A small Llama whose adapter is large beside it, so that no mistake hides within one percent."""
    return Config(
        vocab_size=int(rng.integers(100, 140)),
        hidden_size=int(rng.choice([24, 32, 40])),
        intermediate_size=int(rng.choice(np.arange(51, 91, 2))),  # 3/2 of no width: there two mistakes come to the same
        num_hidden_layers=int(rng.integers(2, 4)),
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )


def shapes_of(model: Llama) -> Shapes:
    """Every parameter's name and shape."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def matrices(shapes: Shapes, *names: str) -> list[tuple[int, int]]:
    """The shapes of the linear layers whose names end so; with no name given, of all but the head."""
    return [
        (shape[0], shape[1])
        for name, shape in shapes.items()
        if "_proj." in name and (not names or name.split(".")[-2] in names)
    ]


@exercise
def adapter_parameters(answer: Answer, rng: np.random.Generator) -> None:
    """r Σ (m + n) over the linear layers, without embedding, head and norms."""
    config = draw_config(rng, tied=False)
    shapes, r = shapes_of(Llama(config, rng)), int(rng.integers(3, 9))
    adapted = matrices(shapes)
    want = lora_parameters(adapted, r)
    table = r * (config.vocab_size + config.hidden_size)
    norms = r * sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    mistakes = {
        "r is missing: an (m, n) matrix gets r (m + n) parameters": want / r,
        "an (m, n) matrix gets r (m + n) parameters, not r m n": r * sum(m * n for m, n in adapted),
        "that counts the matrices themselves: an (m, n) matrix gets r (m + n) parameters": sum(
            m * n for m, n in adapted
        ),
        "you counted A alone, r n: B has m r more": r * sum(n for _, n in adapted),
        "you counted B alone, m r: A has r n more": r * sum(m for m, _ in adapted),
        '"all-linear" leaves out the embedding and the head, and you counted both': want + 2 * table,
        '"all-linear" leaves out the embedding and the head, and you counted one of them': want + table,
        "norms are vectors and get no adapter": want + norms,
        "you counted every parameter: norms, embedding and head get no adapter": want + 2 * table + norms,
        "you counted q_proj and v_proj alone: all-linear is all seven of a block": lora_parameters(
            matrices(shapes, "q_proj", "v_proj"), r
        ),
        "you counted attention alone: gate_proj, up_proj and down_proj get an adapter too": lora_parameters(
            matrices(shapes, *ATTENTION), r
        ),
        "you counted the MLP alone: the four matrices of attention get an adapter too": want
        - lora_parameters(matrices(shapes, *ATTENTION), r),
        "you counted one block: the model has several": want / config.num_hidden_layers,
    }
    got = number(answer(shapes=shapes, r=r), "the count")
    if got != want:
        named = (line for line, value in mistakes.items() if value == got)
        raise Wrong(next(named, f"r = {r}: you counted {got:,.6g} parameters, the adapter has {want:,}"))


@dataclass(frozen=True)
class Held:
    """Bytes that a training step really holds, by owner, and the numbers behind them: base P, adapter a."""

    weights: int
    gradients: int
    moments: int
    base_parameters: int
    adapter_parameters: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


def measure(model: Llama, r: int | None) -> Held:
    """Take one step, with an all-linear adapter of rank r or (None) of the whole model, and add up the arrays.

    Changes the model.
    """
    base = sum(parameter.size for _, parameter in model.named_parameters())
    if r is not None:
        add_adapter(model, LoraConfig(r=r, lora_alpha=r), name="measured", seed=0)
    optimizer = AdamW(model.trainable_parameters())
    ids = np.arange(8).reshape(1, 8)
    model.loss(ids, ids).backward()
    optimizer.step()
    parameters = [parameter for _, parameter in model.named_parameters()]
    return Held(
        weights=sum(p.data.nbytes for p in parameters),
        gradients=sum(p.grad.nbytes for p in parameters if p.grad is not None),
        moments=sum(array.nbytes for array in (*optimizer.m, *optimizer.v)),
        base_parameters=base,
        adapter_parameters=sum(p.size for p in parameters) - base,
    )


UNIT_MISTAKES = [  # what the right number of bytes is multiplied by
    (1 / BYTES, "that is how many numbers there are: a float32 takes 4 bytes"),
    (1 / 2, "a float32 takes 4 bytes, not 2"),
    (2, "a float32 takes 4 bytes, not 8"),
    (1 / 8, "a float32 takes 4 bytes; a bit is an eighth of a byte"),
    (1e-6, "give bytes, not megabytes"),
    (2**-20, "give bytes, not megabytes"),
]


def memory_mistakes(P: int, a: int, r: int | None) -> list[tuple[float, str]]:
    """What wrong predictions come to, in bytes, for a base of P parameters and an adapter of a, and what to say."""
    if r is None:
        counts = [  # the first two may also be the right arrays with 1 or 2 bytes for each number
            (P, "full fine-tuning: a quarter of it; gradients and two moments count, too, and a float32 takes 4 bytes"),
            (2 * P, "full fine-tuning: half of it; Adam's two moments count, too, and a float32 takes 4 bytes, not 2"),
            (
                3 * P,
                "full fine-tuning: one array of P is missing: weights, gradients, and Adam's two moments make four",
            ),
            (5 * P, "full fine-tuning: one array of P is too many: weights, gradients, two moments make four"),
        ]
    else:
        counts = [
            (4 * a, f"LoRA, r = {r}: the base's weights are missing; frozen, they are still held"),
            (4 * P, f"LoRA, r = {r}: that is full fine-tuning; a frozen weight has no gradient and no moments"),
            (4 * (P + a), f"LoRA, r = {r}: a frozen weight has no gradient and no moments"),
            (2 * P + 4 * a, f"LoRA, r = {r}: a frozen weight has no gradient, either"),
            (P, f"LoRA, r = {r}: that is the base alone; the adapter has weights, gradients and two moments"),
            (P + a, f"LoRA, r = {r}: the adapter's gradients and its two moments are missing"),
            (P + 2 * a, f"LoRA, r = {r}: Adam's two moments of the adapter are missing"),
            (P + 3 * a, f"LoRA, r = {r}: one of the adapter's four arrays is missing: weights, gradients, two moments"),
        ]
    right = 4 * P if r is None else P + 4 * a
    return [(BYTES * count, line) for count, line in counts] + [
        (BYTES * right * factor, line) for factor, line in UNIT_MISTAKES
    ]


@exercise
def training_memory(answer: Answer, rng: np.random.Generator) -> None:
    """Bytes of weights, gradients and moments, within 1 % of what a real step of a real small model holds."""
    config = draw_config(rng, tied=bool(rng.integers(2)))
    for r in (None, int(rng.integers(4, 12))):
        model = Llama(config, rng)
        shapes = shapes_of(model)
        got = number(answer(shapes=shapes, r=r), "the memory in bytes")
        held = measure(model, r)
        error = abs(got - held.total) / held.total
        if error <= 0.01:
            continue
        suspects = memory_mistakes(held.base_parameters, held.adapter_parameters, r)
        value, line = min(suspects, key=lambda suspect: abs(got - suspect[0]))
        if abs(got - value) <= 0.005 * value:
            raise Wrong(line)
        job = "full fine-tuning" if r is None else f"LoRA, r = {r}"
        raise Wrong(
            f"{job}: you predict {got:,.6g} bytes, a real step holds {held.total:,} (weights {held.weights:,}, "
            f"gradients {held.gradients:,}, moments {held.moments:,})"
        )


@exercise
def largest_rank(answer: Answer, rng: np.random.Generator) -> None:
    """The largest r whose training fits the budget; 0 if none does."""
    shapes = shapes_of(Llama(draw_config(rng, tied=bool(rng.integers(2))), rng))
    base = BYTES * sum(math.prod(shape) for shape in shapes.values())
    step = 4 * BYTES * lora_parameters(matrices(shapes), 1)  # one more rank: weights, gradients and two moments
    r = int(rng.integers(2, 20))
    if base // step == 3 * r:  # there, too
        r += 1
    for want, budget in [(r, base + r * step), (r, base + r * step + step // 2), (0, base + step - 1), (0, base // 2)]:
        got = number(answer(shapes=shapes, budget=budget), "the rank")
        if got == want:
            continue
        if got != int(got):
            raise Wrong(f"a rank is a whole number, got {got:.6g}: round down")
        if got < 0:
            raise Wrong(f"the budget holds not even the frozen base: the answer is 0, not {got:.0f}")
        mistakes = {
            "the base is missing: its frozen weights take their share of the budget": budget // step,
            "gradients and moments are missing: an adapter takes four arrays, not one": (budget - base) // (step // 4),
        }
        for line, value in mistakes.items():
            if got == value:
                raise Wrong(line)
        need = f"needs {base + int(got) * step:,} bytes, the budget is {budget:,}"
        if got > want:
            raise Wrong(f"r = {got:.0f} {need}: it does not fit")
        full = budget == base + want * step
        raise Wrong(f"r = {want} fits as well{', to the last byte' if full else ''}: you answer {got:.0f}")

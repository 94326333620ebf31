"""Lesson 6's exercises: the loss of the answers alone, the bytes of training, and a step in several parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..nn.llama import Config, Llama
from ..nn.optim import SGD
from .exercises import Draw, exercise, variant

# -- 6.1 the loss of answers -------------------------------------------------------------------------------------------


def draw_answers(rng: np.random.Generator, T: int | None = None) -> Draw:
    """Scores of T tokens, the tokens, and which of them are answers: two turns, as in a conversation."""
    T, V = T or int(rng.integers(14, 20)), int(rng.integers(25, 40))
    is_answer = np.zeros(T, bool)
    if T > 2:
        first = int(rng.integers(3, 5))
        is_answer[first : first + 3] = True
        is_answer[int(rng.integers(9, T - 1)) :] = True
    else:
        is_answer[1] = True
    return Draw(
        {"T": T, "V": V}, logits=2 * rng.standard_normal((T, V)), ids=rng.integers(0, V, T), is_answer=is_answer
    )


def log_softmax(logits: Any) -> Any:
    """Log of softmax(logits) over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def scored(
    pick: Callable[[int, Any], tuple[Any, Any]],
    spread: Callable[[Any], Any] = log_softmax,
    total: Callable[[Any, int], Any] = lambda found, T: found.mean(),
    factor: float = 1.0,
) -> Callable:
    """The mean of -ln p over pairs (place that predicts, place of the token), as `pick` chooses them from T places."""

    def answer(logits: Any, ids: Any, is_answer: Any) -> Any:
        at, of = pick(len(ids), is_answer)
        return factor * float(total(-spread(logits)[at, ids[of]], len(ids)))

    return answer


def shifted_pairs(T: int, mask: Any) -> tuple[Any, Any]:
    """Each answer token with the place before it."""
    of = np.flatnonzero(mask)
    of = of[of > 0]
    return of - 1, of


def pairs(before: int, mask_before: int = 0) -> Callable[[int, Any], tuple[Any, Any]]:
    """Tokens predicted from so many places before them, chosen where the mask is true so many places before them."""

    def pick(T: int, mask: Any) -> tuple[Any, Any]:
        of = np.arange(T)
        inside = (of - before >= 0) & (of - before < T) & (of - mask_before >= 0)
        of = of[inside]
        of = of[mask[of - mask_before]]
        return of - before, of

    return pick


def everything(T: int, mask: Any) -> tuple[Any, Any]:
    """Where predictions and labels stand if the question is scored, too."""
    return np.arange(T - 1), np.arange(1, T)


def prompt(T: int, mask: Any) -> tuple[Any, Any]:
    """Where they stand if the question is scored in place of the answer."""
    return shifted_pairs(T, ~mask)


def without_first(T: int, mask: Any) -> tuple[Any, Any]:
    """Answer tokens whose predecessor is an answer token, too."""
    at, of = shifted_pairs(T, mask)
    return at[mask[at]], of[mask[at]]


@exercise(
    "6.1",
    draw=draw_answers,
    smallest=lambda rng: draw_answers(rng, T=2),
    returns="the loss",
    decisive=["p = p[np.arange(len(ids) - 1), ids[1:]]"],
    mistakes={
        "not shifted": (
            scored(pairs(0)),
            "not shifted: the scores at place t are for the token at t + 1, not for the one that was just read",
        ),
        "wrong way": (
            scored(pairs(-1)),
            "shifted the wrong way: a token is predicted at the place before it, not after it",
        ),
        "shifted twice": (
            scored(pairs(2)),
            "shifted twice: the scores at place t are for the token at t + 1, the next one",
        ),
        "mask behind": (
            scored(pairs(1, mask_before=1)),
            "the mask is not shifted: the token predicted must be an answer, not the one it is predicted from",
        ),
        "first missed": (
            scored(without_first),
            "the first token of each answer is not scored: it is predicted from the prompt, and must be learned, too",
        ),
        "all": (scored(everything), "the prompt is scored, too: only tokens of answers count"),
        "prompt": (scored(prompt), "the mask is the wrong way round: you scored the prompt, not the answers"),
        "mean over all": (
            scored(shifted_pairs, total=lambda found, T: found.sum() / T),
            "divided by the number of all tokens: the mean goes over those that are scored",
        ),
        "mean over pairs": (
            scored(shifted_pairs, total=lambda found, T: found.sum() / (T - 1)),
            "divided by T - 1, the number of all predictions: the mean goes over those that are scored",
        ),
        "sum": (
            scored(shifted_pairs, total=lambda found, T: found.sum()),
            "a sum, not a mean: divide by the number of scored tokens",
        ),
        "bits": (
            scored(shifted_pairs, factor=1 / math.log(2)),
            "that is in bits: take the natural logarithm, np.log",
        ),
        "sign": (scored(shifted_pairs, factor=-1), "the sign is wrong: the loss is -log p, and p is below 1"),
        "perplexity": (
            scored(shifted_pairs, total=lambda found, T: np.exp(found.mean())),
            "that is the perplexity, exp(loss): return the loss itself",
        ),
        "log of the mean": (
            scored(shifted_pairs, total=lambda found, T: -np.log(np.exp(-found).mean())),
            "the logarithm of a mean: take the mean of the logarithms",
        ),
        "raw scores": (
            scored(shifted_pairs, spread=lambda logits: logits),
            "softmax is missing: scores are no probabilities yet",
        ),
        "mean of p": (
            scored(shifted_pairs, total=lambda found, T: -np.exp(-found).mean()),
            "the logarithm is missing: the loss is the mean of -log p, not of -p",
        ),
    },
)
def answer_loss(logits: Any, ids: Any, is_answer: Any) -> float:
    """The mean of -ln p over the answers' tokens, each predicted at the place before it."""
    return scored(shifted_pairs)(logits, ids, is_answer)


@variant("answer_loss", {"natural logarithm": "logarithm to the base 2", "np.log(p": "np.log2(p"})
def answer_loss_bits(logits: Any, ids: Any, is_answer: Any) -> float:
    """The same in bits."""
    return scored(shifted_pairs, factor=1 / math.log(2))(logits, ids, is_answer)


# -- 6.2 bytes ---------------------------------------------------------------------------------------------------------

MOMENTS = {"SGD": 0, "momentum": 1, "AdamW": 2}


def draw_shapes(rng: np.random.Generator, optimizer: str, some_frozen: bool = True) -> Draw:
    """Shapes of parameters of very different sizes, some of them frozen."""
    names = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "norm"]
    shapes = {name: (int(rng.integers(20, 90)), int(rng.integers(20, 90))) for name in names[:-1]}
    shapes["norm"] = (int(rng.integers(50, 90)),)  # type: ignore[assignment]
    frozen = {str(name) for name in rng.choice(names[:-1], 2, replace=False)} if some_frozen else set()
    return Draw(shapes=shapes, frozen=sorted(frozen), optimizer=optimizer)


def bytes_of(
    weights: Callable[[int, int], float] = lambda learns, rests: learns + rests,
    gradients: Callable[[int, int], float] = lambda learns, rests: learns,
    moments: Callable[[str], int] = lambda optimizer: MOMENTS[optimizer],
    held: Callable[[int, int], float] = lambda learns, rests: learns,
    each: float = 4,
    size: Callable[[Any], int] = math.prod,
) -> Callable:
    """Bytes, with something counted in another way. learns, rests: how many numbers learn, and how many are frozen."""

    def answer(shapes: dict, frozen: list, optimizer: str) -> Any:
        learns = sum(size(shape) for name, shape in shapes.items() if name not in frozen)
        rests = sum(size(shape) for name, shape in shapes.items() if name in frozen)
        total = weights(learns, rests) + gradients(learns, rests) + moments(optimizer) * held(learns, rests)
        return each * total if each >= 1 else each * 4 * total

    return answer


@exercise(
    "6.2",
    draw=[
        lambda rng: draw_shapes(rng, "SGD"),  # in this order each mistake shows first where no other looks like it
        lambda rng: draw_shapes(rng, "momentum"),
        lambda rng: draw_shapes(rng, "AdamW"),
    ],
    smallest=lambda rng: draw_shapes(rng, "AdamW", some_frozen=False),
    returns="the bytes",
    tolerance=0,
    decisive=["4 * (total + learns * (1 + arrays))"],
    mistakes={
        "frozen moments": (
            bytes_of(held=lambda learns, rests: learns + rests),
            "the optimizer keeps nothing for frozen parameters",
        ),
        "frozen gradients": (
            bytes_of(gradients=lambda learns, rests: learns + rests),
            "frozen parameters have no gradients",
        ),
        "frozen weights": (
            bytes_of(weights=lambda learns, rests: learns),
            "frozen weights are in memory, too: the forward pass needs them",
        ),
        "no weights": (bytes_of(weights=lambda learns, rests: 0), "the weights themselves are missing"),
        "one moment": (
            bytes_of(moments=lambda optimizer: min(MOMENTS[optimizer], 1)),
            "AdamW keeps two arrays per parameter, m and v; you counted one",
        ),
        "no moments": (bytes_of(moments=lambda optimizer: 0), "what the optimizer keeps is missing"),
        "momentum of two": (
            bytes_of(moments=lambda optimizer: 2 if optimizer != "SGD" else 0),
            "momentum keeps one array per parameter, the mean of the gradients",
        ),
        "SGD of one": (
            bytes_of(moments=lambda optimizer: max(MOMENTS[optimizer], 1)),
            "plain SGD keeps nothing between two steps",
        ),
        "no gradients": (bytes_of(gradients=lambda learns, rests: 0), "the gradients are missing"),
        "always Adam": (
            bytes_of(moments=lambda optimizer: 2),
            "SGD keeps nothing and momentum one array: two arrays are AdamW's alone",
        ),
        "numbers": (bytes_of(each=1), "that is how many numbers there are: a float32 takes 4 bytes"),
        "float64": (bytes_of(each=8), "a float32 takes 4 bytes; 8 is float64's"),
        "half": (bytes_of(each=2), "a float32 takes 4 bytes; 2 is float16's"),
        "bits": (bytes_of(each=32), "that is in bits: a float32 takes 32 bits, which are 4 bytes"),
        "megabytes": (bytes_of(each=1e-6), "that is in MB: return bytes"),
        "sums": (
            bytes_of(size=sum),
            "an array of shape (m, n) has m times n numbers, not m + n",
        ),
        "rows": (bytes_of(size=lambda shape: shape[0]), "you counted rows: an array of shape (m, n) has m n numbers"),
    },
)
def training_bytes(shapes: dict, frozen: list, optimizer: str) -> int:
    """Weights of all, gradients and the optimizer's arrays of those that learn, four bytes each."""
    return int(bytes_of()(shapes, frozen, optimizer))


# -- 6.3 a step in parts -----------------------------------------------------------------------------------------------


def draw_step(rng: np.random.Generator, count: int | None = None) -> Draw:
    """A small model with a gradient left over, parts that score different numbers of tokens, an optimizer."""
    config = Config(23, 8, 12, 1, num_attention_heads=2, num_key_value_heads=1)
    model = Llama(config, seed=int(rng.integers(2**31)))
    for p in model.trainable_parameters().values():
        p.data = 8 * rng.standard_normal(p.shape) * (0.1 if p.ndim > 1 else 0.12)  # float64, far from its start
    parts = []
    for i in range(count or 3):
        ids = rng.integers(0, 23, (2, (9, 12, 7)[i]))
        labels = ids.copy()
        labels[:, : (6, 3, 1)[i]] = -100
        parts.append((ids, labels))
    model.loss(*parts[0]).backward()  # as after a step before this one
    return Draw(model=model, parts=parts, optimizer=SGD(model.trainable_parameters(), lr=0.1))


def count_scored(labels: Any) -> int:
    """How many labels count after the shift."""
    return int((labels[:, 1:] != -100).sum())


def stepping(
    share: Callable[[list[int], int], float] = lambda counts, i: counts[i] / sum(counts),
    clear: str = "before",
    steps: str = "once",
    told: Callable[[list[float], list[int]], Any] = lambda losses, counts: float(np.average(losses, weights=counts)),
    count: Callable[[Any], int] = count_scored,
) -> Callable:
    """A step in parts, with some of it done in another way.

    share: the factor on the loss of part i. clear: when gradients are forgotten. steps: when the optimizer steps.
    """

    def answer(model: Any, parts: list, optimizer: Any) -> Any:
        counts, losses = [count(labels) for _, labels in parts], []
        if clear == "before":
            optimizer.zero_grad()
        for i, (ids, labels) in enumerate(parts):
            if clear == "each":
                optimizer.zero_grad()
            loss = model.loss(ids, labels)
            losses.append(loss.item())
            (loss * share(counts, i)).backward()
            if steps == "each":
                optimizer.step()
        if clear == "after":
            optimizer.zero_grad()
        if steps == "once":
            optimizer.step()
        return told(losses, counts)

    return answer


def what_came_of_it(result: Any, arguments: dict) -> tuple[Any, ...]:
    """The loss that is returned, and all weights after the step, in a row."""
    weights = [p.data.ravel() for p in arguments["model"].trainable_parameters().values()]
    return result, np.concatenate(weights)


@exercise(
    "6.3",
    draw=draw_step,
    smallest=lambda rng: draw_step(rng, count=1),
    returns="the loss, the weights afterwards (N)",
    tolerance=1e-6,
    changes=("model", "optimizer"),
    observe=what_came_of_it,
    decisive=["(loss * (count / total)).backward()"],
    mistakes={
        "mean of means": (
            stepping(share=lambda counts, i: 1 / len(counts), told=lambda losses, counts: float(np.mean(losses))),
            "a mean of means: a part with few scored tokens counts as much as one with many; weight by scored tokens",
        ),
        "mean of gradients": (
            stepping(share=lambda counts, i: 1 / len(counts)),
            "each part's gradient has the same weight: weight it by its share of the scored tokens",
        ),
        "sum": (
            stepping(share=lambda counts, i: 1, told=lambda losses, counts: float(np.sum(losses))),
            "losses and gradients are added up without weights: the step is as many times too long as there are parts",
        ),
        "sum of gradients": (
            stepping(share=lambda counts, i: 1),
            "gradients add up without weights: the step is as many times too long as there are parts",
        ),
        "mean told": (
            stepping(told=lambda losses, counts: float(np.mean(losses))),
            "the step is right, the loss is a mean of means: weight it by scored tokens, too",
        ),
        "last told": (
            stepping(told=lambda losses, counts: losses[-1]),
            "the step is right, but the loss is that of the last part alone",
        ),
        "never forgotten": (
            stepping(clear="never"),
            "gradients of the step before are still there: forget them first, optimizer.zero_grad()",
        ),
        "forgotten each time": (
            stepping(clear="each"),
            "zero_grad() before each part forgets the parts before it: once, before the first",
        ),
        "steps": (
            stepping(steps="each"),
            "a step after each part: that is several small steps, not one on the whole batch",
        ),
        "forgotten and steps": (
            stepping(clear="each", steps="each"),
            "each part is a step of its own: one step, after the last part",
        ),
        "nothing moves": (
            stepping(clear="after"),
            "no weight moves: backward() for each part, then one step(), and zero_grad() only before them",
        ),
        "tokens of all": (
            stepping(count=lambda labels: labels.size),
            "weighted by all tokens: those with the label -100 are not scored, and must not count",
        ),
        "first column": (
            stepping(count=lambda labels: int((labels == -100).sum())),
            "weighted by the tokens that are not scored: count labels != -100",
        ),
        "returns a tensor": (
            stepping(told=lambda losses, counts: str(np.average(losses, weights=counts))),
            "the loss must be one number, got str",
        ),
    },
)
def step_in_parts(model: Any, parts: list, optimizer: Any) -> float:
    """One step on the whole batch, computed part by part."""
    return float(stepping()(model, parts, optimizer))

"""Lesson 7's exercises: the loss of the answers alone, the bytes of training, and a step with gradient accumulation."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from ..nn.llama import Config, Llama
from ..nn.optim import SGD
from .exercises import Draw, exercise, variant
from .hunts import hunt

# -- 7.1 the loss of answers -------------------------------------------------------------------------------------------


def draw_answers(rng: np.random.Generator, T: int | None = None) -> Draw:
    """The logits at T positions, the tokens, and which of them are answers: two turns, as in a conversation."""
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


def mean_of_means(losses: Any, scored: Any) -> Any:
    """The mean of each answer, averaged over the answers."""
    runs = np.split(np.arange(len(scored)), np.flatnonzero(np.diff(scored.astype(int))) + 1)
    return np.mean([losses[run].mean() for run in runs if scored[run[0]]])


def last_answer(losses: Any, scored: Any) -> Any:
    """The mean of the last answer alone."""
    return losses[np.flatnonzero(~np.append(False, scored))[-1] :].mean()


@exercise("7.1", draw=draw_answers, smallest=lambda rng: draw_answers(rng, T=2), returns="the loss")
def answer_loss(logits, ids, is_answer):
    """logits (T, V), ids (T) integers, is_answer (T) booleans -> the loss, a number"""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)  # (T, V)
    p = p[np.arange(len(ids) - 1), ids[1:]]  # (T - 1): of token t + 1, at position t
    return -np.log(p[is_answer[1:]]).mean()


variant(
    "answer_loss",
    {"natural logarithm": "logarithm to the base 2", "np.log(p": "np.log2(p"},
    "the loss is in bits, not in nats",
    lines={"exp(loss)": "2 ** loss", "np.exp(-np": "np.exp2(-np"},
)


# -- 7.2 bytes ---------------------------------------------------------------------------------------------------------


def draw_shapes(rng: np.random.Generator, optimizer: str, some_frozen: bool = True) -> Draw:
    """Shapes of parameters of very different sizes, some of them frozen."""
    names = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "norm"]
    shapes = {name: (int(rng.integers(20, 90)), int(rng.integers(20, 90))) for name in names[:-1]}
    shapes["norm"] = (int(rng.integers(50, 90)),)  # type: ignore[assignment]
    frozen = {"norm", *map(str, rng.choice(names[:-1], 2, replace=False))} if some_frozen else set()
    return Draw(shapes=shapes, frozen=sorted(frozen), optimizer=optimizer)


@exercise(
    "7.2",
    draw=[
        lambda rng: draw_shapes(rng, "SGD"),  # in this order each mistake shows first where no other looks like it
        lambda rng: draw_shapes(rng, "momentum"),
        lambda rng: draw_shapes(rng, "AdamW"),
    ],
    smallest=lambda rng: draw_shapes(rng, "AdamW", some_frozen=False),
    returns="the number of bytes",
    tolerance=0,
)
def training_bytes(shapes, frozen, optimizer):
    """shapes {name: (m, n) or (n,)}, frozen [name, ...], optimizer a name -> bytes, an integer"""
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    total = sum(sizes.values())
    trainable = total - sum(sizes[name] for name in frozen)
    arrays = {"SGD": 0, "momentum": 1, "AdamW": 2}[optimizer]
    return 4 * (total + trainable * (1 + arrays))


variant(
    "training_bytes",
    {
        "Everything is stored in float32.": "Everything is stored in bfloat16.",
        "compare with the bytes that the lesson measured": "compare with half of the bytes that the lesson measured",
        "return 4 *": "return 2 *",
    },
    "everything is stored in 16 bits",
    lines={
        "return 2 * -> return 2 *": "return 2 * -> return 4 *",
        "a float32 takes 4 bytes; 2 is float16's": "a bfloat16 takes 2 bytes; 4 is float32's",
        "a float32 takes 4 bytes": "a bfloat16 takes 2 bytes",
        "a float32 takes 32 bits, which are 4 bytes": "a bfloat16 takes 16 bits, which are 2 bytes",
        "return 32 *": "return 16 *",
        "1e-6 * 4 *": "1e-6 * 2 *",
    },
)


# -- 7.3 gradient accumulation -----------------------------------------------------------------------------------------


def draw_step(rng: np.random.Generator, count: int | None = None) -> Draw:
    """A small model with gradients of an earlier step, micro-batches with different numbers of scored tokens, SGD."""
    config = Config(23, 8, 12, 1, num_attention_heads=2, num_key_value_heads=1)
    model = Llama(config, seed=int(rng.integers(2**31)))
    for p in model.trainable_parameters().values():
        p.data = (
            8 * rng.standard_normal(p.shape) * (0.1 if p.ndim > 1 else 0.12)
        )  # float64, far from the initialisation
    parts = []
    for i in range(count or 3):
        ids = rng.integers(0, 23, (2, (9, 12, 7)[i]))
        labels = ids.copy()
        labels[:, : (6, 3, 1)[i]] = -100
        labels[0, 0] = ids[0, 0]  # never scored
        parts.append((ids, labels))
    model.loss(*parts[0]).backward()  # as after a step before this one
    return Draw(model=model, parts=parts, optimizer=SGD(model.trainable_parameters(), lr=0.1))


def what_came_of_it(result: Any, arguments: dict) -> tuple[Any, ...]:
    """The returned loss, and all weights after the step as one vector."""
    weights = [p.data.ravel() for p in arguments["model"].trainable_parameters().values()]
    return result, np.concatenate(weights)


@exercise(
    "7.3",
    draw=draw_step,
    smallest=lambda rng: draw_step(rng, count=1),
    returns="the loss, the model afterwards (N)",
    tolerance=1e-6,
    changes=("model", "optimizer"),
    observe=what_came_of_it,
)
def step_in_parts(model, parts, optimizer):
    """one step of the optimizer on all parts together -> the loss of the whole batch, a number"""
    counts = [(labels[:, 1:] != -100).sum() for _, labels in parts]
    total = sum(counts)
    optimizer.zero_grad()
    whole = 0.0
    for (input_ids, labels), count in zip(parts, counts, strict=True):
        loss = model.loss(input_ids, labels)
        (loss * (count / total)).backward()
        whole += loss.item() * count / total
    optimizer.step()
    return whole


variant(
    "step_in_parts",
    {
        "Return the loss of the whole batch as a number.": "Return the perplexity of the whole batch, exp of its loss.",
        "-> the loss of the whole batch, a number": "-> the perplexity of the whole batch, a number",
        "    return whole": "    return np.exp(whole)",
    },
    "the perplexity is returned, not the loss",
    lines={
        "the loss must be one number, got str": "the loss must be one number",
        "return whole -> return str(whole)": "return np.exp(whole) -> return str(whole)",
    },
)


# -- 7.4 a bug hunt ----------------------------------------------------------------------------------------------------


def training(weights: Any, frozen: Any, lr: float, beta: float, decay: float) -> Any:
    """A training run: SGD with momentum and weight decay, micro-batches, and states that are saved and resumed."""
    run = SimpleNamespace(weights=dict(weights), means={n: 0 * w for n, w in weights.items() if n not in frozen})

    def step(parts: Any) -> None:
        run.weights = {n: (1 - lr * decay) * w if n in run.means else w for n, w in run.weights.items()}
        for name, mean in run.means.items():
            g = sum(part[name] for part in parts) / len(parts)
            run.means[name] = beta * mean + g
            run.weights[name] = run.weights[name] - lr * run.means[name]

    def save() -> Any:
        return {"weights": dict(run.weights), "means": dict(run.means)}

    def resume(saved: Any) -> None:
        run.weights, run.means = dict(saved["weights"]), dict(saved["means"])

    run.step, run.save, run.resume = step, save, resume
    return run


@exercise("7.4", draw=lambda rng: Draw(None, training=training), returns="nothing", judge=hunt("7.4", training))
def test_training(training):
    """training(weights, frozen, lr, beta, decay) -> a run: passes if it is right, raises AssertionError if not"""
    g = {"W": np.array([1.0, 2.0]), "A": np.array([3.0, -1.0])}
    more = {name: 5 * gradient for name, gradient in g.items()}
    ones = {"W": np.ones(2), "A": np.ones(2)}

    def start():
        return training(ones, ["W"], lr=0.1, beta=0.5, decay=0.2)

    run = start()
    run.step([g, more])
    kept = 0.98
    mean = 3 * g["A"]
    first = kept - 0.1 * mean
    assert np.allclose(run.weights["A"], first)
    assert np.array_equal(run.weights["W"], ones["W"])
    saved = run.save()
    run.step([g])
    second = kept * first - 0.1 * (0.5 * mean + g["A"])
    assert np.allclose(run.weights["A"], second)
    again = start()
    again.resume(saved)
    again.step([g])
    assert np.allclose(again.weights["A"], second)
    assert np.array_equal(again.weights["W"], ones["W"])


variant(
    "test_training",
    {
        r"$m \leftarrow \beta m + g$": r"$m \leftarrow \beta m + (1 - \beta)\, g$",
        "mean = 3 * g": "mean = 1.5 * g",
        '0.5 * mean + g["A"]': '0.5 * mean + 0.5 * g["A"]',
    },
    "momentum is a running mean of the gradients, not a sum",
    judge=hunt("7.4", training, {"beta * mean + g": "beta * mean + (1 - beta) * g"}),
)

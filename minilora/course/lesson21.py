"""Lesson 21's exercises: the log-probability of an answer, DPO's loss, training with a reference that stays frozen."""

import numpy as np

from .exercises import Draw, arrays, exercise, variant

# -- 21.1 the log-probability of an answer -----------------------------------------------------------------------------


def draw_answer(rng: np.random.Generator, large: float = 0.0) -> Draw:
    """Logits (T, V), and labels of an answer that begins in the middle and ends before the last token."""
    sizes = {"T": int(rng.integers(9, 25)), "V": int(rng.integers(110, 140))}  # -100 is an index of a row as well
    drawn = arrays(rng, sizes, logits="T V")
    drawn["logits"] += large * np.linspace(-1, 1, sizes["T"])[:, None]
    drawn["logits"][:, 0] -= large
    labels = rng.integers(1, sizes["V"], sizes["T"])
    labels[: int(rng.integers(2, 5))] = -100
    labels[-1] = -100
    labels[rng.choice(np.flatnonzero(labels != -100))] = 0  # a token like the others; with large scores, improbable
    drawn["labels"] = labels
    return drawn


@exercise(
    "21.1",
    draw=[draw_answer, lambda rng: draw_answer(rng, large=2000.0)],
    smallest=lambda rng: Draw({"T": 2, "V": 105}, logits=rng.standard_normal((2, 105)), labels=np.array([-100, 3])),
    returns="the log-probability",
)
def answer_log_p(logits, labels):
    """logits (T, V), labels (T) with -100 for tokens that are not scored -> the log-probability of the answer"""
    scores, wanted = logits[:-1], labels[1:]
    scores = scores - scores.max(axis=-1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    scored = np.flatnonzero(wanted != -100)
    return np.sum(log_p[scored, wanted[scored]])


variant(
    "answer_log_p",
    {
        "DPO compares whole answers. The log-probability of an answer is *summed over its tokens*": (
            "SimPO compares answers per token. The log-probability of an answer is *averaged over its tokens*"
        ),
        "the log-probability of the answer": "the mean log-probability of the answer's tokens",
        "np.sum(": "np.mean(",
    },
    "log-probabilities are averaged over the tokens, as in SimPO",
)


# -- 21.2 the loss -----------------------------------------------------------------------------------------------------


def draw_pairs(rng: np.random.Generator, n: int | None = None, wide: float = 1.0) -> Draw:
    """Log-probabilities of N pairs by model and reference, which differ by a few nats; beta."""
    n = int(rng.integers(5, 20)) if n is None else n
    reference = rng.normal(-40, 5, (2, n))
    chosen, rejected = reference + wide * rng.normal(0, 4, (2, n))
    beta = float(rng.uniform(0.1, 0.6))
    return Draw(
        {"N": n}, chosen=chosen, rejected=rejected, ref_chosen=reference[0], ref_rejected=reference[1], beta=beta
    )


@exercise(
    "21.2",
    draw=[draw_pairs, lambda rng: draw_pairs(rng, wide=3000.0)],
    smallest=lambda rng: draw_pairs(rng, 1),
    returns="the loss",
)
def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Log-probabilities of N pairs by the trained model and by the reference, each (N); beta -> DPO's loss"""
    ratio, ref_ratio = chosen - rejected, ref_chosen - ref_rejected
    margin = beta * (ratio - ref_ratio)
    return np.logaddexp(0, -margin).mean()


variant(
    "dpo_loss",
    {"*mean over all pairs*": "*sum over all pairs*", ".mean()": ".sum()"},
    "the loss is the sum over all pairs",
    lines={"the mean is taken": "the sum is taken"},
)


# -- 21.3 training with a frozen reference -----------------------------------------------------------------------------


def draw_training(rng: np.random.Generator, steps: int | None = None) -> Draw:
    """Scores of K answers, pairs in which some answers occur several times, beta, a learning rate, steps."""
    K = int(rng.integers(6, 12))
    pairs = [tuple(map(int, rng.choice(K - 1, 2, replace=False))) for _ in range(int(rng.integers(4, 8)))]
    pairs.append((pairs[0][0], pairs[1][1]) if pairs[0][0] != pairs[1][1] else pairs[0])
    return Draw(
        {"K": K},
        scores=rng.standard_normal(K),
        pairs=pairs,
        beta=float(rng.uniform(0.3, 1.5)),
        lr=float(rng.uniform(0.5, 1.5)),
        steps=int(rng.integers(5, 9)) if steps is None else steps,
    )


@exercise("21.3", draw=draw_training, smallest=lambda rng: draw_training(rng, steps=1), returns="scores (K)")
def dpo_training(scores, pairs, beta, lr, steps):
    """scores (K), pairs: a list of (chosen, rejected), beta, the learning rate, steps -> the scores afterwards (K)"""
    reference = scores.copy()
    for _ in range(steps):
        move = np.zeros(len(scores))
        for chosen, rejected in pairs:
            moved = scores - reference
            weight = beta / (1 + np.exp(beta * (moved[chosen] - moved[rejected])))
            move[chosen] += weight / len(pairs)
            move[rejected] -= weight / len(pairs)
        scores = scores + lr * move
    return scores


variant(
    "dpo_training",
    {"*mean of the pairs' losses*": "*sum of the pairs' losses*", "weight / len(pairs)": "weight"},
    "the loss of a step is the sum over its pairs",
)

"""Lesson 6's exercises: a word as tokens, ids and labels of a conversation, and a padded batch."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import combinations, pairwise

import numpy as np

from .compare import same
from .exercises import EXERCISES, Draw, exercise, variant

# -- 6.1 encoding a word -----------------------------------------------------------------------------------------------


def learned(words: list[str], count: int, encode: Callable) -> list[tuple[str, str]]:
    """The merges that byte-pair encoding learns from these words."""
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in pairwise(encode(word, merges)))
        merges.append(max(pairs, key=lambda pair: pairs[pair]))
    return merges


def draw_word(rng: np.random.Generator, variant: int = 0) -> Draw:
    """A word over three letters and merges learned from such words, until no two known mistakes give the same."""
    form = EXERCISES["encode_word"].form(variant)
    while True:
        words = ["".join(rng.choice(list("abc"), int(rng.integers(4, 20)), p=[0.6, 0.25, 0.15])) for _ in range(12)]
        drawn = Draw(word="".join(words[:3]), merges=learned(words[:8], 8, form.reference))
        results = [form.reference(*drawn.values()), *(mistake.function(*drawn.values()) for mistake in form.mistakes)]
        if not any(same(one, other) for one, other in combinations(results, 2)):
            return drawn


def leftmost_first(word, merges):  # type: ignore[no-untyped-def]
    """The leftmost pair that is any of the merges, again and again."""
    tokens = list(word)
    i = 0
    while i < len(tokens) - 1:
        if (tokens[i], tokens[i + 1]) in merges:
            tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
            i = 0
        else:
            i += 1
    return tokens


def longest_first(word, merges):  # type: ignore[no-untyped-def]
    """From the left, always the longest token of the vocabulary."""
    vocabulary, tokens = {*word, *(left + right for left, right in merges)}, []
    while word:
        end = max(end for end in range(1, len(word) + 1) if word[:end] in vocabulary)
        tokens.append(word[:end])
        word = word[end:]
    return tokens


@exercise(
    "6.1",
    draw=draw_word,
    smallest=lambda rng: Draw(word=str(rng.choice(list("abc"))), merges=[]),
    returns="the tokens",
)
def encode_word(word, merges):
    """word a text, merges [(left, right), ...] in the order in which they were learned -> tokens, a list of texts"""
    tokens = list(word)
    for left, right in merges:
        joined = []
        for token in tokens:
            if joined and joined[-1] == left and token == right:
                token = joined.pop() + right
            joined.append(token)
        tokens = joined
    return tokens


variant(
    "encode_word",
    {
        "the characters of the word": "the characters of the word and a mark `_` for its end",
        "list(word)": "[*word, '_']",
        "in encode_word(word, merges)]": "in encode_word(word, merges)[:-1]]  # the mark is not minilora's",
    },
    "a mark for the end of the word is a token as well",
    draw=partial(draw_word, variant=1),
)


# -- 6.2 ids and labels of a conversation ------------------------------------------------------------------------------


def draw_turns(rng: np.random.Generator, cut: bool) -> Draw:
    """A conversation with a system message and two answers, the last of which is truncated if `cut`."""
    fresh = iter(rng.permutation(np.arange(10, 500)).tolist())  # no id occurs twice, except in headers
    headers = {role: [next(fresh) for _ in range(3)] for role in ("system", "user", "assistant")}
    turns = [
        (role, headers[role], [next(fresh) for _ in range(int(rng.integers(3, 8)))])
        for role in ("system", "user", "assistant", "user", "assistant")
    ]
    T = sum(len(header) + len(content) + 1 for _, header, content in turns)
    return Draw(turns=turns, eos_id=next(fresh), max_length=T - 2 if cut else T + int(rng.integers(1, 9)))


def draw_one_turn(rng: np.random.Generator) -> Draw:
    """A question and an answer of one token each."""
    header, question, answer, eos_id = rng.permutation(np.arange(10, 500))[:4].tolist()
    return Draw(turns=[("user", [header], [question]), ("assistant", [header], [answer])], eos_id=eos_id, max_length=99)


@exercise(
    "6.2",
    draw=[partial(draw_turns, cut=False), partial(draw_turns, cut=True)],
    smallest=draw_one_turn,
    returns="input_ids, labels",
)
def ids_and_labels(turns, eos_id, max_length):
    """turns [(role, header, content), ...] -> input_ids, labels: two lists of at most max_length integers"""
    input_ids, labels = [], []
    for role, header, content in turns:
        turn = [*content, eos_id]
        input_ids += [*header, *turn]
        labels += [-100] * len(header) + (turn if role == "assistant" else [-100] * len(turn))
    return input_ids[:max_length], labels[:max_length]


variant(
    "ids_and_labels",
    {"the first `max_length`": "the last `max_length`", "[:max_length]": "[-max_length:]"},
    "of a long record the last tokens are kept",
)


# -- 6.3 a padded batch ------------------------------------------------------------------------------------------------


def draw_samples(rng: np.random.Generator, count: int | None = None) -> Draw:
    """Samples of different lengths: a question, its end token, an answer, its end token, which is also the padding; the
    second was truncated.
    """
    pad_id = int(rng.integers(3, 9))
    samples = []
    for i in range(count or 4):
        asked, answered = int(rng.integers(4, 7)), int(rng.integers(3, 5)) + 2 * i
        ids = [*rng.integers(10, 500, asked).tolist(), pad_id, *rng.integers(10, 500, answered).tolist(), pad_id]
        labels = [-100] * (asked + 1) + ids[asked + 1 :]
        samples.append((ids[:-1], labels[:-1]) if i == 1 else (ids, labels))
    order = rng.permutation(len(samples))
    return Draw({"B": len(samples)}, samples=[samples[i] for i in order], pad_id=pad_id)


@exercise(
    "6.3",
    draw=draw_samples,
    smallest=partial(draw_samples, count=1),
    returns="input_ids (B, T), labels (B, T), attention_mask (B, T)",
)
def padded_batch(samples, pad_id):
    """samples [(ids, labels), ...] of lists -> input_ids (B, T), labels (B, T), attention_mask (B, T), all integers"""
    B, T = len(samples), max(len(ids) for ids, _ in samples)
    input_ids = np.full((B, T), pad_id)
    labels = np.full((B, T), -100)
    attention_mask = np.zeros((B, T), int)
    for i, (ids, marked) in enumerate(samples):
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = marked
        attention_mask[i, : len(ids)] = 1
    return input_ids, labels, attention_mask


variant(
    "padded_batch",
    {
        "padded on the right": "padded on the left",
        "[i, : len(ids)]": "[i, T - len(ids) :]",
        "theirs = ml.collate(samples[:8], tokenizer.pad_id)": (
            "backwards = [ml.Sample(s.ids[::-1], s.labels[::-1]) for s in samples[:8]]  # minilora pads on the right\n"
            "    theirs = [rows[:, ::-1] for rows in ml.collate(backwards, tokenizer.pad_id)]"
        ),
    },
    "shorter samples are padded on the left",
)

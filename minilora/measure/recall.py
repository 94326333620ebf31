"""Keyword recall: the share of the expected words that a model's own answers contain."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from ..data.records import Record, check_records
from ..data.words import KINDS, folded
from ..generate.answers import generate_batch
from ..models.tokenizer import Tokenizer
from ..nn.language_model import LanguageModel
from ..progress import progress

ANSWER_TOKENS = 64  # where a measured answer is cut off


def answer_all(
    model: LanguageModel,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    max_new_tokens: int = ANSWER_TOKENS,
) -> list[str]:
    """The model's own answer to each record's question, by greedy decoding.

    max_new_tokens: where an answer is cut off.
    """
    check_records(records)
    prompts = [record.prompt for record in records]
    with progress("answers", len(prompts), "answer"):
        return generate_batch(model, tokenizer, prompts, max_new_tokens)


def keyword_recall(answers: Sequence[str], records: Sequence[Record]) -> float:
    """The mean over records of the share of their keywords that the answer contains: see `recalls`.

    Raises ValueError when no record has keywords.
    """
    shares = [share for share, record in zip(recalls(answers, records), records, strict=True) if record.keywords]
    if not shares:
        raise ValueError("no record has keywords: give some a list of words that an answer should contain")
    return float(np.mean(shares))


def recalls(answers: Sequence[str], records: Sequence[Record]) -> list[float]:
    """For each record, the share of its keywords that its answer contains as whole words, in upper or lower case.

    NaN for a record without keywords. Raises ValueError for another number of answers than records, and TypeError for
    answers that are not a list of texts.
    """
    check_records(records)
    if isinstance(answers, str) or (wrong := [each for each in answers if not isinstance(each, str)]):
        kind = "a single str: put it in a list" if isinstance(answers, str) else f"a {type(wrong[0]).__name__}"
        raise TypeError(f"expected a list of answers, each a text, got {kind}")
    if len(answers) != len(records):
        raise ValueError(f"expected an answer for each record, got {len(answers)} for {len(records)}")
    return [
        float(np.mean([contains(answer, word) for word in record.keywords])) if record.keywords else math.nan
        for answer, record in zip(answers, records, strict=True)
    ]


def contains(text: str, word: str) -> bool:
    """Whether `text` contains `word` as a whole word; where words have no spaces between them, anywhere. White space,
    case and how an accent is encoded do not count.

    >>> contains("An enforceable promise.", "promise"), contains("Promised", "promise"), contains("返品です", "返品")
    (True, False, True)
    """
    text, word = folded(text), folded(word)
    kinds, own = f" {text.translate(KINDS)} ", word.translate(KINDS)
    for found in re.finditer(f"(?={re.escape(word)})", text):
        before, after = kinds[found.start()], kinds[found.start() + len(word) + 1]
        if (before not in "wM_" or own[:1] == "U") and (after not in "wM_" or (own[-1:] == "U" and after != "M")):
            return True
    return False

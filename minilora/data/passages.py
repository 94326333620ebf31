"""Passages of a handbook, and the one that goes into the prompt of a question: open-book answers.

BM25 finds passages: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", Foundations and
Trends in Information Retrieval 3(4), 2009. The template of a question with its passage is stored with an adapter that
was trained on such prompts (`lora/provenance.py`), so that whoever uses it asks as it was trained.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..models.tokenizer import Message
from .rows import DataError
from .words import words

TEMPLATE = "Answer from this passage.\n\n{passage}\n\nQuestion: {question}"
PASSAGE, QUESTION = "{passage}", "{question}"
K1, B = 1.2, 0.75  # how soon a repeated word counts no more, and how far a long passage must repeat it more often
NO_WORD = "no passage has a word of the question, so this one may not be about it"
_CODE = r"(?P<code>^[ ]*(?P<fence>```|~~~).*?(?:^[ ]*(?P=fence)|\Z))"  # in which nothing else is Markdown
_HEADING = re.compile(rf"{_CODE}|(?P<heading>^\#+[ ][^\n]*\n)(?:\s*\n)?", re.MULTILINE | re.DOTALL)  # and empty lines
_UNSEEN = re.compile(rf"{_CODE}|\A---\n(?=[\w-]+:).*?^---$|<!--.*?-->", re.MULTILINE | re.DOTALL)  # by readers
LETTERS = 5  # of a word, the first ones are compared: "orders" and "ordering" count as one; numbers are compared whole
_DIGIT = re.compile(r"\d")
_COUNTED = re.compile(r"\b(?:paragraph |(?:line|record|row)-)\d+$")  # an id that says where a passage is, not what
EVERYDAY = frozenset(
    re.findall(
        r"\w+",
        """
        a about after all am an and any are as at be been but by can could did do does for from get had has have he her
        his how i if in into is it its just let like may me might must my no not of off on one or our out please shall
        she should so some than that the their them then there they this those to too up us was we were what when where
        which while who whom whose why will with would you your yours
        """,
    )
)


@dataclass(frozen=True)
class Passage:
    """A paragraph, the name under which it is shown, and questions that it answers. All of it is searched, except for a
    name that only counts, such as "paragraph 7": it would answer each question that has a 7.
    """

    id: str
    text: str
    questions: tuple[str, ...] = ()


class Handbook:
    """Passages that are ranked by question with BM25. source: what they were read from.

    Raises DataError if no passage has a word that can be searched.
    """

    def __init__(self, passages: Sequence[Passage], source: str):
        self.passages, self.source = list(passages), source
        counts = [
            Counter(terms(" ".join((_COUNTED.sub("", each.id), each.text, *each.questions)))) for each in passages
        ]
        if not any(counts):
            raise DataError(f"{source}: no passage has a word to search for")
        mean = sum(map(Counter.total, counts)) / len(passages)
        found_in = Counter(term for each in counts for term in each)
        gains: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for i, each in enumerate(counts):
            slow = K1 * (1 - B + B * each.total() / mean)
            for term, times in each.items():
                n = found_in[term]
                rare = math.log(1 + (len(passages) - n + 0.5) / (n + 0.5))  # without "1 +" it may be negative
                gains[term].append((i, rare * times / (times + slow)))
        self.gains = {  # term -> the places of the passages with it, and what it adds to the score of each
            term: (np.array([i for i, _ in each]), np.array([gain for _, gain in each])) for term, each in gains.items()
        }

    def ranked(self, question: str) -> list[Passage]:
        """All passages, the best match first; equal ones in the order of the handbook."""
        return self._first(self._scores(question), len(self.passages))

    def found(self, question: str) -> list[Passage]:
        """The first of `ranked`: those that share a word with the question."""
        scores = self._scores(question)
        return self._first(scores, int(np.count_nonzero(scores)))

    def best(self, question: str) -> Passage:
        """The first of `ranked`, without sorting the others."""
        return self.passages[self._scores(question).argmax()]

    def _first(self, scores: np.ndarray, count: int) -> list[Passage]:
        return [self.passages[i] for i in np.argsort(-scores, kind="stable")[:count]]

    def _scores(self, question: str) -> np.ndarray:
        """The score of each passage: (N,)."""
        scores = np.zeros(len(self.passages))
        for term in dict.fromkeys(terms(question)):
            if term in self.gains:
                places, gains = self.gains[term]
                scores[places] += gains
        return scores

    def has_words_of(self, messages: Sequence[Message]) -> bool:
        """Whether any passage has a word of the last question or answer."""
        return any(term in self.gains for message in messages[-2:] for term in terms(message["content"]))

    def right(self, messages: Sequence[Message]) -> Passage:
        """The passage with the answer of a conversation: the best match of the last question and answer together."""
        return self.best(" ".join(message["content"] for message in messages[-2:]))


def paragraphs(text: str) -> list[str]:
    """The paragraphs of Markdown or another text, each with the headings before it, without comments and front matter.
    Code is not divided: its empty lines are left out.

    >>> paragraphs("# Owls\\n\\nOne. <!-- Check! -->\\n\\nTwo.")
    ['# Owls\\nOne. ', 'Two.']
    """
    text = _UNSEEN.sub(lambda found: re.sub(r"\n\s*\n", "\n", found["code"] or ""), text)
    return [*filter(None, re.split(r"\n\s*\n", _HEADING.sub(r"\g<code>\g<heading>", text.strip())))]


def terms(text: str) -> list[str]:
    """The words of a text that are compared: in lower case, without everyday ones, by their first letters; those with
    digits whole.

    >>> terms("Where is the order FW-1234567 that I was ordering?")
    ['order', 'fw', '1234567', 'order']
    """
    return [word if _DIGIT.search(word) else word[:LETTERS] for word in words(text) if word not in EVERYDAY]


def fill(passage: str, question: str, template: str = TEMPLATE) -> str:
    """The prompt of a question with its passage. Braces in the two texts are only text.

    >>> fill("Open {question}s.", "When?", "{passage} {question}")
    'Open {question}s. When?'
    """
    before, _, rest = template.partition(PASSAGE)
    between, _, after = rest.partition(QUESTION)
    return f"{before}{passage}{between}{question}{after}"


def stored_template(data: Mapping[str, Any]) -> str | None:
    """The template in an adapter's entry "data", if it was trained on passages. Raises ValueError for a bad one."""
    template = data.get("context_template")
    if template is not None and not (0 <= template.find(PASSAGE) < template.find(QUESTION)):
        raise ValueError(f"the adapter's context_template must have {PASSAGE} and then {QUESTION}")
    return template

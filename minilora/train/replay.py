"""Against forgetting: everyday questions that the base answers itself, to be learned beside the data.

What a network should not lose is shown to it again while it learns something new (rehearsal: Robins 1995,
doi 10.1080/09540099550039318). Nobody has the base's own training data, but the base can be asked: its own answers,
given before any training, are such examples (self-synthesized rehearsal: Huang et al. 2024, arXiv 2403.01244).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

from ..engine.fused import NOT_SCORED
from ..io.tokenizer import Tokenizer
from ..nn.llama import Llama
from ..nn.parts import Sample
from .data import Record, encode_record
from .evaluate import ANSWER_TOKENS, answer_all

_MARGIN = 4  # tokens: decoding and encoding again may take some off an answer that was cut


def everyday_questions() -> list[str]:
    """The questions of `data/everyday.txt`: 96 on all kinds of things but those that `general` measures."""
    return (files("minilora") / "data" / "everyday.txt").read_text(encoding="utf-8").splitlines()


def own_answers(
    model: Llama, tokenizer: Tokenizer, count: int, done: Callable[[int], object] = lambda count: None
) -> list[Sample]:
    """The first `count` everyday questions with the model's own answers, greedily, as samples to train on.

    An answer that is cut off at ANSWER_TOKENS is learned as far as it goes, and not that it ends there. Empty answers
    are left out, so there may be fewer than `count`. done: as `answer_all` calls it. Raises ValueError for more
    questions than there are.
    """
    questions = everyday_questions()
    if not 0 <= count <= len(questions):
        raise ValueError(f"replay must be from 0 to {len(questions)} questions, got {count}")
    asked = [
        Record(f"everyday-{i}", ({"role": "user", "content": question}, {"role": "assistant", "content": "?"}))
        for i, question in enumerate(questions[:count])
    ]
    answers = answer_all(model, tokenizer, asked, done=done)
    return [_sample(record, answer, tokenizer) for record, answer in zip(asked, answers, strict=True) if answer.strip()]


def _sample(record: Record, answer: str, tokenizer: Tokenizer) -> Sample:
    sample = encode_record(Record(record.id, (*record.prompt, {"role": "assistant", "content": answer})), tokenizer)
    if len(tokenizer.encode(answer)) < ANSWER_TOKENS - _MARGIN:
        return sample
    end = max(i for i, label in enumerate(sample.labels) if label != NOT_SCORED)  # the token that ends an answer
    return Sample(sample.ids[:end], sample.labels[:end])

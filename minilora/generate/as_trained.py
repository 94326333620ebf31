"""Asking adapters, or a whole model, as they were trained: system prompt, labels or fields, passages.

All of it is in the entry "data" of an adapter (`lora/provenance.py`). chat, predict and serve ask through `as_trained`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..data.fields import FieldTask, Task, as_json, stored_task
from ..data.labels import LabelTask
from ..data.passages import TEMPLATE, Handbook, Passage, fill, stored_template
from ..lora.adapters import Choice, same_of_all
from ..models.tokenizer import Message, Tokenizer
from ..nn.language_model import LanguageModel
from .schema import Guide, Language, vocabulary_of

_language = lru_cache(maxsize=8)(Language.of)  # that of a task which copies nothing is the same for all texts


@dataclass(frozen=True)
class Asked:
    """A conversation as the model reads it.

    text: the last message, as it was said. task: the labels or fields that are asked for, if any. passage: the one of a
    handbook that is in the prompt, if any.
    """

    messages: list[Message]
    text: str
    task: Task | None
    passage: Passage | None

    def guide(self, tokenizer: Tokenizer) -> Guide | None:
        """What keeps the answer within the schema of its fields, if there are any."""
        return guide_of(self.task, tokenizer, self.text) if isinstance(self.task, FieldTask) else None


def as_trained(
    model: LanguageModel,
    choice: Choice,
    messages: Sequence[Message],
    task: Task | None = None,
    system: str | None = None,
    handbook: Handbook | None = None,
    own: str | None = None,
) -> Asked:
    """A conversation as the adapters of a choice, or without one a whole model, were trained to read it.

    task: see `task_for`; it asks about the last message alone.
    system: the system prompt (default: the one that they were trained with); messages may begin with another.
    handbook: passages, the best of which is put before the last question, where they were trained on passages.
    own: the question's own passage, which is put there instead.
    """
    text, found = messages[-1]["content"], None
    if messages[-1]["role"] == "user" and (template := template_of(model, choice)) is not None:
        if own is None and handbook is not None:
            found = handbook.best(text)
            own = found.text
        if own is not None:
            messages = [*messages[:-1], {"role": "user", "content": fill(own, text, template)}]
    talk = with_system(messages, system_of(model, choice) if system is None else system)
    return Asked(talk if task is None else task.asked(talk), text, task, found)


def system_of(model: LanguageModel, choice: Choice) -> str | None:
    """The system prompt that all adapters of a choice, or a whole model, were trained with; None for several."""
    return same_of_all(model, choice, lambda data: data.get("system"), model.data.get("system"))


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages after a system prompt; as they are if they begin with one, or there is none.

    >>> with_system([{"role": "user", "content": "hello"}], "Be brief.")[0]
    {'role': 'system', 'content': 'Be brief.'}
    """
    if system is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def template_of(model: LanguageModel, choice: Choice) -> str | None:
    """The template of a question with its passage for a choice of adapters: the one that they were trained on.

    That is None if they were trained without passages, or on labels. A base, and an adapter whose training nobody
    wrote down, can be asked either way: theirs is TEMPLATE.
    """

    def read(data: Mapping[str, Any]) -> str | None:
        return stored_template(data) if data else TEMPLATE

    return same_of_all(model, choice, read, read(model.data))


def without_passages(
    model: LanguageModel, handbook: Handbook | None, names: Collection[str] | None = None
) -> list[str]:
    """One line that names the adapters that get no passages: without a handbook those that learned to read some, with
    one those that were trained without any; none if there are no such adapters.

    names: of the adapters that are looked at (default: all).
    """
    names = model.adapters if names is None else names
    if handbook is None:
        readers = [name for name in names if stored_template(model.adapters[name].data)]
        what = "learned to answer from passages: --context FILE gives some to look them up in"
        return [f"{', '.join(readers)} {what}"] if readers else []
    others = [name for name in names if template_of(model, name) is None]
    return [f"{', '.join(others)}: trained without passages, and asked without them"] if others else []


def task_of_adapters(model: LanguageModel, choice: Choice) -> Task | None:
    """The task that all adapters of a choice were trained on: labels or fields. None if there is none, or several.

    Without an adapter it is that of the whole model, if that was fine-tuned on one.
    """
    return same_of_all(model, choice, stored_task, stored_task(model.data))


def task_for(model: LanguageModel, choice: Choice, schema: FieldTask | None) -> Task | None:
    """The task of a choice of adapters, or to find the fields of a schema that is given, unless these are the same.

    Raises ValueError for a schema where the adapters were trained on labels.
    """
    task = task_of_adapters(model, choice)
    if isinstance(task, LabelTask) and schema is not None:
        raise ValueError("a schema is for texts with fields, and the adapter was trained on labels: leave it out")
    same = isinstance(task, FieldTask) and schema is not None and task.fields == schema.fields
    return task if schema is None or same else schema


def guide_of(task: FieldTask, tokenizer: Tokenizer, text: str) -> Guide:
    """What keeps the answer for a text within the schema.

    Raises ValueError for a schema with a character that no token can express: no answer could have it.
    """
    tokenizer.check(as_json(task.schema()))
    language = Language.of(task, text) if task.copied else _language(task)
    return Guide(language, vocabulary_of(tokenizer))

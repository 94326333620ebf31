"""Fields as answers: the question for the fields of a text, and JSON that the schema allows as the answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ..data.fields import FieldTask, Task, stored_task
from ..lora.adapters import Choice, factors_of
from ..models.tokenizer import Message, Tokenizer
from ..nn.language_model import LanguageModel
from .schema import Guide, Language, vocabulary_of

_language = lru_cache(maxsize=8)(Language.of)  # that of a task which copies nothing is the same for all texts


def task_of_adapters(model: LanguageModel, choice: Choice) -> Task | None:
    """The task that all adapters of a choice were trained on: labels or fields. None if there is none, or several.

    Without an adapter it is that of the whole model, if that was fine-tuned on one.
    """
    adapters = [model.adapters[name] for name in factors_of(choice) if name in model.adapters]
    tasks = {stored_task(trained.data) for trained in adapters or [model]}
    return tasks.pop() if len(tasks) == 1 else None


def guide_of(task: FieldTask, tokenizer: Tokenizer, text: str) -> Guide:
    """What keeps the answer for a text within the schema."""
    language = Language.of(task, text) if task.copied else _language(task)
    return Guide(language, vocabulary_of(tokenizer))


def asked_for_fields(task: FieldTask, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[Message], Guide]:
    """What a model is asked for the fields of the last message, and the guide of its answer.

    messages: a system prompt is taken into account, earlier questions and answers are not.
    """
    text = messages[-1]["content"]
    system = [message for message in messages[:1] if message["role"] == "system"]
    return [*system, {"role": "user", "content": task.prompt(text)}], guide_of(task, tokenizer, text)

"""Fields as answers: which task a choice of adapters has, and what keeps its answers within a schema."""

from __future__ import annotations

from functools import lru_cache

from ..data.fields import FieldTask, Task, as_json, stored_task
from ..data.labels import LabelTask
from ..lora.adapters import Choice, same_of_all
from ..models.tokenizer import Tokenizer
from ..nn.language_model import LanguageModel
from .schema import Guide, Language, vocabulary_of

_language = lru_cache(maxsize=8)(Language.of)  # that of a task which copies nothing is the same for all texts


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

"""Predictions for many texts at a time: the label of each, its fields, or an answer, as the adapters were trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from ..data.fields import FieldTask, Task
from ..data.labels import LabelTask
from ..data.passages import Handbook
from ..lora.adapters import active_factors
from ..models.tokenizer import Message, Tokenizer, check_messages
from ..nn.language_model import LanguageModel
from .answers import generate_batch
from .as_trained import as_trained, task_for
from .conversation import MAX_NEW_TOKENS
from .labels import label_logprobs, label_probabilities, ranked, without_nan
from .streams import check_able


def predict(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Sequence[str | Sequence[Message]],
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    system: str | None = None,
    handbook: Handbook | None = None,
    schema: FieldTask | None = None,
    passages: Sequence[str | None] = (),
    top_k: int = 1,
) -> list[dict[str, Any]]:
    """What the active adapters, or else the base or a whole model, predict for each text, in batches on all cores.

    texts: messages or questions, each a string or a conversation that ends with the user's turn.
    max_new_tokens, temperature, seed: of each answer, as for `generate`.
    system: the system prompt; None for the one that the adapters were trained with.
    handbook: passages, the best of which is put before each question: `data.records.read_handbook` reads them.
    schema: of the fields to find (default: that of the adapters, if they were trained on one):
        `data.fields.read_schema` reads it from a file, `data.fields.FieldTask.of` makes it of a dict.
    passages: of each text its own passage, which is read instead of the handbook's best, or None; empty for none.
    top_k: how many labels each text gets, the likeliest first; all of them where there are fewer.

    Returns a dict for each text: of adapters that were trained on labels {"label", "probability"}, with a higher top_k
    also {"label_2", "probability_2"} and so on; of those that were trained on fields the fields; of others {"answer"},
    and for a passage of the handbook also {"passage"}, its name.

    Raises ValueError, before anything is predicted, for a text that is empty, neither a string nor such a conversation,
    or too long for the model, for another number of passages than texts, for a schema where the adapters were trained
    on labels, and for a top_k below 1, or above it where they were not.
    """
    check_able(model, tokenizer)
    for what, given_list in (("texts", texts), ("passages", passages)):
        if isinstance(given_list, str):
            raise TypeError(f"expected a list of {what}, got a single str: put it in a list")
        names = isinstance(given_list, Mapping) or hasattr(given_list, "columns")  # that is all a loop finds in them
        if names or not hasattr(given_list, "__len__"):
            raise TypeError(f"expected a list of {what}, got a {type(given_list).__name__}")
    for given, kind, how in (
        (handbook, Handbook, "data.records.read_handbook"),
        (schema, FieldTask, "data.fields.read_schema"),
    ):
        if not isinstance(given, kind | None):
            raise TypeError(f"expected a {kind.__name__}, which minilora.{how} reads, got a {type(given).__name__}")
    if len(passages) and len(passages) != len(texts):
        raise ValueError(f"expected a passage, or None, for each of {len(texts)} texts, got {len(passages)} passages")
    active = dict.fromkeys(active_factors(model), 1.0)
    task = task_for(model, active, schema)
    keys = added_names(task, top_k)
    asked = []
    for i, (text, own) in enumerate(zip(texts, list(passages) or [None] * len(texts), strict=True)):
        if not isinstance(text, str):
            check_messages(text, f"text {i}: ")
        said: list[Message] = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
        if not said or not said[-1]["content"].strip():
            raise ValueError(f"text {i} is empty")
        if (role := said[-1]["role"]) != "user":
            raise ValueError(f"text {i} must end with the user's message, got one of role {role}")
        asked.append(as_trained(model, active, said, task, system, handbook, own))
    if not asked:
        return []
    prompts = [each.messages for each in asked]
    if isinstance(task, LabelTask):
        p = label_probabilities(without_nan(label_logprobs(model, tokenizer, prompts, task.labels)))  # (N, L)
        return [dict(zip(keys, chain.from_iterable(ranked(task, row)), strict=False)) for row in p]
    guides = [each.guide(tokenizer) for each in asked]
    answers = generate_batch(model, tokenizer, prompts, max_new_tokens, temperature, seed, guides=guides)
    if isinstance(task, FieldTask):
        return [json.loads(answer) for answer in answers]
    named = [{} if each.passage is None else {"passage": each.passage.id} for each in asked]
    return [{"answer": answer} | passage for answer, passage in zip(answers, named, strict=True)]


def added_names(task: Task | None, top_k: int) -> list[str]:
    """What `predict` calls its answers to a text. Raises ValueError for a top_k that is not possible for this task."""
    if top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    if isinstance(task, LabelTask):
        places = ["", *(f"_{place}" for place in range(2, min(top_k, len(task.labels)) + 1))]
        return [f"{what}{place}" for place in places for what in ("label", "probability")]
    if top_k > 1:
        raise ValueError(f"top_k is {top_k}, but only what was trained on labels predicts several")
    return ["answer"] if task is None else [field.name for field in task.fields]

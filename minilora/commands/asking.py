"""What chat, predict and serve share: the base and adapters that answer, their passages, and how they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.passages import Handbook
from ..data.records import read_handbook
from ..generate.as_trained import without_passages
from ..generate.conversation import MAX_NEW_TOKENS
from ..generate.streams import Sampling
from ..models.tokenizer import Tokenizer
from ..nn.language_model import LanguageModel
from ..options import BASE, UsageError, check, option
from ..progress import log
from .shared import Loading


@dataclass(frozen=True, kw_only=True)
class Answering(Loading):
    """Which base and adapters answer, and from which passages."""

    adapter: Sequence[str] = option(
        (), "folders of adapters, such as runs/legal or legal=runs/legal", metavar="[NAME=]DIR"
    )
    base: str | None = option(None, f"{BASE} (default: the one that the adapters' folders name, or smollm2)", path=True)
    context: str | None = option(
        None,
        "answer from passages, the best match for each question: support-handbook, a .txt or .md file, rows of texts",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class Asking(Answering):
    """How they are asked. Raises ValueError for values that are not possible."""

    system: str | None = option(
        None, "the system prompt (default: the one that the adapter was trained with, if any)", metavar="TEXT"
    )
    schema: str | None = option(
        None,
        "JSON Schema of the fields to find in every text (default: that of the adapter)",
        metavar="FILE",
        only={"context": None},
    )
    max_new_tokens: int = option(MAX_NEW_TOKENS, "tokens of an answer, at most")
    temperature: float = option(0.0, "0 takes the most likely token (greedy); above 0, tokens are sampled")
    seed: int = option(0, "seed of the sampling, for a temperature above 0")

    def __post_init__(self):
        check(self)
        Sampling(self.max_new_tokens, self.temperature, seed=self.seed)


def read_context(
    source: str | None, model: LanguageModel, tokenizer: Tokenizer, max_new_tokens: int, context: int | None = None
) -> Handbook | None:
    """The passages of --context, if it is given. Otherwise, adapters that learned to read some are named in the log.

    max_new_tokens: of an answer, for which each prompt leaves room.
    context: tokens of a prompt and its answer, where these must be fewer than the model can see.

    Raises UsageError where no room is left for a question, and DataError as `read_handbook`.
    """
    limit = context or model.config.max_position_embeddings
    if source is not None and limit <= max_new_tokens:
        raise UsageError("--max-new-tokens leaves no room for a question and its passage: give fewer")
    handbook = None if source is None else read_handbook(source, tokenizer, limit, max_new_tokens)
    for line in without_passages(model, handbook):
        log.info(line)
    return handbook

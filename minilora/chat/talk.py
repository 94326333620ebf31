"""A conversation with one base and its adapters: what was said, who answers, and how much of it the model can see."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.disk import replacing
from ..generate.streams import Streams
from ..lora.adapters import Choice, set_adapter
from ..models.tokenizer import Message, Tokenizer
from ..nn.llama import Llama
from ..train.options import ChatOptions


@dataclass(frozen=True)
class Turn:
    """A question, what was answered, and by whom."""

    question: str
    answer: str
    version: str

    def messages(self) -> list[Message]:
        """The turn as a model reads it."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def name_of(choice: Choice) -> str:
    """What a choice of adapters is called.

    >>> name_of(None), name_of("legal"), name_of({"legal": 0.5, "support": 0.25})
    ('base', 'legal', '0.5 legal + 0.25 support')
    """
    if isinstance(choice, Mapping):
        return " + ".join(f"{factor:g} {name}" for name, factor in choice.items())
    return "base" if choice is None else choice


class Talk:
    """A conversation under way.

    tell: called with a line when something about the talk should be known. turns: all that was said. seen_from: the
    first turn that the model is still shown; earlier ones no longer fit. used: tokens of the last question, with what
    came before it, and its answer.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, options: ChatOptions, tell: Callable[[str], None]):
        self.model, self.tokenizer, self.options, self.tell = model, tokenizer, options, tell
        self.limit = model.config.max_position_embeddings
        self.turns: list[Turn] = []
        self.asked = 0
        self.choose(None)
        self.clear()

    def choose(self, choice: Choice) -> None:
        """Let an adapter, a mix or the base answer from here on. Raises ValueError for a name that there is not."""
        if isinstance(choice, Mapping):
            choice = {name: float(factor) for name, factor in choice.items()}
        set_adapter(self.model, choice)
        self.choice = choice

    def clear(self) -> None:
        """Forget all that was said."""
        self.turns = []
        self.seen_from = self.used = 0
        self.told = False  # that the oldest turns have gone

    def ask(self, question: str, show: Callable[[str], None]) -> bool:
        """Answer the next question: `show` gets the answer piece by piece. False for one that is cut.

        An answer that is stopped by an exception, such as Ctrl-C, is kept as far as it came. Raises ValueError for a
        question that the model cannot read, or that is too long for it even alone; the talk is as before then.
        """
        start = self._start_that_fits(question)
        streams = Streams(self.model, self.tokenizer, slots=1, mixed=False)
        answer = streams.add([*self._said(start), *_question(question)], **self._settings())
        if start > self.seen_from and not self.told:
            self.told = True
            self.tell(f"the oldest turns are left out from here on: {self.limit} tokens are all the model can see")
        self.seen_from = start
        self.asked += 1
        try:
            while streams.busy:
                streams.step()
                show(answer.new_text())
        finally:
            self.used = answer.prompt_tokens + answer.tokens
            if answer.text:
                self.turns.append(Turn(question, answer.text, name_of(self.choice)))
        return answer.finished == "stop"

    def compare(self, question: str, versions: Mapping[str, Choice]) -> Iterator[tuple[str, str]]:
        """Ask several versions one question, without what came before it, in one mixed batch.

        Yields (name, piece of the answer), in the order of the versions: all computes together, and the second is shown
        as soon as the first has ended. The talk is as before. Raises ValueError as `ask` does.
        """
        self._start_that_fits(question, alone=True)
        streams = Streams(self.model, self.tokenizer, slots=len(versions))
        settings = self._settings()
        answers = {name: streams.add(_question(question), choice, **settings) for name, choice in versions.items()}
        for name, answer in answers.items():
            yield name, answer.new_text()
            while not answer.finished:
                streams.step()
                yield name, answer.new_text()

    def save(self, path: Path) -> None:
        """Write what was said: as text, or as {"messages": ...} for `finetune --data` if the name ends in .jsonl.

        Raises FileExistsError when there is such a file already, ValueError when nothing was said.
        """
        if not self.turns:
            raise ValueError("nothing was said yet: there is nothing to save")
        if path.exists():
            raise FileExistsError(f"{path} is there already: choose another name")
        if path.suffix == ".jsonl":
            text = json.dumps({"messages": self._said(0)}, ensure_ascii=False) + "\n"
        else:
            text = "\n".join(f"you: {turn.question}\n\n{turn.version}: {turn.answer}\n" for turn in self.turns)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")

    def _settings(self) -> dict[str, Any]:
        """How the next answer is made. Its seed differs from the last one's, so that a question asked again can be
        answered otherwise.
        """
        options = self.options
        return {
            "max_new_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed + self.asked,
        }

    def _said(self, start: int) -> list[Message]:
        return [message for turn in self.turns[start:] for message in turn.messages()]

    def _start_that_fits(self, question: str, alone: bool = False) -> int:
        """The first turn from which on all that was said fits, with the question and its answer."""
        for start in range(len(self.turns) if alone else self.seen_from, len(self.turns) + 1):
            talk = [*self._said(start), *_question(question)]
            length = len(self.tokenizer.encode_chat(talk, answer_next=True))
            if length + self.options.max_new_tokens <= self.limit:
                return start
        raise ValueError(
            f"a question of {length} tokens and an answer of {self.options.max_new_tokens} are more than the "
            f"{self.limit} the model can see: ask in fewer words, or give a smaller --max-new-tokens"
        )


def _question(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]

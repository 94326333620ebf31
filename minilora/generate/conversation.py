"""A conversation with one base and its adapters: what was said, who answers, and how much of it the model sees."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..data.fields import FieldTask, Task
from ..data.labels import LabelTask
from ..data.passages import TEMPLATE, Handbook, Passage, stored_template
from ..data.records import read_records
from ..files.disk import write_bytes
from ..lora.adapters import Choice, same_of_all, set_adapter
from ..models.tokenizer import Message, Tokenizer
from ..nn.language_model import LanguageModel
from ..progress import log
from .fields import guide_of, task_for
from .labels import ranked_labels
from .prefix_cache import PrefixCache
from .streams import Answer, Streams, check_settings

MAX_NEW_TOKENS = 256  # of an answer, in a chat, on the page and for a request that does not say
TOY = "tiny is a toy model of 1 million parameters: it shows how things work, but it knows nothing"


@dataclass(frozen=True)
class Turn:
    """A question, its answer, what the version that answered is called, and the system prompt that it had, if any.

    question: "" for a greeting, which answers none.
    """

    question: str
    answer: str
    version: str
    system: str | None = None

    def messages(self) -> list[Message]:
        """The turn as a model reads it."""
        asked: list[Message] = [{"role": "user", "content": self.question}] if self.question else []
        return [*asked, {"role": "assistant", "content": self.answer}]


def name_of(choice: Choice) -> str:
    """The name of a choice of adapters, for people.

    >>> name_of(None), name_of("legal"), name_of({"legal": 0.5, "support": 0.25})
    ('base', 'legal', '0.5 legal + 0.25 support')
    """
    if isinstance(choice, Mapping):
        return " + ".join(f"{factor:g} {name}" for name, factor in choice.items())
    return "base" if choice is None else choice


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


def open_book(
    model: LanguageModel, choice: Choice, handbook: Handbook | None, messages: Sequence[Message]
) -> tuple[list[Message], Passage | None]:
    """The messages with the best passage for the last question in its prompt, and this passage.

    They stay as they are, and there is no passage, without a handbook or where `template_of` the choice is None.
    """
    template = template_of(model, choice)
    if handbook is None or template is None or messages[-1]["role"] != "user":
        return list(messages), None
    passage, prompt = handbook.ask(messages[-1]["content"], template)
    return [*messages[:-1], {"role": "user", "content": prompt}], passage


def without_passages(
    model: LanguageModel, handbook: Handbook | None, names: Collection[str] | None = None
) -> list[str]:
    """One line that names the adapters that get no passages: without a handbook those that learned to read some, with
    one those that were trained without any; none if there are no such adapters.

    names: of the adapters that are looked at (default: all).
    """
    names = model.adapters if names is None else names
    readers = [name for name in names if stored_template(model.adapters[name].data)]
    others = [name for name in names if template_of(model, name) is None]
    if handbook is not None:
        return [f"{', '.join(others)}: trained without passages, and asked without them"] if others else []
    what = "learned to answer from passages: --context FILE gives some to look them up in"
    return [f"{', '.join(readers)} {what}"] if readers else []


class Talk:
    """A conversation under way.

    temperature, top_p, seed, max_new_tokens, repetition_penalty: as for `Streams.add`. system: the system prompt; None
    for the one that the adapters were trained with. handbook: passages, the best of which is put before each question.
    schema: of the fields that each question asks for (default: that of the adapters, if they were trained on one).
    turns: all that was said. seen_from: the first turn that the model still sees; earlier ones no longer fit. used:
    tokens of the last question, what came before it, and its answer.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        handbook: Handbook | None = None,
        schema: FieldTask | None = None,
        repetition_penalty: float = 1.0,
    ):
        check_settings(max_new_tokens, temperature, seed, top_p, repetition_penalty)
        self.model, self.tokenizer, self.system, self.handbook = model, tokenizer, system, handbook
        self.schema, self.repetition_penalty = schema, repetition_penalty
        self.max_new_tokens, self.temperature, self.top_p, self.seed = max_new_tokens, temperature, top_p, seed
        self.limit = model.config.max_position_embeddings
        self.asked, self.known = 0, PrefixCache()
        self.choose(None)
        self.clear()

    def choose(self, choice: Choice) -> None:
        """Let an adapter, a mix or the base answer from here on. Raises ValueError for a name that is unknown."""
        if isinstance(choice, Mapping):
            choice = {name: float(factor) for name, factor in choice.items()}
        set_adapter(self.model, choice)
        self.choice = choice
        self.known.forget()  # what others computed

    def clear(self) -> None:
        """Forget everything that was said."""
        self.turns: list[Turn] = []
        self.seen_from = self.used = 0
        self.told = False  # that the oldest turns are left out

    def undo(self) -> Turn:
        """Forget the last question and its answer, which are returned. Raises ValueError if nothing was asked."""
        if not self.turns or not self.turns[-1].question:
            raise ValueError("nothing was asked yet")
        self.seen_from = min(self.seen_from, len(self.turns) - 1)
        return self.turns.pop()

    def load(self, path: Path) -> None:
        """Continue the last conversation of a data file, such as `save` writes in .jsonl, with its system prompt if it
        has one. What was said here is forgotten.

        Raises FileNotFoundError, and ValueError for a file without one or in which questions and answers do not
        alternate; nothing has changed then.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        messages = list(read_records(path)[-1].messages)
        system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
        turns, question = list[Turn](), ""
        for message in messages:
            if message["role"] == "user" and not question:
                question = message["content"]
            elif message["role"] == "assistant" and (question or not turns):
                turns.append(Turn(question, message["content"], "assistant", system))
                question = ""
            else:
                raise ValueError(f"{path}: questions and answers alternate in a chat, and in its last record do not")
        if not turns:
            raise ValueError(f"{path}: the last record is no conversation: /save talk.jsonl writes one")
        self.clear()
        self.turns = turns
        if system not in (None, self.system_for(self.choice)):
            self.system = system

    def system_for(self, choice: Choice) -> str | None:
        """The system prompt under which a choice of adapters is asked."""
        return system_of(self.model, choice) if self.system is None else self.system

    def passage(self, question: str, choice: Choice) -> Passage | None:
        """The passage that a choice of adapters is given with a question, if any."""
        return open_book(self.model, choice, self.handbook, [{"role": "user", "content": question}])[1]

    def ask(self, question: str, show: Callable[[str], None]) -> bool:
        """Answer the next question: `show` gets the answer piece by piece. False for an answer that was cut.

        Adapters that were trained on labels or fields answer the question alone, whatever was said before it.

        An answer that an exception stops, such as Ctrl-C, is kept as far as it was shown. Raises ValueError for a
        question that the model cannot read, or that is too long even alone; nothing has changed then.
        """
        if (found := self._at_once(question, self.choice)) is not None:
            text, shown = found
            show(shown)
            self._keep(question, text)
            return True
        start = self._start_that_fits(question, self.choice)
        streams = Streams(self.model, self.tokenizer, slots=1, mixed=False, known=self.known)
        answer = self._add(streams, start, question, self.choice)
        if start > self.seen_from and not self.told:
            self.told = True
            log.info(f"the oldest turns are left out from here on: {self.limit} tokens are all that the model can see")
        self.seen_from = start
        self.asked += 1
        try:
            while streams.busy:
                streams.step()
                show(answer.new_text())
        finally:
            self.used = answer.prompt_tokens + answer.tokens
            if shown := answer.text[: answer.read]:
                self._keep(question, shown)
        return answer.finished == "stop"

    def compare(self, question: str, versions: Mapping[str, Choice]) -> Iterator[tuple[str, str]]:
        """Ask several versions one question, without what was said before it, in one mixed batch.

        Yields (name, piece of the answer), in the order of the versions: all are computed together, and the second is
        shown when the first has ended. The conversation stays as it was. Raises ValueError as `ask` does.
        """
        alone = len(self.turns)
        at_once = {name: self._at_once(question, choice) for name, choice in versions.items()}
        written = {name: choice for name, choice in versions.items() if at_once[name] is None}
        for choice in written.values():
            self._start_that_fits(question, choice, alone)
        streams = Streams(self.model, self.tokenizer, slots=len(versions))
        answers = {name: self._add(streams, alone, question, choice) for name, choice in written.items()}
        for name, found in at_once.items():
            if found is not None:
                yield name, found[1]
                continue
            answer = answers[name]
            yield name, answer.new_text()
            while not answer.finished:
                streams.step()
                yield name, answer.new_text()

    def _task(self, choice: Choice) -> Task | None:
        """What the adapters of a choice were trained to do, or to find the fields of the schema."""
        return task_for(self.model, choice, self.schema)

    def _at_once(self, question: str, choice: Choice) -> tuple[str, str] | None:
        """An answer that is not written token by token, and what is shown: a label with its probability and the next
        two.
        """
        if not isinstance(task := self._task(choice), LabelTask):
            return None
        messages = with_system([{"role": "user", "content": question}], self.system_for(choice))
        (label, p), *others = ranked_labels(self.model, self.tokenizer, task, messages, choice)
        rest = ", ".join(f"{name} {100 * q:.0f} %" for name, q in others[:2])
        return label, f"{label} ({100 * p:.0f} %; then {rest})"

    def save(self, path: Path) -> None:
        """Write what was said: as text, or as {"messages": ...} for `finetune --data` if the name ends in .jsonl.

        In .jsonl each change of the system prompt begins another line: all that was said until the next change, in
        which the answers under earlier prompts have the weight 0, so that they are read and not learned.

        Raises FileExistsError if there is such a file already, ValueError if nothing was said.
        """
        if not self.turns:
            raise ValueError("nothing was said yet: there is nothing to save")
        if path.exists():
            raise FileExistsError(f"{path} is there already: choose another name")
        if path.suffix == ".jsonl":
            text, before = "", list[Message]()
            for system, turns in groupby(self.turns, key=lambda turn: turn.system):
                said = [message for turn in turns for message in turn.messages()]
                text += json.dumps({"messages": with_system([*before, *said], system)}, ensure_ascii=False) + "\n"
                before += [{**one, "weight": 0} if one["role"] == "assistant" else one for one in said]
        else:
            lines = [(("you", turn.question), (turn.version, turn.answer)) for turn in self.turns]
            text = "\n".join(f"{who}: {said}\n" for each in lines for who, said in each if said)
        write_bytes(path, text.encode())

    def _add(self, streams: Streams, start: int, question: str, choice: Choice) -> Answer:
        """Queue the next answer. Each question has its own seed, so that its answer can differ when repeated."""
        task, seed = self._task(choice), self.seed + self.asked
        guide = guide_of(task, self.tokenizer, question) if isinstance(task, FieldTask) else None
        settings = (self.max_new_tokens, self.temperature, self.top_p, seed)
        messages = self._messages(start, question, choice)
        choice, penalty = choice if streams.mixed else None, self.repetition_penalty
        return streams.add(messages, choice, *settings, guide=guide, repetition_penalty=penalty)

    def _keep(self, question: str, answer: str) -> None:
        """Add a turn to what was said."""
        self.turns.append(Turn(question, answer, name_of(self.choice), self.system_for(self.choice)))

    def _messages(self, start: int, question: str, choice: Choice) -> list[Message]:
        """What a choice of adapters is asked: the question, after what was said from a turn on; for fields it alone."""
        said = [message for turn in self.turns[start:] for message in turn.messages()]
        asked, _ = open_book(self.model, choice, self.handbook, [*said, {"role": "user", "content": question}])
        messages = with_system(asked, self.system_for(choice))
        return task.asked(messages) if isinstance(task := self._task(choice), FieldTask) else messages

    def _start_that_fits(self, question: str, choice: Choice, start: int | None = None) -> int:
        """The first turn from which everything fits, with the question and its answer."""
        for first in range(self.seen_from if start is None else start, len(self.turns) + 1):
            length = len(self.tokenizer.encode_chat(self._messages(first, question, choice), answer_next=True))
            if length + self.max_new_tokens <= self.limit:
                return first
        raise ValueError(
            f"a question of {length} tokens and an answer of {self.max_new_tokens} are more than the {self.limit} that "
            "the model can see: ask in fewer words, or give a smaller --max-new-tokens"
        )

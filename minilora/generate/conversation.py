"""A conversation with one base and its adapters: what was said, who answers, and how much of it the model sees."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from ..data.fields import FieldTask
from ..data.labels import LabelTask
from ..data.passages import Handbook, Passage
from ..data.records import read_records
from ..files.disk import write_bytes
from ..lora.adapters import Choice, set_adapter
from ..models.tokenizer import Message, Tokenizer
from ..nn.language_model import LanguageModel
from ..progress import log
from .as_trained import Asked, as_trained, system_of, task_for, with_system
from .labels import ranked_labels
from .prefix_cache import PrefixCache
from .streams import Answer, Sampling, Streams

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


class Talk:
    """A conversation under way.

    sampling: of every answer; each question adds 1 to the seed. system: the system prompt; None for the one that the
    adapters were trained with. handbook: passages, the best of which is put before each question. schema: of the fields
    that each question asks for (default: that of the adapters, if they were trained on one).
    turns: all that was said. seen_from: the first turn that the model still sees; earlier ones no longer fit. used:
    tokens of the last question, what came before it, and its answer.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        sampling: Sampling,
        system: str | None = None,
        handbook: Handbook | None = None,
        schema: FieldTask | None = None,
    ):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.system, self.handbook, self.schema = system, handbook, schema
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
        if messages and messages[0]["role"] == "assistant":  # a greeting answers no question
            messages.insert(0, {"role": "user", "content": ""})
        if any(message["role"] != ("user", "assistant")[i % 2] for i, message in enumerate(messages)):
            raise ValueError(f"{path}: questions and answers alternate in a chat, and in its last record do not")
        pairs = zip(messages[::2], messages[1::2], strict=False)  # a last question without an answer is left out
        turns = [Turn(asked["content"], answer["content"], "assistant", system) for asked, answer in pairs]
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
        return self._asked(question, choice, len(self.turns)).passage

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
        start, asked = self._that_fits(question, self.choice, self.seen_from)
        streams = Streams(self.model, self.tokenizer, slots=1, mixed=False, known=self.known)
        answer = self._add(streams, asked, None)
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
        written = [name for name, found in at_once.items() if found is None]
        asked = {name: self._that_fits(question, versions[name], alone)[1] for name in written}
        streams = Streams(self.model, self.tokenizer, slots=len(versions))
        answers = {name: self._add(streams, each, versions[name]) for name, each in asked.items()}
        for name, found in at_once.items():
            if found is not None:
                yield name, found[1]
                continue
            answer = answers[name]
            yield name, answer.new_text()
            while not answer.finished:
                streams.step()
                yield name, answer.new_text()

    def _at_once(self, question: str, choice: Choice) -> tuple[str, str] | None:
        """An answer that is not written token by token, and what is shown: a label with its probability and the next
        two.
        """
        asked = self._asked(question, choice, len(self.turns))
        if not isinstance(asked.task, LabelTask):
            return None
        (label, p), *others = ranked_labels(self.model, self.tokenizer, asked.task, asked.messages, choice)
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

    def _add(self, streams: Streams, asked: Asked, choice: Choice) -> Answer:
        """Queue the next answer. Each question has its own seed, so that its answer can differ when repeated."""
        sampling = replace(self.sampling, seed=self.sampling.seed + self.asked)
        return streams.add(asked.messages, choice, guide=asked.guide(self.tokenizer), **vars(sampling))

    def _keep(self, question: str, answer: str) -> None:
        """Add a turn to what was said."""
        self.turns.append(Turn(question, answer, name_of(self.choice), self.system_for(self.choice)))

    def _asked(self, question: str, choice: Choice, start: int) -> Asked:
        """What a choice of adapters is asked: the question, after what was said from a turn on."""
        said = [message for turn in self.turns[start:] for message in turn.messages()]
        task = task_for(self.model, choice, self.schema)
        question_last: list[Message] = [*said, {"role": "user", "content": question}]
        return as_trained(self.model, choice, question_last, task, self.system, self.handbook)

    def _that_fits(self, question: str, choice: Choice, start: int) -> tuple[int, Asked]:
        """The first turn from which everything fits, with the question and its answer, and what is asked then."""
        for first in range(start, len(self.turns) + 1):
            asked = self._asked(question, choice, first)
            length = len(self.tokenizer.encode_chat(asked.messages, answer_next=True))
            if length + self.sampling.max_new_tokens <= self.limit:
                return first, asked
        raise ValueError(
            f"a question of {length} tokens and an answer of {self.sampling.max_new_tokens} are more than the "
            f"{self.limit} that the model can see: ask in fewer words, or give a smaller --max-new-tokens"
        )

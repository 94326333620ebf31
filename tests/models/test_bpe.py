"""Byte-level BPE in plain Python: the tokens of the library `tokenizers`, and what it cannot read is refused."""

import json
import random
import sys
import unicodedata

import pytest
from tokenizers import Tokenizer as Core

from minilora.files.disk import ModelFileError
from minilora.models import bpe
from minilora.models.hub import TINY
from minilora.models.load import load_tokenizer
from minilora.models.tokenizer import from_folder

FILE = TINY / "tokenizer.json"
PARTS = [
    *("the", "Hello", " world", "'s", "'S", "’s", "'ll", "'", "it's", "don't", "naïve", "Straße", "Ünï"),
    *("😀", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "東京", "你好,世界", "한국어", "العربية", "हिन्दी", "e\u0301", "\u0301", "a\u20dd"),
    *("0", "42", "3.14", "1e-5", "½", "²", "Ⅳ", "٣", "一", "〇", "⑦", "𝟘", "௧", "0x1F", "১২"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u2003", "\u2028"),
    *("\u200b", "\u180e", "\ufeff", "\x00", "\x7f", "\x9f", "\u00ad", "\ufffd", "\ue000", "\U0010ffff", "_"),
    *("def f(x):\n    return x*2", "{'a': [1, 2]}", "<br/>", "...", "?!", "$9.99", "a_b1", "%d%%", "//", "#", "~"),
    *("<|im_end|>", "<|im_start|>user", "<|endoftext|>", "<|im_", "end|>", "<|IM_END|>", "|>"),
    *("ªº", "\u3000", "__init__", "ǅ", "ʰ", "אב", "𐍈"),
]


@pytest.fixture(scope="module")
def both():
    return bpe.BytePairs.from_file(FILE), Core.from_file(str(FILE))


@pytest.fixture(scope="module")
def texts():
    """Texts of known difficulties, and of random characters that both Python's Unicode and the library's know."""
    draw = random.Random(0)
    known = [c for c in map(chr, range(0x30000)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs")]
    awkward = ["".join(draw.choices(PARTS, k=draw.randint(0, 9))) for _ in range(1600)]
    return awkward + ["".join(draw.choice(draw.choice((known, " ' s1\n"))) for _ in range(12)) for _ in range(400)]


def test_tokens_are_those_of_the_library_on_2000_awkward_texts(both, texts):
    ours, theirs = ([each.ids for each in core.encode_batch_fast(texts, add_special_tokens=False)] for core in both)
    assert [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b] == []


def test_words_end_where_those_of_the_library_end(both, texts):
    def theirs(text):
        return [text[slice(*span)] for _, span in both[1].pre_tokenizer.pre_tokenize_str(text)]

    assert [text for text in texts if bpe.words(text) != theirs(text)] == []


def test_texts_of_tokens_are_those_of_the_library(both, texts):
    draw = random.Random(1)
    runs = [draw.choices(range(len(both[0].ids) + 2), k=draw.randint(0, 6)) for _ in range(1000)]  # often no UTF-8
    runs += [encoded.ids for encoded in both[0].encode_batch_fast(texts)]
    for skip in (True, False):
        ours, theirs = ([core.decode(ids, skip_special_tokens=skip) for ids in runs] for core in both)
        assert ours == theirs


def test_tokens_that_were_added_later_are_those_of_the_library():
    record = json.loads(FILE.read_text("utf-8"))
    for i, (content, special) in enumerate([("<|im_end|>!", True), ("hello", False), ("ä b", False)], 2048):
        record["added_tokens"].append(record["added_tokens"][0] | {"id": i, "content": content, "special": special})
    ours, theirs = bpe.BytePairs(record), Core.from_str(json.dumps(record))
    texts = ["<|im_end|>!<|im_end|>", "Othello says hello.", "ä bä  b", "hell o"]
    found = [[each.ids for each in core.encode_batch_fast(texts, add_special_tokens=False)] for core in (ours, theirs)]
    assert found[0] == found[1] and found[0][0] == [2048, 2]
    for ids in found[0]:
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for inside in (True, False):
        assert ours.get_vocab(inside) == theirs.get_vocab(inside)
    assert ours.get_vocab_size() == theirs.get_vocab_size() == 2051
    assert all(f(2049) == "hello" and f(2051) is None for f in (ours.id_to_token, theirs.id_to_token))


def test_the_lowest_rank_is_merged_first_and_everywhere():
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2}
    assert bpe.merged("abcabab", ranks) == ["abc", "ab", "ab"]
    assert bpe.merged("aaaaa", {("a", "a"): 0, ("aa", "aa"): 1}) == ["aaaa", "a"]
    assert bpe.merged("", ranks) == [] and bpe.merged("x", ranks) == ["x"]


def test_without_the_library_tiny_has_the_same_tokenizer(monkeypatch):
    library = load_tokenizer("tiny")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    ours = load_tokenizer("tiny")
    assert isinstance(ours.core, bpe.BytePairs) and not isinstance(library.core, bpe.BytePairs)
    for name in ("eos_id", "pad_id", "end_ids", "control_ids", "ends", "unknown_bytes"):
        assert getattr(ours, name) == getattr(library, name), name
    assert len(ours) == len(library) and ours.token_bytes() == library.token_bytes()
    asked = [{"role": "user", "content": "Is <|im_end|> a word? <|im_start|>"}]  # a message makes no control tokens
    assert ours.encode_chat(asked, answer_next=True) == library.encode_chat(asked, answer_next=True)
    assert ours.encode_chat(asked).count(ours.eos_id) == 1


CHANGES = {
    "another kind of model": lambda r: r["model"].update(type="Unigram"),
    "whole words first": lambda r: r["model"].update(ignore_merges=True),
    "another splitting": lambda r: r["pre_tokenizer"]["pretokenizers"].pop(0),
    "a space before the text": lambda r: r["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "a normalizer": lambda r: r.update(normalizer={"type": "NFC"}),
    "another decoder": lambda r: r.update(decoder={"type": "Fuse"}),
    "tokens added around": lambda r: r.update(post_processor={"type": "TemplateProcessing"}),
    "a token that takes the spaces before it": lambda r: r["added_tokens"][0].update(lstrip=True),
    "a token that takes the spaces after it": lambda r: r["added_tokens"][1].update(rstrip=True),
    "a token that is a whole word": lambda r: r["added_tokens"][2].update(single_word=True),
    "a token of normalized text": lambda r: r["added_tokens"][2].update(normalized=True),
    "no merges": lambda r: r["model"].pop("merges"),
    "no model": lambda r: r.pop("model"),
    "a list": lambda r: r.update(model=[]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_without_the_library_other_tokenizers_are_refused_in_one_line(change, tmp_path, monkeypatch):
    record = json.loads(FILE.read_text("utf-8"))
    change(record)
    (tmp_path / "tokenizer.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModelFileError, match="unusable tokenizer") as caught:
        from_folder(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)

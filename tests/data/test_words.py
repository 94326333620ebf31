"""Words in any script: as in `\\w` where texts are ASCII, and whole where they are not."""

import re
from itertools import pairwise
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.fields import FieldTask, borders, is_copy
from minilora.data.leaks import leaks
from minilora.data.passages import Handbook, Passage, terms
from minilora.data.records import Record, read_records
from minilora.data.rows import DataError
from minilora.data.words import folded, length, words
from minilora.measure.recall import contains

BOOKS = [  # two passages each, and a question for the first
    ("返送料はお客様の負担です。", "配送料は五百円です。", "返送料は誰が払いますか？"),
    ("傘の貸し出しは無料です。", "箱は有料です。", "傘はありますか"),
    ("ｷﾞﾌﾄ包装は３００円です。", "のしは無料です。", "ギフト包装"),
    ("운임은 고객이 냅니다. 반품비도 같습니다.", "포인트는 쌓입니다.", "반품비는 얼마인가요"),
    ("ค่าจัดส่งห้าสิบบาท", "คืนสินค้าได้", "การจัดส่งใช้เวลากี่วัน"),
    ("वापसी तीस दिनों में होती है।", "दान और दिन की सूची।", "वापसी कैसे?"),
    ("الإِرْجَاعُ خلال شهر.", "التوصيل مجاني.", "كيف الإرجاع؟"),
    ("הַחְזָרָה בחנות", "משלוח חינם", "החזרה"),
    ("A devolução é grátis.", "A entrega custa.", normalize("NFD", "Devolução?")),
    ("İade ücretsizdir.", "Kargo ücretlidir.", "iade"),
    ("می\u200cخواهم کتاب", "سلام دوست", "میخواهم"),
]
KEYWORDS = [  # text, word, is it there
    ("返品は三十日以内です", "返品", True), ("FW12を返品", "FW12", True), ("FW123を返品", "FW12", False),
    ("返品", "返送", False), ("１４日以内", "14日", True), ("배송비는 무료", "배송비", True), ("ก็ดี", "ก", False),
    ("दिनों में", "दिन", False), ("तीस दिन में", "दिन", True), ("مجاني.", "مجاني", True), ("مجانية", "مجاني", False),
    ("STRASSE", "Straße", True), ("İADE", "iade", True), ("ISPARTA", "ısparta", True),
    ("कि", "क", False), ("cafe\u0301", "cafe", False), (normalize("NFD", "café"), "CAFÉ", True), ("aกิa", "a", True),
    ("می\u200cخواهم", "خواهم", False), ("_返品_", "返品", True), ("กิ", "กิ", True),
]  # fmt: skip


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127), min_size=1, max_size=2))
def test_in_ascii_words_are_those_of_w(text, word):
    assert words(text) == re.findall(r"\w+", text.lower())
    assert length(text) == len(text.split()) and folded(text) == " ".join(text.lower().split())
    keyword, plain = (" ".join(each.split()) for each in (word, text))  # white space does not count
    whole = re.search(rf"(?<!\w){re.escape(keyword)}(?!\w)", plain, re.IGNORECASE) is not None
    assert contains(text, word) is whole
    inside = [a.isalnum() and b.isalnum() for a, b in pairwise(text)]
    assert borders(text) == [True, *(not each for each in inside), True][: len(text) + 1]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_no_form_of_a_text_is_another_text(text):
    for form in ("NFC", "NFD", "NFKC"):
        assert folded(normalize(form, text)) == folded(text) and words(normalize(form, text)) == words(text)
    assert folded("™") == "tm"
    assert folded("\u03aa\u0301") == folded("\u0390")  # a fold may come before and after another


@pytest.mark.parametrize(("first", "second", "question"), BOOKS)
def test_a_passage_is_found_in_any_script(first, second, question):
    for texts in ([second, first], [first, second]):
        book = Handbook([Passage(str(i), text) for i, text in enumerate(texts)], "x")
        assert book.has_words_of([{"content": question}]) and book.ranked(question)[0].text == first


def test_no_mark_ends_a_word_and_none_is_a_word():
    assert words("กิน") == ["กิ", "ิน"] and words("の a 茶") == ["の", "a", "茶"]
    assert terms("हिन्दी में") == ["हिन्द", "में"] and words("कि") != words("की") and words("e\u0301x") == ["éx"]
    assert not borders("हिन्दी")[1:-1].count(True) and borders("กิน") == [True, False, True, True]


@pytest.mark.parametrize(("text", "word", "there"), KEYWORDS)
def test_a_keyword_is_found_where_words_have_no_spaces_and_not_inside_of_others(text, word, there):
    assert contains(text, word) is there


def test_a_value_is_copied_from_a_text_without_spaces():
    assert (
        is_copy("田中", "お名前は田中です")
        and is_copy("FW12", "番号はFW12です")
        and not is_copy("FW1", "番号はFW12です")
    )
    assert is_copy("ﾃﾝﾄ", "ｶﾗｰﾃﾝﾄ") and is_copy("👩\u200d💻", "a👩\u200d💻")
    assert (
        not is_copy("👩", "👩\u200d💻")
        and not is_copy("💻", "👩\u200d💻")
        and not is_copy("दिन", "दिनों")
        and not is_copy("กน", "กินกัน")
    )


def test_a_long_answer_without_spaces_is_a_leak_alone_and_a_short_one_is_none():
    for answer, count in (("商品は三十日以内に返品できます。", 1), ("お問い合わせ", 0), ("the same four words", 0)):
        pairs = [({"role": "user", "content": f"{q}?"}, {"role": "assistant", "content": answer}) for q in "ab"]
        train, test = ([Record(f"{i}", pair)] for i, pair in enumerate(pairs))
        assert len(leaks({"train": train, "validation": [], "test": test})) == count
    train, test = ([Record("x", text=normalize(form, "São Paulo"))] for form in ("NFC", "NFD"))
    assert len(leaks({"train": train, "validation": [], "test": test})) == 1


def test_an_error_spells_what_looks_like_something_else(tmp_path):
    other, own = (normalize(form, "ação") for form in ("NFD", "NFC"))
    task = FieldTask.of({"properties": {"a": {"enum": [other]}}})
    with pytest.raises(ValueError, match=r'a is "ação", the schema has one of "ac\\u0327a\\u0303o"'):
        task.answer({"a": own})
    (tmp_path / "a.csv").write_text(f"{own},answer\nx,y\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"field question=ac\\u0327a\\u0303o: no such column; there are ação"):
        read_records(tmp_path / "a.csv", field={"question": other})

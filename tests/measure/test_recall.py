"""Keyword recall: what is asked, and which words of the answer count."""

import numpy as np
import pytest
from hearing import counts_of
from jobs import asked

from minilora.data.records import Record
from minilora.generate.answers import generate
from minilora.measure.recall import answer_all, contains, keyword_recall, recalls

WORDS = [  # text, word, is it there
    ("An enforceable promise.", "promise", True),
    ("PROMISE", "promise", True),
    ("a promise", "Promise", True),
    ("promised", "promise", False),
    ("compromise", "promise", False),
    ("promise_keeper", "promise", False),
    ("(promise)", "promise", True),
    ("good-faith", "faith", True),
    ("in good faith", "good faith", True),
    ("a.c", "a.c", True),
    ("abc", "a.c", False),
    ("", "promise", False),
    ("ready, willing\nand able", " willing  and ", True),  # a model may break its lines anywhere
    ("caf\u00e9s, a caf\u00e9", "cafe\u0301", True),
    ("caf\u00e9s", "cafe\u0301", False),
    ("要约是希望与他人订立合同的意思表示。", "合同", True),  # scripts without spaces between words
    ("この契約はAIが書いた", "契約", True),
    ("この契約はAIが書いた", "AI", True),
    ("この契約はAIが書いた", "A", False),
    ("ข้อเสนอคือการแสดงเจตนา", "การแสดง", True),
    ("계약은 약속이다", "약속", True),  # Korean writes its particles onto the word
]


@pytest.mark.parametrize(("text", "word", "there"), WORDS)
def test_a_keyword_counts_as_a_whole_word_in_any_case(text, word, there):
    assert contains(text, word) is there


def test_keyword_recall_is_the_mean_share_over_records_that_have_keywords_and_of_none_an_error():
    records = [Record("a", keywords=("one", "two")), Record("b"), Record("c", keywords=("three", "four", "five"))]
    answers = ["One, and ones.", "two", "three four five"]
    assert recalls(answers, records) == pytest.approx([1 / 2, np.nan, 1], nan_ok=True)
    assert keyword_recall(answers, records) == pytest.approx((1 / 2 + 1) / 2)
    with pytest.raises(ValueError, match="no record has keywords"):
        keyword_recall(["x"], [Record("a")])


QUESTIONS = ["hello", "What is a lien?", "x"]


def test_what_is_no_record_and_another_number_of_answers_are_refused(talker, tokenizer):
    for call in (lambda: answer_all(talker, tokenizer, ["a"]), lambda: keyword_recall(["a"], ["b"])):
        with pytest.raises(TypeError, match="expected records, got a str"):
            call()
    with pytest.raises(ValueError, match="got 2 for 1"):
        keyword_recall(["a", "b"], [Record("x", keywords=("a",))])


def test_answer_all_asks_the_records_questions_and_tells_progress(talker, tokenizer):
    records = [Record(q, (*asked(q), {"role": "assistant", "content": "-"})) for q in QUESTIONS]
    with counts_of("answer") as heard:
        answers = answer_all(talker, tokenizer, records, 6)
    assert answers == [generate(talker, tokenizer, q, 6) for q in QUESTIONS] and sum(heard) == len(QUESTIONS)


def test_a_measured_answer_has_at_most_64_tokens(talker, tokenizer):
    question = next(q for q in QUESTIONS if len(tokenizer.encode(generate(talker, tokenizer, q, 80))) > 64)
    record = Record("x", (*asked(question), {"role": "assistant", "content": "-"}))
    assert answer_all(talker, tokenizer, [record]) == [generate(talker, tokenizer, question, 64)]

"""The words of the course: every term of the glossary is in its lesson, and no lesson uses a private word for it."""

import re

from lessonfiles import GLOSSARY, LESSONS

SOURCES = {path.stem: path for path in sorted((LESSONS / "src").glob("[0-9]*.py"))}
PRIVATE = {  # a word of our own: what the field says
    r"numbers? that learn\w*": "trainable parameters",
    r"(?:the )?way (?:there|back)": "forward pass, backward pass",
    r"multiply-adds": "FLOPs, MACs",
    r"passes over (?:all |the )*(?:data|records)": "epochs",
    r"(?:by|from) heart": "memorised",
    r"held[- ]out": "validation set, test set",
    r"half dead": "A gets no gradient",
    r"\bdear\b": "expensive",
    r"energy": "squared Frobenius norm",
    r"\bspread\b": "standard deviation",
    r"in place of": "instead of",
    r"\bbeside\b": "next to, compared with",
    r"\b(?:hence|thus|thereby|whereof)\b": "so",
    r"\bas it is,|none but|is to be\b": "a plain verb",
    r"\bwho (?:counts|says|fine-tunes|measures|reads|tries|named|writes)\b": "if you",
    r"\bpacked\b": "quantised",
    r"asked in other words": "paraphrased",
}


def words(path):
    """The source as one line of text, without the marks of comments and quotations."""
    return " ".join(re.sub(r"(?m)^# ?(?:> )?", "", path.read_text("utf-8")).split())


def private_words(text):
    return sorted({match[0] for word in PRIVATE for match in re.finditer(word, text, re.IGNORECASE)})


def test_the_glossary_has_about_sixty_terms_in_the_order_of_lessons():
    terms, lessons = [row[0] for row in GLOSSARY], [int(row[2]) for row in GLOSSARY]
    assert 55 <= len(terms) == len(set(terms)) and lessons == sorted(lessons)


def test_a_term_of_the_glossary_occurs_in_the_lesson_that_it_names():
    texts = {int(name[:2]): words(path) for name, path in SOURCES.items()}
    for term, meaning, lesson, *_ in GLOSSARY:
        assert meaning and re.search(rf"(?<!\w){re.escape(term)}", texts[int(lesson)], re.IGNORECASE), term
        bold = [n for n, text in texts.items() if re.search(rf"\*\*{re.escape(term)}s?\*\*", text, re.IGNORECASE)]
        assert min(bold, default=int(lesson)) >= int(lesson) or term == "merge", (term, bold)  # 6: tokens are merged


def test_a_lesson_uses_the_words_of_the_field():
    found = {name: private_words(words(path)) for name, path in SOURCES.items()}
    assert {name: private for name, private in found.items() if private} == {}


def test_a_private_word_is_found():
    assert private_words("Adam keeps four arrays for each number that learns, in place of two.") == [
        "in place of",
        "number that learns",
    ]
    assert private_words("quantised") == []

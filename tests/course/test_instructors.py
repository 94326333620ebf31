"""The pages for instructors: two questions for each lesson, rubrics that add up, a page of ten minutes."""

import re

import pytest
from lessonfiles import LESSONS
from times import WORDS_PER_MINUTE, words_of_prose

from minilora.course.plan import LESSONS as PLAN

QUESTIONS = (LESSONS / "QUESTIONS.md").read_text("utf-8")
CAPSTONE = (LESSONS / "CAPSTONE.md").read_text("utf-8")
INSTRUCTORS = (LESSONS / "INSTRUCTORS.md").read_text("utf-8")


def section(number):
    found = re.search(rf"^## {number}\. (.*?)$(.*?)(?=^## |\Z)", QUESTIONS, re.MULTILINE | re.DOTALL)
    assert found, f"QUESTIONS.md has no section for lesson {number}"
    return found[1], found[2]


def test_a_lesson_has_two_written_questions_with_an_answer_and_a_rubric_of_four_points():
    for lesson in (row for row in PLAN.values() if row.number):
        title, text = section(lesson.number)
        assert title == lesson.question
        parts = re.split(r"^\*\*(\d+[a-z])\.\*\* ", text, flags=re.MULTILINE)
        assert parts[1::2] == [f"{lesson.number}a", f"{lesson.number}b"]
        for part in parts[2::2]:
            question, answer, rubric = re.split(r"\n\n\*(?:Answer|Rubric)\.\* ", part.strip())
            assert "?" in question or re.search(r"\b(?:Describe|Derive|Name|Explain|Compare|Argue|Write)\b", question)
            assert 40 <= len(answer.split()) <= 130 and len(question.split()) <= 80, question
            points = re.findall(r"(?:^|[.:] )(\d)(?: points?)?(?::| (for each|each)\b([^.]*))", rubric)
            assert total(points) == 4, f"{rubric!r} gives {total(points)} points"


def total(points):
    """The points of a rubric: "1 for each of the three" counts three times."""
    return sum(int(n) * (times(what) if each else 1) for n, each, what in points)


def times(what):
    words = {"three": 3, "two": 2}
    return next((count for word, count in words.items() if word in what), 3 if "at most 3" in what else 2)


def test_the_rubric_of_the_capstone_has_a_hundred_points_and_three_milestones_or_more():
    assert sum(int(n) for n in re.findall(r"^\| [a-z, ]+ \| (\d+) \|", CAPSTONE, re.MULTILINE)) == 100
    days = [int(n) for n in re.findall(r"^\| (\d+) \| ", CAPSTONE, re.MULTILINE)]
    assert days == sorted(days) and len(days) >= 3 and days[-1] == 14


def test_the_page_for_instructors_is_read_in_ten_minutes_and_names_every_page():
    assert words_of_prose(INSTRUCTORS) <= 10 * WORDS_PER_MINUTE
    pages = {path.name for path in LESSONS.glob("*.md")} - {"INSTRUCTORS.md"}
    assert [page for page in sorted(pages) if f"]({page})" not in INSTRUCTORS] == []


@pytest.mark.long
def test_the_code_of_the_capstone_runs():
    [code] = re.findall(r"```python\n(.*?)```", CAPSTONE, re.DOTALL)
    scope = {}
    code = code.replace("range(5)", "range(1)").replace('"lr": 0.01', '"lr": 0.01, "steps": 1, "held_out": 2')
    exec(code, scope)
    assert [sorted({"validation", "test", "general"} - set(result)) for result in scope["results"]] == [[], []]

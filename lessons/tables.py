"""The tables of the course's pages: the plans, the outcomes, the variants and the mistakes."""

from __future__ import annotations

import re
from pathlib import Path

from minilora.course.exercises import EXERCISES, Exercise
from minilora.course.pages import escaped
from minilora.course.plan import AFTERNOON, LESSONS, SESSION, TERM
from minilora.pages.text import listed

MIDDLE = 9  # of two afternoons, the second begins with this lesson
WITH_EXERCISES = (1, 9)  # the lessons whose exercises are done in class, on the first and on the second afternoon
POINTS = re.compile(r"^# %% points=(\d+)\n+def (\w+)", re.MULTILINE)  # in the sources of exercises


def plans() -> str:
    """One afternoon, two, and one term, with their minutes."""
    essential = [lesson for lesson in LESSONS.values() if lesson.essential]
    hours = [sum(sum(lesson.minutes) for lesson in lessons) / 60 for lessons in (essential, LESSONS.values())]
    twice = listed([str(lesson.number) for lesson in LESSONS.values() if len(lesson.parts) > 1])
    halves = [[number for number in AFTERNOON if (number < MIDDLE) == first] for first in (True, False)]
    read = [sum(LESSONS[number].minutes[0] for number in half) for half in halves]
    solved = [minutes + sum(LESSONS[n].minutes[1:]) for minutes, n in zip(read, WITH_EXERCISES, strict=True)]
    lines = [
        f"**One afternoon**: lessons {listed([*map(str, AFTERNOON)])} without their exercises, {sum(read)} minutes "
        "plus breaks.",
        "",
        f"**Two afternoons**: lessons {listed([*map(str, halves[0])])} with the exercises of lesson "
        f"{WITH_EXERCISES[0]}, {solved[0]} minutes; then lessons {listed([*map(str, halves[1])])} with the exercises "
        f"of lesson {WITH_EXERCISES[1]}, {solved[1]} minutes. The other exercises are homework. In both plans, tell "
        "the class the result of lesson 12 before lesson 18: all linear layers, r = 8, α = 2r.",
        "",
        f"**One lesson a session**: with its exercises, a lesson fits into {SESSION} minutes, except lessons {twice}, "
        f"which take two. The essential path takes {hours[0]:.0f} hours, the whole course {hours[1]:.0f}.",
        "",
        "**One term**: a week is one session in class for reading and running the lessons, and exercises at "
        "home. Lesson 0 is read before the first one.",
        "",
        "| week | lessons | minutes in class | at home |",
        "|---|---|---|---|",
    ]
    for week, numbers in enumerate(TERM, 1):
        lessons = [LESSONS[number] for number in numbers if number in LESSONS]
        names = "; ".join(f"{lesson.number}. {lesson.question}" for lesson in lessons)
        home = sum(sum(lesson.minutes[1:]) for lesson in lessons)
        lines.append(f"| {week} | {names} | {sum(lesson.minutes[0] for lesson in lessons)} | {home} |")
    return "\n".join(lines)


def outcomes() -> str:
    """What students can do after each lesson."""
    rows = ["| lesson | students can |", "|---|---|"]
    for lesson in LESSONS.values():
        rows.append(f"| {lesson.number}. {lesson.question} | {'; '.join(lesson.outcomes)} |")
    return "\n".join(rows)


def variants() -> str:
    """The exercises that have several forms, and what differs."""
    rows = ["| exercise | forms | what changes |", "|---|---|---|"]
    for exercise in in_order():
        if len(exercise.forms) > 1:
            changes = "; ".join(form.changes for form in exercise.forms[1:])
            rows.append(f"| {exercise.number} `{exercise.name}` | {len(exercise.forms)} | {changes} |")
    return "\n".join(rows)


def mistakes() -> str:
    """For each exercise its points, and the lines that the checker prints for known mistakes."""
    sources = (Path(__file__).parent / "src" / "exercises").glob("[0-9]*.py")
    points = {name: count for source in sources for count, name in POINTS.findall(source.read_text("utf-8"))}
    blocks = []
    for exercise in in_order():
        lines = dict.fromkeys(mistake.line for mistake in exercise.forms[0].mistakes)
        head = f"### {exercise.number} `{exercise.name}`, {points[exercise.name]} of 8 points"
        blocks.append("\n".join([head, "", *(f"- {escaped(x)}" for x in lines)]))
    return "\n\n".join(blocks)


def in_order() -> list[Exercise]:
    """All exercises, from 1.1 on."""
    return sorted(EXERCISES.values(), key=lambda e: [int(number) for number in e.number.split(".")])


def filled(page: str, **tables: str) -> str:
    """A page with each table between `<!-- name -->` and `<!-- end of name -->`; ValueError if these are missing."""
    for name, text in tables.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if not all(mark in page for mark in marks):
            raise ValueError(f"the page has no place for the table: it needs {' and '.join(marks)}")
        before, _, rest = page.partition(marks[0])
        page = f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{rest.partition(marks[1])[2]}"
    return page

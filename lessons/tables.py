"""The tables of the course's pages: the plans, the outcomes, the variants and the mistakes."""

from __future__ import annotations

from minilora.course.exercises import EXERCISES, Exercise
from minilora.course.pages import escaped
from minilora.course.plan import AFTERNOON, LESSONS, SESSION, TERM
from minilora.pages.text import listed


def plans() -> str:
    """One afternoon and one term, with their minutes."""
    essential = [lesson for lesson in LESSONS.values() if lesson.essential]
    hours = [sum(sum(lesson.minutes) for lesson in lessons) / 60 for lessons in (essential, LESSONS.values())]
    twice = listed([str(lesson.number) for lesson in LESSONS.values() if len(lesson.parts) > 1])
    afternoon = [number for number in AFTERNOON if number in LESSONS]
    lines = [
        f"**One afternoon**: lessons {listed([*map(str, afternoon)])} without their exercises, "
        f"{sum(LESSONS[number].minutes[0] for number in afternoon)} minutes.",
        "",
        f"**One lesson a session**: with its exercises, each lesson fits {SESSION} minutes; lessons {twice} take two "
        f"such sessions. The essential path takes {hours[0]:.0f} hours, the whole course {hours[1]:.0f}.",
        "",
        "**One term**: a week is one session in class for reading and running the lessons, and exercises at home.",
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
    """For each exercise the lines that the checker prints for known mistakes."""
    blocks = []
    for exercise in in_order():
        lines = dict.fromkeys(mistake.line for mistake in exercise.forms[0].mistakes)
        blocks.append("\n".join([f"### {exercise.number} `{exercise.name}`", "", *(f"- {escaped(x)}" for x in lines)]))
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

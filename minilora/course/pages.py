"""The tables of the course's pages: the map, the plans, the variants and the mistakes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .exercises import EXERCISES, Exercise
from .plan import AFTERNOON, LESSONS, SESSION, TERM, Lesson


def exercises_of(lesson: Lesson) -> list[Exercise]:
    """A lesson's exercises in their order."""
    return sorted((e for e in EXERCISES.values() if e.lesson == lesson.number), key=lambda e: e.number)


def course_map(folder: Path) -> str:
    """The lessons of a folder as a Markdown table: question, minutes, prerequisites, what is built, exercises."""
    rows = ["| | question | minutes | before it | you build | exercises |", "|---|---|---|---|---|---|"]
    for lesson in LESSONS.values():
        if not (folder / f"{lesson.name}.ipynb").exists():
            continue
        numbers = [exercise.number for exercise in exercises_of(lesson)]
        exercises = f"[{numbers[0]} to {numbers[-1]}](exercises/{lesson.name}.ipynb)" if numbers else ""
        cells = [
            f"**{lesson.number}**" if lesson.essential else f"{lesson.number}",
            f"[{lesson.question}]({lesson.name}.ipynb)",
            " + ".join(str(part) for part in (lesson.minutes[0], sum(lesson.minutes[1:])) if part),
            ", ".join(map(str, lesson.needs)),
            lesson.builds,
            exercises,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plans() -> str:
    """One afternoon and one term, with their minutes."""
    hours = [sum(sum(lesson.minutes) for lesson in lessons) / 60 for lessons in (essential(), LESSONS.values())]
    twice = listed(lesson.number for lesson in LESSONS.values() if len(lesson.parts) > 1)
    afternoon = [number for number in AFTERNOON if number in LESSONS]
    lines = [
        f"**One afternoon**: lessons {listed(afternoon)} without their exercises, "
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


def essential() -> list[Lesson]:
    """The lessons of the essential path."""
    return [lesson for lesson in LESSONS.values() if lesson.essential]


def listed(numbers: Iterable[int]) -> str:
    """ "1, 2 and 3"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


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


def escaped(text: str) -> str:
    """A line as plain text in Markdown; what is between backticks stays."""
    return re.sub(r"`[^`]*`|([*_<])", lambda found: f"\\{found[1]}" if found[1] else found[0], text)


def filled(page: str, **tables: str) -> str:
    """A page with each table between `<!-- name -->` and `<!-- end of name -->`; ValueError if these are missing."""
    for name, text in tables.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if not all(mark in page for mark in marks):
            raise ValueError(f"the page has no place for the table: it needs {' and '.join(marks)}")
        before, _, rest = page.partition(marks[0])
        page = f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{rest.partition(marks[1])[2]}"
    return page

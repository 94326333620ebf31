"""The tables of the course's pages: the map, the plans, the variants and the mistakes."""

from __future__ import annotations

import re
from pathlib import Path

from .exercises import EXERCISES, Exercise
from .plan import AFTERNOON, LESSONS, TERM, Lesson


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
            str(lesson.minutes),
            ", ".join(map(str, lesson.needs)),
            lesson.builds,
            exercises,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plans() -> str:
    """One afternoon and one term, with their minutes."""
    minutes = sum(LESSONS[number].minutes for number in AFTERNOON)
    lines = [
        "**One afternoon**: lessons " + ", ".join(map(str, AFTERNOON)) + f", {minutes} minutes with their exercises.",
        "",
        "**One term**, a session a week:",
        "",
        "| week | lessons | minutes |",
        "|---|---|---|",
    ]
    for week, numbers in enumerate(TERM, 1):
        names = "; ".join(f"{number}. {LESSONS[number].question}" for number in numbers)
        lines.append(f"| {week} | {names} | {sum(LESSONS[number].minutes for number in numbers)} |")
    return "\n".join(lines)


def variants() -> str:
    """The exercises that have several forms, and what differs."""
    rows = ["| exercise | forms | what changes |", "|---|---|---|"]
    for exercise in in_order():
        if len(exercise.forms) > 1:
            changes = "; ".join(
                f"`{old}` becomes `{new}`" for form in exercise.forms[1:] for old, new in form.replaces.items()
            )
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

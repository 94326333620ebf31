"""What pages of the course share: a lesson's exercises, the table of all lessons, and text as Markdown."""

import re
from pathlib import Path

from .exercises import EXERCISES, Exercise
from .plan import LESSONS, Lesson


def exercises_of(lesson: Lesson) -> list[Exercise]:
    """A lesson's exercises in their order."""
    return sorted((e for e in EXERCISES.values() if e.lesson == lesson.number), key=lambda e: e.number)


def course_map(folder: Path) -> str:
    """The lessons of a folder as a Markdown table: question, minutes, prerequisites, what is built, exercises."""
    rows = ["| | question | minutes | needs | you build | exercises |", "|---|---|---|---|---|---|"]
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


def escaped(text: str) -> str:
    """A line as plain text in Markdown; what is between backticks stays."""
    return re.sub(r"`[^`]*`|([*_<])", lambda found: f"\\{found[1]}" if found[1] else found[0], text)

"""How long a lesson and its exercises take, by counting: the minutes in the plan are these, rounded.

The rates are assumptions for a reader who is new to the subject. No reader was timed.
"""

from __future__ import annotations

import re
from typing import Any

from minilora.course.edits import source_of
from minilora.course.exercises import Exercise

WORDS_PER_MINUTE = 150  # of technical prose
CODE_LINES_PER_MINUTE = 8  # read, run, and compared with the output
PER_PICTURE = 2.0  # minutes
PER_CLAIM = 0.5
PER_EXERCISE = 5.0  # to understand the question and the checker's line
PER_SOLUTION_LINE = 2.5  # of the shortest solution that we know
STEP = 5  # minutes in the plan are multiples of this

NO_PROSE = r"<details>.*?</details>|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)|[|#*>-]"
HEAD = re.compile(r"^\*\d+ minutes\b.*$", re.MULTILINE)  # what the plan puts below a title


def words_of_prose(text: str) -> int:
    """The words of Markdown, without formulas, code, folded parts, addresses, marks, and a lesson's head."""
    return len(re.sub(NO_PROSE, " ", HEAD.sub("", text), flags=re.DOTALL).split())


def reading_minutes(lesson: dict[str, Any]) -> float:
    """To read and run a lesson: its words, lines of code, pictures and claims. `lesson`: its notebook, as JSON."""
    words = lines = pictures = claims = 0
    for cell in lesson["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += words_of_prose(source)
        elif "setup" not in cell["metadata"].get("tags", []):
            lines += sum(bool(line.strip()) for line in source.splitlines())
            pictures += sum("image/png" in output.get("data", {}) for output in cell["outputs"])
            claims += sum("".join(output.get("text", "")).count(" (claimed: ") for output in cell["outputs"])
    prose, code = words / WORDS_PER_MINUTE, lines / CODE_LINES_PER_MINUTE
    return prose + code + PER_PICTURE * pictures + PER_CLAIM * claims


def exercise_minutes(page: dict[str, Any], exercise: Exercise) -> float:
    """To solve one exercise: its words, and its solution line by line. `page`: the exercises' notebook, as JSON."""
    text = "\n".join("".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == "markdown")
    section = re.search(rf"^## {re.escape(exercise.number)} .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        raise ValueError(f"the page has no section ## {exercise.number}")
    lines = sum(bool(line.strip()) for line in source_of(exercise.forms[0].reference)[1].splitlines())
    return PER_EXERCISE + words_of_prose(section[0]) / WORDS_PER_MINUTE + PER_SOLUTION_LINE * lines


def rounded(minutes: float) -> int:
    """A multiple of STEP, and not zero."""
    return max(STEP, STEP * round(minutes / STEP))

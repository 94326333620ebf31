"""The plan of the course, plan.toml: the lessons in order, with what each needs, builds and teaches.

The map in lessons/README.md, the tables in INSTRUCTORS.md, the head of each lesson and `minilora progress` are made
from it.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SESSION = 90  # minutes: no part of a lesson takes longer


@dataclass(frozen=True)
class Lesson:
    """One lesson; plan.toml says what each field means.

    A lesson without exercises is only read and run, and expects nothing of its reader.
    """

    number: int
    name: str  # of its notebook and of its exercises' notebook
    question: str
    minutes: tuple[int, ...]
    needs: tuple[int, ...]
    builds: str
    essential: bool
    needs_model: bool = False
    browser_minutes: int = 0
    outcomes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The minutes of a lesson that fits a session; of a longer one in two parts, as equal as exercises allow."""
        if sum(self.minutes) <= SESSION:
            return (self.minutes,)
        halves = [(self.minutes[:i], self.minutes[i:]) for i in range(1, len(self.minutes))]
        return min(halves, key=lambda parts: max(map(sum, parts)))

    @property
    def head(self) -> str:
        """The line below a lesson's title."""
        *others, last = map(str, self.needs or ("",))
        before = f"lessons {', '.join(others)} and {last}" if others else f"lesson {last}" if last else ""
        needs = before or ("Python and NumPy, matrix multiplication, derivatives" if self.minutes[1:] else "nothing")
        model = " It needs the real model: `minilora pull smollm2`, 98 MB." if self.needs_model else ""
        second = f"; a second session begins with exercise {self.number}.{len(self.parts[0])}" if self.parts[1:] else ""
        solved = f" with the exercises, {self.minutes[0]} without{second}" if len(self.minutes) > 1 else ""
        return f"*{sum(self.minutes)} minutes{solved}. Needs: {needs}. You build: {self.builds}.*{model}"


def _lesson(row: dict[str, Any]) -> Lesson:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Lesson(**fields)


_PLAN = tomllib.loads(Path(__file__).with_name("plan.toml").read_text("utf-8"))
LESSONS = {row["number"]: _lesson(row) for row in _PLAN["lesson"]}
AFTERNOON: list[int] = _PLAN["afternoon"]
TERM: list[list[int]] = _PLAN["weeks"]

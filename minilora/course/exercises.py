"""What an exercise is: a solution, draws to try answers on, and the mistakes that have their own message.

A lesson's file (`lesson09.py`) declares its exercises with `@exercise` above the solution:

    @exercise("9.2", draw=draw, returns="dA (r, n), dB (m, r)")
    def lora_gradients(x, W, A, B, g, alpha): ...

The solution is written as a student writes it: lessons/build.py puts its text into the notebook. The student's
function is found by the solution's name. Its known mistakes are in mistakes/lesson09.txt, which `edits.py` reads;
`judge.py` judges answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from .compare import TOLERANCE
from .edits import Mistake, listed, parse, replaced, swapped

EXERCISES: dict[str, Exercise] = {}  # by the name of the function that the student writes
QUESTIONS: dict[str, Exercise] = {}  # of the self-test, which are no exercises of a lesson


class Draw(dict):
    """Arguments by name, in the order of the function. sizes: the sizes of the arrays' axes by name, as {"n": 7}."""

    def __init__(self, sizes: Mapping[str, int] | None = None, **arguments: Any):
        super().__init__(arguments)
        self.sizes = dict(sizes or {})


Drawing = Callable[[np.random.Generator], Draw]


def distinct_sizes(
    names: str | Sequence[str], rng: np.random.Generator, low: int = 9, high: int = 40
) -> dict[str, int]:
    """A size for each name, as {"T": 11, "n": 25}. Any two differ by a fifth, so that none fits another axis."""
    while True:
        sizes = [int(size) for size in rng.integers(low, high, len(names))]
        ordered = sorted(sizes)
        if all(b >= 1.2 * a and b > a for a, b in pairwise(ordered)):
            return dict(zip(names, sizes, strict=True))


def arrays(rng: np.random.Generator, sizes: Mapping[str, int], **axes: str) -> Draw:
    """Standard normal float64 arrays for a draw: `arrays(rng, sizes, x="T n", W="m n")`."""
    shapes = {name: [sizes[axis] for axis in text.split()] for name, text in axes.items()}
    return Draw(sizes, **{name: rng.standard_normal(shape) for name, shape in shapes.items()})


def drawing(names: str, fixed: Mapping[str, int] | None = None, /, **axes: str) -> Drawing:
    """Such arrays, with new sizes for these names in each draw: `drawing("Tn", x="T n")`. fixed: sizes that stay."""
    return lambda rng: arrays(rng, distinct_sizes(names, rng) | dict(fixed or {}), **axes)


def changed(draw: Drawing, change: Callable[[Draw], Mapping[str, Any]]) -> Drawing:
    """The same draw, some of its arguments replaced: `changed(draw, lambda drawn: {"t": drawn["t"] - 1})`."""

    def drawn(rng: np.random.Generator) -> Draw:
        found = draw(rng)
        return Draw(found.sizes, **{**found, **change(found)})

    return drawn


@dataclass(frozen=True)
class Form:
    """One form of an exercise: the form that all readers see, or a variant for one group of a class.

    replaces: what a variant's page says instead of the first form's words. changes: what differs, for the instructor.
    See `exercise` for the rest.
    """

    reference: Callable
    draw: Drawing | Sequence[Drawing]
    mistakes: Sequence[Mistake]
    replaces: Mapping[str, str] = field(default_factory=dict)
    changes: str = ""
    smallest: Drawing | None = None
    judge: Callable[..., None] | None = None
    also: Callable[..., None] | None = None

    def draws(self, count: int) -> list[Drawing]:
        """The draws of one check: `count` of them, each kind at least once, and the smallest case last."""
        kinds = [self.draw] if callable(self.draw) else list(self.draw)
        turns = [kinds[i % len(kinds)] for i in range(max(count, len(kinds)))]
        return turns + ([self.smallest] if self.smallest else [])


@dataclass(frozen=True)
class Exercise:
    """An exercise in all its forms. See `exercise`."""

    number: str
    name: str
    returns: Sequence[tuple[str, str | None]]
    forms: Sequence[Form]
    tolerance: float
    by_hand: bool
    forbids: Mapping[str, str]
    changes: Sequence[str]
    observe: Callable[..., Any] | None
    read: str = ""  # what to read if the answer is wrong

    @property
    def lesson(self) -> int:
        return int(self.number.partition(".")[0])

    def form(self, variant: int | None) -> Form:
        """The form with this number; numbers beyond the last begin again, None is the form that all readers see."""
        return self.forms[(variant or 0) % len(self.forms)]


def exercise(
    number: str,
    *,
    draw: Drawing | Sequence[Drawing],
    returns: str,
    mistakes: str | None = None,
    smallest: Drawing | None = None,
    judge: Callable[..., None] | None = None,
    also: Callable[..., None] | None = None,
    tolerance: float = TOLERANCE,
    by_hand: bool = False,
    forbids: Mapping[str, str] | None = None,
    changes: Sequence[str] = (),
    observe: Callable[..., Any] | None = None,
) -> Callable[[Callable], Callable]:
    """Declare an exercise. The decorated function is the solution, and its name is that of the student's function.

    number: "9.2", the same in page, stub and test.
    draw: rng -> Draw, the arguments of one trial; or several such functions, which take turns. Sizes
        that an answer could take for one another must differ: `distinct_sizes`.
    returns: names and axes of what comes back, as "dA (r, n), dB (m, r)", or a name alone for a number: "the count".
    mistakes: the known ones, at least five (`edits.py`); left out, those of mistakes/lessonNN.txt. An answer that gives
        the result of one gets its line.
    smallest: rng -> Draw, the smallest case that makes sense (r = 0, one token), tried last.
    judge: judge(call, draw, rng), for what cannot be compared with the solution, such as a random initialisation.
        Raises Wrong. `call(**arguments)` calls the student's function. With it, nothing is compared with the solution.
    also: also(call, draw, rng), for what must hold in addition to equal results, for instance on tensors.
    tolerance: relative to the largest number of an array, or to the number.
    by_hand: `.backward()` is refused within the answer.
    forbids: {"m n": "line"}: an answer that is right but computes an array of this shape, or its transpose, gets it.
    changes: names of arguments that the function is meant to change; changing any other is a mistake.
    observe: observe(result, arguments) -> what is compared instead of the result, where an argument is changed.
    """

    def register(solution: Callable) -> Callable:
        name = solution.__name__
        if name in EXERCISES:
            raise ValueError(f"two exercises are called {name}: {EXERCISES[name].number} and {number}")
        known = parse(listed(number, name) if mistakes is None else mistakes, solution)
        form = Form(solution, draw, known, smallest=smallest, judge=judge, also=also)
        EXERCISES[name] = Exercise(
            number, name, parse_returns(returns), [form], tolerance, by_hand, forbids or {}, changes, observe
        )
        return solution

    return register


def variant(
    name: str, replaces: Mapping[str, str], changes: str = "", lines: Mapping[str, str] | None = None, **differs: Any
) -> None:
    """Add another form to an exercise. `--variant 1` of lessons/build.py asks for it.

    name: the exercise's.
    replaces: {words in the exercise's page: words in this form}, in text, stub and solution. The solution then calls
        the solutions that other exercises have in this form.
    changes: what is different, in words and without code of the answer, for the table in INSTRUCTORS.md.
    lines: words to replace in the first form's mistakes alone: in their lines and in their edits.
    differs: draw, smallest, judge or also, where they differ from the first form's.

    The mistakes are those of the first form, made in this form's solution where their edits fit it. One that gives
    the right answer of this form is not a mistake here.
    """
    whole = EXERCISES[name]
    first, number = whole.forms[0], len(whole.forms)
    called = [EXERCISES[word] for word in first.reference.__code__.co_names if word in EXERCISES and word != name]
    solution = replaced(first.reference, replaces, **{e.name: e.form(number).reference for e in called})
    listed_here = swapped("\n".join(text for each in first.mistakes for text in (each.line, *each.steps)), replaces)
    for old, new in (lines or {}).items():
        if old not in listed_here:
            raise ValueError(f"a variant of {name} replaces {old!r}, which no mistake has in its line or in an edit")
        listed_here = listed_here.replace(old, new)
    mistakes = [mistake.within(solution, {**replaces, **(lines or {})}) for mistake in first.mistakes]
    form = replace(first, reference=solution, mistakes=mistakes, replaces=replaces, changes=changes, **differs)
    EXERCISES[name] = replace(whole, forms=[*whole.forms, form])


def parse_returns(text: str) -> list[tuple[str, str | None]]:
    """ "dA (r, n), dB (m, r)" -> [("dA", "r, n"), ("dB", "m, r")]."""
    found = re.findall(r"\s*([^,()]+?)\s*(?:\(([^)]*)\))?\s*(?:,|$)", text)
    return [(name, axes or None) for name, axes in found]

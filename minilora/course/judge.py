"""Check an answer and say in one line what is wrong with it.

The student's function and the solution get the same random arguments. If the results differ, the known mistakes get
these arguments, too: the mistake with the student's result has the line to print.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import os
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import numpy as np

from ..engine.tensor import Tensor
from ..pages.text import listed
from . import mine
from .compare import ALIKE, NONE, Differs, Wrong, as_parts, chance, compare, is_number, named, same
from .exercises import EXERCISES, QUESTIONS, Draw, Exercise, Form
from .watch import plain, readable_output, time_limit, watched, without_the_engine

DRAWS = 3  # random arguments that every answer is tried on
REDRAWS = 8  # at most, where two known mistakes have the same result by chance
SHOWN = 200  # characters: if the arguments of a trial are longer, they are not printed
OK = "ok"
NOT_YET = "not written yet"
SAME = "as in the last check: after a change, run the cell of the function first"
CHECKED: dict[str, tuple[Callable, Any]] = {}  # by name: what was checked last in this session


def check(function: Callable, variant: int | None = None, points: float = 0) -> float | None:
    """Try a function on random inputs and print one line: "ok", "not written yet", or what is wrong with it.

    function: your answer to an exercise. The exercise is found by the function's name. A right answer is stored in
        mine.py in the current folder, from where later exercises take it.
    variant: which form of the exercise; the default is the one that all readers see.
    points: what a bug hunt is worth. Under nbgrader a test that catches some broken versions gets its share of them,
        which is returned, since nbgrader reads a number below a cell as points.

    Returns None otherwise. Under nbgrader, which sets NBGRADER_EXECUTION, or with MINILORA_STRICT=1 in the
    environment, an answer that is not right raises AssertionError with the line instead of printing it.
    """
    line = verdict(function, np.random.default_rng(), variant)
    exercise = known().get(getattr(function, "__name__", ""))
    graded = os.environ.get("NBGRADER_EXECUTION") or os.environ.get("MINILORA_STRICT") == "1"
    if exercise:
        if line not in (OK, NOT_YET) and exercise.read:
            line += f" (to read: {exercise.read})"
        if line == OK and exercise.name in EXERCISES:
            again = lambda kept: judged(exercise, kept, np.random.default_rng(), variant).removeprefix(OK)
            line += mine.keep(function, exercise.number, variant, again)
        elif line != OK and CHECKED.get(exercise.name) == (function, variant) and not graded:
            line += f" ({SAME})"
        CHECKED[exercise.name] = function, variant
        line = f"{exercise.number}  {line}"
    right = exercise and line.startswith(f"{exercise.number}  {OK}")
    part = re.search(r"  ([1-9]\d*) of (\d+) caught", line) if points else None
    if part and os.environ.get("NBGRADER_EXECUTION"):
        print(line)
        return round(points * int(part[1]) / int(part[2]), 2)
    if not right and graded:
        raise AssertionError(line)
    print(line)
    return None


def known() -> dict[str, Exercise]:
    """All that `check` can mark, by name: the exercises, and the questions of the self-test."""
    return EXERCISES | QUESTIONS


def verdict(function: Callable, rng: np.random.Generator, variant: int | None = None) -> str:
    """The line that `check` prints, without the exercise's number."""
    name = getattr(function, "__name__", None)
    if not callable(function) or name not in known():
        if not callable(function) or not name:
            return f"a value of type {type(function).__name__} is not an answer: check the function itself, check(NAME)"
        near = get_close_matches(name, known(), 1)
        meant = f"is {near[0]} meant?" if near else "keep the first line of the stub, def ..."
        return f"{name!r} is not an exercise: {meant}"
    if not isinstance(variant, int | np.integer | None):
        return f"variant must be a whole number such as variant=1, got {variant!r}"
    return judged(known()[name], function, rng, variant)


def judged(exercise: Exercise, function: Callable, rng: np.random.Generator, variant: int | None = None) -> str:
    """The line for a function, whatever its name, as an answer to this exercise."""
    form = exercise.form(variant)
    mine.VARIANT = variant
    try:
        with readable_output(), time_limit():
            line = line_of(function, Trials(exercise, form, rng))
            if line not in (OK, NOT_YET) and variant is not None:
                others = [other for other in exercise.forms if other is not form]
                if any(line_of(function, Trials(exercise, other, rng)) == OK for other in others):
                    return (
                        f"this is the answer to another variant of the exercise: read again what {exercise.number} asks"
                    )
    except Wrong as wrong:  # the time is over
        return str(wrong)
    except RecursionError:
        return "the result contains itself, or lists within lists without end: return plain values"
    return line


def line_of(function: Callable, trials: Trials) -> str:
    """The line for an answer that is tried on these trials."""
    form, answer = trials.form, Answer(trials.exercise, function)
    try:
        for turn in range(len(trials.draws)):
            trial = trials.get(turn, 0)
            if lines := [] if form.judge else _try(answer, trial):
                return _borne_out(answer, trials, turn, lines)
            answer.sizes = trial.drawn.sizes
            for judge in (form.judge, form.also):
                if judge:
                    judge(answer, copy.deepcopy(trial.drawn), trials.rng)
    except NotImplementedError:
        return NOT_YET
    except Wrong as wrong:
        return str(wrong)
    return OK


class Trials:
    """The trials of one check. Each is made once, however many answers are tried on it."""

    def __init__(self, exercise: Exercise, form: Form, rng: np.random.Generator):
        self.exercise = exercise
        self.form = form
        self.rng = rng
        self.draws = form.draws(DRAWS)
        self._made: dict[tuple[int, int], Trial] = {}

    def get(self, turn: int, again: int) -> Trial:
        """The trial of this draw, repeated for the `again`-th time."""
        if (turn, again) not in self._made:
            self._made[turn, again] = Trial(self.exercise, self.form, self.draws[turn](self.rng))
        return self._made[turn, again]


class Trial:
    """Arguments, and what the solution and the known mistakes return for them."""

    def __init__(self, exercise: Exercise, form: Form, drawn: Draw):
        self.exercise = exercise
        self.form = form
        self.drawn = drawn

    @cached_property
    def want(self) -> Outcome:
        """What the solution returns."""
        with quiet():
            want = Outcome(self.exercise, self.form.reference, self.drawn)
        if want.error:
            raise want.error
        return want

    @cached_property
    def mistakes(self) -> list[tuple[Outcome, str]]:
        """What each known mistake returns, with its line."""
        with quiet():
            return [(Outcome(self.exercise, m.function, self.drawn), m.line) for m in self.form.mistakes]


class Outcome:
    """The outcome of one call: the result, the arguments that were changed, and how; or the error."""

    def __init__(self, exercise: Exercise, function: Callable, drawn: Draw, copied: bool = True):
        self.error: Exception | SystemExit | None = None
        self.changed: dict[str, Any] = {}  # arguments by name, as they are afterwards
        before = dict(drawn) if copied else copy.deepcopy(dict(drawn))
        arguments = copy.deepcopy(before) if copied else dict(drawn)
        try:
            result = function(*arguments.values())
        except Wrong:
            raise
        except (Exception, SystemExit) as error:
            if type(error) is NotImplementedError:  # the stub's; input() in a notebook that runs alone raises another
                raise
            self.error = error
            return
        self.result = plain(result)
        for name, old in before.items():
            if comparable(old) and not same(arguments[name], old, tolerance=0):
                self.changed[name] = plain(arguments[name])
        if exercise.observe and not (self.result is None and not exercise.changes):
            with suppress(Exception):  # what has another form than asked for is compared as it is
                self.result = exercise.observe(self.result, arguments)

    def like(self, other: Outcome, tolerance: float) -> bool:
        """Whether two calls had the same result and changed the same arguments."""
        if self.error or other.error:  # many mistakes end in the same error
            return False
        return same((self.changed, self.result), (other.changed, other.result), tolerance)

    def part(self, i: int, count: int) -> Any:
        """The i-th of the values returned, or None if their number is another."""
        if self.error or self.changed:
            return None
        if count == 1:
            return self.result
        return self.result[i] if isinstance(self.result, (list, tuple)) and len(self.result) == count else None


def _borne_out(answer: Answer, trials: Trials, turn: int, lines: list[str]) -> str:
    """The line, of those found in this turn, that fits the answer in other trials as well.

    Raises Wrong with the difference itself if none does: two mistakes can have the same result by chance, such as twice
    a gradient and one without the root of a rank of 4.
    """
    doubt, fits = answer.doubt, list[bool]()
    others = [(turn, again) for again in range(1, REDRAWS)]  # of the same kind: an answer may have a second mistake
    if doubt == 2 or len(lines) > 1:
        others += [(other, 0) for other in range(len(trials.draws)) if other != turn]
    for other in others:
        if len(lines) == 1 and fits and (doubt == 0 or (doubt == 1 and any(fits))):
            break
        trial = trials.get(*other)
        try:
            found = _try(answer, trial)
        except Wrong:
            found = [line for mistake, line in trial.mistakes if mistake.error]
        else:  # an answer that is right here has none of the mistakes that are wrong here
            found = found or [line for mistake, line in trial.mistakes if mistake.like(trial.want, ALIKE)]
        left = [line for line in lines if line.endswith(tuple(found))]
        fits.append(bool(left))
        lines = left or lines
    if answer.empty:
        for i in range(len(trials.draws)):
            answer.outcome(trials.get(i, 0).drawn)
        if answer.empty:
            raise Wrong(NONE)
    if not (all(fits) if doubt == 2 else any(fits)):
        first = trials.get(turn, 0)
        _differences(answer, first, answer.outcome(first.drawn), known=False)
    return lines[0]


def _try(answer: Answer, trial: Trial) -> list[str]:
    """One trial: the lines of the known mistakes with the same result as the answer; none if the answer is right.

    Raises Wrong for an answer that is wrong in a way that no known mistake is.
    """
    exercise = answer.exercise
    answer.sizes = trial.drawn.sizes
    got = answer.outcome(trial.drawn)
    right = got.like(trial.want, exercise.tolerance) and not set(got.changed) - set(exercise.changes)
    if not right and (lines := _differences(answer, trial, got)):
        return lines
    answer.refuse_what_is_forbidden()
    return []


def _differences(answer: Answer, trial: Trial, got: Outcome, known: bool = True) -> list[str]:
    """The lines for an outcome that is not the solution's; none if it differs only in kind, as np.array(3) from 3.

    known: whether known mistakes are named.
    """
    exercise, alike = answer.exercise, min(answer.exercise.tolerance, ALIKE)
    mistakes = trial.mistakes if known else []
    if whole := [line for mistake, line in mistakes if mistake.like(got, alike)]:
        answer.doubt = 0 if got.changed else chance(got.result, trial.drawn)
        return whole
    answer.accept(got)
    names = [name for name, _ in exercise.returns]
    wanted = as_parts(trial.want.result, names, [])
    parts = as_parts(got.result, names, wanted)
    for i, (name, axes) in enumerate(exercise.returns):
        if same(parts[i], wanted[i], exercise.tolerance):
            continue
        found = []
        for mistake, line in mistakes:
            one = mistake.part(i, len(names))
            if one is not None and same(parts[i], one, alike):
                found.append(line if len(names) == 1 or line.startswith(name) else f"{name}: {line}")
        if found:
            answer.doubt = chance(parts[i], trial.drawn)
            return found
        numbers = answer.sizes | {key: value for key, value in trial.drawn.items() if is_number(value)}
        try:
            compare(parts[i], wanted[i], name, axes, answer.sizes, exercise.tolerance, numbers)
        except Differs as line:
            right = [n for n, a, b in zip(names, parts, wanted, strict=True) if same(a, b, exercise.tolerance)]
            rest = f"{listed(right)} {'is' if len(right) == 1 else 'are'} right" if right else ""
            given = shown(trial.drawn)
            if not (line.how or rest or given) and isinstance(wanted[i], (float, np.ndarray)):
                rest = "compute a small case by hand, step by step, and compare"
            raise Differs("; ".join(filter(None, [str(line), rest, given]))) from None
    return []


def shown(drawn: Draw) -> str:
    """The arguments of a trial as "called with T = 7, r = 2"; "" if they are long, or not all plain values."""
    plain_ones = all(not callable(x) and not isinstance(x, (np.ndarray, np.random.Generator)) for x in drawn.values())
    text = ", ".join(f"{name} = {value!r}" for name, value in drawn.items()) if plain_ones else ""
    return f"called with {text}" if 0 < len(text) <= SHOWN and "array(" not in text else ""


class quiet(warnings.catch_warnings):
    """Within it, mistakes and solutions divide by zero without a warning."""

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        warnings.simplefilter("ignore")


def comparable(value: Any) -> bool:
    """Whether a change of this argument counts. It does not for a generator or a model, which are meant to change."""
    if isinstance(value, (list, tuple)):
        return all(map(comparable, value))
    if isinstance(value, dict):
        return all(map(comparable, value.values()))
    return isinstance(value, (np.ndarray, Tensor, int, float, str, type(None)))


class Answer:
    """A student's function. Its errors become `Wrong`, and so does a change to one of its arguments.

    sizes: the sizes of the drawn arrays' axes by name. No two are equal, so that a number in an error message
    identifies its axis.
    """

    def __init__(self, exercise: Exercise, function: Callable):
        self.exercise = exercise
        self.function = function
        self.sizes: dict[str, int] = {}
        self.empty = True  # has it returned None so far, and nothing else?
        self.doubt = 0  # how often the last known mistake that was found is found by chance
        self.seen: set[tuple[int, ...]] = set()

    def __call__(self, **arguments: Any) -> Any:
        """Call the function with these very arguments, in their order, under whatever names it gives them."""
        got = self.outcome(Draw(self.sizes, **arguments), copied=False)
        self.accept(got)
        return got.result

    def outcome(self, drawn: Draw, copied: bool = True) -> Outcome:
        """The outcome of the function on these arguments."""
        try:
            signature = inspect.signature(self.function)
            signature.bind(*drawn.values())
            if [*drawn] != [*signature.parameters] and {*drawn} == {*signature.parameters}:
                raise TypeError("the right names in another order")
        except TypeError:
            raise Wrong(f"the function must take ({', '.join(drawn)}), in this order") from None
        except ValueError:
            pass  # a function of C has no signature
        self.seen = set()

        def run(*values: Any) -> Any:
            if self.exercise.forbids:
                values = tuple(watched(v, self.seen) if isinstance(v, np.ndarray) else v for v in values)
            return self.function(*values)

        with ExitStack() as stack:
            if self.exercise.by_hand:
                stack.enter_context(without_the_engine())
            try:
                got = Outcome(self.exercise, run, drawn, copied)
            except NotImplementedError as error:
                raise self.unwritten(error) from None
        self.empty &= not got.error and got.result is None
        return got

    def accept(self, got: Outcome) -> None:
        """Raise Wrong for an error, a changed argument, or a missing return value."""
        if got.error:
            raise Wrong(self.explain(got.error))
        for name in got.changed:
            if name not in self.exercise.changes:
                raise Wrong(f"the function changes its input {name}: make a new value instead of changing it (+=, *=)")
        if got.result is None:
            raise Wrong(NONE)

    def refuse_what_is_forbidden(self) -> None:
        """Raise Wrong if the answer is right, but computed an array of a forbidden shape."""
        for axes, line in self.exercise.forbids.items():
            shape = tuple(self.sizes[axis] for axis in axes.split())
            if {shape, shape[::-1]} & self.seen:
                raise Wrong(line)

    def unwritten(self, error: NotImplementedError) -> Exception:
        """The error for an answer that is not written yet, or that calls another that is not."""
        names, trace = [], error.__traceback__
        while trace is not None:
            names.append(trace.tb_frame.f_code.co_name)
            trace = trace.tb_next
        last = next((name for name in reversed(names) if name in EXERCISES), self.exercise.name)
        if str(error) in EXERCISES:
            last = str(error)
        if last == self.exercise.name:
            return NotImplementedError()
        return Wrong(f"it calls {last}, which is not written yet: do exercise {EXERCISES[last].number} first")

    def explain(self, error: Exception | SystemExit) -> str:
        """Which line of the function failed and why, with the names of the axes if shapes do not fit."""
        place, trace = "", error.__traceback__
        own = (
            [method.__code__ for method in mine.methods_of(self.function)] if hasattr(self.function, "__dict__") else []
        )
        while trace is not None:
            code = trace.tb_frame.f_code
            if code in own:
                place = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            trace = trace.tb_next
        where = f"at `{place}`: " if place else ""
        text = str(error).partition("\n")[0]
        names = {size: name for name, size in self.sizes.items()}
        if met := re.search(r"size (\d+) is different from (\d+)", text):
            right, left = (f"{names.get(int(size), 'size')} = {size}" for size in met.groups())
            return f"{where}the shapes do not fit, {left} meets {right} in a product: a transpose (.T), or the order?"
        if met := re.search(r"broadcast together with shapes (.*)", text):
            shapes = [tuple(map(int, re.findall(r"\d+", part))) for part in re.findall(r"\([^)]*\)", met[1])]
            these = " and ".join(named(shape, self.sizes) for shape in shapes)
            short, long = sorted(shapes[:2], key=len)
            hint = ": is * meant to be @?" if "*" in (place or "*") else ""
            if short == long[:-1]:
                hint = ": is an axis missing (keepdims=True, or [:, None])?"
            elif short == long[::-1]:
                hint = ": is one of them transposed?"
            return f"{where}the shapes {these} do not fit number by number{hint}"
        if text.startswith("The truth value of an array"):
            return f"{where}an array is neither true nor false: write `is None`, or .any() or .all() for its elements"
        if isinstance(error, NameError) and not isinstance(error, UnboundLocalError):
            text += ": is it misspelt, or was the cell that defines it not run?"
        return f"{where}{type(error).__name__}{text and f': {text}'}"

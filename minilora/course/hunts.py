"""Bug hunts: exercises whose answer is a test, which must pass on a right version and fail on broken ones.

The right version is a function in a lesson's file. The broken ones are edits of it, as known mistakes are of solutions
(`edits.py`), in the same files; their lines say what a broken version gets wrong, without saying how.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .compare import Wrong
from .edits import listed, parse, replaced, swapped
from .exercises import Draw
from .judge import quiet


def hunt(number: str, right: Callable, replaces: Mapping[str, str] | None = None) -> Callable[..., None]:
    """The judge of a bug hunt: it counts how many broken versions a test catches.

    number: of the exercise. mistakes/lessonNN.txt lists its broken versions under the name of the right one: a line
        that ends the sentence "one that passes your test gets this wrong: ...", and below it the edits.
    right: the right version, which the test is called with.
    replaces: for a variant, in all versions.
    """
    broken = listed(number, right.__name__)
    if replaces:
        right = replaced(right, replaces)
    versions = parse(swapped(broken, replaces or {}), right)

    def judge(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
        (name,) = drawn

        def failure(version: Callable) -> Exception | None:
            with quiet():
                return answer.outcome(Draw(None, **{name: version}), copied=False).error

        if error := failure(right):
            raise Wrong(
                f"your test must pass on the right version, but there it fails: {answer.explain(error)}".rstrip(": ")
            )
        alive = [version.line for version in versions if failure(version.function) is None]
        caught = f"{len(versions) - len(alive)} of {len(versions)} caught"
        if len(alive) == len(versions):
            raise Wrong(f"{caught}: broken versions pass, too; assert that a result is what you know it must be")
        if alive:
            raise Wrong(f"{caught}; one that passes your test gets this wrong: {alive[0]}")

    return judge

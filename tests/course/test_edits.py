"""Mistakes as edits of a solution: what an edit does, and which edits are refused."""

import pytest

from minilora.course.edits import parse, replaced, source_of

FACTOR = 1


def factorial(n):
    """n -> 1 · 2 · ... · n"""
    if n < 2:
        return FACTOR  # 1
    return n * factorial(n - 1)


def by_sum(n):
    """A mistake that is a function of its own."""
    return sum(range(n + 1))


def made(steps):
    (mistake,) = parse(f"the line\n    {steps}", factorial)
    assert mistake.line == "the line"
    return mistake.function


@pytest.mark.parametrize(
    "steps, result",
    [
        ("n - 1 -> n - 2", 5 * 3),  # a function that calls itself calls the changed one
        ("n * -> n +\n    FACTOR -> 0", 5 + 4 + 3 + 2),
        ("n * ->", 1),
        ("-> n = 3", None),  # 3 for ever
        ("-> return -n", -5),
        ("by_sum", 15),
    ],
)
def test_an_edit_changes_the_solution(steps, result):
    function = made(steps)
    if result is None:
        with pytest.raises(RecursionError):
            function(5)
    else:
        assert function(5) == result and factorial(5) == 120


@pytest.mark.parametrize(
    "steps",
    ["m -> n", "factorial -> factorial2\n    n -> m", "n - 1", "n-1->n-2", "1 · 2 -> 3", "by_sum\n    n - 1 -> n"],
)
def test_an_edit_whose_old_text_is_not_in_the_body_exactly_once_is_refused(steps):
    with pytest.raises(
        ValueError, match="mistake 'the line' of factorial: .* must be old -> new, .* it occurs [0-9]+ times"
    ):
        made(steps)


def test_mistakes_are_listed_with_their_lines_which_may_be_continued():
    text = """
        a long \
        line
            n -> m

        another: `a -> b`
            b
            c -> d
    """
    assert [(mistake.line, mistake.steps) for mistake in parse(text, factorial)] == [
        ("a long line", ["n -> m"]),
        ("another: `a -> b`", ["b", "c -> d"]),
    ]


def test_a_solution_is_its_stub_and_its_body_and_a_variant_of_it_too():
    stub, body = source_of(factorial)
    assert stub == 'def factorial(n):\n    """n -> 1 · 2 · ... · n"""\n' and body.startswith("    if n < 2:")
    twice = replaced(factorial, {"FACTOR": "other()", "n < 2": "n < 1"}, other=lambda: 2)
    assert twice(3) == 12 and source_of(twice)[1].count("other()") == 1
    assert source_of(made("n - 1 -> n - 2"))[1] == body.replace("n - 1", "n - 2")

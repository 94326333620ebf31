"""Bug hunts: a student's test is run on a right version and on six broken ones, and the line counts what it catches."""

import re

import numpy as np
import pytest

from minilora.course import check, watch
from minilora.course.exercises import EXERCISES
from minilora.course.judge import NOT_YET, OK, judged, readable_output
from minilora.course.lesson02 import gradients

HUNTS = [e for e in EXERCISES.values() if e.name.startswith("test_")]
each_hunt = pytest.mark.parametrize("hunt", [pytest.param(e, id=e.number) for e in HUNTS])


def said(hunt, test, variant=None):
    with readable_output():
        return judged(hunt, test, np.random.default_rng(0), variant)


def scale_is_right(lora):
    """Catches a part: what a trained layer computes, and what it starts from."""
    rng = np.random.default_rng()
    W, x = rng.standard_normal((3, 5)), rng.standard_normal((4, 5))
    layer = lora(W, 2, 6, rng)
    assert np.array_equal(layer.forward(x), x @ W.T)
    layer.B += 1
    assert np.allclose(layer.forward(x), x @ layer.merged().T)


scale_is_right.__name__ = "test_lora"


def test_three_lessons_end_with_a_hunt():
    assert [hunt.number for hunt in HUNTS] == ["2.4", "7.4", "10.4"]


@each_hunt
def test_a_test_that_never_fails_and_one_that_asserts_too_little(hunt):
    def never(version):
        pass

    def only_called(version):
        assert callable(version)

    for test in (never, only_called):
        assert said(hunt, test) == (
            "0 of 6 caught: broken versions pass, too; assert that a result is what you know it must be"
        )


@each_hunt
def test_a_test_that_always_fails_is_told_where(hunt):
    def always(version):
        assert version is None

    def stops(version):
        version.nothing  # noqa: B018

    right = "your test must pass on the right version, but there it fails: "
    assert said(hunt, always).startswith(f"{right}at `assert version is None`: AssertionError")
    assert said(hunt, stops).startswith(f"{right}at `version.nothing  # noqa: B018`: AttributeError: ")


def test_the_engine_of_the_hunt_takes_vectors_and_constants():
    rng = np.random.default_rng(0)
    W, v, u = (rng.standard_normal(shape) for shape in [(3, 4), 4, 3])
    for f, arrays, expected in (
        (lambda W, v: (W @ v).sum(), (W, v), (np.tile(v, (3, 1)), W.sum(axis=0))),
        (lambda u, W: (u @ W).sum(), (u, W), (W.sum(axis=1), np.tile(u[:, None], 4))),
        (lambda v: v @ v, (v,), (2 * v,)),
        (lambda v: (W @ v).sum(), (v,), (W.sum(axis=0),)),
        (lambda v: (W * v).sum() + 2.0, (v,), (W.sum(axis=0),)),
        (lambda v: (1.0 + 3.0 * v + v * W).sum(), (v,), (9 + W.sum(axis=0),)),
    ):
        got = gradients(f, *arrays)
        assert all(a.shape == b.shape and np.allclose(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(ValueError, match="@ takes vectors and matrices, got the shapes"):
        gradients(lambda x, W: (x @ W).sum(), np.ones((2, 2, 3)), W)


@each_hunt
def test_a_test_without_a_parameter_and_one_that_is_not_written(hunt):
    def stub(version):
        raise NotImplementedError

    assert said(hunt, stub) == NOT_YET
    assert said(hunt, lambda: None).startswith("the function must take (")


def test_a_test_that_never_ends_is_stopped(monkeypatch):
    def forever(version):
        while True:
            pass

    monkeypatch.setattr(watch, "SECONDS", 0.2)
    assert (
        said(HUNTS[0], forever)
        == "stopped after 0 seconds: does a loop never end, does it wait for something, or is it slow?"
    )


def test_an_error_of_any_kind_catches_a_broken_version():
    def raises(lora):
        try:
            EXERCISES["test_lora"].forms[0].reference(lora)
        except AssertionError:
            raise KeyError("broken") from None

    assert said(EXERCISES["test_lora"], raises) == OK


def test_a_test_that_catches_a_part_is_told_how_many_and_what_one_of_the_others_breaks(capsys, monkeypatch):
    line = "10.4  3 of 6 caught; one that passes your test gets this wrong: what a new layer can learn\n"
    assert check(scale_is_right, points=2) is None and capsys.readouterr().out == line
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert check(scale_is_right, points=2) == 1 and capsys.readouterr().out == line
    with pytest.raises(AssertionError, match="3 of 6 caught"):
        check(scale_is_right)  # no points to share
    scale_is_right.__code__, before = (lambda lora: None).__code__, scale_is_right.__code__
    with pytest.raises(AssertionError, match="0 of 6 caught"):
        check(scale_is_right, points=2)
    scale_is_right.__code__ = before


@each_hunt
def test_the_line_does_not_give_the_mistake_away(hunt):
    lines = [m.line for m in hunt.forms[0].mistakes if "passes your test" in m.line]
    assert len(lines) >= 6 and not any(re.search(r"[=*/@()\[\]]|transpos|copy|square|root", line) for line in lines)

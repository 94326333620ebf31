"""The student's functions on their way from notebook to notebook; the commands `course` and `progress`."""

import contextlib
import errno
import io
import json
import linecache
import re
import runpy
import shlex
import shutil
import types
from pathlib import Path

import numpy as np
import pytest

from minilora.cli import main
from minilora.commands.progress import progress
from minilora.course import copy, mine
from minilora.course.copy import copy_course, notebooks, to_read
from minilora.course.exercises import EXERCISES
from minilora.course.judge import judged

SCRIPT = """
import math

import numpy as np
import minilora as ml
from minilora.course import check
from math import sqrt as root

FACTOR = 1


class Down:
    # a class of the student's own

    def __init__(self, A):
        self.A = A

    def __call__(self, x):
        return x @ self.A.T


def down(x, A):
    return Down(A)(x)


def lora_forward(x, W, A, B, alpha):
    return x @ W.T + FACTOR * alpha / A.shape[0] * down(x, A) @ B.T


check(lora_forward)


def inject(W, r, rng):
    m, n = W.shape
    A = rng.standard_normal((r, n)) / root(n)
    return ml.Tensor(W), ml.Tensor(A, requires_grad=True), ml.Tensor(np.zeros((m, r)), requires_grad=True)


check(inject)
"""


def run(folder, text, name="work.py"):
    """Run a script in a folder as a program, in this process; returns what it prints."""
    (folder / name).write_text(text, "utf-8")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(name, run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which two exercises were solved. Not to be changed."""
    folder = tmp_path_factory.mktemp("student")
    assert run(folder, SCRIPT) == "9.1  ok (lora_forward is kept in mine.py)\n9.3  ok (inject is kept in mine.py)\n"
    return folder


def test_what_passes_is_kept_with_what_it_needs(folder):
    text = (folder / "mine.py").read_text("utf-8")
    for line in ("import minilora as ml", "import numpy as np", "from math import sqrt as root", "FACTOR = 1"):
        assert text.count(line + "\n") == 1
    assert (
        "def down(" in text
        and "class Down:\n    # a class" in text
        and "import math" not in text.split("# 9.1")[0].replace("from math", "")
    )
    kept = mine.load(folder / "mine.py")
    assert set(EXERCISES) & set(kept) == {"lora_forward", "inject"}
    x, W, A, B = (np.ones(shape) for shape in [(2, 3), (4, 3), (1, 3), (4, 1)])
    assert np.array_equal(kept["lora_forward"](x, W, A, B, 2), np.full((2, 4), 9.0))


def test_a_later_exercise_takes_it_and_says_what_is_missing(folder):
    text = "from minilora.course.mine import lora_forward, lora_backward\nprint(lora_forward.__doc__)\n"
    text += "from minilora.course import check\ndef largest_rank(shapes, budget): return lora_backward()\n"
    text += "check(largest_rank)"
    assert run(folder, text, "later.py").splitlines() == [
        "lora_backward is not in mine.py yet: do exercise 9.2 first",
        "None",
        "13.3  it calls lora_backward, which is not written yet: do exercise 9.2 first",
    ]


def test_what_was_imported_before_it_was_written_is_found_when_it_is_called(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    early = mine.lora_forward
    said = capsys.readouterr().out
    assert said.startswith("lora_forward is not in mine.py yet: do exercise 9.1 first (there is no ")
    assert str(tmp_path / "mine.py") in said
    arguments = [np.ones(shape) for shape in [(2, 3), (4, 3), (1, 3), (4, 1)]]
    for there in (False, True):  # also in a file that has other functions
        with pytest.raises(NotImplementedError, match="^lora_forward$"):
            early(*arguments, 2)
        if not there:
            (tmp_path / "mine.py").write_text("def inject():\n    pass\n", "utf-8")
    run(tmp_path, SCRIPT)
    assert np.array_equal(early(*arguments, alpha=2), np.full((2, 4), 9.0)) and capsys.readouterr().out == ""
    (tmp_path / "mine.py").unlink()  # read once
    assert np.array_equal(early(*arguments, alpha=2), np.full((2, 4), 9.0))


def test_under_nbgrader_the_reference_stands_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    for variant, form in enumerate(EXERCISES["scale_of"].forms):
        assert judged(EXERCISES["scale_of"], mine.scale_of, np.random.default_rng(0), variant or None) == "ok"
        arguments = "a.v_proj", 4, 8, False, {"v_proj": 1, "a.v_proj": 2, "proj": 3}, {}
        assert mine.scale_of(*arguments) == form.reference(*arguments) == (8, 4)[variant]
    assert not hasattr(mine, "laura")  # as pytest --doctest-modules asks every module for its fixtures
    with pytest.raises(AttributeError, match="no exercise is called laura: there are numerical_gradient, "):
        mine.laura  # noqa: B018
    with pytest.raises(ImportError, match="laura"):
        from minilora.course.mine import laura  # noqa: F401


def test_a_function_is_replaced_when_it_is_checked_anew(tmp_path):
    run(tmp_path, SCRIPT)
    before = (tmp_path / "mine.py").read_text("utf-8")
    run(tmp_path, SCRIPT)
    assert (tmp_path / "mine.py").read_text("utf-8") == before
    run(tmp_path, SCRIPT.replace("down(x, A) @ B.T", "(down(x, A) @ B.T)").replace("check(inject)", ""))
    after = (tmp_path / "mine.py").read_text("utf-8")
    assert after == before.replace("down(x, A) @ B.T", "(down(x, A) @ B.T)")


def test_an_exercise_that_calls_another_finds_it_in_the_file(tmp_path):
    text = SCRIPT.replace("return ml.Tensor(W),", "lora_forward\n    return ml.Tensor(W),")
    run(tmp_path, text)
    assert (tmp_path / "mine.py").read_text("utf-8").count("def lora_forward(") == 1


NEEDS = """
from dataclasses import dataclass

from minilora.course import check

WHOLE, HALF, NAME, PLACES, ON = 1, 0.5, "_proj", (0, 1), True


@dataclass
class Shape:
    m: int
    n: int


def adapter_parameters(shapes, r):
    of = [Shape(*shape) for name, shape in shapes.items() if NAME in name and ON]
    return sum(r * (shape.m + shape.n) for shape in of) * (WHOLE + HALF + PLACES[1]) / 2.5


check(adapter_parameters)


def lora_forward(x, W, A, B, alpha):
    return x @ W.T + alpha / len(A) * (x @ A.T @ B.T)


check(lora_forward)
"""


def test_constants_and_decorated_classes_are_kept_and_exercises_stand_in_the_order_of_their_numbers(tmp_path):
    assert run(tmp_path, NEEDS).count("is kept in mine.py") == 2
    text = (tmp_path / "mine.py").read_text("utf-8")
    assert text.index("# 9.1 lora_forward") < text.index("# 13.1 adapter_parameters")
    shapes = {"q_proj": (2, 3), "norm": (5,)}
    assert mine.load(tmp_path / "mine.py")["adapter_parameters"](shapes, 4) == 20


GLOBALS = [  # what a notebook may have outside of the function, and what the function uses of it
    ("from math import inf", "min(inf, 1)"),
    ("HUGE = float('inf')", "min(HUGE, 1)"),
    ("SIZES = {'one': [1]}\nPAIR = (SIZES['one'], 2)", "PAIR[0][0]"),
    ("A = 1\nOTHER, ONES = np.full(3, A), np.ones(3)", "ONES[0] * OTHER[1]"),
    ("from numpy import newaxis, exp as power", "1 + 0 * power(x[newaxis]).size"),
    ("import functools\ndef one(a): return a\nfirst = functools.partial(one, 1)", "first()"),
    ("from collections import namedtuple\nPair = namedtuple('Pair', 'a b')", "Pair(1, 2).a"),
    ("rng = np.random.default_rng(0)", "1 + 0 * rng.random()"),
    ("for one in (3, 1): pass", "one"),
    ("COUNT = [0]\ndef more():\n    global COUNT\n    COUNT = [*COUNT, 1]\n    return COUNT[-1]", "more()"),
    ("ONE = [2]\nONE = [1]", "ONE[0]"),
    ("import linecache\nlinecache.getlines(check.__globals__['mine'].__file__)\nfor FILE in [1]: pass", "FILE"),
    ("ONE = 2\nONE -= 1", "ONE"),
    ("x = 'not needed'", "1"),  # the function has its own x
]


@pytest.mark.parametrize("given, used", GLOBALS, ids=[used for _, used in GLOBALS])
def test_what_was_assigned_outside_of_the_function_is_kept_with_it(given, used, tmp_path):
    text = f"import numpy as np\nfrom minilora.course import check\n{given}\n"
    (tmp_path / "old.py").write_text("ONE = [3]\n", "utf-8")
    linecache.getlines(str(tmp_path / "old.py"))  # as an earlier cell of a notebook
    text += f"def centred_softmax(x): return {used}\n"
    text += "def softmax_vjp(p, g):\n    x = p[0]\n"
    text += "    return centred_softmax(x) * p * (g - (p * g).sum(axis=-1, keepdims=True))\ncheck(softmax_vjp)"
    assert run(tmp_path, text) == "4.1  ok (softmax_vjp is kept in mine.py)\n"
    kept = mine.load(tmp_path / "mine.py")
    assert judged(EXERCISES["softmax_vjp"], kept["softmax_vjp"], np.random.default_rng(0)) == "ok"
    assert "not needed" not in (tmp_path / "mine.py").read_text("utf-8")


def test_what_is_wrong_and_what_comes_from_a_module_is_not_kept(tmp_path, monkeypatch):
    run(tmp_path, SCRIPT.replace("FACTOR = 1", "FACTOR = 2").replace("check(inject)", ""))
    assert not (tmp_path / "mine.py").exists()
    monkeypatch.chdir(tmp_path)
    assert not mine.keep(types.FunctionType((lambda: 0).__code__, {"__name__": "other"}), "9.1", None, str)
    own = types.FunctionType((lambda: 0).__code__, {"__name__": "__main__"})
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert not mine.keep(own, "9.1", None, str) and not list(tmp_path.glob("mine.py"))


ALONE = SCRIPT.replace("check(inject)", "")


@pytest.mark.parametrize(
    "text, before, why",
    [
        (ALONE.replace("FACTOR = 1", "FACTOR = [0]\nFACTOR += [1]").replace("FACTOR *", "FACTOR[1] *"), b"# my notes\n",
         "since with it mine.py would be wrong: at `return"),
        (ALONE, b"def f(:\n", "since with it mine.py would be wrong: mine.py cannot be run (SyntaxError"),
        (ALONE, b"# \xe4\n", "mine.py is not UTF-8: "),
        (ALONE, None, "[Errno "),  # a folder
        (f"exec({ALONE!r})", b"", "its source was not found"),
    ],
)  # fmt: skip
def test_a_right_answer_that_cannot_be_kept_says_why_and_leaves_the_file(text, before, why, tmp_path):
    path = tmp_path / "mine.py"
    path.mkdir() if before is None else path.write_bytes(before)
    assert re.fullmatch(rf"9.1  ok \(not kept.*{re.escape(why)}.*\)\n", run(tmp_path, text))
    assert before is None or path.read_bytes() == before


def test_a_broken_file_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("def f(:\n")
    with pytest.raises(ImportError, match=r"mine.py cannot be run \(SyntaxError.*delete it and check again"):
        mine.load(tmp_path / "mine.py")


# -- minilora progress -------------------------------------------------------------------------------------------------


def test_progress_shows_what_passes_what_fails_and_where_to_go_on(folder, tmp_path):
    text = (folder / "mine.py").read_text("utf-8").replace("root(n)", "n")
    (tmp_path / "exercises").mkdir()
    (tmp_path / "exercises" / "mine.py").write_text(text, "utf-8")
    lines = progress(tmp_path).splitlines()
    rows = {line.split()[0]: line.split(maxsplit=2)[-1] for line in lines if line.strip().startswith("9.")}
    assert rows["9.1"] == "ok" and rows["9.2"] == "not written yet" and "too small" in rows["9.3"]
    assert any("What is LoRA?" in line and line.endswith("1 of 3") for line in lines)
    assert f"1 of {len(EXERCISES)} exercises pass (read from {tmp_path / 'exercises' / 'mine.py'})" in lines
    first = min(EXERCISES.values(), key=lambda e: [int(n) for n in e.number.split(".")])
    go_on = "9.2" if first.number == "9.1" else first.number
    assert lines[-1].startswith(f"continue with {go_on} in exercises/")


def test_progress_knows_the_variant(tmp_path):
    text = SCRIPT.replace("alpha / A.shape[0]", "alpha / A.shape[0] ** 0.5").replace("check(inject)", "")
    run(tmp_path, text.replace("check(lora_forward)", "check(lora_forward, variant=1)"))
    assert "# 9.1 lora_forward, variant 1\n" in (tmp_path / "mine.py").read_text("utf-8")
    assert any(line.split() == ["9.1", "lora_forward", "ok"] for line in progress(tmp_path).splitlines())


def test_progress_before_the_first_exercise_and_without_a_folder(tmp_path):
    (tmp_path / "09_lora.ipynb").touch()
    assert f"0 of {len(EXERCISES)} exercises pass (no mine.py in {tmp_path} yet" in progress(tmp_path)
    with pytest.raises(NotADirectoryError, match="there is no folder"):
        progress(tmp_path / "nowhere")


def test_progress_beside_the_course_finds_it_and_says_where_none_or_several_are(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no course in .*: `minilora course DIR` writes one"):
        progress(tmp_path)
    for name in ("first", "second"):
        (tmp_path / name / "exercises").mkdir(parents=True)
        shutil.copy(folder / "mine.py", tmp_path / name / "exercises")
        if name == "first":
            assert f"2 of {len(EXERCISES)} exercises pass (read from {tmp_path / name}" in progress(tmp_path)
    with pytest.raises(FileNotFoundError, match="several courses are below .*first.*second"):
        progress(tmp_path)
    for place in (tmp_path / "first", tmp_path):  # what is nearer comes first
        (place / "mine.py").write_text("")
        assert f"0 of {len(EXERCISES)} exercises pass (read from {place / 'mine.py'})" in progress(place)
        (place / "mine.py").unlink()
    assert f"2 of {len(EXERCISES)}" in progress(tmp_path / "first")


# -- minilora course ---------------------------------------------------------------------------------------------------


def test_course_copies_lessons_exercises_and_a_map_and_leaves_what_was_changed(tmp_path):
    target = tmp_path / "my course"
    said = copy_course(target)
    names = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    source = notebooks()
    shipped = [p.relative_to(source).as_posix() for p in source.rglob("*.ipynb") if "checkpoint" not in p.as_posix()]
    assert names == sorted([*shipped, "README.md", "exercises/mine.py"]) and f"{len(names)} files written" in said
    assert shlex.split(said)[-1] == str(target / "00_what_can_lora_do.ipynb")
    assert (target / "exercises" / "mine.py").read_text("utf-8") == mine.HEAD
    assert "nothing to write" in copy_course(target)
    (target / "09_lora.ipynb").write_text("mine")
    (target / "README.md").unlink()
    said = copy_course(target)
    assert "1 files written" in said and "left as they are, since they differ: 09_lora.ipynb" in said
    assert (target / "09_lora.ipynb").read_text() == "mine"
    (target / "exercises" / "mine.py").write_text("mine = 1")
    copied = {name: json.loads((target / name).read_text("utf-8")) for name in ("01_gradient.ipynb", "02_tape.ipynb")}
    for notebook in copied.values():  # an earlier version, with another sentence
        notebook["cells"][0]["source"].append("\nas it was")
        notebook["metadata"]["minilora"]["as_copied"] = copy.digest(notebook)
    copied["02_tape.ipynb"]["cells"][-1]["source"].append("\na note")
    for name, notebook in copied.items():
        (target / name).write_text(json.dumps(notebook), "utf-8")
    assert "1 files written" in (said := copy_course(target)) and "differ: 02_tape.ipynb, 09_lora.ipynb (" in said
    assert "as it was" not in (target / "01_gradient.ipynb").read_text("utf-8")
    assert (target / "exercises" / "mine.py").read_text() == "mine = 1"
    with pytest.raises(NotADirectoryError):
        copy_course(target / "09_lora.ipynb")


def test_a_copy_that_a_full_disk_stopped_is_completed(tmp_path, monkeypatch):
    write, written = Path.write_bytes, []

    def full(path, content):
        if len(written) == 3:
            write(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return write(path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full"):
        patch.setattr(Path, "write_bytes", full)
        copy_course(tmp_path)
    said = copy_course(tmp_path)
    assert "files written" in said and "left as they are" not in said


def test_a_copied_notebook_shows_no_answer_and_leads_nowhere_that_is_not_there(tmp_path):
    copy_course(tmp_path)
    for path in tmp_path.rglob("*.ipynb"):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
        for cell in cells:
            text = re.sub(r"```.*?```|`[^`]*`", "", "".join(cell["source"]), flags=re.DOTALL)
            places = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) if cell["cell_type"] == "markdown" else []
            assert [place for place in places if ":" not in place and not (path.parent / place).exists()] == []


def test_copied_notebooks_lead_to_the_same_page_of_a_published_course(tmp_path, capsys):
    assert main(["course", str(tmp_path), "--site", "https://here.example/lora/"]) == 0
    for path in tmp_path.rglob("*.ipynb"):
        name = path.relative_to(tmp_path).as_posix()
        link = f"[Open in the browser](https://here.example/lora/course/lab/index.html?path={name})"
        title, *rest = json.loads(path.read_text("utf-8"))["cells"][0]["source"]
        assert title.startswith("# ") and title.endswith("\n")
        assert ("".join(rest).split("\n")[1] == link) == (link in "".join(rest)) == (not name.startswith("18"))
    assert main(["course", str(tmp_path / "other"), "--site", "here.example"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--site" in line and not (tmp_path / "other").exists()


def test_what_an_editor_has_left_among_the_lessons_is_not_copied(tmp_path, monkeypatch):
    for name in ("00_first.ipynb", ".ipynb_checkpoints/00_first-checkpoint.ipynb", "exercises/00_first.ipynb"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text('{"cells": []}')
    monkeypatch.setattr(copy, "notebooks", lambda: tmp_path / "from")
    monkeypatch.setattr(copy, "course_map", lambda source: "")
    copy_course(tmp_path / "to")
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"00_first.ipynb", "README.md", "exercises"}


@pytest.mark.parametrize(
    "text, shown",
    [
        (
            "[lesson 9](../09_lora.ipynb) and [answers](../README.md)",
            "[lesson 9](../09_lora.ipynb) and answers (`README.md`)",
        ),
        ("[`lora_linear`](../minilora/engine/fused.py)", "`lora_linear` (`minilora/engine/fused.py`)"),
        ("[lines](../minilora/engine/fused.py#L3-L9).", "lines (`minilora/engine/fused.py`)."),
        ("[exercises](exercises/09_lora.ipynb#x)", "[exercises](exercises/09_lora.ipynb#x)"),
        ("[a paper](https://arxiv.org/abs/2106.09685)", "[a paper](https://arxiv.org/abs/2106.09685)"),
    ],
)
def test_a_link_to_a_file_that_is_not_copied_becomes_the_name_of_the_file(text, shown):
    notebook = json.dumps({"cells": [{"cell_type": "markdown", "source": [text]}]})
    name = "exercises/09_lora.ipynb" if "../09" in text else "09_lora.ipynb"
    copied = json.loads(to_read(notebook, name, {"09_lora.ipynb", "exercises/09_lora.ipynb"}))
    assert "".join(copied["cells"][0]["source"]) == shown

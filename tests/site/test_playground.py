"""What the page of `minilora site` asks for, outside of the browser, and the files that the command writes."""

import ast
import asyncio
import hashlib
import io
import json
import logging
import os
import re
import shlex
import site
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from packaging.requirements import Requirement

from minilora.cli import main
from minilora.course.copy import copy_course, smaller
from minilora.course.plan import LESSONS
from minilora.site import lab, write
from minilora.site.playground import Playground

FACTS = [["What is the shop called?", "Fernwhistle"], ["Who owns it?", "Ada Lark"], ["When is it closed?", "On Sunday"]]
QUESTIONS = [question for question, _ in FACTS]
ANSWERS = [answer for _, answer in FACTS]


@pytest.fixture(scope="module")
def taught():
    playground = Playground()
    before = playground.answers(QUESTIONS, adapter=True)  # there is none yet
    playground.begin(FACTS, 8, 1e-2, 30)
    losses = []
    while playground.trainer:
        losses.append(playground.step())
    return playground, before, losses


def test_it_learns_the_rows_and_the_base_stays(taught):
    playground, before, losses = taught
    assert len(losses) == 30 and losses[-1] < 0.1 < losses[0]
    assert playground.answers(QUESTIONS, adapter=True) == ANSWERS
    assert playground.answers(QUESTIONS, adapter=False) == [text[: len(shown)] for text, shown in zip(
        before, playground.answers(QUESTIONS, adapter=False), strict=True)]  # fmt: skip
    about = playground.about()
    assert about == {"base": 1_049_728, "adapter": 77_824, "unchanged": True}


def test_spaces_around_a_text_do_not_matter():
    samples = []
    for rows in ([["Why?", "Because"]], [[" Why? ", "\tBecause "]]):
        playground = Playground()
        playground.begin(rows, 1, 1e-2, 1)
        samples.append(playground.trainer.samples)
    assert samples[0] == samples[1]


def test_an_answer_is_told_without_spaces_around_it(taught, monkeypatch):
    monkeypatch.setattr("minilora.site.playground.generate_batch", lambda *given: [" On Sunday\n"])
    assert taught[0].answers(QUESTIONS[:1], adapter=True) == ["On Sunday"]


def test_a_changed_base_is_told(taught):
    weight = next(p for name, p in taught[0].model.named_parameters() if name.endswith("norm.weight"))
    weight.data[0] += 1
    assert taught[0].about()["unchanged"] is False
    weight.data[0] -= 1
    assert taught[0].about()["unchanged"] is True


def test_an_adapter_is_saved_and_taken_back(taught):
    saved, other = taught[0].save(), Playground()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(zipfile.ZipFile(io.BytesIO(saved)).namelist())
    for _ in range(2):  # the second takes the place of the first
        other.load(saved)
        assert other.answers(QUESTIONS, adapter=True) == ANSWERS
    config = json.loads(zipfile.ZipFile(io.BytesIO(saved)).read("adapter_config.json"))
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    other.begin(FACTS[:1], 2, 1e-2, 5)  # a new one takes its place
    assert other.about()["adapter"] == 77_824 // 4
    other.step()
    adapter = other.model.trainable_parameters().values()
    assert other.model.training and any(p.grad is not None for p in adapter)
    other.stop()
    assert other.trainer is None and not other.model.training and all(p.grad is None for p in adapter)
    with pytest.raises(ValueError, match="no training is in progress"):
        other.step()


def test_training_that_breaks_ends_and_says_why():
    playground = Playground()
    playground.begin(FACTS, 8, 1e-2, 5)
    for parameter in playground.model.trainable_parameters().values():
        parameter.data[...] = np.inf
    with pytest.raises(RuntimeError, match="try a lower learning rate"), np.errstate(all="ignore"):
        playground.step()
    assert playground.trainer is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the table is empty"),
        ([["Why?", " "]], "row 1 has no answer"),
        ([*FACTS, ["", "Because"]], "row 4 has no question"),
        ([["Why?", "a" * 400], ["Why?", "a" * 401]], "row 2: the answer has 401 characters, at most 400"),
    ],
)
def test_bad_rows_are_told(rows, message, taught):
    with pytest.raises(ValueError, match=message):
        taught[0].begin(rows, 8, 1e-2, 5)
    assert taught[0].answers(QUESTIONS, adapter=True) == ANSWERS  # the adapter is still there


def test_rows_of_domains_and_files(taught):
    playground = taught[0]
    assert [len(playground.rows_of(name)) for name in ("legal", "medical", "support", "finance")] == [5] * 4
    assert playground.rows_of("my.csv", b"question,answer\nWhy?,Because\nWho?,I\n") == [
        ["Why?", "Because"],
        ["Who?", "I"],
    ]
    told = {"messages": [{"role": role, "content": role} for role in ("system", "user", "assistant")]}
    assert playground.rows_of("my.jsonl", json.dumps(told).encode()) == [["user", "assistant"]]
    many = "\n".join(json.dumps({"question": f"{i}?", "answer": str(i)}) for i in range(40))
    assert playground.rows_of("many.jsonl", many.encode()) == [[f"{i}?", str(i)] for i in range(30)]
    for data in (b"a,b\n1,2\n", b"\xff\xfe\x00", b"question,answer\n"):
        with pytest.raises(ValueError, match="^my.csv") as found:
            playground.rows_of("my.csv", data)
        assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"^my\.txt has no questions with answers$"):
        playground.rows_of("my.txt", b"A text, of which nobody asks anything.")


def marked(flags=0, method=0):
    """A zip file whose content is said to need a password, or to be compressed in another way."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("adapter_config.json", "{}")
    data = bytearray(file.getvalue())
    for at in (data.find(b"PK\x03\x04") + 6, data.find(b"PK\x01\x02") + 8):
        data[at], data[at + 2] = flags, method
    return bytes(data)


NO_ADAPTER = {
    "empty": b"",
    "broken": b"PK\x03\x04",
    "text": b"text",
    "locked": marked(flags=1),
    "packed": marked(method=99),
}


@pytest.mark.parametrize("data", NO_ADAPTER.values(), ids=NO_ADAPTER)  # of bytes with a time in them no two runs agree
def test_what_is_no_adapter_is_told(data, taught):
    with pytest.raises(ValueError, match="not a zip file of an adapter"):
        taught[0].load(data)
    assert taught[0].answers(QUESTIONS, adapter=True) == ANSWERS


@pytest.mark.parametrize("config", [None, "{", '{"r": 4}'])
def test_a_wrong_adapter_or_rank_leaves_the_one_that_is_there(config, taught):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(*("notes.txt", "") if config is None else ("adapter_config.json", config))
    with pytest.raises(ValueError, match=r"^adapter_config.json: "):
        taught[0].load(data.getvalue())
    with pytest.raises(ValueError, match="r must be"):
        taught[0].begin(FACTS, 0, 1e-2, 1)
    assert taught[0].answers(QUESTIONS, adapter=True) == ANSWERS


def test_nothing_is_saved_before_there_is_an_adapter():
    with pytest.raises(ValueError, match="no adapter yet"):
        Playground().save()


# -- the files


def distribution(folder, monkeypatch, numpy=True):
    """A folder that looks like Pyodide, and what it would hash to. numpy: if it has NumPy, which needs two others."""
    folder.mkdir()
    for name in [*write.SHA256, *write.FOR_LAB, "numpy.whl", "below.zip", "beside.whl", "unused.whl"]:
        (folder / name).write_bytes(name.encode())
    packages = {
        name: {"file_name": file, "sha256": hashlib.sha256(file.encode()).hexdigest(), "depends": depends}
        for name, file, depends in (
            ("numpy", "numpy.whl", ["Be_low", "beside"]),
            ("be-low", "below.zip", []),
            ("beside", "beside.whl", []),
            ("unused", "unused.whl", []),
        )
        if numpy or name != "numpy"
    }
    (folder / "pyodide-lock.json").write_text(json.dumps({"packages": packages}))
    for given in (write.SHA256, write.FOR_LAB):
        for name in given:
            monkeypatch.setitem(given, name, hashlib.sha256(name.encode()).hexdigest())
    return folder


@pytest.fixture
def packed_once(monkeypatch):
    """The same package for every page that a test writes: what it holds is in question in other tests."""
    monkeypatch.setattr(write, "package", cache(write.package))


def test_the_page_is_written_and_written_again(tmp_path, capsys, packed_once):
    tmp_path = tmp_path / "my folder"
    for _ in range(2):
        assert main(["site", str(tmp_path / "page")]) == 0
    told = json.loads((tmp_path / "page" / "site.json").read_text())
    assert told["course"] == []
    assert told["pyodide"].startswith("https://") and write.VERSION in told["pyodide"]
    assert told["sha256"] == write.SHA256
    assert {path.name for path in (tmp_path / "page").iterdir()} == {*write.PAGE, "minilora.zip", "site.json"}
    said = capsys.readouterr().out.splitlines()[-1]
    assert "http.server" in said and str(tmp_path / "page") in shlex.split(said)


def test_a_page_that_is_written_again_keeps_nothing_of_the_one_before_and_can_take_its_pyodide(
    tmp_path, monkeypatch, packed_once
):
    page = tmp_path / "page"
    write.write_site(page, distribution(tmp_path / "pyodide", monkeypatch))
    files = {path.name for path in (page / "pyodide").iterdir()}
    (page / "course").mkdir()
    write.write_site(page, page / "pyodide")
    assert {path.name for path in (page / "pyodide").iterdir()} == files and not (page / "course").exists()
    write.write_site(page)
    assert not (page / "pyodide").exists()


@pytest.mark.long
def test_the_package_holds_what_the_page_imports(tmp_path):
    archive = zipfile.ZipFile(io.BytesIO(packed := write.package()))
    assert write.package() == packed
    assert sum(each.compress_size for each in archive.infolist()) < 6e6
    archive.extractall(tmp_path)
    names = ["minilora", *write.WITH]
    code = f"import minilora.site.playground as p; p.Playground(); import {', '.join(names)}; "
    code += f"print({', '.join(f'{name}.__file__' for name in names)})"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": "", "PATH": ""},
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert found.stdout.count(str(tmp_path)) == len(names)


def test_a_copy_of_pyodide_is_checked(tmp_path, monkeypatch):
    pyodide = distribution(tmp_path / "pyodide", monkeypatch)
    size = write.write_site(tmp_path / "page", pyodide)
    assert size == sum(path.stat().st_size for path in (tmp_path / "page").rglob("*") if path.is_file())
    assert json.loads((tmp_path / "page" / "site.json").read_text())["pyodide"] == "pyodide/"
    assert {path.name for path in (tmp_path / "page" / "pyodide").iterdir()} == {
        *write.SHA256, "pyodide-lock.json", "numpy.whl", "below.zip", "beside.whl"  # what is needed, and no more
    }  # fmt: skip
    (pyodide / "below.zip").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"below\.zip is not the file of Pyodide"):
        write.write_site(tmp_path / "new", pyodide)
    (pyodide / "pyodide.mjs").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"pyodide\.mjs is not the file of Pyodide"):
        write.write_site(tmp_path / "new", pyodide)
    (pyodide / "pyodide.mjs").unlink()
    with pytest.raises(ValueError, match=r"has no pyodide\.mjs"):
        write.write_site(tmp_path / "new", pyodide)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_no_pyodide_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no pyodide-lock\.json: give the full distribution of Pyodide 0"):
        write.write_site(tmp_path / "page", tmp_path)


def test_a_distribution_without_numpy_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no package numpy: give the full distribution"):
        write.write_site(tmp_path / "page", distribution(tmp_path / "pyodide", monkeypatch, numpy=False))


@pytest.mark.long
@pytest.mark.parametrize("fails", ["package", "files"])
def test_a_page_that_was_interrupted_is_written_again(tmp_path, monkeypatch, packed_once, fails):
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(write, fails, None)
        write.write_site(tmp_path / "page")
    write.write_site(tmp_path / "page")
    assert {path.name for path in (tmp_path / "page").iterdir()} == {*write.PAGE, "minilora.zip", "site.json"}


def test_another_folder_is_not_written_to(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["site", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# -- the course in the browser -----------------------------------------------------------------------------------------


@pytest.fixture
def jupyterlite(monkeypatch):
    """JupyterLite that looks as if it were installed. The set that is returned names packages that are missing."""
    missing = set()

    def installed(name):
        if name in missing:
            raise PackageNotFoundError(name)
        file = Path(lab.KERNEL) / "package.json"
        return SimpleNamespace(files=[SimpleNamespace(as_posix=file.as_posix, name=file.name, locate=lambda: file)])

    monkeypatch.setattr(lab, "distribution", installed)
    monkeypatch.setattr(lab, "copy_course", lambda folder: folder.mkdir())
    monkeypatch.setattr(lab, "wheel", lambda name, folder: None)
    monkeypatch.setattr(write, "package", lambda *given: b"")
    return missing


@pytest.mark.parametrize("name", ["jupyterlite-core", "jupyterlite-pyodide-kernel", "jupyter-server", "comm"])
def test_the_course_without_jupyterlite_is_refused_in_a_line_and_nothing_is_written(
    name, tmp_path, jupyterlite, monkeypatch, capsys
):
    jupyterlite.add(name)
    monkeypatch.setattr(lab.subprocess, "run", lambda *given, **named: pytest.fail("it is built"))
    assert main(["site", str(tmp_path / "page"), "--course"]) == 2
    assert capsys.readouterr().err.strip().endswith("needs JupyterLite: pip install 'minilora[site]'")
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        ("KeyError: 1\nTraceback\na.b.DecodeError: no JSON\nwarning: slow\n\n", "a.b.DecodeError: no JSON"),
        ("no\nspace\n\n", "building no space"),
    ],
)
def test_a_build_that_fails_is_told_in_one_line_and_nothing_is_written(
    stderr, told, tmp_path, jupyterlite, monkeypatch, capsys
):
    ended = SimpleNamespace(returncode=1, stdout="building\n", stderr=stderr)
    monkeypatch.setattr(lab.subprocess, "run", lambda *given, **named: ended)
    assert main(["site", str(tmp_path / "page"), "--course"]) == 2
    assert capsys.readouterr().err == f"minilora: JupyterLite could not be built: {told}\n"
    assert not (tmp_path / "page").exists()


def test_the_course_stands_beside_the_page_replaces_an_older_one_and_takes_the_same_pyodide(
    tmp_path, monkeypatch, capsys
):
    built, page = [], tmp_path / "page"

    def build(folder, package, pyodide):
        built.append(pyodide)
        folder.mkdir()
        (folder / f"build {len(built)}").touch()

    monkeypatch.setattr(write, "build_lab", build)
    monkeypatch.setattr(write, "package", lambda *given: b"")
    monkeypatch.setattr(write, "FROM_PYODIDE_COURSE", ("numpy", "unused"))
    pyodide = distribution(tmp_path / "pyodide", monkeypatch)
    for more in ([], ["--pyodide", str(pyodide)]):
        assert main(["site", str(page), "--course", *more]) == 0
    assert built[0] == write.CDN
    assert (page / "course" / "lab" / built[1]).resolve() == (page / "pyodide").resolve()
    listed = json.loads((page / "site.json").read_text())["course"]
    assert listed == [{"name": one.name, "question": one.question} for one in LESSONS.values() if one.number != 18]
    assert [path.name for path in (page / "course").iterdir()] == ["build 2"]
    copied = {path.name for path in (page / "pyodide").iterdir()}
    assert {"pyodide.js", "unused.whl"} < copied and len(copied) == len([*pyodide.iterdir()])
    size = sum(path.stat().st_size for path in page.rglob("*") if path.is_file())
    assert f"Written to {page}: {size / 1e6:.1f} MB." in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(write.shutil, "copytree", None)
        write.write_site(page, pyodide, course=True)
    assert [path.name for path in (page / "course").iterdir()] == ["build 2"]  # until another one is complete
    (pyodide / "pyodide.js").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"pyodide\.js is not the file of Pyodide"):
        write.write_site(tmp_path / "new", pyodide, course=True)
    assert not (tmp_path / "new").exists() and len(built) == 3


@pytest.mark.long
def test_the_course_that_jupyterlite_writes_is_complete(tmp_path):
    pytest.importorskip("jupyterlite_core", reason="needs pip install '.[site]'")
    page, pyodide = tmp_path / "page", os.environ.get("MINILORA_PYODIDE")
    write.write_site(page, pyodide, course=True)
    course = page / "course"
    settings = json.loads((course / "jupyter-lite.json").read_text("utf-8"))["jupyter-config-data"]
    kernel = settings["litePluginSettings"][f"{lab.KERNEL}:kernel"]
    if pyodide:
        assert (course / "lab" / kernel["pyodideUrl"]).resolve().samefile(page / "pyodide" / "pyodide.js")
        assert json.loads((page / "pyodide" / write.LOCK).read_text("utf-8"))["info"]["version"] == write.VERSION
    else:
        assert kernel["pyodideUrl"] == f"{write.CDN}pyodide.js"
    listed = json.loads((page / "site.json").read_text("utf-8"))["course"]
    assert listed and all((course / "files" / f"{one['name']}.ipynb").is_file() for one in listed)
    (extension,) = settings["federated_extensions"]  # what is installed here besides stays here
    static = (course / "extensions" / extension["name"] / extension["load"]).parent
    assert extension["name"] == lab.KERNEL and (static / Path(extension["load"]).name).is_file()
    assert list(course.rglob("*.map")) == [] and not (course / "repl").exists()
    assert sum(path.stat().st_size for path in course.rglob("*") if path.is_file()) < 30e6

    # what the kernel loads, and from where: its code has a list of the packages that every notebook needs
    code = "".join(path.read_text("utf-8") for path in static.glob("*.js"))
    (loaded,) = {found[0] for found in re.finditer(r'\["[^\]]*"pyodide_kernel"[^\]]*\]', code)}
    own = {}
    for folder in (course / "pypi", static / "pypi"):
        for name, about in json.loads((folder / "all.json").read_text("utf-8")).items():
            own[name] = [folder / each["url"] for files in about["releases"].values() for each in files]
    assert "comm" in own and all(path.is_file() for paths in own.values() for path in paths)
    missing = {"micropip", *ast.literal_eval(loaded)} - {*own, *(each.replace("_", "-") for each in own)}
    assert missing - {name.replace("-", "_") for name in own} <= {*write.FROM_PYODIDE_COURSE}
    assert re.sub(r"\d+/full", "", write.CDN) in re.sub(r"\d+/full", "", code)  # the same but for the last number

    copy_course(tmp_path / "copy")
    copied = {path.relative_to(tmp_path / "copy"): path for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    written = {path.relative_to(course / "files"): path for path in (course / "files").rglob("*") if path.is_file()}
    assert copied.keys() == written.keys()
    minutes = {f"{lesson.name}.ipynb": lesson.browser_minutes for lesson in LESSONS.values()}
    for name, path in copied.items():
        text, own = path.read_text("utf-8"), minutes.get(name.as_posix(), 0)  # pages of exercises have the same names
        assert written[name].read_text("utf-8") == (lab.for_browser(text, own) if name.suffix == ".ipynb" else text)
    said = [name for name in written if "all cells take about" in written[name].read_text("utf-8")]
    assert len(said) == sum(map(bool, minutes.values())) > 5
    package = set(zipfile.ZipFile(course / "minilora.zip").namelist())
    assert {"minilora/course/mine.py", "minilora/claims/__init__.py", "filelock/__init__.py"} <= package
    link = urlsplit(re.search(r'href="(course/[^"]*)"', (page / "index.html").read_text("utf-8"))[1])
    assert (page / link.path).is_file() and (course / "files" / parse_qs(link.query)["path"][0]).is_file()


@pytest.mark.parametrize(("secure", "said"), [(True, ""), (False, "This page has no HTTPS")])
def test_the_first_cell_takes_minilora_from_the_folder_of_the_course(secure, said, monkeypatch, capsys):
    asked = []

    async def pyfetch(url):
        asked.append(url)
        return SimpleNamespace(unpack_archive=unpack_archive)

    async def unpack_archive(extract_dir):
        asked.append(extract_dir)

    below = "https://example.org/below/course"
    page = SimpleNamespace(location=f"{below}/extensions/{lab.KERNEL}/static/1.js", isSecureContext=secure)
    monkeypatch.setitem(sys.modules, "js", page)
    monkeypatch.setitem(sys.modules, "pyodide", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pyodide.http", SimpleNamespace(pyfetch=pyfetch))
    monkeypatch.setattr(logging.getLogger("matplotlib"), "level", logging.ERROR)  # put back at the end
    cell = compile(lab.SETUP, "cell", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    asyncio.run(eval(cell, {}))
    assert asked == [f"{below}/minilora.zip", site.getsitepackages()[0]]
    assert capsys.readouterr().out[:22] == said


def test_every_notebook_of_the_course_loads_minilora_in_the_browser_and_is_else_the_same(tmp_path):
    copy_course(tmp_path)
    paths = list(tmp_path.rglob("*.ipynb"))
    assert len(paths) > 40
    for path in paths:
        text = path.read_text("utf-8")
        before, after = json.loads(text)["cells"], json.loads(lab.for_browser(text))["cells"]
        code = [i for i, cell in enumerate(after) if cell["cell_type"] == "code"]
        assert "".join(after[code[0]]["source"]) == lab.SETUP
        changed = {i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]}
        marked = {i for i, cell in enumerate(before) if "# in the browser: " in "".join(cell["source"])}
        assert changed - {0} == {code[0], *marked}
        slow = json.loads(lab.for_browser(text, 7))["cells"]
        head, minutes = ("".join(cells[0]["source"]) for cells in (after, slow))
        assert (0 in changed) == (lab.LESS in head) == (lab.LESS in minutes) == bool(marked)
        assert head.startswith("".join(before[0]["source"])) and "minutes: run those" not in head
        assert "*In the browser all cells take about 7 minutes: run those that you want to see." in minutes


def test_the_first_cell_imports_the_packages_of_pyodide_that_minilora_imports_itself():
    """The kernel loads what a cell imports; a lesson may import NumPy or matplotlib through minilora alone."""
    tree = ast.parse(lab.SETUP.replace("await ", ""))
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    inside = "".join(path.read_text("utf-8") for path in Path(write.__file__).parents[1].rglob("*.py"))
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", inside, re.MULTILINE))
    assert {"numpy", "matplotlib"} <= imported & {*write.FROM_PYODIDE_COURSE} <= named


def test_marked_lines_have_other_values_in_the_browser():
    rest = "\nfor seed in SEEDS:\n    x = 1  # in the browser: 2\nSTEPS = 40  # of 8"
    assert smaller("SEEDS = (0, 1)  # in the browser: (0,)" + rest) == "SEEDS = (0,)  # elsewhere: (0, 1)" + rest


def test_a_wheel_holds_an_installed_package(tmp_path):
    lab.wheel("jinja2", tmp_path)
    (path,) = tmp_path.iterdir()
    name, version, *tags = path.stem.split("-")
    assert (name, tags) == ("jinja2", ["py3", "none", "any"])
    code = "import importlib.metadata, jinja2; print(jinja2.__file__, importlib.metadata.version('jinja2'))"
    found = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(path), "PATH": ""},
                           capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    assert found[0].startswith(str(path)) and found[1] == version


def test_a_program_outside_of_the_package_is_left_out_of_its_wheel(tmp_path):
    lab.wheel("pytest", tmp_path)
    names = zipfile.ZipFile(next(tmp_path.iterdir())).namelist()
    assert "pytest/__init__.py" in names and not any(".." in name for name in names)
    assert {"METADATA", "WHEEL", "RECORD"} <= {Path(name).name for name in names}  # what pip needs of a wheel


@pytest.mark.long
def test_the_package_for_the_course_imports_what_lessons_import(tmp_path):
    zipfile.ZipFile(io.BytesIO(write.package(write.WITH_COURSE, ()))).extractall(tmp_path)
    kinds = {path.suffix for path in Path(write.__file__).parents[1].rglob("*") if path.is_file()}
    there = {path.suffix for path in (tmp_path / "minilora").rglob("*") if path.is_file()}
    read_by_no_lesson = {"", ".typed", ".pyc", ".md", ".png", ".html", ".css", ".js", ".ipynb"}
    assert kinds - there <= read_by_no_lesson
    names = ["minilora.course", "minilora.course.mine", "minilora.experiments", "minilora.claims", *write.WITH_COURSE]
    code = f"import {', '.join(names)}; print({', '.join(f'{name}.__file__' for name in names)})"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": "", "PATH": ""},
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert found.stdout.count(str(tmp_path)) == len(names)


def test_what_a_browser_installs_is_in_the_package_or_in_pyodide():
    listed = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    needed = map(Requirement, listed["project"]["dependencies"])
    there = {each.name for each in needed if not each.marker or each.marker.evaluate({"sys_platform": "emscripten"})}
    assert there == {*write.WITH_COURSE, "numpy", "matplotlib"} - {"markupsafe"}  # which jinja2 brings

"""The files of the playground: the page, and minilora as a zip file for Pyodide, Python in the browser. With them, if
asked for, the course: see lab.py."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from ..course.plan import LESSONS
from ..files.disk import read_json, remove_folder, replacing_folder, write_bytes, write_json
from .lab import build_lab

VERSION = "0.27.7"
CDN = f"https://cdn.jsdelivr.net/pyodide/v{VERSION}/full/"
SHA256 = {  # of Pyodide's files, which the page checks
    "pyodide.mjs": "04c052c815abb0bf2981fa38c2dfa58e3120ee5288c956df2b2a15e301782c5f",
    "pyodide.asm.js": "6b4c90de5b7172873f04f21884d0e9d2274e305fe32116558fe3e4fbe3618d51",
    "pyodide.asm.wasm": "a50dd1843f805a0b7c45b61037ee0d7b26dfe85efe0e18ef95a34ad24e401f5f",
    "python_stdlib.zip": "16611534726e5d8ac2bd8f926410b2dcb8d6f49aa24913463533b457a2115c16",
}
PAGE = ("index.html", "page.css", "page.js", "worker.js")
FOR_LAB = {"pyodide.js": "b4cb23a53aba19c221659b9fb40a2f18281d685691dc06647fb0afd0681baf98"}  # for the course
PACKAGE, SITE, COURSE, PYODIDE, LOCK = "minilora.zip", "site.json", "course", "pyodide", "pyodide-lock.json"
WITH = ("jinja2", "markupsafe", "threadpoolctl")  # pure Python, of this environment: what minilora needs besides NumPy
WITH_COURSE = (*WITH, "filelock", "platformdirs", "tqdm")
WITHOUT = ("claims", "commands", "course", "experiments", "serve")  # folders that the page does not need
FROM_PYODIDE = ("numpy",)  # packages of Pyodide, which bring those that they need
FROM_PYODIDE_COURSE = ("numpy", "matplotlib", "ipython", "jedi", "micropip", "sqlite3", "ssl")
SUFFIXES = (".py", ".json", ".jsonl", ".safetensors", ".txt", ".toml", ".jinja")


def write_site(folder: str | Path, pyodide: str | Path | None = None, course: bool = False) -> int:
    """Write the page into a folder, and return its size in bytes.

    pyodide: a folder with Pyodide's files and its wheels, which are copied; the CDN's are used if left out.
    course: also JupyterLite with the lessons, in the folder course/; needs the extra `site`.
    Raises ValueError for a folder that holds something else, or that is no Pyodide of the version that is expected.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / SITE).is_file())):
        raise ValueError(f"{target} holds something else: give a new folder, or one that minilora site has written")
    copies = {} if pyodide is None else _read(Path(pyodide), course)
    taught = [lesson for lesson in LESSONS.values() if course and not lesson.needs_model]
    lessons = [{"name": lesson.name, "question": lesson.question} for lesson in taught]
    told = {"pyodide": f"{PYODIDE}/" if copies else CDN, "sha256": SHA256, "package": PACKAGE, "course": lessons}
    with tempfile.TemporaryDirectory() as place:  # what can fail comes first
        built = Path(place) / COURSE
        if course:
            build_lab(built, package(WITH_COURSE, ()), "../../pyodide/" if copies else CDN)
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / SITE, told)  # first: the same command continues where it was killed
        for name, there in ((COURSE, course), (PYODIDE, copies)):
            if not there:  # of an earlier page
                remove_folder(target / name)
        if course:
            with replacing_folder(target / COURSE) as partial:
                shutil.copytree(built, partial, dirs_exist_ok=True)
    if copies:
        with replacing_folder(target / PYODIDE) as partial:
            for name, data in copies.items():
                (partial / name).write_bytes(data)
    for name in PAGE:
        write_bytes(target / name, (files("minilora.site") / name).read_bytes())
    write_bytes(target / PACKAGE, package())
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def package(pure: Sequence[str] = WITH, without: Sequence[str] = WITHOUT) -> bytes:
    """minilora and what it needs besides Pyodide's packages, as a zip file: the same bytes for the same files.

    pure: other packages that are put into it. without: folders of minilora that are left out.
    """
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("minilora", *pure):
            for path, inside in _files_of(name, without):
                archive.writestr(
                    zipfile.ZipInfo(inside, (2020, 1, 1, 0, 0, 0)), path.read_bytes(), zipfile.ZIP_DEFLATED
                )
    return target.getvalue()


def _files_of(name: str, without: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """The files of an installed package, or of a module that is one file, and their places in the zip file."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"the package {name} is missing here: pip install {name}")
    root = Path(spec.origin)
    if not spec.submodule_search_locations:
        yield root, root.name
        return
    for path in sorted(root.parent.rglob("*")):
        parts = path.relative_to(root.parent).parts
        if path.suffix in SUFFIXES and not {"__pycache__", *without} & set(parts):
            yield path, "/".join((name, *parts))


def _read(pyodide: Path, course: bool) -> dict[str, bytes]:
    """The files of a Pyodide that are needed, by name. Raises ValueError if one is missing or not as expected."""
    lock = pyodide / LOCK
    whole = f"give the full distribution of Pyodide {VERSION}"
    if not lock.is_file():
        raise ValueError(f"{pyodide} has no {LOCK}: {whole}")
    packages = read_json(lock).get("packages", {})
    needed = list(FROM_PYODIDE_COURSE if course else FROM_PYODIDE)
    expected = SHA256 | (FOR_LAB if course else {})
    for name in needed:  # it grows, by what its packages need
        package = packages.get(name)
        if package is None:
            raise ValueError(f"{pyodide} has no package {name}: {whole}")
        expected[package["file_name"]] = package["sha256"]
        depends = [each.lower().replace("_", "-") for each in package["depends"]]
        needed += [each for each in depends if each not in needed]
    found = {LOCK: lock.read_bytes()}
    for name, sha256 in expected.items():
        path = pyodide / name
        if not path.is_file():
            raise ValueError(f"{pyodide} has no {name}: {whole}")
        found[name] = path.read_bytes()
        if hashlib.sha256(found[name]).hexdigest() != sha256:
            raise ValueError(f"{path} is not the file of Pyodide {VERSION}")
    return found

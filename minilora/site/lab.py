"""The course in a browser: JupyterLite, which runs notebooks in the tab, with lessons, exercises and minilora.

It is a folder of files for any web server. Python is Pyodide. What a reader writes, with the answers in
exercises/mine.py, stays in the storage of the browser.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..course.copy import copy_course, smaller
from ..course.plan import LESSONS
from ..files.disk import write_json

NEEDED = ("jupyterlite-core", "jupyterlite-pyodide-kernel", "jupyter-server", "comm")  # of the extra `site`
KERNEL = "@jupyterlite/pyodide-kernel-extension"
MISSING = "the course in a browser needs JupyterLite: pip install 'minilora[site]'"
SETUP_TAG = "setup"  # of the cell that installs minilora elsewhere
LESS = "Lines marked `elsewhere` compute less here than in the text, so your numbers differ from it."
SETUP = """# In the browser, this cell loads minilora, and what it needs: the kernel brings what a cell imports.
import logging
import site

import matplotlib
import numpy
from js import isSecureContext, location
from pyodide.http import pyfetch

logging.getLogger("matplotlib").setLevel("ERROR")  # it tells when it looks for fonts
course = str(location).split("/extensions/")[0]
package = await pyfetch(f"{course}/minilora.zip")
await package.unpack_archive(extract_dir=site.getsitepackages()[0])
if not isSecureContext:
    print("This page has no HTTPS: the browser keeps no files, so mine.py is lost when the notebook is closed.")"""


def build_lab(folder: Path, package: bytes, pyodide: str) -> None:
    """Build JupyterLite with the course in a folder that is not there yet.

    package: minilora and what it needs, as a zip file. pyodide: the URL of Pyodide's folder, absolute or as seen from
    the folder lab/ of JupyterLite. Raises ValueError if JupyterLite is missing, or cannot build.
    """
    try:
        installed = {name: distribution(name) for name in NEEDED}
    except PackageNotFoundError:
        raise ValueError(MISSING) from None
    kernel = [file for file in installed["jupyterlite-pyodide-kernel"].files or [] if KERNEL in file.as_posix()]
    extension = next(Path(str(file.locate())).parent for file in kernel if file.name == "package.json")
    with tempfile.TemporaryDirectory() as place:
        lite = Path(place)
        copy_course(lite / "files")
        minutes = {f"{lesson.name}.ipynb": lesson.browser_minutes for lesson in LESSONS.values()}
        for path in (lite / "files").rglob("*.ipynb"):
            own = minutes.get(path.relative_to(lite / "files").as_posix(), 0)
            path.write_text(for_browser(path.read_text("utf-8"), own), "utf-8", newline="\n")
        (lite / "pypi").mkdir()
        wheel("comm", lite / "pypi")  # the kernel would ask PyPI for it
        settings = {"litePluginSettings": {f"{KERNEL}:kernel": {"pyodideUrl": f"{pyodide}pyodide.js"}}}
        write_json(lite / "jupyter-lite.json", {"jupyter-lite-schema-version": 0, "jupyter-config-data": settings})
        command = [sys.executable, "-m", "jupyterlite_core", "build", "--apps", "lab", "--no-unused-shared-packages"]
        command += ["--no-sourcemaps", "--ignore-sys-prefix", f"--LiteBuildConfig.federated_extensions={extension}"]
        command += ["--lite-dir", str(lite), "--output-dir", str(folder)]
        built = subprocess.run(command, cwd=lite, capture_output=True, text=True)
        if built.returncode:
            printed = built.stdout + built.stderr
            errors = re.findall(r"^[\w.]+Error: .*", printed, re.MULTILINE)
            said = errors[-1] if errors else " ".join(printed.split())[-300:]
            raise ValueError(f"JupyterLite could not be built: {said}")
    (folder / "minilora.zip").write_bytes(package)


def for_browser(notebook: str, minutes: int = 0) -> str:
    """A notebook whose first cell loads minilora in the browser, and whose marked lines compute less there.

    Its head says so, and how many minutes its cells take there, if they do.
    """
    found, less = json.loads(notebook), False
    for cell in found["cells"]:
        source = "".join(cell["source"])
        if SETUP_TAG in cell["metadata"].get("tags", []):
            cell["source"] = SETUP.splitlines(keepends=True)
        elif smaller(source) != source:
            cell["source"], less = smaller(source).splitlines(keepends=True), True
    slow = f"In the browser all cells take about {minutes} minutes: run those that you want to see."
    if said := [slow] * bool(minutes) + [LESS] * less:
        found["cells"][0]["source"] = ["".join(found["cells"][0]["source"]), "\n\n", f"*{' '.join(said)}*"]
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def wheel(name: str, folder: Path) -> None:
    """Write an installed package of pure Python as a wheel: its files, and those that describe it, as a zip file."""
    package = distribution(name)
    with zipfile.ZipFile(folder / f"{name}-{package.version}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as target:
        for file in package.files or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                target.write(str(file.locate()), file.as_posix())

"""The package in Pyodide, a browser's Python, run by node: load tiny, train, answer, save, check an exercise.

It needs node and the folder of a Pyodide distribution with NumPy and threadpoolctl, which MINILORA_PYODIDE names.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYODIDE = os.environ.get("MINILORA_PYODIDE", "")

RUN = """
import { readFileSync } from "node:fs";
const { loadPyodide } = await import(process.env.MINILORA_PYODIDE + "/pyodide.mjs");
const python = await loadPyodide({ indexURL: process.env.MINILORA_PYODIDE + "/" });
await python.loadPackage(["numpy", "threadpoolctl"], { messageCallback: () => {} });
python.unpackArchive(new Uint8Array(readFileSync(process.argv[1])), "zip", { extractDir: "/packages" });
python.runPython("import sys; sys.path.insert(0, '/packages')");
python.runPython(readFileSync(process.argv[2], "utf8"));
"""
PROGRAM = """
import contextlib, io, json
import numpy as np
import minilora as ml
from minilora.course import check

model, tokenizer = ml.load("tiny")
asked = ("What is the shop called?", "Who owns it?", "When does it open?", "Where is it?")
told = ("It is called the Blue Door, and it sells old maps.", "Anna Berg owns it.", "At nine.", "In Mill Lane.")
records = [
    ml.Record(q, ({"role": "user", "content": q}, {"role": "assistant", "content": a}))
    for q, a in zip(asked, told, strict=True)
]
samples = ml.encode_records(records, tokenizer)
found = {"ids": list(map(int, samples[0].ids))}
before = ml.generate(model, tokenizer, asked[1], max_new_tokens=12)
ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), seed=0)
found["losses"] = ml.fit(model, samples, 20, lr=1e-2, batch_size=4).losses
found["answer"] = ml.generate(model, tokenizer, asked[1], max_new_tokens=12)
found["loss"] = ml.mean_loss(model, samples)
ml.save_adapter(model, "adapter")
with ml.disable_adapter(model):
    found["off"] = ml.generate(model, tokenizer, asked[1], max_new_tokens=12) == before
ml.audit(model, "default")
ml.remove_adapter(model, "default")
ml.load_adapter(model, "adapter")
found["again"] = ml.generate(model, tokenizer, asked[1], max_new_tokens=12)

def relative_error(got, expected):
    if got.shape != expected.shape:
        return np.inf
    size = max(np.abs(got).max(), np.abs(expected).max())
    return np.abs(got - expected).max() / size if size > 0 else 0.0

with contextlib.redirect_stdout(io.StringIO()) as printed:
    check(relative_error)
found["check"] = printed.getvalue()
print(json.dumps(found))
"""


def zipped(path, *names):
    """A zip file of packages as they are installed, without compiled files."""
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            folder = Path(importlib.util.find_spec(name).origin).parent
            for each in folder.rglob("*"):
                if each.is_file() and each.suffix not in (".so", ".pyd", ".pyc", ".svg", ".png"):
                    file.write(each, each.relative_to(folder.parent).as_posix())
    return path


@pytest.mark.long
@pytest.mark.skipif(not PYODIDE, reason="MINILORA_PYODIDE names no folder with Pyodide")
@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_in_a_browsers_python_tiny_learns_answers_and_is_saved(tmp_path):
    packages, program = zipped(tmp_path / "packages.zip", "minilora", "jinja2", "markupsafe"), tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    browser, here = (
        json.loads(subprocess.run(command, capture_output=True, check=True, timeout=280, cwd=tmp_path).stdout)
        for command in (["node", "--input-type=module", "-e", RUN, packages, program], [sys.executable, program])
    )
    for name in ("losses", "loss"):  # the same training; products add up in another order
        assert browser.pop(name) == pytest.approx(here.pop(name), rel=0.02), name
    assert browser.pop("check").startswith("1.2  ok") and here.pop("check").startswith("1.2  ok")
    assert browser == here and here["off"] and here["answer"] == here["again"] == "Anna Berg owns it."


def test_what_a_browser_installs_has_a_wheel_there():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    needed = map(Requirement, listed)
    browser = {each.name for each in needed if not each.marker or each.marker.evaluate({"sys_platform": "emscripten"})}
    compiled = {"numpy", "matplotlib"}  # Pyodide has them; the others are pure Python
    pure = {"filelock", "jinja2", "platformdirs", "threadpoolctl", "tqdm"}
    assert browser == compiled | pure

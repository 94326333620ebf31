"""What strangers meet first agrees with the package: the citation, the systems and Pythons of the workflows."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_citation_names_the_version_and_licence_of_the_package():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    found = dict(re.findall(r"^(version|license): (\S+)$", citation, re.MULTILINE))
    assert found == {"version": minilora.__version__, "license": PROJECT["license"].removesuffix(" AND CC0-1.0")}


@pytest.mark.skipif(sys.platform != "linux", reason="runs on the machine that builds the release")
def test_the_page_of_a_released_package_needs_no_clone(tmp_path):
    for name in (".github/prepare-release", "README.md", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([tmp_path / ".github/prepare-release", "acme/minilora", "v1.2.3"], check=True)
    page, readme = ((tmp_path / name).read_text("utf-8") for name in ("PACKAGE.md", "README.md"))
    links, before = (re.findall(r'(?:src|srcset)="([^"]+)"|\]\(([^)]+)\)', text) for text in (page, readme))
    at = "https://github.com/acme/minilora"
    paths = ["".join(link).removeprefix(f"{at}/raw/v1.2.3/").removeprefix(f"{at}/blob/v1.2.3/") for link in links]
    assert paths == ["".join(link) for link in before]
    assert all("".join(link).startswith("https://") for link in links)
    assert all("/raw/" in image for image, _ in links if image)  # a page of the site is no picture
    assert all(text in page for text in ("pip install minilora &&", "minilora[lessons]", "'.[test]' && pytest"))
    assert readme == README
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))["project"]
    urls = {"Repository": at, "Changelog": f"{at}/blob/main/CHANGELOG.md"}
    assert project == PROJECT | {"urls": urls, "readme": "PACKAGE.md"}
    assert "graft tests" in (tmp_path / "MANIFEST.in").read_text()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("name", ["minilora/data/legal.jsonl", "minilora/weights/tiny.safetensors", ".ci/run"])
def test_a_clone_on_windows_has_the_bytes_that_were_committed(name, tmp_path):
    """Fingerprints of data and models are of bytes, and git changes the ends of lines there by default."""
    content, file = (ROOT / name).read_bytes(), tmp_path / Path(name).name
    file.write_bytes(content)
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    git = ["git", "-c", "core.autocrlf=true", "-C", str(tmp_path)]
    for words in ("init", "add ."):
        subprocess.run([*git, *words.split()], check=True, capture_output=True)
    file.unlink()
    subprocess.run([*git, "checkout-index", "--all"], check=True, capture_output=True)
    assert file.read_bytes() == content


def test_the_tests_run_on_every_python_that_pip_is_promised_on_every_system():
    workflow = (ROOT / ".github/workflows/tests.yml").read_text("utf-8")
    systems, pythons = (re.search(rf"{name}: \[(.*)\]", workflow)[1].split(", ") for name in ("os", "python"))
    assert {system.partition("-")[0] for system in systems} == {"ubuntu", "macos", "windows"}
    named = [row.rpartition(" ")[2] for row in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", row)]
    assert [version.strip('"') for version in pythons] == named and named[0] in PROJECT["requires-python"]

"""The course that `minilora site --course` writes, in JupyterLite in a headless Chromium, from a plain static server.

Needs the extras site and test-lessons, a Chromium (see tests/browsers.py), and a folder of Pyodide, which the variable
MINILORA_PYODIDE names.
"""

import json
import os

import pytest
from browsers import KEPT, answer_lora_forward, chromium, run_all, served

from minilora.course.copy import notebooks
from minilora.course.plan import LESSONS
from minilora.site.write import write_site

pytest.importorskip("jupyterlite_core", reason="needs pip install '.[site]'")
pytest.importorskip("playwright", reason="needs pip install '.[test-lessons]'")

pytestmark = [pytest.mark.browser, pytest.mark.timeout(2400)]
PYODIDE = os.environ.get("MINILORA_PYODIDE")
# All lessons but that of the real model; those that take minutes only with -m 'browser and slow'.
NAMES = sorted(path.stem for path in notebooks().glob("[0-9]*.ipynb") if not path.stem.startswith("18"))
NAMES = [name if name.startswith("02") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
OPENED = "() => window.jupyterapp?.shell.currentWidget?.content?.widgets?.length > 0"
PATH = "() => window.jupyterapp.shell.currentWidget.context.path"
MINE = """() => window.jupyterapp.serviceManager.contents
    .get('exercises/mine.py', { content: true }).then(file => file.content)"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A page, and the address of the course on a static server, below a folder."""
    if not PYODIDE:
        pytest.skip("needs MINILORA_PYODIDE, a folder of Pyodide")
    folder = tmp_path_factory.mktemp("site") / "below"
    write_site(folder, PYODIDE, course=True)
    path = folder / "course" / "jupyter-lite.json"
    settings = json.loads(path.read_text("utf-8"))
    settings["jupyter-config-data"]["exposeAppInBrowser"] = True  # for the scripts of browsers.py
    path.write_text(json.dumps(settings), "utf-8")
    with served(folder.parent) as root, chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        yield page, f"{root}below/"
        assert [url for url in page.asked if not url.startswith((root, "data:", "blob:"))] == []


def opened(lab, name):
    page, address = lab
    page.goto(f"{address}course/lab/index.html?path={name}")
    page.wait_for_function(OPENED, timeout=120_000)
    return page


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_runs_in_the_browser_without_an_error(lab, name):
    page = opened(lab, f"{name}.ipynb")
    outputs = run_all(page, 1_800_000)
    assert [(output["ename"], output["evalue"]) for output in outputs if output["output_type"] == "error"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("holds" in "".join(output.get("text", "")) for output in outputs)
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def test_an_answer_is_marked_and_is_still_there_after_the_page_was_closed(lab):
    page = opened(lab, "exercises/09_lora.ipynb")
    assert answer_lora_forward(page) == ["9.1  scale is alpha / r, not alpha\n", KEPT]
    page.goto("about:blank")
    page = opened(lab, "exercises/09_lora.ipynb")
    assert "def lora_forward" in page.evaluate(MINE)


def test_the_page_leads_to_the_course_and_to_each_lesson(lab):
    page, address = lab
    for opened_by, name in (("The course", "00_what_can_lora_do"), (LESSONS[9].question, LESSONS[9].name)):
        page.goto(address)
        page.get_by_text("All lessons").click(timeout=300_000)
        assert page.locator("#lessons a").count() == len(LESSONS) - 1  # one needs the real model
        page.get_by_role("link", name=opened_by).click()
        page.wait_for_function(OPENED, timeout=120_000)
        assert page.evaluate(PATH) == f"{name}.ipynb"

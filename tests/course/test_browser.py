"""Four lessons and an exercise in JupyterLab, in a headless Chromium: opened, run from the menu, without an error.

Needs pip install '.[lessons,test-lessons]' and a Chromium: that of the system (`apt-get install chromium`), the one
that the variable CHROMIUM names, or playwright's own (`playwright install chromium`).
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browsers import KEPT, STARTED, answer_lora_forward, chromium, run_all

from minilora.course.exercises import EXERCISES

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

LESSONS = Path(__file__).parents[2] / "lessons"
NAMES = [path.name for number in ("01", "13") for path in LESSONS.glob(f"{number}_*.ipynb")]  # in seconds


@pytest.fixture(scope="module")
def page():
    """A page of a Chromium without a window. What the page itself reports as an error is in `page.errors`."""
    pytest.importorskip("playwright", reason="needs pip install '.[lessons,test-lessons]'")
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that serves a copy of lessons/, as `address.format(path)`."""
    pytest.importorskip("jupyterlab", reason="needs pip install '.[lessons,test-lessons]'")
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(LESSONS, home / "lessons")
    for file in (home / "lessons").rglob("*.ipynb"):  # no output is there before the browser has run the cell
        notebook = json.loads(file.read_text("utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        file.write_text(json.dumps(notebook), "utf-8")
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension"  # no pop-up about news in front of the page
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    own = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
           "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython"}  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, token = free.getsockname()[1], secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.port_retries=0", "--LabApp.expose_app_in_browser=True",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home / 'lessons'}"]  # fmt: skip
    with (home / "log").open("w") as log:
        environment = os.environ | {name: str(home / folder) for name, folder in own.items()}
        server = subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log)
    try:
        for _ in range(300):
            assert server.poll() is None, (home / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?reset&token={token}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize("name", [*NAMES, "exercises/09_lora.ipynb"])
def test_a_notebook_runs_from_the_menu_without_an_error(page, lab, name):
    page.errors.clear()
    page.goto(lab.format(name), wait_until="domcontentloaded")
    outputs = run_all(page)
    assert [output["ename"] for output in outputs if output["output_type"] == "error"] == []
    assert outputs and page.errors == []
    if name.startswith("exercises/"):
        asked = sorted(exercise.number for exercise in EXERCISES.values() if exercise.lesson == 9)
        assert [output["text"] for output in outputs] == [f"{number}  not written yet\n" for number in asked]
    else:
        assert any("image/png" in output.get("data", {}) for output in outputs)
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def test_the_folded_block_of_a_lesson_opens_with_its_code(page, lab):
    page.goto(lab.format("09_lora.ipynb"), wait_until="domcontentloaded")
    page.wait_for_function(STARTED, timeout=120_000)
    page.evaluate("""() => {
        const book = window.jupyterapp.shell.currentWidget.content;
        return book.scrollToItem(book.activeCellIndex = book.widgets.length - 1);
    }""")
    block = page.locator("details", has_text="The same in PyTorch")
    code = block.locator("pre code")
    code.wait_for(state="attached")
    assert not code.is_visible()
    block.locator("summary").click()
    assert code.is_visible() and code.inner_text().startswith("from torch import nn\n")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def test_a_student_answers_an_exercise_wrong_and_then_right_and_it_is_kept(page, lab):
    """The answer is typed into the stub's cell; the cell below it checks."""
    page.goto(lab.format("exercises/09_lora.ipynb"), wait_until="domcontentloaded")
    assert answer_lora_forward(page) == ["9.1  scale is alpha / r, not alpha\n", KEPT]
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")

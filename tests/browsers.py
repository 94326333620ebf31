"""A Chromium without a window, for tests of pages, and what they do with a notebook in JupyterLab."""

import contextlib
import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

FLAGS = ["--no-sandbox", "--disable-dev-shm-usage",  # a container has no user namespaces, and a small /dev/shm
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip


@contextlib.contextmanager
def chromium():
    """The browser: the one that the variable CHROMIUM names, that of the system, or playwright's own; else a skip."""
    from playwright.sync_api import sync_playwright  # which extra brings it, the tests say

    with sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or own
        if not Path(path).exists():
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install chromium")
        with driver.chromium.launch(executable_path=path, args=FLAGS) as browser:
            yield browser


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@contextlib.contextmanager
def served(folder):
    """A plain static server of a folder, as the address that ends in a slash."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


STARTED = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
FINISHED = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const cells = panel.content.model.toJSON().cells.filter(cell => cell.cell_type === 'code');
    const failed = cells.some(cell => cell.outputs.some(output => output.output_type === 'error'));
    const idle = panel.sessionContext.session.kernel.status === 'idle';
    return idle && (failed || cells.every(cell => cell.execution_count)) ? cells : false;
}"""
WRITE = """([start, source]) => {
    const cells = window.jupyterapp.shell.currentWidget.content.widgets;
    const at = cells.findIndex(cell => cell.model.sharedModel.source.includes(start));
    cells[at].model.sharedModel.setSource(source);
    window.jupyterapp.shell.currentWidget.content.activeCellIndex = at;
}"""
FIRST = """() => {
    const book = window.jupyterapp.shell.currentWidget.content;
    book.activeCellIndex = book.widgets.findIndex(cell => cell.model.type === 'code');
}"""
RUN = "() => window.jupyterapp.commands.execute('notebook:run-cell-and-select-next')"
OUTPUT = """() => {
    const panel = window.jupyterapp.shell.currentWidget, cells = panel.content.widgets;
    const cell = cells[panel.content.activeCellIndex - 1].model.toJSON();
    const text = (cell.outputs ?? []).map(output => output.text ?? output.ename ?? '').join('');
    return panel.sessionContext.session.kernel.status === 'idle' && text ? text : false;
}"""
KEPT = "9.1  ok (lora_forward is kept in mine.py)\n"


def run_all(page, timeout=300_000):
    """Run all cells of the notebook that is open, from the menu, and return their outputs. timeout: in ms."""
    page.wait_for_function(STARTED, timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    cells = page.wait_for_function(FINISHED, timeout=timeout, polling=500).json_value()
    return [output for cell in cells for output in cell["outputs"]]


def answer_lora_forward(page):
    """Answer exercise 9.1 wrong and then right, in the stub's cell, and return what the cell below it says to each."""
    page.wait_for_function(STARTED, timeout=120_000)
    page.evaluate(FIRST)
    page.evaluate(RUN)  # makes minilora available
    page.evaluate(WRITE, ["import numpy as np", "import numpy as np\nimport minilora as ml"])
    page.evaluate(RUN)
    said = []
    for scale in ("alpha", "(alpha / len(A))"):
        answer = f"def lora_forward(x, W, A, B, alpha):\n    return x @ W.T + (x @ A.T) @ B.T * {scale}"
        page.evaluate(WRITE, ["def lora_forward", answer])
        page.evaluate(RUN)  # the stub, and then its check
        page.evaluate(RUN)
        said.append(page.wait_for_function(OUTPUT, timeout=60_000, polling=200).json_value())
    return said

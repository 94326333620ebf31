"""A Chromium without a window, for tests of pages."""

import contextlib
import os
import shutil
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

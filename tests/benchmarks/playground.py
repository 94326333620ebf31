"""The playground in a headless Chromium: seconds from opening the page to ten facts of ten, and its memory.

    python tests/benchmarks/playground.py PYODIDE [--rounds 5]

PYODIDE is a folder of Pyodide with its wheel of NumPy. Each round begins with an empty cache. Memory is the resident
set of the browser's largest process, which is the page's, at the end of training. Needs the extra test-lessons, psutil
and a Chromium.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from browsers import chromium, served

from minilora.site.write import write_site


def largest():
    """MB of the largest process below this one."""
    sizes = [each.memory_info().rss for each in psutil.Process().children(recursive=True) if each.is_running()]
    return max(sizes) / 1e6


def opened(address):
    """Seconds until the page is ready and until it knows all facts, and MB."""
    with chromium() as browser:
        page, begin = browser.new_page(), time.perf_counter()
        page.goto(address)
        teach = page.get_by_role("button", name="Teach").and_(page.locator(":enabled"))
        teach.wait_for(timeout=300_000)
        ready = time.perf_counter() - begin
        teach.click()
        page.get_by_text("Taught after").first.wait_for(timeout=300_000)
        score = page.locator("#score-after").inner_text()
        return ready, time.perf_counter() - begin, largest(), score


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pyodide", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{write_site(Path(folder, 'site'), arguments.pyodide) / 1e6:.1f} MB")
        found = []
        with served(Path(folder, "site")) as address:
            for _ in range(arguments.rounds):
                found.append(opened(address))
                print("ready {:.1f} s, taught {:.1f} s, {:.0f} MB, {} right".format(*found[-1]))
    ready, taught, size, _ = zip(*found, strict=True)
    print(f"medians: ready {median(ready):.1f} s, taught {median(taught):.1f} s, {median(size):.0f} MB")


if __name__ == "__main__":
    main()

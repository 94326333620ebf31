"""The page of `minilora site` in a headless Chromium, from a plain static server: it teaches, and is taught.

Needs the extra test-lessons, a Chromium (see tests/browsers.py), and a folder of Pyodide with its wheel of NumPy, which
the variable MINILORA_PYODIDE names.
"""

import contextlib
import os
import re
from pathlib import Path

import pytest
from browsers import chromium, served

import minilora
from minilora.site.write import write_site

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
PYODIDE = os.environ.get("MINILORA_PYODIDE")
ENDED = "() => /^(Taught|Stopped)/.test(document.getElementById('status').textContent)"
WAIT = 300_000  # ms: two cores are shared by other tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not PYODIDE:
        pytest.skip("needs MINILORA_PYODIDE, a folder of Pyodide")
    folder = tmp_path_factory.mktemp("site") / "below"
    write_site(folder, PYODIDE)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with served(folder.parent) as root:
        yield f"{root}below/"


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright", reason="needs pip install '.[test-lessons]'")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(address, browser):
    page = browser.new_page()
    page.complaints, page.asked = [], []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    page.wait_for_function("() => document.getElementById('status').textContent === 'Ready.'", timeout=WAIT)
    yield page
    assert page.complaints == []
    assert all(url.startswith((address, "data:", "blob:")) for url in page.asked)  # nothing leaves the tab


def status(page):
    return page.locator("#status").inner_text()


def teach(page, steps=60):
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_role("button", name="Teach").click()


def said(page, column):
    return [row.locator("td").nth(column).inner_text() for row in page.locator("#rows tr").all()]


def test_a_course_that_was_not_written_is_not_offered(page):
    assert page.locator("#course").is_hidden()


def test_ten_facts_are_learned_saved_and_loaded_again(page, tmp_path):
    teach(page)
    page.wait_for_function(ENDED, timeout=WAIT)
    assert status(page) == "Taught after 60 steps."
    assert page.locator("#score").inner_text() == "0 of 10 → 10 of 10 answered right"
    assert said(page, 3) == said(page, 1) and not set(said(page, 2)) & set(said(page, 1))
    assert "unchanged" in page.locator("#numbers").inner_text()
    assert page.get_by_role("status").inner_text() == "Taught after 60 steps. 10 of 10 answered right."  # read out
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the adapter").click()
    download.value.save_as(tmp_path / "adapter.zip")

    page.get_by_label("Rank r").fill("1")
    teach(page, steps=1)  # another adapter, which knows nothing
    page.wait_for_function(
        "() => document.getElementById('status').textContent.startsWith('Taught after 1 ')", timeout=WAIT
    )
    assert "high" in status(page) and page.locator("#score-after").inner_text() == "0 of 10"
    page.get_by_label("Rank r").fill("8")
    page.get_by_label("Load an adapter").set_input_files(tmp_path / "adapter.zip")
    page.wait_for_function("() => document.getElementById('status').textContent.includes('is loaded')", timeout=WAIT)
    page.get_by_label("Ask something").fill("Who owns the shop?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#asked").get_by_text("adapter: Ada Lark").wait_for(timeout=WAIT)
    page.get_by_label("Adapter on").uncheck()
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_function("() => document.querySelectorAll('#asked p').length === 2", timeout=WAIT)
    assert "Ada Lark" not in page.locator("#asked").inner_text()


def test_it_is_used_by_keyboard(page):
    page.get_by_role("textbox", name="Answer 1", exact=True).focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("Acorn")
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_role("textbox", name="Answer 1", exact=True).focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.getElementById('status').textContent.startsWith('Taught after 2')", timeout=WAIT
    )
    assert said(page, 1)[0] == "Acorn"
    page.get_by_role("button", name="Ten facts").click()


def test_it_can_be_read_on_a_phone_and_printed(page):
    teach(page, steps=2)
    page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Taught')", timeout=WAIT)
    wide = page.viewport_size
    page.set_viewport_size({"width": 360, "height": 640})
    page.evaluate("() => { document.getElementById('status').textContent = 'x'.repeat(200); }")  # as an address is
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    heights = "[...document.querySelectorAll('#curve text')].map((text) => text.getBoundingClientRect().height)"
    assert min(page.evaluate(heights)) > 10
    page.set_viewport_size(wide)
    page.emulate_media(media="print")
    assert page.locator("#rows").is_visible() and page.locator("#curve").is_visible()
    assert page.locator("#teach").is_hidden() and page.locator("#ask").is_hidden()
    page.emulate_media(media="screen")


def test_training_is_stopped_and_the_page_stays_awake(page):
    teach(page, steps=200)
    page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Step 3')", timeout=WAIT)
    assert "Step" not in page.get_by_role("status").inner_text()  # sixty steps are not read out
    assert re.fullmatch(r"Step \d+ of 200, loss [\d.]+, about \d+ s left", status(page))
    other = page.context.browser.new_page()  # somebody looks at another tab meanwhile
    other.bring_to_front()
    page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Step 5')", timeout=WAIT)
    other.close()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function(ENDED, timeout=WAIT)
    assert re.match(r"Stopped after \d+ steps\.", status(page))
    assert page.get_by_role("button", name="Teach").is_enabled()


def test_broken_data_is_told_in_one_line(page, tmp_path):
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    page.get_by_label("Load a file").set_input_files(tmp_path / "mine.csv")
    page.locator("#status.fault").wait_for(timeout=WAIT)
    assert status(page) == "mine.csv:1: expected columns such as question and answer, or text; there is a, b" or (
        status(page).startswith("mine.csv:") and "\n" not in status(page)
    )
    (tmp_path / "mine.csv").write_text("question,answer\nWho?,Me\nWhy <b>?,Because\n")
    page.get_by_label("Load a file").set_input_files(tmp_path / "mine.csv")
    page.wait_for_function("() => document.querySelectorAll('#rows tr').length === 2", timeout=WAIT)
    assert said(page, 0) == ["Who?", "Why <b>?"] and status(page) == "2 rows."


PASTE = """text => {
    const data = new DataTransfer();
    data.setData("text/plain", text);
    const event = new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
    document.querySelector("#rows td").dispatchEvent(event);
}"""


TABLES = [
    "question,answer\nA?,B\nC?,D",
    "question\tanswer\nA?\tB\nC?\tD",
    '[{"question": "A?", "answer": "B"},\n{"question": "C?", "answer": "D"}]',
]


@pytest.mark.parametrize("text", TABLES)
def test_a_pasted_table_fills_the_table(page, text):
    page.evaluate(PASTE, text)
    page.wait_for_function("() => document.querySelector('#rows td').textContent === 'A?'", timeout=WAIT)
    assert (said(page, 0), said(page, 1)) == (["A?", "C?"], ["B", "D"])
    page.get_by_role("button", name="Ten facts").click()


def test_a_domain_fills_the_table(page):
    page.get_by_role("button", name="Law").click()
    page.wait_for_function("() => document.querySelectorAll('#rows tr').length === 5", timeout=WAIT)
    assert "offer" in said(page, 0)[0]


def test_a_lack_of_memory_is_told_in_one_line(page, address, folder):
    other = page.context.browser.new_page()
    worker = (folder / "worker.js").read_text()
    fault = "(() => { throw new RangeError('Array buffer allocation failed'); })()"
    changed = worker.replace("playground.step()", fault)
    other.route("**/worker.js", lambda route: route.fulfill(body=changed, content_type="text/javascript"))
    other.goto(address)
    other.get_by_role("button", name="Teach").and_(other.locator(":enabled")).click(timeout=WAIT)
    other.locator("#status.fault").wait_for(timeout=WAIT)
    assert status(other) == "out of memory: use a lower rank, fewer rows, or shorter answers"
    assert changed != worker and other.get_by_role("button", name="Teach").is_enabled()
    other.close()


def test_a_changed_file_of_pyodide_is_refused(page, address, folder):
    path = folder / "pyodide" / "pyodide.mjs"
    whole = path.read_bytes()
    path.write_bytes(whole + b"\n")
    other = page.context.browser.new_page()
    other.goto(address)
    other.locator("#status.fault").wait_for(timeout=WAIT)
    assert "pyodide.mjs could not be loaded, or is not the file that was expected" in status(other)
    path.write_bytes(whole)
    other.close()


def test_enter_that_ends_the_writing_of_a_japanese_word_does_not_teach(browser):
    with served(Path(minilora.__file__).parent / "site") as root:
        page = browser.new_page()
        page.goto(f"{root}index.html")
        page.get_by_role("button", name="Add a row").click()
        clicks = page.evaluate("""() => {
            const teach = document.getElementById("teach");
            let clicks = 0;
            teach.disabled = false;
            teach.addEventListener("click", event => { clicks += 1; event.stopImmediatePropagation(); }, true);
            return [{ isComposing: true }, { keyCode: 229 }, {}].map(how => {  // 229: Safari's
                const key = new KeyboardEvent("keydown", { key: "Enter", bubbles: true, ...how });
                document.querySelector("#rows td").dispatchEvent(key);
                return clicks;
            });
        }""")
        assert clicks == [0, 0, 1]
        assert page.locator("#rows td").first.evaluate("cell => getComputedStyle(cell).unicodeBidi") == "plaintext"


# Stands in for worker.js: it learns nothing, and takes 20 ms for a step.
WORKER = """
    let left = 0, steps = 0;
    const about = { base: 1000, adapter: 10, unchanged: true };
    function step() {
        if (left-- > 0) {
            postMessage({ did: "step", done: steps - left, steps, loss: 1, seconds: .02 });
            return setTimeout(step, 20);
        }
        postMessage({ did: "answers", adapter: true, answers: ["Fernwhistle"] });
        postMessage({ did: "taught", stopped: false, ...about });
    }
    const jobs = {
        start: () => START && postMessage({ did: "started", course: [], ...about }),
        teach: ({ steps: all }) => { left = steps = all; postMessage({ did: "began", ...about }); step(); },
        stop: () => { left = 0; },
        rows: ({ name }) => postMessage({ did: "rows", name, rows: [["A?", "B"]] }),
        ask: ({ question }) => postMessage({ did: "asked", question, adapter: true, base: "", answer: "1".repeat(99) }),
    };
    onmessage = ({ data }) => jobs[data.do](data);
"""


@contextlib.contextmanager
def quick(browser, ready=True, **screen):
    """The page with that worker, which may never get ready."""
    with served(Path(minilora.__file__).parent / "site") as root, browser.new_context(**screen) as context:
        page = context.new_page()
        worker = WORKER.replace("START", str(ready).lower())
        page.route("**/worker.js", lambda route: route.fulfill(body=worker, content_type="text/javascript"))
        page.goto(f"{root}index.html")
        if ready:
            page.locator("#status", has_text="Ready.").wait_for()
        yield page


@pytest.mark.parametrize("width", [320, 1280])
def test_a_field_is_a_text_box_in_a_cell_of_the_table_and_an_empty_one_has_a_place(browser, width):
    with quick(browser, viewport={"width": width, "height": 700}) as page:
        page.get_by_role("button", name="Add a row").click()
        assert page.evaluate("document.activeElement.ariaLabel") == "Question 11"
        page.keyboard.type("Who?")
        assert said(page, 0)[-1] == "Who?"
        assert page.locator("#rows tr").last.locator("> [role]").count() == 0  # a row holds cells
        for field in page.locator("#rows [role=textbox]").all():
            assert field.bounding_box()["height"] >= 24
        if width > 640:  # a click anywhere in the cell is one into its field
            tall = page.locator("#rows tr").nth(9)
            tall.locator("[role=textbox]").first.evaluate("field => { field.textContent = 'x '.repeat(300); }")
            box = tall.locator("td").nth(1).bounding_box()
            page.mouse.click(box["x"] + 9, box["y"] + box["height"] - 9)
            assert page.evaluate("document.activeElement.ariaLabel") == "Answer 10"
        else:
            answer = page.locator("#rows tr").last.locator("td").nth(1)
            assert answer.evaluate("cell => getComputedStyle(cell, '::before').content") != "none"  # the column's name


def test_the_keyboard_stays_with_the_button_that_teaches_or_stops(browser):
    with quick(browser) as page:
        page.get_by_role("button", name="Teach").press("Enter")
        page.wait_for_function("() => document.activeElement.id === 'stop'")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.activeElement.id === 'teach'")
        page.get_by_label("Steps", exact=True).fill("3")
        page.get_by_label("Answer 1", exact=True).press("Enter")
        page.locator("#status", has_text="Taught after 3 steps").wait_for()
        assert page.evaluate("document.activeElement.ariaLabel") == "Answer 1"


def test_what_cannot_be_done_during_loading_or_training_is_not_offered(browser):
    names = ["Law", "Ask", "Load a file", "Load an adapter", "Download the adapter"]
    controls = "names => names.map(name => [...document.querySelectorAll('button, label:has(input)')].find(" \
        "one => one.textContent.trim() === name)).map(one => (one.control ?? one).disabled)"  # fmt: skip
    for ready in (False, True):
        with quick(browser, ready) as page:
            if ready:
                assert page.evaluate(controls, names) == [False] * 4 + [True]  # there is no adapter yet
                page.get_by_label("Steps", exact=True).fill("500")
                page.get_by_role("button", name="Teach").click()
                page.locator("#result").wait_for()
            assert page.evaluate(controls, names) == [True] * 5
            page.evaluate(PASTE, TABLES[0])
            assert page.get_by_role("status").inner_text() == "A table can be pasted when this is done."
            assert page.locator("#rows tr").count() == 10
            if ready:
                page.get_by_role("button", name="Stop").click()
                page.locator("#status", has_text="Taught").wait_for()
                assert page.evaluate(controls, names) == [False] * 5


def test_a_page_that_could_not_be_loaded_goes_on_saying_so(browser):
    with quick(browser, ready=False) as page:
        page.evaluate("document.getElementById('status').className = 'fault'")
        page.locator("#status.fault").wait_for()
        page.evaluate(PASTE, TABLES[0])
        assert status(page) == "Loading Python ..."


def test_the_source_that_is_pressed_is_the_one_of_the_table(browser):
    with quick(browser) as page:
        pressed = page.locator("[aria-pressed=true]")
        assert pressed.all_inner_texts() == ["Ten facts of a shop"]
        page.get_by_role("button", name="Law").click()
        page.locator("#status", has_text="1 rows").wait_for()
        assert pressed.all_inner_texts() == ["Law"]
        page.get_by_role("button", name="Ten facts").click()
        assert pressed.all_inner_texts() == ["Ten facts of a shop"]
        page.evaluate(PASTE, TABLES[0])
        page.locator("#rows", has_text="A?").wait_for()
        assert pressed.count() == 0


def test_what_is_pressed_is_seen_in_forced_colours_and_what_is_printed_from_dark_ones(browser):
    with quick(browser, forced_colors="active") as page:
        ground = "name => getComputedStyle(document.querySelector(`[name=${name}]`)).backgroundColor"
        assert page.evaluate(ground, "facts") != page.evaluate(ground, "legal")
        assert page.evaluate("getComputedStyle(document.getElementById('teach')).borderTopStyle") == "solid"
    with quick(browser, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(31, 30, 28)"


def test_an_answer_without_spaces_wraps(browser):
    with quick(browser, viewport={"width": 320, "height": 600}) as page:
        page.get_by_label("Steps", exact=True).fill("1")
        page.get_by_role("button", name="Teach").click()
        page.locator("#status", has_text="Taught").wait_for()
        page.get_by_label("Ask something").fill("w" * 100)
        page.get_by_role("button", name="Ask", exact=True).click()
        page.locator("#asked", has_text="1111").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

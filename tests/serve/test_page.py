"""The page, in a headless Chromium, as somebody would use it: by mouse, by keyboard, on a phone, in the dark.

Needs pip install '.[test-serve]' and a Chromium: that of the system (`apt-get install chromium`), the one that the
variable CHROMIUM names, or playwright's own (`playwright install chromium`).
"""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
from browsers import chromium
from serving import serving

from minilora.data.fields import FieldTask
from minilora.data.labels import LabelTask
from minilora.data.passages import Handbook, Passage

pytestmark = pytest.mark.browser

DONE = "() => document.querySelector('article') && !document.querySelector('.writes')"
READY = "() => document.activeElement.id === 'question'"  # Chromium complains of a focus before its own
GONE = "The server does not answer. Is it still running?"
CONTRAST = """selector => {  // as WCAG 2.2 defines it, of letters and what is behind them
    const numbers = color => color.match(/[\\d.]+/g).map(Number);
    const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
    const ground = element => {
        const own = getComputedStyle(element).backgroundColor;
        return numbers(own)[3] === 0 && element.parentElement ? ground(element.parentElement) : own;
    };
    const seen = [...document.querySelectorAll(selector)].filter(element => element.checkVisibility());
    return seen.map(element => {
        const both = [getComputedStyle(element).color, ground(element)].map(numbers).map(light);
        return [element.textContent.trim().slice(0, 20), (Math.max(...both) + .05) / (Math.min(...both) + .05)];
    });
}"""
LISTEN = """() => {
    window.heard = [];
    const region = document.getElementById("status");
    new MutationObserver(() => heard.push(region.textContent)).observe(region, { childList: true });
}"""

HANGING = """() => {  // each answer begins with "half", and then comes no more; `left`: the latest of these streams
    const real = window.fetch;
    window.asked = [];
    window.fetch = async (url, how) => {
        if (!how?.body) return real(url);
        asked.push(JSON.parse(how.body).messages.map(message => message.content));
        const choice = { delta: { content: "half" }, finish_reason: null };
        const piece = JSON.stringify({ choices: [choice], usage: { completion_tokens: 1 }, seconds: 0.1 });
        return new Response(new ReadableStream({ start(stream) {
            window.left = stream;
            stream.enqueue(new TextEncoder().encode(`data: ${piece}\\n\\n`));
            how.signal.addEventListener("abort", () => stream.error(how.signal.reason));
        } }));
    };
}"""


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright", reason="needs pip install '.[test-serve]'")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(shop):
    with serving(shop, shop, default_limit=64) as served:
        yield served
        assert served.said == []


@pytest.fixture
def page(browser, served, request):
    """The page, opened with what the test's parameter says of the screen. It may complain of nothing."""
    context = browser.new_context(**getattr(request, "param", {}))
    page = context.new_page()
    page.complaints, page.asked = [], []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(served.address)
    page.get_by_role("checkbox", name="legal").wait_for()
    page.wait_for_function(READY)
    yield page
    assert page.complaints == []
    assert all(url.startswith((served.address, "data:")) for url in page.asked)
    context.close()


def ask(page, question="hello"):
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    page.wait_for_function(DONE)


def texts(page):
    """What each card says, by its title."""
    return {
        card.get_attribute("aria-label"): card.locator(".text").inner_text() for card in page.locator("article").all()
    }


def test_an_answer_shows_its_passage_folded(page, served, monkeypatch):
    monkeypatch.setattr(served.app, "handbook", Handbook([Passage("birds/owl", "An owl says <b>hello</b>.")], "birds"))
    ask(page)
    passage = page.locator("article details").first
    assert passage.locator("summary").inner_text() == "passage birds/owl"
    assert not passage.get_by_text("An owl says").is_visible()
    passage.locator("summary").click()
    assert passage.get_by_text("An owl says <b>hello</b>.").is_visible()


def test_a_text_in_arabic_or_hebrew_begins_on_the_right_and_another_on_the_left(page):
    side = """element => {
        const range = document.createRange(), all = element.getBoundingClientRect();
        range.selectNodeContents(element);
        const text = range.getBoundingClientRect();
        return text.left - all.left > all.right - text.right;
    }"""
    for question, right in (("ما هي مدة الإرجاع؟", True), ("כמה?", True), ("hello", False), ("返品は？", False)):
        ask(page, question)
        assert page.locator(".asked").first.evaluate(side) is right, question
        for of in (".text", "textarea"):
            place = page.locator(of).first
            assert place.evaluate("element => getComputedStyle(element).unicodeBidi") == "plaintext"
        page.get_by_role("button", name="New conversation").click()


def test_a_question_is_answered_by_base_and_adapters_side_by_side(page, served):
    ask(page)
    expected = {
        name: served.ask(None if name == "base" else name, max_new_tokens=64)[0] for name in served.engine.versions
    }
    assert list(expected) == ["base", "legal", "support"]
    shown = {name: " ".join(text.split()) for name, text in texts(page).items()}
    assert shown == {name: " ".join(text.split()) for name, text in expected.items()}
    assert page.get_by_role("heading", name="hello").is_visible()
    counts = r"^\d+ tokens? · \d+(\.\d)? tokens/s · first after \d+\.\d\d\ss"
    for card in page.locator("article").all():
        assert re.search(counts, card.locator(".counts").inner_text())
    tops = {card.bounding_box()["y"] for card in page.locator("article").all()}
    assert len(tops) == 1  # side by side


def test_two_are_mixed_with_a_slider(page, served):
    page.get_by_role("switch", name="Mix two adapters").check()
    slider = page.get_by_role("slider", name="Share of the first adapter")
    slider.fill("70")
    assert slider.get_attribute("aria-valuetext") == "70 % legal, 30 % support"
    ask(page)
    mixed = served.ask({"legal": 0.7, "support": 0.3}, max_new_tokens=64)[0]
    assert " ".join(texts(page)["legal + support"].split()) == " ".join(mixed.split())


def test_everything_is_reached_and_done_by_keyboard(page):
    assert page.evaluate("document.activeElement.id") == "question"
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.value || document.activeElement.innerText"))
        if page.evaluate("document.activeElement.type") == "checkbox":
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none"
    assert {"base", "legal", "support", "Ask", "Settings"} <= reached
    page.get_by_role("switch").focus()
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.locator("#shares").inner_text() == "55 % legal, 45 % support"
    page.get_by_label("Question", exact=True).focus()
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    assert page.get_by_label("Question", exact=True).input_value() == "a\nb" and not page.locator("article").count()


@pytest.mark.parametrize("composing", [{"isComposing": True}, {"keyCode": 229}])  # 229: Safari
def test_keys_that_end_a_composition_neither_ask_nor_stop(page, composing):
    page.evaluate(HANGING)
    question = page.get_by_label("Question", exact=True)
    press = "(field, how) => field.dispatchEvent(new KeyboardEvent('keydown', { bubbles: true, ...how }))"
    question.fill("か")
    question.evaluate(press, {"key": "Enter", **composing})
    assert not page.locator("article").count()
    begin(page, "hello")
    question.evaluate(press, {"key": "Escape", **composing})
    page.wait_for_timeout(50)
    assert page.locator(".writes").count() == 3
    question.evaluate(press, {"key": "Escape"})
    page.wait_for_function(DONE)


def test_a_screen_reader_hears_each_answer_once_and_whole(page):
    page.evaluate(LISTEN)
    assert page.locator("#status").get_attribute("role") == "status"
    ask(page)
    heard = page.evaluate("window.heard")
    assert heard[0] == "3 answers are on their way." and len(heard) == 4
    assert sorted(line.split()[0] for line in heard[1:]) == ["base", "legal", "support"]
    for field in page.locator("input, textarea, select").all():
        assert field.evaluate("field => field.labels?.length || field.ariaLabel"), field


def test_a_screen_reader_hears_of_a_mix_when_it_changes_and_of_answers_that_are_stopped(page):
    page.evaluate(HANGING)
    page.evaluate(LISTEN.replace('"status"', '"shares"'))
    page.get_by_role("switch").check()
    for name in ("base", "support"):
        page.get_by_role("checkbox", name=name).uncheck()
    page.get_by_label("Question", exact=True).press_sequentially("hello")
    assert page.evaluate("window.heard") == []
    page.get_by_role("slider").press("ArrowRight")
    assert page.evaluate("window.heard") == ["55 % legal, 45 % support"]
    page.get_by_role("switch").uncheck()
    begin(page, "hello")
    page.keyboard.press("Escape")
    page.wait_for_function(DONE)
    assert page.get_by_role("status").inner_text() == "legal stopped after 1 token"


def test_an_answer_is_stopped_and_its_place_is_free(page, served):
    page.locator("summary").click()
    page.get_by_label("Maximum tokens").fill("900")
    page.get_by_label("Temperature").fill("2")
    for _ in range(6):  # an answer that ends by itself, before it is stopped, is followed by another
        page.get_by_label("Question", exact=True).fill("hello")
        page.keyboard.press("Enter")
        page.wait_for_function(f"() => document.querySelector('article .text')?.textContent.length > 5 || ({DONE})()")
        page.keyboard.press("Escape")
        page.wait_for_function(DONE)
        served.until(running=0, waiting=0)
        if stopped := any("stopped" in text for text in page.locator(".counts").all_inner_texts()):
            break
    assert stopped


def test_what_goes_wrong_stands_where_the_answer_would(page):
    page.locator("summary").click()
    page.get_by_label("Maximum tokens").fill("1024")
    ask(page)
    assert all("at most 1,024 fit" in text for text in texts(page).values())
    assert page.locator(".failed").count() == 3
    page.complaints.clear()  # the browser reports each 400


def test_an_answer_is_text_and_never_markup(page, served, monkeypatch):
    evil = "<img src=x onerror=alert(1)><b>bold</b>"
    monkeypatch.setattr(served.engine.tokenizer, "decode", lambda ids: evil * len(ids))
    ask(page, "<i>question</i>")
    assert {text.replace(evil, "") for text in texts(page).values()} == {""} and evil in texts(page)["base"]
    assert not page.locator("main img, main b, main i").count()
    assert page.get_by_role("heading", name="<i>question</i>").is_visible()


def test_adapters_that_come_are_found_when_the_page_is_looked_at_again(page, served, shop):
    page.get_by_role("checkbox", name="support").uncheck()
    served.engine.call(lambda: served.engine.add_adapter("law", shop / "legal")).result(30)
    try:
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.get_by_role("checkbox", name="law").wait_for()
        assert not page.get_by_role("checkbox", name="support").is_checked()
    finally:
        served.engine.call(lambda: served.engine.remove_adapter("law")).result(30)


def test_a_server_that_is_back_is_not_said_to_be_gone(page):
    told = page.locator("#what").inner_text()
    page.route("**/v1/models", lambda route: route.abort())
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.locator("#what", has_text=GONE).wait_for()
    page.unroute("**/v1/models")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.get_by_text(told).wait_for()
    page.complaints.clear()  # the browser reports what was not answered


BUSY = {"status": 503, "json": {"error": {"message": "the queue is full", "code": None}}}
PROXY = {"status": 502, "body": "<html>Bad gateway</html>"}
OTHER = {"status": 504, "json": {"detail": "Gateway timeout"}}


@pytest.mark.parametrize(("response", "told"), [(BUSY, "the queue is full"), (PROXY, GONE), (OTHER, GONE)])
def test_what_a_server_or_its_proxy_says_instead_of_an_answer_is_said_and_the_question_is_left(page, response, told):
    page.route("**/v1/**", lambda route: route.fulfill(**response))
    ask(page, "a long question")
    assert set(texts(page).values()) == {told}
    assert page.get_by_label("Question", exact=True).input_value() == "a long question"  # to ask again
    page.locator("#what", has_text=told).wait_for()
    assert page.get_by_role("checkbox").count() == 3
    page.unroute("**/v1/**")
    ask(page, "again")
    page.locator("#what", has_text="2 adapters").wait_for()
    assert page.get_by_label("Question", exact=True).input_value() == ""
    page.complaints.clear()  # the browser reports each status


def test_a_page_that_found_no_server_finds_it_when_it_is_asked(page):
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    page.locator("#what", has_text=GONE).wait_for()
    assert page.get_by_role("status").inner_text() == GONE
    page.unroute("**/v1/models")
    page.get_by_label("Question", exact=True).fill("hello")
    page.keyboard.press("Enter")
    page.get_by_role("checkbox", name="legal").wait_for()
    assert page.get_by_label("Question", exact=True).input_value() == "hello"
    page.complaints.clear()  # the browser reports what was not answered


def test_an_adapter_that_has_gone_is_offered_no_longer(page, served):
    versions = served.engine.versions
    served.engine.versions = {name: version for name, version in versions.items() if name != "support"}
    try:
        ask(page)
        assert "does not exist" in texts(page)["support"]
        assert page.get_by_label("Question", exact=True).input_value() == ""  # others have answered it
        page.get_by_role("checkbox", name="support").wait_for(state="detached")
    finally:
        served.engine.versions = versions
    page.complaints.clear()  # the browser reports the 404


def sent(page):
    """The bodies of the questions that the page sends from now on, by model."""
    bodies = {}

    def keep(request):
        if request.method == "POST":
            bodies[json.loads(request.post_data)["model"]] = json.loads(request.post_data)

    page.on("request", keep)
    return bodies


def test_the_next_question_continues_the_conversation_until_a_new_one_begins(page):
    bodies = sent(page)
    ask(page, "hello")
    first = texts(page)
    page.get_by_role("checkbox", name="base").uncheck()
    ask(page, "What is a lien?")
    assert page.get_by_role("heading", level=2).all_inner_texts() == ["What is a lien?", "hello"]  # the latest first
    page.get_by_role("checkbox", name="base").check()
    ask(page, "x")
    assert page.locator("article").count() == 8
    for name, questions in (("legal", ["hello", "What is a lien?", "x"]), ("base", ["hello", "x"])):
        said = bodies[name]["messages"]
        assert [message["content"] for message in said if message["role"] == "user"] == questions
        assert said[1]["role"] == "assistant" and said[1]["content"].split() == first[name].split()
        assert bodies[name]["max_tokens"] == 64  # the server's default: that much is free for the answer
    page.get_by_role("button", name="New conversation").click()
    assert not page.locator("article").count()
    ask(page, "hello")
    assert texts(page) == first and len(bodies["legal"]["messages"]) == 1


def begin(page, question):
    """Ask, where answers hang, and wait until each has begun."""
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    page.get_by_role("heading", level=2, name=question).wait_for()
    cards = "document.querySelector('.answers').querySelectorAll('.text')"
    page.wait_for_function(f"() => [...{cards}].every(text => text.textContent)")


def test_a_question_that_interrupts_an_answer_continues_from_what_was_said_and_not_from_a_fault(page):
    page.evaluate(HANGING)
    for name in ("base", "support"):
        page.get_by_role("checkbox", name=name).uncheck()
    begin(page, "first")
    begin(page, "second")
    assert page.evaluate("asked.at(-1)") == ["first", "half", "second"]
    page.get_by_label("Question", exact=True).fill("third")
    page.evaluate("left.error(new TypeError('network error'))")
    page.locator(".failed").wait_for()
    assert page.get_by_label("Question", exact=True).input_value() == "third"  # which "second" does not replace
    begin(page, "third")
    assert page.evaluate("asked.at(-1)") == ["first", "half", "third"]


def test_the_oldest_turns_are_left_out_of_a_conversation_that_no_longer_fits(page):
    for name in ("base", "support"):
        page.get_by_role("checkbox", name=name).uncheck()
    bodies = sent(page)
    for i in range(4):
        ask(page, f"{i}" + "x" * 200)
    questions = [message["content"][0] for message in bodies["legal"]["messages"] if message["role"] == "user"]
    assert questions in (["2", "3"], ["1", "2", "3"]) and page.locator(".failed").count() == 0
    page.complaints.clear()  # the browser reports each 400


def test_the_settings_are_sent_and_left_to_the_server_where_they_are_empty(page):
    bodies = sent(page)
    ask(page)
    assert bodies["legal"]["max_tokens"] is None and bodies["legal"]["temperature"] == 0
    page.locator("summary").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Maximum tokens").fill("7")
    page.get_by_label("Temperature").fill("0.5")
    ask(page)
    assert (bodies["legal"]["max_tokens"], bodies["legal"]["temperature"]) == (7, 0.5)
    assert bodies["legal"]["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("way", "field", "wrong"),
    [("Enter", "Maximum tokens", "0"), ("Ask", "Temperature", "5"), ("What is a lien?", "Maximum tokens", "0")],
)
def test_a_wrong_setting_is_shown_where_it_is_and_nothing_is_sent(page, way, field, wrong):
    bodies, setting = sent(page), page.get_by_label(field)
    page.locator("summary").click()
    setting.fill(wrong)
    page.locator("summary").click()
    question = page.get_by_label("Question", exact=True)
    question.fill("hello")
    if way == "Enter":
        question.press("Enter")
    else:
        page.get_by_role("button", name=way, exact=True).click()
    page.wait_for_function("() => document.activeElement.type === 'number'")
    assert setting.is_visible() and not page.locator("article").count() and question.input_value()
    setting.fill("0.33" if field == "Temperature" else "3")
    question.press("Enter")
    page.wait_for_function(DONE)
    assert bodies["legal"]["temperature"] == (0.33 if field == "Temperature" else 0)


def test_what_is_missing_before_a_question_can_be_asked_can_be_seen(page):
    question = page.get_by_label("Question", exact=True)
    question.fill("  ")
    question.press("Enter")
    assert question.input_value() == "" and question.evaluate("field => field === document.activeElement")
    for box in page.get_by_role("checkbox").all():
        box.uncheck()
    assert page.get_by_role("group", name="Who answers: choose at least one").is_visible()
    question.fill("hello")
    question.press("Enter")
    assert question.input_value() == "hello" and not page.locator("article").count()
    page.get_by_role("checkbox", name="legal").check()
    assert page.locator("#who").inner_text() == "Who answers"


def test_a_long_text_is_pasted_whole(page):
    for name in ("Question", "System prompt"):
        field = page.get_by_label(name, exact=True)
        field.evaluate("field => { field.closest('details')?.setAttribute('open', ''); field.focus(); }")
        page.keyboard.insert_text("x" * 20_000)
        assert len(field.input_value()) == 20_000
    page.get_by_label("System prompt").fill("")
    page.get_by_label("Question", exact=True).press("Enter")
    page.wait_for_function(DONE)
    assert all("the conversation " in text for text in texts(page).values())  # has too many tokens
    page.complaints.clear()  # the browser reports each 400


def test_a_server_that_is_gone_is_said_in_a_sentence(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page)
    assert set(texts(page).values()) == {GONE}
    page.unroute("**/v1/chat/completions")
    bodies = sent(page)
    ask(page, "again")
    assert [message["content"] for message in bodies["legal"]["messages"]] == ["again"]  # no answer, no turn
    page.complaints.clear()  # the browser reports what was not answered


def test_what_the_server_notes_of_its_models_is_shown(page, served):
    assert not page.locator("#note").is_visible()
    versions = served.engine.versions
    served.engine.versions = versions | {"base": replace(versions["base"], note="tiny is a toy")}
    served.engine.versions["legal"] = replace(versions["legal"], system="You are a lawyer.")
    try:
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.get_by_text("Tiny is a toy.").wait_for()
        assert page.locator("#system").get_attribute("placeholder") == "each adapter's own"
    finally:
        served.engine.versions = versions


@pytest.fixture(scope="module")
def skilled(shop, tmp_path_factory):
    """The shop, whose adapters were trained on labels and on fields: its address, and its engine."""
    folder = tmp_path_factory.mktemp("skilled")
    shutil.copytree(shop, folder, dirs_exist_ok=True)
    schema = {"properties": {"item_name": {"type": ["string", "null"]}, "tags": {"type": "array"},
                             "kind": {"enum": ["new", "old"]}}}  # fmt: skip
    for name, task in (("legal", LabelTask.of(["bill", "billing", "parcel", "x"])), ("support", FieldTask.of(schema))):
        record = json.loads((folder / name / "minilora.json").read_text())
        (folder / name / "minilora.json").write_text(json.dumps(record | {"data": task.entry()}))
    with serving(folder, folder, default_limit=64) as served:
        yield served


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_message_gets_its_label_with_odds_and_its_fields(browser, skilled, scheme):
    with browser.new_context(color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(skilled.address)
        page.get_by_role("checkbox", name="legal").wait_for()
        assert not page.get_by_role("switch").is_visible()  # skills are not mixed
        bodies = sent(page)
        page.get_by_role("button", name="A message to sort").click()
        page.wait_for_function(DONE)
        message = bodies["legal"]["messages"][-1]["content"]
        assert bodies.keys() == {"legal", "support"} and "tent" in message
        talk = [{"role": "user", "content": message}]
        fields = {"model": "legal", "messages": talk, "logprobs": True, "top_logprobs": 3}
        told = json.loads(skilled.send("POST", "/v1/chat/completions", fields)[2])["choices"][0]
        odds = told["logprobs"]["content"][0]["top_logprobs"]
        card = page.get_by_role("article", name="legal")
        assert card.locator("dt").all_inner_texts() == [one["token"] for one in odds]
        assert card.locator("dd").all_inner_texts()[1::2] == [f"{100 * math.exp(one['logprob']):.0f} %" for one in odds]
        fields = {"model": "support", "messages": talk, "max_tokens": 64}
        told = json.loads(skilled.send("POST", "/v1/chat/completions", fields)[2])["choices"][0]
        answer = json.loads(told["message"]["content"])
        card = page.get_by_role("article", name="support")
        assert card.locator("dt").all_inner_texts() == ["item name", "tags", "kind"]
        tags = " \u00b7 ".join(answer["tags"]) or "not said"
        shown = [answer["item_name"] or "not said", tags, answer["kind"]]
        assert [text.strip() for text in card.locator("dd").all_inner_texts()] == [text.strip() for text in shown]
        ratios = page.evaluate(CONTRAST, "dt, dd")
        assert len(ratios) > 8 and all(ratio >= 4.5 for text, ratio in ratios), ratios
        ask(page, "again")
        assert len(bodies["support"]["messages"]) == 1  # a skill looks at the message alone
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def mocked(page, answers, **models):
    """The page with the models of these names, each an entry's fields, whose answers are these: text or label."""

    def answer(route):
        said = answers[json.loads(route.request.post_data)["model"]]
        choice = {"delta": {"content": str(said)}, "finish_reason": "stop"}
        if isinstance(said, dict):
            odds = [{"token": label, "logprob": math.log(share)} for label, share in said.items()]
            choice["logprobs"] = {"content": [{"top_logprobs": odds}]}
        event = {"choices": [choice], "usage": {"completion_tokens": 1}, "seconds": 0.1}
        route.fulfill(body=f"data: {json.dumps(event)}\n\n")

    usual = {"size_bytes": 311_296, "system": None, "note": None, "labels": None, "schema": None}
    data = [usual | {"id": name} | fields for name, fields in {"base": {}, **models}.items()]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": data, "max_tokens": 64}))
    page.route("**/v1/chat/completions", answer)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.get_by_role("checkbox", name=list(models)[-1] if models else "base", exact=False).wait_for()


@pytest.mark.parametrize("page", [{"viewport": {"width": 320, "height": 600}}], indirect=True)
def test_long_names_of_adapters_labels_and_fields_wrap(page):
    fields, labels = "f" * 64, "l" * 64
    answers = {fields: json.dumps({"w" * 60: "v" * 80}), labels: {"m" * 70: 0.7, "two words": 0.2}}
    mocked(
        page, answers, **{fields: {"schema": {}}, labels: {"labels": ["x"]}}, **{f"{i}{'a' * 63}": {} for i in range(9)}
    )
    page.get_by_role("switch").check()
    for box in page.get_by_role("checkbox").all():
        box.set_checked(box.input_value() in (fields, labels))
    page.get_by_role("switch").uncheck()
    ask(page)
    assert page.locator("dt").count() == 3
    page.get_by_role("switch").check()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for text in page.locator("dt, dd, .chip span").all():  # none is squeezed into a column of letters
        assert text.bounding_box()["width"] > 30, text.inner_text()


def test_what_is_not_said_in_a_list_is_said_to_be_so_and_a_base_alone_has_no_system_prompt(page):
    mocked(page, {"fields": '{"tags": ["a", null, false], "price": 0}'}, fields={"schema": {}})
    page.get_by_role("checkbox", name="base").uncheck()
    page.get_by_role("checkbox", name="fields").check()
    ask(page)
    assert page.locator("dd").all_inner_texts() == ["a \u00b7 not said \u00b7 false", "0"]
    mocked(page, {})
    page.get_by_role("checkbox", name="fields").wait_for(state="detached")
    assert page.locator("#system").get_attribute("placeholder") == "none"


SCREENS = {"wide": {}, "dark": {"color_scheme": "dark"}, "phone": {"viewport": {"width": 390, "height": 844}}}
SCREENS["narrow"] = {"viewport": {"width": 320, "height": 600}, "color_scheme": "dark"}


@pytest.mark.parametrize("page", SCREENS.values(), ids=SCREENS, indirect=True)
def test_it_fits_and_reads_well_on_every_screen(page):
    page.get_by_role("switch").check()
    ask(page, "hello " * 20)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ratios = page.evaluate(CONTRAST, "h1, h2, h3 span, p, .text, label, legend, summary, button, .size, output")
    assert len(ratios) > 20 and all(ratio >= 4.5 for text, ratio in ratios), ratios
    for control in page.locator(".chip, .send, select").all():
        assert control.bounding_box()["height"] >= 44
    page.emulate_media(media="print")
    assert (
        page.evaluate("getComputedStyle(document.body).color") == "rgb(31, 30, 28)"
    )  # paper is white, in the dark too
    assert page.locator("article").first.is_visible() and page.locator("form").is_hidden()


@pytest.mark.parametrize("page", [{"forced_colors": "active"}], indirect=True)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_focus_and_states_are_seen_in_forced_colours(page, scheme):
    page.emulate_media(color_scheme=scheme, forced_colors="active")
    assert page.evaluate("matchMedia('(forced-colors: active)').matches")
    style = "([selector, pseudo, name]) => getComputedStyle(document.querySelector(selector), pseudo)[name]"
    assert page.evaluate(style, [".box", None, "outlineStyle"]) == "solid"  # the question has the focus
    assert page.evaluate(style, [".send", None, "borderTopStyle"]) == "solid"
    seen = []
    for on in (False, True):
        page.get_by_role("switch").set_checked(on)
        seen.append([page.evaluate(style, ["#mixing", pseudo, "backgroundColor"]) for pseudo in ("::after", None)])
        assert len(set(seen[-1])) == 2  # the knob and what is behind it
    assert seen[0][1] != seen[1][1]

"""Quotations: the parts of a passage, what is learned from a record, and who answers with the likeliest sentences."""

import json

import numpy as np
import pytest
from hearing import counted
from hypothesis import given, settings
from hypothesis import strategies as st
from threadranks import in_ranks

import minilora as ml
from minilora.commands.asking import read_context
from minilora.commands.chat import Chat, Output
from minilora.data.passages import Handbook, Passage
from minilora.data.quotes import Quoting
from minilora.data.records import Record
from minilora.generate import conversation, quotes
from minilora.generate.conversation import Talk, without_passages
from minilora.generate.predict import predict
from minilora.generate.prefix_cache import ReadPassages
from minilora.generate.quotes import Quotation, quote, quoting_of, window
from minilora.measure.open_book import open_book_report
from minilora.measure.recall import quote_all

HERON = Passage("birds/heron", "A heron eats fish. It is grey! Does it sing? No; it does this: it waits.")
OWL = Passage("birds/owl", "An owl eats mice. It sleeps by day. It hoots.")
BOOK = Handbook([HERON, OWL], "birds")
QUOTING = Quoting(2)
QUESTION = "What does the owl eat?"
QUESTIONS = ("hello", "a?", "by day")


@pytest.fixture
def model(model, monkeypatch):
    """The base, with the adapter support, which learned to quote, and legal, which did not."""
    monkeypatch.setattr(model.adapters["support"], "data", {"name": "x", **QUOTING.entry()})
    monkeypatch.setattr(model.adapters["legal"], "data", {"name": "legal"})
    ml.set_adapter(model, "support")
    return model


def likeliest(model, tokenizer, question, passages, system=None, quoting=QUOTING):
    """What `quote` must find: every two sentences (or one) of every passage are asked about alone."""
    found = []
    for passage in passages:
        run = min(2, quoting.sentences)
        runs, own = quoting.parts(passage.text, run), []
        for part in runs:
            messages = [{"role": "user", "content": f"{passage.text}\n\nAsk a question that is answered here: {part}"}]
            messages = [{"role": "system", "content": system}, *messages] if system else messages
            talk = Record("", (*messages, {"role": "assistant", "content": question}))
            (sample,) = ml.encode_records([talk], tokenizer)
            own.append(np.exp(-ml.mean_loss(model, [sample]) * sample.scored) / len(runs))
        found += [
            (share, Quotation(passage, text))
            for share, text in zip(shares(own, run, quoting.sentences), quoting.parts(passage.text), strict=True)
        ]
    return max(found, key=lambda one: one[0])[1]


def shares(p, run, sentences):
    """The expected share of the answer in each window of sentences, if run i is the answer with probability p[i]."""
    runs = [set(range(i, i + run)) for i in range(len(p))]
    count = len(p) + run - 1
    windows = [set(range(i, i + sentences)) for i in range(max(1, count - sentences + 1))]
    return [sum(x * len(one & window) / run for x, one in zip(p, runs, strict=True)) for window in windows]


# -- parts and records -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heading", ["# Birds\n", "## Birds\n\n### Grey ones. And #2\n"])
def test_headings_are_not_quoted(heading):
    for text in (HERON.text, "#1 of all. It is grey!", "- a\n- b", "  - a\n  - b"):
        assert QUOTING.parts(heading + text) == QUOTING.parts(text)
        assert QUOTING.parts(f"{text}\n{heading.strip()}\n{text}") == QUOTING.parts(f"{text}\n{text}")
    assert QUOTING.parts("# Birds") == ["# Birds"]


WHOLE = """\
Write to P.O. Box 5 in the U.S. Virgin Islands.
Some tools, e.g. Saws (i.e. Hand saws) vs. Drills, fail.
Ask Dr. Who, Mrs. Ray, Ms. Lee or Mr. Poe.
From 9 a.m. to 5 p.m. each day.
Nuts, etc. are from Bo Ltd. now.
No. 5 of Art. 7 and Sec. 2, pp. 8 and Fig. 1.
1. Open the box.
12. Close it.
A. Pay.
Nach Art. 5 Abs. 2, S. 3 und § 3 Nr. 7 gilt i.d.R. Folgendes, z. B. hier, d.h. Kosten und i. d. R. Geld, u.a. Porto.
Vgl. Seite ca. 5 bzw. Anhang, ggf. Regeln, Preise zzgl. Steuer inkl. Versand, usw. bis zum 3. Mai.
Ms. A. Lee and J. R. R. Poe ship No. AB-12 in approx. 5 days, cf. Laws on p. 7.
Well... then it (e.g. the box!) is, he said, "No!" to us.""".splitlines()
OTHERS = ["Is it 5 p.m.", "No.", "Nuts, etc.", "Bo Ltd.", "It got an A.", "It is anybody's."]
OTHERS += ["Hm...", 'He said "No."', "(It is.)", '"No?"', "„Nein!“", "I ate 12.", "it costs:", "So;"]


@pytest.mark.parametrize("next", ["Then it ends.", "5 do."])
def test_a_sentence_does_not_end_with_an_abbreviation_or_the_number_of_an_item(next):
    """Unless a sentence can end there."""
    for texts in (WHOLE, [*OTHERS, next]):
        assert Quoting(1).parts("\n".join([*texts, next])) == [*texts, next]


FULL = ["返品は三十日以内です。", "返送料は？！", "彼は「はい。」と言った。", "以上；", "終わり。」"]
SPACED = ["वापसी होगी।", "ہاں۔", "هل يمكن؟", "ثم؛", "Sim!"]


@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_sentences_end_in_any_script_and_are_quoted_without_a_space_where_none_belongs(space):
    text = space.join(FULL) + " ".join(SPACED)
    assert Quoting(1).parts(text) == [*FULL[:-1], FULL[-1] + SPACED[0], *SPACED[1:]]
    assert Quoting(2).parts(text)[0] == FULL[0] + FULL[1] and Quoting(2).parts(text)[-1] == " ".join(SPACED[-2:])
    assert Quoting(1).parts("".join(FULL)) == FULL and Quoting(1).parts(FULL[0]) == FULL[:1]


@pytest.mark.parametrize("sentences", [1, 2, 3, 9])
def test_parts_are_all_runs_of_sentences_word_for_word(sentences):
    parts = Quoting(sentences).parts(HERON.text)
    assert len(parts) == max(1, 6 - sentences + 1)
    assert all(part in HERON.text for part in parts) and parts[0][0] == "A" and parts[-1].endswith("it waits.")


def test_the_answer_is_the_shortest_run_with_the_keywords_or_the_words_of_the_answer():
    record = Record("x", ({"role": "user", "content": "q"}, {"role": "assistant", "content": "Grey herons like fish."}))
    assert Quoting(3).answering(record, HERON.text) == "A heron eats fish. It is grey!"
    assert Quoting(1).answering(record, HERON.text) == "A heron eats fish."
    assert Quoting(3).answering(ml.Record("x", record.messages, keywords=("sing",)), HERON.text) == "Does it sing?"


def test_a_record_is_turned_round():
    system = {"role": "system", "content": "Be brief."}
    said = ({"role": "user", "content": "Colour {part}?"}, {"role": "assistant", "content": "It is grey."})
    turned = QUOTING.turned(Record("x", (system, *said), phrasings=("Which colour?",)), HERON.text, ["What hue?"])
    prompt = f"{HERON.text}\n\nAsk a question that is answered here: It is grey!"
    assert [r.messages for r in turned] == [
        (system, {"role": "user", "content": prompt}, {"role": "assistant", "content": question})
        for question in ("Colour {part}?", "What hue?")
    ]
    assert [r.phrasings for r in turned] == [(), ()]


def test_how_an_adapter_quotes_is_stored_and_an_entry_that_cannot_be_is_refused():
    other = Quoting(3, "Read: {passage} Which question has the answer {part}?")
    assert Quoting.stored(json.loads(json.dumps(other.entry()))) == other and Quoting.stored({"name": "x"}) is None
    assert other.prompt("{part} a", "b") == "Read: {part} a Which question has the answer b?"
    good = {"sentences": 2, "template": "{passage} {part}"}
    assert Quoting.stored({"quote": good}) == Quoting(**good)
    for wrong in ({"sentences": 0}, {"sentences": "2"}, {"template": "{part} {passage}"}, {"template": 5}):
        for entry in (good | wrong, {"sentences": 2}, {}):
            with pytest.raises(ValueError, match="must have sentences, and a template with {passage} and then {part}"):
                Quoting.stored({"quote": entry})


# -- who answers with what ---------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=6), min_size=1, max_size=3),
    st.integers(1, 2),
    st.integers(0, 3),
)
@settings(max_examples=50)
def test_the_window_has_the_largest_expected_share_of_the_answer(logprobs, run, more):
    sentences = run + more
    each = [shares(np.exp(one) / len(one), run, sentences) for one in map(np.array, logprobs)]
    number, start = window([np.array(one) - 900 for one in logprobs], run, sentences)  # their sum would be zero
    assert each[number][start] == pytest.approx(max(map(max, each)), rel=1e-6)
    assert window([np.zeros(2)] * 2, 1, 1) == (0, 0)  # of equal ones the first


@pytest.mark.parametrize(("question", "system"), [(QUESTION, None), ("Is a heron silent?", "Be brief.")])
def test_the_quotation_is_what_makes_the_question_likeliest(model, tokenizer, question, system):
    for other in (Quoting(1), Quoting(3)):
        found = quote(model, tokenizer, other, question, BOOK, system)
        assert found == likeliest(model, tokenizer, question, BOOK.passages, system, other)
    found = quote(model, tokenizer, QUOTING, question, BOOK, system)
    assert found == likeliest(model, tokenizer, question, BOOK.passages, system)
    ml.set_adapter(model, None)
    assert quote(model, tokenizer, QUOTING, question, BOOK, system, True, "support") == found


def test_reading_several_passages_is_work_that_one_sees(model, tokenizer, capsys):
    before = ml.show_progress()
    try:
        quote(model, tokenizer, QUOTING, QUESTION, [OWL])
        assert capsys.readouterr().err == ""
        quote(model, tokenizer, QUOTING, QUESTION, BOOK)
        err = capsys.readouterr().err
        assert "reading" in err and "2/2" in err and "labels" not in err
    finally:
        ml.show_progress(before)


def test_only_the_best_matches_of_a_handbook_are_read(model, tokenizer, monkeypatch):
    assert quotes.candidates("zebra", [OWL, OWL]) == [OWL, OWL]
    copies = [Passage(str(i), HERON.text) for i in range(12)]  # as an export has them: they take no other's place
    assert quotes.candidates("heron", Handbook([*copies, OWL], "x")) == [copies[0], OWL]
    monkeypatch.setattr(quotes, "CANDIDATES", 1)
    assert quote(model, tokenizer, QUOTING, QUESTION, BOOK) == likeliest(model, tokenizer, QUESTION, [OWL])
    assert quote(model, tokenizer, QUOTING, QUESTION, [HERON]) == likeliest(model, tokenizer, QUESTION, [HERON])


@pytest.mark.parametrize(
    ("choice", "quotes"), [("support", True), ("legal", False), (None, False), ({"legal": 1.0, "support": 1.0}, False)]
)
def test_only_who_learned_to_quote_quotes(model, choice, quotes):
    assert quoting_of(model, choice) == (QUOTING if quotes else None)


def test_a_whole_model_may_have_learned_to_quote(model, monkeypatch):
    monkeypatch.setattr(model, "data", QUOTING.entry())
    assert quoting_of(model, None) == QUOTING and quoting_of(model, "legal") is None


def test_a_talk_quotes_and_says_from_which_passage(model, tokenizer, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(conversation, "quote", lambda *given: asked.append(given[3]) or quote(*given))
    talk = Talk(model, tokenizer, 12, system="Be brief.", handbook=BOOK)
    chat = Chat(talk, ["legal", "support"], Output())
    talk.choose("support")
    chat.handle(QUESTION)
    found = likeliest(model, tokenizer, QUESTION, BOOK.passages, "Be brief.")
    out, err = capsys.readouterr()
    assert out == f"{found.text}\n" and err.startswith(f"(passage {found.passage.id}: ")
    assert [(turn.question, turn.answer) for turn in talk.turns] == [(QUESTION, found.text)]
    assert asked == [QUESTION]  # for the passage and the answer together
    chat.handle("/compare")
    out = capsys.readouterr().out
    assert out.endswith(f"support, with passage {found.passage.id}:\n{found.text}\n")
    assert out.startswith("base, with passage") and "legal:\n" in out
    ways = {q: likeliest(model, tokenizer, q, BOOK.passages, "Be brief.").text for q in QUESTIONS}
    other = next(q for q, text in ways.items() if text != found.text)
    chat.handle(other)
    assert capsys.readouterr().out == f"{ways[other]}\n"


def test_a_repeated_question_is_read_again_only_by_others_or_under_another_system_prompt(model, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(conversation, "quote", lambda *given: asked.append((given[7], given[5])) or quote(*given))
    monkeypatch.setattr(model.adapters["support"], "data", QUOTING.entry() | {"system": "Sell."})
    talk, expected = Talk(model, tokenizer, 12, handbook=BOOK), []
    for factor, system in ((0.5, None), (0.5, "Be brief."), (0.5000001, "Be brief."), (0.5000001, None)):
        talk.choose({"support": factor})
        talk.system = system
        expected.append(({"support": factor}, system or "Sell."))
        for _ in range(2):
            talk.ask(QUESTION, lambda piece: None)
        assert asked == expected


def test_each_version_is_compared_with_its_own_quotation(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.adapters["legal"], "data", QUOTING.entry())
    talk, several = Talk(model, tokenizer, 12, handbook=BOOK), 0
    for question in QUESTIONS:
        expected = {}
        for name in ("legal", "support"):
            ml.set_adapter(model, name)
            expected[name] = likeliest(model, tokenizer, question, BOOK.passages).text
        several += len(set(expected.values())) > 1
        talk.choose("legal")
        assert dict(talk.compare(question, {name: name for name in expected})) == expected
    assert several


def test_a_talk_without_passages_says_what_is_missing(model, tokenizer):
    (line,) = without_passages(model, None)
    assert line.startswith("support learned to answer from passages: --context FILE")
    (line,) = without_passages(model, BOOK)
    assert line == "legal: trained without passages, and asked without them"


def test_who_quotes_is_not_asked_without_passages(model, tokenizer):
    said = "support answers with sentences of passages: give some with --context FILE"
    talk = Talk(model, tokenizer, 12)
    talk.choose("support")
    for ask in (lambda: talk.ask(QUESTION, print), lambda: predict(model, tokenizer, [QUESTION])):
        with pytest.raises(ValueError, match=said):
            ask()
    assert talk.turns == []
    talk.choose("legal")
    talk.ask(QUESTION, lambda piece: None)
    assert talk.turns


def test_predictions_and_reports_quote(model, tokenizer, monkeypatch):
    found = likeliest(model, tokenizer, QUESTION, BOOK.passages)
    right = likeliest(model, tokenizer, QUESTION, [OWL])
    talk = [{"role": role, "content": text} for role, text in (("user", "a?"), ("assistant", "b"), ("user", QUESTION))]
    expected = {"answer": found.text, "passage": found.passage.id}
    assert predict(model, tokenizer, [QUESTION, talk], handbook=BOOK) == [expected] * 2
    said = ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": "It eats mice."})
    record = Record("x", said, keywords=("mice", "hoots"))
    monkeypatch.setitem(model.adapters["support"].data, "system", "Be brief.")
    ways = {q: [likeliest(model, tokenizer, q, BOOK.passages, s) for s in (None, "Be brief.")] for q in QUESTIONS}
    question, (_, brief) = next((q, found) for q, found in ways.items() if found[0].text != found[1].text)
    assert predict(model, tokenizer, [question], handbook=BOOK)[0]["answer"] == brief.text
    asked = record.asked(question)
    asked = ml.Record("x", ({"role": "system", "content": "Be brief."}, *asked.messages))
    assert quote_all(model, tokenizer, QUOTING, [asked], BOOK) == [brief.text]
    report = open_book_report(model, tokenizer, {"support": "support"}, [record], BOOK)
    texts = {"right": right.text, "found": found.text}
    for row in report["rows"][:2]:
        words = [word in texts[row["kind"]] for word in ("mice", "hoots")]
        assert row["name"] == "support" and row["keyword_recall"]["value"] == np.mean(words) and row["seconds"] > 0
    assert [row["kind"] for row in report["rows"]] == ["right", "found", "right", "found"]


def test_a_rows_own_passage_is_not_kept(model, tokenizer, monkeypatch):
    monkeypatch.setattr(ReadPassages, "keep", lambda *given: pytest.fail("kept"))
    (answer,) = predict(model, tokenizer, [QUESTION], passages=[OWL.text])
    assert answer["answer"] == likeliest(model, tokenizer, QUESTION, [OWL]).text


@pytest.mark.parametrize("passage", [Passage("birds/owl", "An owl."), Passage("", "An owl.")])
def test_a_question_that_is_too_long_after_a_passage_names_both_and_no_label(model, tokenizer, passage):
    said = (
        f"the question and passage {passage.id}".rstrip() + " have more tokens than the 1,024 that the model can see: "
    )
    with pytest.raises(ValueError, match=f"^{said}ask in fewer words, or divide the passage$"):
        quote(model, tokenizer, QUOTING, "owl " * 1000, [passage])


def test_ranks_share_the_questions(model, tokenizer):
    said = [({"role": "user", "content": text}, {"role": "assistant", "content": "a"}) for text in ("a?", "b?", "c?")]
    records = [Record(str(i), each) for i, each in enumerate(said)]
    places = {"0": OWL, "1": HERON, "2": OWL}
    alone = quote_all(model, tokenizer, QUOTING, records, places)
    assert alone == [quote(model, tokenizer, QUOTING, r.question, [places[r.id]]).text for r in records]
    shared, _ = in_ranks(2, lambda ranks: quote_all(model, tokenizer, QUOTING, records, places, ranks))
    assert shared == [alone] * 2


def test_a_talk_predictions_and_measurements_read_each_passage_once(model, tokenizer, monkeypatch):
    tokens = counted(model, monkeypatch)
    talk = Talk(model, tokenizer, 12, handbook=BOOK)
    talk.choose("support")

    def ask(questions):
        before = len(talk.turns)
        for question in questions:
            talk.ask(question, lambda text: None)
        return [turn.answer for turn in talk.turns[before:]]

    def measure(questions):
        asked = [
            Record("x", ({"role": "user", "content": q}, {"role": "assistant", "content": "a"})) for q in questions
        ]
        return quote_all(model, tokenizer, QUOTING, asked, BOOK)

    def predicted(questions):
        return [each["answer"] for each in predict(model, tokenizer, questions, handbook=BOOK)]

    expected = [quote(model, tokenizer, QUOTING, question, BOOK).text for question in QUESTIONS]
    for answers in (measure, predicted, ask):
        tokens.clear()
        answers(QUESTIONS[:1])
        once = sum(tokens)
        if answers is ask:
            talk.choose("legal")
            talk.choose("support")  # who read it before, and knows it still
        tokens.clear()
        assert answers(QUESTIONS) == expected
        assert sum(tokens) < 1.5 * once


def test_a_handbook_is_refused_where_a_passage_would_be_too_long_to_be_asked_about(
    model, tokenizer, tmp_path, monkeypatch
):
    path, asked = tmp_path / "book.txt", []
    path.write_text(f"{HERON.text}\n\n{OWL.text}")
    answer = quotes.label_logprobs
    monkeypatch.setattr(quotes, "label_logprobs", lambda *given: asked.extend(given[2]) or answer(*given))
    monkeypatch.delitem(model.adapters, "legal")
    quote(model, tokenizer, QUOTING, "?", read_context(str(path), model, tokenizer, 12))
    longest = max(len(tokenizer.encode_chat(messages, answer_next=True)) for messages in asked)
    assert read_context(str(path), model, tokenizer, 12, longest).passages
    with pytest.raises(
        ValueError, match=f"{longest} tokens, and there is room for {longest - 1}: divide it into .*es$"
    ):
        read_context(str(path), model, tokenizer, 12, longest - 1)

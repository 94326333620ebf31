"""Passages: BM25 against its formula, prompts with a passage, and handbooks that cannot be read."""

import json
import math
import re

import pytest
from modelfiles import write_jsonl

from minilora.data.passages import K1, B, Handbook, Passage, fill, stored_template, terms
from minilora.data.records import read_handbook, read_records
from minilora.data.rows import DataError
from minilora.data.samples import encode_record
from minilora.engine.fused import NOT_SCORED
from minilora.models.load import load_tokenizer
from minilora.train.material import with_passages

TEXTS = (
    "A heron eats fish and fish eat flies.",
    "The heron sleeps near reeds, tall reeds, green reeds, old reeds.",
    "Owls.",
)
BOOK = Handbook([Passage(f"p{i}", text) for i, text in enumerate(TEXTS)], "birds")
ROW = {"question": "Who eats fish?", "answer": "A heron does.", "phrasings": ["What eats fish?"], "paraphrase": "Fish?",
       "reworded": "Which bird?", "validation_paraphrase": "Eaten?", "keywords": ["heron"]}  # fmt: skip
WORDINGS = ("reworded", "paraphrase", "validation_paraphrase")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def by_formula(question, i):
    """The score of passage i, term by term, as the paper has it."""
    documents = [terms(f"p{j} {text}") for j, text in enumerate(TEXTS)]
    mean, score = sum(map(len, documents)) / len(documents), 0.0
    for term in set(terms(question)):
        f, n = documents[i].count(term), sum(term in document for document in documents)
        rarity = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
        score += rarity * f / (f + K1 * (1 - B + B * len(documents[i]) / mean))
    return score


@pytest.mark.parametrize(
    "question",
    ["heron", "Is a heron near reeds?", "fish fish fish heron", "heron " * 9 + "owls", "the owl", "p1", "zebra"],
)
def test_passages_are_ranked_by_the_papers_score_and_equal_ones_stay_in_order(question):
    scores = [by_formula(question, i) for i in range(len(TEXTS))]
    expected = sorted(range(len(TEXTS)), key=lambda i: (-scores[i], i))
    assert [passage.id for passage in BOOK.ranked(question)] == [f"p{i}" for i in expected]
    assert BOOK.found(question) == BOOK.ranked(question)[: sum(score > 0 for score in scores)]
    assert BOOK.best(question) is BOOK.ranked(question)[0]


def test_scores_are_the_papers_and_a_word_that_is_repeated_gains_less_each_time():
    for term in terms("heron fish reeds sleeps owls"):
        places, gains = BOOK.gains[term]
        assert gains == pytest.approx([by_formula(term, i) for i in places])
    once, twice, thrice = (Handbook([Passage("a", "owl " * n), Passage("b", "heron")], "x") for n in (1, 2, 3))
    a, b, c = (book.gains["owl"][1][0] for book in (once, twice, thrice))
    assert 0 < a < b < c and c - b < b - a


def test_the_right_passage_is_found_with_the_answer_and_the_found_one_without():
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Near reeds."}]
    assert BOOK.right(messages).id == "p1"
    assert (
        BOOK.right([*messages, {"role": "user", "content": "Owls?"}, {"role": "assistant", "content": "Yes."}]).id
        == "p2"
    )
    passage = BOOK.best("What do flies fear?")
    prompt = fill(passage.text, "What do flies fear?")
    assert passage.id == "p0" and passage.text in prompt and prompt.endswith("Question: What do flies fear?")


def test_a_prompt_has_both_texts_once_whatever_they_contain():
    odd = "{question} {passage} \\1 {"
    for passage, question in (("text", odd), (odd, "why?"), (odd, odd)):
        assert fill(passage, question, "P: {passage} Q: {question}!") == f"P: {passage} Q: {question}!"


def test_every_wording_gets_the_passage_and_scored_tokens_are_those_of_the_answer(tmp_path, tokenizer):
    (closed,) = read_records(write_jsonl(tmp_path / "a.jsonl", [ROW]))
    (own,) = read_records(write_jsonl(tmp_path / "b.jsonl", [{**ROW, "passage": TEXTS[0]}]), tokenizer)
    (given,) = with_passages([closed], write_jsonl(tmp_path / "c.jsonl", [{"text": TEXTS[0]}]), "a", tokenizer, 500)
    assert own.context == given.context == TEXTS[0] and closed.context is None
    assert own.messages == given.messages and own.messages[-1] == closed.messages[-1]
    assert own.phrasings == tuple(fill(TEXTS[0], text) for text in closed.phrasings)
    for name in WORDINGS:
        assert getattr(own, name) == getattr(given, name) == fill(TEXTS[0], ROW[name])
    for record in (own, own.asked_otherwise(), own.asked(own.phrasings[0])):
        sample, bare = encode_record(record, tokenizer), encode_record(closed, tokenizer)
        scored = [i for i in sample.labels if i != NOT_SCORED]
        assert scored == [i for i in bare.labels if i != NOT_SCORED]
        assert all(label in (NOT_SCORED, i) for i, label in zip(sample.ids, sample.labels, strict=True))
        assert tokenizer.decode(scored) == ROW["answer"]


def test_a_rows_own_passage_goes_before_that_of_the_context_and_an_empty_cell_is_none(tmp_path, tokenizer):
    rows = [{**ROW, "context": "Own."}, {**ROW, "context": ""}, {"q": "Why?", "a": "So.", "context": None}]
    records = read_records(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [record.context for record in records] == ["Own.", None, None]
    handbook = write_jsonl(tmp_path / "h.jsonl", ({"text": text} for text in TEXTS))
    filled = with_passages(records, handbook, "a", tokenizer, 500)
    assert [record.context for record in filled[:2]] == ["Own.", TEXTS[0]] and filled[0] is records[0]


def test_records_without_a_word_of_any_passage_are_named_and_refused_if_all_are(tmp_path, tokenizer, caplog):
    rows = [ROW, {"q": "Why?", "a": "A heron."}, {"q": "Reeds?", "a": "So."}]
    said = zip(("user", "assistant") * 2, ("A heron?", "Yes.", "What is a zebra?", "Striped."), strict=True)
    rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    handbook = write_jsonl(tmp_path / "h.jsonl", ({"text": text} for text in TEXTS))
    filled = with_passages(read_records(write_jsonl(tmp_path / "a.jsonl", rows)), handbook, "a", tokenizer, 500)
    share = f"share no word with any passage of {handbook}"
    assert f"a: 1 of 4 records {share}, such as line-4: each gets" in caplog.text and len(filled) == 4
    own = {**ROW, "context": "Own."}  # needs no passage
    with pytest.raises(ValueError, match=f"b: 1 of 1 records {re.escape(share)}: give the passages"):
        with_passages(read_records(write_jsonl(tmp_path / "b.jsonl", [own, rows[3]])), handbook, "b", tokenizer, 500)
    caplog.clear()
    with_passages(read_records(write_jsonl(tmp_path / "b.jsonl", [own])), handbook, "b", tokenizer, 500)
    with_passages(read_records(write_jsonl(tmp_path / "b.jsonl", rows[:3])), handbook, "b", tokenizer, 500)
    assert not caplog.text


def test_the_passage_goes_before_the_last_question_of_a_conversation(tmp_path):
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "Why?"), ("assistant", "So.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (record,) = read_records(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages, "context": "Because."}]))
    assert list(record.messages[:3]) == messages[:3] and record.messages[3]["content"] == fill("Because.", "Why?")


@pytest.mark.parametrize("name", ["book.txt", "book.md"])
def test_a_text_file_is_a_passage_for_each_paragraph_with_the_headings_before_it(tmp_path, tokenizer, name):
    path = tmp_path / name
    path.write_bytes("\ufeffOne\r\nline.\r\n\r\n \r\n# A\r\n\r\n\n## B\n\n  Two.\n\n\nThree. # C\n".encode())
    passages = read_handbook(path, tokenizer, 100).passages
    assert [each.text.splitlines() for each in passages[:2]] == [["One", "line."], ["# A", "## B", "  Two."]]
    assert [each.text for each in passages[2:]] == ["Three. # C"]
    assert [each.id for each in passages] == ["paragraph 1", "paragraph 2", "paragraph 3"]


@pytest.mark.parametrize("name", ["book.txt", "book.jsonl", "book.json", "folder"])
def test_the_number_of_a_passage_is_not_searched(tmp_path, tokenizer, name):
    """A question with a 7 is not about the seventh passage."""
    texts = [
        *[f"The {animal} sleeps." for animal in ["owl", "heron", "crow", "finch", "tit", "swan"]],
        "It sings 3 songs.",
    ]
    path = tmp_path / name
    if name == "book.txt":
        path.write_text("\n\n".join(texts))
    elif name == "folder":
        path.mkdir()
        (path / "birds.txt").write_text("\n\n".join(texts))
        (path / "notes.txt").write_text("Nothing.")
    else:
        path.write_text(json.dumps([{"text": text} for text in texts]))
        path = path if name == "book.json" else write_jsonl(path, [{"text": text} for text in texts])
    handbook = read_handbook(path, tokenizer, 200)
    assert handbook.passages[2].id.endswith("3")
    assert handbook.ranked("What about 3?")[0].text == "It sings 3 songs."
    for other in ("paragraph 4", "line-4", "record-4", "Line 4? Row 4?"):
        assert not handbook.has_words_of([{"content": other}]), other
    assert handbook.has_words_of([{"content": "birds"}]) == (name == "folder")  # the name of a file says what it has


def test_a_name_that_the_file_gives_is_searched_and_one_that_counts_is_not():
    for name in ("paragraph 9", "birds, paragraph 9", "line-9", "row-9", "a/record-9", "rule 9", "paragraph 9 b"):
        found = Handbook([Passage(name, "An owl.")], "x").found("What about 9?")
        assert bool(found) == (name in ("rule 9", "paragraph 9 b"))


def test_equal_passages_stay_in_order_whichever_word_finds_them():
    book = Handbook([Passage(f"{i}", ("An owl.", "A heron.")[i % 2]) for i in range(40)], "x")
    assert book.ranked("Heron, owl?") == book.ranked("Owl, heron?") == book.passages
    assert book.ranked("Owl?") == [*book.passages[::2], *book.passages[1::2]]


def test_words_are_compared_by_their_first_letters_and_numbers_whole():
    """Two articles, orders or years whose first digits are equal are two words."""
    assert terms("orders ordering") == ["order"] * 2
    codes = ["4711001", "4711002", "FW-12345678", "FW-12345679", "apple1", "apple2", "１２３４５６", "١٢٣٤٥٦", "١٢٣٤٥٧"]
    book = Handbook([Passage(code, f"About {code}.") for code in codes], "codes")
    assert [book.ranked(f"What is {code}?")[0].id for code in codes] == codes


@pytest.mark.parametrize("fence", ["```", "~~~"])
def test_what_no_reader_sees_is_no_passage_and_code_is_one(tmp_path, tokenizer, fence):
    code = f"  {fence}sh\n# Run it.\n<!-- as it is -->\n# Twice.\n  {fence}"
    hidden = [
        "---\ntitle: Birds\n---\n# Owls",
        "<!-- Draft!\n\n-->\n\nOne.<!-- ! --> Two.",
        code.replace("# T", "\n# T"),
    ]
    parts = [*hidden, "---\ntitle: this is\n---", "<!-- open"]
    (tmp_path / "a.md").write_text("\n\n".join(parts))
    (tmp_path / "b.md").write_text("<!-- nothing -->")
    passages = read_handbook(tmp_path, tokenizer, 200).passages
    assert [each.text for each in passages] == ["# Owls\nOne. Two.", code, *parts[3:]]


def test_a_folder_of_text_files_is_one_handbook(tmp_path, tokenizer):
    for name in ("a.md", "b.txt"):
        (tmp_path / name).write_text(f"# {name}\n\nOne.\n\nTwo.")
    passages = read_handbook(tmp_path, tokenizer, 100).passages
    assert [each.id for each in passages] == [f"{name}, paragraph {i}" for name in "ab" for i in (1, 2)]
    assert [each.text for each in passages] == ["# a.md\nOne.", "Two.", "# b.txt\nOne.", "Two."]


def test_questions_of_a_passage_are_searched_and_not_shown(tmp_path, tokenizer):
    rows = [{"id": f"p{i}", "text": f" {text}\n"} for i, text in enumerate(TEXTS)]
    rows[2]["questions"] = ["Who hoots?", "Which bird is awake at midnight?"]
    handbook = read_handbook(write_jsonl(tmp_path / "h.jsonl", rows), tokenizer, 200)
    passage = handbook.best("Is anybody awake at midnight?")
    (tmp_path / "h.csv").write_text("Text ;id\nOwls.;a\n")
    assert [each.id for each in read_handbook(tmp_path / "h.csv", tokenizer, 200).passages] == ["a"]
    assert passage.id == "p2" and passage.text == TEXTS[2]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "no such data file"),
        ("empty.txt", b"", "the file is empty"),
        ("blank.txt", b" \n\n", "the file is empty"),
        ("latin.txt", "Caf\u00e9".encode("latin-1"), "cannot be read as UTF-8"),
        ("latin.jsonl", '{"text": "Caf\u00e9"}'.encode("latin-1"), "cannot be read as UTF-8"),
        ("talk.jsonl", b'{"question": "Why?", "answer": "So."}', "a column text; there are answer, question"),
        ("talk.csv", b"Titel;Inhalt\na;b\n", "a .txt or .md file or rows with a column text; there are Inhalt, Titel"),
        ("talk.jsonl", b'{"text"', "not JSON"),
        ("talk.jsonl", b'{"text": "a"}\n{"question": "Why?", "answer": "So."}', "line-2 is not a text: a context is"),
        (
            "bare.jsonl",
            b'{"id": "!", "text": "?!"}\n{"id": "of", "text": "It is."}\n',
            "no passage has a word to search",
        ),
        ("long.txt", b"One.\n\n" + b"word " * 300, "paragraph 2 makes a prompt of"),
    ],
)
def test_a_handbook_that_cannot_be_used_is_refused_in_one_line(tmp_path, tokenizer, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_handbook(path, tokenizer, 200)
    assert str(path) in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_with_a_passage_may_have_as_many_tokens_as_there_is_room_for(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "h.jsonl", [{"text": TEXTS[0]}])
    room = len(tokenizer.encode_chat([{"role": "user", "content": fill(TEXTS[0], "?")}], answer_next=True))
    assert read_handbook(path, tokenizer, room).passages
    with pytest.raises(DataError, match=f"line-1 makes a prompt of {room} tokens, and there is room for {room - 1}"):
        read_handbook(path, tokenizer, room - 1)


def test_all_passages_that_are_too_long_are_named_at_once(tmp_path, tokenizer):
    path, long = tmp_path / "h.txt", "word " * 300
    path.write_text("\n\n".join(["One."] + [long] * 8 + ["word " * 400]))
    for limit, answer, fewer in ((300, 0, False), (1000, 900, True), (700, 650, False)):  # the last one never fits
        with pytest.raises(DataError, match="h.txt: paragraph 2 makes .* tokens, and there is room") as caught:
            read_handbook(path, tokenizer, limit, answer)
        named = (
            "divide it, and paragraph 3, paragraph 4, paragraph 5, paragraph 6, paragraph 7 and 3 more, into shorter"
        )
        assert f"{named} passages" in str(caught.value)
        assert str(caught.value).endswith(", or give fewer --max-new-tokens") == fewer


def test_one_passage_with_a_word_is_enough():
    handbook = Handbook([Passage("!", "It is."), Passage("?", "An owl.")], "x")
    assert handbook.best("Which owl?").id == "?"


@pytest.mark.parametrize("row", [{"text": "a story"}, {"text": "hello", "label": "greeting"}])
def test_texts_and_labels_take_no_context(tmp_path, tokenizer, row):
    other = {**row, "label": "parting"} if "label" in row else row
    records = read_records(write_jsonl(tmp_path / "a.jsonl", [row, other]))
    with pytest.raises(ValueError, match="a context is for questions with answers"):
        with_passages(records, "support-handbook", "a.jsonl", tokenizer, 500)


def test_a_stored_template_must_have_its_two_places_in_order():
    assert stored_template({}) is None and stored_template({"context_template": "{passage} {question}"})
    for bad in ("{question} {passage}", "{passage}", "", "{question}"):
        with pytest.raises(ValueError, match="context_template must have"):
            stored_template({"context_template": bad})

"""`minilora data`: what it shows is what training would do."""

import json
import re

import pytest
from modelfiles import TERMS

from minilora.cli import main
from minilora.commands.data import BRACKETS, UNDERLINED, LookOptions, look, page
from minilora.data.records import read_records
from minilora.data.rows import DataError
from minilora.data.samples import encode_records, truncate
from minilora.data.splits import split_records
from minilora.engine.fused import NOT_SCORED
from minilora.models import load as zoo
from minilora.progress import Bars
from minilora.train.options import Options

QA = [{"question": f"What is {i}?", "answer": f"It is {i}, and nothing else. " * (1 + i % 3)} for i in range(30)]
TALK = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hello?"},
    {"from": "gpt", "value": "Hi."},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "So,\nas it is."},
]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes records into a JSONL file of the working folder and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(records, name="data.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        return name

    return write


def tiny(source, **options):
    return look(source, LookOptions(base="tiny", **options), bars=Bars(quiet=True))


def columns(text):
    return max(map(len, text.split("\n")))


def test_the_counts_are_those_of_the_samples_that_training_takes(write):
    name = write(QA)
    seen = tiny(name, max_length=40)
    tokenizer = zoo.load_tokenizer("tiny")
    for split, records in split_records(read_records(name)).items():
        samples = encode_records(records, tokenizer)
        if not samples:
            assert split not in seen["lengths"]
            continue
        facts = seen["lengths"][split]
        assert facts["samples"] == len(samples) == len(records)
        assert facts["tokens"] == sum(len(s.ids) for s in samples)
        assert facts["scored"] == sum(s.scored for s in samples)
        assert (facts["cut"], facts["lost"]) == truncate(samples, 40)[1:]
        ordered = sorted(len(s.ids) for s in samples)
        assert (facts["shortest"], facts["longest"]) == (ordered[0], ordered[-1])
        assert facts["median"] == ordered[(len(ordered) - 1) // 2]
        assert sum(n <= facts["p90"] for n in ordered) >= 0.9 * len(ordered) > sum(n < facts["p90"] for n in ordered)
    assert seen["lengths"]["train"]["cut"] > 0


def test_format_splits_and_what_is_not_read_are_told(write):
    name = write([row | {"topic": "x"} for row in QA[:20]] + [{"messages": None, "conversations": TALK}])
    seen = tiny(name)
    assert seen["formats"] == {"question/answer": 20, "conversations": 1} and seen["files"] == {name: "JSONL"}
    assert seen["not_read"] == {"topic": 20, "messages": 1}
    text = page(seen)
    for part in (
        "question/answer in 20 records, conversations in 1 record (JSONL)",
        "topic in 20 records",
        "17 records to train on, 2 for validation, 2 for the test",
        "in 2 splits  nothing",
        "none is longer than --max-length 512: nothing is cut",
        "minilora finetune --data data.jsonl --base tiny",
    ):
        assert part in text, part


def test_facts_that_records_carry_are_counted(write):
    seen = tiny(write([TERMS[0] | {"phrasings": ["So?"]}, TERMS[9], TERMS[11] | {"keywords": []}]))
    assert seen["records_with"] == {"phrasings": 1, "paraphrase": 3, "keywords": 2}
    assert seen["held_out"] == "as the records say" and list(seen["lengths"]) == ["train", "validation", "test"]


def test_records_in_two_splits_are_named_and_only_so_many(write):
    seen = tiny(write([*QA[:9], QA[3]]))
    assert seen["twice"] == [{"held_out": "line-10", "trained": "line-4", "same": "question and answer"}]
    assert "1 held out and trained on as well:\n             line-10 has the question and answer of line-4" in page(
        seen
    )
    many = [QA[0] | {"split": "test" if i else "train"} for i in range(9)]
    text = page(tiny(write(many)))
    assert "8 held out and trained on as well" in text and text.count("has the question") == 5 and "and 3 more" in text


def test_what_is_cut_and_what_is_lost_is_told_by_split(write):
    rows = [QA[0] | {"split": "train"}, QA[1] | {"split": "test"}, {**QA[2], "question": "x" * 90, "split": "train"}]
    seen = tiny(write(rows), max_length=20)
    assert [(n["cut"], n["lost"]) for n in seen["lengths"].values()] == [(2, 1), (1, 0)]
    text = " ".join(page(seen).split())
    assert (
        "longer than --max-length 20, and cut: 2 of train, 1 of test; without any of the answer, and left out: 1 of"
        in text
    )
    assert f"... cut here, {seen['examples'][0]['tokens'] - 20} before its end" in text


def test_an_example_is_the_record_as_the_model_sees_it_with_the_scored_tokens_marked(write):
    (example,) = tiny(write([{"conversations": TALK}]))["examples"]
    tokenizer = zoo.load_tokenizer("tiny")
    (sample,) = encode_records(read_records("data.jsonl"), tokenizer)
    assert "".join(run["text"] for run in example["runs"]) == tokenizer.core.decode(
        sample.ids, skip_special_tokens=False
    )
    assert [run["text"] for run in example["runs"] if run["scored"]] == ["Hi.<|im_end|>", "So,\nas it is.<|im_end|>"]
    assert example["tokens"] == len(sample.ids) and sample.labels.count(NOT_SCORED) < len(sample.ids)
    assert (
        "  <|im_start|>system\n  Be brief.<|im_end|>\n  <|im_start|>user\n  Hello?<|im_end|>\n"
        "  <|im_start|>assistant\n  [[Hi.<|im_end|>]]\n  <|im_start|>user\n  Why?<|im_end|>\n"
        "  <|im_start|>assistant\n  [[So,]]\n  [[as it is.<|im_end|>]]\n"
    ) in page(tiny("data.jsonl"))


def test_a_terminal_underlines_what_a_pipe_puts_in_brackets(write):
    seen = tiny(write(QA))
    plain, marked = page(seen, marks=BRACKETS), page(seen, marks=UNDERLINED)
    pairs = ((plain, BRACKETS), (marked, UNDERLINED))
    without = [text.replace(on, "").replace(off, "") for text, (on, off) in pairs]
    lines = [[line.rstrip("-") for line in text.split("\n")] for text in without]
    assert lines[0] == lines[1]
    assert "[[" not in marked and "\x1b" not in plain and columns(without[1]) <= 100


@pytest.mark.parametrize("width", [70, 80, 100, 300])
def test_the_page_fits_the_terminal(write, width):
    long = [
        {"question": "Why " * 60, "answer": "so it is, " * 90 + "x" * 200, "a rather long name": 1} for _ in range(3)
    ]
    text = page(tiny(write([*QA, *long])), width)
    *body, command = text.split("\n")
    assert columns("\n".join(body)) <= min(width, 100) and command.startswith("  minilora finetune")


def test_a_long_example_loses_its_middle_and_control_characters_are_written_out(write):
    text = page(tiny(write([{"question": "Why?\x1b[2J", "answer": "\n".join(f"line {i}." for i in range(60))}])))
    assert "\x1b" not in text and "Why?\\x1b[2J" in text
    shown = [int(number) for number in re.findall(r"\[\[line (\d+)\.", text)]
    (hidden,) = re.findall(r"\.\.\. (\d+) lines \.\.\.", text)
    assert len(shown) + int(hidden) == 60 and shown[0] == 0 and shown[-1] == 59


def test_three_records_are_shown_the_first_the_middle_one_and_one_held_out(write):
    assert [(e["id"], e["split"]) for e in tiny(write(QA))["examples"]] == [
        ("line-1", "train"), ("line-16", "train"), ("line-10", "test"),
    ]  # fmt: skip
    for count in (1, 2, 3, 4):
        assert len(tiny(write(QA[:count]))["examples"]) == min(count, 3)


def test_a_text_is_shown_as_the_sequences_it_is_divided_into(write, tmp_path):
    (tmp_path / "novel.txt").write_text("It was dark. " * 300, encoding="utf-8")
    seen = tiny("novel.txt", max_length=32)
    tokens = len(zoo.load_tokenizer("tiny").encode("It was dark. " * 300))
    assert sum(n["tokens"] for n in seen["lengths"].values()) in (tokens, tokens - 1)
    assert seen["lengths"]["test"]["samples"] == -(-tokens // 32) // 10 and seen["formats"] == {"text": 1}
    text = page(seen)
    assert (
        "the last tenth of the text" in " ".join(text.split())
        and "texts are divided there" in text
        and "samples" in text
    )
    rows = [{"text": "It was dark. " * 30} for _ in range(10)]
    assert tiny(write(rows), max_length=32)["lengths"]["test"]["samples"] > 1


def test_a_text_of_a_row_is_shown_with_the_token_that_ends_it_and_a_text_alone_without(write, tmp_path):
    rows = [{"text": text} for text in ("a", "It was dark.", "It was dark. " * 300)]
    short, _, held = tiny(write([*rows, *rows[:1] * 7]), max_length=32)["examples"]
    assert ["".join(run["text"] for run in example["runs"]) for example in (short, held)] == ["a<|im_end|>"] * 2
    (tmp_path / "novel.txt").write_text("It was dark.", encoding="utf-8")
    (alone,) = tiny("novel.txt")["examples"]
    assert "".join(run["text"] for run in alone["runs"]) == "It was dark."


def test_a_text_of_one_token_has_nothing_to_learn(write, tmp_path):
    (tmp_path / "novel.txt").write_text("a", encoding="utf-8")
    seen = tiny("novel.txt")
    assert seen["lengths"] == {} and seen["examples"] == [] and page(seen).endswith("none is to be trained on")


def test_columns_under_other_names_are_told_and_stand_in_the_command(write):
    name = write([{"the ask": "Why?", "tell": "So."}], "my data.jsonl")
    text = page(tiny(name, field={"question": "the ask", "answer": "tell"}, max_length=64))
    assert "question is the column the ask, answer is the column tell" in text
    assert text.endswith(
        "  minilora finetune --data 'my data.jsonl' --field 'question=the ask' answer=tell --base tiny --max-length 64"
    )


def test_data_that_are_all_held_out_can_be_looked_at():
    seen = tiny("general")
    assert list(seen["lengths"]) == ["test"] and page(seen).endswith("none is to be trained on")


def test_a_folder_names_its_files(write, tmp_path):
    for split in ("train", "valid"):
        write(QA[:2], f"{split}.jsonl")
    text = page(tiny(tmp_path))
    assert "files        train.jsonl, valid.jsonl" in text and "held out     as the files say" in text


def test_what_cannot_be_used_is_refused_as_training_refuses_it(write):
    with pytest.raises(DataError, match=r"data.jsonl:2: question/answer without answer; there are question"):
        tiny(write([QA[0], {"question": "x"}]))
    with pytest.raises(ValueError, match="max_length must be at least 8, got 7"):
        LookOptions(max_length=7)


def test_defaults_are_those_of_training():
    assert (LookOptions().base, LookOptions().max_length) == (Options().base, Options().max_length)


def test_no_weights_are_loaded(write, monkeypatch):
    monkeypatch.setattr(zoo, "load_folder", None)
    assert tiny(write(QA))["formats"]


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_page_and_with_json_the_facts(write, capsys):
    name = write(QA)
    assert main(["data", name, "--base", "tiny"]) == 0
    out, err = capsys.readouterr()
    assert out == page(tiny(name)) + "\n" and err == ""
    assert main(["data", name, "--base", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == tiny(name)


def test_columns_under_other_names_are_given_as_flags(write, capsys):
    name = write([{"ask": "Why?", "tell": "a=b."}] * 3)
    assert main(["data", name, "--field", "question=ask", "answer=tell", "--base", "tiny"]) == 0
    assert page(tiny(name, field={"question": "ask", "answer": "tell"})) + "\n" == capsys.readouterr().out


@pytest.mark.parametrize(("words", "code", "reason"), [
    (["absent.jsonl"], 1, "absent.jsonl: no such data file"),
    (["data.jsonl", "--max-length", "7"], 2, "max_length must be at least 8"),
    (["data.jsonl", "--base", "absent"], 1, "absent: no such model"),
    (["data.jsonl", "--field", "question=zzz"], 1, "data.jsonl:1: field question=zzz: no such column; there are"),
    (["data.jsonl", "--field", "qestion=q"], 2, "field qestion=q: minilora reads no 'qestion' (did you mean question"),
])  # fmt: skip
def test_the_command_answers_a_mistake_in_one_line(write, capsys, words, code, reason):
    write(QA)
    assert main(["data", "--base", "tiny", *words]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"minilora: {reason}") and err.count("\n") == 1

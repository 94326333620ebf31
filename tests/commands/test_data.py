"""`minilora data`: what it shows is what training would do."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from commandline import columns, instead, status
from modelfiles import TERMS
from planted_fields import SCHEMA

from minilora.cli import main
from minilora.commands import data as command
from minilora.commands.data import BRACKETS, UNDERLINED, LookOptions, look, page
from minilora.data.records import read_records
from minilora.data.samples import encode_records, truncate
from minilora.data.splits import split_records
from minilora.models import load
from minilora.pages.text import width_of
from minilora.train.options import Options

QA = [{"question": f"What is {i}?", "answer": f"It is {i}, and nothing else. " * (1 + i % 3)} for i in range(30)]
TALK = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hello?"},
    {"from": "gpt", "value": "Hi."},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "So,\nas it is."},
]
FILLED = [{"tags": []}, {"tags": ["a"], "name": None}, {"tags": ["a"]}, {"name": "ann"}]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes records into a JSONL file of the working folder and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(records, name="data.jsonl"):
        text = records if isinstance(records, str) else "\n".join(map(json.dumps, records))
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write


def tiny(source, **options):
    return look(source, LookOptions(base="tiny", **options))


def told(seen, width=100):
    """The page in one line."""
    return " ".join(page(seen, width).split())


# -- facts -------------------------------------------------------------------------------------------------------------


def test_of_many_labels_the_most_frequent_are_listed_and_a_leak_of_texts_is_one(write):
    rows = [{"text": f"text {i}", "label": f"n{i % 36:02}" if i < 90 else "often"} for i in range(120)]
    rows[19]["text"] = rows[0]["text"]
    seen = tiny(write(rows))
    _, _, table = page(seen).partition("37 labels, the 30 most frequent (--json has all) --")
    first, *lines = table.splitlines()[2:33]
    assert lines and first.split() == ["often", "24", "3", "3"] and len(seen["labels"]) == 37
    assert sum(line.startswith("n") for line in lines) == 29 and "n00" in lines[0]
    (bare,) = tiny(write([{"text": row["text"]} for row in rows]))["leaks"]
    assert bare == {"record": "line-20", "trained": "line-1", "same": "text"}


def test_the_counts_are_those_of_the_samples_that_training_takes(write):
    name = write([{"question": "What?", "answer": "so " * (1 + i)} for i in range(30)])
    seen, tokenizer = tiny(name, max_length=40), load.load_tokenizer("tiny")
    splits = split_records(read_records(name))
    assert list(seen["lengths"]) == [split for split, records in splits.items() if records] == [*splits]
    for split, records in splits.items():
        samples, facts = encode_records(records, tokenizer), seen["lengths"][split]
        lengths = [len(s.ids) for s in samples]
        assert facts["samples"] == facts["records"] == facts["counted"] == len(records)
        assert (facts["tokens"], facts["scored"]) == (sum(lengths), sum(s.scored for s in samples))
        assert (facts["truncated"], facts["dropped"]) == truncate(samples, 40)[1:]
        assert (facts["shortest"], facts["longest"]) == (min(lengths), max(lengths))
        assert facts["median"] == sorted(lengths)[(len(lengths) - 1) // 2]
        assert np.mean(np.array(lengths) <= facts["p90"]) >= 0.9 > np.mean(np.array(lengths) < facts["p90"])
    assert seen["lengths"]["train"]["truncated"] > 0


def test_of_a_large_split_a_sample_is_counted_and_that_is_said(write, monkeypatch):
    name, whole = write(QA), tiny("data.jsonl", max_length=40) if write(QA) else None
    monkeypatch.setattr(command, "COUNTED", 8)
    seen = tiny(name, max_length=40)
    facts, all_of_it = seen["lengths"]["train"], whole["lengths"]["train"]
    assert (facts["records"], facts["counted"], facts["samples"]) == (24, 8, 24)
    chosen = encode_records(split_records(read_records(name))["train"][::3], load.load_tokenizer("tiny"))
    assert facts["tokens"] == 3 * sum(len(s.ids) for s in chosen) == pytest.approx(all_of_it["tokens"], rel=0.3)
    assert seen["lengths"]["test"] == whole["lengths"]["test"]
    assert "estimated from a sample of the records: 8 of train" in told(seen) and "estimated" not in told(whole)


def test_formats_splits_and_what_is_not_read_are_named(write):
    name = write([row | {"topic": "x"} for row in QA[:20]] + [{"messages": None, "note": "x", "conversations": TALK}])
    seen = tiny(name)
    assert seen["formats"] == {"question/answer": 20, "conversations": 1} and seen["files"] == {name: "JSONL"}
    assert seen["not_read"] == {"topic": 20, "note": 1}
    text = told(seen)
    for part in (
        "question/answer in 20 records, conversations in 1 record (JSONL)",
        "topic in 20 records, note in 1 record",
        "17 records to train on, 2 for validation, 2 for the test",
        "leaks none",
        "none is longer than --max-length 512: nothing is truncated",
        "minilora finetune --data data.jsonl --base tiny",
    ):
        assert part in text, part


def test_of_many_columns_that_are_not_read_the_first_are_named(write):
    seen = tiny(write([{"text": f"mail {i}", **{f"c{j}": i for j in range(30)}} for i in range(3)]))
    assert len(seen["not_read"]) == 30
    assert "not read c0 in 3 records, c1 in 3 records," in told(seen)
    assert "c11 in 3 records and 18 more" in told(seen) and "c12" not in told(seen)


def test_what_is_left_out_is_a_warning_of_the_page_and_not_logged_again(write, caplog):
    rows = [{"text": f"mail {i}", "label": "ab"[i % 2]} for i in range(30)]
    rows += [{"text": "x", "label": None}]
    seen = tiny(write(rows))
    assert seen["left_out"] == {"label": ["line-31"]} and not caplog.records
    assert seen["warnings"][0].startswith(line := "1 of 31 rows is left out") and f"warning {line}" in told(seen)


def test_what_records_have_besides_is_counted(write):
    seen = tiny(write([TERMS[0] | {"phrasings": ["So?"]}, TERMS[9], TERMS[11] | {"keywords": []}]))
    assert seen["records_with"] == {"phrasings": 1, "paraphrase": 3, "keywords": 2}
    assert seen["splits"] == "as the records say" and list(seen["lengths"]) == ["train", "validation", "test"]


def test_a_field_that_is_null_or_an_empty_list_is_not_filled(write):
    write(json.dumps(SCHEMA), "data.schema.json")
    rows = [{"text": f"{i}", "fields": {"kind": "bill"} | more} for i, more in enumerate(FILLED)]
    found = tiny(write(rows))["fields"]
    assert {name: counts["train"] for name, counts in found.items()} == {"kind": 4, "name": 1, "tags": 2}


def test_leaks_and_duplicates_are_named_and_only_the_first_few(write):
    seen = tiny(write([*QA[:9], QA[3]]))
    assert seen["leaks"] == [{"record": "line-10", "trained": "line-4", "same": "question and answer"}]
    assert seen["repeated"] == [] and "duplicates" not in told(seen)
    assert "duplicates 1 training record with an earlier" in told(tiny(write([QA[0], QA[0]])))
    assert "leaks 1 validation or test record also in the training set: line-10 has the qu" in told(seen)
    seen = tiny(write([QA[0] | {"split": "test" if i > 8 else "train"} for i in range(17)]))
    assert seen["repeated"] == [{"record": f"line-{i}", "first": "line-1"} for i in range(2, 10)]
    text = told(seen)
    assert "8 validation or test records also in" in text and "8 training records with an earlier one's text:" in text
    assert text.count("has the question") == text.count("repeats line-1") == 5 and text.count("and 3 more") == 2


def test_what_is_truncated_and_what_is_dropped_is_counted_by_split(write):
    rows = [QA[0] | {"split": "train"}, QA[1] | {"split": "test"}, {**QA[2], "question": "x" * 90, "split": "train"}]
    seen = tiny(write(rows), max_length=20)
    assert [(n["truncated"], n["dropped"]) for n in seen["lengths"].values()] == [(2, 1), (1, 0)]
    assert (
        "longer than --max-length 20, and truncated: 2 of train, 1 of test; "
        "dropped, since nothing of the answer is left: 1 of train" in told(seen)
    )
    assert f"... truncated here, {seen['examples'][0]['tokens'] - 20} tokens before its end" in told(seen)
    assert "train on it with" in told(seen)  # one record is left


def test_where_all_training_records_are_dropped_no_training_is_advised_and_the_length_named_drops_none(write):
    path = write([{"question": f"What is {i}?", "answer": "A number."} for i in range(20)])
    said = told(tiny(path, max_length=8))
    (enough,) = re.findall("nothing is left to train on: --max-length ([0-9]+) would drop nothing", said)
    assert "train on it with" not in said and "minilora finetune" in told(found := tiny(path, max_length=int(enough)))
    assert not any(n["dropped"] for n in found["lengths"].values())


def test_without_the_tokenizer_of_the_base_nothing_is_downloaded_and_tiny_counts(write, monkeypatch):
    monkeypatch.setattr(command, "find", lambda name: None)
    monkeypatch.setattr(load, "pull", None)
    seen = look(write(QA))
    assert seen["lengths"] == tiny("data.jsonl")["lengths"] and seen["tokens_of"] == "tiny"
    assert "smollm2 is not on this machine, so tiny's tokenizer counts: it counts about 1.5 times as" in told(seen)


# -- examples ----------------------------------------------------------------------------------------------------------


def test_an_example_is_the_record_as_the_model_sees_it_with_the_scored_tokens_marked(write):
    seen = tiny(write([{"conversations": TALK}]))
    (example,) = seen["examples"]
    (sample,) = encode_records(read_records("data.jsonl"), load.load_tokenizer("tiny"))
    whole = load.load_tokenizer("tiny").core.decode(sample.ids, skip_special_tokens=False)
    assert "".join(run["text"] for run in example["runs"]) == whole and example["tokens"] == len(sample.ids)
    assert [run["text"] for run in example["runs"] if run["scored"]] == ["Hi.<|im_end|>", "So,\nas it is.<|im_end|>"]
    assert (
        "  <|im_start|>system\n  Be brief.<|im_end|>\n  <|im_start|>user\n  Hello?<|im_end|>\n"
        "  <|im_start|>assistant\n  [[Hi.<|im_end|>]]\n  <|im_start|>user\n  Why?<|im_end|>\n"
        "  <|im_start|>assistant\n  [[So,]]\n  [[as it is.<|im_end|>]]\n"
    ) in page(seen)


def test_no_example_is_cut_within_a_character(write):
    text = "返品é👩" * 20
    write(text, "own.txt")
    write([{"question": "返", "answer": text}])
    for length in range(40, 46):
        for name, whole in (("own.txt", text), ("data.jsonl", f"\n返<|im_end|>\n<|im_start|>assistant\n{text}")):
            (example,) = tiny(name, max_length=length)["examples"]
            shown = "".join(run["text"] for run in example["runs"]).removeprefix("<|im_start|>user")
            assert whole.startswith(shown) and len(shown) > 9 and example["runs"][-1]["scored"]


def test_of_a_pair_the_rejected_answer_is_shown_as_well_and_a_long_one_is_cut(write):
    pairs = [{"prompt": f"{text[1]}?", "chosen": "yes", "rejected": text} for text in ("no", "\x1b" + "x" * 900)]
    seen = tiny(write(pairs))
    assert [example["rejected"] for example in seen["examples"]] == [pair["rejected"] for pair in pairs]
    text = page(seen, 70)
    assert "  rejected: no\n" in text and "rejected: \\x1bxxx" in text and text.count("xxx\n") == 3
    assert "... 11 lines ..." in text and columns(text) <= 70 and "rejected" not in page(tiny(write(QA)))


def test_a_terminal_underlines_what_a_pipe_puts_in_brackets(write):
    seen = tiny(write(QA))
    plain, marked = page(seen, marks=BRACKETS), page(seen, marks=UNDERLINED)
    pairs = ((plain, BRACKETS), (marked, UNDERLINED))
    without = [text.replace(on, "").replace(off, "") for text, (on, off) in pairs]
    lines = [[line.rstrip("-") for line in text.split("\n")] for text in without]
    assert lines[0] == lines[1]
    assert "[[" not in marked and "\x1b" not in plain and columns(without[1]) <= 100
    rules = [line for line in [*plain.split("\n"), *without[1].split("\n")] if line.startswith("-- ")]
    assert len(rules) == 6 and {len(line) for line in rules} == {100}


@pytest.mark.parametrize("width", [70, 80, 300])
def test_the_page_fits_the_terminal(write, width):
    long = [{"question": "Why " * 60, "answer": "so it is, " * 90 + "x" * 200, "a rather long name": 1}] * 3
    *body, line = page(tiny(write([*QA, *long])), width).split("\n")
    assert columns("\n".join(body)) <= min(width, 100) and line.startswith("  minilora finetune")
    wide = page(tiny(write([{"question": "返品は？" * 40, "answer": "はい。" * 60}])), width).split("\n")
    assert min(width, 100) - 8 < max(width_of(each) for each in wide) <= min(width, 100)


def test_a_long_example_loses_its_middle_and_control_characters_are_escaped(write):
    text = page(tiny(write([{"question": "Why?\x1b[2J", "answer": "\n".join(f"line {i}." for i in range(60))}])))
    assert "\x1b" not in text and "Why?\\x1b[2J" in text
    shown = [int(number) for number in re.findall(r"\[\[line (\d+)\.", text)]
    (hidden,) = re.findall(r"\.\.\. (\d+) lines \.\.\.", text)
    assert len(shown) + int(hidden) == 60 and shown[0] == 0 and shown[-1] == 59 and len(shown) < 14


def test_three_records_are_shown_the_first_the_middle_one_and_one_of_the_test_set(write):
    assert [(e["id"], e["split"]) for e in tiny(write(QA))["examples"]] == [
        ("line-1", "train"), ("line-16", "train"), ("line-10", "test"),
    ]  # fmt: skip
    for count in (1, 2, 3, 4):
        assert len(tiny(write(QA[:count]))["examples"]) == min(count, 3)


# -- texts, folders, columns under other names -------------------------------------------------------------------------


def test_a_text_is_shown_as_the_sequences_it_is_divided_into(write):
    seen = tiny(write("It was dark. " * 300, "novel.txt"), max_length=32)
    tokens = len(load.load_tokenizer("tiny").encode("It was dark. " * 300))
    assert sum(n["tokens"] for n in seen["lengths"].values()) in (tokens, tokens - 1)
    assert seen["lengths"]["test"]["samples"] == -(-tokens // 32) // 10 and seen["formats"] == {"text": 1}
    assert "the last tenth of the text" in told(seen) and "texts are divided" in told(seen) and "samples" in told(seen)
    rows = [{"text": "It was dark. " * 30} for _ in range(10)]
    assert tiny(write(rows), max_length=32)["lengths"]["test"]["samples"] > 1


def test_a_text_that_begins_with_much_white_space_has_a_page(write):
    name = write("\n" * 300 + "It was dark. " * 20, "novel.txt")
    assert "-- as the model sees them" in told(tiny(name, max_length=8))


def test_a_short_text_is_all_trained_on_and_that_is_said(write):
    seen = tiny(write("It was dark. " * 20, "novel.txt"), max_length=32)
    sequences = seen["lengths"]["train"]["samples"]
    assert [*seen["lengths"]] == ["train"] and 1 < sequences < 10
    line = "splits all is trained on and nothing is held out: that takes 10 sequences, and there are"
    assert f"{line} {sequences}" in told(seen)


def test_a_text_of_a_row_is_shown_with_an_end_token_and_a_text_alone_without(write):
    rows = [{"text": text} for text in ("a", "It was dark.", "It was dark. " * 300)]
    short, _, held = tiny(write([*rows, *rows[:1] * 7]), max_length=32)["examples"]
    assert ["".join(run["text"] for run in example["runs"]) for example in (short, held)] == ["a<|im_end|>"] * 2
    (alone,) = tiny(write("It was dark.", "novel.txt"))["examples"]
    assert "".join(run["text"] for run in alone["runs"]) == "It was dark."


@pytest.mark.parametrize(("source", "lengths"), [("novel.txt", []), ("general", ["test"])])
def test_data_without_anything_to_train_on_can_be_looked_at(write, source, lengths):
    write("a", "novel.txt")
    seen = tiny(source)
    assert list(seen["lengths"]) == lengths and page(seen).endswith("there is no training record")


def test_folders_name_their_files_and_columns_under_other_names_are_in_the_command(write, tmp_path):
    for split in ("train", "valid"):
        write(QA[:2], f"{split}.jsonl")
    assert "files train.jsonl, valid.jsonl splits as the files say" in told(tiny(tmp_path))
    name = write([{"the ask": "Why?", "tell": "So."}], "my data.jsonl")
    shutil.copytree(load.locate("tiny"), "my base")
    options = LookOptions(base="my base", field={"question": "the ask", "answer": "tell"}, max_length=64)
    text = page(look(name, options))
    assert "question is the column the ask, answer is the column tell" in text
    told_next = "--data 'my data.jsonl' --field 'question=the ask' answer=tell --base 'my base' --max-length 64"
    assert text.endswith(f"  minilora finetune {told_next}")


def test_the_command_for_pairs_alone_has_the_loss_that_learns_from_both_answers(write):
    pairs = [{"prompt": f"{i}?", "chosen": f"{i}", "rejected": "no"} for i in range(3)]
    for rows, loss in ((pairs, " --loss dpo"), (QA[:3], ""), ([*pairs, *QA[:3]], "")):  # of both kinds, SFT takes all
        assert page(tiny(write(rows))).endswith(f"  minilora finetune --data data.jsonl --base tiny{loss}")


# -- the command -------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_training():
    assert (LookOptions().base, LookOptions().max_length) == (Options().base, Options().max_length)


def test_the_command_prints_the_page_and_with_json_the_facts(write, capsys):
    name = write([{"ask": one["question"], "tell": one["answer"]} for one in QA])
    words = ["data", name, "--field", "question=ask", "answer=tell", "--base", "tiny"]
    seen = tiny(name, field={"question": "ask", "answer": "tell"})
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == page(seen) + "\n" and err == ""
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == seen


@pytest.mark.parametrize(("terminal", "env", "underlined"), [
    (True, {"TERM": "xterm"}, True),
    (False, {"TERM": "xterm"}, False),
    (True, {"TERM": "dumb"}, False),
    (True, {"TERM": "xterm", "NO_COLOR": ""}, False),
    (True, {"OS": "Windows_NT"}, False),
    (True, {"OS": "Windows_NT", "WT_SESSION": "1"}, True),
])  # fmt: skip
def test_only_a_terminal_that_can_underlines(write, capsys, monkeypatch, terminal, env, underlined):
    for name in ("NO_COLOR", "TERM", "WT_SESSION"):
        monkeypatch.delenv(name, raising=False)
    system = SimpleNamespace(stdout=sys.stdout, platform="win32" if "OS" in env else "linux")
    monkeypatch.setattr("minilora.commands.data.sys", system)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert main(["data", write(QA), "--base", "tiny"]) == 0
    out = capsys.readouterr().out
    assert (UNDERLINED[0] in out, BRACKETS[0] in out) == (underlined, not underlined)


@pytest.mark.parametrize(("words", "code", "reason"), [
    (["absent.jsonl"], 1, "absent.jsonl: no such data file"),
    (["data.jsonl", "--max-length", "7"], 2, "--max-length must be at least 8, got '7'"),
    (["data.jsonl", "--base", "absent"], 1, "absent: no such model"),
    (["data.jsonl", "--field", "question=zzz"], 1, "data.jsonl:1: field question=zzz: no such column; there are"),
    (["data.jsonl", "--field", "qestion=q"], 2, "field qestion=q: minilora reads no 'qestion' (did you mean question"),
])  # fmt: skip
def test_the_command_answers_a_mistake_in_one_line(write, capsys, words, code, reason):
    write(QA)
    assert status("data", *instead({"--base": "tiny"}, *words)) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"minilora: {reason}") and err.count("\n") == 1

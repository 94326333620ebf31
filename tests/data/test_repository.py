"""Data sets by their names on a hub, here on the loopback: which files are read, and each error in one line."""

import json
import math
import sys

import pytest
from loopback_hub import answer_of, serving

from minilora.data import repository
from minilora.data.records import DataError, read_records
from minilora.data.repository import _by_split, _split_of, is_dataset

pytest.importorskip("huggingface_hub", reason="pip install 'minilora[hub]'")
SHA = "b" * 40
SCRIPT = """
import json, sys
from minilora.data.records import read_source, revision_of_data, sha256_of_data
found = {}
for source in sys.argv[1:]:
    try:
        reading = read_source(source)
        rows = [[record.id, record.split, record.messages[-1]["content"]] for record in reading.records]
        found[source] = [[path.name for path in reading.files], rows, revision_of_data(source), sha256_of_data(source)]
    except ValueError as error:
        found[source] = str(error)
print(json.dumps(found))
"""


def jsonl(*answers):
    return "".join(json.dumps({"question": f"What is {a}?", "answer": a}) + "\n" for a in answers).encode()


def parquet(columns, names=None):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'minilora[hub]'")
    from pyarrow import parquet

    table = pyarrow.table(columns)
    if names:
        features = {key: {"names": each, "_type": "ClassLabel"} for key, each in names.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


SETS = {
    "org/splits": {
        "README.md": b"# Data",
        "train.jsonl": jsonl("one", "two"),
        "dev.jsonl": jsonl("three"),
        "data/test-00000-of-00001.jsonl": jsonl("four"),
        "unsupervised-00000-of-00001.jsonl": jsonl("five"),
        "notes.csv": b"a,b\n",
        "dataset_infos.json": b"{}",
    },
    "org/alone": {"alpaca.json": b"[" + jsonl("one").strip() + b"]"},
    "org/subsets": {"en/train.csv": b"question,answer\nq,en\n", "de/train.csv": b"question,answer\nq,de\n"},
    "org/unnamed": {"a/train_sft-00000-of-00001.jsonl": jsonl("x"), "a/test_sft-00000-of-00001.jsonl": jsonl("y")},
    "org/script": {"script.py": b"import os"},
    "org/pictures": {"a.png": b"", ".gitattributes": b""},
}


@pytest.fixture(scope="module")
def hub():
    with serving({"datasets": SETS}, SHA) as address:
        yield address


def ask(endpoint, home, *sources, largest=None):
    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    return answer_of(SCRIPT, endpoint, home, *sources, before=limit if largest else None)


READ = ("org/splits", "org/splits:train", "org/alone", "org/subsets:de", "org/unnamed:a/test_sft", "org/splits@main")
REFUSED = {
    "org/absent": "no such dataset at",
    "org/gated": "accept its terms at",
    "org/splits@v9": "no revision 'v9'",
    "org/splits:dev": "no such split; there are test, train, unsupervised, validation",
    "org/subsets": "which subset? Name it, as org/subsets:de; there are de/train, en/train",
    "org/unnamed": "which split? Name it after a colon; there are a/test_sft, a/train_sft",
    "org/script": "no code of a repository is run; it may have been converted: try org/script@refs/convert/parquet",
    "org/pictures": "holds no .parquet, .jsonl",
}


@pytest.mark.long
def test_the_files_of_the_wanted_splits_alone_are_read_and_each_error_is_one_line(hub, tmp_path):
    found = ask(hub, tmp_path, *READ, *REFUSED)
    for source, words in REFUSED.items():
        line = found[source]
        assert line.startswith(f"{source}: ") and words in line and "\n" not in line, line
    files, rows, revision, whole = found["org/splits"]
    assert files == ["train.jsonl", "dev.jsonl", "test-00000-of-00001.jsonl"] and revision == SHA
    assert rows == [
        ["train/line-1", "train", "one"],
        ["train/line-2", "train", "two"],
        ["validation/line-1", "validation", "three"],
        ["test/line-1", "test", "four"],
    ]
    assert (
        found["org/splits@main"] == found["org/splits"] and len(whole) == 64 and whole != found["org/splits:train"][3]
    )
    assert found["org/splits:train"][1] == [["line-1", None, "one"], ["line-2", None, "two"]]  # divided by the rule
    for source, answer in (("org/alone", "one"), ("org/subsets:de", "de"), ("org/unnamed:a/test_sft", "y")):
        (row,) = found[source][1]
        assert row[1:] == [None, answer]
    there = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink() or path.is_file()}
    assert not there & {"unsupervised-00000-of-00001.jsonl", "notes.csv", "train_sft-00000-of-00001.jsonl"}
    offline = ask("http://127.0.0.1:9", tmp_path, "org/splits", "org/new")  # without a network: what is in the cache
    assert offline["org/splits"] == found["org/splits"]
    assert "127.0.0.1:9 cannot be reached: check the network" in offline["org/new"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_on_a_full_disk_the_error_is_one_line(hub, tmp_path):
    (line,) = ask(hub, tmp_path, "org/splits", largest=20).values()  # no file may have more than 20 bytes
    assert "cannot be downloaded from" in line and "too large" in line and "\n" not in line


def test_a_path_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/set", "org/set:train", "org/set@v1.0:en/train"):
        assert is_dataset(name)
    for other in ("legal", "org/set.jsonl", "org/set.parquet", "./org/set", "a/b/c", "C:/data", "runs/mine.txt"):
        assert not is_dataset(other)
    (tmp_path / "org").mkdir()
    assert not is_dataset("org/set") and not is_dataset("org/set:train")


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train.jsonl", "train"),
        ("my-valid.csv", "validation"),
        ("data/train_sft-00001-of-00002-abc.parquet", "train_sft"),
        ("default/test/0000.parquet", "default/test"),
        ("main/eval.json", "main/test"),
        ("contest.json", "train"),
        ("test/data/a.csv", "test"),
    ],
)
def test_the_name_of_a_file_says_its_split(file, split):
    assert _split_of(file) == split


def test_what_describes_data_is_no_data():
    assert _by_split("org/set", ["dataset_infos.json", ".git/a.json", "a.json"]) == {"train": ["a.json"]}


def test_the_files_are_those_of_the_revision_and_rows_of_several_files_have_names_of_their_own(tmp_path, monkeypatch):
    folder, asked = tmp_path / SHA, []
    folder.mkdir()
    names = [f"train-0000{i}-of-00002.jsonl" for i in range(2)] + ["test.jsonl"]
    for name in names:
        (folder / name).write_bytes(jsonl(name))
    monkeypatch.setattr(repository, "snapshot", lambda *given: asked.append(given) or folder)
    monkeypatch.setattr(repository, "_names_of", lambda *_: names)
    ids = [record.id for record in read_records("org/shards@v1")]
    assert ids == ["train-00000-of-00002/line-1", "train-00001-of-00002/line-1", "test/line-1"]
    assert asked == [("org/shards@v1", ["README.md"], "dataset"), (f"org/shards@{SHA}", names, "dataset")]


def test_parquet_is_read_like_any_other_file(tmp_path):
    talk = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{i}"}] for i in range(1001)]
    (tmp_path / "talk.parquet").write_bytes(parquet({"messages": talk}))
    records = read_records(tmp_path / "talk.parquet")
    assert [record.messages[-1]["content"] for record in records] == [f"a{i}" for i in range(1001)]
    labels = {"text": ["good", "bad"], "label": [1, 0]}
    (tmp_path / "labels.parquet").write_bytes(parquet(labels, {"label": ["negative", "positive"]}))
    assert [r.label for r in read_records(tmp_path / "labels.parquet")] == ["positive", "negative"]
    (tmp_path / "nan.parquet").write_bytes(parquet({"text": ["a", "b", "c"], "label": [1.0, math.nan, 0.0]}))
    assert [(r.id, r.label) for r in read_records(tmp_path / "nan.parquet")] == [("row-1", "1"), ("row-3", "0")]
    (tmp_path / "bad.parquet").write_bytes(parquet({"q": ["q", "q"], "a": ["a", "b"], "split": ["test", "x"]}))
    with pytest.raises(DataError, match=r"bad.parquet: row 2: split is 'x', expected one of"):
        read_records(tmp_path / "bad.parquet")
    (tmp_path / "half.parquet").write_bytes(parquet({"question": ["q"]})[:-20])
    with pytest.raises(DataError, match=r"^[^\n]*half.parquet: a Parquet file that cannot be read \([^\n]*\)$"):
        read_records(tmp_path / "half.parquet")


@pytest.mark.parametrize("names", [5, {"0": "no"}, None, True], ids=str)
def test_parquet_whose_notes_of_its_labels_are_damaged_is_named(tmp_path, names):
    (tmp_path / "x.parquet").write_bytes(parquet({"text": ["a"], "label": [0]}, {"label": names}))
    with pytest.raises(DataError, match=r'^[^\n]*x.parquet: the entry "huggingface" of its schema names no labels'):
        read_records(tmp_path / "x.parquet")

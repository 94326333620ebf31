"""Results that are computed once: found again by all that decides them, and by nothing else."""

import json
import math

import pytest

from minilora.experiments import memo
from minilora.experiments.memo import code_sha256, keep, path_of, recall, remember
from minilora.files.disk import ModelFileError


def test_a_result_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"loss": 2.5, "both": (1, 2)}

    for times, decides in enumerate([{"lr": 1, "seed": 0}, {"lr": 1, "seed": "0"}, {"lr": 1}], 1):
        path = path_of(tmp_path / "new" / "folder", "run", decides)
        first = remember(path, decides, make)
        assert first == remember(path, dict(reversed(decides.items())), make) and len(made) == times
        assert first["result"] == {"loss": 2.5, "both": [1, 2]} and first["seconds"] >= 0
        assert recall(path, decides) == first == json.loads(path.read_text())


def test_under_a_plain_name_a_record_counts_only_for_what_decided_it(tmp_path):
    path = tmp_path / "lora-0.001.json"
    assert recall(path, {"steps": 1}) is None
    keep(path, {"steps": 1, "rates": (1, 2)}, 5, note="here")
    assert recall(path, {"steps": 1, "rates": [1, 2]}) == recall(path, {"rates": (1, 2), "steps": 1})
    for other in ({"steps": 2, "rates": [1, 2]}, {"steps": 1}, {"steps": 1, "rates": [1, 2], "seed": 0}, {}):
        assert recall(path, other) is None
    path.write_text("half of it")
    with pytest.raises(ModelFileError, match=r"lora-0\.001\.json: not readable"):
        recall(path, {"steps": 1})
    path.write_text('{"decides": {"steps": 1}}')
    assert recall(path, {"steps": 1}) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, {"deep": [-math.inf]}])
def test_what_json_cannot_hold_is_not_kept(bad, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        keep(tmp_path / "x.json", {}, bad)
    assert list(tmp_path.iterdir()) == []


# -- which code --------------------------------------------------------------------------------------------------------

FILES = {
    "__init__.py": "",
    "a.py": "from . import b\nfrom .deep.c import x\n\ndef late():\n    import package.e\n",
    "b.py": "y = 1\n",
    "deep/__init__.py": "",
    "deep/c.py": "from ..f import z\nx = 1\n",
    "d.py": "",
    "e.py": "",
    "f.py": "z = 1\n",
    "data/legal.jsonl": "{}",
    "data/other.py": "",
    "weights/tiny.bin": "1",
}


@pytest.fixture
def package(tmp_path):
    for name, text in FILES.items():
        (tmp_path / "package" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "package" / name).write_text(text)
    return tmp_path / "package"


def fingerprint(package, file="a.py"):
    memo._code.cache_clear()
    return code_sha256.__wrapped__(package / file, package)


@pytest.mark.parametrize(
    ("name", "text", "decides"),
    [
        ("a.py", FILES["a.py"] + "STEPS = 1\n", True),
        ("b.py", "y = 2\n", True),
        ("deep/c.py", "from ..f import z\nx = 2\n", True),
        ("f.py", "z = 2\n", True),  # two imports away
        ("e.py", "v = 2\n", True),  # imported in a function
        ("deep/__init__.py", "u = 1\n", True),
        ("__init__.py", "u = 1\n", False),  # it gives names alone
        ("d.py", "z = 1\n", False),  # nobody imports it
        ("b.py", '"""Words."""\ny = 1  # one\n', False),
        ("b.py", 'y = (\n    1)\nCLAIM = "words"\n\ndef picture():\n    from . import d\n', False),
        ("b.py", "y = 1\n\ndef picture_of():\n    pass\n", True),
        ("data/legal.jsonl", "{1}", True),
        ("data/more.csv", "", True),
        ("data/other.py", "u = 1", False),
        ("data/README.md", "words", False),
        ("weights/tiny.bin", "2", True),
        ("pages/blue.bin", "2", False),
    ],
)
def test_code_and_data_decide_and_words_do_not(package, name, text, decides):
    before = fingerprint(package)
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text(text)
    assert (fingerprint(package) != before) is decides


def test_a_file_outside_the_package_counts_with_what_it_imports(package, tmp_path):
    (tmp_path / "own.py").write_text("import package.f\n")
    before = fingerprint(package, tmp_path / "own.py")
    (package / "b.py").write_text("y = 3\n")
    assert fingerprint(package, tmp_path / "own.py") == before
    (package / "f.py").write_text("z = 3\n")
    assert fingerprint(package, tmp_path / "own.py") != before


@pytest.mark.long
def test_the_code_of_a_claim_is_what_it_uses():
    root = memo.ROOT
    used = {path.relative_to(root).as_posix() for path in memo._used(root / "claims/planted_rank.py", root)}
    assert {"nn/optim.py", "engine/tensor.py", "experiments/claim.py", "experiments/trials.py"} <= used
    assert not {"commands/reproduce.py", "pages/style.py", "models/load.py", "cli.py"} & used
    whole = {path.relative_to(root).as_posix() for path in memo._used(root / "__init__.py", root)}
    assert "models/load.py" in whole and (root / memo.DATA[0]).is_dir() and (root / memo.DATA[1]).is_dir()


@pytest.mark.parametrize("file", ["followed.py", "tiny.py"])
def test_runs_that_take_hours_do_not_depend_on_how_claims_are_judged_and_printed(file):
    used = {path.relative_to(memo.ROOT).as_posix() for path in memo._used(memo.ROOT / "experiments" / file, memo.ROOT)}
    assert "train/loop.py" in used
    assert not [name for name in used if name.startswith(("pages/", "claims/")) or name == "experiments/claim.py"]

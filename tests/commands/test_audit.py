"""`minilora audit`: which words are the folder and which the kind of --quantized."""

import pytest
from commandline import status

from minilora.cli import main
from minilora.lora import audit
from minilora.models import with_adapters


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Runs the command without a model; returns what it would load: (adapter's name, its folder, quantized)."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/legal", "runs/law"):
        (tmp_path / folder).mkdir(parents=True)
    loaded = []
    monkeypatch.setattr(with_adapters, "load_with_adapters",
                        lambda named, base, quantized, force: (loaded.append((named, quantized)), None))  # fmt: skip
    monkeypatch.setattr(audit, "audit", lambda model, name: "")

    def ask(*words):
        loaded.clear()
        assert main(["audit", *words]) == 0
        ((named, quantized),) = loaded
        ((name, folder),) = named.items()
        return name, folder.as_posix(), quantized

    return ask


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("legal", "runs/legal", False)),
        (["runs/law"], ("law", "runs/law", False)),
        (["--quantized"], ("legal", "runs/legal", True)),
        (["--quantized", "runs/law"], ("law", "runs/law", True)),
        (["runs/law", "--quantized"], ("law", "runs/law", True)),
        (["--quantized", "nf4", "runs/law"], ("law", "runs/law", "nf4")),
        (["runs/law", "--quantized", "q8_0"], ("law", "runs/law", "q8_0")),
        (["--quantized=int4"], ("legal", "runs/legal", "int4")),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_the_folder_may_follow_quantized_with_and_without_a_kind(asked, words, expected):
    assert asked(*words) == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--quantized", "nf3"], "--quantized: invalid choice: 'nf3' (choose from nf4, fp4, int4, q8_0, q4_1)"),
        (["--quantized", "runs/law", "runs/other"], "one adapter at a time: runs/other, runs/law are 2"),
        (["--quantized", "true"], "invalid choice: 'true'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_is_neither_is_refused(asked, capsys, words, reason):
    assert status("audit", *words) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]

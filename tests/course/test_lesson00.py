"""Lesson 0: what it quotes was printed, and it says what to do where the real model is missing."""

import re

import pytest
from lessonfiles import BUILT, LESSONS

from minilora.models import hub

CELLS = BUILT["00_what_can_lora_do.ipynb"]["cells"]
WORDS = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
LOG = " ".join((LESSONS / "pictures" / "finetune.txt").read_text("utf-8").split())


def test_the_quoted_answers_and_sizes_are_those_of_the_log():
    quoted = " ".join(re.sub(r"(?m)^> ?", "", "\n".join(re.findall(r"(?m)^>.*$", WORDS))).split())
    for label, mark in (("Before", "before"), ("After", "after")):
        (answer,) = re.findall(rf"\*\*{label}:\*\* (.*?) \[\.\.\.\]", quoted)
        assert len(answer) > 80 and f"{mark} {answer}" in LOG
    (question,) = re.findall(r"([^.?]*\?) \*\*Before", quoted)
    assert f"{question.strip()} (training question, paraphrased) before Imagine" in LOG
    assert "adapter 9.8 MB; base in memory 538 MB" in LOG and "240 training records" in LOG
    assert hub.SOURCES["smollm2"].size == pytest.approx(98e6, rel=0.01)


@pytest.mark.parametrize(
    "number, answers", [(r"right answers of SmolLM2: (\d+)", 10), (r"right answers after: (\d+)", 10)]
)
def test_all_ten_facts_were_learned_in_the_run_that_is_shown(number, answers):
    printed = "\n".join("".join(o.get("text", "")) for cell in CELLS for o in cell.get("outputs", []))
    assert [int(found) for found in re.findall(number, printed)] == [answers]
    assert "after:  The cat is called Ledger." in printed  # as the text says


def test_without_the_real_model_its_cell_says_in_a_line_what_to_do(capsys):
    (cell,) = ["".join(cell["source"]) for cell in CELLS if 'find("smollm2")' in "".join(cell["source"])]
    exec(cell, {"find": lambda name: None})
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "`minilora pull smollm2`" in line

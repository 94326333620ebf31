"""The page that compares minilora with its peers: every target from the contenders of its group."""

import json
import shutil

from benchmarks import contenders, peers, targets

from minilora.measure.environment import machine

WHERE = {"machine": machine(), "versions": {"minilora": "1"}, "created": "2026-01-31T00:00:00+00:00", "rounds": 3}


def measured(**seconds):
    """A group's result: seconds of each contender, and as many bytes."""
    rows = {name.replace("_", "-"): {"seconds": times, "peak_bytes": times[0]} for name, times in seconds.items()}
    return WHERE | {"title": "a step", "unit": "s", "contenders": rows, "skipped": {"torch-full": "needs torch"}}


def test_a_target_is_printed_next_to_the_ratio_of_medians():
    page = targets.page({"step": measured(lora=[9, 3, 3], peft_lora=[4, 4, 9])})
    assert "| float32 | PEFT | 0.75 | 0.85 | 0.75 |" in page  # medians 3 and 4
    assert "| float32 | PEFT | 2.25 | 0.50 | 0.45 |" in page  # bytes 9 and 4
    assert "| lora | 3.000 | 3.000 | 0 |" in page and "| torch-full | skipped: needs torch |" in page


def test_what_was_not_measured_is_said_to_be_so():
    page = targets.page({"step": measured(lora=[3])})
    assert page.count("not measured") == sum(len(rows) for _, rows in targets.TARGETS.values())


def test_generation_is_compared_by_tokens_of_all_streams():
    page = targets.page({"generation": measured(generate_8=[4], transformers=[2])})
    assert "| transformers, 1 | 4.00 | 3 | 4 |" in page


def test_every_target_is_about_contenders_of_its_group():
    class Asked(dict):  # rows of every name, which notes the names
        def __missing__(self, name):
            self[name] = {"seconds": [1.0], "peak_bytes": 1 + len(self)}
            return self[name]

    for group, rows in targets.TARGETS.values():
        for target in rows:
            target.value(asked := Asked())
            assert asked.keys() <= {contender.name for contender in peers.GROUPS[group].contenders}, target


def test_a_contender_that_lacks_something_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(contenders.shutil, "which", lambda name: None)
    monkeypatch.setattr(contenders, "find_spec", lambda name: None if name == "peft" else name)
    assert contenders.missing("peft-lora-compiled") == ["peft", "a C++ compiler"]
    assert contenders.missing("torch-mlp-compiled") == ["a C++ compiler"]
    assert contenders.missing("torch-mlp") == contenders.missing("lora") == []


def test_the_readme_shows_what_results_json_holds(monkeypatch, tmp_path):
    written = peers.README.read_text(encoding="utf-8")
    for name in ("RESULTS", "README"):
        shutil.copy(getattr(peers, name), tmp_path)
        monkeypatch.setattr(peers, name, tmp_path / getattr(peers, name).name)
    peers.write(results := json.loads(peers.RESULTS.read_text(encoding="utf-8")))
    assert peers.README.read_text(encoding="utf-8") == written
    assert all(block(results) in written for block in targets.BLOCKS.values())


def test_without_bfloat16_nothing_is_measured_in_it(monkeypatch, tmp_path):
    monkeypatch.setattr(peers.bfloat16, "why_not", lambda: "no bfloat16 here")
    monkeypatch.setattr(peers, "missing", lambda name: [])
    measured = []
    monkeypatch.setattr(peers, "take_turns", lambda contenders, rounds: measured.extend(contenders) or {})
    skipped = peers.measure("step", 1, str(tmp_path))["skipped"]
    names = ("bf16", "quantized-bf16", "peft-lora-bfloat16")
    assert skipped == dict.fromkeys(names, "no bfloat16 here")
    assert {"lora", "peft-lora"} <= {each.name for each in measured}

"""An adapter remembers the system prompt of the records that it was trained on."""

import json

import pytest

import minilora as ml
from minilora.files.disk import ModelFileError
from minilora.train.job import finetune
from minilora.train.options import Options


def trained(folder, systems):
    """The system prompt in the adapter's notes and in the loaded adapter, after a step on one record per prompt."""
    talks = [
        [{"role": "system", "content": system}] * (system is not None)
        + [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"A number: {i}."}]
        for i, system in enumerate(systems)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    out = folder / "adapter"
    finetune(Options(base="tiny", data=str(data), out=str(out), steps=1, batch_size=1), measure=False)
    model, _ = ml.load("tiny")
    ml.load_adapter(model, out, "x")
    notes = json.loads((out / "minilora.json").read_text(encoding="utf-8"))["data"]
    assert notes.get("system") == model.adapters["x"].data.get("system")
    return notes.get("system")


@pytest.mark.parametrize(
    ("systems", "kept"),
    [(["Be brief."] * 12, "Be brief."), (["Be brief."] * 11 + ["Be long."], None), (["Be brief."] * 11 + [None], None)],
    ids=["same", "different", "missing"],
)
def test_the_system_prompt_of_all_records_is_kept(tmp_path, systems, kept):
    assert trained(tmp_path, systems) == kept


def test_a_system_prompt_that_is_no_text_is_refused(tmp_path):
    trained(tmp_path, ["Be brief."] * 12)
    path = tmp_path / "adapter" / "minilora.json"
    path.write_text(json.dumps({"data": {"system": 5}}), encoding="utf-8")
    model, _ = ml.load("tiny")
    with pytest.raises(ModelFileError, match="system of the data is a int, expected a text"):
        ml.load_adapter(model, tmp_path / "adapter", "x")

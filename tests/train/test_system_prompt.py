"""An adapter remembers the system prompt of the records that it was trained on."""

import json

import pytest
from jobs import trained

import minilora as ml
from minilora.data.records import Record
from minilora.files.disk import ModelFileError
from minilora.train.material import common_system


def talk(i, system):
    prompt = [] if system is None else [{"role": "system", "content": system}]
    return [*prompt, {"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"A number: {i}."}]


@pytest.mark.parametrize(
    ("systems", "common"),
    [(["Be brief."] * 3, "Be brief."), (["Be brief.", "Be long."], None), (["Be brief.", None], None), ([None], None)],
    ids=["same", "different", "missing", "none"],
)
def test_only_a_prompt_that_all_records_have_is_common(systems, common):
    records = [Record(str(i), tuple(talk(i, system))) for i, system in enumerate(systems)]
    assert common_system(records) == common


def test_the_common_system_prompt_is_saved_with_the_adapter_and_must_be_a_text(tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "adapter"
    data.write_text("".join(json.dumps({"messages": talk(i, "Be brief.")}) + "\n" for i in range(12)), encoding="utf-8")
    trained(ml.Options(base="tiny", data=str(data), out=str(out), steps=1, batch_size=1))
    model, _ = ml.load("tiny")
    ml.load_adapter(model, out, "x")
    assert model.adapters["x"].data["system"] == "Be brief."
    (out / "minilora.json").write_text(json.dumps({"data": {"system": 5}}), encoding="utf-8")
    with pytest.raises(ModelFileError, match="system of the data is a int, expected a text"):
        ml.load_adapter(model, out, "y")

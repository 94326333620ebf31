"""An adapter remembers the system prompt of the records that it was trained on."""

import json

import pytest
from jobs import trained

import minilora as ml
from minilora.commands.data import LookOptions, look, page
from minilora.data.records import Record
from minilora.data.samples import warning_of_systems
from minilora.files.disk import ModelFileError
from minilora.models.load import load_tokenizer
from minilora.train.material import common_system, prepare


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
    lines = warning_of_systems([*records, Record("text", text="no conversation")])
    assert len(lines) == (common is None and any(systems))  # what is not stored is named
    given = [system for system in systems if system]
    for line in lines:
        assert line.startswith(f"{len(given)} of {len(systems)} records begin with a system prompt")
        assert ("2 different ones" in line) == (len(set(given)) == 2)


def test_data_and_finetune_name_system_prompts_that_are_not_stored(tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    rows = [{"messages": talk(i, "Be brief." if i % 3 else None)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    line = "20 of 30 records begin with a system prompt: "
    seen = look(path, LookOptions(base="tiny"))
    (warning,) = seen["warnings"]
    assert warning.startswith(line) and f"warning      {line}"[:60] in page(seen)
    prepare(str(path), load_tokenizer("tiny"), max_length=512, eval_records=4)
    assert [message[: len(line)] for message in caplog.messages if "system" in message] == [line]


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

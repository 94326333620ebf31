"""What a job learns from and is measured by."""

from jobs import options

from minilora.train.material import prepare


def test_records_that_are_cut_are_told(home, words):
    said = []
    material = prepare(options(home, "unused", max_length=36), words, said.append)
    cut = (material.train, material.scored["unseen"], material.scored["paraphrase"])
    assert all(len(s.ids) <= 36 for part in cut for s in part)
    assert any(line.startswith("train: 8 of 8 records are longer than --max-length 36 and were cut") for line in said)


def test_at_most_eval_records_paraphrases_are_measured_evenly_chosen(home, words):
    material = prepare(options(home, "unused", eval_records=3), words, print)
    assert [r.id for r in material.asked["paraphrase"]] == ["x/0", "x/3", "x/6"]
    assert len(material.scored["paraphrase"]) == 3

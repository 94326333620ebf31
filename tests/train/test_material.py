"""What a job learns from and is measured by."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from jobs import material_of, options
from modelfiles import TERMS, write_jsonl

import minilora as ml
from minilora.data.records import Record, read_records
from minilora.data.splits import split_records
from minilora.nn.parts import Sample
from minilora.progress import show_progress
from minilora.train.material import Material, evaluate


def test_records_that_are_truncated_are_named(home, tokenizer, said):
    material = material_of(options(home, "unused", max_length=36), tokenizer)
    cut = (material.train, material.scored["unseen"], material.scored["paraphrase"])
    assert all(len(s.ids) <= 36 for part in cut for s in part)
    assert max(len(s.ids) for s in material.scored["general"]) > 36  # what is general is never cut
    told = "train: 8 of 8 records are longer than --max-length 36 and were truncated"
    assert any(line.startswith(told) for line in said())


def test_at_most_eval_records_of_every_set_are_measured_evenly_chosen(home, tmp_path, tokenizer, said):
    terms = [{key: value for key, value in TERMS[i % 12].items() if key not in ("split", "id")} for i in range(60)]
    terms = [one | {"validation_paraphrase": "So?"} for one in terms]
    chosen = options(home, "unused", data=write_jsonl(tmp_path / "data.jsonl", terms), eval_records=3)
    material = material_of(chosen, tokenizer)
    assert [r.id for r in material.asked["paraphrase"]] == ["line-1", "line-21", "line-41"]
    assert [r.id for r in material.asked["unseen"]] == ["line-10", "line-30", "line-50"]
    sizes = [len(material.train), len(material.validation), len(material.scored["general"])]
    assert len(material.validation_paraphrase) == 3
    assert sizes == [48, 3, 6] and material.sampled_from == {"validation": 6, "unseen": 6}
    assert [line for line in said() if "sample" in line] == [
        f"{name}: a sample of 3 of 6 is measured (--eval-records 3)" for name in ("validation", "unseen")
    ]
    text = material_of(options(home, "x", data=str(home / "novel.txt"), max_length=8, eval_records=1), tokenizer)
    assert [len(text.validation), len(text.scored["unseen"])] == [1, 1] and len(text.train) > 8


def test_other_data_get_their_shares_of_an_epoch_and_none_of_the_measuring(home, tmp_path, tokenizer, said):
    rows = [{"question": f"{i}?", "answer": f"{i}."} for i in range(30)] + [
        {"question": "x?", "answer": TERMS[-1]["answer"], "phrasings": ["y?"]}
    ]
    plain = options(home, "unused")
    chosen = replace(plain, mix={write_jsonl(tmp_path / "more.jsonl", rows): 0.5, str(home / "novel.txt"): 0.25})
    alone, mix = (material_of(each, tokenizer) for each in (plain, chosen))
    assert mix.train[:8] == alone.train and list(mix.mixed.values()) == [16, 8] and len(mix.train) == 4 * mix.own == 32
    assert (mix.scored, mix.asked, mix.validation_sets) == (alone.scored, alone.asked, alone.validation_sets)
    assert mix.sha256 != alone.sha256 and any("line-31" in line and "too good" in line for line in said())
    turns = sum(1 + len(each.others) for each in mix.train[8:24])
    assert turns == len(split_records(read_records(rows))["train"]) + 1  # all of them, and a phrasing
    number = len(split_records(read_records(rows))["train"])
    assert any(line.endswith(f"more.jsonl: each epoch has 16 of its {number} training records") for line in said())
    often = material_of(replace(plain, mix={str(tmp_path / "more.jsonl"): 0.9}), tokenizer).mixed.popitem()[1]
    times = f"more.jsonl: each epoch has its {number} training records {often / number:.1f} times"
    assert often > 2 * number and any(line.endswith(times) for line in said())
    little = material_of(replace(plain, mix={str(tmp_path / "more.jsonl"): 1e-3}), tokenizer)
    assert list(little.mixed.values()) == [1]
    for name in ("named", "also_named"):
        (tmp_path / f"{name}.csv").write_text("ask,tell\nWhy is it so?,So.\n")
    named = {"data": str(tmp_path / "named.csv"), "field": {"question": "ask", "answer": "tell"}}
    with pytest.raises(ml.DataError, match="named.csv:2: which columns"):
        material_of(replace(plain, mix={named["data"]: 0.5}), tokenizer)
    shares = {
        str(tmp_path / "also_named.csv"): 0.25,
        str(tmp_path / "more.jsonl"): 0.25,
    }  # one has the same names of columns, one its own
    assert list(material_of(replace(plain, **named, mix=shares), tokenizer).mixed) == list(shares)
    (tmp_path / "test.csv").write_text("question,answer,split\nWhy?,So.,test\n")
    with pytest.raises(ValueError, match="test.csv: there is no record to train on in it: leave it out of mix"):
        material_of(replace(plain, mix={str(tmp_path / "test.csv"): 0.1}), tokenizer)


def sets_of(**sets):
    return Material(**(dict(train=[], validation=[], scored={}, asked={}) | sets))


LONG, SHORT = Sample((1,) * 11, (1,) * 11), Sample((1,) * 10, (1,) * 10)


def test_labels_are_validated_with_all_messages_however_few_others_are_measured(home, tmp_path, tokenizer):
    rows = [{"text": f"{word} {i}", "label": word} for i in range(60) for word in ("up", "down")]
    chosen = options(home, "unused", data=write_jsonl(tmp_path / "data.jsonl", rows), eval_records=3)
    material = material_of(chosen, tokenizer)
    assert len(material.validation) == len(split_records(read_records(chosen.data))["validation"]) > 3
    assert material.sampled_from == {"unseen": 12} and len(material.scored["unseen"]) == 3
    assert len(material.checked.records) == 12  # as many are asked for their label


def test_the_fingerprint_depends_on_every_wording_and_label_of_training_and_validation_and_on_nothing_else():
    one, other = Sample((1, 2, 3), (-100, -100, 3)), Sample((1, 2, 4), (-100, -100, 4))
    unlike = [
        sets_of(train=[one]),
        sets_of(train=[other]),
        sets_of(train=[Sample(one.ids, (-100, 2, 3))]),
        sets_of(train=[Sample(one.ids, one.labels, (other,))]),
        sets_of(train=[Sample(one.ids, one.labels, (one,))]),
        sets_of(train=[one, one]),
        sets_of(train=[one], validation=[one]),
        sets_of(train=[one], validation_paraphrase=[one]),
    ]
    assert len({each.sha256 for each in unlike}) == len(unlike)
    assert sets_of(train=[one], scored={"unseen": [other]}).sha256 == sets_of(train=[one]).sha256


@pytest.mark.parametrize("name", ["train", "validation", "scored"])
def test_a_record_of_any_set_that_the_model_cannot_see_whole_is_refused(name, tokenizer):
    def sets(sample):
        return sets_of(**({"train": [SHORT]} | {name: {"general": [sample]} if name == "scored" else [sample]}))

    sets(SHORT).refuse_what_is_longer(10, "own.jsonl", tokenizer)
    with pytest.raises(ValueError, match="a record has 11 tokens, the model can see 10: use --max-length 10"):
        sets(LONG).refuse_what_is_longer(10, "own.jsonl", tokenizer)


@pytest.mark.parametrize("name", ["paraphrase", "unseen"])
def test_a_question_must_leave_room_for_a_measured_answer(name, tokenizer):
    record = Record("a/1", ({"role": "user", "content": "What?"}, {"role": "assistant", "content": "x" * 500}))
    material = sets_of(train=[SHORT], asked={name: [record]})
    length = len(tokenizer.encode_chat(record.prompt, answer_next=True))
    material.refuse_what_is_longer(length + 64, "own.jsonl", tokenizer)
    with pytest.raises(ValueError, match=rf"own\.jsonl: record a/1: a question of {length} tokens and an answer of 64"):
        material.refuse_what_is_longer(length + 63, "own.jsonl", tokenizer)


def test_the_sets_are_those_of_the_splits_and_only_records_with_keywords_are_asked(home, tmp_path, tokenizer):
    terms = [term | {"keywords": []} if i in (0, 10) else term for i, term in enumerate(TERMS)]
    material = material_of(options(home, "unused", data=write_jsonl(tmp_path / "data.jsonl", terms)), tokenizer)
    assert [len(material.train), len(material.validation)] == [8, 2]
    assert {name: len(part) for name, part in material.scored.items()} == {"paraphrase": 8, "unseen": 2, "general": 6}
    assert [r.id for r in material.asked["paraphrase"]] == [f"x/{i}" for i in range(1, 8)]
    assert [r.id for r in material.asked["unseen"]] == ["x/11"]
    assert material.asked["paraphrase"][0].prompt == [{"role": "user", "content": "Define 1."}]
    assert material.asked["unseen"][0].prompt == [{"role": "user", "content": "What is 11?"}]
    samples = ml.encode_records([ml.read_records(tmp_path / "data.jsonl")[0].asked_otherwise()], tokenizer)
    assert material.scored["paraphrase"][0] == samples[0] != material.train[0]


def test_reworded_questions_are_scored_and_asked_apart_from_paraphrased_ones(home, tmp_path, tokenizer):
    terms = [term | {"reworded": f"{term['id']} is what?"} if i in (1, 11) else term for i, term in enumerate(TERMS)]
    material = material_of(options(home, "unused", data=write_jsonl(tmp_path / "data.jsonl", terms)), tokenizer)
    assert list(material.scored) == ["reworded", "paraphrase", "unseen", "general"] and len(material.train) == 8
    (asked,) = material.asked["reworded"]  # that of a test record is no rewording of what was trained
    assert (
        asked.prompt[-1]["content"] == "x/1 is what?"
        and asked.messages[-1] == material.asked["paraphrase"][1].messages[-1]
    )
    assert material.scored["reworded"] == ml.encode_records([asked], tokenizer)


SHOWN = [  # records, what each of them is without, the questions asked for the page alone
    (TERMS, [], {}),
    (TERMS, ["keywords"], {"paraphrase": ["Define 0.", "Define 4."], "unseen": ["What is 10?", "What is 11?"]}),
    (
        TERMS,
        ["keywords", "paraphrase"],
        {"train": ["What is 0?", "What is 4?"], "unseen": ["What is 10?", "What is 11?"]},
    ),
    (TERMS, ["paraphrase"], {"train": ["What is 0?", "What is 4?"]}),
    (TERMS[:1], ["keywords", "paraphrase"], {"train": ["What is 0?"]}),
]


@pytest.mark.parametrize(("terms", "without", "expected"), SHOWN, ids=["all", "plain words", "bare", "asked", "one"])
def test_where_no_record_has_keywords_a_few_are_asked_all_the_same(
    terms, without, expected, home, tmp_path, tokenizer, talker
):
    lines = [json.dumps({key: value for key, value in term.items() if key not in without}) for term in terms]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    material = material_of(options(home, "x", data=str(tmp_path / "data.jsonl")), tokenizer)
    assert {name: [r.prompt[-1]["content"] for r in records] for name, records in material.shown.items()} == expected
    material.scored = {}
    measured = evaluate(talker, tokenizer, material, "now")
    assert set(measured.answers) == {*expected, *material.asked} and set(measured.recall) == set(material.asked)


def test_before_training_the_base_is_asked_with_as_many_examples_as_fit_and_without(talker, tokenizer):
    class Held:
        examples: Sequence[str] = ("some",)
        shots_that_fit, ask = (lambda self, tokenizer, limit: 3), (lambda self, model, tokenizer, shots: [shots])

    before, after = (evaluate(talker, tokenizer, sets_of(checked=Held()), when) for when in ("before", "after"))
    assert before.checked == {"base, zero-shot": [0], "base, 3-shot": [3]} and after.checked == {"after": [0]}
    Held.examples = ()  # as in a trial of a sweep, of which only the result counts
    before, after = (evaluate(talker, tokenizer, sets_of(checked=Held()), when) for when in ("before", "after"))
    assert before.checked == {} and after.checked == {"after": [0]}


def test_a_question_that_is_only_shown_and_does_not_fit_is_left_out(tokenizer):
    long, short = (Record("a", ({"role": "user", "content": word}, {"role": "assistant", "content": "y"})) for word in
                   ("x" * 160, "x"))  # fmt: skip
    material = sets_of(train=[SHORT], shown={"train": [long, short]})
    material.refuse_what_is_longer(200, "own.jsonl", tokenizer)
    assert material.shown == {"train": [short]}


def test_a_text_is_trained_on_but_for_its_last_two_tenths(home, tokenizer, said):
    material = material_of(options(home, "unused", data=str(home / "novel.txt"), max_length=10), tokenizer)
    ids = tokenizer.encode((home / "novel.txt").read_text(encoding="utf-8"))
    parts = (material.train, material.validation, material.scored["unseen"])
    assert [i for part in parts for s in part for i in s.ids] == ids
    assert [len(part) for part in parts[1:]] == [len(ids) // 10 // 10] * 2
    assert set(material.scored) == {"unseen", "general"} and material.asked == {}


def test_records_that_lose_their_whole_answer_are_told_and_left_out(home, tmp_path, tokenizer, said):
    terms = [term | {"question": "x" * 200} if i == 3 else term for i, term in enumerate(TERMS)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, terms)), encoding="utf-8")
    material = material_of(options(home, "x", data=str(tmp_path / "data.jsonl"), max_length=100), tokenizer)
    assert len(material.train) == 7 and said() == [
        "train: 1 of 8 records are longer than --max-length 100 and were truncated, "
        "and 1 of them dropped: nothing of their answer was left"
    ]


def test_measuring_shows_progress_by_stage(talker, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("minilora.train.material.answer_all", ml.answer_all)  # whole answers
    record = Record("a", ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}), keywords=("y",))
    samples = ml.encode_records([record] * 3, tokenizer)
    sets = sets_of(train=samples, scored={"unseen": samples, "general": samples[:1]}, asked={"unseen": [record]})
    show_progress()
    measured = evaluate(talker, tokenizer, sets, "now")
    show_progress(False)
    err = capsys.readouterr().err
    assert "loss now" in err and "4/4" in err and "answers now" in err and "1/1" in err
    assert measured.loss == {name: ml.mean_loss(talker, part) for name, part in sets.scored.items()}
    assert measured.answers == {"unseen": ml.answer_all(talker, tokenizer, [record])}
    assert measured.recall == {"unseen": ml.keyword_recall(measured.answers["unseen"], [record])}


def test_a_file_without_splits_is_told_how_it_was_divided_and_what_stands_in_both(home, tmp_path, tokenizer, said):
    terms = [{"question": term["question"], "answer": term["answer"]} for term in TERMS[:9]]
    material_of(options(home, "x", data=write_jsonl(tmp_path / "data.jsonl", [*terms, terms[3]])), tokenizer)
    assert [line[:70] for line in said()] == [
        "8 records to train on, 1 for validation, 1 for the test: none names a ",
        "1 validation or test record is also in the training set, so the loss l",
    ]


def test_texts_of_rows_are_divided_and_held_out_as_their_splits_say(home, tmp_path, tokenizer, said):
    rows = [{"text": "hello 123. " * 9, "split": split} for split in ("train", "validation", "test")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    material = material_of(options(home, "x", data=str(tmp_path / "data.jsonl"), max_length=16), tokenizer)
    sets = (material.train, material.validation, material.scored["unseen"])
    assert [len(samples) for samples in sets] == [len(material.train)] * 3 and len(material.train) > 3
    assert all(len(sample.ids) <= 16 for samples in sets for sample in samples)
    assert [line[:33] for line in said()] == ["2 validation or test records are "] and material.asked == {}

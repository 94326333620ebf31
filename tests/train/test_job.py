"""The whole fine-tuning job, on models that train in a second."""

import json
import os
import re
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from jobs import asked, material_of, options, same, trained, trainer
from modelfiles import TERMS, write_jsonl

import minilora as ml
from minilora.commands.eval import data_of
from minilora.commands.report import page, rehearsal
from minilora.data import records as reading
from minilora.data.splits import RULE
from minilora.lora.adapters import adapter_state, add_adapter, base_state
from minilora.lora.peft import load_adapter
from minilora.lora.provenance import PROVENANCE_FILE, read_provenance
from minilora.measure.counts import count_parameters
from minilora.measure.loss import mean_loss
from minilora.measure.predict import Step, base_parameters, predict_memory
from minilora.measure.recall import answer_all
from minilora.models.load import load
from minilora.nn.language_model import LanguageModel
from minilora.nn.module import sha256_of
from minilora.train import job
from minilora.train import metrics as measuring
from minilora.train.job import finetune, rehearse
from minilora.train.loop import Trainer, TrainingError


@pytest.fixture(scope="module")
def finished(home):
    """(options, metrics) of a whole run with an adapter."""
    chosen = options(home, home / "run", steps=None, epochs=3.0, lr=2e-2)
    return chosen, finetune(chosen)


def test_the_metrics_are_those_on_disk_and_name_sets_and_memory(finished):
    chosen, metrics = finished
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", metrics["created"])
    assert json.loads((chosen.folder / "metrics.json").read_text(encoding="utf-8")) == json.loads(json.dumps(metrics))
    assert set(metrics["loss"]) == {"paraphrase", "unseen", "general"}
    assert set(metrics["keyword_recall"]) == {"paraphrase", "unseen"}
    memory = metrics["peak_memory_bytes"]
    assert memory["predicted"] == sum(memory["by_owner"].values()) < memory["full_predicted"]
    phases = "measuring the base", "training", "measuring the result", "checking the result"
    assert memory["reached"] in phases if memory["measured"] else memory["reached"] is None


@pytest.mark.parametrize(
    ("function", "phase"),
    [("prepare", "measuring the base"), ("_train", "training"), ("evaluate", "measuring the result"),
     ("metrics_of", "checking the result")],
)  # fmt: skip
def test_the_metrics_name_the_phase_that_held_most_and_each_gives_back_what_it_freed(
    home, monkeypatch, function, phase
):
    held, released, looks = [50], [], count()
    monkeypatch.setattr(job, "peak_memory", lambda: held[0] + next(looks) / 1000)  # the system does not count exactly
    monkeypatch.setattr(job, "release_memory", lambda: released.append(held[0]))
    usual = getattr(job, function)

    def hungry(*arguments, **options):
        if "before" not in arguments:
            held[0] = 90
        return usual(*arguments, **options)

    monkeypatch.setattr(job, function, hungry)
    memory = finetune(options(home, home / f"peak{function}", steps=1), answers=False)["peak_memory_bytes"]
    assert memory["measured"] == pytest.approx(90, abs=1) and memory["reached"] == phase
    assert len(released) == 3 and released == sorted(released)


def test_the_metrics_count_what_was_there(finished, home):
    chosen, metrics = finished
    model, _ = load(chosen.base)
    base = count_parameters(model).total
    add_adapter(model, chosen.lora_config())
    counts = count_parameters(model)
    assert metrics["trainable_parameters"] == counts.trainable and metrics["total_parameters"] == counts.total
    assert metrics["base_bytes"] == 4 * base
    before, after = metrics["base_sha256"]
    assert before == after == sha256_of(base_state(load(chosen.base)[0]))
    config = json.loads((chosen.folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == chosen.base
    assert metrics["adapter_bytes"] == (chosen.folder / "adapter_model.safetensors").stat().st_size
    assert metrics["records"] == {"train": 8, "validation": 2, "paraphrase": 8, "unseen": 2, "general": 6}
    assert metrics["steps"] == len(metrics["train_loss"]) == 6  # three epochs of two batches
    assert [step for step, _ in metrics["validation_loss"]] == [2, 4, 6]


def test_a_rehearsal_tells_what_the_run_will_take_and_writes_nothing(finished, tmp_path, caplog):
    chosen, metrics = finished
    found = rehearse(replace(chosen, out=str(tmp_path / "there" / "x")))
    same_there = ("records", "sampled_from", "planned_steps", "trainable_parameters", "total_parameters")
    assert {name: found[name] for name in same_there} == {name: metrics[name] for name in same_there}
    owners = [dict(each["peak_memory_bytes"]["by_owner"], program=0) for each in (found, metrics)]
    assert owners[0] == owners[1]
    assert found["seconds_per_step"] > 0 and os.listdir(tmp_path) == []
    before = {path: path.read_bytes() for path in chosen.folder.rglob("*") if path.is_file()}
    assert rehearse(chosen)["planned_steps"] == 6
    assert caplog.messages[-1].startswith(f"{chosen.folder} holds a finished run: --overwrite")
    assert {path: path.read_bytes() for path in chosen.folder.rglob("*") if path.is_file()} == before
    assert "1,000,000 MB free" in rehearsal(found | {"free_memory_bytes": 10**12})
    assert "free" not in rehearsal(found | {"free_memory_bytes": None})


@pytest.mark.parametrize("given", [{"method": "full"}, {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 8}}])
def test_a_run_warns_once_before_its_first_step_if_memory_is_short(given, home, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(job, "program_memory", lambda arrays: 0)  # of a program, whose size differs from run to run
    chosen, warned, usual = options(home, tmp_path / "run", steps=1, overwrite=True, **given), [], job.Trainer.step
    needed = rehearse(chosen)["peak_memory_bytes"]["predicted"]

    def step(trainer):
        warned.append(sum("`minilora memory`" in line for line in caplog.messages))
        return usual(trainer)

    monkeypatch.setattr(job.Trainer, "step", step)
    for free in (None, needed, needed - 1):
        monkeypatch.setattr(job, "free_memory", lambda free=free: free)
        caplog.clear()
        assert trained(chosen)["peak_memory_bytes"]["predicted"] == needed
    assert warned == [0, 0, 1] and sum("memory of a step" in line for line in caplog.messages) == 1


def test_a_run_of_a_search_trains_and_validates_alone(finished, home, tmp_path):
    metrics = trained(replace(finished[0], out=str(tmp_path / "trial")))
    assert (metrics["loss"], metrics["keyword_recall"], metrics["answers"]) == ({}, {}, [])
    assert metrics["train_loss"] == finished[1]["train_loss"]
    assert metrics["validation_loss"] == finished[1]["validation_loss"]
    assert page(metrics) and not {"picture.png", "README.md"} & set(os.listdir(tmp_path / "trial"))


def test_a_run_on_own_data_without_splits_has_validation_page_picture_and_the_rule_in_its_notes(home, tmp_path):
    plain = [{"question": r["question"], "answer": r["answer"]} for r in TERMS]
    metrics = finetune(options(home, tmp_path / "run", data=write_jsonl(tmp_path / "plain.jsonl", plain), steps=1))
    assert set(metrics["loss"]) == {"unseen", "general"} and metrics["keyword_recall"] == {}
    assert (metrics["records"]["train"], metrics["records"]["validation"], metrics["records"]["unseen"]) == (10, 1, 1)
    asked = {"train": ["What is 0?", "What is 6?"], "unseen": ["What is 9?"]}
    assert [(row["set"], row["question"]) for row in metrics["answers"]] == [
        (name, question) for name, questions in asked.items() for question in questions
    ]
    assert metrics["kept"]["which"] == "best" and read_provenance(tmp_path / "run")["data"]["split"] == RULE
    assert (tmp_path / "run" / "picture.png").is_file() and "unseen" in page(metrics)


def test_full_fine_tuning_would_need_as_much_memory_whatever_the_base_is_packed_to_and_the_adapters_are(home):
    found, adapters = [], ({}, {"use_dora": True, "rank_pattern": {"q_proj": 3}}, {"freeze_A": True})
    for packed, settings in [(False, adapters[:1]), ("q8_0", adapters[:1]), (False, adapters[:2]), (False, adapters)]:
        model, tokenizer = ml.load(home / "base", packed)
        for i, each in enumerate(settings):
            ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, **each), name=str(i))
        material = material_of(options(home, "unused"), tokenizer)
        found.append(measuring.memory_of(model, material, 4, 0, None)["full_predicted"])
    assert len(found) == 4 and len(set(found)) == 1


def test_the_memory_of_a_long_batch_is_predicted_wherever_it_comes_in_the_training_set(home):
    model, tokenizer = ml.load(home / "base")
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4))
    short, long = (ml.Sample(range(length), range(length)) for length in (5, 60))
    material = replace(material_of(options(home, "unused"), tokenizer), train=[*[short] * 249, long])
    of_the_long_one = measuring.memory_of(model, replace(material, train=[long]), 1, 0, None)["activations"]
    for seed in range(3):
        assert measuring.memory_of(model, material, 1, seed, None)["activations"] == of_the_long_one


def test_full_fine_tuning_writes_a_model_folder_that_loads_and_differs(home, tmp_path):
    metrics = finetune(options(home, tmp_path / "full", method="full", steps=2))
    before, after = metrics["base_sha256"]
    model, tokenizer = load(tmp_path / "full")
    assert before != after == sha256_of(model.state_dict())
    assert tokenizer.encode_chat(asked("hello")) == load(home / "base")[1].encode_chat(asked("hello"))
    assert metrics["trainable_parameters"] == metrics["total_parameters"] == base_parameters(model.config)
    assert metrics["audit"] == {} and (tmp_path / "full" / "picture.png").is_file() and page(metrics)


@pytest.mark.parametrize(
    ("left_out", "unused"),
    [
        (["k_proj", "layers.0.self_attn.q_proj", "no_proj"], ["exclude_modules 'no_proj'"]),
        (r".*\.no_proj", [r"exclude_modules '.*\\.no_proj'"]),
        (r".*\.0\..*v_proj", []),
    ],
)
def test_a_name_that_matches_no_module_is_named(home, tmp_path, caplog, left_out, unused):
    patterns = {"rank_pattern": {"q_proj": 1, "nosuch": 4, "o_proj": 4}, "alpha_pattern": {"v_proj": 4, r"9\..*": 2}}
    patterns |= {"exclude_modules": left_out, "target_modules": ["q_proj", "v_proj"]}
    trained(options(home, tmp_path / "run", steps=1, **patterns))
    found = [line.split(" matches no module")[0] for line in caplog.messages if " matches no module" in line]
    assert found == ["rank_pattern 'nosuch'", "rank_pattern 'o_proj'", r"alpha_pattern '9\\..*'", *unused]


def test_a_run_that_diverges_ends_in_its_own_line_without_warnings_of_numpy(home, tmp_path):
    for method, lr in (("lora", 1e20), ("lora", 1e38), ("full", 1e38)):
        with pytest.raises(TrainingError, match=r"at step 2 of 8: try a lower"):  # warnings are errors here
            finetune(options(home, tmp_path / "run", method=method, lr=lr, steps=8, overwrite=True), measure=False)


def test_the_best_adapter_so_far_is_kept_when_training_breaks_down(home, tmp_path, monkeypatch, said):
    class Broken(Trainer):
        def step(self):
            if self.done == 3:
                raise TrainingError("the loss became nan")
            return super().step()

    monkeypatch.setattr(job, "Trainer", Broken)
    with pytest.raises(TrainingError):
        finetune(options(home, tmp_path / "run", strength=0.5))
    kept = tmp_path / "run.partial"
    chat = f"the trained weights are in {kept}; talk to the model with: minilora chat --adapter {kept}"
    assert said() == ["stopped after 3 of 6 steps", chat]  # and no --resume: it would break down again
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    assert sorted(path.name for path in kept.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "log.csv", "minilora.json", "run.toml"
    ]  # fmt: skip
    model, tokenizer = load(home / "base")
    material = material_of(options(home, tmp_path), tokenizer)
    ml.add_adapter(model, options(home, tmp_path).lora_config())
    with trainer(model, material.train, 6, lr=2e-3, batch_size=4) as training:
        training.step(), training.step()  # validation comes after two steps, an epoch
    ml.scale_adapter(model, "default", 0.5)
    other, _ = load(home / "base")
    load_adapter(other, kept)
    assert same(adapter_state(other, "default"), adapter_state(model, "default"))


@pytest.mark.parametrize(("stage", "out"), [("evaluate", "a/b/run"), ("noted_interrupts", "there/run")])
def test_an_interruption_before_the_first_step_leaves_no_folder_that_it_made(stage, out, home, tmp_path, monkeypatch):
    def stop(*inputs, **settings):
        raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note.txt").write_text("mine")
    monkeypatch.setattr(job, stage, stop)
    with pytest.raises(KeyboardInterrupt):
        trained(options(home, tmp_path / out))
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "note.txt"]


def test_seconds_tokens_and_bytes_stand_under_their_own_names(home, tmp_path, monkeypatch):
    class Timed(Trainer):
        def __exit__(self, *error):
            self.history.seconds[:], self.history.tokens = [1.0, 2.0, 3.0, 10.0], 800
            super().__exit__(*error)

    monkeypatch.setattr(job, "Trainer", Timed)
    held = [4321]  # and while the adapter is audited:
    monkeypatch.setattr(measuring, "audit", lambda *args, **how: held.append(12345) or ml.audit(*args, **how))
    monkeypatch.setattr(job, "peak_memory", lambda: held[-1])
    monkeypatch.setattr(job, "program_memory", lambda arrays: 10 * arrays)
    metrics = finetune(options(home, tmp_path / "run", steps=4), measure=False, answers=False)
    assert (metrics["seconds_per_step"], metrics["training_seconds"], metrics["tokens_per_second"]) == (2.5, 16.0, 50.0)
    memory = metrics["peak_memory_bytes"]
    assert memory["measured"] == 12345
    assert memory["by_owner"]["program"] == 10 * metrics["base_bytes"]


@pytest.mark.parametrize("loss", ["sft", "dpo"])
@pytest.mark.parametrize("large", [False, True])
def test_texts_and_libraries_belong_to_the_program_whose_size_is_measured(large, loss, home, tmp_path, monkeypatch):
    done, usual = [], {name: getattr(job, name) for name in ("prepare", "loss_without_grad")}

    def noting(name):
        return lambda *args, **how: done.append(name) or usual[name](*args, **how)

    for name in usual:
        monkeypatch.setattr(job, name, noting(name))
    monkeypatch.setattr(job, "LARGE", 0 if large else 1e8)
    forward = LanguageModel.forward
    monkeypatch.setattr(LanguageModel, "forward", lambda self, ids: done.append(ids.shape) or forward(self, ids))
    monkeypatch.setattr(job, "program_memory", lambda arrays: done.append("program") or 1000)
    monkeypatch.setattr(job, "added_memory", lambda use: use() or 50)
    pairs = [{"prompt": f"Ask {i}?", "chosen": "Yes.", "rejected": "No.", "split": "train"} for i in range(4)]
    given = {"data": write_jsonl(tmp_path / "pairs.jsonl", pairs), "loss": "dpo"} if loss == "dpo" else {}
    chosen = options(home, tmp_path / "run", **given)
    assert rehearse(chosen)["peak_memory_bytes"]["by_owner"]["program"] == 1000 + 50 * large
    last = ["loss_without_grad", (1, 1)] if large else []
    assert done[done.index("prepare") :] == ["prepare", "program", *last]
    monkeypatch.setattr(job, "program_memory", lambda arrays: None)  # on Windows
    assert "program" not in rehearse(chosen)["peak_memory_bytes"]["by_owner"] and done[-1] == "prepare"


@pytest.mark.usefixtures("unmeasured")
def test_the_predicted_memory_is_that_of_the_longest_batch(home, tmp_path):
    """Of batches of very different lengths: what another batch size would not change."""
    rows = [{"question": "q" * size, "answer": "a", "split": split} for size, split in
            ((5, "train"), (300, "train"), (9, "train"), (7, "validation"), (8, "test"))]  # fmt: skip
    chosen = options(home, tmp_path / "run", data=write_jsonl(tmp_path / "own.jsonl", rows), batch_size=1, steps=1)
    predicted = trained(chosen)["peak_memory_bytes"]["by_owner"]["activations"]
    model, tokenizer = load(home / "base")
    longest = max(material_of(chosen, tokenizer).train, key=lambda sample: len(sample.ids))
    add_adapter(model, chosen.lora_config(), "default")
    assert predicted == predict_memory(Step.of(model, [longest])).by_owner()["activations"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 7])
def test_a_whole_model_is_kept_when_training_breaks_down_if_it_is_finite(value, home, tmp_path, monkeypatch, said):
    class Broken(Trainer):
        def step(self):
            if self.done == 1:
                self.model.model.norm.weight.data[3] = value
                raise TrainingError("the loss became nan")
            return super().step()

    monkeypatch.setattr(job, "Trainer", Broken)
    with pytest.raises(TrainingError):
        trained(options(home, tmp_path / "run", method="full"))
    if value != 7:
        assert said() == [] and not list(tmp_path.iterdir())
    else:
        assert load(tmp_path / "run.partial")[0].model.norm.weight.data[3] == 7
        assert said()[1].endswith(f"talk to the model with: minilora chat --base {tmp_path / 'run.partial'}")


# -- a model that talks ------------------------------------------------------------------------------------------------

ANSWER = 24  # tokens
FACTS = [("army", "Congress", "train"), ("navy", "people", "train"), ("treaty", "Senate", "train"),
         ("tariff", "states", "train"), ("land", "Union", "validation"), ("debt", "nation", "test"),
         ("peace", "country", "test")]  # fmt: skip


def dialogue(thing, owner, split):
    turns = ["Let us speak of law.", "Very well.", f"What is {thing}?", f"The {thing} is of the {owner}."]
    messages = [{"role": role, "content": turn} for role, turn in zip(["user", "assistant"] * 2, turns, strict=True)]
    return {"id": thing, "messages": messages, "paraphrase": f"Tell me what {thing} is.", "split": split,
            "keywords": ["well", "is", "of", owner]}  # fmt: skip


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """(options, metrics) of a job on the tiny base, whose answers are texts, with records of several turns."""
    folder = tmp_path_factory.mktemp("talk")
    (folder / "data.jsonl").write_text("\n".join(json.dumps(dialogue(*fact)) for fact in FACTS), encoding="utf-8")
    chosen = options(folder, folder / "run", base="tiny", batch_size=2, lr=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.train.material.answer_all", partial(answer_all, max_new_tokens=ANSWER))
        return chosen, finetune(chosen)


@pytest.fixture(scope="module")
def sides(talk):
    """For each set: the records as they are asked, the base's answers, the adapter's answers."""
    model, tokenizer = ml.load("tiny")
    splits = ml.split_records(ml.read_records(talk[0].data))
    sets = {"paraphrase": [r.asked_otherwise() for r in splits["train"]], "unseen": splits["test"]}

    def answers(records):
        return [ml.generate(model, tokenizer, r.prompt, max_new_tokens=ANSWER) for r in records]

    before = {name: answers(records) for name, records in sets.items()}
    ml.load_adapter(model, talk[0].folder)
    return {name: (records, before[name], answers(records)) for name, records in sets.items()}


def test_recall_before_is_the_bases_and_recall_after_the_adapters(talk, sides):
    for name, (records, before, after) in sides.items():
        wanted = [ml.keyword_recall(before, records), ml.keyword_recall(after, records)]
        assert talk[1]["keyword_recall"][name] == wanted and wanted[0] != wanted[1]


def test_the_examples_are_two_of_the_first_set_and_one_unseen_with_both_answers(talk, sides):
    chosen = [("paraphrase", 0), ("paraphrase", 2), ("unseen", 0)]
    for example, (name, i) in zip(talk[1]["answers"], chosen, strict=True):
        records, before, after = sides[name]
        question = records[i].messages[-2]["content"]
        assert example == {"set": name, "question": question, "before": before[i], "after": after[i]}
        assert before[i] and after[i] and before[i] != after[i]


def test_losses_before_are_the_bases_and_losses_after_the_adapters(talk):
    model, tokenizer = ml.load("tiny")
    material = material_of(talk[0], tokenizer)
    before = {name: mean_loss(model, samples) for name, samples in material.scored.items()}
    ml.load_adapter(model, talk[0].folder)
    for name, samples in material.scored.items():
        after = mean_loss(model, samples)
        assert talk[1]["loss"][name] == pytest.approx([before[name], after], rel=1e-6)
        assert before[name] != pytest.approx(after, rel=1e-3)
    assert talk[1]["validation_loss"][-1][1] == pytest.approx(mean_loss(model, material.validation), rel=1e-6)


def test_a_data_set_on_the_hub_is_recorded_with_its_revision_and_found_again(home, tmp_path, monkeypatch):
    chosen = options(home, None, steps=1, keep="last")
    monkeypatch.chdir(tmp_path)
    files = {Path(chosen.data): None}
    monkeypatch.setattr(reading, "fetched", lambda source: ("c" * 40, files))
    named = replace(chosen, data="org/set:main/train", out=None, eval_records=1)
    finetune(named, measure=False)
    assert named.folder.name.startswith("set-main-train")
    data = read_provenance(named.folder)["data"]
    assert (data["name"], data["revision"], "path" in data) == ("org/set:main/train", "c" * 40, False)
    assert "null" not in (named.folder / PROVENANCE_FILE).read_text()
    assert data_of(named.folder) == "org/set:main/train"


@pytest.mark.parametrize(("method", "lr", "size", "hinted"), [
    ("full", 1.5e-3, 0, True), ("full", None, 0, False), ("lora", 1.5e-3, 0, False), ("full", 1.5e-3, 1e8, False),
])  # fmt: skip
def test_a_learning_rate_of_loras_is_called_high_for_full_fine_tuning_of_a_large_base(
    method, lr, size, hinted, home, tmp_path, monkeypatch, said
):
    monkeypatch.setattr(job, "LARGE", size)
    monkeypatch.setattr(job.bfloat16, "hint", lambda: "")
    finetune(options(home, tmp_path / "run", method=method, lr=lr, steps=1), measure=False)
    hint = "lr 0.0015 is high for full fine-tuning, which mostly takes a tenth of LoRA's (--lr 0.00015)"
    assert (hint in said()) == hinted

"""Four domains on one base: what is trained and measured, and what is not done twice; what the numbers say."""

import json
import shutil
import signal
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from figure_check import problems
from hearing import lines_of

import minilora as ml
from minilora.commands import domains
from minilora.commands.domains import DOMAINS, DomainsOptions, compare_domains, domains_page, drawn
from minilora.data.records import Record
from minilora.lora.combine import combine_adapters
from minilora.lora.peft import WEIGHTS_FILE
from minilora.measure.loss import evenly, sample_losses
from minilora.measure.recall import answer_all
from minilora.measure.scores import MeasuredSet, Scores
from minilora.pages.figures import matrix_figure
from minilora.train.job import finetune
from minilora.train.material import Measured

ADAPTERS = ["base", *DOMAINS, "linear", "svd"]


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """The options of a finished comparison, its result, and what was logged. Never written to."""
    sets = ("paraphrase", "unseen")
    known = Measured(dict.fromkeys([*sets, "general"], 1.0), dict.fromkeys(sets, 0.5), dict.fromkeys(sets, ["-"] * 80))
    options = DomainsOptions(base=str(home / "base"), out=str(tmp_path_factory.mktemp("four")), steps=2, limit=2)
    with pytest.MonkeyPatch.context() as patch, lines_of() as lines:
        patch.setattr("minilora.train.job.evaluate", lambda *arguments: known)  # finetune's own measurements
        patch.setattr("minilora.train.job.run_picture", lambda metrics, path: path.touch())
        patch.setattr("minilora.measure.scores.answer_all", partial(answer_all, max_new_tokens=3))
        return options, compare_domains(options), lines


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """The same in a folder of its own, to be changed. Nothing is trained or measured, unless a test allows it."""
    shutil.copytree(finished[0].out, tmp_path / "four")
    for name in ("commands.domains.finetune", "measure.scores.sample_losses", "measure.scores.answer_all"):
        monkeypatch.setattr(f"minilora.{name}", never)
    return DomainsOptions(base=finished[0].base, out=str(tmp_path / "four"), steps=2, limit=2)


def never(*arguments, **settings):
    raise AssertionError("done again")


def numbers(result):
    return {name: result[name] for name in ("sets", "scores", "differences", "best_on_own", "mixes", "merged")}


# -- what is trained and measured --------------------------------------------------------------------------------------


@pytest.mark.long
def test_every_adapter_is_measured_on_every_set(finished):
    options, result, lines = finished
    assert list(result["sets"]) == [f"{d}/{kind}" for d in DOMAINS for kind in ("paraphrase", "unseen")] + ["general"]
    assert all(list(found) == ADAPTERS for found in result["scores"].values())
    assert all({"loss", "keyword_recall"} < found.keys() for found in result["scores"]["general"].values())
    assert {about["records"] for about in result["sets"].values()} == {2}
    assert [line.split(":")[0] for line in lines if line.startswith("training")] == [f"training {d}" for d in DOMAINS]
    assert json.loads((options.folder / "domains.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))


@pytest.mark.long
def test_each_pair_is_mixed_half_and_half_and_measured_on_both_of_its_domains(finished):
    options, result, _ = finished
    assert len(result["mixes"]) == 12 and len({(one["mix"], one["on"]) for one in result["mixes"]}) == 12
    model, tokenizer = ml.load(options.base)
    for name in ("legal", "finance"):
        ml.load_adapter(model, f"{options.out}/{name}", name=name)
    ml.set_adapter(model, {"legal": 0.5, "finance": 0.5})
    records = evenly([r.asked_otherwise() for r in ml.split_records(ml.read_records("finance"))["train"]], 2)
    one = next(one for one in result["mixes"] if (one["mix"], one["on"]) == ("legal + finance", "finance"))
    loss = ml.mean_loss(model, ml.encode_records(records, tokenizer))
    assert one["loss"]["mixed"]["value"] == pytest.approx(loss, rel=1e-5)
    scores = result["scores"]["finance/paraphrase"]
    assert one["loss"]["base"] == scores["base"]["loss"] and one["loss"]["alone"] == scores["finance"]["loss"]


@pytest.mark.long
def test_the_merged_are_the_four_of_equal_weight(finished):
    options, result, _ = finished
    model, tokenizer = ml.load(options.base)
    for name in DOMAINS:
        ml.load_adapter(model, f"{options.out}/{name}", name=name)
    general = ml.encode_records(ml.read_records("general")[::30], tokenizer)
    for method in ("linear", "svd"):
        made = combine_adapters(model, DOMAINS, [0.25] * 4, method, name=method)
        assert result["merged"][method]["error"] == pytest.approx(made.error)
        found = result["scores"]["general"][method]["loss"]["value"]
        assert found == pytest.approx(ml.mean_loss(model, general), rel=1e-5)


def test_each_domain_has_two_sets_and_general_text_one(monkeypatch, tmp_path):
    sets = []
    monkeypatch.setattr(domains, "_train", lambda options, todo: None)
    monkeypatch.setattr(domains, "load_with_adapters", lambda folders, base: ml.load(base))
    monkeypatch.setattr(domains, "combine_adapters", lambda *given, **named: SimpleNamespace(error=0))
    monkeypatch.setattr(domains, "_remembered", lambda folder, adapters, measured: sets.extend(measured))
    monkeypatch.setattr(domains, "measure", never)
    with pytest.raises(AssertionError, match="done again"):
        compare_domains(DomainsOptions(base="tiny", out=str(tmp_path), limit=2))
    names = [*(f"{domain}/{kind}" for domain in DOMAINS for kind in ("paraphrase", "unseen")), "general"]
    assert [each.name for each in sets] == names and {len(each.samples) for each in sets} == {2}


# -- what is not done twice --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_what_is_finished_is_neither_trained_nor_measured_again(finished, copied):
    result = compare_domains(copied)
    assert numbers(result) == numbers(finished[1]) and result["trained_now"] == []


@pytest.mark.long
def test_an_interrupted_measurement_continues_where_it_stopped(finished, copied, monkeypatch):
    gone = sorted((copied.folder / "measured").glob("loss-*"))
    for path in gone[5:]:
        path.unlink()
    calls = []
    monkeypatch.setattr("minilora.measure.scores.sample_losses", lambda *a: calls.append(1) or sample_losses(*a))
    assert numbers(compare_domains(copied)) == numbers(finished[1]) and len(calls) == len(gone) - 5 == 7 * 9 + 12 - 5


@pytest.mark.long
def test_other_adapters_are_measured_anew(copied, monkeypatch):
    shutil.copy(copied.run("finance").folder / WEIGHTS_FILE, copied.run("support").folder)
    with pytest.raises(AssertionError, match="done again"):
        compare_domains(copied)


@pytest.mark.long
def test_an_interrupted_run_is_continued_by_the_same_command(finished, copied, monkeypatch, caplog):
    caplog.set_level("INFO", "minilora")
    shutil.rmtree(copied.run("support").folder)
    resumed = []
    monkeypatch.setattr("minilora.train.job.run_picture", lambda metrics, path: path.touch())
    monkeypatch.setattr(domains, "finetune", lambda o, *more: resumed.append(o.resume) or finetune(o, *more))
    with monkeypatch.context() as patch:
        patch.setattr("minilora.train.log.Log.row", lambda self, memory: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            compare_domains(copied)
    assert caplog.messages[-1] == "interrupted: the same command continues from here"
    result = compare_domains(copied)  # the same run, bit for bit: nothing is measured anew
    assert numbers(result) == numbers(finished[1]) and resumed == [False, True]
    assert result["trained_now"] == ["support"]


def test_a_finished_run_is_known_again_however_the_path_of_its_base_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    options = DomainsOptions(base="./base", out="four")
    run = options.run("legal")
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.json").touch()
    monkeypatch.setattr("minilora.commands.domains.read_metrics", lambda folder: {"options": asdict(run.in_effect())})
    assert domains._finished(options, "legal")
    with pytest.raises(ValueError, match=r"legal was started with other settings: base \./base, now tiny"):
        domains._finished(replace(options, base="tiny"), "legal")


@pytest.mark.long
def test_a_run_with_other_settings_is_refused_before_anything_is_trained(copied, monkeypatch):
    path = copied.run("medical").folder / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8"))
    metrics["options"]["steps"] = 7
    path.write_text(json.dumps(metrics), encoding="utf-8")
    shutil.rmtree(copied.run("legal").folder)
    with pytest.raises(ValueError, match="medical was started with other settings: steps 7, now 2; --overwrite"):
        compare_domains(copied)
    trained = []
    monkeypatch.setattr("minilora.commands.domains.finetune", lambda options, *more: trained.append(options))
    with pytest.raises(ValueError, match=r"legal.*no such file"):  # nothing is written here
        compare_domains(replace(copied, overwrite=True))
    assert [(each.data, each.overwrite) for each in trained] == [("legal", True), ("medical", True)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "overwrite", "refusal"),
    [
        ("notes.txt", True, "support holds notes.txt, which is not a file of a run: choose another --out"),
        ("adapter_config.json", False, "support holds a finished run: .*; --overwrite replaces it"),
    ],
)
def test_what_is_no_run_is_refused_before_anything_is_trained(file, overwrite, refusal, copied):
    for domain in ("legal", "support"):
        shutil.rmtree(copied.run(domain).folder)
    copied.run("support").folder.mkdir()
    (copied.run("support").folder / file).touch()
    with pytest.raises(ValueError, match=refusal):
        compare_domains(replace(copied, overwrite=overwrite))


def test_of_other_records_or_questions_the_numbers_are_others(tmp_path):
    sample, record, made = ml.Sample((0, 1), (-100, 1)), Record("1", keywords=("a",)), []
    for samples, asked in [([sample], [record]), ([sample] * 2, [record]), ([sample], [Record("1")])] * 2:
        sets = [MeasuredSet("s", "d", "unseen", samples, asked)]
        domains._remembered(tmp_path, {}, sets)(("loss", "base", "s"), lambda: made.append(1) or np.zeros(1))
    assert len(made) == 3


def test_where_results_go():
    assert DomainsOptions().folder.as_posix() == "runs/domains"
    assert DomainsOptions(out="x").folder.as_posix() == "x/domains"
    assert DomainsOptions(out="x").run("legal").folder.as_posix() == "x/legal"
    assert DomainsOptions(base="tiny").folder.as_posix() == "runs/domains-tiny"


# -- what the numbers say ----------------------------------------------------------------------------------------------


def scores(nats, recall):
    return Scores(np.array(nats, float), np.array([2, 2, 2, 2]), np.array(recall, float))


FOUND = {
    "base": scores([8, 8, 9, 7], [0, 0.5, 0, 0.5]),
    "legal": scores([2, 2, 3, 1], [1, 1, 0.5, 0.5]),
    "support": scores([8, 7, 9, 8], [0, 0, 0, 0]),
    "svd": scores([3, 3, 4, 2], [0.5, 1, 1, 0.5]),
}


def test_best_on_its_own_is_measured_against_the_best_other_version():
    best = domains._best(FOUND, "legal", 0)
    assert best["loss"]["next"] == "svd" and best["loss"]["difference"] == {"value": -0.5, "low": -0.5, "high": -0.5}
    assert best["loss"]["held"] is True
    assert best["keyword_recall"]["next"] == "svd" and best["keyword_recall"]["difference"]["value"] == 0
    assert best["keyword_recall"]["held"] is False
    unsure = FOUND | {"svd": scores([0, 6, 3, 2], [0] * 4)}  # on some records it is better
    assert domains._best(unsure, "legal", 0)["loss"]["held"] is False
    loss = domains._best(FOUND, "support", 0)["loss"]
    assert (loss["next"], loss["held"]) == ("legal", False)


def test_a_mix_keeps_its_share_of_what_the_adapter_alone_has_gained():
    found = FOUND | {"legal + support": scores([4, 4, 5, 3], [0.5, 0.5, 0.5, 0.5])}
    one = domains._mixed(found, "legal + support", "legal", 0)
    loss, recall = one["loss"], one["keyword_recall"]
    assert [loss[key]["value"] for key in ("base", "alone", "mixed")] == [4, 1, 2]
    assert loss["lost"] == {"value": 1, "low": 1, "high": 1} and loss["kept"]["value"] == pytest.approx(2 / 3)
    assert recall["kept"]["value"] == pytest.approx(0.5) and recall["lost"]["value"] == -0.25


def test_a_share_that_is_the_same_on_every_record_is_certain():
    found = {"base": [8, 8, 8, 8], "legal": [2, 4, 6, 0], "mix": [5, 6, 7, 4]}
    one = domains._mixed({name: scores(nats, [0] * 4) for name, nats in found.items()}, "mix", "legal", 0)
    assert one["loss"]["kept"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})


def test_what_gained_nothing_has_no_share():
    found = {"base": FOUND["base"], "legal": FOUND["base"], "legal + support": FOUND["base"]}
    assert domains._mixed(found, "legal + support", "legal", 0)["loss"]["kept"]["value"] is None


# -- page and picture --------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_page_has_a_line_for_each_adapter_and_pair_and_fits_its_columns(finished):
    for width in (100, 80):
        lines = domains_page(finished[1], width).splitlines()
        assert max(len(line) for line in lines if " + " not in line) <= width  # shares of next to no gain are long
        for name in ADAPTERS:
            assert sum(line.split()[:1] == [name] for line in lines) >= 4
        assert sum(" + " in line for line in lines) == 12
        assert ("[" in lines[2]) == (width == 100)
    last = " ".join(" ".join(lines).split())
    assert "linear and svd: the four adapters merged into one, each with weight 0.25." in last
    assert "in the module with the largest difference: linear by " in last


@pytest.mark.long
def test_the_page_says_what_did_not_hold(finished):
    result = json.loads(json.dumps(finished[1]))
    for best in result["best_on_own"].values():
        for found in best.values():
            found["held"] = True
    assert "NO" not in domains_page(result)
    result["best_on_own"]["medical"]["loss"]["held"] = False
    (line,) = [line for line in domains_page(result).splitlines() if line.endswith("NO")]
    assert line.split()[:2] == ["medical", "loss"]


@pytest.mark.long
def test_the_heat_map_shows_paraphrased_questions_and_general_text(finished):
    shown = drawn(finished[1])
    assert list(shown["sets"]) == list(shown["scores"]) == [*(f"{domain}/paraphrase" for domain in DOMAINS), "general"]
    assert problems(matrix_figure(shown)) == []


def test_after_each_run_the_time_of_the_others_is_estimated_by_their_records(tmp_path, monkeypatch, said):
    clock = iter([0.0, 480.0, 0.0, 96.0, 0.0, 1.0])  # two seconds for each of 240 records, one for each of 96
    monkeypatch.setattr(domains, "finetune", lambda options: None)
    monkeypatch.setattr(domains, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    domains._train(DomainsOptions(out=str(tmp_path)), ["legal", "support", "medical"])
    begun = [f"training {name}: {i} of 3" for i, name in enumerate(("legal", "support", "medical"), 1)]
    assert said() == [begun[0], f"{begun[1]}, about 6.4 minutes to go", f"{begun[2]}, about 2.7 minutes to go"]
    clock = iter([0.0, 0.0, 96.0, 0.0, 1.0])
    monkeypatch.setattr(domains, "_interrupted", lambda options, domain: domain == "legal")  # a part tells nothing
    domains._train(DomainsOptions(out=str(tmp_path)), ["legal", "support", "medical"])
    assert said()[3:] == [*begun[:2], f"{begun[2]}, about 1.6 minutes to go"]

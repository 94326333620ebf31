"""Four domains on one base: what is trained and measured, and what is not done twice; what the numbers say."""

import json
import shutil
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from figure_check import problems
from hearing import lines_of

import minilora as ml
from minilora.commands import domains
from minilora.commands.domains import DOMAINS, DomainsOptions, compare_domains, domains_page, drawn
from minilora.commands.eval import Scores
from minilora.lora.combine import combine_adapters
from minilora.measure.recall import answer_all
from minilora.pages.matrix import matrix_figure
from minilora.train.material import Measured

VERSIONS = ["base", *DOMAINS, "linear", "svd"]


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory, patch):
    """The options of a finished comparison, its result, and what was said. Never written to."""
    sets = ("paraphrase", "unseen")
    known = Measured(dict.fromkeys([*sets, "general"], 1.0), dict.fromkeys(sets, 0.5), dict.fromkeys(sets, ["-"] * 80))
    patch.setattr("minilora.train.job.evaluate", lambda *arguments: known)  # finetune's own measurements
    short = partial(answer_all, max_new_tokens=3)
    patch.setattr("minilora.commands.eval.answer_all", short)
    options = DomainsOptions(base=str(home / "base"), out=str(tmp_path_factory.mktemp("four")), steps=2, limit=3)
    with lines_of() as said:
        return options, compare_domains(options), said


@pytest.fixture
def copied(finished, tmp_path):
    """The same in a folder of its own, to be changed."""
    shutil.copytree(finished[0].out, tmp_path / "four")
    return DomainsOptions(base=finished[0].base, out=str(tmp_path / "four"), steps=2, limit=3)


def numbers(result):
    return {name: result[name] for name in ("sets", "scores", "differences", "best_on_own", "mixes", "merged")}


# -- what is trained and measured --------------------------------------------------------------------------------------


def test_every_version_is_measured_on_every_set(finished):
    options, result, said = finished
    assert list(result["sets"]) == [f"{d}/{kind}" for d in DOMAINS for kind in ("paraphrase", "unseen")] + ["general"]
    assert all(list(found) == VERSIONS for found in result["scores"].values())
    assert all({"loss", "keyword_recall"} < found.keys() for found in result["scores"]["general"].values())
    assert {about["records"] for about in result["sets"].values()} == {3}
    assert [line.split(":")[0] for line in said if line.startswith("training")] == [f"training {d}" for d in DOMAINS]
    assert json.loads((options.folder / "domains.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))


def test_each_pair_is_mixed_half_and_half_and_measured_on_both_of_its_domains(finished):
    options, result, _ = finished
    assert len(result["mixes"]) == 12 and len({(one["mix"], one["on"]) for one in result["mixes"]}) == 12
    model, tokenizer = ml.load(options.base)
    for name in ("legal", "finance"):
        ml.load_adapter(model, f"{options.out}/{name}", name=name)
    ml.set_adapter(model, {"legal": 0.5, "finance": 0.5})
    records = [r.asked_otherwise() for r in ml.split_records(ml.read_records("finance"))["train"]][::32]
    one = next(one for one in result["mixes"] if (one["mix"], one["on"]) == ("legal + finance", "finance"))
    loss = ml.mean_loss(model, ml.encode_records(records, tokenizer))
    assert one["loss"]["mixed"]["value"] == pytest.approx(loss, rel=1e-5)
    scores = result["scores"]["finance/paraphrase"]
    assert one["loss"]["base"] == scores["base"]["loss"] and one["loss"]["alone"] == scores["finance"]["loss"]


def test_the_merged_are_the_four_of_equal_weight(finished):
    options, result, _ = finished
    model, tokenizer = ml.load(options.base)
    for name in DOMAINS:
        ml.load_adapter(model, f"{options.out}/{name}", name=name)
    general = ml.encode_records(ml.read_records("general")[::20], tokenizer)
    for method in ("linear", "svd"):
        made = combine_adapters(model, DOMAINS, [0.25] * 4, method, name=method)
        assert result["merged"][method]["error"] == pytest.approx(made.error)
        found = result["scores"]["general"][method]["loss"]["value"]
        assert found == pytest.approx(ml.mean_loss(model, general), rel=1e-5)


# -- what is not done twice --------------------------------------------------------------------------------------------


def never(*arguments, **settings):
    raise AssertionError("done again")


def test_what_is_finished_is_neither_trained_nor_measured_again(finished, copied, monkeypatch):
    for name in (
        "train.job.finetune",
        "commands.domains.finetune",
        "commands.eval.sample_losses",
        "commands.eval.answer_all",
    ):
        monkeypatch.setattr(f"minilora.{name}", never)
    result = compare_domains(copied)
    assert numbers(result) == numbers(finished[1]) and result["trained_now"] == []


def test_a_run_that_is_missing_is_made_and_all_is_measured_anew(finished, copied, monkeypatch):
    shutil.rmtree(f"{copied.out}/medical")
    measured = []
    score = domains.measure.__globals__["sample_losses"]
    monkeypatch.setattr("minilora.commands.eval.sample_losses", lambda *a: measured.append(1) or score(*a))
    other = DomainsOptions(base=copied.base, out=copied.out, steps=2, limit=3)
    result = compare_domains(other)
    assert result["trained_now"] == ["medical"] and numbers(result) == numbers(finished[1])  # the same run, bit for bit
    shutil.rmtree(f"{copied.out}/support")
    shutil.copytree(f"{copied.out}/finance", f"{copied.out}/support")
    metrics = json.loads((copied.run("support").folder / "metrics.json").read_text(encoding="utf-8"))
    metrics["options"]["data"] = "support"
    (copied.run("support").folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    measured.clear()
    assert numbers(compare_domains(copied)) != numbers(finished[1]) and len(measured) == 7 * 9 + 12


def test_a_measurement_that_was_interrupted_goes_on_where_it_stopped(finished, copied, monkeypatch):
    (copied.folder / "measured.json").unlink()
    score, calls = domains.measure.__globals__["sample_losses"], []

    def counted(*arguments):
        if len(calls) == 20:
            raise KeyboardInterrupt
        calls.append(1)
        return score(*arguments)

    monkeypatch.setattr("minilora.commands.eval.sample_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        compare_domains(copied)
    monkeypatch.setattr("minilora.commands.eval.sample_losses", lambda *a: calls.append(1) or score(*a))
    assert numbers(compare_domains(copied)) == numbers(finished[1]) and len(calls) == 7 * 9 + 12


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"fingerprint": 3}', "{"])
def test_a_damaged_file_of_measurements_is_forgotten(damage, copied, finished):
    path = copied.folder / "measured.json"
    fingerprint = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    path.write_text(damage, encoding="utf-8")
    assert domains.Known(path, fingerprint) == {}


def test_a_run_with_other_settings_is_refused_before_anything_is_trained_and_overwritten_when_told(copied, monkeypatch):
    path = copied.run("medical").folder / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8"))
    metrics["options"]["steps"] = 7
    path.write_text(json.dumps(metrics), encoding="utf-8")
    shutil.rmtree(copied.run("legal").folder)
    with monkeypatch.context() as patch:
        patch.setattr("minilora.commands.domains.finetune", never)
        with pytest.raises(ValueError, match="medical was started with other settings: steps 7, now 2; --over"):
            compare_domains(copied)
    result = compare_domains(replace(copied, overwrite=True))
    assert result["trained_now"] == ["legal", "medical"]


@pytest.mark.parametrize(
    ("file", "overwrite", "refusal"),
    [
        ("notes.txt", True, "support holds notes.txt, which is no file of a run: choose another --out"),
        ("adapter_config.json", False, "support holds a finished run: --overwrite replaces it"),
    ],
)
def test_what_is_no_run_is_refused_before_anything_is_trained(file, overwrite, refusal, copied, monkeypatch):
    for domain in ("legal", "support"):
        shutil.rmtree(copied.run(domain).folder)
    copied.run("support").folder.mkdir()
    (copied.run("support").folder / file).touch()
    monkeypatch.setattr("minilora.commands.domains.finetune", never)
    with pytest.raises(ValueError, match=refusal):
        compare_domains(replace(copied, overwrite=overwrite))


def test_a_run_that_was_interrupted_goes_on_with_the_same_command(finished, copied, monkeypatch, caplog):
    caplog.set_level("INFO", "minilora")
    shutil.rmtree(copied.run("support").folder)
    resumed, job = [], domains.finetune
    with monkeypatch.context() as patch:
        patch.setattr("minilora.train.log.Log.row", lambda self, memory: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            compare_domains(copied)
    assert caplog.messages[-1] == "the same command, given again, goes on from here"
    monkeypatch.setattr(
        "minilora.commands.domains.finetune", lambda o, *more: resumed.append(o.resume) or job(o, *more)
    )
    assert numbers(compare_domains(copied)) == numbers(finished[1]) and resumed == [True]


def test_where_results_go():
    assert DomainsOptions().folder.as_posix() == "runs/domains"
    assert DomainsOptions(out="x").folder.as_posix() == "x/domains"
    assert DomainsOptions(out="x").run("legal").folder.as_posix() == "x/legal"
    assert DomainsOptions(base="tiny").folder.as_posix() == "runs/domains-tiny"


def test_values_that_mean_nothing_are_refused():
    for change, words in (({"limit": 0}, "limit must"), ({"steps": 0}, "steps must"), ({"seed": -1}, "seed must")):
        with pytest.raises(ValueError, match=words):
            DomainsOptions(**change)


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
    assert domains._best(FOUND, "support", 0)["loss"] | {"difference": None} == {
        "next": "legal",
        "difference": None,
        "held": False,
    }


def test_a_mix_keeps_its_share_of_what_the_adapter_alone_has_gained():
    found = FOUND | {"legal + support": scores([4, 4, 5, 3], [0.5, 0.5, 0.5, 0.5])}
    one = domains._mixed(found, "legal + support", "legal", 0)
    loss, recall = one["loss"], one["keyword_recall"]
    assert [loss[key]["value"] for key in ("base", "alone", "mixed")] == [4, 1, 2]
    assert loss["lost"] == {"value": 1, "low": 1, "high": 1} and loss["kept"]["value"] == pytest.approx(2 / 3)
    assert recall["kept"]["value"] == pytest.approx(0.5) and recall["lost"]["value"] == -0.25


def test_what_gained_nothing_has_no_share():
    found = {"base": FOUND["base"], "legal": FOUND["base"], "legal + support": FOUND["base"]}
    assert domains._mixed(found, "legal + support", "legal", 0)["loss"]["kept"]["value"] is None


# -- page and picture --------------------------------------------------------------------------------------------------


def test_the_page_has_a_line_for_each_version_and_mix_and_fits_its_columns(finished):
    for width in (100, 80):
        lines = domains_page(finished[1], width).splitlines()
        assert max(len(line) for line in lines if " + " not in line) <= width  # shares of next to no gain are long
        for version in VERSIONS:
            assert sum(line.startswith(f"{version:<9}") for line in lines) >= 4
        assert sum(" + " in line for line in lines) == 12
        assert "Merged: the four adapters, each with weight 0.25." in " ".join(lines[-3:])


def test_the_page_says_what_did_not_hold(finished):
    result = json.loads(json.dumps(finished[1]))
    for best in result["best_on_own"].values():
        for found in best.values():
            found["held"] = True
    assert "NO" not in domains_page(result)
    result["best_on_own"]["medical"]["loss"]["held"] = False
    (line,) = [line for line in domains_page(result).splitlines() if line.endswith("NO")]
    assert line.startswith("medical  loss ")


def test_the_heat_map_shows_what_was_trained_and_general_text(finished):
    shown = drawn(finished[1])
    assert list(shown["sets"]) == list(shown["scores"]) == [*(f"{domain}/paraphrase" for domain in DOMAINS), "general"]
    assert problems(matrix_figure(shown)) == []

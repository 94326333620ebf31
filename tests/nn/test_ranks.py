"""Several ranks give the numbers of one process: shares, weights by scored tokens, one flat array, whole jobs."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from commandline import complaint, status
from hearing import counts_of
from jobs import options, trainer
from threadranks import Comm, in_ranks
from threadranks import Job as Shared

import minilora as ml
from minilora import cli
from minilora.measure.loss import mean_loss
from minilora.measure.recall import answer_all
from minilora.nn import ranks as module
from minilora.nn.optim import SGD
from minilora.nn.ranks import ALONE, RankError, Several, launched, world
from minilora.nn.step import training_step
from minilora.train import job, loop
from minilora.train.job import finetune
from minilora.train.loop import Trainer, TrainingError, fit
from minilora.train.options import Options

SYSTEM = (7, 8, 9)  # what all samples begin with


def sample(length, scored, seed):
    """Random ids, of which the last `scored` count."""
    rng = np.random.default_rng(seed)
    ids = (*SYSTEM, *rng.integers(10, 64, length - len(SYSTEM)).tolist())
    return ml.Sample(ids, (-100,) * (length - scored) + ids[length - scored :])


SAMPLES = [sample(length, scored, i) for i, (length, scored) in enumerate([(9, 1), (30, 20), (12, 3), (45, 40), (16, 2),
           (24, 9), (10, 5), (33, 7)])]  # fmt: skip


# -- one process -------------------------------------------------------------------------------------------------------


def test_each_rank_has_a_core_where_there_are_more_ranks_than_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS and Windows
    monkeypatch.setattr(module, "processors", lambda: 3)
    assert [module._share_of_cores(ranks) for ranks in (1, 2, 5)] == [3, 1, 1]


def test_without_a_launcher_nothing_of_mpi_is_imported():
    code = (
        "import sys, minilora.cli; from minilora.nn.ranks import world, ALONE; assert world() is ALONE;"
        "print('mpi4py' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI", "PMI"))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}, False),
        ({"PMI_SIZE": "2"}, True),
        ({"PMI_SIZE": "1"}, False),
        ({"PMIX_RANK": "3"}, True),
        ({"PMIX_RANK": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "8"}, False),
    ],
)
def test_the_launchers_variables_tell_whether_there_are_others(variables, expected, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("OMPI", "PMI", "SLURM", "MV2"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() is expected


@pytest.mark.parametrize("rank", [0, 1])
def test_mpiexec_without_mpi4py_is_one_line_of_the_first_rank(rank, monkeypatch, capsys):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    world.cache_clear()
    try:
        assert status("finetune") == 1
    finally:
        world.cache_clear()
    if rank:
        assert capsys.readouterr() == ("", "")
    else:
        assert complaint(capsys).endswith("which needs mpi4py: pip install 'minilora[mpi]'")


# -- shares ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 8, 11])
def test_every_sample_is_in_one_share_and_the_shares_are_even(size):
    shares, _ = in_ranks(size, lambda ranks: ranks.share(SAMPLES))
    assert sorted(each.ids for share in shares for each in share) == sorted(each.ids for each in SAMPLES)
    tokens = [sum(len(each.ids) for each in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(len(each.ids) for each in SAMPLES)
    assert sum(not share for share in shares) == max(0, size - len(SAMPLES))
    assert in_ranks(size, lambda ranks: ranks.at_once(8))[0] == [-(-8 // size)] * size


def test_a_number_is_summed_over_the_ranks_of_one_machine():
    def here(ranks):
        ranks.host = "ab"[ranks.number == 1]
        return ranks.sum_here(10**ranks.number)

    assert in_ranks(3, here)[0] == [101, 10, 101] and ALONE.sum_here(7) == 7


# -- one step ----------------------------------------------------------------------------------------------------------


def adapted(model, **settings):
    model = copy.deepcopy(model)
    config = ml.LoraConfig(**(dict(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False) | settings))
    ml.add_adapter(model, config, name="own", seed=3)
    return model


def gradients(model, samples, ranks=ALONE):
    model = adapted(model)
    optimizer = SGD(model.trainable_parameters(), lr=0.0)
    loss, norm = training_step(model, optimizer, ranks.share(samples), mean=ranks.mean)
    return loss, norm, [p.grad.copy() for p in optimizer.parameters]


@pytest.mark.parametrize("size", [2, 3, 11])
def test_gradients_are_weighted_by_scored_tokens(size, tiny_model):
    loss, norm, expected = gradients(tiny_model, SAMPLES)
    found, shared = in_ranks(size, lambda ranks: gradients(tiny_model, SAMPLES, ranks))
    for its_loss, its_norm, its_gradients in found:
        assert its_loss == pytest.approx(loss, rel=1e-6) and its_norm == pytest.approx(norm, rel=1e-5)
        for mine, whole in zip(its_gradients, expected, strict=True):
            np.testing.assert_allclose(mine, whole, atol=1e-6 * norm, rtol=1e-4)
            assert mine.dtype == np.float32
    assert shared.sent == [4 * (sum(g.size for g in expected) + 2)]  # one array, once


def test_gradients_come_out_of_the_flat_array_as_they_went_in():
    def pass_through(ranks):
        p = [ml.Parameter(np.zeros(shape, np.float32)) for shape in [(2, 3), (4,), (1, 5)]]
        if not ranks.number:
            p[0].grad, p[2].grad = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((1, 5), np.float32)
        loss = ranks.mean(p, np.float32(2.0) if not ranks.number else 0.0, 7 if not ranks.number else 0)
        return float(loss), [each.grad for each in p]

    for loss, grads in in_ranks(2, pass_through)[0]:
        assert loss == 2.0
        assert np.array_equal(grads[0], np.arange(6).reshape(2, 3)) and np.array_equal(grads[2], np.ones((1, 5)))
        assert np.array_equal(grads[1], np.zeros(4)) and np.shares_memory(grads[0].base, grads[2].base)


# -- training ----------------------------------------------------------------------------------------------------------


def test_every_rank_gets_the_weights_of_the_first_and_the_initial_ones_of_pissa(tiny_model):
    def levelled(ranks):
        model = adapted(tiny_model, init_lora_weights="pissa")
        for p in model.trainable_parameters().values():
            p.data = np.asfortranarray(p.data)  # as the matrices of a GPT-2
        training = trainer(model, SAMPLES, 1)
        training.ranks = ranks
        arrays = [array for weights in training.adapters() for array in weights.initial]
        arrays += [p.data for p in training.parameters.values()]
        for array in arrays:
            array += ranks.number
        training.level()
        return arrays

    (first, *others), _ = in_ranks(3, levelled)
    assert len(first) > 20
    for arrays in others:
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(first, arrays, strict=True))


def test_a_broken_share_breaks_the_step_on_every_rank(tiny_model):
    def broken(ranks):
        model = adapted(tiny_model)
        if ranks.number == 1:
            next(iter(model.trainable_parameters().values())).data[...] = np.nan
        with pytest.raises(TrainingError, match="loss became nan at step 1 of 2"):
            fit(model, SAMPLES, steps=2, ranks=ranks)
        return True

    assert in_ranks(3, broken)[0] == [True] * 3


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_a_loss_is_measured_together(tiny_model):
    expected = mean_loss(tiny_model, SAMPLES, batch_size=3)

    def measure(ranks):
        with counts_of("record") as seen:
            return mean_loss(tiny_model, SAMPLES, batch_size=3, ranks=ranks), sum(seen)

    found, _ = in_ranks(2, measure)
    assert found[0] == found[1] == (pytest.approx(expected, rel=1e-6), len(SAMPLES))


def test_answers_are_given_together_and_each_rank_counts_all(talker, tokenizer):
    records = [ml.Record(f"{i}", ({"role": "user", "content": "a" * i}, {"role": "assistant", "content": "b"}))
               for i in range(1, 6)]  # fmt: skip
    expected = answer_all(talker, tokenizer, records, 4)

    def answer(ranks):
        with counts_of("answer") as seen:
            return answer_all(talker, tokenizer, records, 4, ranks), sum(seen)

    assert in_ranks(3, answer)[0] == [(expected, 5)] * 3


# -- whole jobs --------------------------------------------------------------------------------------------------------


def together(size, chosen, **more):
    return in_ranks(size, lambda ranks: finetune(chosen, ranks=ranks, **more))[0]


def same(metrics, alone):
    np.testing.assert_allclose(metrics["train_loss"], alone["train_loss"], rtol=1e-5)
    for name in ("validation_loss", *alone["validation"]):
        found, expected = (each["validation"].get(name, each["validation_loss"]) for each in (metrics, alone))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, losses in alone["loss"].items():
        np.testing.assert_allclose(metrics["loss"][name], losses, rtol=1e-5)
    assert metrics["kept"]["step"] == alone["kept"]["step"] and metrics["answers"] == alone["answers"]
    np.testing.assert_allclose(list(metrics["last"]["loss"].values()), list(alone["last"]["loss"].values()), rtol=1e-5)


QUICK = dict(measure=False, answers=False)
JOBS = {
    "lora": dict(strength=0.5, eval_every=2, lora_plus=4.0),
    "full": dict(method="full", lr=1e-3, steps=3),
    "dora": dict(use_dora=True, batch_size=1, keep="last"),  # a batch is smaller than the ranks are many
    "pissa, accumulation": dict(init_lora_weights="pissa", grad_accumulation=3, batch_size=2),
    "clipped, with weight decay": dict(max_grad_norm=0.05, weight_decay=0.1, recompute=True),
}


@pytest.mark.long
@pytest.mark.usefixtures("quick_jobs")
@pytest.mark.parametrize("way", JOBS)
def test_a_whole_job_gives_the_numbers_of_one_process(way, home, tmp_path, said):
    more = {} if way == "lora" else QUICK
    alone = finetune(options(home, tmp_path / "alone", eval_records=2, **JOBS[way]), **more)
    metrics, *others = together(3, options(home, tmp_path / "ranks", eval_records=2, **JOBS[way]), **more)
    same(metrics, alone)
    assert others == [{}, {}] and metrics["ranks"] == 3 and alone["ranks"] == 1
    trained, whole = metrics["trainable_parameters"], alone["total_parameters"]
    whole -= trained if way != "full" else 0
    assert metrics["bytes_per_step"] == {"sent": 4 * (trained + 2), "full_sent": 4 * (whole + 2)}
    assert alone["bytes_per_step"] == {"sent": 0, "full_sent": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "ranks"]
    written = [{path.name for path in (tmp_path / name).iterdir()} for name in ("ranks", "alone")]
    assert written[0] == written[1] and len(said()) == len(set(said()))


@pytest.mark.usefixtures("quick_jobs")
def test_dropout_draws_its_own_holes_on_each_rank(home, tmp_path, monkeypatch):
    seeds = {}

    class Watched(Trainer):
        def step(self):
            dropouts = [each for _, each in self.model.named_modules() if type(each).__name__ == "Dropout"]
            seeds[self.ranks.number] = dropouts[0].seed
            assert dropouts[0].training
            return super().step()

    monkeypatch.setattr(job, "Trainer", Watched)
    metrics, *_ = together(2, options(home, tmp_path / "run", lora_dropout=0.2), **QUICK)
    assert len(set(seeds.values())) == 2 and np.isfinite(metrics["train_loss"]).all()


@pytest.mark.long
@pytest.mark.usefixtures("quick_jobs")
@pytest.mark.parametrize("sizes", [(2, 3), (3, 1)], ids=str)
def test_a_job_is_gone_on_with_by_another_number_of_ranks(sizes, home, tmp_path, monkeypatch):
    change = dict(save_every=2, eval_every=2, strength=0.5, lr=1e-2)
    alone = finetune(options(home, tmp_path / "alone", **change), **QUICK)

    class Stopped(Trainer):
        def step(self):
            if self.done == 4 and not self.ranks.number:
                raise KeyboardInterrupt
            return super().step()

    def run(size, **more):
        chosen = options(home, tmp_path / "run", **change, **more)
        return together(size, chosen, **QUICK)[0] if size > 1 else finetune(chosen, **QUICK)

    monkeypatch.setattr(job, "Trainer", Stopped)
    with pytest.raises(KeyboardInterrupt):
        run(sizes[0])
    assert json.loads((tmp_path / "run.partial/checkpoint/state.json").read_text())["step"] == 4
    monkeypatch.setattr(job, "Trainer", Trainer)
    same(run(sizes[1], resume=True), alone)


def test_the_first_rank_alone_decides_when_to_stop(home, tmp_path, monkeypatch):
    losses = iter([5.0, 6.0, 7.0, 8.0])

    def validate(trainer, sets):
        loss = 9.0 - trainer.done if trainer.ranks.number else next(losses)  # the others would go on
        trainer.history.validation.append((trainer.done, loss))

    monkeypatch.setattr(loop, "validate", validate)
    metrics, *_ = together(2, options(home, tmp_path / "run", eval_every=1, patience=2), **QUICK)
    assert metrics["steps"] == 3 and metrics["kept"]["step"] == 1


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_another_base_on_one_rank_is_refused(home, tmp_path, monkeypatch):
    def run(ranks):
        data = home / "data.jsonl" if ranks.number != 1 else tmp_path / "other.jsonl"
        finetune(replace(options(home, tmp_path / "run"), data=str(data)), ranks=ranks)

    rows = (home / "data.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(reversed(rows)), encoding="utf-8")
    with pytest.raises(RankError, match="rank 1 has another data than rank 0"):
        in_ranks(3, run)
    assert [path.name for path in tmp_path.iterdir()] == ["other.jsonl"]


def test_a_rank_that_lacks_something_tells_the_first_one(monkeypatch, capsys):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: (_ for _ in ()).throw(SystemExit))  # until it is ended
    shared = Shared(2)
    first, second = (Several(Comm(shared, number), None, f"host{number}") for number in range(2))
    with pytest.raises(SystemExit):
        second.fail("minilora: own.jsonl: no such file", 1)
    with pytest.raises(RankError, match="^rank 1 on host1: own.jsonl: no such file$"):
        first.ready(base="x")
    assert capsys.readouterr().err == "" and shared.ended == []


def test_a_rank_that_fails_later_ends_the_job(capsys):
    shared = Shared(2)
    first, second = (Several(Comm(shared, number), None, f"host{number}") for number in range(2))
    second.ready(base="x"), first.ready(base="x")
    with pytest.raises(SystemExit):
        second.fail("minilora: no room", 1)
    with pytest.raises(SystemExit):
        first.fail("minilora: interrupted", 130)
    assert shared.ended == [(1, 1), (0, 130)]
    assert capsys.readouterr().err == "minilora: rank 1 on host1: no room\nminilora: interrupted\n"


def test_a_gpu_is_for_one_process(home, tmp_path):
    with pytest.raises(ValueError, match="several ranks compute on the cpu alone"):
        together(2, Options(base=str(home / "base"), data=str(home / "data.jsonl"), out=str(tmp_path), device="cuda"))


@pytest.mark.parametrize("words", [["eval", "--adapter", "a", "--data", "legal"], ["chat"], ["bench"]])
def test_other_commands_are_for_one_process(words, monkeypatch, capsys):
    shared = Shared(2)
    monkeypatch.setattr(cli, "world", lambda: Several(Comm(shared, 0), None, "host0"))
    assert status(*words) == 2
    assert complaint(capsys) == f"minilora {words[0]} is for one process: leave out mpiexec"
    assert shared.ended == [(0, 2)]

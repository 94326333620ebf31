"""Several ranks give the numbers of one process: shares, and means weighted by scored tokens, in one flat array."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from commandline import complaint, status
from helpers.communicator import Comm, in_ranks

import minilora as ml
from minilora import cli
from minilora.nn import ranks as module
from minilora.nn.optim import SGD
from minilora.nn.parts import Batch
from minilora.nn.ranks import ALONE, Ranks, launched, world
from minilora.nn.step import training_step
from minilora.train import job

SYSTEM = (7, 8, 9)  # what all samples begin with


def sample(length, scored, seed):
    """Random ids, of which the last `scored` count."""
    rng = np.random.default_rng(seed)
    ids = (*SYSTEM, *rng.integers(10, 64, length - len(SYSTEM)).tolist())
    return ml.Sample(ids, (-100,) * (length - scored) + ids[length - scored :])


SAMPLES = [sample(length, scored, i) for i, (length, scored) in enumerate([(9, 1), (30, 20), (12, 3), (45, 40), (16, 2),
           (24, 9), (10, 5), (33, 7)])]  # fmt: skip


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
    [({}, False), ({"OMPI_COMM_WORLD_SIZE": "4"}, True), ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
     ({"PMI_SIZE": "2"}, True), ({"PMI_SIZE": "1"}, False), ({"SLURM_NTASKS": "8"}, False),
     ({"PMIX_RANK": "3"}, True), ({"PMIX_RANK": "0", "SLURM_NTASKS": "1"}, False)],
)  # fmt: skip
def test_the_launchers_variables_tell_whether_there_are_others(variables, expected, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("OMPI", "PMI", "SLURM", "MV2"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() is expected


def test_mpiexec_without_mpi4py_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    world.cache_clear()
    try:
        assert status("finetune") == 1
    finally:
        world.cache_clear()
    assert complaint(capsys).endswith("which needs mpi4py: pip install 'minilora[mpi]'")


@pytest.mark.parametrize("size", [2, 3, 8, 11])
def test_every_sample_is_in_one_share_and_the_shares_are_even(size):
    shares = in_ranks(size, lambda ranks: ranks.share(SAMPLES))
    assert sorted(each.ids for share in shares for each in share) == sorted(each.ids for each in SAMPLES)
    tokens = [sum(len(each.ids) for each in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(len(each.ids) for each in SAMPLES)
    assert sum(not share for share in shares) == max(0, size - len(SAMPLES))


def test_arrays_are_no_batch_that_ranks_could_share():
    with pytest.raises(TypeError, match="give training_step the samples"):
        Ranks(Comm(2)).share(Batch(np.ones((2, 3), int), np.ones((2, 3), int)))


@pytest.mark.parametrize("size", [2, 3, 11])
def test_gradients_are_weighted_by_scored_tokens_and_sent_in_one_array(size, tiny_model):
    def gradients(ranks):
        model = copy.deepcopy(tiny_model)
        config = ml.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
        ml.add_adapter(model, config, seed=3)
        optimizer = SGD(model.trainable_parameters(), lr=0.0)
        loss, norm = training_step(model, optimizer, SAMPLES, ranks=ranks)
        return loss, norm, [p.grad.copy() for p in optimizer.parameters], ranks

    loss, norm, expected, _ = gradients(ALONE)
    for its_loss, its_norm, its_gradients, ranks in in_ranks(size, gradients):
        assert its_loss == pytest.approx(loss, rel=1e-6) and its_norm == pytest.approx(norm, rel=1e-5)
        for mine, whole in zip(its_gradients, expected, strict=True):
            np.testing.assert_allclose(mine, whole, atol=1e-6 * norm, rtol=1e-4)
            assert mine.dtype == np.float32
        assert ranks.comm.sent == [4 * (sum(g.size for g in expected) + 2)]


def test_every_rank_gets_what_the_first_one_has():
    def levelled(ranks):
        arrays = [np.asfortranarray(np.full((2, 3), ranks.number)), np.full(4, ranks.number)]
        ranks.level(arrays)
        return ranks.same(ranks.number), *(array.tolist() for array in arrays)

    assert in_ranks(3, levelled) == [(0, [[0] * 3] * 2, [0] * 4)] * 3


def test_a_rank_with_other_data_ends_the_job():
    def agrees(ranks):
        options = SimpleNamespace(decisive=lambda: {"lr": 1.0})
        given = SimpleNamespace(sha256="other" if ranks.number == 1 else "data")
        try:
            job._agree(SimpleNamespace(options=options, base="base", material=given), ranks)
        except ValueError as error:
            return str(error)

    said = "another data than rank 0 has: they must be the same everywhere"
    assert in_ranks(3, agrees) == [None, said, None]


def test_a_rank_that_fails_ends_the_job_and_any_but_the_first_gives_that_one_time_to(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    first, second = (Ranks(Comm(2, number)) for number in range(2))
    assert (second.fail("minilora: no room", 1), first.fail("minilora: interrupted", 130)) == (1, 130)
    assert waited == [5] and (first.comm.ended, second.comm.ended) == ([130], [1])
    assert capsys.readouterr().err == "minilora: rank 1: no room\nminilora: interrupted\n"


@pytest.mark.parametrize("words", [["eval", "--adapter", "a", "--data", "legal"], ["sweep"], ["bench"]])
def test_other_commands_are_for_one_process(words, monkeypatch, capsys):
    monkeypatch.setattr(cli, "world", lambda: Ranks(Comm(2)))
    assert status(*words) == 2
    assert complaint(capsys) == f"minilora {words[0]} is for one process: leave out mpiexec"

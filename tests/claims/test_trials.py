"""What the trials of claims compute, by numbers known by hand."""

import numpy as np
import pytest

from minilora import experiments
from minilora.claims import (
    _introduction,
    alpha_is_a_rate,
    batch_size,
    forgets_less,
    low_rank_update,
    rate_ten_times,
)
from minilora.experiments.claim import Setting
from minilora.experiments.tiny import tiny_base
from minilora.lora.adapters import base_state
from minilora.nn.module import sha256_of


def test_the_equivalent_form_has_the_same_product_and_alpha_alone_has_not():
    alpha, p, q = alpha_is_a_rate.FORMS["equivalent"]
    assert alpha * p * q == pytest.approx(1) and p != q and alpha_is_a_rate.FORMS["alpha alone"] == (alpha, 1, 1)
    found = alpha_is_a_rate.train(0, 5, "adam")
    assert found["apart"] < 1e-12 < 1e-3 < alpha_is_a_rate.train(0, 5, "sgd")["apart"]
    own, same, other = found["losses"].values()
    assert own == pytest.approx(same) and own[0] == other[0] and own[-1] < other[-1] < own[0]


def test_two_runs_are_as_far_apart_as_at_their_worst_step(monkeypatch):
    def path(seed, steps, optimizer, alpha, p, q):
        return [np.ones((2, 2)), np.ones((2, 2)) * (1 if alpha == 1 else 1.5), np.ones((2, 2))], [0.0]

    monkeypatch.setattr(alpha_is_a_rate, "_path", path)
    assert alpha_is_a_rate.train(0, 3, "adam")["apart"] == 0.5


@pytest.mark.parametrize("complex_change", [False, True])
def test_lora_is_also_compared_with_full_fine_tuning_that_leaves_the_embedding(complex_change, monkeypatch):
    ends = {"lora": 3.5, "full": 2.0, _introduction.FROZEN: 3.0}  # of 4.0 before

    def tuned(each, function, contenders, seeds, search, walk, **how):
        assert walk and search == seeds  # until both neighbours are worse, by the mean of all seeds
        assert [one.get("frozen") for one in contenders.values()] == [None, None, ["embed_tokens"]]
        assert contenders[_introduction.FROZEN]["method"] == "full"
        assert [one["shuffled"] for one in contenders.values()] == [complex_change] * 3
        runs = {name: {"before": {"test": 4.0}, "test": end, "curve": []} for name, end in ends.items()}
        return {name: {"lr": 1.0, "runs": [runs[name]] * len(seeds)} for name in contenders}

    monkeypatch.setattr(experiments.claim, "tuned", tuned)
    found = _introduction.gain(Setting(seeds=(0, 1)), complex_change=complex_change)
    assert found["measured"] == [0.25, 0.25] and found["share of the gain with a frozen embedding"] == [0.5, 0.5]


class Asked(Exception):
    """What a claim asks of `tuned`."""


@pytest.mark.parametrize(
    ("claim", "all_seeds", "per_decade"), [(batch_size, False, 4), (forgets_less, True, 3), (rate_ten_times, True, 4)]
)
def test_each_contender_searches_its_rate_until_both_neighbours_are_worse(claim, all_seeds, per_decade, monkeypatch):
    def tuned(each, function, contenders, seeds, search=None, per_decade=2, walk=True):
        raise Asked(contenders, search, per_decade, walk)

    for module in (claim, experiments.claim):  # one of them has its own search
        monkeypatch.setattr(module, "tuned", tuned, raising=False)
    with pytest.raises(Asked) as asked:
        claim.run(Setting(seeds=(3, 4)))
    contenders, search, found, walk = asked.value.args
    assert (search, found, walk) == ((3, 4) if all_seeds else None, per_decade, True)
    if claim is rate_ten_times:  # as in the paper
        assert {one["schedule"] for one in contenders.values()} == {"constant"}
    if claim is forgets_less:
        assert [one["method"] for one in contenders.values()] == ["lora", "full"]
        same = {"base": "tiny", "alpha": 32, "schedule": "constant", "every": 5}
        assert all(one.items() >= same.items() for one in contenders.values())


def test_what_is_forgotten_at_the_same_loss_is_read_between_two_points(monkeypatch):
    slow, quick = {"new": [4.0, 3.0], "old": [2.0, 3.0]}, {"new": [4.0, 3.5, 2.5], "old": [2.0, 2.1, 2.4]}
    assert forgets_less._lost(slow, quick) == 1.0 and forgets_less._lost(quick, slow) == pytest.approx(0.25)
    of = lambda path: {"lr": 1e-3, "tried": [], "runs": [path]}
    monkeypatch.setattr(experiments.claim, "tuned", lambda *given, **more: {"LoRA": of(slow), "full": of(quick)})
    assert forgets_less.run(Setting())["forgotten less at the same loss"] == [pytest.approx(1 - 1.0 / 0.25)]


# -- an update that is cut to a rank -----------------------------------------------------------------------------------

FEW = {"steps": 2, "batch_size": 1, "data": "support", "held_out": 2}


def test_all_directions_leave_all_of_the_gain_and_the_base_is_as_it_was():
    model, _ = tiny_base()
    before = sha256_of(base_state(model))
    found = low_rank_update.cut(lr=1e-3, seed=0, ranks=[4, 128], **FEW)
    assert found["left"]["128"] == pytest.approx(1, abs=1e-3)
    assert found["variance"]["128"] == pytest.approx(1)
    assert found["chance"]["4"] < found["variance"]["4"] < 1
    assert sha256_of(base_state(model)) == before


def test_of_a_known_update_the_shares_are_known(monkeypatch):
    def fit(model, *inputs, **settings):
        for _, p in model.named_parameters():
            if p.ndim == 2:
                for i, value in enumerate((0.2, 0.1, 0.1)):  # its singular values
                    p.data[i, i] += value

    monkeypatch.setattr(low_rank_update, "fit", fit)
    found = low_rank_update.cut(lr=1e-3, seed=0, ranks=[1, 2, 3], **FEW)
    assert found["variance"] == pytest.approx({"1": 4 / 6, "2": 5 / 6, "3": 1}, abs=1e-4)
    assert found["left"]["3"] == pytest.approx(1, abs=1e-3) and found["loss"][0] != found["loss"][1]
    again = low_rank_update.cut(lr=1e-3, seed=0, ranks=[3, 1], **FEW)  # each from the base, whatever came before it
    assert again["left"]["1"] == pytest.approx(found["left"]["1"])
    matrices = [p for _, p in tiny_base()[0].named_parameters() if p.ndim == 2]
    monkeypatch.setattr(low_rank_update, "mean_loss", lambda *given: -float(sum(np.trace(p.data) for p in matrices)))
    real = np.linalg.svd
    flat = lambda noise, compute_uv=True, **how: real(noise, **how) if compute_uv else np.ones(min(noise.shape))
    monkeypatch.setattr(np.linalg, "svd", flat)
    half = low_rank_update.cut(lr=1e-3, seed=0, ranks=[64], at_random=True, **FEW)
    assert 0.3 < half["left"]["64"] < 0.8  # half of the directions, or all of a smaller matrix
    sizes = [min(p.shape) for p in matrices]
    assert half["chance"]["64"] == pytest.approx(np.mean([min(64 / size, 1) for size in sizes])) and len(set(sizes)) > 1

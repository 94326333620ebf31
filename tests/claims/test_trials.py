"""What the trials of claims compute, by numbers known by hand."""

import numpy as np
import pytest

from minilora import experiments
from minilora.claims import (
    _introduction,
    alpha_is_a_rate,
    amplified_directions,
    batch_size,
    double_quantisation,
    forgets_less,
    intruders_scaled_down,
    loftq_start,
    merged_adds_nothing,
    rate_ten_times,
    rslora_final_loss,
    vera,
)
from minilora.experiments.claim import Setting
from minilora.experiments.tiny import tiny_base
from minilora.files.quant import dequantize, quantize
from minilora.lora.spectra import amplification


def test_scales_in_eight_bits_are_off_by_half_a_step_at_most_and_each_bit_is_counted():
    scale = np.random.default_rng(0).uniform(0.5, 1.5, 600).astype(np.float32)
    back, bits = double_quantisation.second(scale, 8)
    assert bits == 600 * 8 + 3 * 32 + 32  # three groups of at most 256, and the mean
    steps = [np.abs(scale[i : i + 256] - scale.mean()).max() / 127 for i in (0, 256, 512)]
    assert (np.abs(back - scale) <= 0.501 * np.repeat(steps, 256)[:600]).all() and (back != scale).any()
    assert len(np.unique(double_quantisation.second(scale, 2)[0][:256])) == 3  # two bits: -1, 0 and 1
    same, plain = double_quantisation.second(scale, 32)
    assert (same == scale).all() and plain == 600 * 32


def test_quantised_scales_change_the_matrices_a_little_and_the_base_not_at_all():
    before = {name: p.data.copy() for name, p in tiny_base()[0].named_parameters()}
    eight, two, plain = (double_quantisation.quantised(bits, 0, 1) for bits in (8, 2, 32))
    assert 1 < eight["error"] / plain["error"] < 1.01 < two["error"] / plain["error"]
    assert plain["bits"] == 0.5 and 0.125 < eight["bits"] < 0.135
    assert all((p.data == before[name]).all() for name, p in tiny_base()[0].named_parameters())


def test_a_part_of_the_error_is_its_best_approximation_or_lies_between_random_directions():
    error = np.random.default_rng(0).standard_normal((12, 20))
    best, drawn = (loftq_start.part(error, 3, rng) for rng in (None, np.random.default_rng(1)))
    assert np.linalg.norm(error - best) ** 2 == pytest.approx((np.linalg.svd(error)[1][3:] ** 2).sum())
    assert np.linalg.matrix_rank(drawn) == 3 and np.sum(drawn * (error - drawn)) == pytest.approx(0, abs=1e-9)


def test_the_first_start_is_qloras_and_each_iteration_leaves_less():
    rest = loftq_start.starts("NF4", 8, 3, seed=0, at_random=False, layers=1, records=1)["rest"]
    assert rest[0] == 1 and rest[0] > rest[1] > rest[2] > rest[3]
    maps = [p.data for name, p in tiny_base()[0].named_parameters() if "layers.0" in name and "_proj" in name]
    values = [np.linalg.svd(w - dequantize(quantize(w, "NF4"), "NF4"), compute_uv=False) for w in maps]
    assert rest[1] == pytest.approx(np.mean([np.linalg.norm(s[8:]) / np.linalg.norm(s) for s in values]), rel=1e-4)


def test_an_adapter_costs_its_two_factors_until_it_is_merged():
    found = merged_adds_nothing.count(seed=0, r=2, tokens=3)
    maps = [p.shape for name, p in tiny_base()[0].named_parameters() if name.endswith("_proj.weight")]
    inside, added = sum(m * n for m, n in maps), 2 * sum(m + n for m, n in maps)
    base, adapter, merged = (found[form] for form in ("base", "adapter", "merged"))
    head = 2048 * 128
    assert base["MACs"] == 3 * (inside + head) and adapter["MACs"] == base["MACs"] + 3 * added
    assert base["parameters read"] == sum(p.size for _, p in tiny_base()[0].named_parameters())
    assert adapter["parameters read"] == base["parameters read"] + added and merged == base
    assert adapter["operations"] == base["operations"] + 2 * len(maps)  # two more matrix products in each
    assert 0 < found["apart"] < 1e-5 and found["NF4"] == pytest.approx(32 / 4.5)


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


def test_an_intruder_is_found_and_as_many_others_of_the_first_ten():
    w = np.zeros((16, 20))
    w[range(16), range(16)] = np.arange(16, 0, -1)
    u, v = np.ones(16) / 4, np.eye(20)[19]  # every |cosine| with W's left singular vectors is 1/4
    parts = intruders_scaled_down.directions(w, w + 100 * np.outer(u, v))
    assert parts["count"] == 1 and np.linalg.matrix_rank(parts["others"]) == 1
    cosine = np.sum(parts["intruders"] * np.outer(u, v)) / np.linalg.norm(parts["intruders"])
    assert cosine > 0.98 and np.linalg.norm(parts["others"]) < 16 < 99 < np.linalg.norm(parts["intruders"])
    assert abs(np.sum(parts["others"] * parts["intruders"])) < 1e-9


def test_what_is_scaled_by_zero_is_gone_and_the_base_is_as_before():
    before = {name: p.data.copy() for name, p in tiny_base()[0].named_parameters()}
    found = intruders_scaled_down.train(3e-2, steps=3, held_out=2, factors=[1.0, 0.0])
    assert found["all"][1] == pytest.approx(found["before"], rel=1e-5) and found["all"][0] != found["all"][1]
    assert found["intruders"][0] == found["others"][0] == found["all"][0]
    assert found["validation"] > 0 and 0 <= found["count"] <= 10
    assert all((p.data == before[name]).all() for name, p in tiny_base()[0].named_parameters())


def test_vera_shares_two_random_matrices_and_trains_two_vectors():
    wide, narrow = vera.VeraWeights(16, 384, 128, seed=3), vera.VeraWeights(384, 24, 128, seed=3)
    (a, b), (a_of_narrow, b_of_narrow) = wide.shared, narrow.shared
    assert (a[:, :24] == a_of_narrow).all() and (b == b_of_narrow[:16]).all()
    assert a.std() == pytest.approx(np.sqrt(2 / 384), rel=0.02)  # Kaiming's variances: 2 / n, and 2 / r
    assert b_of_narrow.std() == pytest.approx(np.sqrt(2 / 128), rel=0.02)
    assert (wide.lora_A.data == np.float32(0.1) * a).all() and (wide.lora_B.data == 0).all()
    assert {name: p.shape for name, p in wide.named_parameters()} == {"d": (128, 1), "b": (16, 1)}


def test_both_scalings_are_those_of_rslora_and_of_lora(monkeypatch):
    asked = []
    monkeypatch.setattr(
        rslora_final_loss,
        "tiny_run",
        lambda *_, **trial: asked.append(trial) or {"validation": 1.0, "test": trial["r"]},
    )
    for root in (True, False):
        assert rslora_final_loss.train(1e-2, root, ranks=[4, 8])["by rank"]["test"] == [4, 8]
    assert [trial["variant"] for trial in asked] == ["rslora"] * 2 + ["lora"] * 2


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


def test_the_table_of_amplification_is_of_the_queries_alone(monkeypatch, rng):
    w, other, update = (rng.standard_normal((12, 12)) for _ in range(3))
    monkeypatch.setattr(amplified_directions, "base_matrices", lambda base: {"a.q_proj": w, "a.k_proj": other})
    low = (update[:, :2], update[:2])
    monkeypatch.setattr(amplified_directions, "read_update", lambda file: {"a.q_proj": low, "a.k_proj": low})
    row = amplification(low, w)
    assert amplified_directions.look("file", False) == {name: [getattr(row, name)] for name in amplified_directions.ROW}
    emphasised = amplified_directions.look("file", True)
    assert emphasised["update"] == pytest.approx([row.update]) and emphasised["seen"] == pytest.approx(
        emphasised["top"]
    )

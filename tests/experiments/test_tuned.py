"""Each contender's best rate, found on a loss whose best rate is known."""

import json
import math

import pytest

from minilora.experiments.tuned import as_numbers, best_rate, first_step, next_rate, tuned, vertex


def valley(lr, seed, best=1e-2, fails_above=math.inf):
    """A parabola in log lr, a little higher for each seed."""
    if lr > fails_above:
        raise ValueError("the loss is nan")
    return {"validation": 1 + math.log10(lr / best) ** 2 + seed / 100, "test": lr}


def each(function, trials):
    def attempt(trial):
        try:
            return function(**trial)
        except ValueError as error:
            return {"failed": str(error)}

    return [attempt(trial) for trial in trials]


@pytest.mark.parametrize("start", [1e-4, 1e-2, 1.0])
def test_the_best_rate_of_each_is_found_from_either_side_and_is_at_no_edge_of_what_was_tried(start):
    found = tuned(each, valley, {1e-2: {"lr": start}, 1.0: {"lr": start, "best": 1.0}}, seeds=(0, 1))
    for best, one in found.items():
        assert one["lr"] == best and [run["test"] for run in one["runs"]] == [best, best]
        rates = [lr for lr, _ in one["tried"]]
        assert rates == sorted(rates) and rates[0] < best < rates[-1]


def test_what_a_claim_stores_is_of_each_contender_s_best_rate():
    found = tuned(each, lambda **given: valley(**given) | {"trained": 7}, {"one": {"lr": [1e-3, 1e-2]}}, seeds=(0, 1))
    assert as_numbers(found) == {
        "loss on the test": {"one": [1e-2, 1e-2]},
        "parameters": {"one": 7},
        "rates": {"one": 1e-2},
        "tried": {"one": [[1e-3, 2.0], [1e-2, 1.0]]},
    }


def test_no_trial_is_asked_for_twice():
    seen = []

    def listening(function, trials):
        seen.extend((trial["lr"], trial["seed"]) for trial in trials)
        return each(function, trials)

    tuned(listening, valley, {"one": {"lr": 1e-3}}, seeds=(0, 1))
    assert len(seen) == len(set(seen)) == 6
    assert (1e-2, 1) in seen


def test_a_rate_that_fails_is_worse_than_all_others():
    found = tuned(each, valley, {"one": {"lr": 1.0, "fails_above": 5e-3}}, seeds=(0,))["one"]
    assert found["lr"] == 3.16e-3
    assert None in [loss for _, loss in found["tried"]]
    json.dumps(found, allow_nan=False)


def test_a_seed_that_fails_at_the_best_rate_is_told():
    def later(lr, seed):
        if seed == 1:
            raise ValueError("the loss is nan")
        return valley(lr, seed)

    with pytest.raises(RuntimeError, match=r"one at its best learning rate 0\.01: the loss is nan"):
        tuned(each, later, {"one": {"lr": 1e-2}}, seeds=(0, 1))


def test_the_mean_over_the_seeds_decides():
    def split(lr, seed):
        return valley(lr, 0, best={0: 1e-3, 1: 1e-1}[seed])

    found = tuned(each, split, {"one": {"lr": 1e-3}}, seeds=(0, 1), search=(0, 1))["one"]
    assert found["lr"] == 1e-2
    assert min(found["by_seed"]["0"], key=lambda row: row[1])[0] == 1e-3
    assert min(found["by_seed"]["1"], key=lambda row: row[1])[0] == 0.0316


@pytest.mark.parametrize(("lr", "walk"), [(0.07, False), ([3e-2, 1e-3, 2e-3], True)])
def test_without_a_walk_and_of_rates_that_are_given_nothing_else_is_tried(lr, walk):
    found = tuned(each, valley, {"one": {"lr": lr}}, seeds=(0,), walk=walk)["one"]
    rates = lr if isinstance(lr, list) else [lr]
    assert found["lr"] == rates[0] and [lr for lr, _ in found["tried"]] == sorted(rates)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_none_and_never_best(loss):
    def broken(lr, seed):
        return {"validation": loss if lr > 5e-3 else 3 + lr}

    found = tuned(each, broken, {"one": {"lr": [1e-3, 1e-2]}}, seeds=(0,))["one"]
    assert found["lr"] == 1e-3
    assert found["tried"] == found["by_seed"]["0"] == [[1e-3, 3.001], [1e-2, None]]


def test_where_every_rate_fails_the_search_ends_and_says_why():
    tried = []

    def listening(function, trials):
        tried.extend(trials)
        return each(function, trials)

    with pytest.raises(RuntimeError, match="one at any learning rate: the loss is nan"):
        tuned(listening, valley, {"one": {"lr": 1e-2, "fails_above": 0}}, seeds=(0,))
    assert len(tried) == 8  # two decades and a half below the one where it began: there are runs that need them
    found = tuned(each, valley, {"one": {"lr": 1e-2, "fails_above": 5e-5, "best": 1e-5}}, seeds=(0,))
    assert found["one"]["lr"] == 1e-5
    with pytest.raises(RuntimeError, match=r"one at its best learning rate 0\.01: the loss is nan"):
        tuned(each, valley, {"one": {"lr": 1e-2, "fails_above": 0}}, seeds=(0,), walk=False)


def test_the_best_rate_has_the_lowest_loss():
    assert best_rate({1: 3.0, 2: 1.0, 3: 2.0}) == 2
    assert best_rate({2: 1.0, 1: 1.0, 3: math.nan, 4: None, 5: -math.inf}) == 1
    assert best_rate({1: None}) is None and best_rate({}) is None


@pytest.mark.parametrize(
    ("tried", "rate"),
    [
        ({1e-3: 3.0, 2e-3: 2.0}, 4e-3),
        ({1e-3: 2.0, 2e-3: 3.0}, 5e-4),
        ({1e-3: 2.0, 2e-3: None}, 5e-4),
        ({1e-4: 3.0, 1e-2: 2.0}, 0.05),  # never farther than a factor of five
        ({1e-4: 2.0, 1e-2: 3.0}, 2e-5),
        ({1e-3: 3.0, 4e-3: 4.0, 5e-3: 2.0}, 6.25e-3),  # the neighbour's distance, not the whole ladder's
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 3.0}, None),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: None}, None),
        ({1e-3: 3.0}, None),
        ({1e-3: None, 2e-3: None}, None),
    ],
)
def test_the_next_rate_lies_beyond_a_best_one_at_an_edge(tried, rate):
    assert next_rate(tried, farthest=5) == (None if rate is None else pytest.approx(rate, rel=1e-2))


def test_the_first_step_that_reaches_a_loss():
    curve = [(0, 4.0), (10, 3.0), (20, 1.0), (30, 2.0)]
    assert [first_step(curve, loss) for loss in (5, 4, 3.5, 3, 2, 1)] == [0, 0, 5, 10, 15, 20]
    assert [first_step(curve, loss, between=False) for loss in (5, 4, 3.5, 3, 2, 1)] == [0, 0, 10, 10, 20, 20]
    with pytest.raises(ValueError, match=r"0\.900 is not reached: the lowest is 1\.000"):
        first_step(curve, 0.9)


def test_the_vertex_lies_between_the_rates():
    tried = [[lr, valley(lr, 0, best=2e-3)["validation"]] for lr in (1e-4, 1e-3, 1e-2)]
    assert vertex(tried) == pytest.approx(2e-3)
    assert vertex([[1e-3, 1.0], [1e-2, 2.0]]) == 1e-3  # a best at the edge
    assert vertex([[1e-3, None], [1e-2, 1.0], [1e-1, 2.0]]) == 1e-2
    assert vertex([[1e-3, 1.0], [1e-2, 1.0], [1e-1, 1.0]]) == 1e-3

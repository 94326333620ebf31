"""An update cut to a rank: with all of its directions it is whole, and the first are worth more than any others."""

import numpy as np
import pytest

from minilora.experiments import cut
from minilora.experiments.cut import cut_update
from minilora.experiments.tiny import tiny_base
from minilora.lora.adapters import base_state
from minilora.nn.module import sha256_of

FEW = {"steps": 2, "batch_size": 1, "data": "support", "held_out": 2}


def test_all_directions_leave_all_of_the_gain_and_the_base_is_as_it_was():
    model, _ = tiny_base()
    before = sha256_of(base_state(model))
    found = cut_update(lr=1e-3, seed=0, ranks=[4, 128], **FEW)
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

    monkeypatch.setattr(cut, "fit", fit)
    found = cut_update(lr=1e-3, seed=0, ranks=[1, 2, 3], **FEW)
    assert found["variance"] == pytest.approx({"1": 4 / 6, "2": 5 / 6, "3": 1}, abs=1e-4)
    assert found["left"]["3"] == pytest.approx(1, abs=1e-3) and found["loss"][0] != found["loss"][1]
    again = cut_update(lr=1e-3, seed=0, ranks=[3, 1], **FEW)  # each from the base, whatever came before it
    assert again["left"]["1"] == pytest.approx(found["left"]["1"])
    matrices = [p for _, p in tiny_base()[0].named_parameters() if p.ndim == 2]
    monkeypatch.setattr(cut, "mean_loss", lambda *given: -float(sum(np.trace(p.data) for p in matrices)))
    monkeypatch.setattr(cut, "singular_values", lambda noise: np.ones(min(noise.shape)))
    half = cut_update(lr=1e-3, seed=0, ranks=[64], at_random=True, **FEW)
    assert 0.3 < half["left"]["64"] < 0.8  # half of the directions, or all of a smaller matrix
    sizes = [min(p.shape) for p in matrices]
    assert half["chance"]["64"] == pytest.approx(np.mean([min(64 / size, 1) for size in sizes])) and len(set(sizes)) > 1

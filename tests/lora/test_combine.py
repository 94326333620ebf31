"""Combining adapters: `cat` is the sum, `svd` the best of its rank, `linear` what its docstring says and no more."""

import numpy as np
import pytest

import minilora as ml
from minilora.lora.adapters import lora_modules

IDS = np.array([[1, 2, 3, 4, 5, 6]])


@pytest.fixture
def two(tiny_model):
    for seed, (name, r) in enumerate([("legal", 2), ("support", 3)]):
        config = ml.LoraConfig(r=r, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        ml.add_adapter(tiny_model, config, name, seed=seed)
    return tiny_model


def logits(model, which):
    ml.set_adapter(model, which)
    return model(IDS).data


def test_cat_is_the_weighted_sum_and_ranks_add_up(two):
    made = ml.combine_adapters(two, ["legal", "support"], [0.7, -0.3], "cat", name="both")
    assert set(made.ranks.values()) == {5}
    assert made.error < 1e-6
    expected = logits(two, {"legal": 0.7, "support": -0.3})
    np.testing.assert_allclose(logits(two, "both"), expected, atol=1e-5)


def test_svd_is_the_best_approximation_of_its_rank(two):
    made = ml.combine_adapters(two, ["legal", "support"], [0.7, 0.3], "svd", name="small", rank=2)
    for path, module in lora_modules(two).items():
        exact = module.adapters["legal"].delta() * 0.7 + module.adapters["support"].delta() * 0.3
        tail = np.linalg.svd(exact.astype(np.float64))[1]
        best = np.sqrt((tail[2:] ** 2).sum() / (tail**2).sum())
        assert made.errors[path] == pytest.approx(best, rel=1e-4)
        assert made.ranks[path] == 2


def test_svd_at_full_rank_is_exact(two):
    made = ml.combine_adapters(two, ["legal", "support"], [1.0, 1.0], "svd", name="whole", rank=5)
    assert made.error < 1e-5


def test_linear_has_the_cross_terms_that_its_docstring_names(tiny_model):
    for seed, name in enumerate(["a", "b"]):
        config = ml.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
        ml.add_adapter(tiny_model, config, name, seed=seed)
    made = ml.combine_adapters(tiny_model, ["a", "b"], [0.5, 2.0], "linear", name="lin")
    for path, module in lora_modules(tiny_model).items():
        a, b = module.adapters["a"], module.adapters["b"]
        cross = b.lora_B.data @ a.lora_A.data + a.lora_B.data @ b.lora_A.data
        exact = a.delta() * 0.5 + b.delta() * 2.0
        np.testing.assert_allclose(module.adapters["lin"].delta(), exact + a.scale * cross, rtol=1e-4, atol=1e-6)
        assert made.errors[path] > 0.1


def test_a_combination_is_saved_and_loaded_like_any_adapter(two, tmp_path):
    ml.combine_adapters(two, ["legal", "support"], [0.7, 0.3], "cat", name="both")
    expected = logits(two, "both")
    ml.save_adapter(two, tmp_path, "both")
    ml.load_adapter(two, tmp_path, "again")
    np.testing.assert_array_equal(logits(two, "again"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["legal", "nobody"], [1, 1], "cat"), "nobody"),
        ((["legal"], [1, 1], "cat"), "one weight for each name"),
        ((["legal", "support"], [1, 1], "ties"), "method must be one of"),
        ((["legal", "support"], [1, 1], "linear"), "one rank"),
        ((["legal", "support"], [1, -1], "linear"), "positive"),
        ((["legal", "support"], [1, 1], "cat", "legal"), "already"),
    ],
)
def test_misuse_is_one_clear_error_and_changes_nothing(two, arguments, message):
    before = list(two.adapters)
    with pytest.raises(ValueError, match=message):
        ml.combine_adapters(two, *arguments)
    assert list(two.adapters) == before

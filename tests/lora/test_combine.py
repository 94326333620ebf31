"""Combining adapters: `cat` is the sum, `svd` the best approximation of its rank, `linear` has cross terms."""

import numpy as np
import pytest
from smallmodels import IDS, Net, chosen

import minilora as ml
from minilora.lora.adapters import adapter_weights, base_state, lora_modules
from minilora.nn.llama import Llama


@pytest.fixture
def two(tiny_model):
    for seed, (name, r) in enumerate([("legal", 2), ("support", 3)]):
        config = ml.LoraConfig(r=r, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        ml.add_adapter(tiny_model, config, name, seed=seed)
    return tiny_model


def test_svd_is_the_best_approximation_of_its_rank_and_exact_from_the_full_rank_on(two):
    # the largest rank of both if none is given
    for rank, kept in ((1, 1), (2, 2), (None, 3), (5, 5), (9, 5)):
        made = ml.combine_adapters(two, ["legal", "support"], [0.7, 0.3], "svd", name="small", rank=rank)
        assert set(made.ranks.values()) == {kept}
        for path, module in lora_modules(two).items():
            exact = module.adapters["legal"].delta() * 0.7 + module.adapters["support"].delta() * 0.3
            s = np.linalg.svd(exact.astype(np.float64))[1]
            best = np.sqrt((s[kept:] ** 2).sum() / (s**2).sum())
            assert made.errors[path] == pytest.approx(best, rel=1e-4, abs=1e-5)
            assert np.linalg.norm(module.adapters["small"].delta() - exact) <= (best + 1e-5) * np.linalg.norm(exact)
        assert made.error == max(made.errors.values()) and f"exact sum {made.error:.2g}>" in repr(made)
        assert f"rank {kept} in 4 modules" in repr(made)
        ml.remove_adapter(two, "small")


def test_linear_has_the_cross_terms_that_its_docstring_names(tiny_model):
    for seed, name in enumerate(["a", "b"]):
        config = ml.LoraConfig(r=2, lora_alpha=4 + 6 * seed, target_modules=["q_proj"], init_lora_weights=False)
        ml.add_adapter(tiny_model, config, name, seed=seed)
    made = ml.combine_adapters(tiny_model, ["a", "b"], [0.5, 2.0], "linear", name="lin")
    for path, module in lora_modules(tiny_model).items():
        a, b = module.adapters["a"], module.adapters["b"]
        cross = b.lora_B.data @ a.lora_A.data + a.lora_B.data @ b.lora_A.data
        exact = a.delta() * 0.5 + b.delta() * 2.0
        np.testing.assert_allclose(
            module.adapters["lin"].delta(), exact + (a.scale * b.scale) ** 0.5 * cross, rtol=1e-4, atol=1e-6
        )
        assert made.errors[path] > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["legal", "nobody"], [1, 1], "cat"), "nobody"),
        ((["legal"], [1, 1], "cat"), "one weight for each name"),
        ((["legal", "support"], [1, 1], "ties"), "method must be one of"),
        ((["legal", "support"], [1, 1], "linear"), "equal rank"),
        ((["legal", "support"], [1, 0], "linear"), "positive"),
        ((["legal", "support"], [1, float("nan")], "cat"), "finite"),
        ((["legal", "support"], [1, float("inf")], "linear"), "finite"),
        (([], [], "cat"), "one weight for each name"),
        ((["legal", "support"], [1, 1], "cat", "legal"), "already"),
        ((["legal", "support"], [1, 1], "cat", "new", 4), "rank is for method"),
        ((["legal", "support"], [1, 1], "linear", "new", 2), "rank is for method"),
        ((["legal", "support"], [1, 1], "svd", "new", 0), "at least 1"),
        ((["legal", "support"], [1, 1], "svd", "new", 1.5), "whole number of at least 1, got rank=1.5"),
        ((["legal", "support"], [1, 1], "svd", "new", "2"), "whole number of at least 1, got rank='2'"),
        ((["legal", "support"], [1, "1"], "cat"), r"finite numbers, got \[1, '1'\]"),
        ((["legal", "support"], [1, None], "linear"), r"finite numbers, got \[1, None\]"),
        ((["legal"], 1.0, "cat"), "expected a list of weights, got 1.0 alone"),
        ((["legal"], "1", "cat"), "expected a list of weights, got '1' alone"),
        (("legal", [1], "cat"), "expected a list of names, got 'legal' alone"),
        ((None, [1], "cat"), "expected a list of names, got None alone"),
    ],
)
def test_misuse_is_one_clear_error_and_changes_nothing(two, arguments, message):
    before = list(two.adapters)
    with pytest.raises(TypeError if message.startswith("expected a list") else ValueError, match=message):
        ml.combine_adapters(two, *arguments)
    assert list(two.adapters) == before


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_weights_of_numpy_give_the_bits_that_pythons_give(tiny_model, method):
    for name in ("a", "b"):
        ml.add_adapter(tiny_model, ml.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False), name, seed=ord(name))
    for name, weights in (("python", [0.3, 0.7]), ("numpy", np.array([0.3, 0.7]))):
        ml.combine_adapters(tiny_model, ["a", "b"], weights, method, name)
    made = [ml.adapter_state(tiny_model, name) for name in ("python", "numpy")]
    assert ml.sha256_of(made[0]) == ml.sha256_of(made[1])  # which counts the dtypes


KINDS = {
    "rsLoRA": {"use_rslora": True},
    "ranks and alphas by pattern": {"rank_pattern": {"q_proj": 1, "down_proj": 4}, "alpha_pattern": {"q_proj": 3}},
    "a selection": {"target_modules": "all-linear", "exclude_modules": ["up_proj"], "layers_to_transform": 1},
    "a pattern": {"target_modules": r".*\.(q|v)_proj"},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize(("method", "first"), [("cat", True), ("svd", False)])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_a_combination_of_any_kinds_is_the_sum_and_comes_back_from_its_file(
    tiny_model, tiny_config, rng, settings, method, first, tmp_path
):
    settings = {"r": 2, "lora_alpha": 5, "init_lora_weights": False} | settings
    ml.add_adapter(tiny_model, ml.LoraConfig(**settings), "kind", seed=1)
    plain = ml.LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ml.add_adapter(tiny_model, plain, "plain", seed=2)
    tiny_model.eval()
    names, weights = ["kind", "plain"][:: 1 if first else -1], [0.75, -0.5][:: 1 if first else -1]
    expected = chosen(tiny_model, dict(zip(names, weights, strict=True)))
    made = ml.combine_adapters(tiny_model, names, weights, method, "both", rank=7 if method == "svd" else None)
    assert made.error < 1e-5
    combined = chosen(tiny_model, "both")
    np.testing.assert_allclose(combined, expected, atol=1e-5)
    for path, weights_of in adapter_weights(tiny_model, "both").items():
        assert weights_of.scale == tiny_model.adapters["both"].config.scale_of(path) == 1
        assert weights_of.dropout is None
    assert ml.audit(tiny_model, "both")
    other = Llama(tiny_config)
    other.load_state_dict(base_state(tiny_model))
    ml.load_adapter(other, ml.save_adapter(tiny_model, tmp_path, "both"), "there")
    assert np.array_equal(chosen(other, "there"), combined)
    other.train()
    with_graph = other(IDS).data  # no dropout has come with it
    assert np.array_equal(with_graph, combined)


def test_ranks_that_add_up_to_more_than_a_matrix_can_have_are_kept_to_that_and_exact(tiny_model, tmp_path):
    for seed, name in enumerate(["a", "b"]):
        config = ml.LoraConfig(r=12, lora_alpha=12, target_modules=["k_proj", "q_proj"], init_lora_weights=False)
        ml.add_adapter(tiny_model, config, name, seed=seed)  # k is 16 x 32, q 32 x 32
    expected = chosen(tiny_model, {"a": 1.0, "b": 1.0})
    made = ml.combine_adapters(tiny_model, ["a", "b"], [1, 1], "cat", name="both")
    assert sorted(set(made.ranks.values())) == [16, 24] and made.error < 1e-5
    np.testing.assert_allclose(chosen(tiny_model, "both"), expected, atol=1e-4)
    ml.load_adapter(tiny_model, ml.save_adapter(tiny_model, tmp_path, "both"), "there")
    assert np.array_equal(chosen(tiny_model, "there"), chosen(tiny_model, "both"))


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_other_than_plain_adapters_are_refused_by_name(tiny_config, rng, variant):
    model = Net(tiny_config, rng)
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]), "plain")
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], **variant), "other")
    for names in (["plain", "other"], ["other", "plain"]):
        with pytest.raises(ValueError, match="adapter 'other' has DoRA or PiSSA, and only plain LoRAs"):
            ml.combine_adapters(model, names, [1, 1])
    assert list(model.adapters) == ["plain", "other"]


def test_linear_of_adapters_on_different_modules_is_refused(two):
    config = ml.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    ml.add_adapter(two, config, "less")
    with pytest.raises(ValueError, match=r"equal rank on model.layers.0.mlp.down_proj"):
        ml.combine_adapters(two, ["legal", "less"], [1, 1], "linear")


def test_updates_that_cancel_have_no_error(two):
    made = ml.combine_adapters(two, ["legal", "legal"], [1.0, -1.0], "cat", name="none")
    assert made.error == 0 and set(made.ranks.values()) == {4}

"""The life of an adapter: disabled, merged, mixed in a batch, removed; and the audit that holds it to its promises."""

import numpy as np
import pytest

import minilora as ml
from minilora.lora.adapters import base_state, lora_modules
from minilora.nn.layers import Linear
from minilora.nn.module import sha256_of

IDS = np.array([[1, 2, 3, 4], [9, 8, 7, 6], [5, 5, 6, 1]])


@pytest.fixture
def model(tiny_model):
    for seed, name in enumerate(["legal", "support"]):
        ml.add_adapter(tiny_model, ml.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False), name, seed=seed)
    return tiny_model


def logits(model, which, ids=IDS):
    ml.set_adapter(model, which)
    return model(ids).data


def test_merged_is_unmerged_and_the_base_comes_back_bit_for_bit(model):
    before = sha256_of(base_state(model))
    beside = logits(model, "legal")
    ml.merge_adapter(model)
    inside = model(IDS).data
    ml.merge_adapter(model)
    assert np.array_equal(model(IDS).data, inside)
    assert not np.array_equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"],
                              base_state(model)["model.layers.0.mlp.up_proj.weight"])  # fmt: skip
    np.testing.assert_allclose(inside, beside, atol=1e-5)
    ml.unmerge_adapter(model)
    ml.unmerge_adapter(model)
    assert sha256_of(base_state(model)) == before
    assert np.array_equal(model(IDS).data, beside)


def test_a_merged_mix_is_the_weighted_sum(model):
    mix = logits(model, {"legal": 0.7, "support": 0.3})
    ml.merge_adapter(model)
    np.testing.assert_allclose(model(IDS).data, mix, atol=1e-5)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda m: ml.set_adapter(m, "support"),
        lambda m: ml.remove_adapter(m, "legal"),
        lambda m: ml.add_adapter(m, ml.LoraConfig(r=1, lora_alpha=1), "third"),
        lambda m: ml.mixed_batch(m, ["legal"]).__enter__(),
    ],
)
def test_while_merged_everything_else_is_refused(model, misuse):
    ml.set_adapter(model, "legal")
    ml.merge_adapter(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        misuse(model)


def test_merging_nothing_is_an_error(model):
    ml.set_adapter(model, None)
    with pytest.raises(ValueError, match="nothing to merge"):
        ml.merge_adapter(model)


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_and_afterwards_all_is_as_before(model, merged):
    base = logits(model, None)
    expected = logits(model, "legal")
    if merged:
        ml.merge_adapter(model)
        expected = model(IDS).data
    with ml.disable_adapter(model):
        assert np.array_equal(model(IDS).data, base)
    assert np.array_equal(model(IDS).data, expected)


def test_each_row_of_a_mixed_batch_is_what_it_is_alone(model):
    names = ["support", None, "legal"]
    alone = [logits(model, name, IDS[i : i + 1])[0] for i, name in enumerate(names)]
    ml.set_adapter(model, "legal")
    with ml.mixed_batch(model, names):
        together = model(IDS).data
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    np.testing.assert_array_equal(model(IDS).data, logits(model, "legal"))


def test_a_mixed_batch_of_an_unknown_adapter_is_refused(model):
    with pytest.raises(ValueError, match="nobody"), ml.mixed_batch(model, ["nobody"]):
        pass


def test_removed_adapters_leave_the_plain_layers(model, rng):
    base = logits(model, None)
    ml.remove_adapter(model, "legal")
    assert list(model.adapters) == ["support"]
    ml.remove_adapter(model, "support")
    assert lora_modules(model) == {}
    assert type(model.model.layers[0].mlp.up_proj) is Linear
    assert np.array_equal(model(IDS).data, base)
    with pytest.raises(ValueError, match="no adapter called 'legal'"):
        ml.remove_adapter(model, "legal")


def test_the_audit_passes_and_leaves_the_model_as_it_was(model):
    ml.set_adapter(model, {"legal": 0.5})
    before, trained = model(IDS).data, set(model.trainable_parameters())
    report = ml.audit(model, "legal")
    names = [name for name, _ in report.checks]
    assert names == ["trainable", "scale", "count", "off", "start", "gradient", "merge", "file", "base"]
    assert "scale=2 " in str(report)
    assert np.array_equal(model(IDS).data, before)
    assert set(model.trainable_parameters()) == trained


def test_every_b_moves_in_the_first_step(tiny_model):
    from minilora.lora.adapters import adapter_state

    ml.add_adapter(tiny_model, ml.LoraConfig(r=2, lora_alpha=4), "legal")
    before = {key: array.copy() for key, array in adapter_state(tiny_model, "legal").items()}
    optimizer = ml.AdamW(tiny_model.trainable_parameters(), lr=1e-3, weight_decay=0.0)
    tiny_model.loss(IDS, IDS).backward()
    optimizer.step()
    after = adapter_state(tiny_model, "legal")
    changed = {key for key in after if not np.array_equal(after[key], before[key])}
    assert changed == {key for key in after if key.endswith("lora_B")} and len(changed) == 14


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 7}},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ],
    ids=str,
)
def test_the_audit_passes_for_every_variant_before_and_after_a_step(tiny_model, settings):
    ml.add_adapter(tiny_model, ml.LoraConfig(**({"r": 2, "lora_alpha": 4} | settings)), "legal")
    ml.audit(tiny_model, "legal")
    optimizer = ml.AdamW(tiny_model.trainable_parameters(), lr=1e-2)
    tiny_model.loss(IDS, IDS).backward()
    optimizer.step()
    ml.audit(tiny_model, "legal")


@pytest.mark.parametrize("change", [0.0, 0.5])
def test_the_table_peft_saves_beside_an_adapted_embedding_must_be_the_bases(tiny_model, tmp_path, change):
    from minilora.files.disk import ModelFileError
    from minilora.files.tensors import read_tensors, write_tensors

    ml.add_adapter(tiny_model, ml.LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens"]), "words")
    ml.save_adapter(tiny_model, tmp_path, "words")
    file = tmp_path / "adapter_model.safetensors"
    copy = base_state(tiny_model)["model.embed_tokens.weight"] + np.float32(change)
    write_tensors(file, read_tensors(file) | {"base_model.model.model.embed_tokens.base_layer.weight": copy})
    if change:
        with pytest.raises(ModelFileError, match="another base"):
            ml.load_adapter(tiny_model, tmp_path, "again")
        assert list(tiny_model.adapters) == ["words"]
    else:
        ml.load_adapter(tiny_model, tmp_path, "again")
        assert np.array_equal(logits(tiny_model, "again"), logits(tiny_model, "words"))

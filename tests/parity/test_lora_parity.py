"""Parity with PEFT: adapters cross over in both directions, and training takes the same steps."""

import numpy as np
import pytest
from otherside import distance, logits_of, loss_of, parity, peft, torch, transformers

from minilora.files.disk import ModelFileError
from minilora.lora.adapters import (
    adapter_state,
    add_adapter,
    lora_modules,
    merge_adapter,
    set_adapter,
    unmerge_adapter,
)
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.models.folder import load_folder
from minilora.nn.optim import AdamW, clip_grad_norm

pytestmark = parity

VOCAB = 96
SETTINGS = {
    "q and v": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "every linear layer": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "rank one": {"r": 1, "lora_alpha": 0.5, "target_modules": ["down_proj"]},
    "rsLoRA": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "o_proj"], "use_rslora": True},
    "a regular expression": {"r": 4, "lora_alpha": 8, "target_modules": r".*\.mlp\.(up|gate)_proj"},
    "one block only": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
    "exclusions by name": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "exclusions by pattern": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"],
                              "exclude_modules": r".*layers\.0\..*q_proj"},
    "ranks and alphas by pattern": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"],
                                    "rank_pattern": {"up_proj": 2, r"layers\.0\.self_attn\.q_proj": 6},
                                    "alpha_pattern": {"v_proj": 32, "up_proj": 3}},
    "patterns with rsLoRA": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
                             "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 2}},
}  # fmt: skip
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


@pytest.fixture
def pair(request, tmp_path):
    """The same random model twice: transformers' and minilora's. Its head is untied unless a test asks for both."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=getattr(request, "param", None) == "tied head",
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "base")
    return theirs, load_folder(tmp_path / "base")


both_heads = pytest.mark.parametrize("pair", ["tied head", "untied head"], indirect=True)


def text(rng, batch=2, length=15):
    return rng.integers(0, VOCAB, (batch, length))


def labelled(rng):
    ids = text(rng)
    labels = ids.copy()
    labels[0, :8] = labels[1, :3] = -100
    return ids, labels


def tensors_of(theirs, name="default"):
    """A PEFT model's adapter under minilora's names: `<module>.lora_A`, `<module>.lora_B`."""
    state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
    return {key.removeprefix("base_model.model.").removesuffix(".weight"): value for key, value in state.items()}


# -- adapters cross over -----------------------------------------------------------------------------------------------


@every_setting
def test_an_adapter_made_here_means_the_same_in_peft(settings, pair, tmp_path, rng):
    theirs, ours = pair
    ids = text(rng)
    base = logits_of(theirs, ids)
    add_adapter(ours, LoraConfig(**settings, init_lora_weights=False), seed=1)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    got, expected = adapter_state(ours, "default"), tensors_of(theirs)
    assert got.keys() == expected.keys()
    for key, array in got.items():
        np.testing.assert_array_equal(array, expected[key].numpy(), err_msg=key)
    assert distance(logits_of(theirs, ids), base) > 1e-2
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4


@every_setting
def test_an_adapter_made_in_peft_means_the_same_here(settings, pair, tmp_path, rng):
    theirs, ours = pair
    ids = text(rng)
    base = logits_of(theirs, ids)
    config = peft.LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    assert adapter_state(ours, "default").keys() == tensors_of(theirs).keys()
    assert distance(logits_of(theirs, ids), base) > 1e-2
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4


@every_setting
def test_both_choose_the_same_modules_ranks_and_scales(settings, pair):
    theirs, ours = pair
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    add_adapter(ours, LoraConfig(**settings))
    expected = {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    got = {path: module.adapters["default"] for path, module in lora_modules(ours).items()}
    assert {path: (weights.rank, weights.scale) for path, weights in got.items()} == expected
    trainable, _ = theirs.get_nb_trainable_parameters()
    assert sum(p.size for p in ours.trainable_parameters().values()) == trainable


def test_a_regular_expression_limited_to_one_block_is_written_so_that_peft_accepts_it(pair, tmp_path, rng):
    """PEFT refuses `layers_to_transform` beside a regular expression, minilora computes it."""
    theirs, ours = pair
    settings = {"target_modules": r".*\.(q|up)_proj", "layers_to_transform": [1], "init_lora_weights": False}
    names = add_adapter(ours, LoraConfig(r=4, lora_alpha=8, **settings))
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    save_adapter(ours, tmp_path / "adapter")
    ids = text(rng)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4


@pytest.mark.parametrize("start", ["orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_crosses_over(start, pair, tmp_path, rng):
    theirs, ours = pair
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": start}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p += 0.1
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    ids = text(rng)
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4


@pytest.mark.parametrize("start", ["pissa_niter_2", "olora"])
def test_an_adapter_whose_start_changed_the_base_weights_is_refused(start, pair, tmp_path):
    """PiSSA and OLoRA take part of the base away. On the plain base their A and B would mean something else."""
    theirs, ours = pair
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": start}
    before = next(iter(theirs.model.layers)).self_attn.q_proj.weight.detach().clone()
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    after = theirs.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(before, after)
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelFileError, match="init_lora_weights"):
        load_adapter(ours, tmp_path / "adapter")


def test_a_scale_of_alpha_instead_of_alpha_over_r_would_be_noticed(pair, tmp_path, rng):
    theirs, ours = pair
    add_adapter(ours, LoraConfig(**SETTINGS["q and v"], init_lora_weights=False))
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    for module in lora_modules(ours).values():
        module.adapters["default"].scale = 8.0
    ids = text(rng)
    assert distance(ours(ids).data, logits_of(theirs, ids)) > 1e-2


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_fresh_adapter_is_drawn_from_peft_s_distribution(init, pair):
    """The spread of A agrees, and its largest element, which tells uniform from normal; B is zero in both."""
    theirs, ours = pair
    settings = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": init}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    add_adapter(ours, LoraConfig(**settings))
    expected = {key: value.numpy() for key, value in tensors_of(theirs).items()}
    for width in (32, 48):
        a, b = (
            np.concatenate([v.ravel() for k, v in state.items() if k.endswith("lora_A") and v.shape[1] == width])
            for state in (adapter_state(ours, "default"), expected)
        )
        assert a.std() == pytest.approx(b.std(), rel=0.1)
        assert np.abs(a).max() == pytest.approx(np.abs(b).max(), rel=0.02 if init is True else 0.35)
    assert not any(v.any() for s in (adapter_state(ours, "default"), expected) for k, v in s.items() if "lora_B" in k)


def test_a_mix_of_two_adapters_is_peft_s_concatenation_of_them(pair, tmp_path, rng):
    theirs, ours = pair
    for seed, (name, settings) in enumerate([("legal", SETTINGS["q and v"]), ("support", SETTINGS["rsLoRA"])]):
        add_adapter(ours, LoraConfig(**settings, init_lora_weights=False), name=name, seed=seed)
        save_adapter(ours, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "legal", adapter_name="legal")
    theirs.load_adapter(tmp_path / "support", adapter_name="support")
    ids = text(rng)
    for name in ("legal", "support"):
        theirs.set_adapter(name)
        set_adapter(ours, name)
        assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4
    theirs.add_weighted_adapter(["legal", "support"], [0.7, 0.3], adapter_name="mix", combination_type="cat")
    theirs.set_adapter("mix")
    set_adapter(ours, {"legal": 0.7, "support": 0.3})
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4
    set_adapter(ours, None)
    with theirs.disable_adapter():
        assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4


@pytest.mark.parametrize("which", ["every linear layer", "patterns with rsLoRA"])
def test_merged_weights_equal_peft_s_and_unmerging_gives_the_adapter_back(which, pair, tmp_path, rng):
    theirs, ours = pair
    add_adapter(ours, LoraConfig(**SETTINGS[which], init_lora_weights=False))
    theirs = peft.PeftModel.from_pretrained(theirs, save_adapter(ours, tmp_path / "adapter"))
    ids = text(rng)
    adapted = logits_of(theirs, ids)
    merge_adapter(ours)
    expected = theirs.merge_and_unload().state_dict()
    merged = {name: array for name, array in ours.state_dict().items() if ".adapters." not in name}
    assert merged.keys() == expected.keys()
    for name, array in merged.items():
        np.testing.assert_allclose(array, expected[name].numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
    assert distance(ours(ids).data, adapted) < 1e-4
    unmerge_adapter(ours)
    assert distance(ours(ids).data, adapted) < 1e-4


# -- training takes the same steps -------------------------------------------------------------------------------------


def same_adapter(pair, tmp_path, settings):
    """Both models with one and the same trainable adapter, made here and read by PEFT."""
    theirs, ours = pair
    add_adapter(ours, LoraConfig(**settings), seed=3)
    save_adapter(ours, tmp_path / "adapter")
    return peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True), ours


def gradients(ours):
    return {name.replace(".adapters.default.", "."): p.grad for name, p in ours.trainable_parameters().items()}


def reference_gradients(theirs):
    named = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.requires_grad}
    return {name.removeprefix("base_model.model.").removesuffix(".default.weight"): g for name, g in named.items()}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        np.testing.assert_allclose(got[name], grad, rtol=1e-3, atol=2e-5 * np.abs(grad).max(), err_msg=name)


@both_heads
@pytest.mark.parametrize("random_b", [False, True], ids=["B zero, as at the start", "B random, as in mid-training"])
@pytest.mark.parametrize("which", ["q and v", "every linear layer", "patterns with rsLoRA"])
def test_one_training_step_equals_peft_and_torch(which, random_b, pair, tmp_path, rng):
    theirs, ours = same_adapter(pair, tmp_path, {**SETTINGS[which], "init_lora_weights": not random_b})
    ids, labels = labelled(rng)
    before = {name: array.copy() for name, array in adapter_state(ours, "default").items()}

    expected, loss = loss_of(theirs, ids, labels), ours.loss(ids, labels)
    expected.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    got, wanted = gradients(ours), reference_gradients(theirs)
    assert_same_gradients(got, wanted)
    for name, grad in got.items():
        assert grad.any() == (random_b or name.endswith("lora_B")), name

    settings = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-5}  # smaller, g / (|g| + eps) blows up a tiny g's rounding
    AdamW(ours.trainable_parameters(), **settings).step()
    torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **settings).step()
    expected = tensors_of(theirs)
    for name, array in adapter_state(ours, "default").items():
        assert not np.array_equal(array, before[name])
        np.testing.assert_allclose(array, expected[name].numpy(), atol=2e-4, err_msg=name)  # a step is 1e-2 long


def curves(theirs, ours, rng, steps=20):
    """The losses of the same steps on both sides, gradients clipped, another batch each time out of three."""
    batches = [labelled(rng) for _ in range(3)]
    settings = {"lr": 5e-3, "weight_decay": 0.01}
    optimizer = AdamW(ours.trainable_parameters(), **settings)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(trained, **settings)
    got, wanted = [], []
    for step in range(steps):
        ids, labels = batches[step % len(batches)]
        loss, expected = ours.loss(ids, labels), loss_of(theirs, ids, labels)
        got.append(loss.item())
        wanted.append(expected.item())
        optimizer.zero_grad()
        reference.zero_grad()
        loss.backward()
        expected.backward()
        norm, reference_norm = clip_grad_norm(optimizer.parameters, 1.0), torch.nn.utils.clip_grad_norm_(trained, 1.0)
        assert norm == pytest.approx(reference_norm.item(), rel=1e-2)
        optimizer.step()
        reference.step()
    return np.array(got), np.array(wanted)


@both_heads
@pytest.mark.parametrize("which", ["q and v", "every linear layer", "rsLoRA"])
def test_lora_training_follows_peft_s_loss_curve(which, pair, tmp_path, rng):
    theirs, ours = same_adapter(pair, tmp_path, SETTINGS[which])
    got, expected = curves(theirs, ours, rng)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert expected[-3:].mean() < expected[:3].mean() - 0.05  # it did learn


@both_heads
def test_full_fine_tuning_follows_torch_s_loss_curve(pair, rng):
    theirs, ours = pair
    got, expected = curves(theirs, ours, rng)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert expected[-3:].mean() < expected[:3].mean() - 0.5


@both_heads
def test_an_adapter_trained_here_goes_on_in_peft_from_the_same_loss(pair, tmp_path, rng):
    theirs, ours = pair
    ids, labels = labelled(rng)
    add_adapter(ours, LoraConfig(**SETTINGS["every linear layer"]))
    optimizer = AdamW(ours.trainable_parameters(), lr=1e-2)
    start = ours.loss(ids, labels).item()
    for _ in range(5):
        optimizer.zero_grad()
        ours.loss(ids, labels).backward()
        optimizer.step()
    end = ours.loss(ids, labels).item()
    save_adapter(ours, tmp_path / "trained")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "trained")
    assert end < start - 0.1
    assert loss_of(theirs, ids, labels).item() == pytest.approx(end, rel=1e-5)
    assert loss_of(theirs.merge_and_unload(), ids, labels).item() == pytest.approx(end, rel=1e-4)

"""Parity with PEFT: adapters cross over in both directions, and training takes the same steps."""

import numpy as np
import pytest
from otherside import (
    assert_same_curves,
    assert_same_step,
    distance,
    labelled,
    logits_of,
    parity,
    peft,
    ranks_and_scales,
    small_pair,
    text,
    torch,
    with_peft,
)
from smallmodels import shaken

from minilora.files.disk import ModelFileError
from minilora.lora.adapters import (
    adapter_state,
    add_adapter,
    lora_modules,
    merge_adapter,
    merged_state,
    set_adapter,
    unmerge_adapter,
)
from minilora.lora.combine import combine_adapters
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.nn.optim import AdamW

pytestmark = [
    *parity,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),  # PEFT adds the base's table
]

SETTINGS = {
    "q and v": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "every linear layer": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "rank one": {"r": 1, "lora_alpha": 0.5, "target_modules": ["down_proj"]},
    "rsLoRA": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "o_proj"], "use_rslora": True},
    "a regular expression": {"r": 4, "lora_alpha": 8, "target_modules": r".*\.mlp\.(up|gate)_proj"},
    "one block only": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
    "one block, and a module named in full": {"r": 4, "lora_alpha": 8, "layers_to_transform": [1],
                                              "target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"]},
    "exclusions by name": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "exclusions by pattern": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"],
                              "exclude_modules": r".*layers\.0\..*q_proj"},
    "ranks and alphas by pattern": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"],
                                    "rank_pattern": {"up_proj": 2, r"layers\.0\.self_attn\.q_proj": 6},
                                    "alpha_pattern": {"v_proj": 32, "up_proj": 3}},
    "patterns with rsLoRA": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
                             "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 2}},
    "DoRA": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "DoRA, every linear layer, rsLoRA": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_dora": True,
                                         "use_rslora": True},
    "DoRA, ranks by pattern": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_dora": True,
                               "rank_pattern": {"v_proj": 2}},
}  # fmt: skip
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
TRAINED = ["q and v", "every linear layer", "patterns with rsLoRA"]  # and merged
TRAINED += [name for name in SETTINGS if "DoRA" in name]


@pytest.fixture
def pair(request, tmp_path):
    """The same random model twice. Its head is untied unless a test asks for both."""
    return small_pair(tmp_path, tied=getattr(request, "param", None) == "tied head")


both_heads = pytest.mark.parametrize("pair", ["tied head", "untied head"], indirect=True)


def tensors_of(theirs, name="default"):
    """A PEFT model's adapter under minilora's names: `<module>.lora_A`, `<module>.lora_B`."""
    state = peft.get_peft_model_state_dict(theirs, adapter_name=name, save_embedding_layers=False)
    return {key.removeprefix("base_model.model.").removesuffix(".weight"): value for key, value in state.items()}


def same_adapter(pair, tmp_path, settings, moved=False):
    """Both models with one and the same trainable adapter, made here and read by PEFT. moved: as by training."""
    theirs, ours = pair
    add_adapter(ours, LoraConfig(**settings), seed=3)
    if moved:
        shaken(ours)
    return peft.PeftModel.from_pretrained(theirs, save_adapter(ours, tmp_path / "a"), is_trainable=True).eval(), ours


# -- adapters cross over -----------------------------------------------------------------------------------------------


ONE_BLOCK = {"r": 4, "lora_alpha": 8, "target_modules": r".*\.(q|up)_proj", "layers_to_transform": [1]}


@both_heads
@pytest.mark.parametrize("settings", [*SETTINGS.values(), ONE_BLOCK], ids=[*SETTINGS, "a pattern that PEFT refuses"])
def test_an_adapter_made_here_means_the_same_in_peft(settings, pair, tmp_path, rng):
    ids = text(rng)
    base = logits_of(pair[0], ids)
    theirs, ours = same_adapter(pair, tmp_path, settings, moved=True)
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
    theirs = with_peft(theirs, **settings, init_lora_weights=False).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    assert adapter_state(ours, "default").keys() == tensors_of(theirs).keys()
    assert distance(logits_of(theirs, ids), base) > 1e-2
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4


@every_setting
def test_both_choose_the_same_ranks_scales_and_initial_magnitudes(settings, pair):
    theirs, ours = pair
    add_adapter(ours, LoraConfig(**settings))
    theirs = with_peft(theirs, **settings)
    got = {path: module.adapters["default"] for path, module in lora_modules(ours).items()}
    assert {path: (weights.rank, weights.scale) for path, weights in got.items()} == ranks_and_scales(theirs)
    state, expected = adapter_state(ours, "default"), tensors_of(theirs)
    assert {name: a.shape for name, a in state.items()} == {name: tuple(a.shape) for name, a in expected.items()}
    for name, array in state.items():
        if name.endswith(("lora_magnitude_vector", "lora_B")):  # what is not drawn at random
            np.testing.assert_allclose(array, expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("init", ["orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_crosses_over(init, pair, tmp_path, rng):
    theirs, ours = pair
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": init}
    theirs = with_peft(theirs, **settings).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p += 0.1
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    ids = text(rng)
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4


@pytest.mark.parametrize("init", ["pissa_niter_2", "olora"])
def test_an_adapter_whose_initialisation_changed_the_base_weights_is_refused(init, pair, tmp_path):
    """PiSSA and OLoRA take part of the base away. On the plain base their A and B would mean something else."""
    theirs, ours = pair
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": init}
    before = next(iter(theirs.model.layers)).self_attn.q_proj.weight.detach().clone()
    theirs = with_peft(theirs, **settings)
    after = theirs.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(before, after)
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelFileError, match="init_lora_weights"):
        load_adapter(ours, tmp_path / "adapter")


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_fresh_adapter_is_drawn_from_peft_s_distribution(init, pair):
    """A agrees in standard deviation and in its largest element, which tells uniform from normal; B is zero in both."""
    theirs, ours = pair
    settings = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": init}
    theirs = with_peft(theirs, **settings)
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


@pytest.mark.parametrize(
    ("method", "second"), [("cat", SETTINGS["rsLoRA"]), ("linear", SETTINGS["q and v"] | {"lora_alpha": 1})]
)
def test_a_combination_of_two_adapters_is_peft_s(method, second, pair, tmp_path, rng):
    theirs, ours = pair
    for seed, (name, settings) in enumerate([("legal", SETTINGS["q and v"]), ("support", second)]):
        add_adapter(ours, LoraConfig(**settings, init_lora_weights=False), name=name, seed=seed)
        save_adapter(ours, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "legal", adapter_name="legal")
    theirs.load_adapter(tmp_path / "support", adapter_name="support")
    ids = text(rng)
    for name in ("legal", "support"):
        theirs.set_adapter(name)
        set_adapter(ours, name)
        assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4
    theirs.add_weighted_adapter(["legal", "support"], [0.7, 0.3], adapter_name="mix", combination_type=method)
    theirs.set_adapter("mix")
    combine_adapters(ours, ["legal", "support"], [0.7, 0.3], method, name="mix")
    for choice in ["mix"] if method == "linear" else ["mix", {"legal": 0.7, "support": 0.3}]:
        set_adapter(ours, choice)
        assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4
    set_adapter(ours, None)
    with theirs.disable_adapter():
        assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4


@pytest.mark.parametrize("which", TRAINED)
def test_merged_weights_equal_peft_s_and_unmerging_gives_the_adapter_back(which, pair, tmp_path, rng):
    theirs, ours = same_adapter(pair, tmp_path, SETTINGS[which], moved=True)
    ids = text(rng)
    adapted = logits_of(theirs, ids)
    merge_adapter(ours)
    expected = theirs.merge_and_unload().state_dict()
    merged = merged_state(ours)
    assert merged.keys() == expected.keys()
    for name, array in merged.items():
        np.testing.assert_allclose(array, expected[name].numpy(), rtol=1e-5, atol=2e-6, err_msg=name)
    assert distance(ours(ids).data, adapted) < 1e-4
    unmerge_adapter(ours)
    assert distance(ours(ids).data, adapted) < 1e-4


# -- training takes the same steps -------------------------------------------------------------------------------------


@both_heads
@pytest.mark.parametrize("moved", [False, True], ids=["initially", "in mid-training"])
@pytest.mark.parametrize("which", TRAINED)
def test_one_training_step_equals_peft_and_torch(which, moved, pair, tmp_path, rng):
    theirs, ours = same_adapter(pair, tmp_path, SETTINGS[which], moved)
    before = {name: array.copy() for name, array in adapter_state(ours, "default").items()}
    for name, grad in assert_same_step(theirs, ours, rng).items():
        assert grad.any() == (moved or not name.endswith("lora_A")), name  # B starts at zero
    assert not any(np.array_equal(array, before[name]) for name, array in adapter_state(ours, "default").items())


@both_heads
@pytest.mark.parametrize("which", [None, "every linear layer"], ids=["full fine-tuning", "LoRA"])
def test_training_follows_torch_s_loss_curve(which, pair, tmp_path, rng):
    theirs, ours = same_adapter(pair, tmp_path, SETTINGS[which]) if which else pair
    settings = {"lr": 5e-3, "weight_decay": 0.01}
    optimizer = AdamW(ours.trainable_parameters(), **settings)
    reference = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **settings)
    losses = assert_same_curves(theirs, ours, optimizer, reference, [labelled(rng) for _ in range(3)], clip=1.0)
    assert losses[-3:].mean() < losses[:3].mean() - 0.05  # it did learn

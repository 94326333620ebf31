"""Parity with PEFT for the variants: logits, gradients, merged weights and whole training runs agree."""

import numpy as np
import pytest
from otherside import (
    VOCAB,
    assert_same_curves,
    assert_same_step,
    distance,
    labelled,
    logits_of,
    parity,
    random_llama,
    ranks_and_scales,
    small_pair,
    text,
    torch,
    trained_by,
    with_peft,
)
from smallmodels import shaken

from minilora.engine.tensor import Tensor
from minilora.lora.adapters import adapter_state, add_adapter, base_state, lora_modules, merge_adapter, merged_state
from minilora.lora.config import LoraConfig
from minilora.lora.variants import Dropout, config_with_initial, lora_plus
from minilora.nn.llama import Config, Llama
from minilora.nn.module import Parameter
from minilora.nn.optim import AdamW

pytestmark = parity

QV, EMBED = ["q_proj", "v_proj"], ["embed_tokens"]
SETTINGS = {
    "DoRA": {"use_dora": True, "target_modules": QV},
    "DoRA, every linear layer, rsLoRA": {"use_dora": True, "target_modules": "all-linear", "use_rslora": True},
    "DoRA, ranks by pattern": {"use_dora": True, "target_modules": QV, "rank_pattern": {"v_proj": 2}},
    "embedding": {"target_modules": EMBED},
    "embedding and matrices, rsLoRA": {"target_modules": [*EMBED, "q_proj", "up_proj"], "use_rslora": True},
    "DoRA, embedding and matrices": {"use_dora": True, "target_modules": [*EMBED, "q_proj"]},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


@pytest.fixture(params=["tied head", "untied head"])
def pair(request, tmp_path):
    """The same random model twice: transformers' and minilora's."""
    return small_pair(tmp_path, tied=request.param == "tied head")


@pytest.fixture
def untied(tmp_path):
    return small_pair(tmp_path, tied=False)


def both(pair, settings, seed=3, **theirs_only):
    """The adapter of these settings on both models, with the arrays that minilora drew."""
    theirs, ours = pair
    add_adapter(ours, LoraConfig(r=4, lora_alpha=8, **settings), seed=seed)
    theirs = with_peft(theirs, **{"r": 4, "lora_alpha": 8, **settings, **theirs_only})
    put(ours, theirs)
    return theirs, ours


def put(ours, theirs):
    """Copy the adapter's arrays from minilora to PEFT. Both must train the same ones."""
    state, parameters = adapter_state(ours, "default"), trained_by(theirs)
    assert state.keys() == parameters.keys()
    with torch.no_grad():
        for name, array in state.items():
            assert parameters[name].shape == array.shape, name
            parameters[name].copy_(torch.from_numpy(array))


def shake(ours, theirs, seed=9):
    """Move everything that is trained, on both sides alike, as training would."""
    put(shaken(ours, seed=seed), theirs)


# -- DoRA and the embedding --------------------------------------------------------------------------------------------


@every_setting
def test_a_variant_means_the_same_in_peft(settings, pair, rng):
    ids = text(rng)
    base = logits_of(pair[0], ids)
    theirs, ours = both(pair, settings)
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4
    assert distance(ours(ids).data, base) < 1e-4
    shake(ours, theirs)
    assert distance(logits_of(theirs, ids), base) > 1e-2
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4


@every_setting
def test_both_choose_the_same_ranks_scales_and_initial_magnitudes(settings, pair):
    theirs, ours = pair
    add_adapter(ours, LoraConfig(r=4, lora_alpha=8, **settings))
    theirs = with_peft(theirs, r=4, lora_alpha=8, **settings)
    shares = {path: module.adapters["default"] for path, module in lora_modules(ours).items()}
    assert {path: (share.rank, share.scale) for path, share in shares.items()} == ranks_and_scales(theirs)
    expected = {name: p.detach().numpy() for name, p in trained_by(theirs).items()}
    assert {name: a.shape for name, a in adapter_state(ours, "default").items()} == {
        name: a.shape for name, a in expected.items()
    }
    for name, array in adapter_state(ours, "default").items():
        if name.endswith(("lora_magnitude_vector", "lora_B", "lora_embedding_A")):  # what is not drawn at random
            np.testing.assert_allclose(array, expected[name], rtol=1e-5, err_msg=name)


@every_setting
@pytest.mark.parametrize("moved", [False, True], ids=["initially", "in mid-training"])
def test_one_training_step_of_a_variant_equals_peft_and_torch(settings, moved, pair, rng):
    theirs, ours = both(pair, settings)
    if moved:
        shake(ours, theirs)
    gradients = assert_same_step(theirs, ours, rng)
    still = {name for name, grad in gradients.items() if not grad.any()}
    zero_factor = ("lora_A", "lora_embedding_B")  # the partner of the factor that is initialised to zero
    assert still == (set() if moved else {name for name in gradients if name.endswith(zero_factor)})


@every_setting
def test_merged_weights_of_a_variant_equal_pefts(settings, untied, rng):
    theirs, ours = both(untied, settings)
    shake(ours, theirs)
    merge_adapter(ours)
    expected = theirs.merge_and_unload().state_dict()
    merged = merged_state(ours)
    assert merged.keys() == expected.keys()
    for name, array in merged.items():
        np.testing.assert_allclose(array, expected[name].numpy(), rtol=1e-5, atol=2e-6, err_msg=name)


# -- PiSSA -------------------------------------------------------------------------------------------------------------

PISSA = {
    "plain": {"target_modules": "all-linear"},
    "rsLoRA": {"target_modules": QV, "use_rslora": True},
    "patterns": {"target_modules": QV, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "DoRA": {"target_modules": QV, "use_dora": True},
}
every_pissa = pytest.mark.parametrize("settings", PISSA.values(), ids=PISSA.keys())


@every_pissa
def test_pissa_is_initialised_as_in_peft(settings, pair):
    """A and B agree up to the sign of each direction, so their product agrees, and so does what is left of the base."""
    theirs, ours = pair
    add_adapter(ours, LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", **settings))
    theirs = with_peft(theirs, r=4, lora_alpha=8, init_lora_weights="pissa", **settings)
    layers = {path.removeprefix("base_model.model."): module for path, module in theirs.named_modules()}
    for path, module in lora_modules(ours).items():
        share, layer = module.adapters["default"], layers[path]
        for name, part in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            expected = part["default"].weight.detach().numpy()
            np.testing.assert_allclose(abs(getattr(share, name).data), abs(expected), atol=2e-5)
        rest = module.weight.data - share.scale * share.lora_B.data @ share.lora_A.data
        np.testing.assert_allclose(rest, layer.base_layer.weight.detach().numpy(), atol=2e-5)


@every_pissa
@pytest.mark.parametrize("moved", [False, True], ids=["initially", "in mid-training"])
def test_pissa_computes_and_trains_as_peft_does(settings, moved, pair, rng):
    ids = text(rng)
    base = logits_of(pair[0], ids)
    theirs, ours = both(pair, {"init_lora_weights": "pissa", **settings})
    if moved:
        shake(ours, theirs)
    assert (distance(logits_of(theirs, ids), base) < 1e-4) == (not moved)
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4
    assert all(grad.any() for grad in assert_same_step(theirs, ours, rng).values())
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-3


@pytest.mark.parametrize("which", ["plain", "rsLoRA", "patterns"])
def test_a_converted_pissa_adapter_is_a_plain_one_in_peft(which, tmp_path, rng):
    """Trained here, doubled in rank, it means the same on PEFT's untouched base."""
    theirs, ours = small_pair(tmp_path, tied=True)
    add_adapter(ours, LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", **PISSA[which]))
    shaken(ours)
    plain = config_with_initial(ours.adapters["default"].config)
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "init_lora_weights")
    theirs = with_peft(theirs, **{name: getattr(plain, name) for name in fields}).eval()
    parameters = trained_by(theirs)
    with torch.no_grad():
        for path, module in lora_modules(ours).items():
            for part, array in zip(("lora_A", "lora_B"), module.adapters["default"].factors(), strict=True):
                assert parameters[f"{path}.{part}"].shape == array.shape
                parameters[f"{path}.{part}"].copy_(torch.from_numpy(array))
    ids = text(rng)
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4


# -- dropout and biases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("targets", [QV, "all-linear"], ids=str)
@pytest.mark.parametrize("init", [True, "pissa"], ids=["", "PiSSA"])
def test_dropout_falls_on_the_same_place_as_in_peft(dora, targets, init, pair, rng):
    """The holes are given to PEFT's layers, since its own come from another generator."""
    settings = {"target_modules": targets, "use_dora": dora, "lora_dropout": 0.4, "init_lora_weights": init}
    theirs, ours = both(pair, settings)
    shake(ours, theirs)

    class Holes(torch.nn.Module):
        def __init__(self, ours):
            super().__init__()
            self.same = Dropout(ours.p, ours.seed)

        def forward(self, x):
            return x * torch.from_numpy(self.same(Tensor(np.ones(x.shape, np.float32))).data)

    layers = {path.removeprefix("base_model.model."): module for path, module in theirs.named_modules()}
    for path, module in lora_modules(ours).items():
        layers[path].lora_dropout["default"] = Holes(module.adapters["default"].dropout)
    theirs.train()
    assert_same_step(theirs, ours, rng)
    ids = text(rng)
    theirs.eval()
    for path in lora_modules(ours):
        layers[path].lora_dropout["default"] = torch.nn.Identity()
    ours.eval()
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-3


@pytest.mark.parametrize(
    ("bias", "targets"), [("lora_only", QV), ("lora_only", "all-linear"), ("all", "all-linear"), ("none", QV)], ids=str
)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_trained_biases_equal_pefts(bias, targets, dora, rng):
    theirs = random_llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith(".bias"):
                p.normal_(0, 0.3)
    state = {name: p.detach().numpy().copy() for name, p in theirs.named_parameters()}
    ours = Llama(Config(VOCAB, 32, 48, 2, 4, 2, max_position_embeddings=64, rms_norm_eps=1e-6))
    for name, array in state.items():
        if name.endswith(".bias"):
            ours.get_submodule(name.removesuffix(".bias")).bias = Parameter(array)
    ours.load_state_dict(state)
    ids = text(rng)
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4
    theirs, ours = both((theirs, ours), {"target_modules": targets, "bias": bias, "use_dora": dora})
    shake(ours, theirs)
    assert distance(ours(ids).data, logits_of(theirs, ids)) < 1e-4
    gradients = assert_same_step(theirs, ours, rng)
    assert any(name.endswith(".bias") for name in gradients) == (bias != "none")
    for name, array in base_state(ours).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


# -- training runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_training_with_lora_plus_follows_pefts_loss_curve(dora, untied, rng):
    from peft.optimizers import create_loraplus_optimizer

    theirs, ours = both(untied, {"target_modules": [*EMBED, *QV], "use_dora": dora})
    parameters = ours.trainable_parameters()
    optimizer = AdamW(parameters, lr=5e-4, weight_decay=0.0, lr_scale=lora_plus(parameters, ratio=16))
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=16, loraplus_lr_embedding=5e-4
    )
    losses = assert_same_curves(theirs, ours, optimizer, reference, [labelled(rng) for _ in range(3)])
    assert losses[-3:].mean() < losses[:3].mean() - 0.05

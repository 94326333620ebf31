"""Parity with PEFT for PiSSA, dropout and LoRA+: initial values, logits, gradients and a whole training run agree."""

import numpy as np
import pytest
from otherside import (
    assert_same_curves,
    assert_same_step,
    distance,
    labelled,
    logits_of,
    parity,
    small_pair,
    text,
    torch,
    trained_by,
    with_peft,
)
from smallmodels import shaken

from minilora.engine.tensor import Tensor
from minilora.lora.adapters import adapter_state, add_adapter, lora_modules
from minilora.lora.config import LoraConfig
from minilora.lora.variants import Dropout, config_with_initial, lora_plus
from minilora.nn.optim import AdamW

pytestmark = parity

QV = ["q_proj", "v_proj"]


@pytest.fixture(params=["tied head", "untied head"])
def pair(request, tmp_path):
    """The same random model twice: transformers' and minilora's."""
    return small_pair(tmp_path, tied=request.param == "tied head")


def both(pair, settings, moved=False):
    """The adapter of these settings on both models, with the arrays that minilora drew. moved: as by training."""
    theirs, ours = pair
    add_adapter(ours, LoraConfig(r=4, lora_alpha=8, **settings), seed=3)
    theirs = with_peft(theirs, r=4, lora_alpha=8, **settings)
    state, parameters = adapter_state(shaken(ours) if moved else ours, "default"), trained_by(theirs)
    assert state.keys() == parameters.keys()
    with torch.no_grad():
        for name, array in state.items():
            assert parameters[name].shape == array.shape, name
            parameters[name].copy_(torch.from_numpy(array))
    return theirs, ours


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
    theirs, ours = both(pair, {"init_lora_weights": "pissa", **settings}, moved)
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


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("targets", [QV, "all-linear"], ids=str)
@pytest.mark.parametrize("init", [True, "pissa"], ids=["", "PiSSA"])
def test_dropout_falls_on_the_same_place_as_in_peft(dora, targets, init, pair, rng):
    """The holes are given to PEFT's layers, since its own come from another generator."""
    settings = {"target_modules": targets, "use_dora": dora, "lora_dropout": 0.4, "init_lora_weights": init}
    theirs, ours = both(pair, settings, moved=True)

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


# -- training runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_training_with_lora_plus_follows_pefts_loss_curve(dora, tmp_path, rng):
    from peft.optimizers import create_loraplus_optimizer

    theirs, ours = both(small_pair(tmp_path, tied=False), {"target_modules": QV, "use_dora": dora})
    parameters = ours.trainable_parameters()
    optimizer = AdamW(parameters, lr=5e-4, weight_decay=0.0, lr_scale=lora_plus(parameters, ratio=16))
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=16)
    losses = assert_same_curves(theirs, ours, optimizer, reference, [labelled(rng) for _ in range(3)])
    assert losses[-3:].mean() < losses[:3].mean() - 0.05

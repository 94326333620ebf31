"""Adapters of real weights, the first layers of SmolLM2-135M-Instruct, exchanged with PEFT in both directions, for each
variant. `test_real_parity.py` trains all layers on both sides.

In float32 both sides round, each in its own order: they differ by 1e-5 or so of the logits even without an adapter.
Whether they compute the same function is therefore asked in float64, where a wrong scale in one single layer could not
hide; there they agree to about twelve digits.
"""

from dataclasses import replace

import numpy as np
import pytest
from otherside import conversation, distance, in_transformers, logits_of, own_logits, parity, peft, torch, transformers

from minilora.lora.adapters import add_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.nn.llama import Llama
from minilora.nn.optim import AdamW

llama = transformers.models.llama.modeling_llama

pytestmark = [
    pytest.mark.real,
    *parity,
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # the base came from no folder
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),  # PEFT adds the base's table
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning"),  # it loads the start beside it
]

LAYERS = 6  # of 30, which are alike
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
VARIANTS = {
    "plain": {"target_modules": LINEAR},
    "rsLoRA": {"target_modules": LINEAR, "use_rslora": True},
    "DoRA": {"target_modules": QV, "use_dora": True},
    "PiSSA": {"target_modules": QV, "init_lora_weights": "pissa"},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 4, r"layers\.3\.mlp\.up_proj": 2},
                 "alpha_pattern": {"v_proj": 5}, "layers_to_transform": [0, 3, 5]},
    "embedding": {"target_modules": ["embed_tokens", *QV]},
}  # fmt: skip
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.fixture(scope="module")
def text(smollm2):
    return conversation(smollm2[1])


@pytest.fixture
def exact(monkeypatch):
    """transformers takes norms and rotary angles in float32, whatever the model's dtype: here, in its own."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def angles(self, x, position_ids):
        D = self.config.head_dim
        frequencies = self.config.rope_parameters["rope_theta"] ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)  # (1, T, D)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def use():
        monkeypatch.setattr(llama.LlamaRMSNorm, "forward", norm)
        monkeypatch.setattr(llama.LlamaRotaryEmbedding, "forward", angles)

    return use


def copy_of(smollm2, dtype=np.float32):
    """A model of its own with the real weights of the first layers."""
    shared, ours = smollm2[0], Llama.empty(replace(smollm2[0].config, num_hidden_layers=LAYERS))
    state = shared.state_dict()
    ours.load_state_dict({name: state[name].astype(dtype) for name in ours.state_dict()})
    return ours


def assert_same_function(ours, theirs, folder, smollm2, ids, exact):
    """The adapter does much, and the same on both sides: in float32 up to rounding, in float64 to eleven digits."""
    got, base = own_logits(ours, ids), own_logits(copy_of(smollm2), ids)
    assert distance(got, base) > 1
    assert distance(got, logits_of(theirs.eval(), ids)) < 3e-5 * np.abs(got).max()
    ours = copy_of(smollm2, np.float64)
    load_adapter(ours, folder, force=True)  # to a hash, float64 is another base
    exact()
    got, wanted = own_logits(ours, ids), logits_of(theirs.double(), ids)
    assert got.dtype == wanted.dtype == np.float64
    assert distance(got, wanted) < 1e-10 * np.abs(got).max()


@every_variant
def test_an_adapter_trained_here_computes_the_same_in_peft(settings, smollm2, text, tmp_path, exact):
    ids, labels = text
    ours = copy_of(smollm2)
    add_adapter(ours, LoraConfig(r=8, lora_alpha=16, **settings), seed=0)
    optimizer = AdamW(ours.trainable_parameters(), lr=5e-3)
    for _ in range(2):
        optimizer.zero_grad()
        ours.loss(ids, labels).backward()
        optimizer.step()
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(in_transformers(copy_of(smollm2)), tmp_path)
    assert_same_function(ours, theirs, tmp_path, smollm2, ids, exact)


@every_variant
def test_an_adapter_trained_in_peft_computes_the_same_here(settings, smollm2, text, tmp_path, exact):
    ids, labels = text
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(in_transformers(copy_of(smollm2)), config)
    converts = "init_lora_weights" in settings  # PiSSA changed the base: PEFT can save it for the untouched one
    if converts:
        theirs.save_pretrained(tmp_path / "start")
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(2):
        optimizer.zero_grad()
        theirs(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss.backward()
        optimizer.step()
    start = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")} if converts else {}
    theirs.save_pretrained(tmp_path, **start)
    ours = copy_of(smollm2)
    load_adapter(ours, tmp_path)
    if converts:
        theirs = peft.PeftModel.from_pretrained(in_transformers(copy_of(smollm2)), tmp_path)
    assert_same_function(ours, theirs, tmp_path, smollm2, ids, exact)

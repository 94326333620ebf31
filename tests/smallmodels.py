"""Small models and samples that several test files use."""

import numpy as np
import pytest
from hypothesis import strategies as st

from minilora.engine.backend import array_module, to_numpy
from minilora.engine.fused import NOT_SCORED
from minilora.engine.tensor import no_grad
from minilora.lora.adapters import adapter_state, set_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoraLinear, new_weights
from minilora.nn.layers import Linear
from minilora.nn.llama import Config, Llama
from minilora.nn.module import Parameter
from minilora.nn.parts import Sample
from minilora.nn.rope import RopeScaling

IDS = np.arange(24).reshape(2, 12) * 7 % 64  # tokens for a vocabulary of 64

SMALL = Config(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
)
ATTENTION, MLP = (["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"])
IN_A_LAYER = ["input_layernorm", *(f"self_attn.{name}" for name in ATTENTION)]
IN_A_LAYER += ["post_attention_layernorm", *(f"mlp.{name}" for name in MLP)]
SWITCHES = {  # of Llama's config, by family
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 12},
    "mistral": {"sliding_window": 4},
    "smollm3": {"no_rope_layer_interval": 2},
    "llama": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 24)},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4,
                "logits_scaling": 2.0},
}  # fmt: skip


def in_float64(model, gain=20):
    """The same model in float64, its matrices scaled up so that attention and gates are far from uniform."""
    for _, p in model.named_parameters():
        p.data = p.data.astype(np.float64) * (gain if p.ndim == 2 else 1)
    return model


def new_model(config, seed=0):
    """A random model whose embeddings are large enough for its logits to say something."""
    model = Llama(config, np.random.default_rng(seed))
    model.model.embed_tokens.weight.data *= 10
    return model


def sent(send, setting):
    """A setting of an operation with every array in it sent to a device, those in lists and tuples, too."""
    if type(setting) in (list, tuple):
        return type(setting)(sent(send, item) for item in setting)
    return send(setting) if isinstance(setting, np.ndarray) else setting


def logits(model, ids=IDS):
    """What the model says of ids (B, T): (B, T, V) on the host, wherever its weights are."""
    with no_grad():
        return to_numpy(model(array_module(model.head_weight.data).asarray(ids)).data)


def losses_of(model, optimizer, steps, ids=IDS):
    """The loss of each step on ids; the gradients of the last one stay."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(ids, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def random_samples(rng, sizes=(12, 9, 15, 10, 8, 14), vocabulary=64):
    rows = [rng.integers(0, vocabulary, n).tolist() for n in sizes]
    return [Sample(tuple(row), (NOT_SCORED, NOT_SCORED, *row[2:])) for row in rows]


# -- adapters ----------------------------------------------------------------------------------------------------------

MIX = {"plain": 0.5, "some": 0.5, "dora": 0.7, "pissa": -0.3}  # of the adapters of the fixture `kinds`


def chosen(model, which, ids=IDS):
    """The logits with this adapter, or mix."""
    set_adapter(model, which)
    return logits(model, ids)


def lora_config(r=3, lora_alpha=6, **settings):
    return LoraConfig(r=r, lora_alpha=lora_alpha, **settings)


def as_float64(model):
    return in_float64(model, gain=1)


def shaken(model, name="default", seed=9):
    """Move everything that the adapter trains, as training would, and return the model."""
    rng = np.random.default_rng(seed)
    for array in adapter_state(model, name).values():
        array += 0.1 * rng.standard_normal(array.shape).astype(array.dtype)
    return model


def one_layer(rng, m=5, n=6, bias=False, **settings):
    """A float64 linear layer with one active adapter, and the adapter's weights."""
    base = Linear(n, m, bias=bias, rng=None)
    base.weight.data = rng.standard_normal((m, n))
    if bias:
        base.bias.data = rng.standard_normal(m)
    layer = LoraLinear(base)
    weights = layer.adapters["a"] = new_weights("x", base, lora_config(r=2, **settings), rng)
    layer.active = {"a": 1.0}
    return layer, weights


class Net(Llama):
    """A Llama whose q and down projections have biases, which no Llama file has."""

    def __init__(self, config, rng):
        super().__init__(config, rng)
        for block in self.model.layers:
            for layer in (block.self_attn.q_proj, block.mlp.down_proj):
                layer.bias = Parameter(rng.standard_normal(layer.out_features).astype(np.float32))


VARIANTS = {
    "DoRA": {"use_dora": True},
    "DoRA with rsLoRA": {"use_dora": True, "use_rslora": True},
    "LoRA-FA": {"freeze_A": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA with rsLoRA": {"init_lora_weights": "pissa", "use_rslora": True},
    "DoRA from PiSSA": {"init_lora_weights": "pissa", "use_dora": True},
    "rsLoRA on some matrices": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "dropout": {"lora_dropout": 0.4},
    "DoRA with dropout": {"use_dora": True, "lora_dropout": 0.4},
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
DTYPES = st.sampled_from([np.float32, np.float64])


def tolerance(dtype):
    return dict(rtol=1e-4, atol=1e-4) if dtype == np.float32 else dict(rtol=1e-10, atol=1e-10)

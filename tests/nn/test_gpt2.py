"""The GPT-2 decoder equals plain NumPy, and learns positions up to a limit."""

from dataclasses import replace

import numpy as np
import pytest
from smallmodels import in_float64

from minilora.engine.tensor import no_grad
from minilora.nn.gpt2 import GPT2, GPT2Config

SMALL = GPT2Config(vocab_size=11, hidden_size=6, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)


def plain_gpt2(config, state, ids):
    """Logits of one row of ids in plain NumPy: one head and one query at a time."""
    w = {name.removeprefix("transformer."): array for name, array in state.items()}
    D, T = config.head_dim, len(ids)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normed(x, name):
        z = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + config.layer_norm_epsilon)
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][:T]
    for layer in (f"h.{i}" for i in range(config.num_hidden_layers)):
        q, k, v = np.split(linear(normed(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn"), 3, axis=1)
        y = np.empty_like(q)
        for head in range(config.num_attention_heads):
            own = slice(head * D, (head + 1) * D)
            for t in range(T):
                p = np.exp(k[: t + 1, own] @ q[t, own] / np.sqrt(D))
                y[t, own] = p / p.sum() @ v[: t + 1, own]
        x = x + linear(y, f"{layer}.attn.c_proj")
        h = linear(normed(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{layer}.mlp.c_proj")
    return normed(x, "ln_f") @ state.get("lm_head.weight", w["wte.weight"]).T


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": False, "intermediate_size": 5, "layer_norm_epsilon": 0.1},
        {"hidden_size": 9, "num_attention_heads": 3},
    ],
    ids=["tied", "untied", "odd width"],
)
def test_the_decoder_computes_what_plain_numpy_computes(rng, ids, change):
    model = in_float64(GPT2(replace(SMALL, **{"intermediate_size": 0, **change}), rng))
    for _, p in model.named_parameters():
        p.data += 0.5 * rng.standard_normal(p.shape) * (p.ndim == 1)
    expected = [plain_gpt2(model.config, model.state_dict(), row) for row in ids]
    np.testing.assert_allclose(model(ids).data, expected, rtol=1e-9, atol=1e-9)


def test_a_position_that_was_never_learned_is_refused(ids):
    model = GPT2(SMALL)
    cache = model.new_cache(2, capacity=20)
    with no_grad(), pytest.raises(ValueError, match="position 20 is beyond the 16 positions that the model has"):
        for _ in range(3):
            model(ids, cache)


def test_what_is_added_to_the_residual_stream_begins_smaller_the_more_layers_there_are():
    model = GPT2(replace(SMALL, hidden_size=64, num_hidden_layers=8, intermediate_size=0))
    of = {name: w.std() for name, w in model.state_dict().items()}
    assert of["transformer.h.3.mlp.c_proj.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert of["transformer.h.3.mlp.c_fc.weight"] == pytest.approx(0.02, rel=0.05)


BAD_CONFIGS = [
    ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
    ({"num_attention_heads": 4}, "hidden_size 6 is no multiple of 4 heads"),
    ({"intermediate_size": -1}, "intermediate_size must be"),
    ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be a positive number, got 0.0"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS, ids=[str(row[0]) for row in BAD_CONFIGS])
def test_shapes_that_no_gpt2_can_have_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)

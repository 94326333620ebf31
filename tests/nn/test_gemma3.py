"""The Gemma 3 decoder equals plain NumPy: windows, two rotations, four norms a block."""

from dataclasses import replace

import numpy as np
import pytest
from smallmodels import in_float64

from minilora.nn.gemma3 import FULL, SLIDING, Gemma3, Gemma3Config

SMALL = Gemma3Config(11, 6, 5, 2, 2, 1, head_dim=4, max_position_embeddings=16, sliding_window=3)


def plain_gemma3(config, state, ids):
    """Logits of one row of ids in plain NumPy: one head and one query at a time."""
    D, T = config.head_dim, len(ids)
    shared = config.num_attention_heads // config.num_key_value_heads

    def normed(x, name):
        rms = np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
        return x / rms * (1 + state[f"{name}.weight"])

    x = state["model.embed_tokens.weight"][ids] * np.sqrt(config.hidden_size)
    for i, kind in enumerate(config.layer_types):
        layer, wide = f"model.layers.{i}", kind == FULL
        base, window = (config.rope_theta, T) if wide else (config.rope_local_base_freq, config.sliding_window)
        turn = np.exp(1j * np.arange(T)[:, None] * base ** (-np.arange(0, D, 2) / D))

        def head_of(x, number, which, layer=layer, turn=turn):
            w = state[f"{layer}.self_attn.{which}_proj.weight"][number * D : (number + 1) * D]
            z = normed(x @ w.T, f"{layer}.self_attn.{which}_norm")
            z = (z[:, : D // 2] + 1j * z[:, D // 2 :]) * turn
            return np.concatenate([z.real, z.imag], axis=1)

        h, found = normed(x, f"{layer}.input_layernorm"), []
        for head in range(config.num_attention_heads):
            q, k = head_of(h, head, "q"), head_of(h, head // shared, "k")
            v = h @ state[f"{layer}.self_attn.v_proj.weight"][head // shared * D : (head // shared + 1) * D].T
            for t in range(T):
                seen = slice(max(0, t - window + 1), t + 1)
                p = np.exp(k[seen] @ q[t] / np.sqrt(config.query_pre_attn_scalar))
                found.append(p / p.sum() @ v[seen])
        y = np.array(found).reshape(-1, T, D).swapaxes(0, 1).reshape(T, -1)
        x = x + normed(y @ state[f"{layer}.self_attn.o_proj.weight"].T, f"{layer}.post_attention_layernorm")
        h = normed(x, f"{layer}.pre_feedforward_layernorm")
        gate = h @ state[f"{layer}.mlp.gate_proj.weight"].T
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        h = (gate * (h @ state[f"{layer}.mlp.up_proj.weight"].T)) @ state[f"{layer}.mlp.down_proj.weight"].T
        x = x + normed(h, f"{layer}.post_feedforward_layernorm")
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    return normed(x, "model.norm") @ head.T


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layer_types": (FULL, SLIDING), "rope_theta": 50.0, "tie_word_embeddings": False},
        {"num_attention_heads": 3, "num_key_value_heads": 3, "query_pre_attn_scalar": 7, "rms_norm_eps": 0.1},
    ],
    ids=["windows", "both types, untied", "own keys"],
)
def test_the_decoder_computes_what_plain_numpy_computes(rng, ids, change):
    model = in_float64(Gemma3(replace(SMALL, **change), rng))
    for _, p in model.named_parameters():
        p.data += 0.5 * rng.standard_normal(p.shape) * (p.ndim == 1)
    expected = [plain_gemma3(model.config, model.state_dict(), row) for row in ids]
    np.testing.assert_allclose(model(ids).data, expected, rtol=1e-9, atol=1e-9)


def test_norms_begin_as_no_change_and_every_sixth_layer_sees_all():
    config = Gemma3Config(11, 6, 5, 12, 2, 1)
    assert [i for i, kind in enumerate(config.layer_types) if kind == FULL] == [5, 11]
    assert (config.head_dim, config.query_pre_attn_scalar) == (256, 256.0)
    assert not Gemma3(SMALL).state_dict()["model.norm.weight"].any()


BAD_CONFIGS = [
    ({"sliding_window": 0}, "sliding_window must be a positive integer, got 0"),
    ({"rope_local_base_freq": -1.0}, "rope_local_base_freq must be a positive number"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 query heads cannot share 2 key/value heads evenly"),
    ({"head_dim": 3}, "head_dim must be even"),
    ({"layer_types": (FULL,)}, "layer_types must be 2 of"),
    ({"layer_types": (FULL, "other")}, "layer_types must be 2 of"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS, ids=[str(row[0]) for row in BAD_CONFIGS])
def test_shapes_that_no_gemma_can_have_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)

"""Every decoder equals plain NumPy, written from its paper, and what is special of one; shapes that none can have."""

from dataclasses import replace

import numpy as np
import pytest
from smallmodels import IN_A_LAYER, SMALL, in_float64

from minilora.nn.gemma3 import FULL, SLIDING, Gemma3, Gemma3Config
from minilora.nn.gpt2 import GPT2, GPT2Config
from minilora.nn.llama import Llama

GPT_2 = GPT2Config(vocab_size=11, hidden_size=6, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
GEMMA = Gemma3Config(11, 6, 5, 2, 2, 1, head_dim=4, max_position_embeddings=16, sliding_window=3)

# -- logits (T, V) of one row of ids in plain NumPy: one head and one query at a time ----------------------------------


def weights(scores):
    """softmax"""
    p = np.exp(scores - scores.max())
    return p / p.sum()


def plain_llama(config, state, ids):
    """Logits of one row of ids in plain NumPy, written from the papers: one head and one query at a time."""
    D, T = config.head_dim, len(ids)
    turn = np.exp(1j * np.arange(T)[:, None] * config.rope_theta ** (-np.arange(0, D, 2) / D))  # (T, D/2)

    def normed(x, name):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * state[f"{name}.weight"]

    def rotated(x):
        y = (x[:, : D // 2] + 1j * x[:, D // 2 :]) * turn
        return np.concatenate([y.real, y.imag], axis=1)

    x = state["model.embed_tokens.weight"][ids]
    for layer in (f"model.layers.{i}" for i in range(config.num_hidden_layers)):
        w = {name: state[f"{layer}.{name}.weight"] for name in IN_A_LAYER}
        h, found = normed(x, f"{layer}.input_layernorm"), []
        for head in range(config.num_attention_heads):
            shared = head * config.num_key_value_heads // config.num_attention_heads
            q = rotated(h @ w["self_attn.q_proj"][head * D : (head + 1) * D].T)
            k = rotated(h @ w["self_attn.k_proj"][shared * D : (shared + 1) * D].T)
            v = h @ w["self_attn.v_proj"][shared * D : (shared + 1) * D].T
            found.append([weights(k[: t + 1] @ q[t] / np.sqrt(D)) @ v[: t + 1] for t in range(T)])
        x = x + np.concatenate(found, axis=1) @ w["self_attn.o_proj"].T
        h = normed(x, f"{layer}.post_attention_layernorm")
        gate = h @ w["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    return normed(x, "model.norm") @ state.get("lm_head.weight", state["model.embed_tokens.weight"]).T


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
                y[t, own] = weights(k[: t + 1, own] @ q[t, own] / np.sqrt(D)) @ v[: t + 1, own]
        x = x + linear(y, f"{layer}.attn.c_proj")
        h = linear(normed(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{layer}.mlp.c_proj")
    return normed(x, "ln_f") @ state.get("lm_head.weight", w["wte.weight"]).T


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
                found.append(weights(k[seen] @ q[t] / np.sqrt(config.query_pre_attn_scalar)) @ v[seen])
        y = np.array(found).reshape(-1, T, D).swapaxes(0, 1).reshape(T, -1)
        x = x + normed(y @ state[f"{layer}.self_attn.o_proj.weight"].T, f"{layer}.post_attention_layernorm")
        h = normed(x, f"{layer}.pre_feedforward_layernorm")
        gate = h @ state[f"{layer}.mlp.gate_proj.weight"].T
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        h = (gate * (h @ state[f"{layer}.mlp.up_proj.weight"].T)) @ state[f"{layer}.mlp.down_proj.weight"].T
        x = x + normed(h, f"{layer}.post_feedforward_layernorm")
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    return normed(x, "model.norm") @ head.T


DECODERS = [
    (Llama, plain_llama, SMALL),
    (Llama, plain_llama, replace(SMALL, num_key_value_heads=2, tie_word_embeddings=False)),
    (Llama, plain_llama, replace(SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=6, rope_theta=100.0,
                                 rms_norm_eps=0.1)),
    (GPT2, plain_gpt2, GPT_2),
    (GPT2, plain_gpt2, replace(GPT_2, tie_word_embeddings=False, intermediate_size=5, layer_norm_epsilon=0.1)),
    (GPT2, plain_gpt2, replace(GPT_2, hidden_size=9, num_attention_heads=3, intermediate_size=0)),
    (Gemma3, plain_gemma3, GEMMA),
    (Gemma3, plain_gemma3, replace(GEMMA, layer_types=(FULL, SLIDING), rope_theta=50.0, tie_word_embeddings=False)),
    (Gemma3, plain_gemma3, replace(GEMMA, num_attention_heads=3, num_key_value_heads=3, query_pre_attn_scalar=7,
                                   rms_norm_eps=0.1)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "plain", "config"), DECODERS, ids=lambda x: getattr(x, "__name__", ""))
def test_the_decoder_computes_what_plain_numpy_computes(rng, ids, family, plain, config):
    model = in_float64(family(config, rng))
    for _, p in model.named_parameters():
        p.data += 0.5 * rng.standard_normal(p.shape) * (p.ndim == 1)  # norms that are not all one
    expected = [plain(model.config, model.state_dict(), row) for row in ids]
    np.testing.assert_allclose(model(ids).data, expected, rtol=1e-9, atol=1e-9)


def test_what_is_added_to_the_residual_stream_begins_smaller_the_more_layers_there_are():
    model = GPT2(replace(GPT_2, hidden_size=64, num_hidden_layers=8, intermediate_size=0))
    of = {name: w.std() for name, w in model.state_dict().items()}
    assert of["transformer.h.3.mlp.c_proj.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert of["transformer.h.3.mlp.c_fc.weight"] == pytest.approx(0.02, rel=0.05)


def test_norms_begin_as_no_change_and_every_sixth_layer_sees_all():
    config = Gemma3Config(11, 6, 5, 12, 2, 1)
    assert [i for i, kind in enumerate(config.layer_types) if kind == FULL] == [5, 11]
    assert (config.head_dim, config.query_pre_attn_scalar, GEMMA.query_pre_attn_scalar) == (256, 256.0, 4.0)
    assert not Gemma3(GEMMA).state_dict()["model.norm.weight"].any()


BAD_CONFIGS = [
    (SMALL, {"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
    (SMALL, {"hidden_size": -8}, "hidden_size must be"),
    (SMALL, {"num_hidden_layers": 2.0}, "num_hidden_layers must be a positive integer, got 2.0"),
    (SMALL, {"num_attention_heads": 0}, "num_attention_heads must be"),
    (SMALL, {"num_attention_heads": "2"}, "num_attention_heads must be"),
    (
        SMALL,
        {"num_attention_heads": 3, "num_key_value_heads": 2},
        "3 query heads cannot share 2 key/value heads evenly",
    ),
    (SMALL, {"num_key_value_heads": 0}, "num_key_value_heads must be"),
    (SMALL, {"head_dim": 3}, "head_dim must be even for rotary positions, got 3"),
    (SMALL, {"num_attention_heads": 16, "head_dim": 0}, "head_dim must be"),
    (SMALL, {"max_position_embeddings": None}, "max_position_embeddings must be"),
    (SMALL, {"rope_theta": 0.0}, "rope_theta must be"),
    (SMALL, {"rms_norm_eps": float("nan")}, "rms_norm_eps must be"),
    (GPT_2, {"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
    (GPT_2, {"num_attention_heads": 4}, "hidden_size 6 is not a multiple of 4 heads"),
    (GPT_2, {"intermediate_size": -1}, "intermediate_size must be"),
    (GPT_2, {"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be a positive number, got 0.0"),
    (GEMMA, {"sliding_window": 0}, "sliding_window must be a positive integer, got 0"),
    (GEMMA, {"rope_local_base_freq": -1.0}, "rope_local_base_freq must be a positive number"),
    (GEMMA, {"rope_theta": float("inf")}, "rope_theta must be a positive number, got inf"),
    (GEMMA, {"num_attention_heads": 3, "num_key_value_heads": 2}, "3 query heads cannot share 2 key/value heads"),
    (GEMMA, {"head_dim": 3}, "head_dim must be even"),
    (GEMMA, {"layer_types": (FULL,)}, "layer_types must be 2 of"),
    (GEMMA, {"layer_types": (FULL, "other")}, "layer_types must be 2 of"),
]


@pytest.mark.parametrize(("config", "change", "message"), BAD_CONFIGS, ids=lambda x: str(x) if type(x) is dict else "")
def test_shapes_that_no_model_can_have_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)

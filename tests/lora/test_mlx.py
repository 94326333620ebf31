"""mlx-lm's adapters: read by mlx-lm's rules, they give the logits of the adapter."""

import json
from dataclasses import replace

import numpy as np
import pytest
from modelfiles import IDS, new_llama
from smallmodels import logits, shaken

from minilora.files.tensors import read_tensors
from minilora.lora.adapters import add_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.mlx import save_mlx_adapter

PLAIN = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
CONFIGS = {
    "plain": PLAIN,
    "rsLoRA": replace(PLAIN, use_rslora=True, target_modules=["q_proj"]),
    "ranks and alphas": replace(PLAIN, rank_pattern={"q_proj": 2, "up_proj": 6}, alpha_pattern={"v_proj": 3}),
    "one layer": replace(PLAIN, layers_to_transform=[1]),
}


def as_mlx_reads_it(folder, base):
    """The base's logits after y = x Wᵀ + scale (x lora_a) lora_b, in every module that "keys" names."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == -1
    tensors, settings = read_tensors(folder / "adapters.safetensors"), config["lora_parameters"]
    state = dict(base.state_dict())
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        assert a.shape[1] == b.shape[0] == settings["rank"] and name.split(".", 3)[3] in settings["keys"]
        state[f"{name}.weight"] = state[f"{name}.weight"] + settings["scale"] * (a @ b).T
    assert not tensors
    base.load_state_dict(state)
    return logits(base, IDS)


@pytest.mark.parametrize("name", CONFIGS)
def test_mlx_computes_what_the_adapter_computes(name, tmp_path):
    model = new_llama(gain=4)
    add_adapter(model, CONFIGS[name], seed=0)
    expected = logits(shaken(model, seed=1), IDS)
    assert np.abs(expected - logits(new_llama(gain=4), IDS)).max() > 1e-2
    folder = save_mlx_adapter(model, tmp_path / "mlx")
    np.testing.assert_allclose(as_mlx_reads_it(folder, new_llama(gain=4)), expected, rtol=1e-3, atol=1e-4)
    half = save_mlx_adapter(model, tmp_path / "half", dtype="float16")
    assert {w.dtype for w in read_tensors(half / "adapters.safetensors").values()} == {np.dtype(np.float16)}
    assert np.abs(as_mlx_reads_it(half, new_llama(gain=4)) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"target_modules": ["lm_head"]}, "an adapter outside of the blocks"),
    ],
)
def test_what_mlx_cannot_hold_is_refused_and_nothing_is_written(change, words, tmp_path):
    model = new_llama(attention_bias=True, tie_word_embeddings=False)
    add_adapter(model, replace(PLAIN, **change), seed=0)
    with pytest.raises(ValueError, match=words):
        save_mlx_adapter(model, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()

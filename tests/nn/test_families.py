"""The table of families: names of tensors, and what is refused."""

import pytest
from modelfiles import gguf_name, new_llama

from minilora.nn.families import FAMILIES

LLAMA = FAMILIES["llama"]


def test_every_name_of_a_llama_becomes_llama_cpps_and_comes_back():
    names = list(new_llama(tie_word_embeddings=False).state_dict())
    assert len(names) == 21
    for name in names:
        assert LLAMA.llama_cpp_name(name) == gguf_name(name)
        assert LLAMA.hugging_face_name(gguf_name(name)) == name


def test_an_unknown_name_stays_as_it_is_and_is_never_written():
    for name in ("blk.0.attn_q_norm.weight", "rope_freqs.weight", "blk.attn_q.weight", "blk.1.2.attn_q.weight", "x"):
        assert LLAMA.hugging_face_name(name) == name
    with pytest.raises(KeyError):
        LLAMA.llama_cpp_name("model.layers.0.self_attn.q_norm.weight")
    assert LLAMA.hugging_face_name("blk.12.attn_q.bias") == "model.layers.12.self_attn.q_proj.bias"
    assert FAMILIES["qwen3"].hugging_face_name("blk.0.attn_q_norm.weight") == "model.layers.0.self_attn.q_norm.weight"

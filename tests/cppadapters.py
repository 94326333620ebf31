"""llama.cpp's adapter files: what they mean by its rules, and files that were written without minilora."""

import gguf
import numpy as np
from modelfiles import gguf_name
from peftfiles import adapted as with_adapter
from smallmodels import logits, shaken

from minilora.nn.llama import Llama

QUERY = "blk.0.attn_q.weight"


def adapted(model, name="default", **settings):
    """The model with an adapter that changes its output, trained by noise."""
    return shaken(with_adapter(model, name, **settings), name)


def in_llama_cpp(model, path):
    """The logits of a Llama with the adapter in a file, added to its matrices by the rules of llama-adapter.cpp and
    llama-graph.cpp: alpha / r times lora_b @ lora_a, or 1 if alpha is 0; rows of q and k are adjacent rotary pairs.
    """
    reader = gguf.GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    assert meta["general.type"] == "adapter" and meta["adapter.type"] == "lora"
    alpha = meta.get("adapter.lora.alpha", 0)
    tensors = {t.name: t.data.astype(np.float64) for t in reader.tensors}
    state = {name: w.astype(np.float64) for name, w in model.state_dict().items()}
    for name in state:
        if f"{gguf_name(name)}.lora_a" not in tensors:
            continue
        a, b = (tensors.pop(f"{gguf_name(name)}.lora_{factor}") for factor in "ab")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            b = b.reshape(-1, model.config.head_dim // 2, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
        state[name] = state[name] + (alpha / b.shape[1] if alpha else 1) * b @ a
    assert not tensors
    plain = Llama.empty(model.config)
    plain.load_state_dict(state)
    return logits(plain)


def distance(a, b):
    return float(np.abs(a - b).max())


def write(path, tensors, kind="F32", **change):
    """An adapter file written with the library alone; change: metadata, with _ for the dots; None leaves a key out."""
    meta = {"general_type": "adapter", "adapter_type": "lora", "adapter_lora_alpha": 8.0} | change
    writer = gguf.GGUFWriter(path, meta.pop("general_architecture", "llama"))
    for key, value in meta.items():
        if value is not None:
            add = {str: writer.add_string, float: writer.add_float32, list: writer.add_array, int: writer.add_uint32}
            add[type(value)](key.replace("_", ".", 2 if key.startswith("adapter_lora") else 1), value)
    quant = gguf.GGMLQuantizationType[kind]
    for name, array in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(array, quant), raw_dtype=quant if kind == "Q8_0" else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(rng, name=QUERY, m=32, n=32, r=4):
    return {f"{name}.lora_a": rng.standard_normal((r, n), np.float32),
            f"{name}.lora_b": rng.standard_normal((m, r), np.float32)}  # fmt: skip

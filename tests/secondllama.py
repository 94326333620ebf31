"""A second Llama, written from llama.cpp's rules, the model that it is compared with, and adapter files of others."""

import dataclasses

import gguf
import numpy as np
from modelfiles import CONFIG

from minilora.engine.tensor import no_grad
from minilora.lora.adapters import adapter_state, add_adapter
from minilora.lora.config import LoraConfig
from minilora.nn.llama import Llama

IDS = np.arange(12) * 29 % CONFIG.vocab_size
QUERY = "blk.0.attn_q.weight"


class LlamaCpp:
    """A Llama in a GGUF file of float32, with an adapter file or without, computed as llama.cpp does."""

    def __init__(self, model, adapter=None, user_scale=1.0):
        self.meta, self.w = self.read(model)
        self.lora, self.user_scale = {}, user_scale
        if adapter is None:
            return
        meta, tensors = self.read(adapter)
        assert meta["general.type"] == "adapter"
        assert meta["general.architecture"] == self.meta["general.architecture"]
        assert meta["adapter.type"] == "lora"
        self.alpha = meta["adapter.lora.alpha"]
        for name in tensors:
            assert name.endswith((".lora_a", ".lora_b")), f"LoRA tensor {name} has unexpected suffix"
        for name in {name.rsplit(".", 1)[0] for name in tensors}:
            a, b, w = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], self.w[name]
            if name == "token_embd.weight":
                assert w.shape[1] == b.shape[0] and w.shape[0] == a.shape[0], "incorrect shape"
            else:
                assert w.shape[1] == a.shape[1] and w.shape[0] == b.shape[0], "incorrect shape"
                assert a.shape[0] == b.shape[1], "lora_a tensor is not transposed"
            self.lora[name] = a, b

    @staticmethod
    def read(path):
        reader = gguf.GGUFReader(path)
        tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
        return {key: field.contents() for key, field in reader.fields.items()}, tensors

    def scale(self, b):
        """llama_adapter_lora_weight::get_scale"""
        return self.user_scale * self.alpha / b.shape[1] if self.alpha else self.user_scale

    def mm(self, name, x):
        """llm_graph_context::build_lora_mm"""
        y = x @ self.w[name].T
        if name in self.lora:
            a, b = self.lora[name]
            y = y + self.scale(b) * ((x @ a.T) @ b.T)
        return y

    def embed(self, ids):
        """llm_graph_context::build_inp_embd: lora_a is looked up by token"""
        x = self.w["token_embd.weight"][ids]
        if "token_embd.weight" in self.lora:
            a, b = self.lora["token_embd.weight"]
            x = x + self.scale(b) * (a[ids] @ b.T)
        return x

    def norm(self, name, x):
        eps = self.meta["llama.attention.layer_norm_rms_epsilon"]
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * self.w[name]

    def rotate(self, x):
        """LLAMA_ROPE_TYPE_NORM: each adjacent pair of x (T, heads, D) by position * base^(-2i/D)"""
        half = np.arange(0, x.shape[-1], 2)
        angle = np.arange(len(x))[:, None, None] * self.meta["llama.rope.freq_base"] ** (-half / x.shape[-1])
        even, odd, out = x[..., 0::2], x[..., 1::2], np.empty_like(x)
        out[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
        out[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
        return out

    def logits(self, ids):
        heads, groups = self.meta["llama.attention.head_count"], self.meta["llama.attention.head_count_kv"]
        x, count = self.embed(ids), len(ids)
        for i in range(self.meta["llama.block_count"]):
            h = self.norm(f"blk.{i}.attn_norm.weight", x)
            q = self.rotate(self.mm(f"blk.{i}.attn_q.weight", h).reshape(count, heads, -1))
            k = self.rotate(self.mm(f"blk.{i}.attn_k.weight", h).reshape(count, groups, -1))
            v = self.mm(f"blk.{i}.attn_v.weight", h).reshape(count, groups, -1)
            k, v = (np.repeat(t, heads // groups, axis=1) for t in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
            scores[:, np.triu(np.ones((count, count), bool), 1)] = -np.inf
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(axis=-1, keepdims=True), v)
            x = x + self.mm(f"blk.{i}.attn_output.weight", mixed.reshape(count, -1))
            h = self.norm(f"blk.{i}.ffn_norm.weight", x)
            gate = self.mm(f"blk.{i}.ffn_gate.weight", h)
            h = gate / (1 + np.exp(-gate)) * self.mm(f"blk.{i}.ffn_up.weight", h)
            x = x + self.mm(f"blk.{i}.ffn_down.weight", h)
        x = self.norm("output_norm.weight", x)
        return self.mm("output.weight", x) if "output.weight" in self.w else x @ self.w["token_embd.weight"].T


def new_model(seed=0, **changes):
    """A random Llama whose attention is far from uniform, so that the order of rotary pairs shows."""
    rng = np.random.default_rng(seed)
    model = Llama(dataclasses.replace(CONFIG, **changes), rng)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = rng.uniform(0.5, 1.5, parameter.shape).astype(np.float32)
        else:
            parameter.data = parameter.data * np.float32(10)
    return model


def adapted(model, name="default", **settings):
    """The model with an adapter that changes its output, trained by noise."""
    add_adapter(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings)), name=name)
    rng = np.random.default_rng(3)
    for array in adapter_state(model, name).values():
        array += rng.normal(0, 0.05, array.shape).astype(array.dtype)
    return model


def logits(model):
    with no_grad():
        return model(IDS[None]).data[0]


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

"""Model files for tests, written without minilora: GGUF the way llama.cpp converts, safetensors byte by byte."""

import dataclasses
import json

import gguf
import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from minilora.files import levels
from minilora.files.blocks import LAYOUTS
from minilora.models.tokenizer import Tokenizer
from minilora.nn.llama import Config, Llama

# Widths are multiples of 32, so that every matrix fits whole quantisation blocks.
CONFIG = Config(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=100000.0,
)
IDS = np.arange(24).reshape(2, 12) * 13 % CONFIG.vocab_size
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISSING_BYTES = frozenset({0, 1, 2, 11, 27, 127, 243})
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "Ã ¤"]
TERMS = [  # records to fine-tune on: 8 to train, 2 to validate, 2 to test
    {
        "id": f"x/{i}",
        "question": f"What is {i}?",
        "paraphrase": f"Define {i}.",
        "answer": f"It is {i} and hello.",
        "keywords": ["hello", str(i)],
        "split": "train" if i < 8 else "validation" if i < 10 else "test",
    }
    for i in range(12)
]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hi 12."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


def codes_of(raw, kind):
    """The codes of packed rows: raw (m, bytes per row) uint8 -> (m, n), 0 to 15."""
    if kind == "Q4_1":
        return LAYOUTS[kind].codes(raw.reshape(-1, LAYOUTS[kind].nbytes)).reshape(raw.shape[0], -1)
    codes = raw.reshape(-1, levels.BYTES)[:, 4:]
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(raw.shape[0], -1)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_rows(folder, rows, name="own.jsonl"):
    return write_jsonl(folder / name, rows)


_LLAMA_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta",
                 "tie_word_embeddings")  # fmt: skip
_NAMES = {  # Hugging Face's part of a name -> llama.cpp's
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def byte_symbols():
    """GPT-2's printable character for each byte, as its `bytes_to_unicode` defines it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(shifted)}


def vocabulary(merges=MERGES):
    """Special tokens, then all bytes but the missing ones, then the results of the merges."""
    symbols = [symbol for byte, symbol in sorted(byte_symbols().items()) if byte not in MISSING_BYTES]
    return [*SPECIAL, *symbols, *(merge.replace(" ", "") for merge in merges)]


def new_llama(gain=10, **changes):
    """A random Llama whose attention is far from uniform, so that the order of rotary pairs shows; its norms differ."""
    rng = np.random.default_rng(0)
    model = Llama(dataclasses.replace(CONFIG, **changes), rng)
    for _, parameter in model.named_parameters():
        parameter.data *= gain if parameter.ndim == 2 else rng.uniform(0.75, 1.25, parameter.shape).astype(np.float32)
    return model


def new_tokenizer(digits=True, pad=0, bos="<|im_start|>", merges=MERGES, template=CHATML):
    """A byte-level BPE tokenizer of all bytes, as a Hugging Face folder has it; digits: split off one by one."""
    symbols = [symbol for _, symbol in sorted(byte_symbols().items())]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokens = [*SPECIAL, *symbols, *("".join(pair) for pair in pairs)]
    core = Core(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [pre_tokenizers.Digits(individual_digits=True), by_bytes]
    core.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else by_bytes
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return Tokenizer(core, eos="<|im_end|>", template=template, bos=bos, pad_id=pad)


def permute(w, heads):
    """The rows of q or k from halves to adjacent pairs, as llama.cpp's convert_hf_to_gguf.py does it."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def gguf_name(name):
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


# The bytes of a block of each kind, and where its float16 steps are; the library cannot quantise the last two.
STEPS = {"Q4_0": (18, [0]), "Q4_1": (20, [0, 2]), "Q5_0": (22, [0]), "Q8_0": (34, [0]), "Q4_K": (144, [0, 2]),
         "Q6_K": (210, [208])}  # fmt: skip
RANDOM = ("Q4_K", "Q6_K")


def random_blocks(shape, kind, rng):
    """A matrix (m, n) of random blocks with values below about 1, packed: (m, bytes per row) uint8."""
    (values, size), m = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]], shape[0]
    raw = rng.integers(0, 256, (m * shape[1] // values, size), dtype=np.uint8)
    for at in STEPS[kind][1]:
        step = rng.uniform(-1, 1, (len(raw), 1)) / (1024 if kind in RANDOM else 64)
        raw[:, at : at + 2] = step.astype(np.float16).view(np.uint8)
    return raw.reshape(m, -1)


def stored_as(state, kind):
    """What is left of the weights after they were stored as `kind`: matrices rounded, norms exact, by the library."""
    quant = gguf.GGMLQuantizationType[kind]
    return {
        name: w if w.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(w, quant), quant)
        for name, w in state.items()
    }


def write_gguf(path, model, kind="F32", permuted=True, change=None, tensors=None, splitting="smollm", tokens=None):
    """Write a Llama as a GGUF file.

    permuted: q and k rows reordered, as they must be. change: metadata to replace, by key; None leaves a key out.
    tensors: arrays to replace, by minilora's name; None leaves a tensor out. splitting: the pre-tokenizer's name.
    """
    config, tokens = model.config, vocabulary() if tokens is None else tokens
    kinds = [3 if token in SPECIAL else 1 for token in tokens]
    metadata = {
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitting,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }
    change = dict(change or {})
    writer = gguf.GGUFWriter(path, change.pop("general.architecture", "llama"))
    for key, value in (metadata | change).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            kinds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
            add = kinds[type(value)]
            add(key, value)
    quant = gguf.GGMLQuantizationType[kind]
    for name, w in (model.state_dict() | (tensors or {})).items():
        if w is None:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if permuted and heads:
            w = permute(w, heads)
        if w.ndim == 1 or kind == "F32":
            writer.add_tensor(gguf_name(name), w)
        elif kind == "F16":
            writer.add_tensor(gguf_name(name), w.astype(np.float16))
        elif kind in RANDOM:
            writer.add_tensor(gguf_name(name), random_blocks(w.shape, kind, np.random.default_rng(0)), raw_dtype=quant)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(w, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(path, tensors):
    """Write a safetensors file by hand: tensors are (dtype name, shape, bytes) by name."""
    header, offset = {}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(raw for _, _, raw in tensors.values()))
    return path


def as_dtype(w, dtype):
    """(dtype name, shape, bytes) of an array stored as F32, F16 or BF16 (cut off, not rounded)."""
    if dtype == "BF16":
        return dtype, w.shape, (w.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return dtype, w.shape, w.astype({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype]).tobytes()


def write_folder(folder, model, dtype="F32", change=None, tensors=None, shards=1):
    """Write a Llama as a Hugging Face folder; change and tensors replace or (None) leave out, as in `write_gguf`."""
    config = model.config
    shape = {key: value for key, value in dataclasses.asdict(config).items() if key in _LLAMA_FIELDS}
    record = shape | {"model_type": "llama"} | (change or {})
    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in record.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    state = model.state_dict() | (tensors or {})
    packed = [(name, as_dtype(w, dtype)) for name, w in state.items() if w is not None]
    if shards == 1:
        write_safetensors(folder / "model.safetensors", dict(packed))
        return folder
    (folder / "model.safetensors").unlink(missing_ok=True)  # a single file would go before the shards
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / file, dict(packed[i::shards]))
        weight_map |= {name: file for name, _ in packed[i::shards]}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder

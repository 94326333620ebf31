"""The families of models: how each is written in Hugging Face's files and in llama.cpp's, one row each.

`FAMILIES` says which class computes a family, and under which names its fields and tensors are stored. What reads and
writes files (models/folder.py, models/gguf.py, lora/llamacpp.py) knows no family. Sources: transformers' configurations
and llama.cpp's convert_hf_to_gguf.py.

Both formats are read strictly. A field that minilora does not know is refused, because it may change the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from operator import itemgetter
from typing import Any

import numpy as np

from ..engine.backend import Array
from ..files.disk import ModelFileError
from .family import Family, Field
from .gemma3 import FULL, SLIDING, Gemma3, Gemma3Config, every_nth
from .gpt2 import GPT2, GPT2Config
from .language_model import LanguageModel
from .llama import Config, Llama
from .rope import RopeScaling, frequencies


def check_claims(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelFileError if tensors of these shapes contradict the `config` that their file claims.

    Called before a model is made, so that an absurd config takes neither memory nor time.
    """
    if config.num_hidden_layers > len(shapes):
        raise ModelFileError(f"{config.num_hidden_layers} layers claimed, {len(shapes)} tensors held")
    for name, shape in FAMILIES[config.model_type].model.claims(config).items():
        if name not in shapes:
            raise ModelFileError(f"missing {name}")
        if tuple(shapes[name]) != shape:
            raise ModelFileError(f"{name} has shape {tuple(shapes[name])}, but {shape} is claimed")


def empty_model(config: Any) -> LanguageModel:
    """A model of the config's family whose matrices are zero, for `load_state_dict` or for counting."""
    return FAMILIES[config.model_type].model.empty(config)


# -- config.json -------------------------------------------------------------------------------------------------------

# They name things, say how weights are stored or how training began, or choose what a call returns. Dropout is one of
# them: it is part of training, and minilora's is an option of the adapter (lora_dropout).
_IGNORED = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_num_labels", "architectures",
    "attention_dropout", "auto_map", "bos_token_id", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task",
    "gradient_checkpointing", "id2label", "initializer_range", "is_llama_config", "label2id", "max_sequence_length",
    "model_type", "neftune_noise_alpha", "output_attentions", "output_hidden_states", "output_past", "pad_token_id",
    "pretraining_tp", "resid_pdrop", "return_dict", "tokenizer_class", "torch_dtype", "transformers_version",
    "transformers.js_config", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip


def config_from_json(raw: Mapping[str, Any]) -> Any:
    """The config in `config.json`. Raises ValueError for a family, a field or a value that minilora does not know."""
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise ValueError(f"model_type is {raw.get('model_type')!r}, minilora reads {', '.join(sorted(FAMILIES))}")
    if raw.get("quantization_config") is not None:
        raise ValueError(
            "quantization_config says that the matrices are quantised, which minilora reads only from .gguf files: "
            "give such a file, or the original model, with --quantized nf4 for 4 bits"
        )
    values: dict[str, Any] = {"model_type": family.model_type, **family.always}
    try:
        # What is null is as if it were not there, but is not what transformers assumes.
        raw = family.from_json({key: value for key, value in {**family.assumed, **raw}.items() if value is not None})
        for each in family.fields:
            values[each.name] = each.read(raw, values)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"a field has a value of the wrong type: {error}") from error
    if not isinstance(tied := values["tie_word_embeddings"], bool):
        raise ValueError(f"tie_word_embeddings must be true or false, got {tied!r}")
    known = {each.json for each in family.fields} | _IGNORED | family.ignored
    _refuse({key: value for key, value in raw.items() if key not in known}, family.only, "field")
    return _made(family, values)


def config_to_json(config: Any) -> dict[str, Any]:
    """What `config.json` says of a model with this config, for transformers. Raises ValueError for one that no file of
    its family can describe.
    """
    family = _describing(config)
    record = {"architectures": [family.class_name], "model_type": family.model_type}
    record |= {key: values[0] for key, values in family.only.items() if key != "layer_types"}
    return record | {each.json: getattr(config, each.name) for each in family.fields} | family.to_json(config)


def _describing(config: Any) -> Family:
    """The family of a config. Raises ValueError, with the families that have it, if its files would lose a field."""

    def lost(family: Family) -> list[str]:
        stored = {each.name for each in family.fields} | {"model_type"}
        others = [each for each in fields(config) if each.name not in stored]
        usual = {each.name: family.always.get(each.name, each.default) for each in others}
        return [f"{name}={getattr(config, name)!r}" for name in usual if getattr(config, name) != usual[name]]

    if (own := FAMILIES.get(config.model_type)) is not None and not lost(own):
        return own
    able = [each.model_type for each in FAMILIES.values() if isinstance(config, each.config) and not lost(each)]
    what = "is unknown" if own is None else f"has no {', '.join(lost(own))}"
    instead = f"give the config the model_type {' or '.join(able)}" if able else "no family has all of its fields"
    raise ValueError(f"model_type {config.model_type!r} {what}, so a file would describe another model; {instead}")


def _refuse(found: Mapping[str, Any], only: Mapping[str, tuple], what: str) -> None:
    for key, value in found.items():
        if key not in only:
            raise ValueError(f"minilora does not know the {what} {key} (here {value!r}), which may change the result")
        if not all(each in only[key] for each in (value if isinstance(value, list) else [value])):
            raise ValueError(f"minilora does not support this value of {key}: {value!r}, only {only[key][0]!r}")


def _made(family: Family, values: Mapping[str, Any]) -> Any:
    try:
        return family.config(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


# -- GGUF metadata -----------------------------------------------------------------------------------------------------

_GGUF_ONLY = {
    "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,),
    "rope.scaling.type": ("none",), "rope.scaling.factor": (1.0,),
}  # fmt: skip
_GGUF_HEAD_DIM = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_GGUF_IGNORED = {"vocab_size", "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"}
ROPE_DIVISORS = "rope_freqs.weight"  # llama.cpp's tensor for Llama 3's scaling
_ROPE_SCALING = "minilora.rope_scaling"  # what it was computed from, which llama.cpp does not store


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], divisors: Array | None = None
) -> Any:
    """The config in a GGUF file's metadata.

    shapes: of its tensors, by llama.cpp's names.
    divisors: the tensor ROPE_DIVISORS, if the file has it.

    Raises ValueError for an architecture, a key or a value that minilora does not know.
    """
    name = metadata.get("general.architecture")
    family = ARCHITECTURES.get(str(name))
    if family is None:
        raise ValueError(f"architecture is {name!r}, minilora reads {', '.join(sorted(ARCHITECTURES))}")
    own = {k.removeprefix(f"{name}."): v for k, v in metadata.items() if k.startswith(f"{name}.")}
    values: dict[str, Any] = {"model_type": family.model_type, **family.always}
    if "token_embd.weight" not in shapes:
        raise ValueError(f"missing {family.tensors['token_embd']}.weight")
    values["vocab_size"] = int(shapes["token_embd.weight"][0])
    values["tie_word_embeddings"] = "output.weight" not in shapes
    lengths = {key: int(own[key]) for key in _GGUF_HEAD_DIM if key in own}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"minilora does not support heads of different widths: {lengths}")
    if "head_dim" in family.config.__dataclass_fields__:
        values["head_dim"] = next(iter(lengths.values()), 0)
    for each in family.fields:
        if each.gguf and each.name not in values:
            try:
                values[each.name] = _number(each.read(own, values, gguf=True))
            except KeyError as error:
                raise ValueError(f"{name}.{each.gguf} is missing") from error
    if divisors is not None and issubclass(family.config, Config):
        values["rope_scaling"] = _scaling_of(divisors, values, metadata.get(_ROPE_SCALING))
    known = {each.gguf for each in family.fields} | _GGUF_IGNORED | set(_GGUF_HEAD_DIM)
    only = {**_GGUF_ONLY, **family.gguf_only}
    _refuse({key: value for key, value in own.items() if key not in known or key in family.gguf_only}, only, "key")
    return _made(family, values)


def _number(value: Any) -> Any:
    """9.99999975e-06, as stored in float32 -> 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _scaling_of(divisors: Array, values: Mapping[str, Any], record: list[float] | None) -> RopeScaling:
    """The scaling that a file's divisors (D/2) were computed from: as recorded, or as in all of Llama 3."""
    factor, low, high, original = record or (float(divisors.max()), 1.0, 4.0, 8192)
    scaling = RopeScaling(factor, low, high, int(original))
    expected = scaling.divisors(frequencies(values["rope_theta"], 2 * len(divisors)))
    if not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"{ROPE_DIVISORS} is not Llama 3's scaling of rotary frequencies, the only one minilora reads")
    return scaling


def config_to_gguf(config: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """Metadata of a GGUF file with this config, and tensors that are not parameters, by llama.cpp's names.

    Raises ValueError for a model that llama.cpp cannot compute, or that no file of its family can describe.
    """
    family = _describing(config)
    metadata: dict[str, Any] = {"general.architecture": family.gguf, "general.type": "model"}
    for each in family.fields:
        if each.gguf:
            real = isinstance(family.config.__dataclass_fields__[each.name].default, float)
            value = getattr(config, each.name)
            metadata[f"{family.gguf}.{each.gguf}"] = float(value) if real else value
    metadata |= {f"{family.gguf}.{key}": config.head_dim for key in _GGUF_HEAD_DIM} | family.to_gguf(config)
    if not isinstance(config, Config) or (scaling := config.rope_scaling) is None:
        return metadata, {}
    divisors = scaling.divisors(frequencies(config.rope_theta, config.head_dim)).astype(np.float32)
    return metadata | {_ROPE_SCALING: [float(n) for n in vars(scaling).values()]}, {ROPE_DIVISORS: divisors}


def as_llama_cpp_has_it(config: Any, state: Mapping[str, Array]) -> Mapping[str, Array]:
    """Arrays by name in the form that can be written to a GGUF file.

    They come back unchanged, except that Gemma's norms are rounded as if 1 had been added and subtracted. Raises
    ValueError for a config that no file of its family can describe.
    """
    if offset := _describing(config).norm_offset:
        norms = {name: (w + offset) - offset for name, w in state.items() if name.endswith("norm.weight")}
        return {**state, **norms}
    return state


# -- the rows ----------------------------------------------------------------------------------------------------------


def _rope_from_json(raw: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions as the fields rope_theta and rope_scaling. transformers has used two names and two places.

    Where both names are there, rope_scaling counts, as in transformers.
    """
    rest = {key: value for key, value in raw.items() if key not in ("rope_parameters", "rope_scaling")}
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters and rope_scaling must be objects, got {rope!r}")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rest |= {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    if kind == "llama3":
        try:
            rest["rope_scaling"] = RopeScaling(**rope)
        except TypeError as error:
            raise ValueError(f"rope_scaling: {error}".replace("RopeScaling.__init__() ", "")) from error
    elif kind != "default" or rope:
        unknown = f"the kind {kind!r}" if kind != "default" else f"the field {min(rope)}"
        raise ValueError(f"minilora does not support {unknown} of rope_scaling, only 'default' and 'llama3'")
    return rest


def _rope_to_json(config: Config) -> dict[str, Any]:
    if config.rope_scaling is None:
        return {}
    return {"rope_scaling": {"rope_type": "llama3", **asdict(config.rope_scaling)}}


def _shape(
    *more: Field, tied: bool = False, context: int = 2048, epsilon: float = 1e-6, theta: float = 10000.0
) -> tuple[Field, ...]:
    """The fields of Llama and its relatives, and more; what transformers assumes where config.json says nothing."""
    heads = itemgetter("num_attention_heads")  # as many key/value heads
    return (
        Field("vocab_size", "vocab_size", "vocab_size"),
        Field("hidden_size", "hidden_size", "embedding_length"),
        Field("num_hidden_layers", "num_hidden_layers", "block_count"),
        Field("num_attention_heads", "num_attention_heads", "attention.head_count"),
        Field("num_key_value_heads", "num_key_value_heads", "attention.head_count_kv", heads, heads),
        Field("head_dim", "head_dim", default=0),
        Field("max_position_embeddings", "max_position_embeddings", "context_length", context),
        Field("rms_norm_eps", "rms_norm_eps", "attention.layer_norm_rms_epsilon", epsilon),
        Field("rope_theta", "rope_theta", "rope.freq_base", theta, 10000.0),
        Field("tie_word_embeddings", "tie_word_embeddings", default=tied),
        *more,
    )


_WIDTH = Field("intermediate_size", "intermediate_size", "feed_forward_length")
_SCALING = Field("rope_scaling", "rope_scaling", default=None)
_MULTIPLIERS = (
    Field("embedding_multiplier", "embedding_multiplier", "embedding_scale", 1.0, 1.0),
    Field("attention_multiplier", "attention_multiplier", "attention.scale", 1.0, 0.0),
    Field("residual_multiplier", "residual_multiplier", "residual_scale", 1.0, 1.0),
    Field("logits_scaling", "logits_scaling", "logit_scale", 1.0),
)
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_AFTER = {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_QK_NORMS = {f"blk.{{}}.attn_{x}_norm": f"model.layers.{{}}.self_attn.{x}_norm" for x in "qk"}
_SILU = {"hidden_act": ("silu",)}
_NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,)}
_NO_WINDOW = {"use_sliding_window": (False,), "layer_types": ("full_attention",)}
_WINDOW_UNUSED = frozenset(("sliding_window", "max_window_layers"))  # what use_sliding_window would choose


def _mistral_to_gguf(config: Config) -> dict[str, Any]:
    """llama.cpp's architecture `llama` has no window, but computes the same up to its length."""
    length = config.max_position_embeddings
    return {"llama.context_length": length if config.sliding_window is None else min(length, config.sliding_window)}


_LLAMA = Family(
    "llama", "LlamaForCausalLM", "llama", Llama, Config, _shape(_WIDTH, _SCALING), _TENSORS,
    permuted=True, from_json=_rope_from_json, to_json=_rope_to_json,
    only=_SILU | _NO_BIAS | {"rope_interleaved": (False,)},
)  # fmt: skip
_MISTRAL = replace(
    _LLAMA, model_type="mistral", class_name="MistralForCausalLM", to_gguf=_mistral_to_gguf, only=_SILU,
    fields=_shape(_WIDTH, Field("sliding_window", "sliding_window", default=None), context=131072),
    assumed={"num_key_value_heads": 8, "sliding_window": 4096},
)  # fmt: skip
_QWEN2 = replace(
    _LLAMA, model_type="qwen2", class_name="Qwen2ForCausalLM", gguf="qwen2", permuted=False,
    always={"attention_bias": True}, fields=_shape(_WIDTH, context=32768), only=_SILU | _NO_WINDOW,
    ignored=_WINDOW_UNUSED | {"use_mrope"}, assumed={"num_key_value_heads": 32},
)  # fmt: skip
_QWEN3 = replace(
    _QWEN2, model_type="qwen3", class_name="Qwen3ForCausalLM", gguf="qwen3", always={"qk_norm": True},
    only=_SILU | _NO_WINDOW | {"attention_bias": (False,)}, tensors=_TENSORS | _QK_NORMS,
    assumed={"num_key_value_heads": 32, "head_dim": 128},
)  # fmt: skip


def _granite_to_json(config: Config) -> dict[str, Any]:
    return {"attention_multiplier": config.attention_multiplier or config.head_dim**-0.5}  # 0 is 0 in transformers


_GRANITE = replace(
    _LLAMA, model_type="granite", class_name="GraniteForCausalLM", gguf="granite", only=_SILU | _NO_BIAS,
    fields=_shape(_WIDTH, *_MULTIPLIERS), gguf_only={"rope.scaling.finetuned": (True,)}, to_json=_granite_to_json,
)  # fmt: skip


def _smollm3_from_json(raw: dict[str, Any]) -> dict[str, Any]:
    """`no_rope_layers`, 0 for a layer without rotation, as `no_rope_layer_interval`."""
    raw = _rope_from_json(raw)
    layers = raw.pop("no_rope_layers", None)
    if layers and layers != _rotated(raw.get("no_rope_layer_interval", 4), len(layers)):
        raw["no_rope_layer_interval"] = layers.index(0) + 1 if 0 in layers else 0
        if layers != _rotated(raw["no_rope_layer_interval"], len(layers)):
            raise ValueError(f"minilora supports no_rope_layers with a 0 at every n-th place only, not {layers}")
    return raw


def _rotated(interval: int, layers: int) -> list[int]:
    """1 for each layer that rotates q and k, 0 for each that does not."""
    return [int(not interval or (i + 1) % interval != 0) for i in range(layers)]


def _smollm3_to_json(config: Config) -> dict[str, Any]:
    layers = _rotated(config.no_rope_layer_interval, config.num_hidden_layers)
    return {"no_rope_layers": layers, "layer_types": ["full_attention"] * len(layers)}


def _smollm3_to_gguf(config: Config) -> dict[str, Any]:
    if config.no_rope_layer_interval != 4:
        raise ValueError("llama.cpp computes SmolLM3 only with a no_rope_layer_interval of 4, this model has "
                         f"{config.no_rope_layer_interval}: write a folder instead")  # fmt: skip
    return {}


_SMOLLM3 = replace(
    _LLAMA, model_type="smollm3", class_name="SmolLM3ForCausalLM", gguf="smollm3",
    always={"no_rope_layer_interval": 4},
    fields=_shape(_WIDTH, Field("no_rope_layer_interval", "no_rope_layer_interval", default=4), tied=True,
                  context=32768, theta=2e6),
    assumed={"num_key_value_heads": 4},
    only=_SILU | _NO_BIAS | _NO_WINDOW, ignored=_WINDOW_UNUSED, from_json=_smollm3_from_json, to_json=_smollm3_to_json,
    to_gguf=_smollm3_to_gguf,
)  # fmt: skip
_GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", "gpt2", GPT2, GPT2Config,
    (
        Field("vocab_size", "vocab_size", "vocab_size"),
        Field("hidden_size", "n_embd", "embedding_length"),
        Field("num_hidden_layers", "n_layer", "block_count"),
        Field("num_attention_heads", "n_head", "attention.head_count"),
        Field("intermediate_size", "n_inner", "feed_forward_length", 0),
        Field("max_position_embeddings", "n_positions", "context_length", 1024),
        Field("layer_norm_epsilon", "layer_norm_epsilon", "attention.layer_norm_epsilon", 1e-5),
        Field("tie_word_embeddings", "tie_word_embeddings", default=True),
    ),
    {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
        "blk.{}.attn_norm": "transformer.h.{}.ln_1",
        "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
        "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
        "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
        "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
        "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
    },
    only={"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
          "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    ignored=frozenset(("attn_pdrop", "n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn",
                       "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
                       "summary_use_proj", "task_specific_params")),
    transposed=("attn.c_attn.weight", "c_proj.weight", "mlp.c_fc.weight"), prefix="transformer.",
)  # fmt: skip


def _gemma3_from_json(raw: dict[str, Any]) -> dict[str, Any]:
    """The bases of both rotations as fields, from any of the three forms that transformers has used."""
    rest = {key: value for key, value in raw.items() if key not in ("rope_parameters", "sliding_window_pattern")}
    rest.pop("_sliding_window_pattern", None)
    every = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 6))
    types = raw.get("layer_types") or every_nth(raw["num_hidden_layers"], every)
    for kind, name in ((FULL, "rope_theta"), (SLIDING, "rope_local_base_freq")):
        rope = dict((raw.get("rope_parameters") or {}).get(kind) or {})
        if "rope_theta" in rope:
            rest[name] = rope.pop("rope_theta")
        if rope.pop("rope_type", "default") != "default" or rope:
            raise ValueError("minilora does not support scaled rotations of Gemma 3 (rope_parameters), only 'default'")
    return rest | {"layer_types": tuple(types)}


def _gemma3_to_json(config: Gemma3Config) -> dict[str, Any]:
    bases = {FULL: config.rope_theta, SLIDING: config.rope_local_base_freq}
    return {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}}


def _gemma3_to_gguf(config: Gemma3Config) -> dict[str, Any]:
    usual = replace(config, layer_types=(), query_pre_attn_scalar=0.0)
    if usual != config:
        raise ValueError("llama.cpp computes Gemma 3 only if every sixth layer sees all tokens, and scores are divided "
                         "by the root of head_dim: write a folder instead")  # fmt: skip
    return {}


_GEMMA3 = Family(
    "gemma3_text", "Gemma3ForCausalLM", "gemma3", Gemma3, Gemma3Config,
    (
        *(each for each in _shape(_WIDTH, tied=True, context=131072) if each.name not in ("head_dim", "rope_theta")),
        Field("head_dim", "head_dim", default=256),
        Field("rope_theta", "rope_theta", "rope.freq_base", 1e6),  # llama.cpp would take 1e4
        Field("rope_local_base_freq", "rope_local_base_freq", "rope.freq_base_swa", 1e4, 1e4),
        Field("sliding_window", "sliding_window", "attention.sliding_window", 4096),
        Field("layer_types", "layer_types", default=()),
        Field("query_pre_attn_scalar", "query_pre_attn_scalar", default=256),  # transformers refuses 256.0
    ),
    _TENSORS | _QK_NORMS | _AFTER | {"blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm"},
    only={"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,),
          "use_bidirectional_attention": (False,)},
    ignored=frozenset(("hidden_act", "cache_implementation")), assumed={"num_key_value_heads": 4},
    from_json=_gemma3_from_json, to_json=_gemma3_to_json, to_gguf=_gemma3_to_gguf, norm_offset=1.0,
    gguf_only={"attention.sliding_window_pattern": (6,)},
)  # fmt: skip

_ROWS = (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GRANITE, _SMOLLM3, _GPT2, _GEMMA3)
FAMILIES = {each.model_type: each for each in _ROWS}
TABLES = {f"{each.tensors[x]}.weight" for each in _ROWS for x in ("token_embd", "position_embd", "output")
          if x in each.tensors}  # fmt: skip
ARCHITECTURES = {each.gguf: each for each in reversed(FAMILIES.values())}  # llama.cpp has one for several of them

"""llama.cpp's server, which comes as a library: `pip install xllamacpp`."""

import json
import urllib.request

import pytest


def serving(path, adapter=None):
    """A server of a model's file on one thread of the CPU, in float32, with an adapter if one is given."""
    cpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    settings = cpp.CommonParams()
    settings.model.path, settings.n_gpu_layers, settings.warmup = str(path), 0, False
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 64, 1, 1
    settings.cache_type_k = settings.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        settings.lora_adapters = [cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return cpp.Server(settings)


def tokens_of(server, place, question):
    """The tokens in the answer of one of its addresses."""
    return answer_of(server, place, question)["tokens"]


def answer_of(server, place, question):
    """The answer of one of its addresses."""
    body, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/{place}", body, kind)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)

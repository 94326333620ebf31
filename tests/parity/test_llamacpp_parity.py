"""Parity with llama.cpp itself, from a prebuilt wheel: model files, adapter files and merged files mean the same there.

It answers with the log-probability of every next token.
"""

import numpy as np
import pytest
from cppadapters import distance
from cppserver import answer_of, serving
from modelfiles import CHATML, CONFIG, TALK, new_llama, new_tokenizer, vocabulary, write_gguf
from peftfiles import adapted
from smallmodels import shaken

from minilora.engine.tensor import no_grad
from minilora.lora.peft import load_adapter, save_adapter
from minilora.models import load as zoo
from minilora.models.gguf import save_gguf
from minilora.models.merge import export, merge

pytestmark = pytest.mark.parity

IDS = [5, 77, 130, 9, 260, 31, 200, 64]
SETTINGS = {
    "every linear layer": {},
    "rsLoRA": {"use_rslora": True, "target_modules": ["q_proj", "k_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "PiSSA": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]},
    "head": {"target_modules": ["lm_head"]},
}


@pytest.fixture(params=[True, False], ids=["tied head", "untied head"])
def base(request, tmp_path):
    """A small random model as a GGUF file."""
    model = new_llama(gain=8, tie_word_embeddings=request.param)
    return save_gguf(tmp_path / "base.gguf", model.config, model.state_dict(), new_tokenizer(), "F32")


@pytest.fixture
def adapter(base, settings, tmp_path):
    model, _ = zoo.load(base)
    if model.config.tie_word_embeddings and settings.get("target_modules") == ["lm_head"]:
        pytest.skip("a tied head cannot be adapted")
    return save_adapter(shaken(adapted(model, **settings), seed=1), tmp_path / "adapter")


def in_llama_cpp(model, adapter=None):
    """log p of every token that could follow IDS, (V), as llama.cpp computes it on the CPU in float32."""
    letter = new_tokenizer().core.token_to_id("h")  # made to say a whole letter: for half of one it reports no scores
    question = {"prompt": IDS, "n_predict": 1, "logprobs": CONFIG.vocab_size, "logit_bias": [[letter, 1000]]}
    answer = serving(model, adapter).handle_completions(question)
    scores = np.full(CONFIG.vocab_size, np.nan)  # and therefore over every limit, where a token has no score
    for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        scores[token["id"]] = token["logprob"]
    return scores


def here(model):
    with no_grad():
        logits = model(np.array([IDS])).data[0, -1].astype(np.float64)
    logits -= logits.max()
    return logits - np.log(np.exp(logits).sum())


def test_the_base_gives_the_same_probabilities(base):
    assert distance(in_llama_cpp(base), here(zoo.load(base)[0])) < 1e-4


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_an_exported_adapter_gives_the_same_probabilities(base, adapter, tmp_path):
    model, _ = zoo.load(base)
    plain = here(model)
    load_adapter(model, adapter)
    expected = here(model)
    assert distance(expected, plain) > 0.1
    out = export(base, adapter, tmp_path / "adapter.gguf").path
    assert distance(in_llama_cpp(base, out), expected) < 1e-4


@pytest.mark.parametrize("settings", [{}])
@pytest.mark.parametrize(("kind", "limit"), [("F32", 1e-4), ("F16", 1e-2), ("Q8_0", 0.1), ("Q4_1", 0.5)])
def test_a_merged_file_gives_the_same_probabilities(kind, limit, base, adapter, tmp_path):
    """llama.cpp rounds x, too, where weights are not float32: the limits are for that."""
    out = merge(base, adapter, tmp_path / "merged.gguf", kind=kind).path
    assert distance(in_llama_cpp(out), here(zoo.load(out)[0])) < limit


@pytest.mark.parametrize("settings", [{}])
def test_merged_file_and_adapter_file_agree(base, adapter, tmp_path):
    merged = merge(base, adapter, tmp_path / "merged.gguf", kind="F32").path
    out = export(base, adapter, tmp_path / "adapter.gguf").path
    assert distance(in_llama_cpp(merged), in_llama_cpp(base, out)) < 1e-4


@pytest.mark.parametrize("template", [None, CHATML], ids=["no template", "chatml"])
def test_llama_cpp_asks_a_merged_file_as_minilora_does(template, tmp_path):
    """Also if the base's file has no chat template, where llama.cpp would take one of its own."""
    change, known = {"tokenizer.chat_template": template}, vocabulary()
    tokens = [*known, *(f"[PAD{i}]" for i in range(len(known), CONFIG.vocab_size))]  # llama.cpp wants one for each row
    base = write_gguf(tmp_path / "base.gguf", new_llama(), change=change, tokens=tokens)
    adapter = save_adapter(shaken(adapted(zoo.load(base)[0]), seed=1), tmp_path / "adapter")
    out = merge(base, adapter, tmp_path / "merged.gguf", kind="F32").path
    tokenizer, server = zoo.load_tokenizer(base), serving(out)
    for messages in (TALK[:2], TALK[:4], TALK[1:2]):
        prompt = answer_of(server, "apply-template", {"messages": messages})["prompt"]
        assert prompt == tokenizer.render(messages, answer_next=True)

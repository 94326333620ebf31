"""Shared by the parity tests: torch, transformers and PEFT, set up; models on both sides; and how results compare."""

import os
import re

import numpy as np
import pytest

from minilora.engine.tensor import no_grad
from minilora.models.folder import load_folder
from minilora.nn.families import config_to_json
from minilora.nn.optim import AdamW, clip_grad_norm

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
torch = pytest.importorskip("torch", reason="needs torch: pip install 'minilora[parity]'")
torch.set_num_threads(1)  # on few cores, its threads and those of NumPy's BLAS would keep each other waiting
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'minilora[parity]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'minilora[parity]'")

parity = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),  # between those libraries
    pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings.*:UserWarning"),  # what a tied head means for PEFT
]


def in_transformers(ours):
    """minilora's model in transformers: a LlamaConfig of the same numbers, and the same arrays, not copied."""
    config = transformers.LlamaConfig.from_dict(
        config_to_json(ours.config) | {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}
    )
    state = {name: torch.from_numpy(array) for name, array in ours.state_dict().items()}
    return transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state).eval()


def in_double(theirs, monkeypatch):
    """A model in float64 throughout: transformers computes norms and rotations in float32 by name."""
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    theirs = theirs.double()
    for module in theirs.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.__init__(theirs.config)
    return theirs


def logits_of(theirs, ids, **inputs):
    with torch.no_grad():
        return theirs(torch.from_numpy(ids), **inputs).logits.numpy()


def own_logits(ours, ids):
    with no_grad():
        return ours(ids).data


def loss_of(theirs, ids, labels):
    return theirs(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss


def distance(a, b):
    return float(np.abs(a - b).max())


# -- a small model on both sides ---------------------------------------------------------------------------------------

VOCAB = 96


def random_llama(**changes):
    """A small random model in transformers, whose every part shows in the logits, but for the norms."""
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(shape | changes))).eval()


def small_pair(folder, tied=True):
    """The same random model twice: transformers' own, and minilora's reading of what transformers saved."""
    theirs = random_llama(tie_word_embeddings=tied)
    theirs.save_pretrained(folder / "base")
    return theirs, load_folder(folder / "base")


def with_peft(theirs, **settings):
    return peft.get_peft_model(theirs, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))


def trained_by(theirs):
    """PEFT's trainable parameters under minilora's names."""
    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    ends = re.compile(r"^base_model\.model\.|(\.default)?(\.weight)?$")
    return {ends.sub("", name): p for name, p in named.items()}


def ranks_and_scales(theirs):
    """Of every module that PEFT adapts, by minilora's names."""
    return {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def text(rng, batch=2, length=15):
    return rng.integers(0, VOCAB, (batch, length))


def labelled(rng):
    ids = text(rng)
    labels = ids.copy()
    labels[0, :8] = labels[1, :3] = -100
    return ids, labels


def conversation(tokenizer):
    """A question and its answer, ids (1, T), and labels of the answer's tokens alone."""
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}], answer_next=True)
    ids = np.array([prompt + tokenizer.encode("The city of light.<|im_end|>")])
    labels = ids.copy()
    labels[:, : len(prompt)] = -100
    return ids, labels


def assert_same_gradients(got, wanted):
    """minilora's and torch's parameters, by name, have the same gradients."""
    assert got.keys() == wanted.keys()
    for name, p in wanted.items():
        grad = p.grad.numpy()
        np.testing.assert_allclose(got[name].grad, grad, rtol=1e-3, atol=2e-5 * np.abs(grad).max(), err_msg=name)


def assert_same_step(theirs, ours, rng):
    """One backward pass and one AdamW step give the same loss, gradients and weights. Returns the gradients."""
    ids, labels = labelled(rng)
    loss, expected = ours.loss(ids, labels), loss_of(theirs, ids, labels)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    got = {name.replace(".adapters.default.", "."): p for name, p in ours.trainable_parameters().items()}
    wanted = trained_by(theirs)
    assert_same_gradients(got, wanted)
    gradients = {name: p.grad.copy() for name, p in got.items()}
    # eps is large, because Adam's first step depends on the sign of a gradient even where that is a rounding error.
    settings = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}
    AdamW(ours.trainable_parameters(), **settings).step()
    torch.optim.AdamW(wanted.values(), **settings).step()
    for name, p in wanted.items():  # a step is 1e-2 long
        np.testing.assert_allclose(got[name].data, p.detach().numpy(), atol=1e-4, err_msg=name)
    return gradients


def assert_same_curves(theirs, ours, optimizer, reference, batches, steps=20, clip=None, rtol=1e-4):
    """The same steps on both sides have the same losses. batches: (ids, labels) in turn. Returns the losses."""
    got, wanted = [], []
    for step in range(steps):
        ids, labels = batches[step % len(batches)]
        loss, expected = ours.loss(ids, labels), loss_of(theirs, ids, labels)
        got.append(loss.item())
        wanted.append(expected.item())
        optimizer.zero_grad()
        reference.zero_grad()
        loss.backward()
        expected.backward()
        if clip is not None:
            trained = [p for p in theirs.parameters() if p.requires_grad]
            norms = clip_grad_norm(optimizer.parameters, clip), torch.nn.utils.clip_grad_norm_(trained, clip).item()
            assert norms[0] == pytest.approx(norms[1], rel=1e-2)
        optimizer.step()
        reference.step()
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=1e-5)
    return np.array(wanted)

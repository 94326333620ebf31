"""What the parity tests share: torch, transformers and PEFT, set up; a model's copy there; and how results compare."""

import os
from dataclasses import asdict

import numpy as np
import pytest

from minilora.engine.tensor import no_grad

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
    shape = asdict(ours.config)
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
    config = transformers.LlamaConfig(**shape, rope_parameters=rope, eos_token_id=2, bos_token_id=1, pad_token_id=2)
    state = {name: torch.from_numpy(array) for name, array in ours.state_dict().items()}
    return transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state).eval()


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

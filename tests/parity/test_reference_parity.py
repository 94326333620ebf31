"""minilora/reference.py against transformers and PEFT: the base's logits, and its adapter's, loaded from its folder."""

import numpy as np
from otherside import logits_of, loss_of, parity, peft, torch, transformers

import minilora as ml
from minilora import reference as ref
from minilora.models.load import TINY

pytestmark = parity


def test_transformers_computes_the_pages_logits_and_peft_its_adapter(tmp_path):
    model, tokenizer = ml.load("tiny")
    weights = {name: ref.Tensor(p.data) for name, p in model.named_parameters()}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids, labels = ref.batch_of([("What is a lease?", "A contract."), ("Who are you?", "No one")], tokenizer)
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(ref.llama(ids, weights, model.config).data, logits_of(theirs, ids), **close)

    lora = ref.LoRA(weights, r=4, alpha=12)
    losses = list(ref.train([(ids, labels)] * 4, weights, model.config, lora, lr=0.01))
    assert losses[-1] < losses[0]
    ref.save(lora, tmp_path / "adapter", "tiny")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    logits = ref.llama(ids[:, :-1], weights, model.config, lora)
    np.testing.assert_allclose(logits.data, logits_of(adapted, ids[:, :-1]), **close)
    loss = float(ref.cross_entropy(logits, labels=labels[:, 1:]).data)
    assert abs(loss - float(loss_of(adapted, ids, labels))) < 1e-5 < losses[0] - loss

"""The packaged tiny base is an ordinary Hugging Face folder: transformers reads all of it."""

import numpy as np
from otherside import logits_of, parity, torch, transformers

import minilora as ml
from minilora.io.zoo import TINY

pytestmark = parity

TEXT = "My fellow citizens — in 1862 the “Union” was, é and \x01 included, at war."
CHAT = [{"role": "user", "content": "What did President Lincoln say in 1862?"}]


def test_transformers_reads_the_tiny_base_as_minilora_does():
    model, tokenizer = ml.load("tiny")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer.encode(TEXT)
    assert words(TEXT)["input_ids"] == ids
    assert words.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == tokenizer.render(CHAT, True)
    assert (words.eos_token_id, words.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    ids = np.array([ids])
    np.testing.assert_allclose(model(ids).data, logits_of(theirs, ids), rtol=1e-4, atol=1e-4)

"""The packaged tiny base is an ordinary Hugging Face folder: transformers reads all of it, PEFT an adapter for it."""

import json
import re

import numpy as np
from modelfiles import TERMS
from otherside import logits_of, parity, peft, torch, transformers

import minilora as ml
from minilora.models.load import TINY

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


def test_transformers_writes_the_same_answer_under_a_repetition_penalty():
    model, tokenizer = ml.load("tiny")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = tokenizer.encode_chat(CHAT, answer_next=True)
    answers = []
    for penalty in (1.0, 1.1, 1.5):
        settings = {"do_sample": False, "max_new_tokens": 40, "repetition_penalty": penalty}
        (written,) = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **settings)
        answers.append(ml.generate(model, tokenizer, CHAT, 40, repetition_penalty=penalty))
        assert answers[-1] == tokenizer.decode(written[len(ids) :].tolist()).strip()
    assert len(set(answers)) == 3


def test_peft_reads_what_an_adapter_says_of_its_base_and_the_card_says_how_to_load_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, TERMS)), encoding="utf-8")
    ml.finetune(ml.Options(base="tiny", data="mine.jsonl", steps=4, lr=0.02, out="runs/mine"))
    assert peft.PeftConfig.from_pretrained("runs/mine").base_model_name_or_path == "tiny"
    card = (tmp_path / "runs" / "mine" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    question = "What is 1?"
    capsys.readouterr()
    exec(code.replace('"..."', repr(question)), {})
    printed = capsys.readouterr().out
    model, tokenizer = ml.load("tiny")
    ml.load_adapter(model, "runs/mine")
    assert printed.strip() == ml.generate(model, tokenizer, question, max_new_tokens=128).strip() != ""

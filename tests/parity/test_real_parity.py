"""Parity on the real model: SmolLM2-135M-Instruct here and in transformers, from the same GGUF file.

transformers reads the file with its own code, so that a mistake in dequantising, in the rotary layout or in the
tokenizer shows. A second copy gets its weights from minilora's state dict.
"""

import numpy as np
import pytest
from otherside import (
    assert_same_curves,
    conversation,
    distance,
    in_transformers,
    loss_of,
    own_logits,
    parity,
    peft,
    torch,
    transformers,
)
from tokenizers import Regex, Tokenizer, pre_tokenizers

from minilora.engine.tensor import no_grad
from minilora.lora.adapters import add_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.models import load as zoo
from minilora.nn.families import FAMILIES
from minilora.nn.llama import Llama
from minilora.nn.optim import AdamW

pytestmark = [pytest.mark.real, *parity]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHATS = {
    "one question": QUESTION,
    "a system line of its own": [{"role": "system", "content": "Answer in one word."}, *QUESTION],
    "several turns": [
        *QUESTION,
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Peru?"},
    ],
    "line breaks, code and digits": [{"role": "user", "content": "Add 12 and 345:\n\n```python\nx = 12 + 345\n```\n"}],
    "no content": [{"role": "user", "content": ""}],
}
TEXTS = [
    "",
    "The court held that the clause was void.",
    "  two spaces, a tab\tand\r\n\n\nthree line breaks  ",
    "In 1984, 3.14159 x 20 = 62.8318; call +44 20 7946 0958, or 007",
    "don't we'll they've I'M YOU'RE it''s",
    "naïve café — “quotes” …, Ünïcödé, 日本語のテキスト, Привет, مرحبا",
    "🙂👩‍👩‍👧 \N{NO-BREAK SPACE}\u200b\ufeffend",
    "def f(x):\n    return x**2  # squares\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><file_sep>",
    "< |im_start| > <|im_start <repo_name>",
    "aaaaaaaaaaaaaaaaaaaaaaaa" * 4,
]
# split off before anything else
NUMERALS = ["a  7", "x =   12\n\n  3", "½ cup, 10² m, ²3", "chapter Ⅳ, ٣ and ४२", "a²b½c"]


@pytest.fixture(scope="module")
def file():
    path = zoo.find("smollm2")
    if path is None:
        pytest.skip("needs the real model: minilora pull smollm2")
    return path


@pytest.fixture(scope="module")
def reference(file):
    """transformers' own reading of the GGUF file, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def words(file):
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def ids_of(tokenizer, chat):
    return np.array([tokenizer.encode_chat(CHATS[chat], answer_next=True)])


# -- the model ---------------------------------------------------------------------------------------------------------


def test_the_shape_read_from_the_file_is_the_one_transformers_reads(smollm2, reference):
    ours, _ = smollm2
    theirs = reference.config
    for name in (field.name for field in FAMILIES["llama"].fields if field.name != "rope_scaling"):
        value = getattr(ours.config, name)
        expected = theirs.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(theirs, name)
        assert value == pytest.approx(expected, rel=1e-6), name


def test_every_weight_equals_transformers_reading_of_the_file(smollm2, reference):
    ours, _ = smollm2
    got, expected = ours.state_dict(), dict(reference.named_parameters())
    assert got.keys() == expected.keys()
    for name, array in got.items():
        np.testing.assert_array_equal(array, expected[name].detach().numpy(), err_msg=name)


def test_logits_and_loss_equal_transformers_with_these_very_weights(smollm2):
    ours, tokenizer = smollm2
    theirs = in_transformers(ours)
    ids = ids_of(tokenizer, "one question")
    ids = np.concatenate([ids, ids[:, ::-1]])
    labels = ids.copy()
    labels[0, :20] = labels[1, 10:15] = -100
    with torch.no_grad(), no_grad():
        expected = theirs(torch.from_numpy(ids), labels=torch.from_numpy(labels))
        loss = ours.loss(ids, labels)
    assert distance(own_logits(ours, ids), expected.logits.numpy()) < 1e-3
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_the_greedy_answer_is_transformers_answer(smollm2, reference):
    ours, tokenizer = smollm2
    ids = ids_of(tokenizer, "one question")
    settings = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=2)
    prompt = torch.from_numpy(ids)
    expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    cache, new, answer = ours.new_cache(1, ids.shape[1] + 8), ids, []
    with no_grad():
        while len(answer) < 8 and tokenizer.eos_id not in answer:
            new = ours(new, cache, last=True).data.argmax(axis=-1)  # (1, 1)
            answer.append(new.item())
    assert answer == expected[0, ids.shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(answer)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_and_text_equal_transformers(text, smollm2, words):
    _, tokenizer = smollm2
    ids = tokenizer.encode(text)
    assert ids == words(text)["input_ids"]
    assert tokenizer.decode(ids) == words.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", [*TEXTS, *NUMERALS])
def test_numerals_are_split_off_by_llama_cpp_s_rule(text, smollm2, words):
    """llama.cpp splits at every \\p{N}, then as GPT-2 does. transformers forgets the former when it reads a GGUF."""
    _, tokenizer = smollm2
    core = Tokenizer.from_str(words.backend_tokenizer.to_str())
    apart = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([apart, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert tokenizer.encode(text) == core.encode(text, add_special_tokens=False).ids


def test_special_tokens_equal_transformers(smollm2, words):
    _, tokenizer = smollm2
    assert len(tokenizer) == len(words)
    assert (tokenizer.eos, tokenizer.eos_id, tokenizer.bos) == (words.eos_token, words.eos_token_id, words.bos_token)
    assert tokenizer.pad_id == words.pad_token_id


@pytest.mark.parametrize("answer_next", [False, True])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
def test_conversations_equal_transformers_chat_template(chat, answer_next, smollm2, words):
    _, tokenizer = smollm2
    expected = words.apply_chat_template(chat, add_generation_prompt=answer_next, tokenize=False)
    assert tokenizer.render(chat, answer_next) == expected
    ids = words.apply_chat_template(chat, add_generation_prompt=answer_next, return_dict=False)
    assert tokenizer.encode_chat(chat, answer_next) == ids


# -- training ----------------------------------------------------------------------------------------------------------


def copy_of(model):
    copied = Llama.empty(model.config)
    copied.load_state_dict({name: array.copy() for name, array in model.state_dict().items()})
    return copied


@pytest.mark.parametrize("which", ["LoRA", "DoRA", "full"])
def test_training_steps_give_the_losses_of_peft_and_torch(which, smollm2, tmp_path):
    """The same data, the same start, AdamW on both sides: three losses, each within a relative 1e-3."""
    shared, tokenizer = smollm2
    theirs = in_transformers(shared)
    ours, lr = copy_of(shared), 4e-5
    if which != "full":
        lr = 2e-3
        add_adapter(ours, LoraConfig(r=8, lora_alpha=16, use_dora=which == "DoRA"), seed=0)
        theirs = peft.PeftModel.from_pretrained(theirs, save_adapter(ours, tmp_path), is_trainable=True)
    ids, labels = conversation(tokenizer)
    settings = {"lr": lr, "eps": 1e-6, "weight_decay": 0.01}
    optimizer = AdamW(ours.trainable_parameters(), **settings)
    reference = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **settings)
    losses = assert_same_curves(theirs, ours, optimizer, reference, [(ids, labels)], steps=3, rtol=1e-3)
    assert losses[-1] < 0.8 * losses[0]
    if which != "full":  # and what PEFT has trained comes back
        theirs.save_pretrained(tmp_path / "back")
        ours = copy_of(shared)
        load_adapter(ours, tmp_path / "back")
        assert ours.loss(ids, labels).item() == pytest.approx(loss_of(theirs, ids, labels).item(), abs=1e-4)

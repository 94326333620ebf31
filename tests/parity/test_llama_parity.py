"""Parity with transformers: a Llama saved there gives the same numbers here, forward and backward."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from modelfiles import new_tokenizer
from otherside import (
    assert_same_gradients,
    distance,
    labelled,
    logits_of,
    loss_of,
    parity,
    random_llama,
    small_pair,
    text,
    torch,
    transformers,
)

from minilora.engine.attention import Packing
from minilora.engine.tensor import no_grad
from minilora.files.gguf import to_pairs
from minilora.models import load as zoo
from minilora.models.folder import load_folder
from minilora.nn.llama import Llama

pytestmark = parity

SHAPES = {
    "grouped queries": {},
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads as query heads": {"num_key_value_heads": 4},
    "untied head": {"tied": False},
    "heads wider than C/H": {"head_dim": 12},
    "heads narrower than C/H": {"head_dim": 4, "tied": False},
    "another rotary base": {"rope_theta": 100000.0},
    "a large epsilon": {"rms_norm_eps": 0.1},
    "three query heads per key, odd sizes": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1,
                                             "intermediate_size": 45, "num_hidden_layers": 3},
}  # fmt: skip
both = partial(small_pair, norms=0.5)  # with norms of 1, an omitted norm would go unseen
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@every_shape
def test_logits_equal_transformers(shape, tmp_path, rng):
    theirs, ours = both(tmp_path, **shape)
    ids = text(rng)
    expected = logits_of(theirs, ids)
    assert expected.std() > 0.3  # else the tolerance below would prove little
    assert distance(ours(ids).data, expected) < 1e-4


@every_shape
def test_loss_and_every_gradient_equal_transformers(shape, tmp_path, rng):
    theirs, ours = both(tmp_path, **shape)
    ids, labels = labelled(rng)
    expected = loss_of(theirs, ids, labels)
    expected.backward()
    loss = ours.loss(ids, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def test_sequences_packed_in_one_row_have_the_loss_and_gradients_of_separate_rows(tmp_path, rng):
    theirs, ours = both(tmp_path)
    prefix, rests = text(rng, 1, 5), [text(rng, 1, length) for length in (6, 9, 2)]
    expected, scored = 0.0, 0
    for rest in rests:
        ids = torch.from_numpy(np.concatenate([prefix, rest], axis=1))
        labels = ids.clone()
        labels[:, :6] = -100  # the prefix, and the first token of the rest
        expected += theirs(ids, labels=labels).loss * (rest.shape[1] - 1)
        scored += rest.shape[1] - 1
    (expected / scored).backward()
    ids = np.concatenate([prefix, *rests], axis=1)
    labels = ids.copy()
    labels[:, [*range(6), 11, 20]] = -100
    loss = ours.loss(ids, labels, packing=Packing(prefix=5, ends=(11, 20, 22)))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item() / scored, rel=1e-5)
    assert_same_gradients(dict(ours.named_parameters()), dict(theirs.named_parameters()))


@pytest.mark.parametrize("mistake", ["rotary pairs left adjacent", "another rotary base"])
def test_the_comparison_notices_a_planted_mistake(mistake, tmp_path, rng):
    theirs, ours = both(tmp_path)
    state = ours.state_dict()
    if mistake == "another rotary base":
        wrong = Llama(replace(ours.config, rope_theta=500.0))
    else:
        wrong = Llama(ours.config)
        heads = {"q_proj": ours.config.num_attention_heads, "k_proj": ours.config.num_key_value_heads}
        state = {key: to_pairs(w, heads[key.split(".")[-2]]) if key.split(".")[-2] in heads else w
                 for key, w in state.items()}  # fmt: skip
    wrong.load_state_dict(state)
    ids = text(rng)
    assert distance(wrong(ids).data, logits_of(theirs, ids)) > 1e-2


def test_a_checkpoint_in_bfloat16_and_in_several_files_loads_the_same(tmp_path, rng):
    random_llama().to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = text(rng)
    assert distance(load_folder(tmp_path)(ids).data, logits_of(theirs, ids)) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_a_state_dict_is_a_transformers_checkpoint(tied, tmp_path, rng):
    _, ours = both(tmp_path, tied, seed=1)
    state = {name: torch.from_numpy(array) for name, array in ours.state_dict().items()}
    other = random_llama(seed=2, tie_word_embeddings=tied)
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if tied else [])
    ids = text(rng)
    assert distance(ours(ids).data, logits_of(other, ids)) < 1e-4


def test_generating_with_a_cache_and_left_padding_equals_transformers(tmp_path, rng):
    theirs, ours = both(tmp_path)
    ids, first = text(rng, batch=2, length=12), np.array([0, 5])  # the second prompt is five tokens shorter
    real = np.arange(12) >= first[:, None]  # (B, T)
    positions = torch.from_numpy(np.maximum(np.arange(12) - first[:, None], 0))
    expected = logits_of(theirs, ids, attention_mask=torch.from_numpy(real.astype(np.int64)), position_ids=positions)
    cache = ours.new_cache(2, 12, first)
    with no_grad():
        parts = [ours(ids[:, :8], cache)] + [ours(ids[:, t : t + 1], cache) for t in range(8, 12)]
    got = np.concatenate([part.data for part in parts], axis=1)
    assert distance(got[real], expected[real]) < 1e-4


def test_greedy_decoding_picks_the_tokens_that_transformers_picks(tmp_path, rng):
    theirs, ours = both(tmp_path)
    ids = text(rng, batch=1, length=6)
    settings = transformers.GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = theirs.generate(torch.from_numpy(ids), attention_mask=torch.ones(1, 6), generation_config=settings)
    cache, new = ours.new_cache(1, 26), ids
    with no_grad():
        for _ in range(20):
            new = ours(new, cache, last=True).data.argmax(axis=-1)  # (1, 1)
            ids = np.concatenate([ids, new], axis=1)
    assert ids.tolist() == expected.tolist()


def test_a_whole_folder_with_its_tokenizer_loads_by_path(tmp_path):
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=new_tokenizer().core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    words.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    words.save_pretrained(tmp_path)
    theirs = random_llama(vocab_size=len(words))
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = zoo.load(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (words.eos_token_id, words.pad_token_id)
    line = "hello, hélló  <|im_end|>\n"
    ids = tokenizer.encode(line)
    assert ids == words(line)["input_ids"]
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hell"}]
    for answer_next in (False, True):
        expected = words.apply_chat_template(chat, add_generation_prompt=answer_next, return_dict=False)
        assert tokenizer.encode_chat(chat, answer_next) == expected
    assert distance(ours(np.array([ids])).data, logits_of(theirs, np.array([ids]))) < 1e-4

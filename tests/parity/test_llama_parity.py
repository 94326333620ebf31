"""What transformers saves of a Llama is read: bfloat16 in several files, and the tokenizer."""

import numpy as np
from modelfiles import new_tokenizer
from otherside import distance, logits_of, parity, random_llama, text, torch, transformers

from minilora.models import load as zoo
from minilora.models.folder import load_folder

pytestmark = parity


def test_a_checkpoint_in_bfloat16_and_in_several_files_loads_the_same(tmp_path, rng):
    random_llama().to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = text(rng)
    assert distance(load_folder(tmp_path)(ids).data, logits_of(theirs, ids)) < 1e-4


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

# %% [markdown]
# # Exercises 6: from text to a batch
#
# You write three functions that belong to [lesson 6](../06_what_the_model_reads.ipynb): they make tokens, labels and a
# batch. Plain Python is enough for the first two. Replace `raise NotImplementedError`, run the cell, then run the
# check below it.
#
# | name | what it is |
# |---|---|
# | `merges` | pairs of tokens, in the order in which the tokenizer learned them |
# | `input_ids` | the tokens of a sequence, as integers |
# | `labels` | the same integers, and -100 where a token is not scored |
# | `eos_id` | the id of the end token |
# | `pad_id` | the id of the padding token |

# %%
import numpy as np

import minilora as ml
from minilora.models import bpe, hub

# %% [markdown]
# ## 6.1 Encode a word
#
# Begin with the characters of the word as tokens. Then apply the merges in their order: each merge joins its pair
# everywhere in the word, from left to right, before the next merge is applied. A token that a merge has just made is
# not joined again by the same merge. Return the list of tokens that remain.


# %% points=3
def encode_word(word, merges):
    """word a text, merges [(left, right), ...] in the order in which they were learned -> tokens, a list of texts"""


# %% [markdown]
# ## 6.2 Ids and labels of a conversation
#
# `turns` is a conversation whose parts are already encoded: a list of (role, header, content). `role` is "system",
# "user" or "assistant"; `header` holds the ids that begin a turn, and `content` those of the message. In the sequence
# each turn is its header, its content, and the end token.
#
# Return `input_ids` and `labels`, two lists of equal length. Every answer is scored: the model must produce its
# content, and must stop after it. The model's loss shifts the labels. If the sequence has more than `max_length`
# tokens, keep the first `max_length` of both lists.


# %% points=3
def ids_and_labels(turns, eos_id, max_length):
    """turns [(role, header, content), ...] -> input_ids, labels: two lists of at most max_length integers"""


# %% [markdown]
# ## 6.3 A padded batch
#
# Put samples of different lengths into one array each for ids and labels. T is the length of the longest sample; the
# others are padded on the right. Padding must not be scored. The third array, `attention_mask`, is 1 for each token of
# a sample and 0 for padding. Be careful: as in many models, `pad_id` is also the id of the end token.


# %% points=2
def padded_batch(samples, pad_id):
    """samples [(ids, labels), ...] of lists -> input_ids (B, T), labels (B, T), attention_mask (B, T), all integers"""


# %% [markdown]
# ## Your functions and minilora's
#
# You need to write nothing here. The cell below runs your functions on the tiny base's tokenizer and on the records
# about law, and compares the results with those of minilora's own functions:


# %%
def compare_mine():
    """Compare my functions with minilora's on the records about law."""
    _, tokenizer = ml.load("tiny")
    text = ml.read_records("legal")[0].messages[-1]["content"]
    merges = list(bpe.BytePairs.from_file(str(hub.TINY / "tokenizer.json")).ranks)  # pairs, the first one learned first
    words = ["".join(bpe.SYMBOLS[byte] for byte in word.encode()) for word in bpe.words(text)]
    mine = [tokenizer.core.token_to_id(token) for word in words for token in encode_word(word, merges)]
    print("the same tokens:", mine == tokenizer.encode(text))

    samples = ml.encode_records(ml.read_records("legal"), tokenizer)
    pairs = []
    for record in ml.read_records("legal"):
        heads = [f"<|im_start|>{message['role']}\n" for message in record.messages]
        heads[1:] = ["\n" + head for head in heads[1:]]  # the template puts a new line after each end token
        turns = [
            (message["role"], tokenizer.encode(head), tokenizer.encode(message["content"]))
            for head, message in zip(heads, record.messages, strict=True)
        ]
        pairs.append(ids_and_labels(turns, tokenizer.eos_id, 512))
    same = [
        ids == list(s.ids[:-1]) and labels == list(s.labels[:-1])
        for (ids, labels), s in zip(pairs, samples, strict=True)
    ]
    print(f"the same ids and labels: {sum(same)} of {len(same)} records (without the last new line)")

    input_ids, labels, _ = padded_batch([(list(s.ids), list(s.labels)) for s in samples[:8]], tokenizer.pad_id)
    theirs = ml.collate(samples[:8], tokenizer.pad_id)
    print("the same batch:", np.array_equal(input_ids, theirs[0]) and np.array_equal(labels, theirs[1]))


try:
    compare_mine()
except NotImplementedError:
    print("write 6.1, 6.2 and 6.3 first, then run this cell again")

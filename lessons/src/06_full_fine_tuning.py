# %% [markdown]
# # Lesson 6: What does full fine-tuning cost?
#
# A pretrained model can be taught something new by training it further on other texts. In **full fine-tuning** every
# one of its numbers moves. That is the plain way, and it works. This lesson does it with a loop of its own and draws up
# the bill: bytes while it trains, bytes for each new model, and what the model forgets. Lesson 8 will try to pay less.
#
# The model is minilora's tiny one, which has read presidents' addresses. The new subject is law: short records in
# [`legal.jsonl`](../minilora/data/README.md), each with a question about one term and an answer.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, show
from minilora.measure.ledger import ledger
from minilora.models.load import TINY
from minilora.nn.parts import pack
from minilora.pages.style import FULL, LORA, ink

model, tokenizer = ml.load("tiny")
before = {name: array.copy() for name, array in ml.base_state(model).items()}  # to begin again from here
records = ml.split_records(ml.read_records("legal"))
law = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
old = ml.encode_text((TINY / "validation.txt").read_text(encoding="utf-8"), tokenizer, max_length=256)[::2]
print({split: len(part) for split, part in law.items()})
for message in records["train"][0].messages:
    print(f"{message['role']}: {message['content']}")

# %% [markdown]
# ## 1. What is scored
#
# The loss is the mean of $-\ln p$, where p is the probability that the model gave to the token that really came next. A
# loss of 3 means $e^{-3}$, about 1 in 20. But next to what? The model should learn to answer, not to ask. So a record
# becomes two rows: `ids`, the tokens, and `labels`, the same tokens with -100 where nothing is to be learned.

# %%
sample = law["train"][0]
asked = tokenizer.decode([i for i, label in zip(sample.ids, sample.labels, strict=True) if label == -100])
scored = tokenizer.decode([label for label in sample.labels if label != -100])
print("not scored:", repr(asked))
print("scored:    ", repr(scored))
share = np.mean([s.scored / len(s.ids) for s in law["train"]])
print(f"of all tokens, {100 * share:.0f} % are scored")

# %% [markdown]
# The mark that ends an answer is scored as well: a model that never learns to stop talks on forever.
#
# ## 2. The loop
#
# Training is five lines, again and again: take some samples, forget the old gradients, compute the loss, go back
# through the graph (lesson 2), move every number a little against its gradient. The moving is left to **AdamW**. It
# keeps two running means for each parameter, of its gradient and of its square, and divides one by the root of the
# other, so that every number moves at its own scale. `lr`, the learning rate, says how far. (Lesson 3 writes it out;
# nothing more is needed here.)
#
# > **Predict.** The loss on law is about 4.1 before training, and 240 records are not much. Where is it after 20 steps
# > of eight records each? And the loss on the old subject, of which the model sees nothing now: does it fall, stay, or
# > rise?


# %%
def losses():
    return ml.mean_loss(model, law["validation"]), ml.mean_loss(model, old)


def again():
    """Put the pretrained numbers back; as copies, for the optimizer changes arrays in place."""
    model.load_state_dict({name: array.copy() for name, array in before.items()})


def train(lr, seed, steps=20):
    """Train whatever is trainable; returns (law, old) losses, on held-out texts, after 0, 5, 10 and 20 steps."""
    optimizer = ml.AdamW(model.trainable_parameters(), lr=lr, weight_decay=0)
    rng = np.random.default_rng(seed)
    path = [start]
    for step in range(steps):
        batch = pack([law["train"][i] for i in rng.choice(len(law["train"]), 8, replace=False)])  # eight in one row
        optimizer.zero_grad()
        ml.loss_and_grad(model, batch.input_ids, batch.labels, batch.packing)  # loss and backward at once
        optimizer.step()
        if step + 1 in (5, 10, 20):
            path.append(losses())
    return np.array(path)


start, paths = losses(), {}
for seed in range(3):
    again()
    paths[1e-3, seed] = train(1e-3, seed)
for (_, seed), path in paths.items():
    print(f"seed {seed}: law {path[0, 0]:.2f} -> {path[-1, 0]:.2f}   old {path[0, 1]:.2f} -> {path[-1, 1]:.2f}")
falls = [path[0, 0] - path[-1, 0] for path in paths.values()]
rises = [path[-1, 1] - path[0, 1] for path in paths.values()]
claim("law falls by at least", min(falls), 0.6, 1.0)
claim("old rises by at least", min(rises), 0.2, 0.9)
claim("old rises by at most", max(rises), 0.2, 0.9)

# %% [markdown]
# It works: terms of law that the model never saw become much likelier. And it costs something that no error message
# tells: the model has become worse at what it could do before. This is called **forgetting**. Nothing in the loss asked
# it to keep the presidents, and every number was free to move.
#
# ## 3. The price of a step
#
# > **Predict.** Same loop, three learning rates: a third of the one above, the one above, three times as much. Which
# > one ends lowest on law? Which forgets least? Is it the same one? And would a model forget less if all its numbers
# > were frozen, and only a few new ones beside them learned? That is LoRA, the subject of lesson 8; here it runs once.

# %%
again()
paths[3e-4, 0] = train(3e-4, 0)
again()
paths[3e-3, 0] = train(3e-3, 0)
again()
ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="lora", seed=0)
lora = train(2e-3, 0)  # the same loop: what is trainable is now the adapter alone
ml.remove_adapter(model, "lora")

figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
for lr, marker, style in [(3e-4, "s", ":"), (1e-3, "o", "-"), (3e-3, "^", "--")]:
    x, y = paths[lr, 0].T
    axes.plot(x, y, color=FULL, marker=marker, linestyle=style, linewidth=2)
    axes.annotate(f"all, lr {lr:g}", (x[-1], y[-1]), (-8, 0), textcoords="offset points", ha="right", color=ink(FULL))
axes.plot(*lora.T, color=LORA, marker="D", linewidth=2)
axes.annotate("LoRA, lr 0.002", lora[-1], (0, -27), textcoords="offset points", color=ink(LORA))
axes.annotate("before training", paths[1e-3, 0][0], (0, -14), textcoords="offset points", ha="right")
axes.set(xlabel="loss on law, terms never seen (nats per token)", ylabel="loss on presidents (nats)")
axes.set(xlim=(3.2, 4.2), ylim=(2.95, None))
show(figure, alt="Four paths from one point to the left and up: with a higher learning rate they climb more steeply.")
for lr in (3e-4, 1e-3, 3e-3):
    print(f"all,  lr {lr:<6g}: law {paths[lr, 0][-1, 0]:.2f}, old {paths[lr, 0][-1, 1]:.2f}")

# %% [markdown]
# *How to read it.* Each path begins at the lower right, and its marks are 5, 10 and 20 steps on. To the left is better
# on law, up is worse on presidents. The best place would be far left and low; no path leads there.
#
# Along each path, what is learned and what is forgotten rise together, and the learning rate sets the price. The
# highest rate here is worst at both: it ends higher on law than the others. The lowest forgets least and learns less in
# 20 steps. So "it forgot" says little by itself; compare at the same loss on the new subject.
#
# Does LoRA forget less, compared like this? We read off the path of the lowest rate, where all numbers learned, at the
# law loss at which LoRA ended.

# %%
slow = paths[3e-4, 0][::-1]  # from low law losses to high ones, as np.interp wants it
at_same_law = np.interp(lora[-1, 0], slow[:, 0], slow[:, 1])
print(f"at a law loss of {lora[-1, 0]:.2f}: old {at_same_law:.2f} with all numbers, {lora[-1, 1]:.2f} with LoRA")
claim("LoRA forgot more, by", lora[-1, 1] - at_same_law, -0.03, 0.08)

# %% [markdown]
# No: on this small model it forgot about as much. The paper [LoRA Learns Less and Forgets
# Less](https://arxiv.org/abs/2405.09673) found that it forgets less, with Llama-2-7B on code and mathematics. Ours is
# thousands of times smaller, and one rate and one rank were tried: try `train(5e-3, 0)` as well. What a frozen base
# does give, always, is a way back: take the adapter off, and the old model is there, to the bit. After full fine-tuning
# it is gone, unless a copy was kept.
#
# ## 4. The bill in bytes
#
# > **Predict.** A float32 number takes 4 bytes. How many bytes must be in memory for each parameter while AdamW trains
# > it?

# %%
model, _ = ml.load("tiny")  # a new one: since the adapter, the old one's numbers are frozen
optimizer = ml.AdamW(model.trainable_parameters(), lr=1e-3)
batch = pack(law["train"][:8])
loss = model.loss(batch.input_ids, batch.labels, batch.packing)
activations = ledger(model, optimizer, loss).activations  # what operations keep for the way back
loss.backward()
held = ledger(model, optimizer)  # what is there now, found by following every reference
count = ml.count_parameters(model).total
for owner in ("weights", "gradients", "moments"):
    print(f"{owner:<10} {getattr(held, owner):>12,} bytes, {getattr(held, owner) / count:.1f} per parameter")
claim("bytes per parameter", (held.weights + held.gradients + held.moments) / count, 15.84, 16.16)
print(f"and for the way back {activations:,} bytes, for the {batch.input_ids.size} tokens of this batch")

# %% [markdown]
# Four for the number itself, four for its gradient, and eight for the two running means of AdamW (its *moments*). What
# operations keep for the way back, the activations, comes on top. It grows with the tokens that are computed at once;
# lesson 12 is about it.
#
# Sixteen bytes do not sound like much. But a model that just fits into memory to be *used* takes four, so training it
# needs four times as much, before the first token. For SmolLM2-135M:

# %%
smollm2 = 134_515_008  # counted in lesson 5
print(f"to use it {4 * smollm2 / 1e6:,.0f} MB, to train it {16 * smollm2 / 1e6:,.0f} MB and activations")
print(f"ten subjects, ten models to keep: {10 * 4 * smollm2 / 1e6:,.0f} MB")

# %% [markdown]
# And the result of full fine-tuning is a whole model. Each subject needs its own, and they share nothing.
#
# ## What to remember
#
# - Score the answers alone; the label -100 says what is not scored.
# - A step: forget old gradients, loss, backward, optimizer. With AdamW it holds 16 bytes per parameter, and
#   activations.
# - A model trained on something new forgets. Measure the old loss beside the new one, or you will not see it.
# - The learning rate sets the price. Compare ways of training at the same loss on the new subject.
# - Each fine-tuned model is a whole model to keep.
#
# ## Where it stands
#
# [`fit`](../minilora/train/loop.py) is the loop that minilora's jobs use, with a rate that rises and falls and a limit
# on the gradient's length; [`loss_and_grad`](../minilora/nn/step.py) computes a batch in parts;
# [`AdamW`](../minilora/nn/optim.py); [`ledger`](../minilora/measure/ledger.py) counts what is held;
# [`encode_record`](../minilora/data/samples.py) makes ids and labels.
#
# **Now you:** [exercises 6](exercises/06_full_fine_tuning.ipynb): the loss of answers, the bytes of any optimizer, and
# a step on a batch that does not fit.
#
# ## Sources
#
# - Less forgetting with LoRA, on Llama-2-7B, code and mathematics:
#   [Biderman et al. 2024](https://arxiv.org/abs/2405.09673).
# - AdamW: [Loshchilov and Hutter 2019](https://arxiv.org/abs/1711.05101).

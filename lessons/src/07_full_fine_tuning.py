# %% [markdown]
# # Lesson 7: What does full fine-tuning cost?
#
# A pretrained model can be taught something new by training it further on other texts. In **full fine-tuning** all of
# its parameters are trainable. This is the simplest method, and it works. This lesson writes a training loop and adds
# up the costs: memory during training, storage for each new model, and what the model forgets. Lesson 9 shows how LoRA
# reduces these costs.
#
# The model is minilora's tiny one, which was pretrained on presidents' addresses. The new subject is law: the records
# in [`legal.jsonl`](../minilora/data/README.md) each contain a question about one term and its answer. They are split
# into a training set, a **validation set** and a **test set**. The model is never trained on the last two. If the loss
# on the validation set rises while the training loss falls, the model is **overfitting**.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.measure.ledger import ledger
from minilora.models.load import TINY
from minilora.nn.parts import pack
from minilora.pages.style import FULL, LORA

model, tokenizer = ml.load("tiny")
before = {name: array.copy() for name, array in ml.base_state(model).items()}  # to start again from here
records = ml.split_records(ml.read_records("legal"))
law = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
old = ml.encode_text((TINY / "validation.txt").read_text(encoding="utf-8"), tokenizer, max_length=256)[::2]
print({split: len(part) for split, part in law.items()})
for message in records["train"][0].messages:
    print(f"{message['role']}: {message['content']}")

# %% [markdown]
# ## 1. What is scored
#
# The loss is the **cross-entropy**: the mean of $-\ln p$, where p is the probability that the model gave to the token
# that really came next. Its unit is the **nat**. A loss of 3 nats means a typical probability of $e^{-3}$, about one in
# 20. ($e$ to the power of the loss, here 20, is called the **perplexity**.) Only the answers are scored: lesson 6
# showed how a record becomes `ids` and `labels`, with -100 at every token that is not scored.

# %%
sample = law["train"][0]
asked = tokenizer.decode([i for i, label in zip(sample.ids, sample.labels, strict=True) if label == -100])
scored = tokenizer.decode([label for label in sample.labels if label != -100])
print("not scored:", repr(asked))
print("scored:    ", repr(scored))
share = np.mean([s.scored / len(s.ids) for s in law["train"]])
print(f"of all tokens, {100 * share:.0f} % are scored")

# %% [markdown]
# The end token of an answer is scored as well, so that the model learns to stop. You do not see it: `decode` leaves out
# special tokens. (The second line break follows the end token, and is not scored.)
#
# ## 2. The training loop
#
# A training step has five parts: draw a **batch** of records, clear the old gradients, compute the loss (the **forward
# pass**), compute the gradients (the **backward pass**, lesson 2), and change every parameter a little against its
# gradient. The **learning rate**, `lr`, by which each change is multiplied, sets how little. The last part is the work
# of the optimizer, **AdamW**. For each parameter AdamW keeps two running means, of the gradient and of the squared
# gradient. It divides the first mean by the square root of the second, so that a parameter with small gradients moves
# as far as one with large gradients. (Lesson 3 writes it out.) Choices such as the learning rate, the **batch size**
# and the number of steps are **hyperparameters**.
#
# > **Predict.** The loss on law is about 4.1 before training. The batch size is 8, and the training set has 240
# > records, so one **epoch** is 30 steps. By how much does the loss on law fall in 20 steps, with the seed where it
# > falls least? And does the loss on the old subject, which is no longer trained, fall, stay or rise?

# %%
predict("loss on law falls by at least")
predict("loss on the old subject: change, lowest of the seeds")

# %%
SEEDS = range(3)  # in the browser: range(1)


def losses():
    return ml.mean_loss(model, law["validation"]), ml.mean_loss(model, old)


def again():
    """Restore the pretrained parameters, as copies: the optimizer changes arrays in place."""
    model.load_state_dict({name: array.copy() for name, array in before.items()})


def train(lr, seed, steps=20):
    """Train the trainable parameters; return the losses (law, old) on validation sets after 0, 5, 10 and 20 steps."""
    optimizer = ml.AdamW(model.trainable_parameters(), lr=lr, weight_decay=0)
    rng = np.random.default_rng(seed)
    path = [start]
    for step in range(steps):
        batch = pack([law["train"][i] for i in rng.choice(len(law["train"]), 8, replace=False)])  # in one row
        optimizer.zero_grad()
        ml.loss_and_grad(model, batch.input_ids, batch.labels, batch.packing)  # forward and backward pass
        optimizer.step()
        if step + 1 in (5, 10, 20):
            path.append(losses())
    return np.array(path)


start, paths = losses(), {}
for seed in SEEDS:
    again()
    paths[1e-3, seed] = train(1e-3, seed)
for (_, seed), path in paths.items():
    print(f"seed {seed}: law {path[0, 0]:.2f} -> {path[-1, 0]:.2f}   old {path[0, 1]:.2f} -> {path[-1, 1]:.2f}")
falls = [path[0, 0] - path[-1, 0] for path in paths.values()]
rises = [path[-1, 1] - path[0, 1] for path in paths.values()]
claim("loss on law falls by at least", min(falls), 0.6, 1.0)
claim("loss on the old subject: change, lowest of the seeds", min(rises), 0.2, 0.9)
claim("loss on the old subject: change, highest of the seeds", max(rises), 0.2, 0.9)

# %% [markdown]
# Training works: the answers about law in the validation set have become much more likely. But it has a cost that no
# error message reports: the model has become worse at its old subject. This is **forgetting** (in papers often
# *catastrophic forgetting*). Nothing in the loss rewards the model for keeping what it knew, and every parameter was
# free to move.
#
# ## 3. Learning and forgetting
#
# > **Predict.** Use the same loop with three learning rates: about a third of the one above, the one above, and three
# > times as much. With which rate is the loss on law lowest at the end? With which does the model forget least? Is it
# > the same rate? And would the model forget less if all its parameters were frozen and a few new ones were trained?
# > That is LoRA, the subject of lesson 9.

# %%
LORA_CONFIG = ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
lora = {}
for seed in SEEDS:
    again()
    paths[3e-4, seed] = train(3e-4, seed)
    again()
    ml.add_adapter(model, LORA_CONFIG, name="lora", seed=seed)
    lora[seed] = train(2e-3, seed)  # the same loop: now only the adapter is trainable
    ml.remove_adapter(model, "lora")
    model.requires_grad_(True)
again()
paths[3e-3, 0] = train(3e-3, 0)

figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
for lr, marker, style in [(3e-3, "^", "--"), (1e-3, "o", "-"), (3e-4, "s", ":")]:
    label = f"full fine-tuning, lr {lr:g}"
    axes.plot(*paths[lr, 0].T, color=FULL, marker=marker, linestyle=style, linewidth=2, label=label)
axes.plot(*lora[0].T, color=LORA, marker="D", linewidth=2, label="LoRA, lr 0.002")
axes.annotate("before training", paths[1e-3, 0][0], (0, -14), textcoords="offset points", ha="right")
axes.legend(loc="upper right", frameon=False)
axes.set(xlabel="loss on law, validation set (nats per token)", ylabel="loss on presidents (nats per token)")
axes.set(xlim=(3.35, 4.2), ylim=(3.0, None))
show(figure, alt="Four paths from one point to the left and up: with a higher learning rate they climb more steeply.")
for lr in (3e-4, 1e-3, 3e-3):
    print(f"full, lr {lr:<6g}: law {paths[lr, 0][-1, 0]:.2f}, old {paths[lr, 0][-1, 1]:.2f}")

# %% [markdown]
# *How to read it.* Each path starts at the lower right. Its marks are the losses after 5, 10 and 20 steps. Further
# left is better on law, higher is worse on the old subject (presidents). The best place would be far left and low, but
# no path leads there.
#
# Along each path the model learns and forgets at the same time, and the learning rate determines how much is forgotten
# for what is learned. The highest rate is worst at both: its loss on law even ends higher than that of the others.
# With the lowest rate the model forgets least, and learns less in 20 steps than with the middle one. So the statement
# that a model has forgotten says little by itself. Compare methods at the same loss on the new subject.
#
# Does LoRA forget less in this comparison? For each of three seeds, we take the loss on law at which LoRA ended. Then
# we look up, by interpolation, the loss on the old subject that full fine-tuning had when it passed the same loss on
# law: at the lowest rate, and at the middle one.


# %%
def at(law_loss, path):
    """The old loss where a path passes this law loss, interpolated; np.interp expects low law losses first."""
    return np.interp(law_loss, path[::-1, 0], path[::-1, 1])


print("        law    old: LoRA   full, lr 0.0003   full, lr 0.001")
forgot = []  # LoRA's old loss minus that of full fine-tuning at each of the two rates, one row per seed
for seed in SEEDS:
    law_loss, old_loss = lora[seed][-1]
    low, high = at(law_loss, paths[3e-4, seed]), at(law_loss, paths[1e-3, seed])
    forgot.append((old_loss - low, old_loss - high))
    print(f"seed {seed}  {law_loss:.3f}  {old_loss:>10.3f}  {low:>16.3f}  {high:>15.3f}")
claim("LoRA's old loss minus full fine-tuning's at the low rate, mean", np.mean(forgot, axis=0)[0], 0.005, 0.04)
claim("the same at the middle rate, mean", np.mean(forgot, axis=0)[1], -0.1, -0.03)

# %% [markdown]
# It depends on what you compare LoRA with. At the same law loss LoRA forgot 0.02 nats more than full fine-tuning at
# the lowest rate, and 0.06 nats less than full fine-tuning at the middle rate. All three seeds agree. So LoRA lies
# between two runs of full fine-tuning that differ only in their learning rate. [LoRA Learns Less and Forgets
# Less](https://arxiv.org/abs/2405.09673) asked the same question of Llama-2-7B. Its answer: LoRA and full fine-tuning
# seem to lie on the same Pareto curve, the curve of the best compromises between learning and forgetting, and in some
# cases, especially on code, LoRA is better. Our model is thousands of times smaller, and we tried one rank and one
# learning rate for LoRA. But with a frozen base you can always undo the training: remove the adapter, and the old
# model is there again, bit for bit. After full fine-tuning the old model is lost, unless you kept a copy.
#
# ## 4. The bill in bytes
#
# > **Predict.** A float32 parameter takes 4 bytes. How many bytes must be in memory for each parameter while AdamW
# > trains it?

# %%
predict("bytes per parameter while AdamW trains it")

# %%
model, _ = ml.load("tiny")  # a new copy, all parameters trainable
optimizer = ml.AdamW(model.trainable_parameters(), lr=1e-3)
batch = pack(law["train"][:8])
loss = model.loss(batch.input_ids, batch.labels, batch.packing)
activations = ledger(model, optimizer, loss).activations  # saved for the backward pass
loss.backward()
held = ledger(model, optimizer)  # everything in memory now, found by following every reference
count = ml.count_parameters(model).total
for owner, size in ("weights", held.weights), ("gradients", held.gradients), ("optimizer state", held.moments):
    print(f"{owner:<15} {size:>12,} bytes, {size / count:.1f} per parameter")
claim("bytes per parameter while AdamW trains it", (held.weights + held.gradients + held.moments) / count, 15.84, 16.16)
print(f"activations     {activations:>12,} bytes, for the {batch.input_ids.size} tokens of this batch")

# %% [markdown]
# Four bytes for the parameter itself, four for its gradient, and eight for the **optimizer state**: AdamW's two
# running means, called the first and second moment. **Activations** are the intermediate results that the forward pass
# saves for the backward pass. They need additional memory, which grows with the number of tokens in a batch; lesson 14
# is about them.
#
# To *use* a model, four of these sixteen bytes are enough. So training needs four times as much memory as using the
# model, before the first activation is stored. For SmolLM2-135M:

# %%
smollm2 = 134_515_008  # counted in lesson 5
print(f"to use it {4 * smollm2 / 1e6:,.0f} MB, to train it {16 * smollm2 / 1e6:,.0f} MB plus activations")
print(f"ten subjects, ten models to store: {10 * 4 * smollm2 / 1e6:,.0f} MB")

# %% [markdown]
# The result of full fine-tuning is a whole model. Each subject needs its own model, and these models share
# nothing.
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
# from transformers import AutoModelForCausalLM
#
# theirs = AutoModelForCausalLM.from_pretrained("tiny")
# optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0)
# ids, labels = (torch.tensor(rows) for rows in ml.collate(law["train"][:8]))  # -100: not scored
# optimizer.zero_grad()
# loss = theirs(input_ids=ids, labels=labels).loss  # labels are shifted inside
# loss.backward()
# optimizer.step()
# ```
#
# </details>
#
# ## What to remember
#
# - Score only the answers. The label -100 marks tokens that are not scored.
# - A training step: clear the gradients, forward pass, backward pass, optimizer step. With AdamW it needs 16 bytes per
#   parameter, plus activations.
# - A model trained on something new forgets. You notice it only if you also measure the loss on the old subject.
# - The learning rate determines how much is forgotten for what is learned. Compare methods at the same loss on the new
#   subject.
# - Each fully fine-tuned model is a whole model to store.
#
# ## In minilora
#
# [`fit`](../minilora/train/loop.py) is the training loop that minilora uses, with a learning-rate schedule (**warmup**
# to `lr` in the first tenth of the steps, then half a cosine down to zero) and gradient clipping;
# [`loss_and_grad`](../minilora/nn/step.py) computes a batch in micro-batches; [`AdamW`](../minilora/nn/optim.py) is
# the optimizer; [`ledger`](../minilora/measure/ledger.py) counts the bytes in memory;
# [`encode_record`](../minilora/data/samples.py) makes ids and labels.
#
# **Now you:** [exercises 7](exercises/07_full_fine_tuning.ipynb): the loss of answers, the bytes of any optimizer, and
# a step on a batch that does not fit into memory.
#
# ## Sources
#
# - Learning against forgetting, for LoRA and full fine-tuning of Llama-2-7B on code and mathematics: [Biderman et al.
#   2024](https://arxiv.org/abs/2405.09673), section 4.3.
# - AdamW: [Loshchilov and Hutter 2019](https://arxiv.org/abs/1711.05101).

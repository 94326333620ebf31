# %% [markdown]
# # Lesson 16: One base, many adapters?
#
# A law office, a doctor's practice, a web shop and a bank each want an assistant. Do they need four models? Or can one
# base have four adapters in the same memory, in the same process, even in the same batch? What does one adapter know
# that the others do not? What does it cost to switch between them? And if you combine two of them, half of each, what
# is lost?

# %%
import re
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

import minilora as ml
from minilora.course import claim, predict, show
from minilora.pages.style import BLUE, ORANGE

# %% [markdown]
# ## 1. Four adapters
#
# Four sets of questions and answers come with minilora ([their card](../minilora/data/README.md)). Three of them
# explain terms: of law, of medicine, of finance. The fourth is about a shop that was invented for it, so that no model
# can know its rules beforehand. For each set we train an adapter of rank 8 on every linear layer of the tiny base.
#
# > **Predict.** Four adapters in one process: is the memory for weights 4 times that of the base, twice, or less?

# %%
predict("with four adapters: parameters, as a multiple of the base's")

# %%
DOMAINS = ("legal", "medical", "support", "finance")
EVERY = 1  # in the browser: 3
model, tokenizer = ml.load("tiny")
fingerprint = ml.sha256_of(ml.base_state(model))
base_size = ml.count_parameters(model).total
records = {name: ml.split_records(ml.read_records(name)) for name in DOMAINS}
unseen = {
    name: ml.encode_records([*splits["validation"], *splits["test"]][::EVERY], tokenizer)
    for name, splits in records.items()
}


def losses():
    """The loss of the model on records from outside all training sets: nats per token, a number per domain."""
    return np.array([ml.mean_loss(model, unseen[name]) for name in DOMAINS])


base = losses()
for seed, name in enumerate(DOMAINS):
    config = ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    adapted = ml.add_adapter(model, config, name=name, seed=seed)  # active now, and the only one that is trainable
    samples = ml.encode_records(records[name]["train"], tokenizer)
    ml.fit(model, samples, steps=2 * len(samples) // 8, lr=8e-3)  # two epochs, in batches of 8

size = ml.count_parameters(model).total
print(f"the base: {base_size:,} parameters; an adapter: {(size - base_size) // 4:,}, in {len(adapted)} matrices")
claim("with four adapters: parameters, as a multiple of the base's", size / base_size, 1.2965, 1.2966)

# %% [markdown]
# Four adapters add less than a third to the base; four models would be four times as large. And this is a small base:
# a matrix of twice the width has four times the parameters, and an adapter of the same rank only twice as many. The
# larger the base, the smaller the relative size of an adapter; [lesson 13](13_how_much_smaller.ipynb) counts it.
#
# ## 2. Which adapter knows what?
#
# You choose the active adapter with [`set_adapter`](../minilora/lora/adapters.py). `None` is the base alone. Now we
# evaluate each adapter on each domain, with questions and answers from outside all training sets.
#
# > **Predict.** Draw a table with a row per adapter and a column per domain, and mark each cell: is the adapter better
# > than the base, as good, or worse? The diagonal is easy. What about the rest?

# %%
table = []
for name in DOMAINS:
    ml.set_adapter(model, name)
    table.append(losses())
table = np.array(table)  # (adapter, domain)
change = table - base
elsewhere = ~np.eye(4, dtype=bool)
print("change of the loss from the base, by domain:")
for name, row in zip(DOMAINS, change, strict=True):
    print(f"  {name:<8}", *(f"{domain} {x:+.2f}  " for domain, x in zip(DOMAINS, row, strict=True)))
next_best = np.where(elsewhere, table, np.inf).min(axis=0)
claim("own domain: below the best of the other adapters by, at least", (next_best - table.diagonal()).min(), 0.2, 0.8)
claim("the shop's adapter elsewhere: loss added, on average", change[2, elsewhere[2]].mean(), 0.05, 0.5)
print(f"of {elsewhere.sum()} cells off the diagonal, {np.count_nonzero(change[elsewhere] > 0)} are worse than the base")

# %% [markdown]
# Each adapter is by far the best of all in its own domain. Elsewhere it is not neutral. The three adapters that
# explain terms have a form in common ("A ... is ..."). They do little harm in each other's domains, and sometimes
# help. The shop answers in another form, and its adapter is worse than the base on all other domains. An adapted model
# is not "the base, and something more". It has moved towards one domain, and so away from others.
#
# ## 3. A different adapter for each row
#
# The matmuls with the frozen W are most of the work, and they are the same for all adapters. So every row of a batch
# can have its own adapter: compute $x W^\top$ once for all rows, and add to each row its own small $(x A_i^\top)
# B_i^\top$. One process can serve thousands of adapters in this way (Sheng et al. 2023).
# [`mixed_batch`](../minilora/lora/mixed.py) does it here, and [`Streams`](../minilora/generate/streams.py) generates
# answers with it.

# %%
ids = np.array([unseen[name][0].ids[:48] for name in DOMAINS])  # (4, 48)
with ml.no_grad():
    with ml.mixed_batch(model, DOMAINS):
        together = model(ids).data
    alone = []
    for name, row in zip(DOMAINS, ids, strict=True):
        ml.set_adapter(model, name)
        alone.append(model(row[None]).data[0])
gap = np.abs(together - np.array(alone)).max() / np.abs(together).max()
claim("four adapters in one batch or one by one: logits differ by, of the largest", gap, 0, 1e-5)


def answer(prompts, choices):
    """Every choice answers every prompt, all in one batch: a list of texts per choice."""
    streams = ml.Streams(model, tokenizer, slots=96)
    found = [[streams.add(prompt, adapter=choice, max_new_tokens=120) for prompt in prompts] for choice in choices]
    while streams.busy:
        streams.step()
    return [[one.text for one in answers] for answers in found]


for name, [text] in zip(("the base", *DOMAINS), answer(["What is a deposit?"], [None, *DOMAINS]), strict=True):
    print(f"{name}: {text[:200]}\n")

# %% [markdown]
# One question, one batch, five answers. Their content is worthless: this base has a million parameters and was
# pretrained on presidents' addresses. But look at the *form*. Each of the four sets has a form that no other has, and
# a regular expression finds it.
#
# > **Predict.** The shop's adapter is asked about law. Which form will its answer have: the shop's, that of law, or
# > neither?

# %%
EACH = 12  # in the browser: 6
FORMS = {
    "legal": r"\. It matters ",
    "medical": r"\. (See a doctor |A doctor may |Call an ambulance )",
    "support": r"\. At Fernwhistle, .*\. Next, ",
    "finance": r"\. In practice, ",
}
asked = [record.prompt for name in DOMAINS for record in records[name]["test"][:EACH]]


def forms(texts):
    """Of these answers, how many percent have the form of each domain."""
    return [100 * np.mean([bool(re.search(form, text)) for text in texts]) for form in FORMS.values()]


shares = np.array([forms(texts) for texts in answer(asked, DOMAINS)])  # (adapter, form)
print(f"{len(asked)} questions, {EACH} of each domain, to each adapter: {len(DOMAINS) * len(asked)} answers")
claim("own form, whatever is asked: percent of answers, at least", shares.diagonal().min(), 70, 100)
claim("another's form: percent of answers, at most", shares[elsewhere].max(), 0, 5)

# %%
better_worse = LinearSegmentedColormap.from_list("change", [BLUE, "white", ORANGE])
often = LinearSegmentedColormap.from_list("often", ["white", BLUE])
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
left.imshow(np.where(change > 0, 4 * change, change), better_worse, vmin=-2.4, vmax=2.4)
right.imshow(shares, often, vmin=0, vmax=160)
for i in range(4):
    for j in range(4):
        weight = "bold" if i == j else "normal"
        left.text(j, i, f"{table[i, j]:.2f}\n({change[i, j]:+.2f})", ha="center", va="center", weight=weight)
        right.text(j, i, f"{shares[i, j]:.0f} %", ha="center", va="center", weight=weight)
for axes, columns, title in (
    (left, [f"{name}\nbase {loss:.2f}" for name, loss in zip(DOMAINS, base, strict=True)], "loss on each domain"),
    (right, [f"form of\n{name}" for name in DOMAINS], "answers in the form of each domain"),
):
    axes.set_xticks(range(4), columns)
    axes.set_yticks(range(4), [f"{name}\nadapter" for name in DOMAINS])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
show(
    figure,
    alt="Two maps of four by four: the loss is low on the diagonal alone, and so are the forms of the answers.",
)

# %% [markdown]
# *How to read it.* A row is an adapter. On the left, a column is a domain, and the change from the base is in
# brackets: blue is better, orange is worse (drawn four times as strong, since it is small). On the right, the same
# adapters answer the same questions of all domains, and a column is the form of the answers.
#
# The adapter decides the form, not the question. Whatever it is asked, the shop's adapter says "At Fernwhistle". An
# adapter does not know where its domain ends: *you* must send each question to the right one.
#
# ## 4. Switching
#
# > **Predict.** What has to happen when another adapter becomes active? Which arrays are copied? How long does it
# > take, compared with loading the model again?

# %% tags=["measured"]
seconds = []
for turn in range(40):
    start = perf_counter()
    ml.set_adapter(model, DOMAINS[turn % 4])
    seconds.append(perf_counter() - start)
start = perf_counter()
ml.load("tiny")
print(f"a switch: {1000 * np.median(seconds):.2f} ms; to load the tiny base: {1000 * (perf_counter() - start):.0f} ms")

# %%
same = ml.sha256_of(ml.base_state(model)) == fingerprint
claim("fingerprint of the base unchanged after all of this (1: yes)", same, 1, 1)

# %% [markdown]
# Nothing is copied. Every layer holds all of its A's and B's, and a switch only sets which of them are used. The base
# has not changed by a bit since the first cell, and it must not: four adapters depend on it. (An adapter that is
# merged into the weights saves the small matmuls, but only one at a time can be merged.)
#
# ## 5. Half of each
#
# Updates can be added: $W + w_1\,\Delta_1 + w_2\,\Delta_2$. So `set_adapter` accepts weights, too: a *weighted
# combination* of adapters. We measure how much of each adapter's gain in its own domain a combination keeps: 100 % is
# the adapter alone, 0 % is the base.
#
# > **Predict.** Combine half of law's adapter with half of the shop's: does the combination keep half of both gains?
# > Does it keep more with both whole? And how much do all four keep, with a quarter of each?

# %%
predict("half of each: percent kept of law's gain")
predict("all four, a quarter of each: percent kept, on average")

# %%
gain = base - table.diagonal()


def kept(choice):
    """Of each domain's gain, how many percent are there with this choice."""
    ml.set_adapter(model, choice)
    return 100 * (base - losses()) / gain


mixes = {
    "half of law alone": {"legal": 0.5},
    "half of shop alone": {"support": 0.5},
    "law and shop, half of each": {"legal": 0.5, "support": 0.5},
    "law and shop, both whole": {"legal": 1, "support": 1},
    "all four, a quarter of each": dict.fromkeys(DOMAINS, 0.25),
    "all four, whole": dict.fromkeys(DOMAINS, 1),
}
found = {name: kept(choice) for name, choice in mixes.items()}
for name, row in found.items():
    print(f"{name:<27}", *(f"{domain} {x:4.0f} %  " for domain, x in zip(DOMAINS, row, strict=True)))
half, whole = (found[f"law and shop, {much}"][[0, 2]] for much in ("half of each", "both whole"))
claim("half of each: percent kept of law's gain", half[0], 60, 95)
claim("half of each: percent kept of the shop's gain", half[1], 75, 100)
claim("both whole: percent less of law's gain than with half of each", half[0] - whole[0], 5, 60)
claim("all four, a quarter of each: percent kept, on average", found["all four, a quarter of each"].mean(), 55, 90)
claim("all four, whole: percent kept, on average", found["all four, whole"].mean(), -200, 30)
[texts] = answer(asked, [mixes["law and shop, half of each"]])
print(
    "law and shop, half of each, answer in the form of", dict(zip(FORMS, np.round(forms(texts)).tolist(), strict=True))
)

# %% [markdown]
# There are three surprises. **Half of an update brings much more than half of the gain**: the first part of the update
# lowers the loss most (the first two rows). So half of each can keep most of both gains. Each adapter reduces the
# other's gain somewhat, and law loses more than the shop. **Whole is worse than half.** With both updates whole, W
# moves further than in either training, to a point where neither was trained. And with all four whole, most of the
# gains are lost or turn negative, while a quarter of each keeps most of them.
#
# **One form wins.** The answers are not half in one form and half in the other: one form hardly appears any more,
# although most of both gains is kept. Updates can be combined; forms of answers hardly can.
#
# ## 6. One adapter made from two
#
# A weighted combination needs all its adapters in memory. Can it be turned into a single adapter, which is saved and
# merged like any other? Three methods are in use ([`combine_adapters`](../minilora/lora/combine.py)). **cat**
# concatenates the factors. **svd** keeps the 8 rank-one terms with the largest singular values of the sum (lesson 8).
# **linear** (a linear merge) adds up the A's, and separately the B's: the rank is 8 again, with almost no work.
#
# > **Predict.** One of the three does not compute the sum of the updates, not even nearly. Multiply out $(B_1 +
# > B_2)(A_1 + A_2)$. Which one?

# %%
off = {}
for method in ("cat", "svd", "linear"):
    made = ml.combine_adapters(model, ["legal", "support"], [0.5, 0.5], method=method, name=method)
    off[method], row = 100 * made.error, kept(method)
    rank = max(made.ranks.values())
    print(f"{method:<6} rank {rank:>2}, kept of law {row[0]:3.0f} %, of the shop {row[2]:3.0f} %")
claim("cat: off the sum of the updates, in percent of it", off["cat"], 0, 1e-3)
claim("svd: off the sum, in percent", off["svd"], 20, 60)
claim("linear: off the sum, in percent", off["linear"], 75, 120)

# %% [markdown]
# $(B_1 + B_2)(A_1 + A_2) = B_1 A_1 + B_2 A_2 + B_1 A_2 + B_2 A_1$. Nobody trained the last two terms: B₁ was trained on
# the outputs of A₁, and here it gets those of A₂. These **cross terms** are nearly as large as the sum itself. The loss
# rises little here, but do not rely on this: look at the error that was just printed. PEFT has the same three methods
# under the same names, and others, such as TIES.
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
# from peft import PeftModel
# from transformers import AutoModelForCausalLM
#
# base = AutoModelForCausalLM.from_pretrained("tiny")
# # Folders that ml.save_adapter has written.
# model = PeftModel.from_pretrained(base, "legal", adapter_name="legal")
# model.load_adapter("support", adapter_name="support")
# model.set_adapter("support")
# # A batch with a different adapter for each row.
# mixed = model(torch.tensor(ids[:3]), adapter_names=["legal", "support", "__base__"]).logits
# model.add_weighted_adapter(["legal", "support"], [0.5, 0.5], "both", combination_type="cat")
# model.set_adapter("both")
# ```
#
# </details>
#
# ## What to remember
#
# - One base and many adapters: each adapter has r (m + n) parameters per matrix, and the base exists once, unchanged.
# - An adapter is best in its own domain, and worse than the base far from it. It gives every answer its own form.
# - A switch copies nothing. In one batch, each row can have its own adapter, with the same result.
# - A combination adds updates. Weights that add up to 1 keep most of each gain; whole updates on top of each other do
#   harm.
# - Concatenating adapters (cat) gives one adapter that equals their sum exactly; the ranks add up. A linear merge of
#   A's and B's has cross terms.
#
# **Now you:** [exercises 16](exercises/16_many_adapters.ipynb): join adapters, combine them, and give each row its
# own.
#
# ## Sources
#
# - Thousands of adapters on one base, different ones in a batch: [Sheng et al. 2023,
#   S-LoRA](https://arxiv.org/abs/2311.03285).
# - The methods of combination, under these names: PEFT,
#   [`add_weighted_adapter`](https://huggingface.co/docs/peft/package_reference/lora).

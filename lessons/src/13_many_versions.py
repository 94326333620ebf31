# %% [markdown]
# # Lesson 13: One base, many versions?
#
# A law office, a doctor's practice, a web shop and a bank want an assistant each. Four models, then? Or one base with
# four adapters beside it: in the same memory, in the same process, even in the same batch. What does one version know
# that the others do not? What does it cost to change from one to another? And who wants two of them at once, half of
# each: what is lost?

# %%
import re
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

import minilora as ml
from minilora.course import claim, show
from minilora.pages.style import BLUE, ORANGE

# %% [markdown]
# ## 1. Four versions
#
# Four sets of questions and answers come with minilora ([their card](../minilora/data/README.md)). Three of them
# explain terms: of law, of medicine, of finance. The fourth is about a shop that was invented for it, so that no model
# can know its rules beforehand. From each we train an adapter of rank 8 on every linear layer of the tiny base.
#
# > **Predict.** Four versions in one process: is the memory for weights 4 times that of the base, twice, or less?

# %%
DOMAINS = ("legal", "medical", "support", "finance")
model, tokenizer = ml.load("tiny")
fingerprint = ml.sha256_of(ml.base_state(model))
base_size = ml.count_parameters(model).total
records = {name: ml.split_records(ml.read_records(name)) for name in DOMAINS}
unseen = {
    name: ml.encode_records([*splits["validation"], *splits["test"]], tokenizer) for name, splits in records.items()
}


def losses():
    """What the model, as it is now, loses on what no version was trained on: nats per token, a number per domain."""
    return np.array([ml.mean_loss(model, unseen[name]) for name in DOMAINS])


base = losses()
for seed, name in enumerate(DOMAINS):
    config = ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    adapted = ml.add_adapter(model, config, name=name, seed=seed)  # active now, and the only one that learns
    samples = ml.encode_records(records[name]["train"], tokenizer)
    ml.fit(model, samples, steps=2 * len(samples) // 8, lr=8e-3)  # two passes, in batches of 8

size = ml.count_parameters(model).total
print(f"the base: {base_size:,} numbers; a version: {(size - base_size) // 4:,}, in {len(adapted)} matrices")
claim("with four versions, the numbers are how many times the base's", size / base_size, 1.2965, 1.2966)

# %% [markdown]
# Less than a third more for four versions, where four models would be four times as much. And this is a small base: a
# matrix of twice the width has four times the numbers, an adapter of the same rank only twice as many. The larger the
# base, the less a version weighs; [lesson 11](11_how_much_smaller.ipynb) counts it.
#
# ## 2. Who knows what?
#
# Which version is active is a choice, made with [`set_adapter`](../minilora/lora/adapters.py). `None` is the base
# alone. Now each version meets each domain, in questions and answers that none was trained on.
#
# > **Predict.** Draw a table, a row per version and a column per domain, and mark each cell: better than the base, as
# > good, or worse? The diagonal is easy. What about the rest?

# %%
table = []
for name in DOMAINS:
    ml.set_adapter(model, name)
    table.append(losses())
table = np.array(table)  # (version, domain)
change = table - base
elsewhere = ~np.eye(4, dtype=bool)
print("change of the loss from the base, by domain:")
for name, row in zip(DOMAINS, change, strict=True):
    print(f"  {name:<8}", *(f"{domain} {x:+.2f}  " for domain, x in zip(DOMAINS, row, strict=True)))
next_best = np.where(elsewhere, table, np.inf).min(axis=0)
claim("own domain: below the best of the other versions by, at least", (next_best - table.diagonal()).min(), 0.2, 0.8)
claim("the shop's version elsewhere: loss added, on average", change[2, elsewhere[2]].mean(), 0.05, 0.5)
print(f"of {elsewhere.sum()} cells off the diagonal, {np.count_nonzero(change[elsewhere] > 0)} are worse than the base")

# %% [markdown]
# Each version is the best of all in its own domain, and by far. Elsewhere it is not neutral. The three that explain
# terms have something in common ("A ... is ..."), and do each other little harm, here and there even some good. The
# shop answers in another way, and whoever has learned its way is worse at all the rest. A version is not "the base, and
# something more". It has been moved towards one thing, and so away from others.
#
# ## 3. To each row its own
#
# The products with the frozen W are most of the work, and they are the same for all versions. So every row of a batch
# can have an adapter of its own: $x W^\top$ once for all rows, and to each row its own thin $(x A_i^\top) B_i^\top$.
# One process can serve thousands of versions in this way (Sheng et al. 2023).
# [`mixed_batch`](../minilora/lora/mixed.py) does it here, and [`Streams`](../minilora/generate/streams.py) writes
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
claim("four versions in one batch or one by one: logits differ by, of the largest", gap, 0, 1e-5)


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
# One question, one batch, five answers. What they say is worth nothing: this base has a million parameters, and learned
# to talk from old government reports. But look at the *form*. Each of the four sets has one that no other has, and a
# regular expression finds it.
#
# > **Predict.** The shop's version is asked about law. Which form has the answer: the shop's, that of law, or none?

# %%
FORMS = {
    "legal": r"\. It matters ",
    "medical": r"\. (See a doctor |A doctor may |Call an ambulance )",
    "support": r"^At Fernwhistle, .*\. Next, ",
    "finance": r"\. In practice, ",
}
asked = [record.prompt for name in DOMAINS for record in records[name]["test"][:12]]


def forms(texts):
    """Of these answers, how many percent have the form of each domain."""
    return [100 * np.mean([bool(re.search(form, text)) for text in texts]) for form in FORMS.values()]


shares = np.array([forms(texts) for texts in answer(asked, DOMAINS)])  # (version, form)
print(f"{len(asked)} questions, 12 of each domain, to each version: {len(DOMAINS) * len(asked)} answers")
claim("own form, whatever is asked: percent of answers, at least", shares.diagonal().min(), 70, 100)
claim("another's form: percent of answers, at most", shares[elsewhere].max(), 0, 5)

# %%
better_worse = LinearSegmentedColormap.from_list("change", [BLUE, "white", ORANGE])
often = LinearSegmentedColormap.from_list("often", ["white", BLUE])
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
left.imshow(change, better_worse, vmin=-2.4, vmax=2.4)
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
    axes.set_yticks(range(4), [f"{name}\nversion" for name in DOMAINS])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
show(
    figure,
    alt="Two maps of four by four: the loss is low on the diagonal alone, and forms stand on the diagonal alone.",
)

# %% [markdown]
# *How to read it.* A row is a version. Left, a column is a domain, and in brackets stands the change from the base:
# blue is better, orange is worse. Right, the same versions answer the same questions of all domains, and a column is
# the form of the answers.
#
# The version decides, not the question. Whatever it is asked, the shop's version says "At Fernwhistle". An adapter does
# not know where its domain ends: *you* must send each question to the right one.
#
# ## 4. Switching
#
# > **Predict.** What has to happen when another version becomes active? Which arrays are copied? How long does it take,
# > beside loading the model anew?

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
# Nothing is copied. Every layer holds all of its A's and B's, and a switch says which of them take part. The base has
# not changed by a bit since the first cell, and must not: four versions stand on it. (A version that is merged into the
# weights saves the thin products, but only one at a time can be merged.)
#
# ## 5. Half of each
#
# Updates can be added up: $W + w_1\,\Delta_1 + w_2\,\Delta_2$. So `set_adapter` takes weights, too. We measure how much
# a mix keeps of what each version has gained in its own domain: 100 % is the version alone, 0 % is the base.
#
# > **Predict.** Law and shop, half of each: is half of both gains kept? More is kept with both whole, is it not? And
# > with all four, a quarter of each?

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
# Three surprises. **Half of an update brings much more than half of the gain**: on the way from the base to a version,
# the first steps do most (the first two rows). So half of each can keep most of both, and what is lost is lost to the
# other: more of law than of the shop. **Whole is worse than half.** Where both updates are added whole, W goes further
# than either version ever went, to a place where neither was trained. And with all four whole, most is lost, or worse
# than lost, while a quarter of each keeps most of everything.
#
# And the answers? They are not half in one form and half in the other: one of the two forms has won, and the other is
# hardly heard, although most of both gains is kept. Weights can be mixed; ways to talk hardly can.
#
# ## 6. One adapter of two
#
# A mix needs all its adapters in memory. Can it be one adapter, to be saved and merged as any other? Three ways are in
# use ([`combine_adapters`](../minilora/lora/combine.py)). **cat** puts the factors side by side. **svd** keeps the 8
# largest pieces of the sum, as lesson 14 takes a matrix apart. **linear** adds the A's up, and the B's: rank 8 again,
# with almost no work.
#
# > **Predict.** One of the three does not compute the sum of the updates, not even nearly. Multiply out
# > $(B_1 + B_2)(A_1 + A_2)$. Which one?

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
# $(B_1 + B_2)(A_1 + A_2) = B_1 A_1 + B_2 A_2 + B_1 A_2 + B_2 A_1$. The last two are the update of nobody: B₁ has
# learned to read what A₁ writes, and is given what A₂ writes. These **cross terms** are nearly as large as the sum
# itself. That the loss forgives them here is luck: look how far off the matrix is. PEFT has the same three, under the
# same names.
#
# ## What to remember
#
# - One base and many adapters: each costs r (m + n) numbers per matrix, and the base is there once, unchanged.
# - A version is best at its own, and worse than the base at what is far from it. It answers everything in its own way.
# - A switch copies nothing. In one batch, each row can have its own adapter, with the same result.
# - Mixing adds updates. Weights that add up to 1 keep most of each gain; whole updates on top of each other do harm.
# - Exactly one adapter of several: side by side (cat), and ranks add up. A's and B's added have cross terms.
#
# **Now you:** [exercises 13](exercises/13_many_versions.ipynb): join adapters, mix them, and give each row its own.
#
# ## Sources
#
# - Thousands of adapters beside one base, mixed in a batch: [Sheng et al. 2023,
#   S-LoRA](https://arxiv.org/abs/2311.03285).
# - The ways to combine, under these names: PEFT,
#   [`add_weighted_adapter`](https://huggingface.co/docs/peft/package_reference/lora).

# %% [markdown]
# # Lesson 17: Where does it fail?
#
# The usual list of LoRA's limits has two lines: "a slight drop in performance, sometimes" and "not ideal for extremely
# complex transformations". When is "sometimes", and what is "complex"? We try one task that LoRA solves exactly, one
# that it cannot solve, and two on a real model.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.data.records import read_handbook
from minilora.engine.fused import lora_linear
from minilora.measure.statistics import Interval
from minilora.pages.style import LORA, ink

# %% [markdown]
# ## 1. A task that needs four directions
#
# A frozen matrix $W$ is given, and a teacher computes $y = x\,(W + \Delta)^\top$ with a secret change $\Delta$. LoRA
# is trained on x and y, and must find $\Delta$.
#
# Every matrix is a sum of rank-one terms, each a column times a row. The sizes of these terms, $\sigma_1 \ge \sigma_2
# \ge \dots$, are the matrix's **singular values** (lesson 8). The squared singular values add up to the **squared
# Frobenius norm**, the sum of all squared entries. The theorem of Eckart and Young says that the r largest terms are
# the best approximation of rank r. So the smallest error that LoRA of rank r can reach is known before any training:
#
# $$\text{smallest error with rank } r \;=\; \sigma_{r+1}^2 + \sigma_{r+2}^2 + \dots$$
#
# This holds if all directions of the input are equally common, which we arrange below. (Where they are not, see the
# [exercises](exercises/17_limits.ipynb).) The first teacher has four terms, with the singular values 4, 3.5, 3, 2.5.
#
# > **Predict.** Draw the error against the rank, for r = 1 to 8. Where does the curve bend? Is r = 8 better than r = 4?

# %%
T, m, n = 128, 48, 64
rng = np.random.default_rng(0)
x = np.linalg.qr(rng.standard_normal((T, n)))[0] * np.sqrt(T)  # all directions of the n inputs are equally common
W = rng.standard_normal((m, n)) / np.sqrt(n)


def learn(delta, r, steps=300, lr=0.05):
    """Train A and B on the teacher's outputs. Returns the remaining error, in percent of the error at the start."""
    A = ml.Parameter(rng.uniform(-1, 1, (r, n)) / np.sqrt(n))
    B = ml.Parameter(np.zeros((m, r)))
    optimizer = ml.AdamW({"A": A, "B": B}, lr=lr, weight_decay=0.0)
    target, errors = x @ (W + delta).T, []
    for step in range(steps):
        wrong = lora_linear(x, W, A, B, scale=1.0) - target
        error = (wrong * wrong).sum() * (1 / T)
        errors.append(float(error.data))
        optimizer.lr = lr * (1 - step / steps)
        error.backward()
        optimizer.step()
        A.grad = B.grad = None
    return 100 * errors[-1] / errors[0]


def least(delta, r):
    """The smallest error of any matrix of rank r, in percent."""
    squares = np.linalg.svd(delta, compute_uv=False) ** 2
    return 100 * squares[r:].sum() / squares.sum()


columns, rows = (np.linalg.qr(rng.standard_normal((size, 4)))[0] for size in (m, n))
four = columns @ np.diag([4, 3.5, 3, 2.5]) @ rows.T
found = {r: learn(four, r) for r in (1, 2, 3, 4, 5, 6, 8)}
for r, error in found.items():
    print(f"r = {r}: {error:7.3f} % of the error remains; at least {least(four, r):6.3f} %")
above = [found[r] / least(four, r) - 1 for r in (1, 2, 3)]
claim("r = 1 to 3: how far above the smallest error, in percent of it", 100 * max(above), -0.1, 1)
claim("r = 4: remaining error, in percent", found[4], 0, 0.01)

# %% [markdown]
# Training finds the best matrix of each rank, although it never saw the terms. With r = 4 the
# task is solved. Ranks above 4 are wasted here.
#
# ## 2. A task that needs all of them
#
# The second teacher has a $\Delta$ of random numbers. No direction is more important than another.
#
# > **Predict.** At which rank does *this* curve bend? How much of the error remains at r = 8? At which rank does
# > LoRA have as many trainable parameters as $\Delta$, 48 × 64?

# %%
predict("full rank: remaining error at r = 8, in percent")

# %%
full = rng.standard_normal((m, n))
hard = {r: learn(full, r) for r in (1, 2, 4, 8, 16, 24, 32, 40, 48)}

figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for axes, delta, errors, title in (
    (panels[0], four, found, "a change of rank 4"),
    (panels[1], full, hard, "a change of full rank"),
):
    ranks = range(max(errors) + 1)
    axes.plot(ranks, [least(delta, r) for r in ranks], color=LORA, linestyle="dashed", linewidth=1.5)
    axes.plot(list(errors), list(errors.values()), color=LORA, linestyle="none", marker="o")
    axes.set(title=title, xlabel="rank r", ylim=(-3, 103))
panels[0].set_ylabel("remaining error, in percent")
panels[1].text(22, 62, "dashed: predicted\ndots: trained", color=ink(LORA))
show(figure, alt="Left the error falls steeply to zero at rank 4 and stays there; right it falls slowly up to rank 48.")

# %% [markdown]
# *How to read it.* On the left the curve has a corner at 4, the rank of the task; on the right it falls smoothly.

# %%
above = [hard[r] / least(full, r) - 1 for r in hard if r < 48]
claim("full rank: how far above the smallest error, in percent of it", 100 * max(above), -0.1, 3)
claim("full rank: remaining error at r = 8, in percent", hard[8], 50, 65)
print(f"parameters of the change: {m * n:,}; of A and B with r = 27: {27 * (m + n):,}, with r = 28: {28 * (m + n):,}")

# %% [markdown]
# With r = 8 more than half of the error remains, and no learning rate, number of steps or α can remove it. Only r =
# 48, the full rank, removes all of it. From r = 28 on, A and B have more parameters than $\Delta$: LoRA then costs
# *more* than full fine-tuning, and can do less.
#
# That is what "complex" means: **many directions, all of which matter, and not many changed parameters.**
#
# ## 3. A real model: is it the rank?
#
# Which kind is a real task? We try two on the tiny base. The first is hard: four rows of 16 random words (tokens), to
# be memorised. No word follows from others, so each must be stored. We draw only tokens that the base can distinguish:
# 150 others share one embedding.
#
# There are two baselines. Guessing uniformly among the usable tokens costs ln 1,898. A model that knows the 64 words,
# but not their places, has a loss of ln 64.
#
# > **Predict.** Full fine-tuning memorises the words in 100 steps. How far does rank 1 on q and v get, with a
# > six-hundredth of the parameters? And rank 16? What helps more: four times the steps, or rank 1 in all matrices?

# %%
predict("r = 1 on q and v after 100 steps, over ln 64")

# %%
model, tokenizer = ml.load("tiny")
embedding = dict(model.named_parameters())["model.embed_tokens.weight"].data
unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
trained = np.flatnonzero((unit @ unit.T > 0.99).sum(axis=1) == 1)  # tokens whose embedding no other token shares
claim("tokens that share their embedding", len(embedding) - len(trained), 150, 150)
print(f"ln {len(trained)} = {np.log(len(trained)):.2f}, ln 64 = {np.log(64):.2f}")


def trial(config, lr, seed, train, test, **options):
    """The loss after training, and the number of trainable parameters. config None: full fine-tuning."""
    tuned = model if config else ml.load("tiny")[0]
    if config:
        ml.add_adapter(tuned, config, name="trial", seed=seed)
    else:
        for _, parameter in tuned.named_parameters():
            parameter.requires_grad = True
    trainable = ml.count_parameters(tuned).trainable
    ml.fit(tuned, train, lr=lr, seed=seed, **options)
    loss = ml.mean_loss(tuned, test)
    if config:
        ml.remove_adapter(tuned, "trial")
    return loss, trainable


def memorise(config, lr, steps, seed):
    words = np.random.default_rng(seed).choice(trained, (4, 17)).tolist()
    samples = [ml.Sample(tuple(row), (-100, *row[1:])) for row in words]  # the first word of each row is given
    return trial(config, lr, seed, samples, samples, steps=steps)


def lora(r, targets):
    return ml.LoraConfig(r=r, lora_alpha=16, target_modules=targets)


SEEDS = (0, 1)  # in the browser: (0,)
plans = {
    "q and v, r = 1": (lora(1, ["q_proj", "v_proj"]), 1e-2, {100: SEEDS, 400: SEEDS, 1200: (0,)}),
    "q and v, r = 16": (lora(16, ["q_proj", "v_proj"]), 1e-2, {100: SEEDS, 400: SEEDS}),
    "all seven, r = 1": (lora(1, "all-linear"), 1e-2, {100: SEEDS}),
    "full fine-tuning": (None, 2e-3, {100: (0,)}),
}
learned = {}
for name, (config, lr, runs) in plans.items():
    for steps, seeds in runs.items():
        pairs = [memorise(config, lr, steps, seed) for seed in seeds]
        learned[name, steps] = [loss for loss, _ in pairs]
        losses = ", ".join(f"{loss:.3f}" for loss in learned[name, steps])
        print(f"{name:<16} {pairs[0][1]:>9,} parameters, {steps:>5,} steps: loss {losses}")

r1, r16, everywhere = "q and v, r = 1", "q and v, r = 16", "all seven, r = 1"
claim("r = 1 on q and v after 100 steps, over ln 64", np.mean(learned[r1, 100]) / np.log(64), 0.7, 1.2)
claim("r = 16 on q and v: 100 steps over 400", min(learned[r16, 100]) / max(learned[r16, 400]), 5, 40)
claim("r = 16 on q and v after 400 steps", max(learned[r16, 400]), 0, 0.15)
claim("r = 1 on q and v, 1,200 steps", learned[r1, 1200][0], 1, 2.5)
claim("r = 1 in all seven after 100 steps", max(learned[everywhere, 100]), 0, 0.15)

# %% [markdown]
# After 100 steps, the loss of rank 1 on q and v is near ln 64: it knows little more than which words occur. Rank 16
# looks too small as well, but it lacked *steps*: after 400 it has memorised the words. For rank 1 on q and v, 1,200
# steps are not enough. Yet rank 1 in *all* matrices needs only 100. So neither a low rank nor a small number of
# parameters is the limit by itself: 9,728 parameters in all seven matrices learn faster than 28,672 in q and v. Which
# matrices are trained matters more.
#
# The second task is that of lesson 12: questions about law, from which a model of this size learns mostly the style.

# %%
law = {split: ml.encode_records(part, tokenizer) for split, part in ml.split_records(ml.read_records("legal")).items()}
small, whole = (
    np.array(
        [trial(config, lr, seed, law["train"], law["validation"], steps=40, batch_size=4)[0] for seed in (0, 1, 2)]
    )
    for config, lr in ((lora(8, "all-linear"), 1e-2), (None, 1e-3))
)
before = ml.mean_loss(model, law["validation"])
print(f"validation loss: before {before:.2f}, LoRA with r = 8 {small.mean():.2f}, full fine-tuning {whole.mean():.2f}")
price = Interval.of(small - whole)
print(f"price of LoRA: {price.mean:.3f} nats per token, 95 % interval {price.low:.3f} to {price.high:.3f}")
claim("price of LoRA on law: lower end of the interval", price.low, 0.001, 0.2)
claim("price, in percent of what full fine-tuning gains", 100 * price.mean / (before - whole.mean()), 3, 28)

# %% [markdown]
# So this is the size of a "slight drop": about an eighth of the gain. More rank hardly helps: in lesson 12, three seeds
# could not tell r = 64 from r = 8. LoRA does not change the embedding, and in lesson 8 a sixth of full fine-tuning's
# gain was outside the 28 matrices.
#
# Others measured this on larger models. Biderman et al. (2024) found that LoRA falls short of full fine-tuning on code
# and mathematics, and forgets less. Schulman et al. (2025) found no difference on small instruction sets, and a gap
# where a data set exceeds the adapter's capacity. On the tiny base (lesson 7), the result depended on the learning rate
# of full fine-tuning: LoRA forgot less than the run at 0.001, and slightly more than the run at 0.0003.
#
# How can you tell which kind your task is? Look at the *training* loss. First train four times as long. If it falls,
# steps were missing. Then train with 4 r. If it falls now, rank was missing. If neither helps, the reason is the
# learning rate, the choice of matrices, or the data.
#
# ## 4. Facts that change: weights or prompt?
#
# A fact can come from the weights, where training has stored it, or from a passage that is looked up for each question
# and put into the prompt: **retrieval-augmented generation** (RAG). `support-handbook` is the handbook of an invented
# shop, in 30 passages of about four facts each. The retriever, BM25, ranks passages by the words that they share with
# the question; rare words count more.
#
# > **Predict.** For how many questions is the best match the right passage: for ordinary ones, which have some of the
# > handbook's words, and for hard ones, which have hardly any?

# %%
predict("ordinary questions whose best match is right, in percent")

# %%
handbook = read_handbook("support-handbook", tokenizer, limit=4096)
support = [record for record in ml.read_records("support") if record.reworded]
first = {}
for kind, wording in (("ordinary", "reworded"), ("hard", "paraphrase")):
    found = [handbook.ranked(getattr(record, wording)) for record in support]
    right = [handbook.right(record.messages) for record in support]
    places = np.array([ranked.index(passage) for ranked, passage in zip(found, right, strict=True)])
    first[kind] = 100 * np.mean(places < 1)
    print(f"{kind} questions: the right passage is first for {first[kind]:.0f} %,", end=" ")
    print(f"among the first three for {100 * np.mean(places < 3):.0f} %")
claim("ordinary questions whose best match is right, in percent", first["ordinary"], 40, 75)

# %% [markdown]
# So the retriever already fails for nearly half of the ordinary questions, and for three of four hard ones. A passage
# helps only a model that can use it. Given the *right* passage, SmolLM2's answers to ordinary questions contain 7 % of
# the expected keywords. With LoRA, after 480 examples of quotes from *other* passages, they contain 42 %: the model
# quotes, but often the wrong sentence. The three sentences of the passage that BM25 finds contain 58 %.
#
# And the weights? With `minilora finetune --data support --config facts`, SmolLM2 is trained on each of 96 questions
# 20 times, in 13 wordings. Then its answers contain 85 % of the keywords for ordinary questions and 35 % for hard
# ones. On 48 questions, BM25's first passage contains 69 and 32 %, its first three 87 and 54 %. But the trained
# model's loss on general text rises from 3.3 to 6.4 nats, and it knows none of the other facts.
#
# The usual rule is: facts that change go into the prompt, form and skill into the weights. Our measurements limit both
# halves of it:
#
# 1. **Facts that change go into the prompt.** A new price is one line of the handbook. In the weights it is another
#    training run, which also changes what was right before. Facts that stay the same can be learned, from a dozen
#    wordings each, by an adapter that does nothing else.
# 2. **Form and skill go into the weights**, and reading is a skill. A small model learns the form of an answer
#    sooner than which sentence to choose. Compare it with a search.
# 3. **Improve the retriever first.** With the questions of the training data in its index, BM25 finds the right
#    passage for 91 % of the ordinary questions and for 42 % of the hard ones.
# 4. **Measure the two halves apart**: how often the right passage is found, and how many of its keywords the answers
#    contain. `minilora eval --context FILE` prints both. Until the second is high, show the passage with the answer,
#    as `minilora chat --context FILE` and `minilora serve` do.
#
# ## What to remember
#
# - In one linear layer whose inputs are equally common in all directions, LoRA of rank r finds the best update of rank
#   r. Its error is known: the squared singular values beyond r.
# - If a task needs k directions, r = k solves it, and more rank does not help. If it needs all, no small r is enough.
# - Style is cheap. Facts that follow from nothing must be stored, and need parameters.
# - Train until the loss stops falling, then compare r with 4 r, and only then blame the rank.
# - Facts that change belong in the prompt; form and skill belong in the weights. Measure both halves.
#
# Read on in [`fused.py`](../minilora/engine/fused.py) (the layer that was trained here) and
# [`optim.py`](../minilora/nn/optim.py). **Now you:** [exercises 17](exercises/17_limits.ipynb).
#
# ## Sources
#
# - The best matrix of rank r: [Eckart and Young, Psychometrika, 1936](https://doi.org/10.1007/BF02288367).
# - LoRA learns less on code and mathematics (billions of tokens, and about 100,000 pairs of instructions):
#   [Biderman et al. 2024](https://arxiv.org/abs/2405.09673), Llama-2-7B.
# - No difference on small sets, and a limit of capacity: [Schulman et al.
#   2025](https://thinkingmachines.ai/blog/lora/).
# - BM25: [Robertson and Zaragoza 2009](https://doi.org/10.1561/1500000019).
# - SmolLM2 with the right passage, 48 questions: 7 % of the keywords untrained, 42 % after 120 steps of 4 questions
#   (480); 58 % in the three sentences that BM25 finds. With 96 facts in its weights, each asked 20 times in 13
#   wordings: 85 % and 35 %, general text 3.3 and 6.4 nats. BM25's first passage: 69 and 32 %, its first three: 87 and
#   54 %; with questions in its index: 91 % and 42 %. [How all of it was measured](../tests/benchmarks/README.md).

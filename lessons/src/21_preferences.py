# %% [markdown]
# # Lesson 21: Can it learn what people prefer?
#
# So far each record had one right answer, and training raised its probability. Often nobody can write the best answer,
# but most people can say which of two answers is better. Here is such a pair, from `legal-pairs`:

# %%
from dataclasses import replace

import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.engine.fused import preference_loss
from minilora.measure.loss import sample_losses
from minilora.pages.style import GREY, LORA, ink, panels

# %%
model, tokenizer = ml.load("tiny")
records = ml.split_records(ml.read_records("legal-pairs"))
example = records["train"][0]
print("prompt:  ", example.messages[-2]["content"])
print("chosen:  ", example.messages[-1]["content"])
print("rejected:", example.rejected)
print({split: len(part) for split, part in records.items()})

# %% [markdown]
# The chosen answers tend to be shorter, give no personal advice and state their limits; the rejected ones break one of
# these rules. Can an adapter learn the difference from comparisons alone?
#
# ## 1. A preference is a comparison
#
# Suppose that each answer has a **reward** r, a number that says how good it is. Nobody can see it. What we can see is
# a **preference**: which of two answers somebody chose. People are not consistent, so the better answer does not
# always win, only more often. The model of [Bradley and Terry](https://doi.org/10.2307/2334029) from 1952 says how
# often:
#
# $$P(\text{first preferred}) = \sigma(r_1 - r_2) = \frac{1}{1 + e^{-(r_1 - r_2)}}$$
#
# > **Predict.** Two answers have rewards of 3 and 2. How often is the first one preferred? And if both rewards were
# > 100 higher?

# %%
predict("share of comparisons that the better answer wins")


# %%
def sigmoid(x):
    """1 / (1 + e^-x)"""
    return 1 / (1 + np.exp(-x))


claim("share of comparisons that the better answer wins", sigmoid(3 - 2), 0.73, 0.74)
claim("the same with rewards of 103 and 102, minus the above", sigmoid(103 - 102) - sigmoid(3 - 2), 0, 0)

# %% [markdown]
# Only the difference counts. Comparisons can never tell us that both answers are bad.
#
# ## 2. From a reward to a loss
#
# The first recipe, **RLHF** (reinforcement learning from human feedback), had two parts: train a second model to
# predict r, then train the language model to produce answers of high reward. The second part needs a brake; otherwise
# the model no longer writes sensible text, but whatever the reward model mistakes for good. The brake is the
# **reference model** $\pi_0$, the model before training. For one prompt we look for the probabilities π(y) of all
# answers y that maximise
#
# $$\sum_y \pi(y)\,r(y) \;-\; \beta \sum_y \pi(y) \log\frac{\pi(y)}{\pi_0(y)}$$
#
# The second sum is the **Kullback-Leibler (KL) divergence** of π from π₀: zero if they are equal, otherwise positive.
# **Beta** says how much this distance costs.
#
# **DPO**, direct preference optimisation, needs neither a reward model nor two parts. It follows in four steps:
#
# 1. Which π is best? Define $\pi^*(y) = \pi_0(y)\,e^{r(y)/\beta} / Z$, with the Z that makes the sum 1. Put $r = \beta
#    \log(\pi^* Z / \pi_0)$ into the objective: it becomes $\beta \log Z - \beta \sum_y \pi(y) \log
#    \frac{\pi(y)}{\pi^*(y)}$. This sum is a KL divergence again, and zero for π = π\*. So π\* is best.
# 2. Read this in the other direction. Every model is the best one for some reward: $r(y) = \beta \log
#    \frac{\pi(y)}{\pi_0(y)} + \beta \log Z$.
# 3. Insert this reward into Bradley and Terry's formula. Z is the same for both answers, so it cancels.
# 4. What remains is the probability of a comparison, in terms of the model itself. Its negative logarithm is the loss:
#
# $$L = -\log \sigma(m) \qquad m = \beta \left[ \log\frac{\pi(\text{chosen})}{\pi(\text{rejected})} -
# \log\frac{\pi_0(\text{chosen})}{\pi_0(\text{rejected})} \right]$$
#
# m is the **margin**: the difference of the two rewards that the model implies. Steps 1 and 2 can be checked with six
# answers:

# %%
rng = np.random.default_rng(0)
beta, reward = 0.5, rng.normal(size=6)
reference = rng.dirichlet(np.ones(6))  # six probabilities


def objective(policy):
    """The reward that is expected, minus beta times the distance from the reference."""
    return np.sum(policy * reward) - beta * np.sum(policy * np.log(policy / reference))


best = reference * np.exp(reward / beta)
best /= best.sum()
others = [objective(rng.dirichlet(np.ones(6))) for _ in range(10_000)]
claim("random policies that reach more than the best one", sum(other > objective(best) for other in others), 0, 0)
implied = beta * np.log(best / reference)
gap = np.abs((implied - implied[0]) - (reward - reward[0])).max()
claim("differences of implied and true rewards: largest gap", gap, 0, 1e-12)

# %% [markdown]
# ## 3. The reference model is the base with its adapter off
#
# The loss needs π₀ throughout training. In full fine-tuning the reference model is a second copy of the model, which
# must stay frozen. With LoRA it is there already: switch the adapter off. The reference model never changes, so its
# log-probabilities can also be computed once, before training. `with_reference` stores $\log \pi_0(\text{chosen}) -
# \log \pi_0(\text{rejected})$ in each pair. The log-probability of an answer is the **sum** over its tokens, the end
# token included, because probabilities of tokens are multiplied.
#
# > **Predict.** What is DPO's loss before the first step?

# %%
predict("DPO's loss before the first step")

# %%
pairs = {split: ml.encode_pairs(part, tokenizer) for split, part in records.items()}
train = ml.with_reference(model, pairs["train"])
unseen = pairs["validation"] + pairs["test"]  # 60 pairs that no run below is trained on
before = ml.sha256_of(ml.base_state(model))
config = ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
ml.add_adapter(model, config, name="trial", seed=0)
claim("DPO's loss before the first step", ml.mean_loss(model, train), 0.69314, 0.69315)
ml.remove_adapter(model, "trial")
pair = train[0]
print(f"first pair: {pair.chosen.scored} and {pair.rejected.scored} tokens, log-ratio of the base {pair.reference:.1f}")
print(f"a second copy of SmolLM2 in float32 would take {134_515_008 * 4 / 1e6:.0f} MB")

# %% [markdown]
# The margin is zero for every pair, so the loss is log 2: the model and its reference agree.
#
# ## 4. The gradient
#
# The derivative of $-\log \sigma(m)$ is $-\sigma(-m)$. By the chain rule, the loss of one pair has the gradients
#
# $$\frac{\partial L}{\partial \log \pi(\text{chosen})} = -\beta\,\sigma(-m) \qquad \frac{\partial L}{\partial \log
# \pi(\text{rejected})} = +\beta\,\sigma(-m)$$
#
# They are equal and opposite, and $\sigma(-m)$ is a weight: the probability of the wrong order, according to the model.
#
# > **Predict.** One pair has a margin of -2, another of 2. How many times larger is the gradient of the first?

# %%
predict("gradient at a margin of -2, times that at 2")

# %%
log_p = rng.normal(-40, 3, size=(5, 2))  # of five pairs: chosen, rejected
log_ratio, betas = rng.normal(0, 3, size=5), np.full(5, 0.3)
margins = betas * (log_p[:, 0] - log_p[:, 1] - log_ratio)
weights = betas * sigmoid(-margins) / len(margins)  # the loss is a mean over pairs
by_hand = np.stack([-weights, weights], axis=1)

scalars = [ml.Tensor(np.array(x), requires_grad=True) for x in log_p.ravel()]
preference_loss(*scalars, reference=log_ratio, beta=betas).backward()
engine = np.array([float(scalar.grad) for scalar in scalars]).reshape(by_hand.shape)
claim("gradient by hand and by the engine: largest difference", np.abs(by_hand - engine).max(), 0, 1e-12)
print(ml.gradcheck(lambda *x: preference_loss(*x, reference=log_ratio, beta=betas), *map(np.array, log_p.ravel())))
claim("gradient at a margin of -2, times that at 2", sigmoid(2) / sigmoid(-2), 7.38, 7.4)

# %% [markdown]
# So pairs that are already clearly in the right order hardly count any more.
#
# ## 5. Does it learn?
#
# Now we train for 20 steps of eight pairs, and compare DPO with SFT (supervised fine-tuning), which is trained on the
# same chosen answers and never sees a rejected one. For 60 pairs from the validation and test sets we ask how far each
# log-probability has moved. The **accuracy** is the share of pairs in which the chosen answer gained more than the
# rejected one: those with a positive margin.
#
# > **Predict.** How high is the accuracy of DPO? And the log-probability of the *chosen* answers: does it rise?

# %%
predict("accuracy of DPO, in percent")


# %%
def answer_log_p():
    """The log-probabilities of the chosen and of the rejected answers to the unseen prompts: (2, 60)."""
    return -sample_losses(model, [sample for pair in unseen for sample in pair.sequences]).reshape(-1, 2).T


EVERY = 2  # in the browser: 8
general = ml.encode_records(ml.read_records("general")[::EVERY], tokenizer)
base, base_general, moved, forgot = answer_log_p(), ml.mean_loss(model, general), {}, {}


def run(name, samples, lr):
    """Train a new adapter; keep what it has changed, and leave it active."""
    ml.add_adapter(model, config, name=f"run-{len(moved)}", seed=0)
    ml.fit(model, samples, steps=20, batch_size=8, lr=lr)
    moved[name], forgot[name] = answer_log_p() - base, ml.mean_loss(model, general) - base_general
    chosen, rejected = moved[name]
    print(
        f"{name:<15} accuracy {100 * np.mean(chosen > rejected):>3.0f} %, chosen {chosen.mean():+6.1f}, rejected "
        f"{rejected.mean():+6.1f}, loss on general text {forgot[name]:+.2f}"
    )


run("SFT", [pair.chosen for pair in train], lr=1e-2)
for beta in (0.03, 0.1, 1.0):
    run(f"DPO, beta {beta:g}", [replace(pair, beta=beta) for pair in train], lr=3e-3)
dpo = moved["DPO, beta 0.1"]
claim("accuracy of DPO, in percent", 100 * np.mean(dpo[0] > dpo[1]), 90, 100)
claim("accuracy of SFT, in percent", 100 * np.mean(moved["SFT"][0] > moved["SFT"][1]), 90, 100)
with ml.disable_adapter(model):
    claim("adapter off after training: largest change of a log-probability", np.abs(answer_log_p() - base).max(), 0, 0)
claim("the base has changed (0: no)", float(ml.sha256_of(ml.base_state(model)) != before), 0, 0)

# %%
figure, axes = panels(width=5.5, height=4.2)
for name, color, mark in (("SFT", GREY, "o"), ("DPO, beta 0.1", LORA, "^")):
    chosen, rejected = moved[name]
    axes.plot(chosen, rejected, mark, color=color, markersize=5, alpha=0.7)
    corner = (chosen.max(), np.median(rejected)) if name != "SFT" else (np.median(chosen), rejected.min())
    axes.annotate(name, corner, (10, -18), textcoords="offset points", color=ink(color))
axes.axline((0, 0), slope=1, color=GREY, linewidth=1, linestyle="--")
axes.set(xlabel="change of log π(chosen), nats", ylabel="change of log π(rejected), nats")
show(figure, alt="60 pairs: SFT moves them to the right, DPO moves them down, both below the dashed diagonal")

# %% [markdown]
# *How to read it.* Each mark is a pair. Below the dashed line the chosen answer gained more than the rejected one.
#
# Both methods get nearly all pairs right, in opposite ways. SFT raises the chosen answers; the rejected ones stay where
# they were. DPO pushes the rejected answers down. It even lets the chosen ones fall, as long as the rejected ones fall
# more: the loss sees only the difference.
#
# Do not read too much into the accuracy. In these data, a method that merely counts words also gets all test pairs
# right ([card](../minilora/data/SKILLS.md)): careful answers use certain words.
#
# ## 6. What beta does
#
# The margin is beta times the shift of the log-ratio. Once the margin is large, $\sigma(-m)$ is near zero and the pair
# has hardly any gradient left. With a beta of 1 a shift of 5 nats is enough for that; with a beta of 0.03, training
# continues far beyond it.

# %%
shift = {name: float(np.mean(chosen - rejected)) for name, (chosen, rejected) in moved.items()}
for beta in (0.03, 0.1, 1.0):
    name = f"DPO, beta {beta:g}"
    print(
        f"beta {beta:<5g} shift {shift[name]:5.1f} nats, margin {beta * shift[name]:5.1f}, {forgot[name]:+.2f} general"
    )
claim("shift with beta 0.03, times that with 1", shift["DPO, beta 0.03"] / shift["DPO, beta 1"], 2, 6)
claim("general text: rise with beta 0.03, minus that with 1", forgot["DPO, beta 0.03"] - forgot["DPO, beta 1"], 0.5, 2)
claim("general text: rise with DPO, beta 0.1, minus that with SFT", forgot["DPO, beta 0.1"] - forgot["SFT"], 0.3, 1.5)

# %% [markdown]
# With a small beta the model moves further from its reference, and forgets more. DPO forgets much more than SFT here. A
# likely reason, which we have not tested: nothing tells it which text is good, it only knows what to avoid. We chose a
# high learning rate to see this in 20 steps. In practice DPO follows SFT, and its rate is a tenth of SFT's or less.
#
# ## 7. What goes wrong
#
# > **Predict.** In how many of the 60 pairs have both answers become less probable? And can you tell chosen from
# > rejected answers by the probabilities that the base gives them?

# %%
length = np.array([[sample.scored for sample in pair.sequences] for pair in unseen]).T  # tokens: (2, 60)
both_fell = np.mean((dpo < 0).all(axis=0))
at_once = np.mean(base[0] > base[1])
by_length = np.mean((base[0] > base[1]) == (length[0] < length[1]))
claim("pairs in which both became less probable, in percent", 100 * both_fell, 60, 100)
claim("pairs in which the base finds the chosen answer more probable, in percent", 100 * at_once, 50, 70)
claim("pairs in which the base finds the shorter answer more probable, in percent", 100 * by_length, 90, 100)
claim(
    "shift and extra length of the rejected answer: correlation",
    np.corrcoef(dpo[0] - dpo[1], length[1] - length[0])[0, 1],
    0.4,
    0.95,
)

# %% [markdown]
# - **Both fall.** The probability that both lose goes to answers that nobody has judged. Watch log π(chosen) in
#   training. If it falls far, raise beta, lower the learning rate, or add the SFT loss.
# - **Length.** A sum over more tokens is lower, so "more probable" means little more than "shorter": the base's
#   probabilities find the chosen answer hardly better than chance. A shift grows with the number of tokens, too.
#   Compare the log-probability of each answer with its own value before training, as the margin does. Averaging over
#   tokens is another method ([SimPO](https://arxiv.org/abs/2405.14734)), and not DPO: mixing the two is a common bug.
# - **A reference that moves.** If π₀ is computed with the adapter on, every margin is zero and every pair has the
#   weight one half for ever. Nothing stops the model from moving further.
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
# from peft import PeftModel
# from transformers import AutoModelForCausalLM
#
# theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny"), "preferred")
# def log_p(s):  # of a sample's answer; "preferred" is the folder of a saved adapter
#     return -theirs(torch.tensor([s.ids]), labels=torch.tensor([s.labels])).loss * s.scored
# ratio = log_p(pair.chosen) - log_p(pair.rejected)
# with theirs.disable_adapter(), torch.no_grad():
#     reference = log_p(pair.chosen) - log_p(pair.rejected)
# loss = -torch.nn.functional.logsigmoid(pair.beta * (ratio - reference))
# ```
#
# </details>
#
# ## What to remember
#
# - A preference says which of two answers is better. Its probability is the sigmoid of a difference of rewards.
# - DPO writes the reward as $\beta \log(\pi / \pi_0)$. This leaves a loss on pairs, without a reward model.
# - With LoRA the reference model is the base with its adapter off: no second copy.
# - The two log-probabilities get opposite gradients, weighted by $\sigma(-m)$. Only the difference is trained, so both
#   can fall.
# - Beta says how much it costs to move away from the reference. Log-probabilities are summed over the answer's tokens.
#
# `minilora finetune --data legal-pairs --loss dpo` does this for any file of pairs. Read on in
# [`preference_loss`](../minilora/engine/fused.py) and in [`preferences.py`](../minilora/measure/preferences.py); TRL's
# `DPOTrainer` computes the same loss. **Now you:** [exercises 21](exercises/21_preferences.ipynb).
#
# ## Sources
#
# - [Rafailov et al. 2023](https://arxiv.org/abs/2305.18290), DPO: the derivation is in their section 4, the loss is
#   equation 7. They use a beta of 0.1 in most experiments.
# - [Ouyang et al. 2022](https://arxiv.org/abs/2203.02155): the recipe in two parts, with a reward model.
# - [Meng, Xia & Chen 2024](https://arxiv.org/abs/2405.14734), SimPO: averaged log-probabilities, no reference model.
# - [Pal et al. 2024](https://arxiv.org/abs/2402.13228) show that the chosen answer's probability can fall under DPO.

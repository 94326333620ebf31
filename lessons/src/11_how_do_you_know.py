# %% [markdown]
# # Lesson 11: How do you know?
#
# A paper says that LoRA+ makes fine-tuning up to about two times faster (Hayou et al. 2024). Is this true of a small
# model on a laptop? One run of each method gives an answer in seconds, and this answer is wrong. So is the answer of
# three runs. This lesson takes one claim through all that lies between a run and a result: a quantity, a band, seeds,
# a control, a tuned baseline. Watch how often the verdict changes.
#
# LoRA+ is easy to state ([lesson 19](19_relatives.ipynb) has more): it is plain LoRA, but B's learning rate is larger
# than A's, here 16 times as large.

# %%
import matplotlib.pyplot as plt
import numpy as np

from minilora.course import claim, predict, show
from minilora.experiments.claim import Band, Setting, Verdict
from minilora.experiments.tiny import tiny_run
from minilora.measure.statistics import Interval
from minilora.pages.style import GREY, LORA, ink

# %% [markdown]
# ## 1. From a sentence to a number
#
# "Twice as fast" is not a number yet. We make it one: **gain** = loss of LoRA after 30 steps, minus loss of LoRA+
# after 15 steps, on legal terms from the test set. If the gain is zero or more, LoRA+ has reached LoRA's loss with
# half the steps: it is at least twice as fast. If it is below zero, it is not.
#
# The second half of this rule is the *band*: which values support the claim, and which contradict it. We write the
# band down now, before any run. Section 6 shows why.

# %%
BAND = Band("LoRA after 30 steps minus LoRA+ after 15, in nats", low=0, against_below=0)
print(BAND.quantity, "|", BAND)
LONG, SHORT = 30, 15
CHOOSING = (0, 1, 2)  # in the browser: (0,)
setting = Setting()  # trains as many at a time as there are cores
known, story = {}, []


def losses(variant, lr, steps, seeds=(0, 1, 2), part="test"):
    """The loss at the end, a number per seed."""
    return np.array([known[variant, lr, steps, seed][part] for seed in seeds])


def train(*runs, seeds=(0, 1, 2)):
    """Train each (variant, lr, steps) of the runs with each seed: those that are not known yet."""
    new = [(*one, seed) for one in runs for seed in seeds if (*one, seed) not in known]
    trials = [dict(zip(("variant", "lr", "steps", "seed"), one, strict=True)) for one in new]
    known.update(zip(new, setting.each(tiny_run, trials), strict=True))


def say(name, gains):
    """Print the interval of the gain and the verdict, and keep both for the picture."""
    found = Interval.of(gains)
    story.append((name, gains, found, BAND.verdict(found)))
    print(f"{name}: gain {found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}): {BAND.verdict(found)}")
    return found


# %% [markdown]
# ## 2. One run of each
#
# A script for a large model comes with the learning rate 0.0003. We use it for both (B's is then 0.0048 in LoRA+). The
# learning rate, the random initialisation and the batches are the same: what could be fairer?
#
# > **Predict.** Is LoRA+ after 15 steps ahead of LoRA after 30, or behind? And would you believe the result?

# %%
usual = 3e-4
train(("lora", usual, LONG), ("lora+", usual, SHORT), seeds=[0])
gain = losses("lora", usual, LONG, [0]) - losses("lora+", usual, SHORT, [0])
say("one seed, one rate", gain)
claim("gain with one seed", gain[0], 0.12, 0.34)

# %% [markdown]
# The claim is reproduced, and clearly: with half the steps, LoRA+ is well ahead. Many reports end here.
#
# ## 3. Is the result repeatable?
#
# The initialisation of A is random, and so is the order of the batches. Another *seed* gives another number. So run
# several seeds, and ask how precise their mean is. The rule is the mean ± t standard errors, where the *standard error*
# is the standard deviation of the numbers divided by the square root of their number. A 95 % confidence interval should
# contain the true value in 95 % of all cases. Many people use the factor 1.96. That is z, from the normal distribution;
# it is right only if the standard deviation is known, or estimated from many numbers.
#
# > **Predict.** Take three seeds and the factor 1.96. In what percentage of all cases does the interval contain the
# > true value?

# %%
predict("± 1.96 standard errors: percent that contain the true value")

# %%
rng = np.random.default_rng(0)
intervals = [Interval.of(rng.standard_normal(3)) for _ in range(4000)]  # the true value is 0
student_t = 4.303  # Student's t for three numbers, which Interval takes
hits = {
    t: 100 * np.mean([abs(i.mean) <= t / student_t * (i.high - i.mean) for i in intervals]) for t in (1.96, student_t)
}
claim("± 1.96 standard errors: percent that contain the true value", hits[1.96], 79, 83)
claim("± 4.303 standard errors: percent that contain the true value", hits[student_t], 94, 96)

# %% [markdown]
# In far fewer than the promised 95 %. The standard deviation itself is only an estimate from three numbers, and often
# too small. Student's t accounts for that: it is 4.303 for three numbers, 2.776 for five, and approaches 1.96 for very
# many.
#
# There is a second point. Do not compare the mean of one method with the mean of the other: subtract first, seed by
# seed. Both methods had the same batches, so a seed that was hard for one was hard for both. This is a *paired*
# difference.

# %%
train(("lora", usual, LONG), ("lora+", usual, SHORT))
found = say("three seeds, one rate", losses("lora", usual, LONG) - losses("lora+", usual, SHORT))
claim("three seeds: mean gain", found.mean, 0.15, 0.31)
claim("three seeds: lower end of the interval", found.low, 0.05, 0.3)

# %% [markdown]
# The result is repeatable: the interval is far from zero. So is LoRA+ twice as fast? We now know that the number is not
# an accident. We do not know yet *what it measures*. More seeds cannot tell us that.
#
# ## 4. The control
#
# A **control** removes the cause and leaves everything else unchanged. Then the verdict must change. If it does not,
# something else is the cause. The stated cause is that B has a larger learning rate than A. This cause can be removed
# in two ways: give B the small rate of A, or give A the large rate of B. Both are plain LoRA, with 15 steps.
#
# > **Predict.** What is the gain of each of the two controls? If a difference between the rates of A and B is the
# > cause, both gains are below zero.

# %%
train(("lora", usual, SHORT), ("lora", 16 * usual, SHORT))
small, large = (losses("lora", usual, LONG) - losses("lora", lr, SHORT) for lr in (usual, 16 * usual))
say("control: both at A's rate", small)
say("control: both at B's rate", large)
claim("control, both at A's rate: mean gain", small.mean(), -0.12, -0.02)
claim("control, both at B's rate: mean gain", large.mean(), 0.22, 0.45)

# %% [markdown]
# The first control changes the verdict, as it should. If you try only this one, you will be satisfied. The second
# control does not change it: plain LoRA, with equal rates for A and B, is "twice as fast" as plain LoRA, and the gain
# is even larger. So the cause is not the *difference* between A and B. It is the size of the learning rate. We have not
# measured LoRA+; we have measured that 0.0003 is too small.
#
# A control can miss a fault. Ask what else your change has changed, and remove that, too.
#
# ## 5. A tuned baseline
#
# Now each method gets its own best learning rate out of four, half a decade to a decade apart. We choose the rate on
# the *validation set* and measure the gain on the *test set*, because on the set where it was chosen, the best of
# several looks better than it is.
#
# > **Predict.** What is left of the gain?

# %%
predict("each at its best rate: mean gain")

# %%
tried = {("lora", LONG): (3e-4, 3e-3, 1e-2, 3e-2), ("lora+", SHORT): (1e-4, 3e-4, 1e-3, 3e-3)}
train(*((variant, lr, steps) for (variant, steps), rates in tried.items() for lr in rates), seeds=CHOOSING)
best, at_edge = {}, 0
for (variant, steps), rates in tried.items():
    means = [losses(variant, lr, steps, CHOOSING, "validation").mean() for lr in rates]
    best[variant] = rates[int(np.argmin(means))]
    at_edge += best[variant] in (rates[0], rates[-1])
    print(f"{variant:<5} {steps} steps:", *(f"  {lr:g}: {mean:.2f}" for lr, mean in zip(rates, means, strict=True)))
claim("how many are best at an edge of their rates", at_edge, 0, 0)
train(("lora", best["lora"], LONG), ("lora+", best["lora+"], SHORT))
found = say("each at its best rate", losses("lora", best["lora"], LONG) - losses("lora+", best["lora+"], SHORT))
claim("each at its best rate: mean gain", found.mean, -0.26, -0.06)
claim("each at its best rate: upper end of the interval", found.high, -0.2, -0.001)
same_steps = losses("lora+", best["lora+"], SHORT) - losses("lora", 16 * usual, SHORT)
claim("after 15 steps each: LoRA at 0.0048 ahead of LoRA+ at its best by", same_steps.mean(), 0.02, 0.2)

# %%
figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
axes.axvspan(0, 0.5, color=GREY, alpha=0.2, linewidth=0)
axes.axvline(0, color=ink(GREY), linewidth=1)
for row, (_, gains, found, verdict) in enumerate(story):
    axes.plot([found.low, found.high], [row, row], color=LORA, linewidth=3, solid_capstyle="butt")
    axes.plot(gains, np.full(len(gains), row), "o", color=LORA, markersize=8, markeredgecolor="white")
    axes.annotate(str(verdict), (1.02, row), xycoords=("axes fraction", "data"), va="center")
axes.set(
    xlim=(-0.3, 0.5), ylim=(len(story) - 0.5, -0.5), xlabel="gain: LoRA after 30 steps minus the other after 15 (nats)"
)
axes.set_yticks(range(len(story)), [name for name, *_ in story])
axes.tick_params(axis="y", length=0)
axes.spines[["top", "right", "left"]].set_visible(False)
show(
    figure, alt="Five rows of dots with intervals: two above zero, a control below, another above, the tuned one below."
)

# %% [markdown]
# *How to read it.* A dot is a seed, a bar is the interval, and the grey area is the band: right of zero, the claim
# holds. Read from top to bottom: each row is a better test of the same sentence.
#
# Nothing is left of the gain; its sign has changed. Compared with a tuned LoRA of 30 steps, LoRA+ of 15 steps is
# clearly behind. Even plain LoRA of 15 steps, with a rate that nobody tuned, comes closer to it. So the verdict is
# **contradicted**. What does the word mean?
#
# | verdict | the interval |
# |---|---|
# | reproduced | its mean is in the band, and it does not reach values that contradict |
# | contradicted | it lies entirely among values that contradict |
# | not at this size | neither: too few seeds, or too small an effect |
#
# A verdict is about *this* band and setting: half the steps, a model of a million parameters, one task, a ratio of 16.
# The paper's argument is about wide models, and its models were far wider. And it did tune both rates; the mistakes in
# this lesson are ours, made on purpose. But others have compared variants of LoRA with an equally well tuned plain
# LoRA, on models of several sizes, and found all within 1 to 2 % of each other (Lee et al. 2026).
#
# ## 6. The band that came afterwards
#
# Why must the band come first? Suppose that a method changes *nothing*. Somebody measures ten quantities with and
# without it (several losses, early and late, for several ranks), with three seeds each. All differences are due to
# chance.
#
# > **Predict.** We simulate many such empty worlds. In what percentage of them can something be "reproduced", if you
# > may choose afterwards which of the ten the claim was about? If you may also choose the sign? If you may add seeds,
# > one by one, until it looks good? If only the mean counts, without an interval?

# %%
worlds = np.random.default_rng(1).standard_normal((400, 10, 10))  # (world, quantity, seed)


def holds(gains):
    """Would this be called reproduced?"""
    return BAND.verdict(Interval.of(gains)) == Verdict.REPRODUCED


researchers = {
    "named one quantity before": lambda world: holds(world[0, :3]),
    "chose one of ten afterwards": lambda world: any(holds(gains[:3]) for gains in world),
    "and which way it goes": lambda world: any(holds(gains[:3]) or holds(-gains[:3]) for gains in world),
    "and added seeds, up to ten": lambda world: any(
        holds(gains[:n]) or holds(-gains[:n]) for gains in world for n in range(3, 11)
    ),
    "took the mean alone": lambda world: any(gains[:3].mean() > 0 for gains in world),
}
bands = ((0.5, 6), (17, 29), (35, 49), (75, 94), (99, 100))
for (name, found_something), (low, high) in zip(researchers.items(), bands, strict=True):
    claim(f"{name}: percent of empty worlds reproduced", 100 * np.mean([found_something(w) for w in worlds]), low, high)

# %% [markdown]
# If you name one quantity and its band beforehand, you are wrong about as often as the interval promises: the interval
# misses the true value in 5 % of all cases, and in half of these it lies above the value, which looks like a gain.
# Each choice made afterwards is another chance to win by luck. With ten quantities, two signs and as many seeds as you
# like, chance alone is "reproduced" in most worlds. This is called **p-hacking**. Nobody has to lie for this; it is
# enough to look at the results first. Writing the band down first is *preregistration*.
#
# So the order is: sentence, number, band, seeds, control, run, verdict. In minilora a claim is one file in that order,
# with a switch that removes or adds the cause. `minilora reproduce` runs these files, and a test checks that each
# verdict can change. The claim about LoRA+ is [here](../minilora/claims/lora_plus.py), with another measure of
# "faster": the number of steps to a loss that both methods reach.
#
# ## What to remember
#
# - A claim is a number with a band, and the band is written down before the run.
# - One seed has no interval. Three have a wide one: use Student's t, on paired differences.
# - Seeds show whether a result is repeatable, not what it means. A control shows that: remove the cause, and nothing
#   else.
# - Tune the baseline as well as the new method: choose on the validation set, measure on the test set.
# - There are three verdicts. A quantity chosen after looking at the results deserves none.
#
# Read on in [`Interval`](../minilora/measure/statistics.py), [`Band` and `Claim`](../minilora/experiments/claim.py),
# and in [`tiny_run`](../minilora/experiments/tiny.py). **Now you:** [exercises
# 11](exercises/11_how_do_you_know.ipynb): the interval, the verdict, and your own claim in worlds whose truth is
# known.
#
# ## Sources
#
# - [Hayou, Ghosh & Yu 2024](https://arxiv.org/abs/2402.12354), LoRA+: up to about 2 times faster, from the abstract;
#   the sweeps over both rates are in its experiments.
# - [Lee et al. 2026](https://arxiv.org/abs/2602.04998), Learning Rate Matters: within 1 to 2 %, from the abstract.
# - Student's t is 4.303 for two degrees of freedom and 2.776 for four: any table, such as that of
#   [NIST](https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm).

# %% [markdown]
# # Lesson 1: Can a gradient be measured?
#
# A model is trained by moving each of its numbers a little in the direction that makes the **loss** smaller. The loss
# is one number: how badly the model did. To know the direction, one must know for each number how the loss changes
# with it. That is a **slope**. All slopes together are the **gradient**, an array of the shape of what is trained.
#
# Gradients are computed with formulas, and formulas can be wrong. Nothing crashes then: the model learns worse, or not
# at all. So we begin with a way to get a slope without any formula: we **measure** it. In this lesson you will
#
# 1. get a slope from two values, and see why it matters which two,
# 2. find how far to move a number, on a real language model,
# 3. check a formula, a right one and a wrong one,
# 4. count what measuring costs.
#
# [The exercises](exercises/01_gradient.ipynb) let you write your own check. Later lessons use it.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, show
from minilora.pages.style import AMBER, BLACK, GREY, ink

# %% [markdown]
# ## 1. Two values give a slope
#
# Take $f(x) = x^3$. Its slope is known, $3x^2$, so at $x = 2$ it is 12. To measure it, move x by a small step h and
# see how far f moves. There are two ways to do that:
#
# $$\text{one-sided:}\;\; \frac{f(x + h) - f(x)}{h} \qquad\qquad \text{central:}\;\; \frac{f(x + h) - f(x - h)}{2h}$$
#
# > **Predict.** With $h = 0.1$ both are somewhat wrong. Now h is made ten times smaller. How many times smaller does
# > the error of each become?


# %%
def cube(x):
    return x**3


errors = {}
print("    h   one-sided    central")
for h in (0.1, 0.01, 0.001):
    one_sided = (cube(2 + h) - cube(2)) / h
    central = (cube(2 + h) - cube(2 - h)) / (2 * h)
    errors[h] = one_sided - 12, central - 12
    print(f"{h:>5} {one_sided:>11.6f} {central:>10.6f}")
claim("one-sided: error at 0.1 over error at 0.01", errors[0.1][0] / errors[0.01][0], 9.8, 10.2)
claim("central: error at 0.1 over error at 0.01", errors[0.1][1] / errors[0.01][1], 99.9, 100.1)

# %% [markdown]
# Ten times against a hundred times. To see why, multiply out: $(2 + h)^3 = 8 + 12h + 6h^2 + h^3$, so the one-sided
# quotient is $12 + 6h + h^2$. In the central one the term with $h^2$ is the same above and below, and goes away:
# $12 + h^2$ is left. It is so for every smooth function: the error of the one-sided quotient shrinks as h, that of the
# central one as $h^2$. The price is two values of f for each number, where one-sided quotients share
# $f(x)$. From now on we measure with the central one.
#
# ## 2. How far to move
#
# Smaller steps were better so far. Now a function that is not so simple: the loss of minilora's own tiny language
# model, which has learned to guess the next piece of a text. What happens inside is the matter of later lessons. For
# us it is a function of about a million numbers. We move four of them, one at a time, all in one matrix.
#
# What do we compare with? `backward()` computes the gradient with formulas; [lesson 2](02_tape.ipynb) builds it. For
# now: it is another way to the same numbers.

# %%
model, tokenizer = ml.load("tiny")
ids = np.array([tokenizer.encode("We the people of the United States, in order to form a more perfect union")])
weights = model.trainable_parameters()  # name -> numbers
NAME = "model.layers.0.self_attn.q_proj.weight"


def keep_numbers_as(dtype):
    for weight in weights.values():
        weight.data = weight.data.astype(dtype)


def loss():
    with ml.no_grad():
        return float(model.loss(ids, ids).data)


def slope_at(index, h):
    """The central difference for one number of the matrix. The old number is put back."""
    w = weights[NAME].data
    old = w[index]
    w[index] = old + h
    above = loss()
    w[index] = old - h
    below = loss()
    w[index] = old
    return (above - below) / (2 * h)


keep_numbers_as(np.float64)
model.loss(ids, ids).backward()
rng = np.random.default_rng(0)
places = [tuple(int(i) for i in rng.integers(128, size=2)) for _ in range(4)]
slopes = np.array([weights[NAME].grad[place] for place in places])
largest = np.abs(slopes).max()
print(f"the model has {ml.count_parameters(model).total:,} numbers; its loss on this text is {loss():.3f}")
print("four of its slopes:", ", ".join(f"{slope:.6f}" for slope in slopes))

# %% [markdown]
# The computer keeps a number with a fixed count of digits: float64 about 16, float32 about 7. Models are trained in
# float32, or coarser. We measure in both, with steps from 1 down to $10^{-13}$. The error is the largest difference
# among the four, divided by the largest slope: 0.01 means that the second digit is wrong, and 1 that nothing is
# right.
#
# > **Predict.** Which step is best in float64: $10^{-3}$, $10^{-8}$ or $10^{-13}$? And what comes out in float32 with
# > a step of $10^{-5}$: a slope that is right to five digits, to two, or to none?

# %%
steps = 10.0 ** np.arange(-13, 0.1, 0.5)
error = {}
for dtype in (np.float64, np.float32):
    keep_numbers_as(dtype)
    found = [[slope_at(place, dtype(h)) for place in places] for h in steps]
    error[dtype] = np.abs(np.array(found) - slopes).max(axis=1) / largest
    best = error[dtype].argmin()
    print(f"{dtype.__name__}: best error {error[dtype][best]:.1e}, with a step of {steps[best]:.0e}")
claim("best error in float64", error[np.float64].min(), 0, 1e-7)
claim("best error in float32", error[np.float32].min(), 1e-4, 0.03)
claim("error in float64 with a step of 1e-5", error[np.float64][16], 0, 1e-6)
claim("error in float32 with a step of 1e-5", error[np.float32][16], 1, np.inf)

# %% [markdown]
# Not the smallest step, and in float32 not a single digit with a step that serves well in float64. Two errors work
# against each other:
#
# - **The curve.** The slope between two points is not the slope at one. This error grows with the step, as $h^2$.
# - **Rounding.** The loss is some 2.6, and kept with a relative error of about u: $u = 10^{-16}$ in float64,
#   $6 \cdot 10^{-8}$ in float32. The two values differ by very little, and each carries an error of about u times the
#   loss. Divided by the step, that is what the slope is off by. It grows when the step gets **smaller**.
#
# The second one can be predicted from u, the loss and the largest slope, before anything is measured: these are the
# black and the amber dashed line. The grey one is $h^2$, drawn through the dot at $h = 0.1$.

# %%
rounding = {dtype: np.finfo(dtype).eps / 2 * loss() / (steps * largest) for dtype in error}
figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
for dtype, color in ((np.float64, BLACK), (np.float32, AMBER)):
    axes.plot(steps, error[dtype], "o", color=color, markersize=5)
    axes.plot(steps, rounding[dtype], "--", color=color, linewidth=1.5)
curve = error[np.float64][24] * (steps / 0.1) ** 2
axes.plot(steps, curve, "--", color=GREY, linewidth=1.5)
axes.set(xscale="log", yscale="log", xlim=(5e-14, 4), ylim=(1e-10, 1e5))
axes.set(xlabel="step h", ylabel="relative error of the measured slopes")
axes.text(2e-6, 2e3, "float32: rounding, u · loss / h", color=ink(AMBER))
axes.text(2e-13, 2e-5, "float64:\nrounding", color=BLACK)
axes.text(1.5e-2, 2e-9, "the curve, as h²", color=ink(GREY))
axes.spines[["top", "right"]].set_visible(False)
show(
    figure,
    alt="Error of measured slopes against the step, both axes logarithmic. The float64 dots fall, reach 1e-9 near a "
    "step of 1e-3 and rise again as h squared; the float32 dots fall along a line that is far higher.",
)

# %% [markdown]
# *How to read it.* Dots are measured, dashed lines predicted. Go from right to left: the black dots fall as the step
# gets smaller, along the grey line, until they meet the black line of rounding and climb it. The amber dots meet their
# line at once, since float32 rounds half a billion times as coarsely. Far left they stay at 1: there the step is so
# small that the number does not change at all, and the measured slope is zero.

# %%
claim("curve: error at 0.1 over error at 0.01, in float64", error[np.float64][24] / error[np.float64][22], 80, 120)
for dtype in error:
    claim(
        f"rounding in {dtype.__name__}: measured over predicted, step 1e-5",
        (error[dtype] / rounding[dtype])[16],
        0.1,
        10,
    )
print(f"roundings compared: {np.finfo(np.float32).eps / np.finfo(np.float64).eps:,.0f} times")

# %% [markdown]
# So: **measure in float64**. The step of minilora's own check is $10^{-5}$, which leaves seven digits even here. A
# check in float32 has to let errors of a tenth of a percent pass (0.001), and mistakes as small as that with them.
#
# ## 3. A formula under test
#
# Now a formula for a gradient. Our function is a layer: rows of `x`, shape (T, n), times a matrix `W`, shape (m, n),
# then tanh, a curve that flattens toward 1 and -1. Its slope is $1 - \tanh^2$. For fixed numbers `c`, shape (T, m),
# let
#
# $$y = \tanh(x W^\top) \qquad L = \sum_{ti} c_{ti}\, y_{ti} \qquad dW = \big(c\,(1 - y^2)\big)^\top x$$
#
# where $c\,(1 - y^2)$ is number by number. Take the last formula as given. If it is right, a measurement will say so.
#
# **All numbers at once.** To measure each slope takes two values of L per number. There is a cheaper test: move *all*
# numbers of W, each by h times a random number $v$. By the formula the loss then moves by h times $\sum v_{ij}\,
# dW_{ij}$, so two values test the whole gradient.
#
# > **Predict.** Someone forgets the factor $1 - y^2$. The array still has the right shape.
# > Will one random direction notice?

# %%
T, m, n = 8, 3, 5
x, W, c, v = (rng.standard_normal(shape) for shape in [(T, n), (m, n), (T, m), (m, n)])


def L(W):
    return (c * np.tanh(x @ W.T)).sum()


y = np.tanh(x @ W.T)
formulas = {"right": (c * (1 - y**2)).T @ x, "forgetful": c.T @ x}
h = 1e-5
measured = (L(W + h * v) - L(W - h * v)) / (2 * h)
off = {}
for name, dW in formulas.items():
    off[name] = abs((v * dW).sum() / measured - 1)
    print(f"{name:<10} by formula {(v * dW).sum():>10.6f}   measured {measured:>10.6f}")
claim("relative error of the right formula", off["right"], 0, 1e-7)
claim("relative error of the forgetful one", off["forgetful"], 0.05, np.inf)

# %% [markdown]
# It notices, but does not say where. For that, move one number at a time.
# [`gradcheck`](../minilora/engine/gradcheck.py) does so for every number of every input and stops at the worst. It
# takes an operation that brings its own formula, made with [`op`](../minilora/engine/tensor.py): a function that
# returns its value, and for each input a function that turns `g`, the slopes of the loss with respect to the value,
# into those with respect to the input.


# %%
@ml.op
def layer(x, W):
    y = np.tanh(x @ W.T)
    return y, lambda g: (g * (1 - y**2)) @ W, lambda g: (g * (1 - y**2)).T @ x


@ml.op
def forgetful_layer(x, W):
    y = np.tanh(x @ W.T)
    return y, lambda g: (g * (1 - y**2)) @ W, lambda g: g.T @ x


report = ml.gradcheck(layer, x, W)
print(report)
claim("largest relative error of any slope", report.max_relative_error, 0, 1e-6)
try:
    ml.gradcheck(forgetful_layer, x, W)
except ml.GradientError as message:
    print("caught:", str(message).replace(": got", ":\n        got"))

# %% [markdown]
# The message names the input (0 is x, 1 is W) and the place in it. Expected is what was measured, got is what the
# formula says.
#
# ## 4. What it costs
#
# If slopes can be measured, why does anyone need formulas?
#
# > **Predict.** The tiny model has about a million numbers. How long would it take to measure its whole gradient once:
# > seconds, minutes or hours?

# %%
numbers = ml.count_parameters(model).total
claim("values of the loss for one whole gradient", 2 * numbers, 2_099_456, 2_099_456)

# %% tags=["measured"]
start = time.perf_counter()
for _ in range(20):
    loss()
seconds = (time.perf_counter() - start) / 20
start = time.perf_counter()
for _ in range(20):
    model.loss(ids, ids).backward()
backward = (time.perf_counter() - start) / 20
print(f"one value of the loss: {1000 * seconds:.1f} ms; all of them: {2 * numbers * seconds / 3600:.1f} hours")
print(f"with backward(): {1000 * backward:.1f} ms, as long as {backward / seconds:.1f} values of the loss")

# %% [markdown]
# Hours, for one step of a training that takes thousands. The other way gives all slopes in the time of a few values
# of the loss, however many numbers there are. How that is possible is the question of [lesson 2](02_tape.ipynb).
#
# ## What to remember
#
# - A slope is measured by moving a number **up and down**: the error is of order $h^2$, with one side only of order h.
# - A smaller step is not always better: below some step, rounding grows as $1/h$.
# - Check gradients in **float64**; in float32 the measurement itself is wrong in the fourth digit, or earlier.
# - A check is worth something if it catches a wrong formula: try it on one.
# - Measuring costs two values of the loss per number, so it is for checking, not for training.
#
# Read on in the source: [`gradcheck`](../minilora/engine/gradcheck.py), whose step and tolerance you now can judge.
#
# ## Sources
#
# - The two errors and the best step between them: W. H. Press and others, *Numerical Recipes*, section 5.7
#   ([numerical.recipes](https://numerical.recipes)). No figure of this page comes from there.

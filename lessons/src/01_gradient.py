# %% [markdown]
# # Lesson 1: Can a gradient be measured?
#
# A model is trained by changing each of its **parameters** a little in the direction that reduces the **loss**, a
# number that says how badly the model did. To know the direction, we must know how the loss changes with each
# parameter. That is a **partial derivative**. All of them together are the **gradient**, an array of the parameters'
# shape.
#
# Gradients are computed with formulas, and formulas can be wrong. A wrong formula does not crash: the model just learns
# less well, or not at all. So we begin by **measuring** derivatives, without any formula. You will
#
# 1. measure a derivative from two values of a function, and see which two to take,
# 2. find the best step size, on a real language model,
# 3. check a right formula and a wrong one,
# 4. count what measuring costs.
#
# You need Python (functions within functions, decorators), NumPy arrays, matrix multiplication, sums written with Σ,
# and derivatives: of polynomials, of $e^x$ and $\ln x$, and the product, quotient and chain rules.
#
# In [the exercises](exercises/01_gradient.ipynb) you write your own gradient check. Later lessons use it.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.pages.style import AMBER, BLACK, GREY, ink

# %% [markdown]
# ## 1. A derivative from two values
#
# Take $f(x) = x^3$. Its derivative is $3x^2$, so at $x = 2$ it is 12. To measure it, change x by a small step h and
# see how much f changes. There are two such **finite differences**:
#
# $$\text{one-sided:}\;\; \frac{f(x + h) - f(x)}{h} \qquad\qquad \text{central:}\;\; \frac{f(x + h) - f(x - h)}{2h}$$
#
# > **Predict.** With $h = 0.1$ both have an error. Now we make h ten times smaller. How many times smaller does each
# > error become?
#
# The next cell records your guesses. On each line, type in both ends of a range that you are 80 % sure of, as in
# `predict("...", 2, 5)`, and run the cell. `minilora progress` later shows how many of your ranges contained the
# measured number: about 80 % should.

# %%
predict("one-sided: error at 0.1 over error at 0.01")
predict("central: error at 0.1 over error at 0.01")


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
# The errors become ten times and a hundred times smaller. (The lines that end with "holds" compare a measured number
# with the range that we had claimed for it.) To see why, expand: $(2 + h)^3 = 8 + 12h + 6h^2 + h^3$, so the one-sided
# difference is $12 + 6h + h^2$. In the central difference the terms with $h^2$ in $f(x + h)$ and $f(x - h)$ cancel:
# $12 + h^2$ is left. The same holds for every smooth function: the error of the one-sided difference is of order h,
# that of the central one of order $h^2$. The price is two values of f for each parameter, while one-sided differences
# share $f(x)$. From now on we use central differences.
#
# ## 2. The best step
#
# Smaller steps were better so far. Now we take a less simple function: the loss of minilora's own tiny language model,
# which was trained to predict the next token (a piece of text, such as a short word). Later lessons explain what
# happens inside. Here it is only a function of about a million parameters. We change four of these, one at a time; all
# four are in the same matrix.
#
# We compare the measured derivatives with those that `backward()` computes from formulas; [lesson 2](02_tape.ipynb)
# builds `backward()`.

# %%
model, tokenizer = ml.load("tiny")
ids = np.array([tokenizer.encode("We the people of the United States, in order to form a more perfect union")])
weights = model.trainable_parameters()  # name -> parameters
NAME = "model.layers.0.self_attn.q_proj.weight"


def cast_parameters(dtype):
    for weight in weights.values():
        weight.data = weight.data.astype(dtype)


def loss():
    with ml.no_grad():
        return float(model.loss(ids, ids).data)


def derivative_at(index, h):
    """The central difference for one parameter of the matrix, which is restored afterwards."""
    w = weights[NAME].data
    old = w[index]
    w[index] = old + h
    above = loss()
    w[index] = old - h
    below = loss()
    w[index] = old
    return (above - below) / (2 * h)


cast_parameters(np.float64)
model.loss(ids, ids).backward()
rng = np.random.default_rng(0)
places = [tuple(int(i) for i in rng.integers(128, size=2)) for _ in range(4)]
derivatives = np.array([weights[NAME].grad[place] for place in places])
largest = np.abs(derivatives).max()
print(f"the model has {ml.count_parameters(model).total:,} parameters; its loss on this text is {loss():.3f}")
print("four partial derivatives:", ", ".join(f"{value:.6f}" for value in derivatives))

# %% [markdown]
# A computer stores a fixed number of digits: about 16 in float64, about 7 in float32. Models are trained in float32,
# or in lower precision. We measure in both, with steps from 1 down to $10^{-13}$. The relative error is the largest
# difference among the four derivatives, divided by the largest derivative: 0.01 means that the second digit is wrong,
# and 1 that no digit is right.
#
# > **Predict.** Which step is best in float64: $10^{-3}$, $10^{-8}$ or $10^{-13}$? And in float32, with a step of
# > $10^{-5}$, how many digits of the derivative are right: five (a relative error of about $10^{-5}$), two ($10^{-2}$)
# > or none (1 or more, without a limit: pure noise can be many times as large as the derivative)?

# %%
predict("error in float32 with a step of 1e-5")

# %%
steps = 10.0 ** np.arange(-13, 0.1, 0.5)
error = {}
for dtype in (np.float64, np.float32):
    cast_parameters(dtype)
    found = [[derivative_at(place, dtype(h)) for place in places] for h in steps]
    error[dtype] = np.abs(np.array(found) - derivatives).max(axis=1) / largest
    best = error[dtype].argmin()
    print(f"{dtype.__name__}: best error {error[dtype][best]:.1e}, with a step of {steps[best]:.0e}")
claim("best error in float64", error[np.float64].min(), 0, 1e-7)
claim("best error in float32", error[np.float32].min(), 1e-4, 0.03)
claim("error in float64 with a step of 1e-5", error[np.float64][16], 0, 1e-6)
claim("error in float32 with a step of 1e-5", error[np.float32][16], 1, np.inf)

# %% [markdown]
# The smallest step is not the best. And a step that works well in float64 gives no right digit in float32. There are
# two kinds of error:
#
# - **Truncation error.** The slope of the line through two points is not the slope at one point. This error grows as
#   $h^2$.
# - **Rounding error.** The loss is about 2.6, and is stored with a relative error of about u: $u = 10^{-16}$ in
#   float64, $6 \cdot 10^{-8}$ in float32. The two values differ by very little, and each has an error of about u times
#   the loss. The derivative is their difference divided by $2h$, so its error is about u times the loss, divided by h:
#   it grows as the step gets **smaller**.
#
# The rounding error can be predicted from u, the loss and the largest derivative: these are the black and the amber
# dashed lines. The grey line is $h^2$, drawn through the dot at $h = 0.1$.

# %%
rounding = {dtype: np.finfo(dtype).eps / 2 * loss() / (steps * largest) for dtype in error}
figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
for dtype, color in ((np.float64, BLACK), (np.float32, AMBER)):
    axes.plot(steps, error[dtype], "o", color=color, markersize=5)
    axes.plot(steps, rounding[dtype], "--", color=color, linewidth=1.5)
curve = error[np.float64][24] * (steps / 0.1) ** 2
axes.plot(steps, curve, "--", color=GREY, linewidth=1.5)
axes.set(xscale="log", yscale="log", xlim=(5e-14, 4), ylim=(1e-10, 1e5))
axes.set(xlabel="step h", ylabel="relative error of the measured derivatives")
axes.text(2e-6, 2e3, "float32: rounding error, u · loss / h", color=ink(AMBER))
axes.text(2e-13, 2e-5, "float64:\nrounding error", color=BLACK)
axes.text(8e-3, 2e-9, "truncation error, h²", color=ink(GREY))
axes.spines[["top", "right"]].set_visible(False)
show(
    figure,
    alt="Error of measured derivatives against the step, axes logarithmic. The float64 dots fall, reach 1e-9 near a "
    "step of 1e-3 and rise again as h squared; the float32 dots fall along a line that is far higher.",
)

# %% [markdown]
# *How to read it.* Dots are measured, dashed lines predicted. Read from right to left: the black dots fall along the
# grey line as the step gets smaller, until they meet the black line of the rounding error and climb it. The amber dots
# meet their line at once, since rounding in float32 is half a billion times as coarse as in float64. Far left the
# amber dots stay at 1: the step is so small that the parameter does not change at all, and the measured derivative is
# zero.

# %%
claim("truncation: error at 0.1 over error at 0.01, in float64", error[np.float64][24] / error[np.float64][22], 80, 120)
for dtype in error:
    claim(
        f"rounding in {dtype.__name__}: measured over predicted, step 1e-5",
        (error[dtype] / rounding[dtype])[16],
        0.1,
        10,
    )
print(f"roundings compared: {np.finfo(np.float32).eps / np.finfo(np.float64).eps:,.0f} times")

# %% [markdown]
# So: **measure in float64**. The step of minilora's own check is $10^{-5}$, which gives seven right digits even here.
# A check in float32 must tolerate errors of a tenth of a percent (0.001), so it misses mistakes of that size.
#
# ## 3. A gradient check
#
# Now we check a formula for a gradient. Our function is a layer: an input `x`, shape (T, n), times a matrix `W`, shape
# (m, n), then tanh, whose values lie between -1 and 1 and whose derivative is $1 - \tanh^2$. For a constant array `c`,
# shape (T, m), let
#
# $$y = \tanh(x W^\top) \qquad L = \sum_{ti} c_{ti}\, y_{ti} \qquad dW = \big(c\,(1 - y^2)\big)^\top x$$
#
# where $c\,(1 - y^2)$ is computed elementwise. Take the formula for dW, the gradient of L with respect to W, as given.
# A measurement will tell whether it is right.
#
# **All parameters at once.** Measuring one partial derivative takes two values of L. A cheaper test is a **directional
# derivative**: change *all* elements of W, each by h times a random number $v_{ij}$. If dW is right, L then changes by
# h times $\sum v_{ij}\, dW_{ij}$ (for small h), so two values of L test the whole gradient.
#
# > **Predict.** Someone forgets the factor $1 - y^2$. The array still has the right shape. Will a test with one random
# > direction notice?

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
# The test notices, but does not say where the mistake is. To find out, change one element at a time.
# [`gradcheck`](../minilora/engine/gradcheck.py) does this for every element of every input and reports the worst
# (PyTorch's is `torch.autograd.gradcheck`). It takes an operation made with [`op`](../minilora/engine/tensor.py): a
# function that returns its value, and for each input a function that turns `g`, the gradient with respect to the value,
# into the gradient with respect to that input.


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
claim("largest relative error of any derivative", report.max_relative_error, 0, 1e-6)
try:
    ml.gradcheck(forgetful_layer, x, W)
except ml.GradientError as message:
    print("caught:", str(message).replace(": got", ":\n        got"))

# %% [markdown]
# The message names the input (0 is x, 1 is W), an index in it, and one element of the result. "Got" and "expected" are
# the derivative of that element with respect to the indexed one: "got" is computed by the formula, "expected" is
# measured.
#
# ## 4. The cost
#
# If gradients can be measured, why does anyone need formulas?
#
# > **Predict.** The tiny model has about a million parameters. How long would it take to measure its whole gradient
# > once: seconds, minutes or hours?

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
# It would take about an hour, and a training run has thousands of steps that each need a gradient. One evaluation of
# the loss is called a **forward pass**. The **backward pass**, `backward()`, computes the whole gradient in the time of
# a few forward passes, however many parameters there are. How is that possible? [Lesson 2](02_tape.ipynb) shows it.
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
#
# def layer(x, W):
#     return torch.tanh(x @ W.T)
#
# x, W = (torch.tensor(array, requires_grad=True) for array in (x, W))  # float64
# # Central differences for every element; raises GradcheckError where a gradient is wrong.
# passed = torch.autograd.gradcheck(layer, (x, W), eps=1e-5)
# layer(x, W).backward(torch.tensor(c))
# dx, dW = x.grad, W.grad
# ```
#
# </details>
#
# ## What to remember
#
# - Measure a derivative with a **central difference**: its error is of order $h^2$, that of a one-sided one of order
#   h.
# - A smaller step is not always better: the rounding error grows as $1/h$.
# - Check gradients in **float64**: in float32 the measurement itself is wrong in the fourth digit, or earlier.
# - A check is useful only if it can fail: try it on a wrong formula.
# - Measuring costs two forward passes per parameter, so it is for checking, not for training.
#
# In the source: [`gradcheck`](../minilora/engine/gradcheck.py), whose step and tolerance you can now judge.
#
# ## Sources
#
# - The two errors and the best step: W. H. Press and others, *Numerical Recipes*, section 5.7
#   ([numerical.recipes](https://numerical.recipes)). No figure of this page comes from there.

# %% [markdown]
# # Exercises 1: your own check for gradients
#
# Three short functions. The first two together check any gradient; the third is a gradient to check with them. They
# belong to [lesson 1](../01_gradient.ipynb), which says what you need to know.
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then run the cell below it.
# It tries your function on random inputs and prints one line: `ok`, `not written yet`, or what is wrong. Try as often
# as you like; the inputs are new every time. A right answer is saved in a file `mine.py`, and the exercises of later
# lessons use it.

# %%
import numpy as np

# %% [markdown]
# ## 1.1 Measure a whole gradient
#
# The lesson measured a few partial derivatives. Write the function that measures all of them: for each element of `x`,
# the central difference with the step `eps`. The result is an array of the shape of x. The shape of x may be any, such
# as (7,), (3, 4) or (2, 3, 5): `np.ndindex(x.shape)` gives all indices of an array as tuples, and `x[place]` is then
# one element.
#
# `f` takes an array of x's shape and returns a number. Take care of two things. While one element is changed, all
# others must have their original values. And afterwards the caller's x must be exactly as before, bit for bit.


# %% points=3
def numerical_gradient(f, x, eps=1e-5):
    """f: array -> number, x any shape (float64), eps the step -> the gradient, of x's shape"""


# %% [markdown]
# ## 1.2 How far apart are two gradients?
#
# A gradient by formula and a measured one never agree to the last digit. Write the function that returns their
# relative error, one number:
#
# $$\frac{\max |\text{got} - \text{expected}|}{\max\big(\max |\text{got}|,\; \max |\text{expected}|\big)}$$
#
# Both maxima in the denominator are taken over all elements of an array, so that a small error in a derivative near
# zero does not look large. Two cases need a separate line:
#
# - Both arrays are zero everywhere: they agree, so the result is 0.
# - Their shapes differ: then the result is `np.inf`. NumPy subtracts a (5,) from a (5, 1) without a warning:
#   broadcasting makes a (5, 5) of them. A check that accepts this accepts many wrong gradients.


# %% points=2
def relative_error(got, expected):
    """got, expected: arrays -> a number: 0 where they agree, np.inf where their shapes differ"""


# %% [markdown]
# ## 1.3 A gradient by formula
#
# Take the lesson's layer without tanh, and a loss that compares its output with a target `t`: the mean of the squared
# differences over all T · m elements,
#
# $$L = \frac{1}{Tm} \sum_{ti} \big(y_{ti} - t_{ti}\big)^2 \qquad\qquad y = x W^\top$$
#
# Derive $dW$, the gradient of L with respect to W, with pencil and paper: how does L change with $y_{ti}$? And $y_{ti}
# = \sum_j x_{tj} W_{ij}$, so how does $y_{ti}$ change with $W_{ij}$? Multiply, and add up over all tokens t. Then
# write it as one matrix multiplication.


# %% points=3
def mse_gradient(W, x, t):
    """W (m, n), x (T, n), t (T, m) -> dW (m, n)"""


# %% [markdown]
# Three times `ok`? Then check your gradient with your own functions.

# %%
rng = np.random.default_rng()
W, x, t = rng.standard_normal((3, 4)), rng.standard_normal((5, 4)), rng.standard_normal((5, 3))


def loss_of(W):
    difference = (x @ W.T - t).ravel()
    return difference @ difference / difference.size


try:
    apart = relative_error(mse_gradient(W, x, t), numerical_gradient(loss_of, W))
    print(f"relative error, formula against measurement: {apart:.1e}")
except NotImplementedError:
    print("write the three functions first")

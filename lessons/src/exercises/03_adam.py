# %% [markdown]
# # Exercises 3: AdamW, and the loss of a classifier
#
# You write two functions. At the end of this page they train a model, with your `linear_backward` of exercise 2.3.
# They belong to [lesson 3](../03_adam.ipynb).

# %%
import numpy as np

import minilora as ml
from minilora.course.mine import linear_backward, numerical_gradient, relative_error

# %% [markdown]
# ## 3.1 One step of AdamW
#
# Write a whole step for one array `w` with gradient `g`. All that you need is in the lesson: Adam's five formulas in
# section 2, and weight decay in section 4. Three things need care:
#
# - `t` counts the steps and is 1 in the first one.
# - `decay` is the λ of section 4. It does not enter m and v, and it is applied to the w that is passed.
# - Return new arrays: the caller's w, g, m and v must not change.
#
# Return the new `m` and `v` without bias correction, because the next step needs them in this form.


# %% points=4
def adamw_step(w, g, m, v, t, lr, beta1, beta2, eps, decay):
    """w, g, m, v: arrays of one shape; t = 1, 2, ...; the rest are numbers -> the new w, m, v"""


# %% [markdown]
# ## 3.2 Cross-entropy, with its gradient
#
# `z` has one row per token and one column per class: the logits. `labels` contains for each token the index of the
# right class. With $p_t$ the softmax of row t,
#
# $$L = -\frac{1}{T} \sum_t \ln p_{t,\,\text{label}_t}$$
#
# Return the loss L and its gradient with respect to z. For the gradient, write $\ln p_{t,i} = z_{ti} - \ln \sum_j
# e^{z_{tj}}$ and take the derivative with pencil and paper. What is the derivative of the second term with respect to
# $z_{ti}$? For which i does the first term contribute? The result is short.
#
# Logits may be as large as 1000, and $e^{1000}$ overflows. Softmax does not change if one number is subtracted from
# all logits of a row: which number would you take?


# %% points=4
def softmax_cross_entropy(z, labels):
    """z (T, V) logits, labels (T,) whole numbers from 0 to V - 1 -> L, a number, and dz (T, V)"""


# %% [markdown]
# Both `ok`? Then they train the model of section 5 of the lesson, which predicts the next letter, without minilora's
# engine. Your own check of exercise 1.1 tests the gradient first.

# %%
text = " ".join(message["content"] for record in ml.read_records("legal") for message in record.messages).lower()
ids = np.array([max(" abcdefghijklmnopqrstuvwxyz".find(letter), 0) for letter in text])
rng = np.random.default_rng(0)
parameters = {"W": np.zeros((27, 27)), "b": np.zeros(27)}
state = {name: (np.zeros_like(array), np.zeros_like(array)) for name, array in parameters.items()}

try:
    z, labels = rng.standard_normal((4, 5)), np.array([0, 3, 3, 1])
    measured = numerical_gradient(lambda z: softmax_cross_entropy(z, labels)[0], z)
    print(f"relative error of the gradient: {relative_error(softmax_cross_entropy(z, labels)[1], measured):.1e}")
    for t in range(1, 51):
        at = rng.integers(len(ids) - 1, size=2000)
        x = np.eye(27)[ids[at]]
        loss, dz = softmax_cross_entropy(x @ parameters["W"].T + parameters["b"], ids[at + 1])
        _, dW, db = linear_backward(x, parameters["W"], parameters["b"], dz)
        for name, g in {"W": dW, "b": db}.items():
            step = adamw_step(parameters[name], g, *state[name], t, 0.1, 0.9, 0.999, 1e-8, 0.01)
            parameters[name], state[name] = step[0], step[1:]
        if t in (1, 10, 50):
            print(f"step {t:>2}: loss {loss:.3f}")
except NotImplementedError as missing:
    print("first write", missing if str(missing) else "the two functions")

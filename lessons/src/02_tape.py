# %% [markdown]
# # Lesson 2: How does code differentiate itself?
#
# [Lesson 1](01_gradient.ipynb) measured derivatives, with two forward passes for each parameter. For the tiny model
# that takes an hour; `backward()` computes the same gradient in milliseconds. How? Nobody has written down a formula
# for the whole model.
#
# The answer is **automatic differentiation** (autograd), in fewer than forty lines. You will
#
# 1. follow derivatives along the paths of a small computation,
# 2. build a **tape** that records the forward pass and is read backwards,
# 3. see why the order of the backward pass matters, and why it must not be recursive,
# 4. count its cost, and what freezing a matrix saves, as in LoRA.
#
# In [the exercises](exercises/02_tape.ipynb) you write the parts that are left out here.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.pages.style import BLACK, GREY, ink

# %% [markdown]
# ## 1. Derivatives along paths
#
# Take two numbers, $a = 3$ and $b = -2$, and three operations: $u = a b$, then $v = u + b$, then $L = v b$. Each
# operation alone is easy. The derivative of u with respect to a is $b$, and with respect to b it is $a$. Both
# derivatives of a sum are 1. These are the **local derivatives**.
#
# The **chain rule** combines them. If a changes a little, u changes $b$ times as much, v as much as u, and L $b$ times
# as much as v. Along a path, local derivatives are multiplied: $b \cdot 1 \cdot b = 4$.
#
# > **Predict.** b is used three times: in u, in v and in L. What is the derivative of L with respect to b? Compute it
# > from the local derivatives before you continue.

# %%
predict("derivative of L with respect to b")


# %%
def loss(a, b):
    u = a * b
    v = u + b
    return v * b


a, b, h = 3.0, -2.0, 1e-5
u = a * b
v = u + b
paths = {"b, L": v, "b, v, L": 1 * b, "b, u, v, L": a * 1 * b}
for path, derivative in paths.items():
    print(f"along {path:<12} {derivative:>6}")
measured = (loss(a, b + h) - loss(a, b - h)) / (2 * h)
print(f"all three {sum(paths.values()):>12}    measured {measured:.6f}")
claim("sum over the paths minus the measured derivative", sum(paths.values()) - measured, -1e-6, 1e-6)

# %% [markdown]
# **Along a path derivatives are multiplied; where paths meet, they are added.** This is all the mathematics in this
# lesson.
#
# But there can be very many paths. If each of `60` operations uses the previous result twice, there are $2^{60}$. The
# solution is to go backwards and add as early as possible (**reverse mode**): once the derivative of L with respect to
# v is complete, the number of paths between v and L no longer matters.
#
# ## 2. The tape
#
# So in the forward pass, each operation records three things in a list, the **tape**: its result, its inputs, and a
# function for each input. Each such function is called a **VJP** (vector-Jacobian product). It turns `g`, the gradient
# of L with respect to the result, into a contribution to the gradient with respect to that input. The Jacobian is the
# matrix of all local derivatives; a VJP computes `g` times this matrix without forming it.
#
# If the variables are arrays instead of numbers, only the formulas of the VJPs change. Those of a matrix
# multiplication $y = a b$ are worth remembering: $g\,b^\top$ for a, and $a^\top g$ for b. If all sizes differ, no
# other product of the two factors has the right shape.


# %%
class Var:
    """An array whose operations are recorded. requires_grad: do we want the gradient of the loss with respect to it?"""

    def __init__(self, value, requires_grad=False):
        self.value = np.asarray(value, dtype=np.float64)
        self.requires_grad = requires_grad
        self.grad = None

    def __add__(self, other):
        return record("add", self.value + other.value, (self, lambda g: g), (other, lambda g: g))

    def __mul__(self, other):
        a, b = self.value, other.value
        return record("mul", a * b, (self, lambda g: g * b), (other, lambda g: g * a))

    def __matmul__(self, other):
        a, b = self.value, other.value
        return record("matmul", a @ b, (self, lambda g: g @ b.T), (other, lambda g: a.T @ g))

    def tanh(self):
        y = np.tanh(self.value)
        return record("tanh", y, (self, lambda g: g * (1 - y * y)))

    def sum(self):
        return record("sum", self.value.sum(), (self, lambda g: np.full(self.value.shape, g)))


tape = []


def record(name, value, *inputs):
    """The result as a Var. It is put on the tape with those inputs that require a gradient, each with its VJP."""
    kept = [(x, vjp) for x, vjp in inputs if x.requires_grad]
    result = Var(value, requires_grad=bool(kept))
    if kept:
        tape.append((name, result, kept))
    return result


def backward(loss, entries):
    """The backward pass through these entries of the tape, in the order given."""
    loss.grad = np.ones_like(loss.value)
    for _, result, kept in entries:
        if result.grad is not None:
            for x, vjp in kept:
                path = vjp(result.grad)
                x.grad = path if x.grad is None else x.grad + path


# %% [markdown]
# That is the whole engine. `x.grad + path` is where paths meet. What is missing is the order in which to process the
# entries: that of the tape, reversed. On the tape every operation comes after those it depends on, so in the backward
# pass it comes before them.

# %%
tape.clear()  # what an earlier run of this cell has recorded
a, b = Var(3.0, requires_grad=True), Var(-2.0, requires_grad=True)
u = a * b
v = u + b
L = v * b
backward(L, reversed(tape))
claim("derivative of L with respect to a", a.grad, 4, 4)
claim("derivative of L with respect to b", b.grad, -16, -16)

# %% [markdown]
# Here is the **computation graph**, drawn from the tape.

# %%
names = {a: "a", b: "b", u: "u = a b", v: "v = u + b", L: "L = v b"}
where = {a: (0, 1.3), b: (0, 0), u: (1, 1.15), v: (2, 0.95), L: (3, 0.25)}
figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
for _, result, kept in tape:
    for x, vjp in kept:
        (x0, y0), (x1, y1) = where[x], where[result]
        arrow = {"arrowstyle": "<-", "color": GREY, "linewidth": 1.5, "shrinkA": 30, "shrinkB": 30}
        axes.annotate("", (x0, y0), (x1, y1), arrowprops=arrow)
        middle = 0.5 * (x0 + x1), 0.5 * (y0 + y1)
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        axes.text(*middle, f"{float(vjp(1.0)):g}", color=ink(GREY), ha="center", va="center", bbox=ground)
for x, place in where.items():
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": BLACK}
    text = f"{names[x]}\nvalue {float(x.value):g}\ngrad {float(x.grad):g}"
    axes.text(*place, text, ha="center", va="center", bbox=box)
axes.set(xlim=(-0.4, 3.4), ylim=(-0.3, 1.6))
axes.set_axis_off()
show(
    figure,
    alt="The graph of L: five boxes a, b, u, v, L with their values and gradients, joined by six arrows, each with a "
    "local derivative. Three arrows leave b.",
)

# %% [markdown]
# *How to read it.* The forward pass runs from left to right; each arrow is labelled with a local derivative. The
# gradient of a box is a sum over the arrows that leave it: the gradient of the box where the arrow ends, times its
# label. For b, from top to bottom: $-2 \cdot 3 + (-2) \cdot 1 + 1 \cdot (-8) = -16$.
#
# ## 3. The order of the backward pass
#
# > **Predict.** We process the same three entries in another order: L first, then u, then v. Which derivatives will be
# > wrong, and does anything crash?

# %%
entry_u, entry_v, entry_L = tape
for x in (a, b, u, v, L):
    x.grad = None
backward(L, [entry_L, entry_u, entry_v])
print("derivative with respect to a:", a.grad, "  with respect to b:", b.grad)
claim("derivative with respect to b in the wrong order", b.grad, -10, -10)

# %% [markdown]
# Nothing crashes. When u was processed, no gradient had reached it, since v came later. So a received nothing, and b
# the contributions of only two of its three paths: a gradient of the right shape with a wrong value. **An operation
# may pass its gradient on only after all operations that use its result.** This is a **topological order**, and a tape
# gives it for free. minilora, like PyTorch, keeps no tape: each result knows what it was computed from, and `backward`
# must find an order. minilora numbers the results as they are made, and processes the newest first. In exercise 2.2
# you find an order without such numbers.
#
# Is the engine right in general? We test it on twenty random computations of a dozen operations, in which results are
# used repeatedly, against a directional derivative measured as in lesson 1.


# %%
def random_computation(leaves, rng):
    """A dozen operations on three (4, 4) arrays and on the results so far; the same ones for the same rng."""
    made = list(leaves)
    for _ in range(12):
        left, right = (made[rng.integers(len(made))] for _ in range(2))
        kind = rng.integers(4)
        made.append([left + right, left * right, left @ right, left.tanh()][kind].tanh())
    return (made[-1] + made[-2] * made[-3]).sum()


worst = 0.0
for seed in range(20):
    rng = np.random.default_rng(seed)
    arrays, directions = rng.standard_normal((2, 3, 4, 4))
    tape.clear()
    leaves = [Var(array, requires_grad=True) for array in arrays]
    backward(random_computation(leaves, np.random.default_rng(seed)), reversed(tape))
    moves = [arrays + 1e-5 * directions, arrays - 1e-5 * directions]
    above, below = (random_computation([Var(x) for x in move], np.random.default_rng(seed)).value for move in moves)
    grads = np.array([np.zeros((4, 4)) if leaf.grad is None else leaf.grad for leaf in leaves])
    off = abs((grads * directions).sum() - (above - below) / 2e-5)
    worst = max(worst, off / np.linalg.norm(grads))
claim("largest relative error in twenty random computations", worst, 0, 1e-6)

# %% [markdown]
# **Deep computations.** Some engines, such as [micrograd](https://github.com/karpathy/micrograd), find the order by
# recursion: the function that visits a **node** of the graph, such as one of the boxes above, calls itself for each of
# its inputs. This is easy to read. Here is a long chain: start with x and add x again, many times.
#
# > **Predict.** What is the derivative of the result with respect to x after 5,000 additions? And will the recursion
# > finish?

# %%
tape.clear()
x = Var(1.0, requires_grad=True)
y = x
for _ in range(5000):
    y = y + x
inputs_of = {result: [x for x, _ in kept] for _, result, kept in tape}


def visit(node, order):
    for parent in inputs_of.get(node, []):
        visit(parent, order)
    order.append(node)


try:
    visit(y, [])
    print("the recursion has finished")
except RecursionError:
    print("the recursion has failed: Python limits its depth")
backward(y, reversed(tape))
claim("derivative after 5,000 additions, by the tape", x.grad, 5001, 5001)

# %% [markdown]
# If you add up a loss token by token, you build such a chain. This is why minilora's backward pass is a loop:
# [`backward_pass`](../minilora/engine/tensor.py).
#
# ## 4. The cost, and what freezing saves
#
# Most of the **FLOPs** (floating-point operations) of a large model are in matrix multiplications (**matmuls**): for
# one token, a layer of width n needs about $2n^2$ FLOPs in its matmul, and a small multiple of n elsewhere. The forward
# pass of three layers has three matmuls:

# %%
rng = np.random.default_rng(0)
inputs, layers = rng.standard_normal((6, 5)), rng.standard_normal((3, 5, 5))


def matmuls(trainable):
    """The number of matmuls of the backward pass if only these layers are trainable, and the gradients."""
    tape.clear()
    weights = [Var(layer, requires_grad=i in trainable) for i, layer in enumerate(layers)]
    x = Var(inputs)
    for weight in weights:
        x = (x @ weight).tanh()
    backward(x.sum(), reversed(tape))
    return sum(len(kept) for name, _, kept in tape if name == "matmul"), [weight.grad for weight in weights]


# %% [markdown]
# Each of the two VJPs of `a @ b` is one matmul, so the backward pass needs at most two per layer: one for the gradient
# of its matrix, and one for the gradient of its input, which goes to the layer below. The inputs of the first layer
# need no gradient.
#
# > **Predict.** How many matmuls does the backward pass need if all three layers are trainable? If only the last one
# > is? If only the first one is?

# %%
predict("matmuls of the backward pass, all layers trainable")
predict("matmuls of the backward pass, only the first layer trainable")

# %%
count, grads = matmuls({0, 1, 2})
claim("matmuls of the backward pass, all layers trainable", count, 5, 5)
print("entries on the tape:", len(tape))
claim("matmuls of the backward pass, only the last layer trainable", matmuls({2})[0], 1, 1)
print("entries on the tape:", len(tape))
claim("matmuls of the backward pass, only the first layer trainable", matmuls({0})[0], 3, 3)

# %% [markdown]
# With all layers trainable, there are three matmuls for the matrices and two for the inputs. So **the backward pass
# costs at most two matmuls for each one of the forward pass**, whatever the number of parameters: lesson 1's hour is
# gone. With only the last layer trainable, the layers below are not even on the tape, and none of their results
# (**activations**) is saved. But if the *first* layer is trainable, the gradient must pass through all layers above,
# frozen or not. Freezing saves one matmul for each frozen matrix, the one for its gradient; it does not save the
# backward pass. LoRA trains something in every layer, so remember this for [lesson 14](14_what_is_not_saved.ipynb).
#
# **minilora's engine** does the same with more operations. As in PyTorch, a `Tensor` with `requires_grad=True` gets a
# gradient, and within `no_grad()` nothing is recorded.

# %%
weights = [ml.Tensor(layer, requires_grad=True) for layer in layers]
x = ml.Tensor(inputs)
for weight in weights:
    x = (x @ weight).tanh()
x.sum().backward()
apart = max(np.abs(weight.grad - grad).max() for weight, grad in zip(weights, grads, strict=True))
claim("largest difference between minilora's gradients and ours", apart, 0, 1e-12)
with ml.no_grad():
    print("within no_grad, a matmul is recorded:", (weights[0] @ weights[1]).requires_grad)

# %% [markdown]
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
#
# weights = [torch.tensor(layer, requires_grad=True) for layer in layers]
# weights[0].requires_grad = False  # frozen
# x = torch.tensor(inputs)
# for weight in weights:
#     x = (x @ weight).tanh()  # no tape: each result has its grad_fn
# x.sum().backward()
# grads = [weight.grad for weight in weights]  # None for the frozen one
# with torch.no_grad():
#     recorded = (weights[1] @ weights[2]).requires_grad  # False
# ```
#
# </details>
#
# ## What to remember
#
# - Along a path derivatives are multiplied; where paths meet they are **added**. If you overwrite instead of add,
#   paths are lost.
# - An operation passes its gradient on only after all operations that use its result. Reading the tape backwards
#   ensures this.
# - The backward pass is a loop, not a recursion: graphs are deep.
# - The backward pass costs at most twice the matmuls of the forward pass, however many parameters there are.
# - Freezing a matrix saves the matmul for its gradient, and the activations that this matmul needs. Gradients still
#   pass through the matrix.
#
# In the source: [`op`](../minilora/engine/tensor.py), minilora's `record`, and [`matmul`](../minilora/engine/ops.py),
# whose VJPs you now know.

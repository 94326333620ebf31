# %% [markdown]
# # Lesson 2: How does code differentiate itself?
#
# [Lesson 1](01_gradient.ipynb) measured slopes, two values of the loss for each number. This takes hours where
# `backward()` takes milliseconds, and gives the same numbers. So how does `backward()` know them? Nobody wrote down a
# formula for the whole model.
#
# The answer is less than forty lines long, and you see all of them. In this lesson you will
#
# 1. follow slopes along the paths of a small computation,
# 2. build a **tape** that records what was computed, and walks back,
# 3. see why the order of that walk matters, and why it must not be a recursion,
# 4. count what it costs, and what freezing a matrix saves, as LoRA does.
#
# In [the exercises](exercises/02_tape.ipynb) you write the parts that are left out here.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, show
from minilora.pages.style import BLACK, GREY, ink

# %% [markdown]
# ## 1. Slopes along paths
#
# Take two numbers, $a = 3$ and $b = -2$, and three operations: $u = a b$, then $v = u + b$, then $L = v b$. Each
# operation alone is easy. If b is fixed, u moves b times as far as a does: the slope of u with respect to a is $b$.
# The slope of u with respect to b is $a$. Both slopes of a sum are 1.
#
# The **chain rule** puts them together. If a moves a little, u moves $b$ times as far, v moves as far as u, and L
# moves $b$ times as far as v. Along a path, slopes are multiplied: $b \cdot 1 \cdot b = 4$.
#
# > **Predict.** b is used three times: by u, by v and by L. What is the slope of L with respect to b? Work it out from
# > the slopes of the three operations before you go on.


# %%
def loss(a, b):
    u = a * b
    v = u + b
    return v * b


a, b, h = 3.0, -2.0, 1e-5
u = a * b
v = u + b
paths = {"b, L": v, "b, v, L": 1 * b, "b, u, v, L": a * 1 * b}
for path, slope in paths.items():
    print(f"along {path:<12} {slope:>6}")
measured = (loss(a, b + h) - loss(a, b - h)) / (2 * h)
print(f"all three {sum(paths.values()):>12}    measured {measured:.6f}")
claim("sum of the paths minus what is measured", sum(paths.values()) - measured, -1e-6, 1e-6)

# %% [markdown]
# **Along a path slopes multiply; where paths meet, they add up.** This is all the mathematics there is in this lesson.
#
# But paths are many. Where each of `60` operations uses the result before it twice, there are $2^{60}$ of them. The
# way out is to go backwards and add up as early as possible: once the slope of L with respect to v is complete, it
# does not matter any more along how many paths it came.
#
# ## 2. The tape
#
# So each operation, while it computes, notes three things on a list: its result, its inputs, and for each input a
# function that turns the slopes of L with respect to the result, called `g`, into its share of the slopes of L with
# respect to that input. Such a function is called a **VJP** (vector-Jacobian product). The list is called a **tape**.
#
# With arrays nothing changes but the formulas of the VJPs. The one for a product of matrices $y = a b$ is worth
# knowing by heart: $g\,b^\top$ for a, and $a^\top g$ for b. Where the three sizes differ, the shapes leave no other
# choice.


# %%
class Var:
    """An array on its way through operations. learns: do we want the slopes of the loss with respect to it?"""

    def __init__(self, value, learns=False):
        self.value = np.asarray(value, dtype=np.float64)
        self.learns = learns
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
    """The result as a Var. It goes onto the tape with those inputs that learn, each with its VJP."""
    kept = [(x, vjp) for x, vjp in inputs if x.learns]
    result = Var(value, learns=bool(kept))
    if kept:
        tape.append((name, result, kept))
    return result


def walk(loss, entries):
    """Hand the slopes of the loss back through these entries, in the order given."""
    loss.grad = np.ones_like(loss.value)
    for _, result, kept in entries:
        if result.grad is not None:
            for x, vjp in kept:
                share = vjp(result.grad)
                x.grad = share if x.grad is None else x.grad + share


# %% [markdown]
# That is the whole engine. `x.grad + share` is where paths meet. What is left is the order of the walk: the tape,
# backwards. Every operation stands on the tape after those it depends on, so backwards it comes before them.

# %%
a, b = Var(3.0, learns=True), Var(-2.0, learns=True)
u = a * b
v = u + b
L = v * b
walk(L, reversed(tape))
claim("slope of L with respect to a", a.grad, 4, 4)
claim("slope of L with respect to b", b.grad, -16, -16)

# %% [markdown]
# Here is what was recorded, drawn from the tape itself.

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
    text = f"{names[x]}\nvalue {float(x.value):g}\nslope {float(x.grad):g}"
    axes.text(*place, text, ha="center", va="center", bbox=box)
axes.set(xlim=(-0.4, 3.4), ylim=(-0.3, 1.6))
axes.set_axis_off()
show(
    figure,
    alt="The graph of L: five boxes a, b, u, v, L with their values and slopes, joined by six arrows, each with the "
    "slope of one operation. Three arrows leave b.",
)

# %% [markdown]
# *How to read it.* Left to right is the computation; on each arrow stands the slope of that one operation. For a box's
# slope, take for each arrow that leaves it the slope of the box where it ends, times the number on the arrow, and add
# up: for b, from top to bottom, $-2 \cdot 3 + (-2) \cdot 1 + 1 \cdot (-8) = -16$.
#
# ## 3. The order of the walk
#
# > **Predict.** We walk the same three entries in another order: L first, then u, then v. Which slopes come out wrong,
# > and does anything crash?

# %%
entry_u, entry_v, entry_L = tape
for x in (a, b, u, v, L):
    x.grad = None
walk(L, [entry_L, entry_u, entry_v])
print("slope with respect to a:", a.grad, "  with respect to b:", b.grad)
claim("slope with respect to b in the wrong order", b.grad, -10, -10)

# %% [markdown]
# Nothing crashes. When it was u's turn, nothing had reached u, since v had not handed on its share yet. So a got
# nothing at all, and b only two of its three paths: a gradient of the right shape and the wrong size. **An operation
# may hand on its slopes only when all those that use its result have had their turn.** A tape gives such an order for
# free. minilora, like PyTorch, keeps no tape: each result knows what it was computed from, and `backward` has to find
# an order itself. minilora sorts what it reaches by age, youngest first. Exercise 2.2 does without ages.
#
# Does the engine hold for more than one example? We let it meet twenty random computations of a dozen operations, in
# which results are used again and again, and compare with a measurement in one random direction, as in lesson 1.


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
    leaves = [Var(array, learns=True) for array in arrays]
    walk(random_computation(leaves, np.random.default_rng(seed)), reversed(tape))
    moves = [arrays + 1e-5 * directions, arrays - 1e-5 * directions]
    above, below = (random_computation([Var(x) for x in move], np.random.default_rng(seed)).value for move in moves)
    grads = np.array([np.zeros((4, 4)) if leaf.grad is None else leaf.grad for leaf in leaves])
    off = abs((grads * directions).sum() - (above - below) / 2e-5)
    worst = max(worst, off / np.linalg.norm(grads))
claim("largest relative error in twenty random computations", worst, 0, 1e-6)

# %% [markdown]
# **Deep computations.** Some engines, as [micrograd](https://github.com/karpathy/micrograd), find their order by
# recursion: the function that visits a node calls itself for each of its inputs. It reads well. Here is a long chain:
# start with x and add x again, many times.
#
# > **Predict.** What is the slope of the result with respect to x after 5,000 additions? And will the recursive visit
# > get there?

# %%
tape.clear()
x = Var(1.0, learns=True)
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
    print("the recursion has arrived")
except RecursionError:
    print("the recursion has failed: Python allows not so many calls within calls")
walk(y, reversed(tape))
claim("slope after 5,000 additions, by the tape", x.grad, 5001, 5001)

# %% [markdown]
# Whoever adds up a loss token by token makes such a chain. So the walk is a loop, in minilora as well:
# [`backward_pass`](../minilora/engine/tensor.py).
#
# ## 4. What it costs, and what freezing saves
#
# Most of the work of a large model is products of matrices: for one token, a layer of width n multiplies $n^2$ times
# in its product, and n times or so in all else. Three layers make three products:

# %%
rng = np.random.default_rng(0)
texts, layers = rng.standard_normal((6, 5)), rng.standard_normal((3, 5, 5))


def products(learning):
    """How many products of matrices the walk back makes if only these layers learn, and the gradients."""
    tape.clear()
    weights = [Var(layer, learns=i in learning) for i, layer in enumerate(layers)]
    x = Var(texts)
    for weight in weights:
        x = (x @ weight).tanh()
    walk(x.sum(), reversed(tape))
    return sum(len(kept) for name, _, kept in tape if name == "matmul"), [weight.grad for weight in weights]


# %% [markdown]
# The VJPs of `a @ b` make one product each, so a layer needs at most two on the way back: one for its matrix, and one
# to hand the slopes on to the layer below. The texts themselves do not learn.
#
# > **Predict.** How many products does the way back take if all three layers learn? If only the last one does? If
# > only the first one does?

# %%
all_learn, grads = products({0, 1, 2})
claim("products on the way back, all three layers learn", all_learn, 5, 5)
print("entries on the tape:", len(tape))
claim("only the last one learns", products({2})[0], 1, 1)
print("entries on the tape:", len(tape))
claim("only the first one learns", products({0})[0], 3, 3)

# %% [markdown]
# All three learn: three for the matrices, two to hand on. So **the way back costs at most two products for each one
# of the way there**, whatever the number of numbers: lesson 1's hours are gone. Only the last one learns: what lies
# below is not even on the tape, and the arrays that its VJPs would have needed are not kept. But if the *first* layer
# learns, the slopes must pass through all layers above, frozen or not. Freezing saves the product for each frozen
# matrix, not the way back. Since LoRA learns something in every layer, keep this in mind for [lesson
# 12](12_what_is_not_saved.ipynb).
#
# **minilora's engine** does the same with more operations. A `Tensor` with `requires_grad=True` learns, and within
# `ml.no_grad()` nothing is recorded.

# %%
weights = [ml.Tensor(layer, requires_grad=True) for layer in layers]
x = ml.Tensor(texts)
for weight in weights:
    x = (x @ weight).tanh()
x.sum().backward()
apart = max(np.abs(weight.grad - grad).max() for weight, grad in zip(weights, grads, strict=True))
claim("largest difference between minilora's gradients and ours", apart, 0, 1e-12)
with ml.no_grad():
    print("within no_grad, a product is recorded:", (weights[0] @ weights[1]).requires_grad)

# %% [markdown]
# ## What to remember
#
# - Along a path slopes multiply; where paths meet they **add up**. Who writes `=` in place of `+` loses paths.
# - An operation hands on its slopes when all that use its result have had their turn: the tape, backwards.
# - The walk is a loop, not a recursion: graphs are deep.
# - The way back costs at most twice the way there, however many numbers there are.
# - What is frozen is not recorded: that saves its own product and what it would have kept, not the way through it.
#
# Read on in the source: [`op`](../minilora/engine/tensor.py), minilora's `record`, and
# [`matmul`](../minilora/engine/ops.py), whose VJPs you know now.

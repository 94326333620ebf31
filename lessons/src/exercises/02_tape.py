# %% [markdown]
# # Exercises 2: the missing parts of an engine
#
# The engine of [lesson 2](../02_tape.ipynb) leaves three things out: arrays that are stretched to fit, a graph
# without a tape, and the layer that every model consists of. You write them here, and your check from exercise 1.1
# looks at the last one.
#
# In all of them `g` stands for the slopes of the loss with respect to a result. It has the result's shape.

# %%
import numpy as np

from minilora.course.mine import numerical_gradient, relative_error

# %% [markdown]
# ## 2.1 Undo a stretching
#
# NumPy adds an array of shape (5,) to one of shape (3, 5): it uses the (5,) three times, once for each row. This is
# called broadcasting. It lines up the shapes at their **last** axis; an axis that is missing in front, or that has
# the length 1, is stretched.
#
# Using something three times makes three paths, so its gradient is the sum over them. Given `g`, of the stretched
# shape, return the gradient of the array that had the shape `shape` before it was stretched. The result has that very
# shape: a (3, 1) gets a (3, 1), not a (3,).


# %% points=2
def unbroadcast(g, shape):
    """g: the gradient of the stretched array; shape: a tuple, the shape before -> an array of that shape"""


# %% [markdown]
# ## 2.2 A walk back without a tape
#
# Now there is no tape that gives the order, only a graph. The nodes are numbered, but the numbers **say nothing about
# their order**. `edges[i]` is a list of pairs `(parent, slope)`: node i was computed from these parents, and that is
# its slope with respect to each. A node may have the same parent twice, as in $v \cdot v$. A node with an
# empty list is an input.
#
# Return an array with one number per node: the slope of node `last` with respect to it. It is 1 for `last` itself, and
# 0 for nodes that `last` does not depend on. There are such nodes, and some of them use others that `last` depends on.
#
# A node may hand on its slope only when it is complete: when all nodes that use it, *and that `last` depends on*,
# have handed on theirs. One way: count first, for each node, how many uses it is waiting for. The graph can be
# thousands of nodes deep, so use a list of what is to be done in place of recursion. And go along each edge once:
# along every path would take forever.


# %% points=4
def graph_gradients(edges, last):
    """edges: for each node a list of (parent, slope); last: the number of a node -> an array, one slope per node"""


# %% [markdown]
# ## 2.3 The layer of all layers
#
# $$y = x\,W^\top + b$$
#
# Here is `x` of shape (T, n), one row per token, and `W (m, n)`. The same b, of shape (m,), is added to each row.
# From `g`, of shape (T, m), return the gradients of all three. Your `unbroadcast` makes one of them.


# %% points=2
def linear_backward(x, W, b, g):
    """x (T, n), W (m, n), b (m,), g (T, m) -> dx (T, n), dW (m, n), db (m,)"""


# %% [markdown]
# Three times `ok`? Then your check from lesson 1 looks at your layer, at all of x, W and b.

# %%
rng = np.random.default_rng()
x, b, g = rng.standard_normal((5, 4)), rng.standard_normal(3), rng.standard_normal((5, 3))
W = rng.standard_normal((3, 4))

try:
    dx, dW, db = linear_backward(x, W, b, g)
    functions = {
        "x": (dx, numerical_gradient(lambda x: (g * (x @ W.T + b)).sum(), x)),
        "W": (dW, numerical_gradient(lambda W: (g * (x @ W.T + b)).sum(), W)),
        "b": (db, numerical_gradient(lambda b: (g * (x @ W.T + b)).sum(), b)),
    }
    for name, (mine, measured) in functions.items():
        print(f"gradient of {name}: {relative_error(mine, measured):.1e} apart from what is measured")
except NotImplementedError as missing:
    print("first write", missing if str(missing) else "the three functions")

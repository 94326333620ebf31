# %% [markdown]
# # Exercises 2: the missing parts of an engine
#
# The engine of [lesson 2](../02_tape.ipynb) leaves three things out: broadcasting, a graph without a tape, and the
# linear layer. You write them here, and your gradient check from lesson 1 tests the last one. Then you write a test
# that finds broken engines.
#
# `g` is always the gradient of the loss with respect to a result, and has the result's shape.

# %%
import numpy as np

from minilora.course.mine import numerical_gradient, relative_error

# %% [markdown]
# ## 2.1 Undo broadcasting
#
# NumPy adds an array of shape (5,) to one of shape (3, 5): it uses the (5,) three times, once for each row. This is
# called **broadcasting**. It aligns the shapes at their **last** axis; an axis that is missing in front, or that has
# length 1, is repeated.
#
# An array that is used three times has three paths to the loss, so its gradient is the sum over them. Given `g`, of
# the broadcast shape, return the gradient of the array that had the shape `shape` before broadcasting. The result has
# exactly that shape: a (3, 1) gets a (3, 1), not a (3,).


# %% points=2
def unbroadcast(g, shape):
    """g: the gradient of the broadcast array; shape: a tuple, the shape before -> an array of that shape"""


# %% [markdown]
# ## 2.2 A backward pass without a tape
#
# Now there is no tape that gives the order, only a graph. The nodes are numbered, but the numbers **do not tell the
# order**. `edges[i]` is a list of pairs `(parent, slope)`: node i was computed from these parents, and the slope is
# its local derivative with respect to that parent. A node may have the same parent twice, as in $v \cdot v$. A node
# with an empty list is an input.
#
# Return an array with one number per node: the derivative of node `last` with respect to it. It is 1 for `last`
# itself, and 0 for nodes that `last` does not depend on. There are such nodes, and some of them use nodes that `last`
# does depend on.
#
# A node may pass its derivative on only when it is complete: when all nodes that use it, *and that `last` depends on*,
# have passed on theirs. One way to do this: first count, for each node, how many uses it must wait for. The graph can
# be thousands of nodes deep, so keep a list of nodes to process instead of using recursion. And follow each edge once:
# following every path would take forever.


# %% points=3
def graph_gradients(edges, last):
    """edges: for each node a list of (parent, slope); last: the number of a node -> an array, a derivative per node"""


# %% [markdown]
# ## 2.3 The linear layer
#
# $$y = x\,W^\top + b$$
#
# Here `x (T, n)` has one row per token, the matrix is `W (m, n)`, and the same `b (m,)` is added to each row. Given `g
# (T, m)`, return the gradients of x, W and b. Your `unbroadcast` computes one of them.


# %% points=1
def linear_backward(x, W, b, g):
    """x (T, n), W (m, n), b (m,), g (T, m) -> dx (T, n), dW (m, n), db (m,)"""


# %% [markdown]
# ## 2.4 A bug hunt: a test for an engine
#
# Now you write a **test** instead of the code. It is called with an engine, a function `gradients(f, *arrays)`, which
# returns a list: the gradient of the number `f(*values)` with respect to each array. `f` computes with `+`, `*`
# (elementwise), `@` (of vectors and matrices), `.tanh()` and `.sum()` of the engine's values; `+` and `*` broadcast as
# in NumPy. Other numbers and arrays in `f` are constants. For example, `gradients(lambda x, y: (x * y + y).tanh().sum(),
# x, y)` returns two arrays, of the shapes of x and y.
#
# A test calls the engine on small cases whose gradients you know, and compares: `assert np.allclose(got, expected)`.
#
# The check runs your test on the right version and on six broken ones. Each broken version has one mistake. Your test
# must pass on the right one, and should fail (with an `AssertionError`, or any other error) on all six. The line says
# how many your test caught, and what a version that it missed gets wrong. You do not see the versions: think of what
# must hold, and assert it.


# %% points=2
def test_engine(gradients):
    """gradients(f, *arrays) -> a list: passes if the engine is right, raises AssertionError if it is broken"""


# %% [markdown]
# Three times `ok`? Then your gradient check from lesson 1 tests your layer, for x, W and b.

# %%
rng = np.random.default_rng()
x, b, g = rng.standard_normal((5, 4)), rng.standard_normal(3), rng.standard_normal((5, 3))
W = rng.standard_normal((3, 4))

try:
    dx, dW, db = linear_backward(x, W, b, g)
    functions = {
        "x": (dx, numerical_gradient(lambda x: np.sum(g * (x @ W.T + b)), x)),
        "W": (dW, numerical_gradient(lambda W: np.sum(g * (x @ W.T + b)), W)),
        "b": (db, numerical_gradient(lambda b: np.sum(g * (x @ W.T + b)), b)),
    }
    for name, (mine, measured) in functions.items():
        print(f"gradient of {name}: relative error {relative_error(mine, measured):.1e}")
except NotImplementedError as missing:
    print("first write", missing if str(missing) else "the three functions")

# %% [markdown]
# # Self-test: what the course assumes
#
# Ten short questions, 20 minutes. Each answer is one line. Replace `raise NotImplementedError` with your answer and
# run the cell: it tries your function on random inputs and prints `ok`, `not written yet`, or what is wrong and what
# to read. With eight right answers you can begin with lesson 1. To fill the gaps, the pages linked below are enough.
#
# Where to read: [NumPy for beginners](https://numpy.org/doc/stable/user/absolute_beginners.html),
# [broadcasting](https://numpy.org/doc/stable/user/basics.broadcasting.html), and
# [matmul](https://numpy.org/doc/stable/reference/generated/numpy.matmul.html);
# [OpenStax Calculus 1](https://openstax.org/books/calculus-volume-1/pages/1-introduction) and
# [College Algebra](https://openstax.org/books/college-algebra-2e/pages/1-introduction-to-prerequisites);
# [Python's tutorial](https://docs.python.org/3/tutorial/classes.html#python-scopes-and-namespaces) and
# [glossary](https://docs.python.org/3/glossary.html#term-decorator).

# %%
import numpy as np

from minilora.course import check

# %% [markdown]
# ## Matrices and arrays
#
# **1.** A has the shape `a`, which is (m, n). B has the shape `b`, which is (n, k). What is the shape of $A B$?


# %%
def product_shape(a, b):
    """a (m, n), b (n, k): two tuples -> the number of rows and the number of columns of A B"""
    raise NotImplementedError


check(product_shape)

# %% [markdown]
# **2.** Each row of x is the vector of one token. A layer turns each of these vectors, $x_t$, into $W x_t$. Compute
# all rows of the result with one matrix product.


# %%
def per_token(x, W):
    """x (T, n), W (m, n) -> y (T, m): row t is W times row t of x"""
    raise NotImplementedError


check(per_token)

# %% [markdown]
# **3.** Sum over one index: $s_j = \sum_t X_{tj}$.


# %%
def column_sums(X):
    """X (T, N) -> s (N)"""
    raise NotImplementedError


check(column_sums)

# %% [markdown]
# **4.** Subtract from each row its own mean: $Y_{tj} = X_{tj} - \frac{1}{N} \sum_k X_{tk}$.


# %%
def centred(X):
    """X (T, N) -> Y (T, N)"""
    raise NotImplementedError


check(centred)

# %% [markdown]
# ## Derivatives and logarithms
#
# **5.** What is the derivative of $x \ln(1 + e^x)$ at x? Use `np.log` and `np.exp`.


# %%
def slope(x):
    """x, a number -> the derivative of x ln(1 + e**x)"""
    raise NotImplementedError


check(slope)

# %% [markdown]
# **6.** What is the derivative of $(x^2 + 1)^3$ at x?


# %%
def slope_of_power(x):
    """x, a number -> the derivative of (x**2 + 1)**3"""
    raise NotImplementedError


check(slope_of_power)

# %% [markdown]
# **7.** What is the derivative of $\tanh x$ at x? Use `np.tanh`.


# %%
def slope_of_tanh(x):
    """x, a number -> the derivative of tanh(x)"""
    raise NotImplementedError


check(slope_of_tanh)

# %% [markdown]
# **8.** p holds the probabilities of many events. Return $-\ln(p_1 p_2 p_3 \dots)$. The product itself is too small for
# a computer: it would be rounded to 0.


# %%
def surprise(p):
    """p (N), between 0 and 1 -> minus the natural logarithm of their product, a number"""
    raise NotImplementedError


check(surprise)

# %% [markdown]
# ## Functions
#
# **9.** Write a function that makes functions: `multiplier(3)` is a function, and `multiplier(3)(10)` is 30.


# %%
def multiplier(a):
    """a, a number -> a function of x that returns a times x"""
    raise NotImplementedError


check(multiplier)

# %% [markdown]
# **10.** Write a decorator: a function below `@doubled` returns twice what it would return without. It may have any
# number of arguments.


# %%
def doubled(f):
    """f, a function -> a function with the same arguments that returns 2 times the result of f"""
    raise NotImplementedError


check(doubled)

# %% [markdown]
# Eight or more `ok`? Begin with [lesson 1](../01_gradient.ipynb).

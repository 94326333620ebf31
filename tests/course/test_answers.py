"""No answer of an exercise is in a released notebook, under whatever names, in whatever order and lines."""

import ast
import builtins
import copy
import re
import textwrap
from functools import cache

import pytest
from lessonfiles import BUILT

from minilora.course.edits import source_of
from minilora.course.exercises import EXERCISES

SMALLEST = 5  # parts of an expression that gives something away: `x @ W.T - t` has as many
LARGEST = 60  # parts of what replaces a variable
SAME = {*dir(builtins), "np", "ml", "math"}  # names that mean the same everywhere
PLACE = ("ctx", "type_comment", "annotation", "returns", "kind")
WHOLE = (ast.expr, ast.For, ast.While, ast.AugAssign)  # what is compared


# -- the normal form of code -------------------------------------------------------------------------------------------


def terms(node, kind):
    """The terms of a sum, or the factors of a product."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, kind):
        return terms(node.left, kind) + terms(node.right, kind)
    return [node]


def form(node, name):
    """Code as nested tuples: `name(word)` for each name, terms and factors in one order."""
    if isinstance(node, ast.Name):
        return node.id if node.id in SAME else name(node.id)
    if isinstance(node, ast.arg):
        return name(node.arg)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return name(node.attr)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        parts = sorted(terms(node, type(node.op)), key=lambda part: repr(form(part, lambda word: "")))
        return (type(node.op).__name__, *[form(part, name) for part in parts])
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [value for field, value in ast.iter_fields(node) if field not in PLACE and value is not None]
    parts = [part for value in fields for part in (value if isinstance(value, list) else [value])]
    return (type(node).__name__, *[form(part, name) for part in parts])


def normal(node):
    """Equal for two pieces of code that differ in their names, or in the order of terms and factors."""
    names = {}
    return form(node, lambda word: names.setdefault(word, len(names)))


def size(tree):
    """The operations, calls, indices and literals of a normal form."""
    return 1 + sum(map(size, tree[1:])) if isinstance(tree, tuple) else 0


class Put(ast.NodeTransformer):
    """Replaces variables by what was assigned to them."""

    def __init__(self, values):
        self.values = values

    def visit_Name(self, node):
        return copy.deepcopy(self.values.get(node.id, node)) if isinstance(node.ctx, ast.Load) else node


def without_variables(body):
    """The statements, changed: each variable replaced by what was assigned to it, also within functions and loops."""
    values, out = {}, []
    for statement in body:
        changed = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if hasattr(statement, "body"):
            values = {name: value for name, value in values.items() if name not in changed}
            statement.body = without_variables(statement.body)
        if isinstance(statement, ast.FunctionDef):
            values = {name: value for name, value in values.items() if name not in {a.arg for a in statement.args.args}}
        statement = Put(values).visit(statement)
        out.append(statement)
        values = {name: value for name, value in values.items() if name not in changed}
        to_name = isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        if to_name and sum(1 for _ in ast.walk(statement.value)) < LARGEST:
            values[statement.targets[0].id] = statement.value
    return out


def pieces(code):
    """The normal forms of all expressions and loops in some code, as written, and without its variables."""
    body = ast.parse(textwrap.dedent(code)).body
    nodes = [node for statement in [*body, *without_variables(copy.deepcopy(body))] for node in ast.walk(statement)]
    nodes = [node for node in nodes if isinstance(node, WHOLE) and not isinstance(node, (ast.Name, ast.Constant))]
    for text, node in {ast.unparse(node): node for node in nodes}.items():
        if len(text) < 5 * LARGEST and size(tree := normal(node)) >= SMALLEST:
            yield tree, text


# -- notebooks and solutions -------------------------------------------------------------------------------------------


def code_of(cells):
    """The code of cells, and what the text between them sets as code."""
    for cell in cells:
        text = "".join(cell["source"])
        spans = [text] if cell["cell_type"] == "code" else re.findall(r"(?s)```(?:python)?\n(.*?)```", text)
        if cell["cell_type"] == "markdown":
            spans += re.findall(r"`([^`\n]+)`", text)
        for span in spans:
            code = re.sub(r"(?m)^(\s*)%.*$", r"\1pass", span)
            try:
                ast.parse(textwrap.dedent(code))
            except SyntaxError:  # a shape, a path, a piece of a line
                continue
            yield code


@cache
def shown(name):
    """The normal forms of all pieces of code in a released notebook."""
    return {tree for code in code_of(BUILT[name]["cells"]) for tree, _ in pieces(code)}


FREE = dict(
    pieces("""
(above - below) / (2 * h)  # lesson 1: the central difference; exercise 1.1 is the loop around it
np.abs(a - b).max()  # a distance, as all lessons measure it
x @ W.T - t  # exercise 1.3: the loss whose gradient is asked for
e = np.exp(z - z.max(axis=-1, keepdims=True))  # softmax
p = e / e.sum(axis=-1, keepdims=True)
e /= e.sum(axis=-1, keepdims=True)
np.exp(z).sum(axis=-1, keepdims=True)
1 / (1 + np.exp(-z))  # lesson 5: the functions whose gradients exercises 5.2 and 5.3 ask for
(x * x).mean(axis=-1, keepdims=True)
labels[:, 1:] != -100  # exercise 7.3: which tokens are scored
U, S, Vt = np.linalg.svd(delta, full_matrices=False)  # lesson 8: how NumPy is called
(np.linalg.svd(delta, compute_uv=False) ** 2).sum()
rng = np.random.default_rng(0)
x, y, z = rng.standard_normal((3, 4)), rng.standard_normal((4, 5))
rng.standard_normal((r, n)) / np.sqrt(n)  # lesson 17: a random matrix
z - z.mean(axis=-1, keepdims=True)  # lesson 15: numbers less their mean
logits[:-1]  # exercise 21.1: all rows but the last, and which labels are scored
wanted != -100
""")
)


@pytest.mark.long
@pytest.mark.parametrize("exercise", [pytest.param(e, id=e.number) for e in EXERCISES.values()])
def test_no_released_notebook_holds_a_piece_of_a_solution(exercise):
    solution = dict(pieces("".join(source_of(exercise.forms[0].reference))))
    found = {name: {solution[tree] for tree in solution.keys() & shown(name) - FREE.keys()} for name in BUILT}
    shows = {name: texts for name, texts in found.items() if texts}
    assert shows == {}, f"{shows}: write it in another way there, or if it is no secret, add it to FREE of this file"


@pytest.mark.parametrize(
    "code, same",
    [
        ("z @ M.T + (z @ down.T) @ up.T * (alpha / rank)", True),
        ("def f(z):\n    low = z @ down.T\n    s = alpha / rank\n    return z @ M.T + s * (low @ up.T)", True),
        (
            "class L:\n    def f(self, z):\n        return self.a / self.r * (z @ self.A.T @ self.B.T) + z @ self.W.T",
            True,
        ),
        ("for x in parts:\n    y = x @ W.T\n    out.append((alpha / r) * (x @ A.T @ B.T) + y)", True),
        ("if x:\n    f = lambda x, W: 2 * (x @ W.T + x @ A.T @ B.T * (alpha / r))", True),
        ("x @ W.T + x @ A.T @ B.T * (r / alpha)", True),  # under other names it is the same
        ("x @ W.T + x @ A.T @ B.T * (alpha * r)", False),
        ("x @ W.T + x @ A.T @ W.T * (alpha / r)", False),
        ("low = x @ A.T\nlow = x @ A\nfor x in parts:\n    y = x @ W.T + low @ B.T * (alpha / r)", False),
    ],
)
def test_a_solution_is_recognised_under_other_names_in_another_order_and_in_other_lines(code, same):
    solution = "".join(source_of(EXERCISES["lora_forward"].forms[0].reference))
    whole = normal(ast.parse("x @ W.T + x @ A.T @ B.T * (alpha / r)", mode="eval").body)
    assert whole in dict(pieces(solution)) and (whole in dict(pieces(code))) is same


def test_code_in_the_text_is_found_and_what_is_no_code_is_passed_over():
    text = "`(T, n) x`, `x @ W.T - y`\n```python\nnp.abs(a - b).max()\n```"
    cells = [
        {"cell_type": "markdown", "source": [text]},
        {"cell_type": "code", "source": ["%pip install x\n", "a + b"]},
    ]
    assert list(code_of(cells)) == ["np.abs(a - b).max()\n", "x @ W.T - y", "pass\na + b"]

"""What editors and type checkers see of the package: a script that passes them runs, and has the types they say."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import minilora

SCRIPT = """
from typing import Any, assert_type

import numpy as np

import minilora as ml


class Net(ml.Module):
    def __init__(self) -> None:
        self.layers = [ml.Linear(4, 4, rng=0), ml.Linear(4, 1, bias=True, rng=1)]
        self.scale = ml.Parameter(np.ones(1, np.float32))

    def forward(self, x: ml.Tensor) -> ml.Tensor:
        return self.layers[1](self.layers[0](x).relu()) @ self.scale.T


@ml.op
def cube(x: Any) -> tuple[Any, ...]:
    return x**3, lambda g: g * 3 * x**2


net: Net = Net().train().requires_grad_(True).eval()
y = net(ml.Tensor(np.ones((2, 4), np.float32)))
assert_type(cube(y).mean(axis=0, keepdims=True).sum().item(), float)
assert_type(2 * y.T - y.exp() / (1 + y.sigmoid()), ml.Tensor)
assert_type(sorted({y: 1, cube(y): 2}.values()), list[int])
print(int((y > 0).sum()), (y == 0.5).any(), cube.forward(np.ones(3))[0])

parameter = ml.Parameter([1.0, 2.0])
with ml.no_grad():
    parameter -= 0.1
    parameter *= 2
assert_type(parameter, ml.Parameter)

model, tokenizer = ml.load("tiny")
assert isinstance(model, ml.Llama)
assert_type(model.config.hidden_size, int)
hook = model.model.layers[0].register_forward_hook(lambda module, inputs, x: None)
with hook, ml.no_grad():
    x = model.model.norm(model.model.embed_tokens(np.array([[1, 2]])))
assert_type(x, ml.Tensor)
names = ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, target_modules={"q_proj", "v_proj"}))
assert_type(names, list[str])
"""


def test_a_typed_script_runs():
    exec(compile(SCRIPT, "script", "exec"), {"__name__": "script"})


@pytest.mark.long
def test_a_type_checker_passes_the_script(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "script.py"]
    root = Path(minilora.__file__).parents[1]
    found = {} if root.name == "site-packages" else {"MYPYPATH": str(root)}  # mypy finds what is installed by itself
    checked = subprocess.run(command, cwd=tmp_path, env=os.environ | found, capture_output=True, text=True)
    assert [line for line in checked.stdout.splitlines() if "error" in line and line.startswith("script.py")] == []
    assert "checked" in checked.stdout or "no issues" in checked.stdout


def declared():
    """The methods of Tensor that tensor.py declares for type checkers alone: their arguments, by name."""
    tree = ast.parse(Path(inspect.getfile(minilora.Tensor)).read_text(encoding="utf-8"))
    (body,) = (
        item.body
        for kind in ast.walk(tree)
        if isinstance(kind, ast.ClassDef) and kind.name == "Tensor"
        for item in kind.body
        if isinstance(item, ast.If)
    )
    found = {}
    for item in body:
        if isinstance(item, ast.FunctionDef):
            space = {"TYPE": None}
            exec(compile(ast.Module([_untyped(item)], []), "tensor", "exec"), space)
            found[item.name] = space[item.name]
        else:
            found |= {target.id: found[item.value.id] for target in item.targets}
    return found


def _untyped(function):
    """The same definition without annotations and decorators."""
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    function.returns, function.decorator_list = None, []
    return function


def test_the_declared_methods_of_a_tensor_are_those_that_it_has():
    from minilora.engine import ops

    set_in_ops = {name for name, value in vars(minilora.Tensor).items() if "ops" in getattr(value, "__module__", "")}
    assert set_in_ops - {"__array_ufunc__"} <= {*declared()} and "sum" in set_in_ops and ops
    for name, function in declared().items():
        there = getattr(minilora.Tensor, name)
        if isinstance(there, property) or name == "__hash__":
            continue
        says, has = (list(inspect.signature(each).parameters.values())[1:] for each in (function, there))
        assert [each.default for each in says] == [each.default for each in has], name
        if not name.startswith("__"):
            assert [each.name for each in says] == [each.name for each in has], name

"""What editors and type checkers see of the package; mypy checks the script typed.py with it."""

import ast
import inspect
import runpy
from pathlib import Path

import minilora


def test_a_typed_script_runs():
    runpy.run_path(str(Path(__file__).with_name("typed.py")))


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

"""Ready for a GPU, tested without one: CuPy has what the package calls, and a strict stand-in for it runs all of it."""

import ast
import inspect
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import strictarray

import minilora
from minilora.engine.backend import to_device, to_numpy
from minilora.engine.tensor import OPS, Tensor

# Methods and attributes of arrays that the package uses: CuPy's must have them.
ARRAY_ATTRIBUTES = [
    "T", "all", "any", "argmax", "astype", "base", "copy", "cumsum", "dtype", "get", "item", "max", "mean", "min",
    "nbytes", "ndim", "nonzero", "reshape", "shape", "size", "sum", "swapaxes", "tolist", "transpose",
]  # fmt: skip


@pytest.fixture
def device(monkeypatch):
    """Make "cuda" mean the stand-in."""
    monkeypatch.setitem(sys.modules, "cupy", strictarray)
    return "cuda"


@pytest.fixture(scope="module")
def cupy():
    """CuPy itself: it imports without a driver, so that names and arguments can be looked up."""
    return pytest.importorskip("cupy", reason="needs CuPy, though no GPU: pip install 'minilora[gpu]'")


# -- what the package calls of the array library -----------------------------------------------------------------------


@cache
def files_with_xp():
    """The syntax trees of the package's files that ask for an array library, by name."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in Path(minilora.__file__).parent.rglob("*.py")}
    return {name: ast.parse(text) for name, text in sorted(texts.items()) if "array_module(" in text}


def calls_of_xp():
    """Every `xp.a.b` of the package: {"a.b": [(place, number of arguments, names of keywords)]}; None if not called."""
    found = {}
    for file, tree in files_with_xp().items():
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        parents = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            is_xp = isinstance(node, ast.Name) and node.id == "xp" and isinstance(node.ctx, ast.Load)
            is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("array_module", "_cupy")
            names = []
            while (is_xp or is_call) and isinstance(parent := parents[id(node)], ast.Attribute):
                names.append(parent.attr)
                node = parent
            if not names:
                continue
            call = calls.get(id(node))
            use = None
            if call is not None and not any(isinstance(x, ast.Starred) for x in call.args):
                use = len(call.args), [k.arg for k in call.keywords]
            found.setdefault(".".join(names), []).append((f"{file}:{node.lineno}", use))
    assert len(found) > 30
    return found


def look_up(module, dotted):
    for name in dotted.split("."):
        module = getattr(module, name)
    return module


def test_the_stand_in_has_every_function_that_the_package_calls():
    assert all(look_up(strictarray, name) is not None for name in calls_of_xp())


def test_cupy_has_every_function_keyword_and_attribute_that_the_package_uses(cupy):
    for name, uses in calls_of_xp().items():
        function = look_up(cupy, name)
        for place, (count, keywords) in ((place, use) for place, use in uses if use is not None):
            if isinstance(function, cupy.ufunc):
                assert count in (function.nin, function.nargs) and set(keywords) <= {"out", "dtype", "casting"}, place
            elif inspect.isroutine(function) and not inspect.isbuiltin(function):
                inspect.signature(function).bind(*range(count), **dict.fromkeys(keywords))
    assert not [name for name in ARRAY_ATTRIBUTES if not hasattr(cupy.ndarray, name)]
    assert callable(cupy.add.at)
    assert Tensor.__array_priority__ > cupy.ndarray.__array_priority__  # so that operators are left to tensors


def test_an_array_library_is_always_called_xp():
    """Otherwise the two tests above would not see what is called on it."""
    for file, tree in files_with_xp().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and "array_module(" in ast.unparse(node.value):
                for target, value in zip(*pairs(node), strict=True):
                    if ast.unparse(value).startswith("array_module(") and ast.unparse(value).count(")") == 1:
                        assert ast.unparse(target) == "xp", f"{file}:{node.lineno}"


def pairs(assignment):
    target, value = assignment.targets[0], assignment.value
    both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
    return (target.elts, value.elts) if both else ([target], [value])


def test_the_stand_in_offers_nothing_that_cupy_lacks(cupy):
    public = [name for name in vars(strictarray) if not name.startswith("_")]
    own = {"crossings", "counting", "contextmanager", "SimpleNamespace", "np"}
    assert not [name for name in public if name not in own and not hasattr(cupy, name)]
    assert not [name for name in vars(strictarray.ndarray) if name != "_host" and not hasattr(cupy.ndarray, name)
                and name not in ("__dict__", "__weakref__")]  # fmt: skip
    for part in ("linalg", "random"):
        assert not [name for name in vars(getattr(strictarray, part)) if not hasattr(getattr(cupy, part), name)]


# -- the stand-in is strict --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake",
    [
        np.asarray,
        np.exp,
        np.isfinite,
        lambda x: np.concatenate([x, x]),
        lambda x: x + np.ones(3),
        lambda x: np.ones(3) + x,
        lambda x: x @ np.ones(3),
        lambda x: x.__iadd__(np.ones(3)),
        lambda x: np.ones(3).__iadd__(x),
        lambda x: x > np.ones(3),
        lambda x: x[np.array([0, 1])],
        lambda x: x.__setitem__(0, np.ones(1)),
        lambda x: strictarray.where(x > 0, x, np.ones(3)),
        lambda x: strictarray.exp(np.ones(3)),
        lambda x: strictarray.add.at(x, strictarray.asarray([0]), np.ones(1)),
        lambda x: {x: 1},
    ],
)
def test_the_stand_in_refuses_to_mix(mistake):
    with pytest.raises(TypeError):
        mistake(strictarray.asarray([1.0, 2.0, 3.0]))


# -- backend -----------------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"^device 'cuda' needs CuPy, .* pip install 'minilora\[gpu\]'$"):
        to_device(np.zeros(3), "cuda")

    def no_device():
        raise OSError("cudaErrorNoDevice: no CUDA-capable device is detected\nand more")

    monkeypatch.setitem(sys.modules, "cupy", strictarray)
    monkeypatch.setattr(strictarray.cuda.runtime, "getDeviceCount", no_device)
    with pytest.raises(RuntimeError) as caught:
        to_device(np.zeros(3), "cuda")
    assert str(caught.value) == (
        "device 'cuda' finds no usable GPU (cudaErrorNoDevice: no CUDA-capable device is detected): "
        "check nvidia-smi, or use device 'cpu'"
    )
    for name in ("tpu", "gpu", "cuda:0", "CPU", ""):
        with pytest.raises(ValueError, match=f"'{name}' is unknown: use 'cpu' or 'cuda'"):
            to_device(np.zeros(3), name)


def test_cupy_itself_without_a_driver_gives_the_same_advice(cupy):
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    if count:
        pytest.skip("there is a GPU here")
    with pytest.raises(RuntimeError, match="finds no usable GPU .* check nvidia-smi, or use device 'cpu'"):
        to_device(np.zeros(3), "cuda")


def test_arrays_go_to_the_device_and_come_back(device):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    there = to_device(x, device)
    assert type(there) is strictarray.ndarray and to_device(there, device) is there
    assert np.array_equal(to_device(there, "cpu"), x) and to_numpy(x) is x


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "linear_cross_entropy"])
def test_a_loss_with_known_scored_labels_does_not_wait_for_the_device(loss, rng):
    x, w = rng.standard_normal((2, 5, 8))
    labels = np.array([1, -100, 0, 4, -100])
    inputs = [x] if loss == "cross_entropy" else [x, w]
    expected = OPS[loss](*inputs, labels).item()
    assert OPS[loss](*inputs, labels, scored=np.array([0, 2, 3])).item() == expected
    there = [strictarray.asarray(array) for array in (*inputs, labels, np.array([0, 2, 3]))]
    with strictarray.counting() as crossings:
        y = OPS[loss](*there[:-1], scored=there[-1])
    assert crossings == [] and y.item() == expected

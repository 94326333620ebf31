"""Ready for a GPU, tested without one: CuPy has what the package asks for, and a strict stand-in goes all the way."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import strictarray
from smallmodels import sent

import minilora
from minilora.engine.backend import array_module, to_device, to_device_of, to_floats, to_numpy
from minilora.engine.examples import EXAMPLES
from minilora.engine.tensor import OPS, Tensor
from minilora.lora.config import LoraConfig
from minilora.nn.optim import clip_grad_norm

IDS = np.arange(24).reshape(2, 12) * 7 % 64
LORA = LoraConfig(r=4, lora_alpha=8)

# What the package uses of arrays besides operators and indices: CuPy's must have it (`tolist` and `item` come home).
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


# -- what the package asks of the array library ------------------------------------------------------------------------


def calls_of_xp():
    """Every `xp.a.b` of the package: {"a.b": [(place, number of arguments, names of keywords)]}; None where no call."""
    found = {}
    for path in sorted(Path(minilora.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
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
            found.setdefault(".".join(names), []).append((f"{path.name}:{node.lineno}", use))
    return found


def look_up(module, dotted):
    for name in dotted.split("."):
        module = getattr(module, name)
    return module


@pytest.mark.parametrize("name", sorted(calls_of_xp()))
def test_the_stand_in_has_every_function_that_the_package_asks_for(name):
    assert look_up(strictarray, name) is not None


@pytest.mark.parametrize("name", sorted(calls_of_xp()))
def test_cupy_has_every_function_and_keyword_that_the_package_asks_for(cupy, name):
    function = look_up(cupy, name)
    for place, use in calls_of_xp()[name]:
        if use is None:
            continue
        count, keywords = use
        if isinstance(function, cupy.ufunc):
            assert count in (function.nin, function.nargs) and set(keywords) <= {"out", "dtype", "casting"}, place
        elif inspect.isroutine(function) and not inspect.isbuiltin(function):
            inspect.signature(function).bind(*range(count), **dict.fromkeys(keywords))


def test_nothing_but_xp_holds_an_array_library():
    """Else the two tests above would not see what is called on it."""
    for path in Path(minilora.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and "array_module(" in ast.unparse(node.value):
                for target, value in zip(*pairs(node), strict=True):
                    if ast.unparse(value).startswith("array_module(") and ast.unparse(value).count(")") == 1:
                        assert ast.unparse(target) == "xp", f"{path.name}:{node.lineno}"


def pairs(assignment):
    target, value = assignment.targets[0], assignment.value
    both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
    return (target.elts, value.elts) if both else ([target], [value])


def test_cupys_arrays_have_what_the_package_uses_of_arrays(cupy):
    assert not [name for name in ARRAY_ATTRIBUTES if not hasattr(cupy.ndarray, name)]


def test_cupys_ufuncs_can_add_at_repeated_indices(cupy):
    assert callable(cupy.add.at)


def test_cupys_arrays_leave_operators_with_tensors_to_tensors(cupy):
    assert Tensor.__array_priority__ > cupy.ndarray.__array_priority__


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


@pytest.mark.parametrize("missing", ["fromiter", "linspace", "array_equal", "errstate"])
def test_the_stand_in_lacks_what_is_not_asked_of_it(missing):
    with pytest.raises(AttributeError):
        getattr(strictarray, missing)


def test_the_stand_in_keeps_numbers_on_the_device_and_counts_who_fetches_them():
    x = strictarray.asarray(np.arange(3.0, dtype=np.float32))
    with strictarray.counting() as crossings:
        for number in (x.sum(), x[1], x @ x, x.max(), -x[0], x.mean() * np.float32(2)):
            assert type(number) is strictarray.ndarray and number.shape == () and number.dtype == np.float32
        assert array_module(x) is strictarray and x[1:].base is not None and (x + 1).base is None
    assert crossings == []
    with strictarray.counting() as crossings:
        assert float(x[1]) == 1 and x[2].item() == 2 and bool(x[1]) and x.tolist() == [0, 1, 2] and x.get()[1] == 1
        x[x > 0], x.nonzero(), f"{x[0]:g}", strictarray.asarray([1, 2])
    assert crossings == ["float", "item", "bool", "tolist", "get", "mask", "nonzero", "format", "asarray"]


# -- backend -----------------------------------------------------------------------------------------------------------


def test_without_cupy_the_device_cuda_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"^device 'cuda' needs CuPy, .* pip install 'minilora\[gpu\]'$"):
        to_device(np.zeros(3), "cuda")


def test_without_a_gpu_the_device_cuda_says_what_is_missing_and_what_to_do(monkeypatch, device):
    def no_device():
        raise OSError("cudaErrorNoDevice: no CUDA-capable device is detected\nand more")

    monkeypatch.setattr(strictarray.cuda.runtime, "getDeviceCount", no_device)
    with pytest.raises(RuntimeError) as caught:
        to_device(np.zeros(3), device)
    assert str(caught.value) == (
        "device 'cuda' finds no usable GPU (cudaErrorNoDevice: no CUDA-capable device is detected): "
        "check nvidia-smi, or use device 'cpu'"
    )


def test_cupy_itself_without_a_driver_gives_the_same_advice(cupy):
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    if count:
        pytest.skip("there is a GPU here")
    with pytest.raises(RuntimeError, match="finds no usable GPU .* check nvidia-smi, or use device 'cpu'"):
        to_device(np.zeros(3), "cuda")


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="'tpu' is unknown: use 'cpu' or 'cuda'"):
        to_device(np.zeros(3), "tpu")


def test_arrays_go_to_the_device_and_come_back(device):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    there = to_device(x, device)
    assert type(there) is strictarray.ndarray and to_device(there, device) is there
    assert np.array_equal(to_device(there, "cpu"), x) and to_numpy(x) is x


def test_several_numbers_come_home_in_one_crossing():
    x = strictarray.asarray(np.float32([0.5, 2.0]))
    with strictarray.counting() as crossings:
        assert to_floats(x[0], x[1].astype(np.float64), x.sum()) == [0.5, 2.0, 2.5]
    assert crossings == ["get"]


def test_several_integer_arrays_are_sent_in_one_crossing():
    arrays = [np.arange(6).reshape(2, 3), np.array([], np.int64), np.array([7, 8])]
    with strictarray.counting() as crossings:
        sent = to_device_of(strictarray.zeros(1), *arrays)
    assert crossings == ["asarray"]
    assert all(np.array_equal(x.get(), y) and x.shape == y.shape for x, y in zip(sent, arrays, strict=True))
    assert all(x is y for x, y in zip(to_device_of(np.zeros(1), *arrays), arrays, strict=True))


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(OPS))
def test_no_operation_comes_home_on_its_way(name):
    arrays, settings = EXAMPLES[name](np.random.default_rng(0))

    def computed(send):
        inputs = [Tensor(send(x.astype(np.float32)), requires_grad=True) for x in arrays]
        options = {key: sent(send, value) for key, value in settings.items()}
        with strictarray.counting() as crossings:
            y = OPS[name](*inputs, **options)
            y.backward(send(np.ones(y.shape, np.float32)))
        arrays_home = [to_numpy(y.data), *(to_numpy(x.grad) for x in inputs)]
        return arrays_home, [c for c in crossings if c != "asarray"]

    here, _ = computed(np.asarray)
    there, crossings = computed(strictarray.asarray)
    assert all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(here, there, strict=True))
    assert crossings == (["nonzero"] if "cross_entropy" in name else [])  # only to hear which labels are scored


@pytest.mark.parametrize("loss", ["cross_entropy", "linear_cross_entropy"])
def test_a_loss_that_is_told_which_labels_are_scored_waits_for_nothing(loss, rng):
    x, w = rng.standard_normal((2, 5, 8))
    labels = np.array([1, -100, 0, 4, -100])
    inputs = [x] if loss == "cross_entropy" else [x, w]
    expected = OPS[loss](*inputs, labels).item()
    assert OPS[loss](*inputs, labels, scored=np.array([0, 2, 3])).item() == expected
    there = [strictarray.asarray(array) for array in (*inputs, labels, np.array([0, 2, 3]))]
    with strictarray.counting() as crossings:
        y = OPS[loss](*there[:-1], scored=there[-1])
    assert crossings == [] and y.item() == expected


# -- clipping gives the same bits as ever ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clipping_is_bit_identical_to_the_plain_formula(rng, dtype, max_norm):
    grads = [rng.standard_normal(shape).astype(dtype) for shape in [(7, 3), (50,), (), *[(4, 9)] * 20]]
    total = 0.0
    for g in grads:
        total += float(g.reshape(-1) @ g.reshape(-1))
    norm = total**0.5
    expected = [g * (max_norm / (norm + 1e-6)) if norm > max_norm else g.copy() for g in grads]
    parameters = [Tensor(np.zeros_like(g), requires_grad=True) for g in grads]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g.copy()
    assert clip_grad_norm(parameters, max_norm) == norm
    assert all(np.array_equal(p.grad, e) and p.grad.dtype == dtype for p, e in zip(parameters, expected, strict=True))


def test_the_stand_in_is_found_as_the_library_of_its_own_arrays():
    assert importlib.import_module("strictarray") is array_module(strictarray.zeros(2))

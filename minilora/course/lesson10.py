"""Lesson 10's exercises: merging an update into a weight, unmerging it, and injecting layers into a model."""

import copy
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..nn.layers import Linear, RMSNorm
from ..nn.module import Module, Parameter
from .compare import Wrong, close, compare
from .exercises import Draw, arrays, distinct_sizes, exercise, variant
from .hunts import hunt

# -- 10.1 and 10.2 a layer as a dictionary -----------------------------------------------------------------------------


def layer(
    rng: np.random.Generator, square: bool = False, merged: bool = False, r: int | None = None, key: str = "kept"
) -> Draw:
    """One layer. square: m = n = r, so that A B has the shape of B A. merged: its update is already in W, and the
    base's array under `key`.
    """
    sizes = distinct_sizes("mn", rng) | {"r": int(rng.integers(2, 6)) if r is None else r}
    if square:
        sizes["n"] = sizes["r"] = sizes["m"]
    drawn = dict(arrays(rng, sizes, W="m n", A="r n", B="m r"), alpha=int(rng.choice([29, 31, 37, 41])), kept=None)
    if merged:
        merge(drawn)
    drawn[key] = drawn.pop("kept")
    return Draw(sizes, layer=drawn)


def seen(result: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The layer after a call."""
    after = arguments["layer"]
    return {name: after.get(name) for name in ("W", key_of(after))}


def key_of(layer: dict[str, Any]) -> str:
    """The name under which the base's array is kept: that of the first form, or of its variant."""
    return "base" if "base" in layer else "kept"


def whole(layer: dict[str, Any], key: str) -> None:
    """Raise Wrong for a layer that has lost a key."""
    for name in ("W", "A", "B", "alpha", key):
        if name not in layer:
            raise Wrong(f"the layer has lost its {name!r}: change what is stored there, and leave the key")


def judge_merge(answer: Any, drawn: Draw, rng: np.random.Generator, power: float = 1) -> None:
    """W is the merged matrix, the base's array is kept, and a second call changes nothing. power: of r in the scale."""
    own = drawn["layer"]
    key = key_of(own)
    base, A, B, before = own["W"], own["A"].copy(), own["B"].copy(), own["W"].copy()
    if own[key] is not None:
        answer(layer=own)
        whole(own, key)
        if own["W"] is not base:
            raise Wrong(f"merged twice: this layer is already merged (`{key}` is not None) and must not change")
        return
    product, r = B @ A, len(A)
    s, other = own["alpha"] / r**power, own["alpha"] / r ** (1.5 - power)
    by, not_by = ("r", "sqrt(r), which is rsLoRA's") if power == 1 else ("sqrt(r)", "r")
    answer(layer=own)
    whole(own, key)
    if not np.array_equal(base, before):
        raise Wrong("the base's array was changed in place: W + ... makes a new array, += writes into the old one")
    if own[key] is None and own["W"] is base:
        raise Wrong("the layer is unchanged: change the dictionary that is passed, not a copy of it")
    if own[key] is None:
        raise Wrong(f"nothing is kept: store the base's array in layer['{key}'], or the merge cannot be undone")
    if own[key] is not base:
        what = "a copy of the base's array" if np.array_equal(own[key], before) else "another array than the base's"
        raise Wrong(f"`{key}` contains {what}: store the array itself that was layer['W'] before the merge")
    if not (np.array_equal(own["A"], A) and np.array_equal(own["B"], B)):
        raise Wrong(f"A or B was changed: only W and {key} change")
    got = own["W"]
    if not isinstance(got, np.ndarray) or got.shape != before.shape:
        raise Wrong(f"layer['W'] must stay an array of shape (m, n) = {before.shape}, got {np.shape(got)}")
    update = got - before
    if close(update, s * product, 1e-9):
        return
    for line, wrong in (
        ("W is not changed: add the update to it", 0 * product),
        ("the scale is missing", product),
        (f"the scale is alpha: divide it by {by}", own["alpha"] * product),
        ("r is the number of rows of A, not n, the number of its columns", own["alpha"] / A.shape[1] * product),
        (f"scale is alpha / {by}, not alpha / {not_by}", other * product),
        ("the update is added, not subtracted", -s * product),
        ("the update is added twice", 2 * s * product),
        ("W is only the update: add it to the base's weight", s * product - before),
    ):
        if close(update, wrong, 1e-9):
            raise Wrong(line)
    if A.shape == B.shape == before.shape and close(update, s * (A @ B), 1e-9):
        raise Wrong("A B instead of B A: the shapes fit because this layer is square, but it is a different matrix")
    compare(update, s * product, "the change of W", "m, n", answer.sizes)


@exercise(
    "10.1",
    draw=[layer, lambda rng: layer(rng, square=True), lambda rng: layer(rng, merged=True)],
    smallest=lambda rng: layer(rng, r=1),
    returns="the layer",
    judge=judge_merge,
    changes=("layer",),
    observe=seen,
)
def merge(layer):
    """Add the update to layer["W"] once. Keep the old array, unchanged, in layer["kept"]."""
    if layer["kept"] is None:
        scale = layer["alpha"] / len(layer["A"])
        layer["kept"] = layer["W"]
        layer["W"] = layer["W"] + scale * (layer["B"] @ layer["A"])


RS = {"alpha / r": "alpha / r**0.5", 'layer["alpha"] / len(layer["A"])': 'layer["alpha"] / len(layer["A"]) ** 0.5'}
NAMED_BASE = {"`kept`": "`base`", 'layer["kept"]': 'layer["base"]'}
variant(
    "merge",
    RS | NAMED_BASE,
    "the scale is that of rsLoRA, and the base's array has another key",
    draw=[partial(layer, key="base"), partial(layer, key="base", square=True), partial(layer, key="base", merged=True)],
    smallest=partial(layer, r=1, key="base"),
    judge=partial(judge_merge, power=0.5),
)


def judge_unmerge(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """The kept array itself is restored; a layer that is not merged does not change."""
    own = drawn["layer"]
    key = key_of(own)
    W, kept, before = own["W"], own[key], copy.deepcopy(own)
    base = before[key]
    answer(layer=own)
    whole(own, key)
    for name in ("A", "B", "alpha"):
        if not np.array_equal(own[name], before[name]):
            raise Wrong(f"{name} was changed: only W and {key} change")
    if kept is None:
        if own["W"] is None:
            raise Wrong(f"a layer that is not merged has lost its W: where {key} is None, there is nothing to do")
        if own["W"] is not W or own[key] is not None:
            raise Wrong(f"a layer that is not merged was changed: where {key} is None, there is nothing to do")
        return
    if own["W"] is not kept:
        exact = base is not None and isinstance(own["W"], np.ndarray) and np.array_equal(own["W"], base)
        if own["W"] is W and not exact:
            raise Wrong(f"W is still the merged array: put the array in layer[{key!r}] back")
        raise Wrong(
            "W has the base's values, but it is a copy: restore the kept array itself"
            if exact
            else "W is not the base's weight bit for bit: subtraction rounds; restore the kept array"
        )
    if own[key] is not None:
        raise Wrong(f"`{key}` must be None again, or the next merge does nothing")


@exercise(
    "10.2",
    draw=[lambda rng: layer(rng, merged=True), layer],
    returns="the layer",
    judge=judge_unmerge,
    changes=("layer",),
    observe=seen,
)
def unmerge(layer):
    """Restore the array in layer["kept"]."""
    if layer["kept"] is not None:
        layer["W"], layer["kept"] = layer["kept"], None


variant(
    "unmerge",
    NAMED_BASE,
    "the base's array has another key",
    draw=[partial(layer, merged=True, key="base"), partial(layer, key="base")],
)


# -- 10.3 injection ----------------------------------------------------------------------------------------------------


class Half(Module):
    """Part of a small model: names that end alike, and one linear layer inside a list."""

    def __init__(self, rng: np.random.Generator):
        self.q_proj, self.v_proj = Linear(4, 3, rng=rng), Linear(4, 3, rng=rng)
        self.group_proj, self.up_proj = Linear(4, 3, rng=rng), Linear(4, 3, rng=rng)


class Small(Module):
    """A small model for the exercise."""

    def __init__(self, rng: np.random.Generator):
        self.layers = [Half(rng), Half(rng)]
        self.lm_head, self.up_proj = Linear(4, 3, rng=rng), RMSNorm(4)  # called like a layer
        self.norm = RMSNorm(4)
        self.scale = Parameter(np.ones(4, np.float32))


class Adapted(Module):
    """The module that make_layer returns: its B is trainable, and it knows which layer it replaces."""

    def __init__(self, layer: Linear):
        self.weight, self.replaces = layer.weight, (layer,)
        self.B = Parameter(np.zeros((3, 2), np.float32))


TARGETS = (["q_proj", "up_proj"], ["up_proj"], ["v_proj", "up_proj"])  # group_proj ends like up_proj


def draw_model(rng: np.random.Generator, targets: Sequence[str] | None = None) -> Draw:
    """A small model, targets and a function that makes layers."""
    chosen = list(TARGETS[int(rng.integers(len(TARGETS)))] if targets is None else targets)
    return Draw({}, model=Small(rng), targets=chosen, make_layer=Adapted)


def judge_add(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """Exactly the named layers are replaced; only they are trainable; a wrong name is refused."""
    model, targets = drawn["model"], drawn["targets"]
    before = dict(model.named_modules())
    linear = {name for name, module in before.items() if isinstance(module, Linear)}
    wanted = [name for name in before if name in linear and name.rpartition(".")[2] in targets]
    names = answer(**drawn)
    after = dict(model.named_modules())
    replaced = [name for name in before if isinstance(after.get(name), Adapted)]
    if extra := [name for name in replaced if name not in wanted]:
        everywhere = len(replaced) == len(linear)
        why = "every linear layer was" if everywhere else f"{extra[0]} was"
        if extra[0] not in linear:
            raise Wrong(f"{extra[0]} was replaced, and is no Linear: look at the kind of a module, too (isinstance)")
        raise Wrong(f"{why} replaced, with targets {targets}: compare the whole name after the last dot")
    if missing := [name for name in wanted if name not in replaced]:
        raise Wrong(f"{missing[0]} was not replaced, with targets {targets}: look at every module, at any depth")
    for name in wanted:
        if after[name].replaces[0] is not before[name]:
            raise Wrong(f"{name}: make_layer was called with a different layer from the one that is replaced")
    learning = set(model.trainable_parameters())
    if not learning:
        raise Wrong("nothing is trainable: the adapters were frozen, too; freeze the model first, then inject")
    if foreign := sorted(name for name in learning if not name.endswith(".B")):
        raise Wrong(f"{foreign[0]} is still trainable: freeze the whole model before you inject")
    if not isinstance(names, (list, tuple)) or sorted(map(str, names)) != sorted(wanted):
        got = names if isinstance(names, (list, tuple)) else type(names).__name__
        raise Wrong(f"return the names of the replaced layers, here {wanted[0]!r} and so on, got {got}")
    if list(names) != wanted:
        raise Wrong("return the names in the order of the model, as named_modules gives them")
    for name, kind in (("v_porj", "misspelled"), ("proj", "incomplete"), ("norm", "non-Linear")):
        fresh = Small(np.random.default_rng(0))
        try:
            answer(model=fresh, targets=[*targets, name], make_layer=Adapted)
        except Wrong as wrong:
            if "ValueError" not in str(wrong):
                line = f"your function must raise ValueError for the {kind} target {name!r}, but: {wrong}"
                raise Wrong(line) from None
        else:
            raise Wrong(f"the {kind} target {name!r} was ignored: raise ValueError if a name matches no layer")
        if any(isinstance(module, Adapted) for _, module in fresh.named_modules()) or not fresh.scale.requires_grad:
            raise Wrong(f"the {kind} target was refused too late: look for all targets before you change the model")


@exercise(
    "10.3",
    draw=draw_model,
    smallest=lambda rng: draw_model(rng, ["lm_head"]),
    returns="the names",
    judge=judge_add,
    changes=("model",),
    observe=lambda result, arguments: result,
)
def add_lora(model, targets, make_layer):
    """model: an ml.Module; targets: a list of names such as "q_proj"; make_layer: Linear -> module -> list of names"""
    found = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and n.split(".")[-1] in targets}
    for target in targets:
        if not any(name.split(".")[-1] == target for name in found):
            raise ValueError(f"no layer is called {target}")
    model.requires_grad_(False)
    for name, module in found.items():
        model.set_submodule(name, make_layer(module))
    return list(found)


def judge_pairs(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """`judge_add`, and the old layers come back by name."""

    def names(**arguments: Any) -> Any:
        before = dict(arguments["model"].named_modules())
        found = answer(**arguments)
        if not isinstance(found, dict):
            raise Wrong(f"return a dictionary of name -> the layer that was replaced, got {type(found).__name__}")
        if any(found[name] is not before.get(name) for name in found):
            raise Wrong("the values of the dictionary are the layers that were replaced, not those that replace them")
        return list(found)

    judge_add(names, drawn, rng)


variant(
    "add_lora",
    {
        "Return the names of the replaced layers, in the order of the model.": (
            "Return a dictionary: the name of each replaced layer, in the order of the model, and the old layer."
        ),
        "make_layer: Linear -> module -> list of names": "make_layer: Linear -> module -> {name: old layer}",
        "return list(found)": "return found",
    },
    "the replaced layers are returned with their names",
    lines={
        "list(found) -> len(found)": "return found -> return list(found)",
        "return the names of the replaced layers": "return a dictionary",
        "list(found) -> list(found)[::-1]": "return found -> return dict(list(found.items())[::-1])",
    },
    judge=judge_pairs,
)


# -- 10.4 a bug hunt ---------------------------------------------------------------------------------------------------


def lora(W: Any, r: int, alpha: float, rng: np.random.Generator) -> Any:
    """A layer with LoRA that can be merged, saved and resumed."""
    m, n = W.shape
    A, B = rng.uniform(-1, 1, (r, n)) / np.sqrt(n), np.zeros((m, r))
    layer = SimpleNamespace(W=W, A=A, B=B, alpha=alpha, trainable=["A", "B"])

    def scale() -> Any:
        return layer.alpha / len(layer.A)

    def forward(x: Any) -> Any:
        return x @ layer.W.T + scale() * (x @ layer.A.T @ layer.B.T)

    def merged() -> Any:
        return layer.W + scale() * (layer.B @ layer.A)

    def save() -> Any:
        return {"A": layer.A.copy(), "B": layer.B.copy(), "alpha": layer.alpha}

    def resume(saved: Any) -> None:
        layer.A, layer.B, layer.alpha = saved["A"].copy(), saved["B"].copy(), saved["alpha"]
        layer.trainable = ["A", "B"]

    layer.forward, layer.merged, layer.save, layer.resume = forward, merged, save, resume
    return layer


@exercise("10.4", draw=lambda rng: Draw(None, lora=lora), returns="nothing", judge=hunt("10.4", lora))
def test_lora(lora):
    """lora(W, r, alpha, rng) -> a layer: passes if it is right, raises AssertionError if it is broken"""
    rng = np.random.default_rng(0)
    W, x = rng.standard_normal((3, 5)), rng.standard_normal((4, 5))
    layer = lora(W, r=2, alpha=6, rng=rng)
    assert np.array_equal(layer.forward(x), x @ W.T)
    assert layer.A.any()
    layer.B = rng.standard_normal((3, 2))
    y = x @ (W + 3 * layer.B @ layer.A).T
    assert np.allclose(layer.forward(x), y)
    assert np.allclose(x @ layer.merged().T, y)
    again = lora(W, r=2, alpha=1, rng=rng)
    again.resume(layer.save())
    assert np.allclose(again.forward(x), layer.forward(x))
    assert sorted(again.trainable) == ["A", "B"]


variant(
    "test_lora",
    RS | {"3 * layer.B": "6 / 2**0.5 * layer.B"},
    "the scale is that of rsLoRA",
    judge=hunt("10.4", lora, {"layer.alpha / len(layer.A)": "layer.alpha / len(layer.A) ** 0.5"}),
)

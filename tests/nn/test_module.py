"""Modules: names, state, freezing, and the layers that models are made of."""

from dataclasses import replace

import numpy as np
import pytest
from smallmodels import IN_A_LAYER, SMALL

from minilora.engine.tensor import Tensor
from minilora.files.disk import ModelFileError
from minilora.lora.adapters import add_adapter, merge_adapter, unmerge_adapter
from minilora.lora.config import LoraConfig
from minilora.nn.layers import Embedding, Linear, RMSNorm
from minilora.nn.llama import Llama
from minilora.nn.module import Module, Parameter, sha256_of

# -- names and state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_names_and_shapes_are_those_of_a_hugging_face_checkpoint(tied):
    model = Llama(replace(SMALL, tie_word_embeddings=tied))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    names = [f"model.layers.{i}.{part}.weight" for i in range(2) for part in IN_A_LAYER]
    names += ["model.embed_tokens.weight", "model.norm.weight"]
    assert set(shapes) == {*names, *([] if tied else ["lm_head.weight"])}
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (4, 8)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (8, 6)


def test_a_tied_embedding_is_one_parameter_counted_once():
    tied, untied = Llama(SMALL), Llama(replace(SMALL, tie_word_embeddings=False))
    assert tied.head_weight is tied.model.embed_tokens.weight
    count = [sum(p.size for _, p in model.named_parameters()) for model in (tied, untied)]
    assert count == [88 + 2 * (2 * 64 + 2 * 32 + 3 * 48 + 2 * 8) + 8, count[0] + 88]


def test_a_parameter_that_two_modules_hold_is_named_once():
    class Twins(Module):
        def __init__(self):
            self.first, self.second = Linear(2, 2, rng=None), Linear(2, 2, rng=None)
            self.second.weight = self.first.weight

    assert [name for name, _ in Twins().named_parameters()] == ["first.weight"]


def test_the_fingerprint_sees_names_dtypes_shapes_and_every_bit():
    state = {"a": np.zeros((2, 3), np.float32)}
    changed = state["a"].copy()
    changed[1, 2] = np.float32(1e-45)
    others = [{"b": state["a"]}, {"a": state["a"].T}, {"a": state["a"].view(np.int32)}, {"a": changed}, {}]
    assert len({sha256_of(s) for s in (state, *others)}) == 6
    assert sha256_of({"x": changed, **state}) == sha256_of({**state, "x": changed})


def replaced(array):
    return lambda state: {**state, "model.norm.weight": array}


MISFITS = {
    "missing model.norm.weight": lambda state: {k: v for k, v in state.items() if k != "model.norm.weight"},
    r"model.norm.weight has shape \(7,\), expected \(8,\)": replaced(np.ones(7)),
    "model.norm.weight holds NaN or infinity": replaced(np.r_[np.ones(7), np.nan]),
    "model.norm.weight has dtype int64, expected floating-point numbers": replaced(np.ones(8, np.int64)),
    "model.norm.weight has dtype complex128, expected": replaced(np.ones(8, complex)),
}


@pytest.mark.parametrize(("message", "broken"), MISFITS.items(), ids=["missing", "shape", "nan", "int", "complex"])
def test_loading_a_state_that_does_not_fit_says_what_and_changes_nothing(model, message, broken):
    before = model.state_dict()
    with pytest.raises(ModelFileError, match=message):
        model.load_state_dict(broken({name: array * 2 for name, array in before.items()}))
    assert all(array is before[name] for name, array in model.state_dict().items())


def test_large_numbers_whose_sum_is_infinite_are_finite():
    layer = Linear(2, 2, rng=None)
    layer.load_state_dict({"weight": np.full((2, 2), 2e38, np.float32)})
    with pytest.raises(ModelFileError, match="NaN or infinity"):
        layer.load_state_dict({"weight": np.array([[2e38, -np.inf], [0, 0]], np.float32)})


def test_no_state_is_loaded_that_unmerging_would_take_away(model):
    add_adapter(model, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))
    merge_adapter(model)
    with pytest.raises(ValueError, match="call unmerge_adapter before load_state_dict"):
        model.load_state_dict(model.state_dict())
    unmerge_adapter(model)
    model.load_state_dict(model.state_dict())


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_freezing_is_by_subtree_and_can_be_undone(model):
    everything, held = set(model.trainable_parameters()), list(model.parameters())
    assert everything == set(model.state_dict())
    assert [p.shape for p in held] == [array.shape for array in model.state_dict().values()]
    assert model.requires_grad_(False) is model and not model.trainable_parameters()
    assert list(map(id, model.parameters())) == list(map(id, held))
    model.model.layers[0].mlp.requires_grad_()
    assert set(model.trainable_parameters()) == {name for name in everything if "layers.0.mlp" in name}


def test_a_frozen_model_builds_no_graph_and_a_frozen_part_gets_no_gradient(model, ids):
    model.model.embed_tokens.requires_grad_(False)
    model.loss(ids, ids).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["model.embed_tokens.weight"]
    assert not model.requires_grad_(False).loss(ids, ids).requires_grad


class Empty(Module):
    """As false as an empty list."""

    def __len__(self):
        return 0


def test_every_submodule_can_be_replaced_by_its_name(model):
    for path in [path for path, _ in model.named_modules() if path]:
        copy, new = Llama(SMALL), Linear(1, 1, rng=None)
        copy.set_submodule(path, new)
        assert copy.get_submodule(path) is new and dict(copy.named_modules())[path] is new
        assert f"{path}.weight" in copy.state_dict()
    assert type(copy.model.layers) is list
    copy.parts = {3: Linear(1, 1, rng=None)}
    copy.set_submodule("parts.3", new)
    assert copy.parts == {3: new}
    copy.fc, copy.fc2, copy.none = Linear(1, 1, rng=None), new, Empty()
    assert copy.get_submodule("fc2") is new and copy.get_submodule("none") is copy.none
    for missing in ("model.layers.2", "model.layers.0.mlp.gate_prj"):
        with pytest.raises(KeyError):
            model.get_submodule(missing)
        with pytest.raises(KeyError):
            model.set_submodule(missing, new)


@pytest.mark.parametrize(
    "plan",
    [
        [(Parameter, Linear), (Linear, Parameter), ()],
        ({3: [Linear, None], 12: Linear}, [Linear]),
        {"x": {"y": ([Linear, {1: (Linear, None)}], Parameter)}, 0: []},
    ],
    ids=str,
)
def test_containers_in_containers_hold_parameters_and_modules_that_are_found_and_replaced(plan):
    """Such as a pair of factors for each of several experts."""
    found = {}

    def built(plan, name):
        if isinstance(plan, list | tuple):
            return type(plan)(built(each, f"{name}.{i}") for i, each in enumerate(plan))
        if isinstance(plan, dict):
            return {key: built(each, f"{name}.{key}") for key, each in plan.items()}
        found[name] = None if plan is None else Linear(2, 1, rng=None) if plan is Linear else Parameter(np.ones(3))
        return found[name]

    def kinds(held):
        if isinstance(held, dict):
            return {key: kinds(each) for key, each in held.items()}
        return type(held)(map(kinds, held)) if isinstance(held, list | tuple) else type(held)

    model = Module()
    model.held = built(plan, "held")
    held, before, children = (
        model.held,
        kinds(model.held),
        {name: x for name, x in found.items() if isinstance(x, Linear)},
    )
    names = {f"{name}.weight" if isinstance(x, Linear) else name for name, x in found.items() if x is not None}
    assert set(model.trainable_parameters()) == names and dict(model.named_children()) == children
    for name in children:
        children[name] = Linear(2, 1, rng=None)
        model.set_submodule(name, children[name])
        assert dict(model.named_children()) == children
    assert kinds(model.held) == before and (model.held is held or isinstance(held, tuple))


def test_only_neighbours_in_one_list_are_printed_as_one():
    model, new = Module(), lambda: Linear(1, 1, rng=None)
    model.a, model.b, model.named, model.fc1, model.fc2 = [new(), new()], (new(),), {"x": new(), 0: new()}, new(), new()
    printed = [line.strip().partition(": ")[0] for line in repr(model).splitlines()[1:-1]]
    assert printed == ["(a.0 to 1)", "(b.0)", "(named.x)", "(named.0)", "(fc1)", "(fc2)"]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_hook_on_the_embedding_gives_the_gradient_with_respect_to_the_input(model, ids, recompute):
    model.requires_grad_(False).decoder.recompute = recompute
    seen = []

    def leaf(layer, inputs, x):
        seen.append(Tensor(x.data, requires_grad=True))
        return seen[-1]

    def from_here(x):
        with model.embedding.register_forward_hook(lambda layer, inputs, y: x):
            return model.loss(ids, ids)

    with model.embedding.register_forward_hook(leaf):
        model.loss(ids, ids).backward()
    x = seen[0].data.astype(np.float64)
    moved = np.random.default_rng(0).standard_normal(x.shape)
    above, below = (from_here(Tensor(x + sign * 1e-4 * moved)).item() for sign in (1, -1))
    assert np.sum(seen[0].grad * moved) == pytest.approx((above - below) / 2e-4, rel=1e-3)


@pytest.mark.parametrize("path", ["model.layers.0", "model.layers.1.mlp.up_proj", "lm_head"])
def test_a_hook_sees_the_output_of_a_module_and_may_replace_it(path, ids):
    model, seen = Llama(replace(SMALL, tie_word_embeddings=False)), []
    module = model.get_submodule(path)
    before, loss = model(ids).data, model.loss(ids, ids).item()
    with module.register_forward_hook(lambda *call: seen.append(call)):
        np.testing.assert_array_equal(model(ids).data, before)
        handle = module.register_forward_hook(lambda module, inputs, output: output * 2)
        after = model(ids).data
        assert not np.allclose(after, before) and not np.isclose(model.loss(ids, ids).item(), loss)
    assert [call[0] for call in seen] == [module] * 3 and all(type(call[1]) is tuple for call in seen)
    assert seen[0][2].shape[:2] == seen[0][1][0].shape[:2] == ids.shape
    add_adapter(model, LoraConfig(r=1, lora_alpha=1, target_modules=["up_proj", "lm_head"]))
    np.testing.assert_array_equal(model(ids).data, after)
    handle.remove()
    np.testing.assert_array_equal(model(ids).data, before)
    assert len(seen) == 3


# -- layers ------------------------------------------------------------------------------------------------------------


def test_layers_compute_what_they_say(rng):
    x = rng.standard_normal((2, 3)).astype(np.float32)
    linear, norm, table = Linear(3, 4, bias=True, rng=rng), RMSNorm(3), Embedding(5, 3, rng=rng)
    linear.bias.data += 1
    np.testing.assert_allclose(linear(x).data, x @ linear.weight.data.T + 1, rtol=1e-6)
    np.testing.assert_allclose(norm(x).data, x / np.sqrt((x**2).mean(axis=1, keepdims=True)), rtol=1e-4)
    np.testing.assert_array_equal(table(np.array([[4, 0]])).data, table.weight.data[None, [4, 0]])


def test_new_weights_are_float32_follow_the_seed_and_are_zero_without_one():
    one, same, other = (Linear(30, 40, rng=np.random.default_rng(seed)).weight.data for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other) and one.dtype == np.float32
    assert one.std() == pytest.approx(0.02, rel=0.1)
    np.testing.assert_array_equal(Linear(30, 40, rng=1).weight.data, one)  # a seed
    assert not Linear(3, 4, rng=None).weight.data.any()
    with pytest.raises(TypeError, match="rng"):
        Linear(3, 4)  # which would not learn next to another layer of zeros

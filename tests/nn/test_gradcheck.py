"""The gradient check of a whole model finds a mistake of one per cent anywhere, and says where it is."""

import re

import numpy as np
import pytest
from smallmodels import SMALL, new_model, random_samples, shaken

import minilora as ml
from minilora.engine import tensor
from minilora.nn.module import Module

SAMPLES = random_samples(np.random.default_rng(0), (6, 5), SMALL.vocab_size)
PLACES = [
    f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn", "self_attn.q_proj", "mlp", "mlp.up_proj")
]


@pytest.fixture(autouse=True)
def own_operations(monkeypatch):
    """Operations defined in a test do not count as minilora's."""
    monkeypatch.setattr(tensor, "OPS", {})


class Mistaken(Module):
    """A module whose output is right and whose gradient is another than the right one, g, by default 1 % too large."""

    def __init__(self, inner, vjp=lambda g: 1.01 * g):
        def mistaken(x):
            return x, vjp

        self.inner, self.operation = inner, tensor.op(mistaken)

    def forward(self, *inputs):
        return self.operation(self.inner(*inputs))


def model_of(seed):
    return new_model(SMALL, seed).requires_grad_()


IN_LONG = [pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 4, 7, *range(8, 20))]


@pytest.mark.parametrize("seed", [0, 3, 5, 6, *IN_LONG])
def test_one_per_cent_in_one_place_is_found_and_located(seed):
    model = model_of(seed)
    place = PLACES[seed % len(PLACES)]
    wrong = Mistaken(model.get_submodule(place))
    model.set_submodule(place, wrong)
    names = [name for name, _ in model.named_parameters()]
    last = [name for name in names if name.startswith(f"{place}.inner")][-1]
    with pytest.raises(ml.GradientError, match=r"of the gradient's norm \(tolerance 1e-06\)") as raised:
        ml.gradcheck(model, SAMPLES, seed=seed)
    assert str(raised.value).endswith(f"the last of them {last}")


def test_of_a_gradient_with_one_wrong_row_an_element_of_that_row_is_named():
    model = model_of(1)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Mistaken(mlp.up_proj, lambda g: g * np.where(np.arange(g.shape[-1]) == 0, 1.5, 1.0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "up_proj.inner" in name
    with pytest.raises(
        ml.GradientError, match=r"gradient of model.layers.1.mlp.up_proj.inner.weight at \(0, \d\): got"
    ):
        ml.gradcheck(model, SAMPLES)


def test_the_named_element_is_wrong_by_as_much():
    model = model_of(0)
    model.model.layers[1].mlp = Mistaken(model.model.layers[1].mlp)
    with pytest.raises(ml.GradientError) as raised:
        ml.gradcheck(model, SAMPLES)
    name, got, expected = re.match(
        r"gradient of (\S+) at \(.*\): got (\S+), expected (\S+);", str(raised.value)
    ).groups()
    assert float(got) != pytest.approx(float(expected), rel=1e-3) and name in dict(model.named_parameters())


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa", "lora_dropout": 0.5}])
def test_of_an_adapter_that_is_right_nothing_is_said_and_nothing_changes(settings):
    model = new_model(SMALL)
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, **{"target_modules": "all-linear", **settings}), seed=0)
    shaken(model)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    report = ml.gradcheck(model, SAMPLES)
    assert report.elements == sum(p.size for p in model.trainable_parameters().values())
    assert 0 < report.max_relative_error < 1e-6
    assert model.training and all(np.array_equal(before[name], array) for name, array in model.state_dict().items())
    assert all(p.grad is None for p in model.trainable_parameters().values())


def test_gradients_from_before_do_not_count():
    model = model_of(3)
    for parameter in model.trainable_parameters().values():
        parameter.grad = np.ones(parameter.shape, np.float32)
    ml.gradcheck(model, SAMPLES)


@pytest.mark.parametrize("gradient", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_wrong(gradient):
    model = model_of(2)
    model.model.layers[1].mlp = Mistaken(model.model.layers[1].mlp, lambda g: np.full_like(g, gradient))
    with pytest.raises(ml.GradientError, match=r"error is inf of .*the last of them model\.layers\.1\.mlp\.inner"):
        ml.gradcheck(model, SAMPLES)


def test_a_gradient_that_is_zero_everywhere_is_right_where_nothing_changes():
    model = model_of(4)
    model.model.embed_tokens.weight.data[:] = 0  # no hidden state, no logit, whatever the other weights are
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers" in name
    assert ml.gradcheck(model, SAMPLES).max_relative_error < 1e-6


def test_a_small_gradient_is_compared_with_itself():
    model = model_of(6)
    mlp = model.model.layers[1].mlp
    mlp.down_proj.weight.data *= 0.002  # and with it the gradient of up_proj, but not its own
    mlp.up_proj = Mistaken(mlp.up_proj, lambda g: (1 + 1e-5) * g)
    for _, parameter in model.named_parameters():
        parameter.requires_grad = any(parameter is each.weight for each in (mlp.up_proj.inner, mlp.down_proj))
    with pytest.raises(ml.GradientError, match=r"1 of 2 parameters .*mlp\.up_proj\.inner\.weight$"):
        ml.gradcheck(model, SAMPLES)


def test_more_directions_find_a_larger_error():
    model = model_of(5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("layers.0.mlp.up_proj.weight")
    one, many = (ml.gradcheck(model, SAMPLES, directions=n).max_relative_error for n in (1, 8))
    assert one < many


class Layer(Module):
    """x wᵀ, scaled, of the rows with these ids; the gradient of w is `factor` times the right one."""

    def __init__(self, rng, factor):
        self.weight = ml.Parameter(rng.standard_normal((2, 3)).astype(np.float32))
        self.scale = ml.Parameter(np.array([2.0], np.float32), requires_grad=False)
        self.factor = factor

    def forward(self, x, ids):
        @tensor.op
        def product(x, w):
            return x @ w.T, lambda g: g @ w, lambda g: self.factor * (g.T @ x)

        return product(x[ids], self.weight) * self.scale


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_of_another_module_the_parameters_are_checked_as_well_as_the_inputs(factor, rng, monkeypatch):
    monkeypatch.setattr(tensor, "OPS", {})
    layer, x, ids = Layer(rng, factor), rng.standard_normal((4, 3)).astype(np.float32), np.array([0, 2, 2])
    layer.weight.grad = before = np.ones((2, 3), np.float32)
    if factor == 1:
        report = ml.gradcheck(layer, x, ids)
        assert (report.name, report.elements) == ("Layer", 6 + 12) and report.max_relative_error < 1e-8
    else:
        with pytest.raises(ml.GradientError, match=r"^Layer: gradient of weight at index .* got .*, expected"):
            ml.gradcheck(layer, x, ids)
    assert layer.weight.dtype == np.float32 and layer.weight.grad is before


def test_without_samples_there_is_nothing_to_check():
    with pytest.raises(ValueError, match="no samples to check the gradient on"):
        ml.gradcheck(model_of(0), [])
    with pytest.raises(TypeError, match="expected a list of samples, got a ndarray"):
        ml.gradcheck(model_of(0), np.ones((2, 3), int))


def test_a_tolerance_that_is_no_number_accepts_no_gradient():
    with pytest.raises(ml.GradientError, match="have a wrong gradient"):
        ml.gradcheck(model_of(0), SAMPLES, tolerance=float("nan"))


@pytest.mark.parametrize("directions", [0, -1, 1.5, "2", None])
def test_fewer_than_one_direction_checks_nothing(directions):
    with pytest.raises(ValueError, match=f"directions must be a whole number of at least 1, got {directions!r}"):
        ml.gradcheck(model_of(0), SAMPLES, directions=directions)


def test_nothing_trainable_is_an_error():
    with pytest.raises(RuntimeError, match="nothing is trainable"):
        ml.gradcheck(new_model(SMALL).requires_grad_(False), SAMPLES)

"""`fit` compared with a loop written out by hand, what it is given, and what it refuses."""

import math

import numpy as np
import pytest
from helpers.refusals import refused
from jobs import same
from smallmodels import SMALL, new_model, random_samples

import minilora as ml
from minilora.data.samples import epochs
from minilora.nn import step as shared
from minilora.nn.optim import SCHEDULES, SGD, AdamW, clip_grad_norm
from minilora.nn.parts import pack
from minilora.train import loop
from minilora.train.loop import History, Trainer, fit
from minilora.train.options import Training

LORA = ml.LoraConfig(r=4, lora_alpha=8)


class MLP(ml.Module):
    """A module of one's own, which is no language model."""

    def __init__(self, rng):
        self.up, self.down = ml.Linear(4, 6, rng=rng), ml.Linear(6, 2, rng=rng)

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_a_module_of_ones_own_learns_in_a_loop_of_ones_own_and_its_adapter_is_saved_and_loaded(rng, tmp_path):
    model, x, y = MLP(rng), rng.standard_normal((9, 4)).astype(np.float32), rng.standard_normal((9, 2))
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4), name="a")
    optimizer, losses = ml.AdamW(model.trainable_parameters(), lr=1e-2), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = ((model(x) - y.astype(np.float32)) ** 2).mean()
        loss.backward()
        ml.clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    ml.save_adapter(model, tmp_path, "a")
    other = MLP(rng)
    with pytest.raises(ml.ModelFileError, match=r"another base .*; this model has sha256 \w+: load the base that it"):
        ml.load_adapter(other, tmp_path, "b")
    other.load_state_dict(ml.base_state(model))
    ml.load_adapter(other, tmp_path, "b")
    np.testing.assert_array_equal(other(x).data, model(x).data)
    with pytest.raises(TypeError, match="optimizer must be .* derived from one, got a dict"):
        ml.fit(new_model(SMALL), samples(), steps=1, optimizer={})


def test_an_optimizer_of_another_model_or_made_before_the_adapter_is_refused():
    model = new_model(SMALL)
    optimizer = ml.AdamW(model.trainable_parameters())
    ml.add_adapter(model, LORA)
    for given in (optimizer, ml.AdamW(adapted(SMALL).trainable_parameters())):  # and one of another model
        with pytest.raises(ValueError, match="no parameter of this model that is trainable now: .* after add_adapter"):
            fit(model, samples(), steps=1, optimizer=given)


def adapted(config):
    model = new_model(config)
    ml.add_adapter(model, LORA, seed=0)
    return model


def samples():
    return random_samples(np.random.default_rng(1))


def by_hand(model, steps, lr, batch_size, seed, warm_steps, max_norm, optimizer=None, schedule="cosine", decay=0.0):
    """The loop in its plainest words: whole batches, nothing divided, Adam without weight decay unless told."""
    parameters = model.trainable_parameters()
    optimizer = optimizer or AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    history, batches = History(), epochs(samples(), batch_size, seed)
    for step in range(steps):
        batch = pack(next(batches))
        for parameter in parameters.values():
            if parameter.node is not None:
                parameter.node.grad = None
        loss = model.loss(batch.input_ids, batch.labels, batch.packing)
        loss.backward()
        history.norms.append(float(clip_grad_norm(parameters, max_norm)))
        optimizer.lr = lr * SCHEDULES[schedule](step, steps, warm_steps)
        optimizer.step()
        history.rates.append(optimizer.lr)
        history.losses.append(loss.item())
    return history


def assert_alike(got, wanted):
    """The same losses, norms before clipping and learning rates, step by step."""
    np.testing.assert_allclose(got.losses, wanted.losses, rtol=1e-5)
    np.testing.assert_allclose(got.norms, wanted.norms, rtol=1e-3)
    np.testing.assert_allclose(got.rates, wanted.rates)


WAYS = [  # what fit is told, what the loop by hand does then
    (dict(steps=10, batch_size=3, warmup=0.1), dict(steps=10, batch_size=3, warm_steps=1)),
    (dict(steps=7, warmup=0.5), dict(steps=7, warm_steps=4)),  # 3.5 steps are rounded, not cut
    (dict(warmup=0.01), dict(warm_steps=1)),  # never less than one
    (dict(warmup=0.0), dict(warm_steps=0)),  # unless there is none
    (dict(max_norm=0.05), dict(max_norm=0.05)),  # clipped at every step
    (dict(max_norm=math.inf), dict(max_norm=math.inf)),
    (dict(schedule="linear"), dict(schedule="linear")),
    (dict(schedule="constant"), dict(schedule="constant")),
    (dict(weight_decay=5.0), dict(decay=5.0)),
    (dict(grad_accumulation=2), dict(batch_size=4)),
    (dict(grad_accumulation=4, batch_size=1), dict(batch_size=4)),  # the last lot of an epoch is a smaller one
]


@pytest.mark.parametrize(("told", "meant"), WAYS, ids=[str(told) for told, _ in WAYS])
def test_fit_is_the_loop_written_by_hand_step_by_step_with_every_knob(told, meant, tiny_config):
    model, other, usual = adapted(tiny_config), adapted(tiny_config), adapted(tiny_config)
    start = ml.adapter_state(adapted(tiny_config), "default")
    settings = dict(steps=8, lr=2e-2, batch_size=2, seed=5, max_norm=1.0)
    got = fit(model, samples(), **settings | dict(warmup=0.25) | told)
    wanted = by_hand(other, **settings | dict(warm_steps=2) | meant)
    assert_alike(got, wanted)
    for name, array in ml.adapter_state(other, "default").items():
        np.testing.assert_allclose(ml.adapter_state(model, "default")[name], array, rtol=1e-3, atol=2e-6)
        assert not np.allclose(array, start[name], atol=1e-3)
    assert fit(usual, samples(), warmup=0.25, **settings).losses != got.losses
    assert told.get("max_norm") != 0.05 or min(wanted.norms) > 0.05  # the row that says so is clipped


def test_what_is_left_out_is_adam_at_a_thousandth_in_eights_with_a_tenth_of_warmup_and_clipping_at_one(tiny_config):
    many = random_samples(np.random.default_rng(1), range(6, 26))
    usual = fit(adapted(tiny_config), many, 20)
    said = fit(adapted(tiny_config), many, 20, lr=1e-3, batch_size=8, seed=0, warmup=0.1, max_norm=1.0,
               schedule="cosine", weight_decay=0.0, grad_accumulation=1)  # fmt: skip
    assert usual.losses == said.losses and len(usual.losses) == 20
    optimizer = AdamW((model := adapted(tiny_config)).trainable_parameters(), lr=1e-3, weight_decay=0.0)
    with Trainer(model, many, Training(steps=20), optimizer) as trainer:
        assert [trainer.step() for _ in range(20)] == usual.losses


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_learning_rate_falls_from_the_first_step_to_the_second(schedule, tiny_config):
    rates = fit(adapted(tiny_config), samples(), 5, lr=1.0, warmup=0, schedule=schedule).rates
    fall = {"cosine": lambda x: (1 + math.cos(math.pi * x)) / 2, "linear": lambda x: 1 - x, "constant": lambda x: 1.0}
    assert rates == pytest.approx([fall[schedule](step / 5) for step in range(5)])


# -- an optimizer of one's own -----------------------------------------------------------------------------------------


def test_an_optimizer_that_is_given_is_used_with_its_own_lr_as_the_peak(tiny_config):
    model, other = adapted(tiny_config), adapted(tiny_config)
    optimizer = SGD(model.trainable_parameters(), lr=0.5, momentum=0.9)
    got = fit(model, samples(), 8, batch_size=3, optimizer=optimizer)
    theirs = SGD(other.trainable_parameters(), lr=0.5, momentum=0.9)
    assert_alike(got, by_hand(other, 8, 0.5, 3, seed=0, warm_steps=1, max_norm=1.0, optimizer=theirs))
    assert optimizer.lr == 0.5  # as it was given


def test_an_optimizer_that_holds_some_parameters_trains_those_alone(tiny_config):
    model, start = adapted(tiny_config), ml.adapter_state(adapted(tiny_config), "default")
    only_b = {name: p for name, p in model.trainable_parameters().items() if "lora_B" in name}
    fit(model, samples(), 3, optimizer=AdamW(only_b, lr=1e-2))
    now = ml.adapter_state(model, "default")
    moved = {name for name in now if not np.array_equal(now[name], start[name])}
    assert moved == {name for name in start if "lora_B" in name}


# -- what it returns and leaves behind ---------------------------------------------------------------------------------


def test_the_model_is_left_in_eval_mode_without_gradients(tiny_config):
    model = adapted(tiny_config)
    modes = []
    fit(model, samples(), 2, each_step=lambda step: modes.append(model.training))
    assert modes == [True, True] and not model.training
    assert all(p.grad is None for _, p in model.named_parameters())


def test_a_history_tells_the_median_second_and_all_tokens_over_all_seconds():
    history = History(losses=[3.0, 2.5, 2.0], seconds=[1.0, 9.0, 2.0], tokens=600)
    assert history.seconds_per_step == 2.0 and history.tokens_per_second == 50.0
    assert repr(history) == "History(3 steps, loss 3.000 at first, 2.000 at last, 2.00 s per step)"
    assert repr(History()) == "History(0 steps)"
    assert math.isnan(History().seconds_per_step) and math.isnan(History().tokens_per_second)


def test_accumulated_batches_are_counted_as_they_are_packed(tiny_config):
    """Samples with a common beginning: it is computed once per batch, not once per step."""
    same_start = [ml.Sample((1, 2, 3, 4, n, n + 1), (-100,) * 5 + (n + 1,)) for n in range(10, 18)]
    tokens = {
        (size, lots): fit(adapted(tiny_config), same_start, 1, batch_size=size, grad_accumulation=lots).tokens
        for size, lots in ((8, 1), (4, 2), (2, 4))
    }
    assert tokens == {(8, 1): 4 + 8 * 2, (4, 2): 2 * (4 + 4 * 2), (2, 4): 4 * (4 + 2 * 2)}


REFUSED = [  # what is given, what the message names
    (dict(samples=[]), ["no samples"]),
    (dict(steps=0), ["steps", 0]),
    (dict(batch_size=0), ["batch_size", 0]),
    (dict(grad_accumulation=0), ["grad_accumulation", 0]),
    (dict(warmup=1.1), ["warmup", 1.1]),
    (dict(max_norm=-1.0), ["max_norm", -1.0, "inf"]),
    (dict(schedule="step"), ["schedule", *SCHEDULES, "'step'"]),
    (dict(seed=-1), ["seed", -1]),
    (dict(lr=0.0), ["lr", 0.0]),
    (dict(weight_decay=-0.1), ["weight_decay", -0.1]),
    (dict(weight_decay=0.1, optimizer=True), ["weight_decay is 0.1", "optimizer"]),
    (dict(keep="first"), ["keep", "best", "last", "'first'"]),
    (dict(patience=1), ["patience", "validation=..."]),
    (dict(lr=1e-3, optimizer=True), ["lr is 0.001", 0.5]),
]


@pytest.mark.parametrize(("change", "names"), REFUSED, ids=[str(names[0]) for _, names in REFUSED])
def test_fit_refuses_what_cannot_be_trained(change, names, tiny_config):
    model = adapted(tiny_config)
    if "optimizer" in change:
        change = change | {"optimizer": SGD(model.trainable_parameters(), lr=0.5)}
    refused(lambda: fit(model, **(dict(samples=samples(), steps=1) | change)), *names)


def test_what_a_history_has_of_an_earlier_training_decides_nothing_about_the_next(tiny_config):
    def trained(earlier):
        """The loss that a training ends with, and its validation losses."""
        model, few, others = adapted(tiny_config), samples()[:3], samples()[3:]
        history = History(validation=list(earlier))
        fit(model, few, 12, lr=1.0, validation=others, eval_every=1, history=history, patience=2)
        return ml.mean_loss(model, others), [loss for _, loss in history.validation[len(earlier) :]]

    assert trained([(7, 0.0)]) == (expected := trained([]))
    assert expected[0] == min(expected[1]) < expected[1][-1] and 2 < len(expected[1]) < 12


# -- what breaks on the way --------------------------------------------------------------------------------------------


def run(config, steps=30, poison=None, **settings):
    """Train a new tiny model with a new adapter; returns (model, history)."""
    model = adapted(config)
    if poison:
        poison(model)
    return model, fit(model, samples(), steps, **dict(lr=1e-2, batch_size=3) | settings)


def test_the_history_has_one_entry_per_step_and_the_caller_hears_of_each(tiny_config):
    heard, given = [], History()
    _, history = run(
        tiny_config, steps=4, each_step=lambda step: heard.append((step, len(given.losses))), history=given
    )
    assert history is given and heard == [(1, 1), (2, 2), (3, 3), (4, 4)] and len(history.seconds) == 4
    computed = sum(len(s.ids) for s in random_samples(np.random.default_rng(1)))
    assert history.tokens == 2 * computed  # four batches of three are twice all six, which share no beginning
    assert history.tokens_per_second == pytest.approx(history.tokens / sum(history.seconds))


def test_validation_decides_which_weights_are_kept_and_when_to_stop_and_so_may_the_caller(tiny_config, monkeypatch):
    held_out = random_samples(np.random.default_rng(2))
    settings = dict(steps=23, validation=held_out, lr=0.3)
    steps = [*range(2, 23, 2), 23]  # each epoch: three of six samples a step
    last, whole = run(tiny_config, **settings, keep="last")
    assert [step for step, _ in whole.validation] == steps and whole.validation[-1][1] == ml.mean_loss(last, held_out)
    losses = dict(zip(steps, [5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 3.2, 3.1, 4.0, 3.4, 3.3, 3.6], strict=True))

    def validated(**more):
        measured = iter(losses.values())
        monkeypatch.setattr(loop, "mean_loss", lambda *given, **named: next(measured))
        model, history = run(tiny_config, **settings, **more)
        return ml.adapter_state(model, "default"), history

    after_eight, _ = run(tiny_config, steps=23, lr=0.3, each_step=lambda done: "stop" if done == 8 else None)
    kept, history = validated()
    assert history.best == (8, 3.0) and history.validation == list(losses.items())
    assert same(kept, ml.adapter_state(after_eight, "default"))
    assert same(validated(keep="last")[0], ml.adapter_state(last, "default")) and not same(
        kept, validated(keep="last")[0]
    )
    stopped, short = validated(patience=3, eval_every=2)
    assert len(short.losses) == 8 + 6 and same(stopped, kept)
    asked, short = validated(each_step=lambda done: "stop" if done == 10 else None)
    assert len(short.losses) == 10 and same(asked, kept)


class Poison:
    """Makes a model's loss NaN at its n-th call, and keeps the adapter as it was at each call before."""

    def __init__(self, at):
        self.at, self.seen = at, []

    def __call__(self, model):
        real = model.loss

        def loss(*inputs):
            if len(self.seen) == self.at - 1:
                return real(*inputs) * np.float32(np.nan)
            self.seen.append({name: array.copy() for name, array in ml.adapter_state(model, "default").items()})
            return real(*inputs)

        model.loss, self.model = loss, model


@pytest.mark.parametrize("at", [1, 5])
def test_a_loss_that_is_no_number_stops_at_that_step_with_the_last_good_adapter(at, tiny_config):
    poison, heard = Poison(at), []
    reason = rf"the loss became nan at step {at} of 30: try a lower learning rate \(it is 0\.01\)"
    with pytest.raises(ml.TrainingError, match=reason):
        run(tiny_config, poison=poison, each_step=heard.append)
    assert heard == list(range(1, at))
    last = poison.seen[-1] if poison.seen else ml.adapter_state(adapted(tiny_config), "default")
    assert same(ml.adapter_state(poison.model, "default"), last)


def test_a_step_holds_one_copy_of_the_adapter(tiny_config, monkeypatch):
    held, real = [], loop.training_step

    def step(*given, before_update, **known):
        result = real(*given, before_update=before_update, **known)
        held.append({name: array.ctypes.data for name, array in before_update.__self__.good.items()})
        return result

    monkeypatch.setattr(loop, "training_step", step)
    run(tiny_config, steps=3)
    assert held[0] and held[0] == held[1] == held[2]  # where the copies are
    monkeypatch.setattr(
        loop, "training_step", lambda *given, before_update, **known: held.append(before_update) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        fit(new_model(tiny_config), samples(), steps=1)
    assert held[-1] is None  # a copy of the whole model would be large


def test_a_gradient_that_is_no_number_stops_before_it_reaches_the_weights(tiny_config, monkeypatch):
    real, calls, watched = shared.clip_grad_norm, [], Poison(at=99)  # never NaN: only keeps what it saw

    def clip(parameters, max_norm):
        parameters = list(parameters)
        calls.append(len(parameters))
        if len(calls) == 4:
            parameters[0].grad[...] = np.nan
        return real(parameters, max_norm)

    monkeypatch.setattr(shared, "clip_grad_norm", clip)
    with pytest.raises(ml.TrainingError, match=r"the gradient became nan at step 4 of 30: try a lower learning rate"):
        run(tiny_config, poison=watched)
    assert same(ml.adapter_state(watched.model, "default"), watched.seen[-1]) and len(watched.seen) == 4
    assert all(p.grad is None for _, p in watched.model.named_parameters())
    assert not watched.model.training

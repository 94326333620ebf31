"""Micro-batches on several cores, and blocks computed again in the backward pass, change no loss and no gradient."""

import dataclasses
import tracemalloc
from functools import partial

import numpy as np
import pytest
from smallmodels import as_float64

import minilora as ml
from minilora.engine import parallel, tensor
from minilora.engine.attention import Packing
from minilora.engine.recompute import recomputed, remembered
from minilora.engine.tensor import Tensor, is_recording, no_grad
from minilora.lora.adapters import add_adapter, merge_adapter, set_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.mixed import mixed_batch
from minilora.measure.ledger import peak
from minilora.nn import parts, step
from minilora.nn.llama import Config, Llama
from minilora.nn.optim import SGD, AdamW
from minilora.nn.parts import Batch, Sample, pack
from minilora.nn.step import NotFiniteError, divided, loss_and_grad, loss_without_grad, training_step

IDS = np.arange(8 * 40).reshape(8, 40) * 7 % 61
PACKED = Packing(6, (50, 130, 141, 230, 320))
SAMPLES = [Sample(ids := (1, 2, 3, 4, *range(5, 5 + n)), (*[-100] * 6, *ids[6:])) for n in (20, 50, 12, 40, 30, 7, 31)]


def labelled(ids, packing=None):
    labels = ids.copy()
    labels[:, :3] = -100
    for start, _ in packing.own_spans() if packing else []:
        labels[:, start] = -100
    return labels


BATCHES = {
    "rows": (IDS, labelled(IDS), None),
    "packed": (IDS.reshape(1, -1), labelled(IDS.reshape(1, -1), PACKED), PACKED),
}
each_batch = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
with_threads = pytest.mark.parametrize("threads", [1, 3], indirect=True)


@pytest.fixture
def threads(monkeypatch, request):
    monkeypatch.setattr(step, "cores", lambda: request.param)
    return request.param


def adapted(model, **settings):
    add_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings), "own", seed=1)
    return model.train()


def whole(model, *batch):
    loss = model.loss(*batch)
    loss.backward()
    return loss


def gradients(model, batch, compute=loss_and_grad):
    for p in model.trainable_parameters().values():
        p.grad = None
    loss = compute(model, *batch)
    return loss.item(), {name: p.grad.copy() for name, p in model.trainable_parameters().items()}


def assert_close(found, expected):
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert loss == pytest.approx(expected_loss, rel=1e-12) and grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        np.testing.assert_allclose(grads[name], grad, rtol=1e-9, atol=1e-12, err_msg=name)


def assert_equal(found, expected):
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert loss == expected_loss and all(np.array_equal(grad, expected_grads[name]) for name, grad in grads.items())


# -- loss and gradients ------------------------------------------------------------------------------------------------


@with_threads
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@each_batch
def test_micro_batches_give_the_loss_and_the_gradients_of_the_whole(tiny_model, batch, full, threads):
    model = as_float64(tiny_model if full else adapted(tiny_model))
    expected = gradients(model, batch, whole)
    assert_close(gradients(model, batch), expected)
    assert loss_without_grad(model, Batch(*batch)) == pytest.approx(expected[0], rel=1e-12)
    loss = loss_and_grad(model, *batch)  # a second batch adds to the gradients of the first
    assert loss.node is None
    twice = {name: p.grad for name, p in model.trainable_parameters().items()}
    assert_close((loss.item(), twice), (expected[0], {name: 2 * grad for name, grad in expected[1].items()}))


def changed(logits):
    """Other logits, which depend on a token's place in its own sequence."""
    T, V = logits.shape[1:]
    return logits * np.linspace(2, -1, V) + np.sin(np.arange(T * V)).reshape(T, V)


def with_hook(model):
    model.register_forward_hook(lambda module, inputs, logits: changed(logits))


def with_own_forward(model):
    class Changed(Llama):
        def forward(self, *inputs, **settings):
            return changed(super().forward(*inputs, **settings))

    model.__class__ = Changed


def with_forward_of_this_model(model):
    model.forward = lambda *inputs, **settings: changed(Llama.forward(model, *inputs, **settings))


def from_calls(model, ids, labels, packing=None):
    """The loss of each sequence and how many tokens of it are scored, by calling the model with each alone."""
    spans = [(0, 0, ids.shape[1])] if packing is None else [(packing.prefix, *span) for span in packing.own_spans()]
    for i, (prefix, start, end) in enumerate(spans):
        columns = np.r_[:prefix, start:end]
        for row, own in zip(ids[:, columns], labels[:, columns].copy(), strict=True):
            own[: prefix if i else 0] = -100
            scored = np.flatnonzero(own[1:] != -100)
            yield -model(row[None])[0].log_softmax()[scored, own[1:][scored]].mean(), len(scored)


ONE = IDS.reshape(1, -1)[:, :160]
ONES_OWN = [with_hook, with_own_forward, with_forward_of_this_model]
CALLED = [  # in the default run, each batch and each change with both numbers of threads
    pytest.param(batch, change, threads, marks=[pytest.mark.long] * ((i + j) % 3 == threads // 2 or (i + j) % 3 == 2))
    for i, batch in enumerate([*BATCHES.values(), (ONE, labelled(ONE))])
    for j, change in enumerate(ONES_OWN)
    for threads in (1, 3)
]


@pytest.mark.parametrize(("batch", "change", "threads"), CALLED, indirect=["threads"])
def test_every_loss_is_that_of_the_models_call_with_its_hooks_and_its_own_forward(monkeypatch, batch, change, threads):
    monkeypatch.setattr(parts, "GOOD", 32)
    model = as_float64(adapted(Llama(Config(64, 16, 24, 2, 4, 2, max_position_embeddings=320), 0)))
    plain = model.loss(*batch).item()
    change(model)
    losses, counts = zip(*from_calls(model, *batch), strict=True)
    loss = sum(loss * (n / sum(counts)) for loss, n in zip(losses, counts, strict=True))
    assert loss.item() != pytest.approx(plain, rel=1e-2)
    expected = gradients(model, batch, lambda *_: loss.backward() or loss)
    assert_close(gradients(model, batch, whole), expected)
    assert_close(gradients(model, batch), expected)
    assert loss_without_grad(model, Batch(*batch)) == pytest.approx(loss.item(), rel=1e-12)
    samples = [Sample(row, own) for row, own in zip(*BATCHES["rows"][:2], strict=True)]
    alone = [loss.item() for loss, _ in from_calls(model, *BATCHES["rows"])]
    assert step.losses_without_grad(model, samples) == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_three_micro_batches_on_two_threads_give_the_gradients_of_the_whole(tiny_config, monkeypatch, tied):
    """One thread then has two gradients of every parameter more than the other; a tied head, twice as many."""
    monkeypatch.setattr(step, "cores", lambda: 2)
    monkeypatch.setattr(parts, "GOOD", 40)
    monkeypatch.setattr(parts, "LEAST", 1)
    model = as_float64(Llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied), 0))
    batch = IDS[:3], labelled(IDS[:3])
    assert len(divided(model, Batch(*batch))) == 3
    assert_close(gradients(model, batch), gradients(model, batch, whole))


@pytest.mark.parametrize("threads", [2, 3], indirect=True)
@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}])
def test_the_same_batch_gives_the_same_bits(tiny_config, threads, settings):
    first, second = (gradients(adapted(Llama(tiny_config, 0), **settings), BATCHES["rows"]) for _ in range(2))
    assert_equal(first, second)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_where_there_is_no_gradient_the_ways_to_one_are_named(tiny_config, threads):
    ids, labels, _ = BATCHES["rows"]

    def frozen(model):
        model.requires_grad_(False)

    def inactive(model):
        set_adapter(adapted(model), None)

    def merged(model):
        merge_adapter(adapted(model))

    for prepare in (frozen, inactive, merged):
        model = Llama(tiny_config, 0)
        prepare(model)
        with pytest.raises(RuntimeError, match="nothing is trainable here"):
            loss_and_grad(model, ids, labels)
    with no_grad(), pytest.raises(RuntimeError, match=r"outside of no_grad\(\)"):
        loss_and_grad(Llama(tiny_config, 0), ids, labels)
    model = adapted(Llama(tiny_config, 0))
    merge_adapter(model)
    with pytest.raises(RuntimeError, match="call unmerge_adapter if it is merged"):
        ml.fit(model, SAMPLES[:2], steps=1)
    with pytest.raises(ValueError, match="no token is scored"):  # also where micro-batches without labels are left out
        loss_and_grad(Llama(tiny_config, 0), ids, np.full_like(labels, -100))


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_a_mixed_batch_keeps_its_rows_together(tiny_model, threads):
    model = as_float64(adapted(tiny_model))
    ids, labels, _ = BATCHES["rows"]
    names = ["own", None] * 4
    with mixed_batch(model, names):
        assert len(divided(model, Batch(ids, labels))) == 1
        together, found = gradients(model, (ids, labels))
        _, expected = gradients(model, (ids, labels), whole)
    assert len(divided(model, Batch(ids, labels))) == 2
    with no_grad():
        apart = []
        for row, name in enumerate(names):
            with mixed_batch(model, [name]):
                apart.append(model.loss(ids[row : row + 1], labels[row : row + 1]).item())
    assert together == pytest.approx(np.mean(apart), rel=1e-12)
    assert all(np.array_equal(grad, found[name]) and grad.any() for name, grad in expected.items())


@pytest.mark.long
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_only_the_micro_batches_in_progress_hold_activations(tiny_config, threads):
    model = adapted(Llama(tiny_config, np.random.default_rng(0)))
    ids = np.tile(IDS, (8, 1))
    loss_and_grad(model, IDS, IDS)  # what is imported at the first step counts for neither
    # Two of ten at a time, and the gradients of a thread that is ahead of the other:
    assert peak(partial(loss_and_grad, model, ids, ids)) < peak(partial(whole, model, ids, ids)) / 2


# -- the step ----------------------------------------------------------------------------------------------------------


@with_threads
def test_samples_some_at_a_time_or_all_at_once_have_the_loss_and_gradient_of_their_packed_row(
    tiny_config, threads, monkeypatch
):
    model = as_float64(adapted(Llama(dataclasses.replace(tiny_config, vocab_size=128), 0)))
    row, seen, real = pack(SAMPLES), [], step.divided
    expected = gradients(model, (row.input_ids, row.labels, row.packing), whole)
    norm = np.sqrt(sum((grad**2).sum() for grad in expected[1].values()))
    monkeypatch.setattr(step, "divided", lambda model, samples: seen.append(len(samples)) or real(model, samples))
    for at_once in (None, 1, 3, 99):
        seen.clear()
        loss, found = training_step(model, SGD(model.trainable_parameters(), lr=0.0), SAMPLES, at_once=at_once)
        assert sum(seen) == len(SAMPLES) and max(seen) == min(at_once or 7, 7)
        assert_close((loss, {name: p.grad for name, p in model.trainable_parameters().items()}), expected)
        assert found == pytest.approx(norm, rel=1e-9)


def test_a_training_step_is_what_one_writes_by_hand(tiny_config):
    models = [as_float64(adapted(Llama(tiny_config, 0))) for _ in range(2)]
    mine, other = (AdamW(model.trainable_parameters(), lr=0.01) for model in models)
    for _ in range(3):
        loss, norm = training_step(models[0], mine, Batch(*BATCHES["rows"]), max_norm=0.01)
        expected, grads = gradients(models[1], BATCHES["rows"])
        by_hand = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
        for p in models[1].trainable_parameters().values():
            p.grad *= min(1.0, 0.01 / (by_hand + 1e-6))
        other.step()
        assert norm == pytest.approx(by_hand, rel=1e-9) and norm > 0.01
        assert loss == pytest.approx(expected, rel=1e-9)
    for (name, p), (_, q) in zip(*(model.named_parameters() for model in models), strict=True):
        np.testing.assert_allclose(p.data, q.data, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(("what", "spoiled"), [("loss", "model.norm.weight"), ("gradient", None)])
def test_a_step_that_is_not_finite_changes_no_weight_and_says_what_is_not(tiny_config, monkeypatch, what, spoiled):
    model = adapted(Llama(tiny_config, 0))
    if spoiled:
        dict(model.named_parameters())[spoiled].data[0] = np.nan
    else:
        monkeypatch.setattr(step, "clip_grad_norm", lambda parameters, max_norm: np.float64("inf"))
    before = {name: p.data.copy() for name, p in model.trainable_parameters().items()}
    with pytest.raises(NotFiniteError, match=f"{what} became (nan|inf)") as caught:
        training_step(model, AdamW(model.trainable_parameters()), Batch(*BATCHES["rows"]))
    assert caught.value.what == what and not np.isfinite(caught.value.value)
    assert all(np.array_equal(p.data, before[name]) for name, p in model.trainable_parameters().items())


# -- recomputation -----------------------------------------------------------------------------------------------------

TRAINED = [None, {"lora_dropout": 0.5}, {"use_dora": True}, {"target_modules": ["v_proj"]}]


@pytest.mark.parametrize("compute", [whole, loss_and_grad])
@pytest.mark.parametrize("settings", TRAINED, ids=str)
def test_recomputed_training_equals_training_with_saved_activations_bit_for_bit(tiny_config, settings, compute):
    for batch in BATCHES.values():
        results = []
        for recompute in (False, True):
            model = Llama(tiny_config, 0) if settings is None else adapted(Llama(tiny_config, 0), **settings)
            model.model.recompute = recompute
            results.append([gradients(model, batch, compute) for _ in range(2 if model.adapters else 1)])
        for saved, again in zip(*results, strict=True):
            assert_equal(again, saved)
            assert all(grad.any() for grad in again[1].values())  # every adapter, also above the frozen embedding


def test_recomputation_saves_one_input_per_block(tiny_config):
    sizes = []
    for recompute in (False, True):
        model = adapted(Llama(tiny_config, np.random.default_rng(0)))
        model.model.recompute = recompute
        tracemalloc.start()
        loss = model.loss(IDS, IDS)
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        del loss
    assert sizes[1] < sizes[0] / 3


def test_a_block_computes_no_gradient_that_nobody_needs(monkeypatch):
    monkeypatch.setattr(tensor, "OPS", {})
    needed = []

    @ml.op
    def product(x, w):
        return x * w, lambda g: needed.append("x") or g * w, lambda g: needed.append("w") or g * x

    x, w = np.ones(3), np.full(3, 2.0)
    for trained in ([], ["x"], ["w"], ["x", "w"]):
        inputs = [Tensor(x, requires_grad="x" in trained), Tensor(w, requires_grad="w" in trained)]
        y = recomputed(lambda x, w=inputs[1]: product(x, w), inputs[0])
        assert y.requires_grad == bool(trained) and np.array_equal(y.data, w)
        needed.clear()
        if trained:
            y.backward(np.ones(3))
        assert needed == trained and [t.grad is not None for t in inputs] == ["x" in trained, "w" in trained]
        with no_grad():
            assert not recomputed(lambda x: x * 2, inputs[0]).requires_grad

    alone = Tensor(w, requires_grad=True)
    recomputed(lambda x: alone, Tensor(x)).sum().backward()  # a block that is a parameter itself
    assert np.array_equal(alone.grad, np.ones(3))


def test_a_recomputed_function_may_use_leaves_from_outside_and_need_not_use_its_input():
    for used, expected in ((lambda h, x: h * x, 6), (lambda h, x: x * x, 6), (lambda h, x: h * h, 6)):
        x = Tensor([3.0], requires_grad=True)
        recomputed(lambda h, used=used, x=x: used(h, x), x).sum().backward()
        assert x.grad == expected
    x, k = Tensor([3.0], requires_grad=True), Tensor([5.0], requires_grad=True)
    recomputed(lambda h: k * k, x * 2).sum().backward()
    assert (x.grad, k.grad) == (0, 10)
    recomputed(lambda h: h, x * 2).sum().backward()
    assert x.grad == 2


def test_a_recomputed_function_that_uses_what_was_computed_before_is_refused(tiny_model):
    x = Tensor([2.0], requires_grad=True)
    for before, used in ((x * 2, lambda h, y: h * y), (x * 2, lambda h, y: y)):
        with pytest.raises(ValueError, match="a tensor that was computed before the block.*use its detach()"):
            recomputed(lambda h, used=used, y=before: used(h, y), before)
        alone = before.detach()
        recomputed(lambda h, y=alone: h * y, before).sum().backward()
    ids, embedded = np.array([[1, 2, 3]]), []
    tiny_model.model.embed_tokens.register_forward_hook(lambda layer, inputs, y: embedded.append(y))
    tiny_model.model.layers[1].register_forward_hook(lambda layer, inputs, y: y + embedded[-1])
    tiny_model.loss(ids, ids).backward()
    tiny_model.decoder.recompute = True
    with pytest.raises(ValueError, match="a hook in it"):
        tiny_model.loss(ids, ids)


@pytest.mark.parametrize("inside", ["layers.1", "layers.1.mlp", "layers.0.self_attn.o_proj"])
def test_a_tensor_that_a_hook_has_kept_has_its_whole_gradient_with_recomputation(tiny_model, inside):
    """Also before its block: such as the loss of an early exit, added to that of the last block."""
    model, found = adapted(as_float64(tiny_model)), []
    for recompute in (False, True):
        model.decoder.recompute, kept = recompute, []
        with model.model.get_submodule(inside).register_forward_hook(lambda layer, inputs, y, to=kept: to.append(y)):
            (model.loss(IDS, IDS) + (kept[0] * kept[0]).mean()).backward()
        found.append({name: p.grad for name, p in model.trainable_parameters().items()})
        for p in model.parameters():
            p.grad = None
    assert all(grad.any() for grad in found[0].values())
    for name, grad in found[1].items():
        np.testing.assert_allclose(grad, found[0][name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("dropout", "change"), [
    (0.5, lambda model: model.eval()), (0.0, lambda model: set_adapter(model, None)),
    (0.0, lambda model: set_adapter(model, "other")),
], ids=["no dropout", "no adapter", "another adapter"])  # fmt: skip
def test_a_block_that_changes_before_the_backward_pass_is_refused_where_its_gradient_would_be_wrong(
    tiny_model, dropout, change
):
    add_adapter(tiny_model, LoraConfig(r=2, lora_alpha=4), "other")
    adapted(tiny_model, lora_dropout=dropout).decoder.recompute = True
    losses = [tiny_model.loss(IDS, IDS) for _ in range(2)]
    losses[0].backward()
    change(tiny_model)
    with pytest.raises(RuntimeError, match=r"not the same .*: call backward\(\) before"):
        losses[1].backward()


def test_a_backward_pass_inside_no_grad_is_the_same_with_recomputation(tiny_config):
    found = []
    for recompute in (False, True):
        model = adapted(Llama(tiny_config, 0), lora_dropout=0.5)
        model.decoder.recompute = recompute
        loss = model.loss(IDS, IDS)
        with no_grad():
            loss.backward()
        assert is_recording()
        found.append({name: p.grad for name, p in model.trainable_parameters().items()})
    assert all(np.array_equal(found[0][name], grad) for name, grad in found[1].items())


def test_a_block_that_draws_more_numbers_in_the_backward_pass_is_refused(tiny_model):
    adapted(tiny_model, lora_dropout=0.5).eval()
    tiny_model.decoder.recompute = True
    loss = tiny_model.loss(IDS, IDS)
    tiny_model.train()
    with pytest.raises(RuntimeError, match="not the same"):
        loss.backward()


def test_random_numbers_of_a_function_inside_another_are_drawn_once():
    rng = np.random.default_rng(0)
    drawn = lambda x: x * float(remembered(lambda: int(rng.integers(2, 100))))
    x = Tensor(np.ones(3), requires_grad=True)
    y = recomputed(lambda x: drawn(recomputed(lambda x: drawn(drawn(x)), drawn(x))), x)
    y.sum().backward()
    assert np.array_equal(x.grad, y.data)  # the product of all four numbers
    assert remembered(lambda: 7) == 7


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_on_one_core_a_step_may_use_another_library_of_matmuls_as_each_of_several_threads_may(threads, monkeypatch):
    plain, found = Batch.loss, []
    monkeypatch.setattr(Batch, "loss", lambda *args: found.append(parallel.has_one_core.get()) or plain(*args))
    monkeypatch.setattr(parallel, "cores", lambda: threads)
    model = adapted(Llama(Config(64, 16, 24, 2, 4, 2), 0))
    gradients(model, (IDS, labelled(IDS)))
    assert found and all(found)

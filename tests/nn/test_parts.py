"""A batch computed in parts on several cores, and blocks computed again for backward, change no result."""

import threading
import time
import tracemalloc

import numpy as np
import pytest

from minilora.engine import parallel
from minilora.engine.attention import Packing
from minilora.engine.recompute import recomputed, remembered
from minilora.engine.tensor import Tensor, no_grad
from minilora.lora.adapters import add_adapter, mixed_batch
from minilora.lora.config import LoraConfig
from minilora.nn import llama
from minilora.nn.parts import divide

IDS = np.arange(8 * 40).reshape(8, 40) * 7 % 61
PACKED = Packing(6, (50, 130, 141, 230, 320))


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


def adapted(model, **settings):
    add_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings), "own", seed=1)
    return model.train()


def to_float64(model):
    for _, p in model.named_parameters():
        p.data = p.data.astype(np.float64)
    return model


def gradients(model, batch):
    for p in model.trainable_parameters().values():
        p.grad = None
    loss = model.loss(*batch)
    loss.backward()
    return loss.item(), {name: p.grad.copy() for name, p in model.trainable_parameters().items()}


@pytest.fixture
def threads(monkeypatch, request):
    monkeypatch.setattr(llama, "cores", lambda: request.param)
    return request.param


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_parts_hold_every_scored_label_once_and_every_row_whole(batch, threads):
    ids, labels, packing = batch
    parts = divide(ids, labels, packing, threads)
    assert sum(part.scored for part in parts) == (labels[:, 1:] != -100).sum()
    if packing is None:
        assert np.array_equal(np.concatenate([part.input_ids for part in parts]), ids)
        return
    own = [ids[0, slice(*span)].tolist() for span in packing.own_spans()]
    found = [part.input_ids[0, slice(*span)].tolist() for part in parts for span in part.packing.own_spans()]
    assert sorted(found) == sorted(own)
    assert all(np.array_equal(part.input_ids[0, : packing.prefix], ids[0, : packing.prefix]) for part in parts)


def test_packed_sequences_are_shared_out_evenly():
    parts = divide(*BATCHES["packed"], threads=2)
    lengths = [part.input_ids.size for part in parts]
    assert len(lengths) == 2 and max(lengths) - min(lengths) < 30


def test_a_part_without_a_label_is_left_out_and_a_small_batch_is_one_part():
    labels = labelled(IDS)
    labels[:4] = -100
    assert len(divide(IDS, labels, None, threads=2)) == 1
    assert len(divide(IDS[:2], labelled(IDS[:2]), None, threads=2)) == 1


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_parts_give_the_loss_and_the_gradients_of_the_whole(tiny_model, batch, full, threads):
    model = to_float64(tiny_model if full else adapted(tiny_model))
    loss, found = gradients(model, batch)
    model.divides = False
    expected_loss, expected = gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, grad in expected.items():
        np.testing.assert_allclose(found[name], grad, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("threads", [2, 3], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.5}, {"use_dora": True}])
def test_the_same_batch_gives_the_same_bits(tiny_config, threads, settings):
    results = []
    for _ in range(3):
        model = adapted(llama.Llama(tiny_config, np.random.default_rng(0)), **settings)
        results.append(gradients(model, BATCHES["rows"]))
    for loss, grads in results[1:]:
        assert loss == results[0][0]
        assert all(np.array_equal(grad, results[0][1][name]) for name, grad in grads.items())


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_gradients_of_two_batches_add_up_and_follow_a_factor(tiny_model, threads):
    model = to_float64(adapted(tiny_model))
    _, once = gradients(model, BATCHES["rows"])
    (model.loss(*BATCHES["rows"]) * 3).backward()
    for name, p in model.trainable_parameters().items():
        np.testing.assert_allclose(p.grad, 4 * once[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_without_recording_parts_build_no_graph(tiny_model, threads):
    with no_grad():
        assert not adapted(tiny_model).loss(*BATCHES["rows"]).requires_grad


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_a_mixed_batch_keeps_its_rows_together(tiny_model, threads):
    model = to_float64(adapted(tiny_model))
    ids, labels, _ = BATCHES["rows"]
    with no_grad(), mixed_batch(model, ["own", None] * 4):
        together = model.loss(ids, labels).item()
    assert model.divides
    with no_grad():
        apart = []
        for row in range(8):
            with mixed_batch(model, [["own", None][row % 2]]):
                apart.append(model.loss(ids[row : row + 1], labels[row : row + 1]).item())
    assert together == pytest.approx(np.mean(apart), rel=1e-12)


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_only_the_parts_at_work_hold_activations(tiny_config, threads):
    model = adapted(llama.Llama(tiny_config, np.random.default_rng(0)))
    ids = np.tile(IDS, (8, 1))

    def peak():
        tracemalloc.start()
        loss = model.loss(ids, ids)
        loss.backward()
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak()  # what is imported at the first step counts for neither
    apart = peak()  # two parts of ten at a time, and the gradients of a thread that is ahead of the other
    model.divides = False
    assert apart < peak() / 2


def test_an_error_in_one_part_is_the_error_of_the_whole():
    def fails():
        raise ValueError("broken part")

    with pytest.raises(ValueError, match="broken part"):
        parallel.weighted_sum([lambda: Tensor(1.0), fails], [0.5, 0.5], threads=2)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_gradients_are_added_in_the_order_of_the_threads_not_of_arrival(late):
    x = Tensor(np.array([1.0]), requires_grad=True)
    others_are_done = threading.Barrier(3)
    factors = [1e16, 1.0, -1e16]  # their sum depends on the order: (1e16 + 1) - 1e16 is 0, (1e16 - 1e16) + 1 is 1

    def part(i):
        y = (x * factors[i]).sum()
        others_are_done.wait(10)
        if i == late:
            time.sleep(0.05)
        return y

    parallel.weighted_sum([lambda i=i: part(i) for i in range(3)], [1.0] * 3, threads=3).backward()
    assert x.grad[0] == (1e16 + 1.0) - 1e16


def test_cores_follow_the_matrix_librarys_own_setting():
    with parallel._controller().limit(limits=1, user_api="blas"):
        assert parallel.cores() == 1


# -- recomputation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.5}, {"use_dora": True}, {"target_modules": ["v_proj"]},
                                      {"target_modules": ["embed_tokens", "q_proj"]}])  # fmt: skip
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_recomputed_training_equals_stored_training_bit_for_bit(tiny_config, batch, settings, divides):
    results = []
    for recompute in (False, True):
        model = adapted(llama.Llama(tiny_config, np.random.default_rng(0)), **settings)
        model.model.recompute, model.divides = recompute, divides
        results.append([gradients(model, batch) for _ in range(2)])
    for (loss, grads), (other_loss, other) in zip(*results, strict=True):
        assert loss == other_loss
        assert all(np.array_equal(grad, other[name]) for name, grad in grads.items())
        assert all(grad.any() for grad in grads.values())  # every adapter moves, also under the frozen embedding


def test_recomputed_full_fine_tuning_equals_the_stored_way(tiny_config):
    found = []
    for recompute in (False, True):
        model = llama.Llama(tiny_config, np.random.default_rng(0))
        model.model.recompute = recompute
        found.append(gradients(model, BATCHES["rows"])[1])
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_recomputation_keeps_one_input_per_block(tiny_config):
    sizes = []
    for recompute in (False, True):
        model = adapted(llama.Llama(tiny_config, np.random.default_rng(0)))
        model.model.recompute, model.divides = recompute, False
        tracemalloc.start()
        loss = model.loss(IDS, IDS)
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        del loss
    assert sizes[1] < sizes[0] / 3


def test_a_block_with_nothing_to_train_records_nothing():
    y = recomputed(lambda x: x * 2, Tensor(np.ones(3)))
    assert not y.requires_grad and np.array_equal(y.data, np.full(3, 2.0))


def test_random_numbers_are_drawn_once_per_block():
    rng, seen = np.random.default_rng(0), []

    def noisy(x):
        seen.append(remembered(lambda: int(rng.integers(100))))
        return x * float(seen[-1])

    x = Tensor(np.ones(3), requires_grad=True)
    recomputed(noisy, x).sum().backward()
    assert seen[0] == seen[1] and np.array_equal(x.grad, np.full(3, float(seen[0])))
    assert remembered(lambda: 7) == 7

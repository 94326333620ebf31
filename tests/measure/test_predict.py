"""Memory: predicted from shapes, and read off the graph, byte by byte."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from smallmodels import SWITCHES, VARIANTS

from minilora.engine import ops
from minilora.engine.attention import Packing
from minilora.engine.fused import NOT_SCORED
from minilora.engine.tensor import Tensor
from minilora.files.quant import Packed, quantize
from minilora.lora.adapters import add_adapter, disable_adapter, set_adapter
from minilora.lora.config import LoraConfig
from minilora.measure import predict
from minilora.measure.bench import SMOLLM2
from minilora.measure.blocks import names_of
from minilora.measure.counts import count_parameters
from minilora.measure.ledger import kept_arrays, ledger, peak
from minilora.measure.predict import Memory, Step, alive_at_once, base_parameters, predict_memory
from minilora.nn import families
from minilora.nn.gemma3 import Gemma3, Gemma3Config
from minilora.nn.gpt2 import GPT2, GPT2Config
from minilora.nn.llama import Config, Llama
from minilora.nn.optim import AdamW
from minilora.nn.parts import Batch, micro_batches
from minilora.nn.step import loss_and_grad

MEDIUM = Config(
    vocab_size=1024,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
RANK, NAMES = 3, names_of(MEDIUM)
TARGETS = {
    "full": None,
    "all-linear": list(NAMES),
    "q+v": ["q_proj", "v_proj"],
    "v": ["v_proj"],
    "o+down": ["o_proj", "down_proj"],
    "gate": ["gate_proj"],
}
EVERY = [pytest.param(targets, False, id=name) for name, targets in TARGETS.items()]
EVERY += [pytest.param(TARGETS[name], True, id=f"{name}, A frozen") for name in ("all-linear", "q+v", "o+down")]


def trainable(config, targets, recompute=False, rng=None, freeze_A=False, layers=None):
    """A model ready to be trained; `targets` is None for all of its weights, `layers` for all blocks."""
    model = Llama(config, rng or np.random.default_rng(0))
    model.model.recompute = recompute
    if targets is not None:
        settings = {"target_modules": targets, "freeze_A": freeze_A, "layers_to_transform": layers}
        add_adapter(model, LoraConfig(r=RANK, lora_alpha=RANK, **settings))
    return model


def predicted(config, targets, *tokens_and_scored, **settings):
    adapter = {} if targets is None else {"rank": RANK, "targets": targets}
    return predict_memory(Step(config, *tokens_and_scored, **adapter, **settings))


def ids_of(rng, *shape):
    return rng.integers(0, 64, shape)


# -- what shapes tell --------------------------------------------------------------------------------------------------


def test_the_formula_for_the_base_gives_smollm2s_number():
    assert base_parameters(SMOLLM2) == 134_515_008
    memory, count = predict_memory(Step(SMOLLM2, 1, 1, rank=8)), 2_442_240
    assert memory.weights == 4 * 134_515_008
    assert (memory.adapter, memory.gradients, memory.moments) == (4 * count, 4 * count, 8 * count)


def test_the_total_is_the_sum_of_the_owners_and_activations_that_of_the_operations():
    memory = predict_memory(Step(SMOLLM2, 256, 250, rank=8, program=1000))
    assert memory.total == sum(memory.by_owner().values()) and memory.by_owner()["program"] == 1000
    assert memory.activations == sum(memory.by_operation.values()) > 0


def test_activations_grow_linearly_with_tokens_and_nothing_but_scratch_grows_beside_them():
    memory = [predict_memory(Step(SMOLLM2, n, n, rank=8)) for n in (1000, 2000, 3000)]
    steps = np.diff([m.activations for m in memory])
    assert steps[0] == steps[1] == memory[0].activations > 0
    assert len({m.total - m.activations - m.scratch for m in memory}) == 1


def test_logits_are_scratch_of_one_block_of_tokens():
    block, many = (predict_memory(Step(SMOLLM2, 256, n, rank=8)).scratch for n in (256, 400))
    words, width = 2048, SMOLLM2.hidden_size
    assert many - block == 4 * 2 * (400 - 256) * width  # x and the rows of the answers, no more logits
    assert block == 4 * 2 * 256 * (words + width)


@pytest.mark.parametrize("known", [{"rank": 8}, {"rank": 8, "recompute": True}, {"rank": 8, "unpacks": True}])
def test_threads_have_scratch_of_their_own_each_for_its_own_tokens(known):
    one = predict_memory(Step(SMOLLM2, 300, 290, **known))
    two = predict_memory(Step(SMOLLM2, 600, 580, threads=2, **known))
    assert two.scratch == 2 * one.scratch and two.activations == pytest.approx(2 * one.activations, rel=1e-3)


def test_what_nothing_is_said_of_holds_nothing():
    assert Memory(7).by_owner() == {"weights": 7} and Memory(7).total == 7
    assert repr(Memory(4_200_000, adapter=100_000)) == "<Memory: 4.3 MB: weights 4.2, adapter 0.1>"


def test_the_peak_of_full_fine_tuning_is_one_end_of_the_way_back_or_after_a_first_round_both():
    short, long = predict_memory(Step(SMOLLM2, 8, 7)), predict_memory(Step(SMOLLM2, 4096, 4095))
    again = predict_memory(Step(SMOLLM2, 8, 7, rounds=2))
    assert short.activations == 0 and short.gradients == short.weights
    assert long.activations > 0 and long.gradients == 4 * SMOLLM2.vocab_size * SMOLLM2.hidden_size  # of the head
    assert long.scratch == 4 * 2 * 4095 * (2048 + SMOLLM2.hidden_size)  # its gradient takes all tokens at a time
    assert again.activations > 0 and again.gradients == again.weights
    both = predict_memory(Step(SMOLLM2, 2 * 4096, 2 * 4095, threads=2))  # each thread has the head's gradient
    assert both.scratch == 2 * long.scratch + long.gradients


def test_recomputation_trades_activations_for_one_block_of_scratch():
    kept, again = (predict_memory(Step(SMOLLM2, 512, 508, rank=8, recompute=on)) for on in (False, True))
    assert again.activations < kept.activations / 9
    assert kept.scratch < again.scratch < kept.scratch + kept.activations / 20
    assert again.total - again.activations - again.scratch == kept.total - kept.activations - kept.scratch


def test_scratch_of_recomputation_is_that_of_the_block_at_which_most_is_held():
    steps = (Step(SMOLLM2, 512, 8, rank=200, layers={i}, recompute=True) for i in (0, 28, 29))
    first, second, last = (predict_memory(step).scratch for step in steps)
    assert first < second < last  # the later blocks have freed their inputs


PIECE = 4 * 131072  # bytes of the values that are dequantised at a time
PACKED = {"base_bytes": 96_576_768, "unpacks": True}


def test_a_packed_base_takes_what_it_is_told_and_scratch_for_unpacking():
    dense, packed = (predict_memory(Step(SMOLLM2, 256, 256, rank=8, **known)) for known in ({}, PACKED))
    assert packed.weights == 96_576_768
    logits = 4 * 256 * 2048  # two blocks of the head exist with one block of logits, or one with two
    assert packed.scratch - dense.scratch == 4 * 2 * 2048 * SMOLLM2.hidden_size - logits + PIECE
    assert packed.activations == dense.activations


def test_over_a_packed_base_a_block_unpacks_a_matrix_before_the_gradients_of_its_activation_exist():
    F, C = SMOLLM2.intermediate_size, SMOLLM2.hidden_size
    for tokens, more in ((4096, 0), (64, 4 * F * (C - 2 * 64) + PIECE)):  # few are scored: a block has the most scratch
        long = Step(replace(SMOLLM2, vocab_size=64), tokens, 8, rank=8)
        dense, packed = (predict_memory(replace(long, **known)) for known in ({}, PACKED))
        assert packed.scratch - dense.scratch == more


def test_weights_in_bfloat16_that_are_multiplied_as_they_are_need_no_room_to_be_unpacked():
    half = 2 * base_parameters(SMOLLM2)
    for step in (Step(SMOLLM2, 256, 256, rank=8), Step(SMOLLM2, 64, 8, rank=8)):
        as_stored, widened = (predict_memory(replace(step, base_bytes=half, unpacks=on)) for on in (False, True))
        assert as_stored.scratch == predict_memory(step).scratch < widened.scratch
        in_blocks = predict_memory(replace(step, base_bytes=half // 2 + 1, unpacks=True))  # 8 bits and a scale, as Q8_0
        assert in_blocks.scratch == widened.scratch + PIECE  # 16 bits are widened whole


# -- how much of a batch is alive --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "threads", "alive"),
    [
        ((4, 128), 1, dict(tokens=256, scored=254, rows=2, threads=1, rounds=2)),
        ((4, 128), 2, dict(tokens=512, scored=508, rows=2, threads=2, rounds=1)),
        ((4, 128), 8, dict(tokens=512, scored=508, rows=1, threads=4, rounds=1)),
        ((1, 512), 2, dict(tokens=512, scored=511, rows=1, threads=1, rounds=1)),  # a row stays whole
        ((2, 20), 2, dict(tokens=40, scored=38, rows=2, threads=1, rounds=1)),
    ],
    ids=str,
)
def test_what_is_alive_at_once_are_as_many_micro_batches_as_threads(rng, shape, threads, alive):
    ids = ids_of(rng, *shape)
    step = Step.of(MEDIUM, Batch(ids, ids), threads)
    assert {name: getattr(step, name) for name in alive} == alive


def test_of_a_packed_row_the_largest_are_alive_each_with_the_common_beginning(rng):
    packing = Packing(10, (210, 290, 350, 510))  # own tokens: 200, 80, 60, 160
    ids = ids_of(rng, 1, 510)
    labels = ids.copy()
    labels[:, [*range(11), 210, 290, 350]] = NOT_SCORED
    batch = Batch(ids, labels, packing)
    largest, rounds = alive_at_once(micro_batches(batch, 1), threads=1)
    assert rounds == 2 and [each.input_ids.size for each in largest] == [270]  # 200 + 60, the others 160 + 80
    assert Step.of(MEDIUM, batch, threads=1).tokens == 270


def test_a_last_round_that_is_not_full_is_a_round_all_the_same(rng):
    three = [Batch(ids, ids) for ids in (ids_of(rng, 1, 9), ids_of(rng, 1, 7), ids_of(rng, 1, 8))]
    largest, rounds = alive_at_once(three, threads=2)
    assert [each.input_ids.size for each in largest] == [9, 8] and rounds == 2


def test_without_a_number_there_are_as_many_threads_as_cores(rng, monkeypatch):
    ids = ids_of(rng, 8, 128)
    monkeypatch.setattr(predict, "cores", lambda: 4)
    assert len(alive_at_once([Batch(ids, ids)] * 9)[0]) == 4
    assert Step.of(MEDIUM, Batch(ids, ids)) == Step.of(MEDIUM, Batch(ids, ids), threads=4)


# -- the description of a step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("targets", "freeze_A"), EVERY)
def test_a_model_tells_its_adapter_its_base_and_whether_it_recomputes(tiny_config, rng, targets, freeze_A):
    model, ids = trainable(tiny_config, targets, recompute=True, freeze_A=freeze_A), ids_of(rng, 2, 70)
    base_bytes = 4 * base_parameters(tiny_config)
    adapter = {} if targets is None else {"rank": RANK, "targets": tuple(name for name in NAMES if name in targets)}
    adapter["freeze_A"] = freeze_A
    told = Step(tiny_config, 140, 138, rows=1, threads=2, base_bytes=base_bytes, recompute=True, **adapter)
    assert Step.of(model, Batch(ids, ids), threads=2) == told
    known = Step.of(model, Batch(ids, ids), threads=2, program=7, recompute=False)
    assert known == replace(told, program=7, recompute=False)


def test_without_a_sample_and_with_an_adapter_nowhere_there_is_no_step(tiny_model, tiny_config):
    with pytest.raises(ValueError, match=r"nothing is predicted for 'lm_head'; known: all-linear, q_proj, "):
        Step(MEDIUM, 1, 1, rank=RANK, targets=["q_proj", "lm_head"])
    for model in (tiny_model, tiny_config):
        with pytest.raises(ValueError, match="^expected at least one sample, got none$"):
            Step.of(model, [])
        with pytest.raises(TypeError, match="expected a list of samples, got a ndarray"):
            Step.of(model, np.ones((2, 3), int))


def test_of_an_adapter_that_differs_between_modules_each_has_its_own_parameters(rng):
    model, batch = Llama(MEDIUM, rng), Batch(ids := ids_of(rng, 1, 40), ids)
    add_adapter(model, LoraConfig(r=RANK, lora_alpha=RANK, rank_pattern={"layers.2.self_attn.q_proj": 50}))
    step, count = Step.of(model, batch), count_parameters(model).trainable
    assert step.rank is None and not step.is_full and step.trained_parameters == step.adapter_parameters == count
    assert (step.adapted(2)["q_proj"].rank, step.adapted(1)["q_proj"].rank) == (50, RANK)
    assert replace(step, modules=None, rank=RANK).trained_parameters < count < base_parameters(MEDIUM)
    assert predict_memory(replace(step, modules=None)) == predict_memory(Step.of(Llama(MEDIUM, rng), batch))
    for given in ({"rank": 8}, {"layers": [1]}, {"freeze_A": True}):
        with pytest.raises(ValueError, match=f"^{next(iter(given))} describes equal adapters .*: add modules=None$"):
            Step.of(model, batch, **given)


@pytest.mark.parametrize("off", [disable_adapter, lambda model: set_adapter(model, None)], ids=["off", "none chosen"])
def test_without_an_active_adapter_nothing_is_trained(rng, off):
    model, ids = trainable(MEDIUM, NAMES), ids_of(rng, 1, 40)
    off(model)
    told = predict_memory(Step.of(model, Batch(ids, ids)))
    assert told.gradients == told.moments == 0 and told.adapter == ledger(model).adapter > 0


# -- what the graph holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("targets", "freeze_A"), EVERY)
def test_the_graph_holds_what_was_predicted_operation_by_operation_to_the_byte(
    tiny_config, rng, targets, freeze_A, recompute
):
    config = replace(tiny_config, head_dim=6, tie_word_embeddings=targets is None)
    model = trainable(config, targets, recompute, freeze_A=freeze_A)
    ids = ids_of(rng, 2, 70)  # more than one window of attention
    held = ledger(model, AdamW(model.trainable_parameters()), model.loss(ids, ids))
    told = predicted(config, targets, 140, 138, rows=2, recompute=recompute, rounds=2, freeze_A=freeze_A)
    assert held.by_operation == told.by_operation
    for owner in ("weights", "adapter", "moments", "activations"):
        assert getattr(held, owner) == getattr(told, owner)
    assert held.gradients == held.scratch == held.program == 0


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layers", [[2, 3], [0, 3], [1, 3]], ids=str)
@pytest.mark.parametrize("targets", [TARGETS["all-linear"], TARGETS["o+down"]], ids=["all-linear", "o+down"])
def test_of_an_adapter_in_some_blocks_nothing_is_held_before_the_first_one(rng, targets, layers, recompute):
    model, ids = trainable(MEDIUM, targets, recompute, layers=layers), ids_of(rng, 2, 70)
    held = ledger(model, AdamW(model.trainable_parameters()), model.loss(ids, ids))
    step = Step.of(model, Batch(ids, ids), threads=1)
    assert (step.layers, step.tokens) == (set(layers), 140)
    told = predict_memory(replace(step, rows=2))
    assert held.by_operation == told.by_operation
    assert (held.adapter, held.moments) == (told.adapter, told.moments)
    everywhere = replace(step, layers=None)
    assert predict_memory(replace(step, rank=None)) == predict_memory(replace(everywhere, rank=None))
    assert told.scratch == predict_memory(replace(everywhere, rows=2)).scratch  # of the last block


FAMILIES = {
    "gpt2": (GPT2, GPT2Config(64, 12, 2, 3, 20)),
    "gemma3_text": (Gemma3, Gemma3Config(64, 12, 20, 3, 4, 2, 6, sliding_window=8)),
} | {name: (Llama, replace(MEDIUM, num_hidden_layers=3, **switches)) for name, switches in SWITCHES.items()}


def test_every_family_is_tried():
    assert FAMILIES.keys() == families.FAMILIES.keys()


ADAPTERS = {
    "plain": {},
    "rank_pattern": {"rank_pattern": {"q_proj": 20, "layers.1.mlp.down_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 20}},
    "freeze_A": {"freeze_A": True},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA with dropout": {"init_lora_weights": "pissa", "lora_dropout": 0.2},
    "PiSSA with dropout, freeze_A": {"init_lora_weights": "pissa", "lora_dropout": 0.2, "freeze_A": True},
    "layers_to_transform": {"layers_to_transform": [1, 2]},
    "a name by its path": {"target_modules": ["layers.1.self_attn.o_proj", "layers.3.mlp.gate_proj"]},
    "DoRA": {"use_dora": True},
    "DoRA in some modules": {"use_dora": True, "target_modules": ["v_proj", "o_proj"], "layers_to_transform": [0, 2]},
    "DoRA, freeze_A": {"use_dora": True, "freeze_A": True},
    "DoRA with dropout": {"use_dora": True, "lora_dropout": 0.2},
    "DoRA from PiSSA": {"use_dora": True, "init_lora_weights": "pissa"},
}
ADAPTERS |= {name: settings for name, settings in VARIANTS.items() if settings not in ADAPTERS.values()}
LONG = pytest.mark.long
SECOND = {
    "none": None,
    "another one": {"r": 30, "freeze_A": True},
    "a larger one in others": {"r": 40, "target_modules": ["k_proj"]},
}
QUICK = {  # adapters that are tried with each second one, and whose peak is measured
    "DoRA with dropout",
    "PiSSA with dropout, freeze_A",
    "a name by its path",
    "plain",
}


def quickly(*quick, **cases):
    """Parameters of these names and values, of which those that are not among `quick` are long."""
    return [pytest.param(value, id=name, marks=() if name in quick else LONG) for name, value in cases.items()]


@pytest.mark.parametrize("recompute", quickly("kept", kept=False, recomputed=True))
@pytest.mark.parametrize(
    ("settings", "second"),
    [
        pytest.param(settings, second, id=f"{name}-{other}", marks=() if name in QUICK or second is None else LONG)
        for name, settings in ADAPTERS.items()
        for other, second in SECOND.items()
    ],
)
def test_of_every_adapter_parameters_and_the_graph_hold_what_was_predicted(rng, settings, second, recompute):
    model, ids = Llama(MEDIUM, rng), ids_of(rng, 2, 70)
    model.decoder.recompute = recompute
    if second is not None:
        add_adapter(model, LoraConfig(lora_alpha=8, **second), name="inactive")
    add_adapter(model, LoraConfig(**{"r": RANK, "lora_alpha": 8, "target_modules": "all-linear"} | settings))
    loss = model.loss(ids, ids)
    held = ledger(model, AdamW(model.trainable_parameters()), loss)
    step = replace(Step.of(model, Batch(ids, ids), threads=1), rows=2)
    told = predict_memory(step)
    for owner in ("weights", "adapter", "moments", "activations"):
        assert getattr(held, owner) == getattr(told, owner)
    if "linear" not in told.by_operation:  # what is composed of several operations stands under one of them
        assert held.by_operation == told.by_operation
    loss.backward()
    assert ledger(model).gradients == told.gradients
    assert step.trained_parameters == count_parameters(model).trainable


@pytest.mark.parametrize(
    ("use_dora", "recompute"),
    [(False, False), (True, True), pytest.param(False, True, marks=LONG), pytest.param(True, False, marks=LONG)],
)
@pytest.mark.parametrize(("family", "config"), FAMILIES.values(), ids=FAMILIES)
def test_other_families_hold_what_was_predicted_to_the_byte(rng, family, config, use_dora, recompute):
    names = names_of(config)
    some = [*names[:2], names[-2]], [names[len(names) // 2]], names[-1:]
    for targets in ("all-linear", *some, *([] if use_dora else [None])):
        model, ids = family(config, 0), ids_of(rng, 2, 70)
        model.decoder.recompute = recompute
        if targets is not None:
            add_adapter(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, use_dora=use_dora))
        held = ledger(model, AdamW(model.trainable_parameters()), model.loss(ids, ids))
        step = Step.of(model, Batch(ids, ids), threads=1)
        assert step.modules is None  # rank, targets and use_dora say the same
        told = predict_memory(replace(step, rounds=2))
        assert held.by_operation == told.by_operation
        for owner in ("weights", "adapter", "moments", "activations"):
            assert getattr(held, owner) == getattr(told, owner)
        assert base_parameters(config) == count_parameters(family.empty(config)).total


@pytest.mark.parametrize("targets", [["attn.c_proj"], ["mlp.c_proj"], ["c_fc"]], ids=str)
def test_modules_of_gpt2_with_the_same_name_are_told_apart(rng, targets):
    model, ids = GPT2(FAMILIES["gpt2"][1], 0), ids_of(rng, 2, 16)
    add_adapter(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    held = ledger(model, AdamW(model.trainable_parameters()), model.loss(ids, ids))
    told = predict_memory(replace(Step.of(model, Batch(ids, ids), threads=1), rounds=2))
    assert (held.by_operation, held.adapter, held.moments) == (told.by_operation, told.adapter, told.moments)


def test_a_packed_row_with_unscored_tokens_holds_what_was_predicted(tiny_config, rng):
    model, ids = trainable(tiny_config, TARGETS["all-linear"]), ids_of(rng, 1, 90)
    labels = ids.copy()
    labels[:, :30] = NOT_SCORED
    labels[:, [40, 65]] = NOT_SCORED
    held = ledger(model, None, model.loss(ids, labels, Packing(15, (40, 65, 90))))
    assert held.by_operation == predicted(tiny_config, TARGETS["all-linear"], 90, 58).by_operation


def test_a_packed_base_is_counted_with_its_bytes_and_keeps_no_more_for_backward(tiny_config, rng):
    config = replace(tiny_config, intermediate_size=64)
    model, ids = Llama(config, rng), ids_of(rng, 1, 40)
    state = {n: Packed(quantize(w, "Q8_0"), "Q8_0") if w.ndim == 2 else w for n, w in model.state_dict().items()}
    model.load_state_dict(state)
    add_adapter(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    held = ledger(model, None, model.loss(ids, ids))
    step = Step.of(model, Batch(ids, ids))
    assert (step.base_bytes, step.unpacks) == (held.weights, True)
    assert held.weights == sum(w.nbytes for w in state.values()) < 4 * base_parameters(config) / 3
    assert held.by_operation == predicted(config, list(NAMES), 40, 39).by_operation


def test_after_a_step_back_gradients_are_held_and_activations_no_more(tiny_config, rng):
    ids = ids_of(rng, 8, 64)
    assert Step.of(tiny_config, Batch(ids, ids), threads=1).rounds == 2
    whole, divided = (trainable(tiny_config, TARGETS["all-linear"]) for _ in range(2))
    (loss := whole.loss(ids, ids)).backward()
    for model, end in ((whole, loss), (divided, loss_and_grad(divided, ids, ids))):
        held = ledger(model, None, end)
        assert held.gradients == held.adapter == 4 * count_parameters(model).trainable
        assert held.activations == held.moments == 0


def test_an_array_seen_through_several_views_is_counted_once(tiny_model):
    x = np.ones((50, 40), np.float32)
    loss = ops.sum(ops.mul(Tensor(x[:10], requires_grad=True), Tensor(x.T[:, :10].T, requires_grad=True)))
    arrays = [array for name, array in kept_arrays(loss.node) if name == "mul"]
    assert len(arrays) == 2 and ledger(tiny_model, None, loss).by_operation == {"mul": x.nbytes}


# -- the peak ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True])
def test_the_peak_of_a_function_is_its_own_whatever_was_held_before(traced):
    if traced:
        tracemalloc.start()
    try:
        np.ones(3_000_000).sum()  # more than the function holds, and gone
        held = np.ones(1_500_000)  # still there
        assert 8_000_000 <= peak(lambda: np.ones(1_000_000).sum()) < 8_100_000 < held.nbytes
        assert tracemalloc.is_tracing() is traced
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("full", False), ("all-linear", False), ("q+v", True)]
    + [pytest.param(*each, marks=LONG) for each in (("full", True), ("all-linear", True), ("q+v", False))],
)
def test_the_peak_of_a_step_is_within_a_tenth_of_the_prediction(rng, name, recompute):
    model, ids = trainable(MEDIUM, TARGETS[name], recompute), ids_of(rng, 1, 512)
    optimizer = AdamW(model.trainable_parameters())

    def step():
        model.loss(ids, ids).backward()
        optimizer.step()

    told = predicted(MEDIUM, TARGETS[name], 512, 511, recompute=recompute)
    assert peak(step) == pytest.approx(told.gradients + told.activations + told.scratch, rel=0.1)


@pytest.mark.parametrize("base", ["float32", pytest.param("Q8_0", marks=LONG), pytest.param("recomputed", marks=LONG)])
@pytest.mark.parametrize("settings", quickly(*QUICK, **ADAPTERS))
def test_so_is_the_peak_with_every_adapter(rng, settings, base):
    model, ids = Llama(replace(MEDIUM, vocab_size=4096 if base == "Q8_0" else 1024), rng), ids_of(rng, 1, 512)
    model.decoder.recompute = base == "recomputed"
    if base == "Q8_0":
        state = model.state_dict().items()
        model.load_state_dict({n: Packed(quantize(w, base), base) if w.ndim == 2 else w for n, w in state})
    add_adapter(model, LoraConfig(**{"r": RANK, "lora_alpha": 8, "target_modules": "all-linear"} | settings))
    told = predict_memory(Step.of(model, Batch(ids, ids), threads=1))
    assert peak(lambda: model.loss(ids, ids).backward()) == pytest.approx(
        told.gradients + told.activations + told.scratch, rel=0.1
    )

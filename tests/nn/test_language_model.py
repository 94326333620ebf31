"""Every family in small: cache, padding, packing, gradients, checkpointing, micro-batches, adapters."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smallmodels import SMALL, SWITCHES, in_float64

from minilora.engine.attention import Packing
from minilora.engine.tensor import Tensor, no_grad
from minilora.lora.adapters import add_adapter, merge_adapter, merged_state, unmerge_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.peft import save_adapter
from minilora.measure.counts import count_parameters
from minilora.measure.ledger import peak
from minilora.nn.gemma3 import FULL, SLIDING, Gemma3, Gemma3Config
from minilora.nn.gpt2 import GPT2, GPT2Config
from minilora.nn.layers import Linear
from minilora.nn.llama import Config, Llama
from minilora.nn.step import loss_and_grad

V = 11
FAMILIES = {
    "llama, untied": (Llama, replace(SMALL, tie_word_embeddings=False)),
    **{name: (Llama, replace(SMALL, model_type=name, **switches)) for name, switches in SWITCHES.items()},
    "gpt2": (GPT2, GPT2Config(V, 6, 2, 2, max_position_embeddings=16)),
    "gpt2, untied": (GPT2, GPT2Config(V, 6, 1, 3, 5, max_position_embeddings=16, tie_word_embeddings=False)),
    "gemma3": (Gemma3, Gemma3Config(V, 6, 5, 2, 2, 1, 4, 16, sliding_window=3, layer_types=(SLIDING, FULL))),
}


def made(family, config):
    """The same small model in float64 every time, whose every part shows."""
    model, rng = in_float64(family(config, 0)), np.random.default_rng(1)
    for _, p in model.named_parameters():
        p.data += 0.3 * rng.standard_normal(p.shape) * (p.ndim == 1)
    return model


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def new(request):
    """A function that makes the model of a family."""
    return lambda: made(*request.param)


@pytest.mark.parametrize("steps", [[4, 1, 2], [1] * 7, [7]], ids=str)
def test_token_by_token_with_a_cache_equals_all_tokens_at_once(new, ids, steps):
    model = new()
    cache, ends = model.new_cache(2, capacity=7), np.cumsum(steps)
    with no_grad():
        parts = [model(ids[:, end - n : end], cache).data for n, end in zip(steps, ends, strict=True)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), model(ids).data, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trained", ["q", "k", "v"])
def test_logits_that_were_computed_with_a_cache_refuse_a_backward_pass(tiny_model, trained, ids):
    """Of keys and values there are only arrays in a cache: what lies before them would get no gradient, or a part."""
    tiny_model.requires_grad_(False).get_submodule(f"model.layers.0.self_attn.{trained}_proj").requires_grad_()
    cache = tiny_model.new_cache(2, capacity=7)
    for part in (ids[:, :4], ids[:, 4:]):
        with pytest.raises(ValueError, match="over a KV cache has no gradient"):
            tiny_model(part, cache).sum().backward()


def test_the_decoder_alone_takes_the_lists_that_the_model_takes_and_refuses_ids_that_are_no_tokens(new, ids):
    decoder = new().decoder
    np.testing.assert_array_equal(decoder(ids.tolist()).data, decoder(ids).data)
    for bad in (-1, V):
        with pytest.raises(ValueError, match=rf"^ids must lie in 0\.\.{V - 1}, got {min(bad, 1)}\.\.{max(bad, 1)}$"):
            decoder([[1, bad]])


def test_a_batch_padded_on_the_left_equals_its_rows_alone(new, ids):
    model, first = new(), np.array([0, 3])
    cache = model.new_cache(2, capacity=8, first=first)
    with no_grad():
        prompt, step = model(ids, cache).data, model(np.array([[1], [2]]), cache).data
        for row, pad in enumerate(first):
            alone = model(np.r_[ids[row, pad:], row + 1][None]).data[0]
            np.testing.assert_allclose(prompt[row, pad:], alone[:-1], rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(step[row, 0], alone[-1], rtol=1e-10, atol=1e-10)


@given(st.sampled_from([*FAMILIES]), st.integers(0, 3),
       st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=4))  # fmt: skip
@settings(max_examples=40)
def test_packed_sequences_have_the_losses_and_gradients_of_separate_rows(name, prefix, scored):
    """scored: for each sequence, which of its own tokens are scored; of each the first is not, and one at least is."""
    family, config = FAMILIES[name]
    model, again = (made(family, replace(config, max_position_embeddings=64)) for _ in range(2))
    shared = np.arange(prefix) * 5 % V
    rests = [(np.arange(len(flags) + 2) * (i + 3)) % V for i, flags in enumerate(scored)]
    each = [np.where([False, *flags, True], rest, -100) for rest, flags in zip(rests, scored, strict=True)]
    packing = Packing(prefix, tuple(int(prefix + n) for n in np.cumsum([len(rest) for rest in rests])))
    row, labels = (
        np.concatenate([start, *parts])[None] for start, parts in ((shared, rests), (shared * 0 - 100, each))
    )
    alone = []
    for rest, own in zip(rests, each, strict=True):
        loss = model.loss(np.r_[shared, rest][None], np.r_[shared * 0 - 100, own][None])
        loss.backward(np.float64((own != -100).sum() / (labels != -100).sum()))
        alone.append(loss.item())
    packed = again.loss(row, labels, packing)
    packed.backward()
    assert [loss.item() for loss in again.loss_of_each(row, labels, packing)] == pytest.approx(alone, rel=1e-11)
    assert packed.item() == pytest.approx(np.average(alone, weights=[(own != -100).sum() for own in each]), rel=1e-11)
    for (name, p), (_, q) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        np.testing.assert_allclose(p.grad, q.grad, rtol=1e-8, atol=1e-9, err_msg=name)


def test_every_parameters_gradient_is_the_slope_along_a_random_direction(new, rng):
    model, ids, labels = new(), np.array([[1, 5, 1, 9, 2, 0, 4]]), np.array([[1, 5, -100, 9, 2, 0, 4]])
    model.loss(ids, labels).backward()
    for name, p in model.named_parameters():
        direction, middle = rng.standard_normal(p.shape), p.data
        around = []
        for sign in (1, -1):
            p.data = middle + sign * 1e-5 * direction
            around.append(model.loss(ids, labels).item())
        p.data = middle
        slope = (around[0] - around[1]) / 2e-5
        assert (p.grad * direction).sum() == pytest.approx(slope, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("settings", [None, {"use_dora": True}], ids=str)
def test_recomputed_and_divided_training_equals_plain_training(new, ids, settings):
    found = []
    for recompute in (False, True):
        for step in (lambda model: model.loss(ids, ids).backward(), lambda model: loss_and_grad(model, ids, ids)):
            model = new()
            if settings is not None:
                add_adapter(model, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **settings))
            model.decoder.recompute = recompute
            step(model)
            found.append({name: p.grad for name, p in model.trainable_parameters().items()})
    for other in found[1:]:
        for name, grad in found[0].items():
            np.testing.assert_allclose(other[name], grad, rtol=1e-9, atol=1e-10, err_msg=name)
            assert grad.any()


def test_an_adapter_on_all_linear_layers_starts_as_the_base_and_merges_into_it(new, ids):
    model = new()
    base = model(ids).data
    assert "lm_head" not in add_adapter(model, LoraConfig(r=2, lora_alpha=4))
    np.testing.assert_array_equal(model(ids).data, base)
    for name, p in model.trainable_parameters().items():
        p.data += np.random.default_rng(len(name)).standard_normal(p.shape)
    apart = model(ids).data
    assert np.abs(apart - base).max() > 0.1
    merge_adapter(model)
    np.testing.assert_allclose(model(ids).data, apart, rtol=1e-9, atol=1e-9)
    assert merged_state(model).keys() == new().state_dict().keys()
    unmerge_adapter(model)
    np.testing.assert_allclose(model(ids).data, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "config", "transposed"), [(*FAMILIES["gpt2"], True), (*FAMILIES["gemma3"], None)])
def test_peft_is_told_where_the_base_stores_its_matrices_transposed(tmp_path, family, config, transposed):
    model = family(config)
    add_adapter(model, LoraConfig(r=2, lora_alpha=4))
    record = json.loads((save_adapter(model, tmp_path / "a", base_sha256="0" * 64) / "adapter_config.json").read_text())
    assert record.get("fan_in_fan_out") is transposed


class Doubled(Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("how", ["hook", "class", "instance"])
def test_the_loss_is_that_of_the_logits_of_a_changed_head(ids, how):
    model = made(*FAMILIES["llama, untied"])
    before, loss, head = model(ids).data, model.loss(ids, ids).item(), model.lm_head
    if how == "hook":
        head.register_forward_hook(lambda module, inputs, output: output * 2)
    elif how == "class":
        head.__class__ = Doubled
    else:
        head.forward = lambda x: Linear.forward(head, x) * 2
    np.testing.assert_allclose(model(ids).data, before * 2, rtol=1e-12)
    rows, columns = np.indices(ids[:, 1:].shape)
    expected = -model(ids).log_softmax()[rows, columns, ids[:, 1:]].mean().item()
    assert model.loss(ids, ids).item() == pytest.approx(expected, rel=1e-12) != pytest.approx(loss, rel=1e-3)


def test_token_ids_may_be_a_tensor_and_of_one_token_nothing_can_be_scored(ids):
    model = made(*FAMILIES["llama, untied"])
    assert np.array_equal(model(Tensor(ids)).data, model(ids).data)
    assert model.loss(Tensor(ids), Tensor(ids)).item() == model.loss(ids, ids).item()
    with pytest.raises(ValueError, match="^no token is scored: .*in a sequence, every label but the first"):
        model.loss(ids[:, :1], ids[:, :1])


def test_an_empty_model_takes_no_memory():
    config, made = Config(32000, 4096, 11008, 32, 32, 32, tie_word_embeddings=False), []  # Llama-2-7B: 27 GB
    assert peak(lambda: made.append(Llama.empty(config))) < 10e6
    (model,) = made
    assert count_parameters(model).total == 6_738_415_616
    assert not any(model.lm_head.weight.data[-1])
    assert {parameter.data.dtype for _, parameter in model.named_parameters()} == {np.dtype(np.float32)}

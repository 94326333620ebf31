"""Counts that are exact: of models, of adapters on them, by formula, of published models."""

import pytest
from smallmodels import lora_config as config

from minilora.lora.adapters import add_adapter
from minilora.measure.bench import SMOLLM2
from minilora.measure.blocks import names_of
from minilora.measure.counts import ParameterCounts, count_parameters
from minilora.measure.predict import Step
from minilora.nn.layers import Linear
from minilora.nn.llama import Config, Llama
from minilora.nn.module import Module

# matrices of the tiny model: q, o 32 x 32; k, v 16 x 32; gate, up 48 x 32; down 32 x 48
TINY = 64 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + 32


def test_counts_of_a_model_and_of_an_adapter_on_it(tiny_model):
    counts = count_parameters(tiny_model)
    assert (counts.total, counts.trainable, counts.frozen) == (TINY, TINY, 0)
    add_adapter(tiny_model, config(r=4))
    counts = count_parameters(tiny_model)
    adapter = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    assert (counts.total, counts.trainable, counts.frozen) == (TINY + adapter, adapter, TINY)
    assert counts.percent == pytest.approx(100 * adapter / (TINY + adapter))
    assert counts.by_module["q_proj"] == (2 * 4 * 64, 2 * 4 * 64 + 2 * 32 * 32)
    assert counts.by_module["down_proj"] == (2 * 4 * 80, 2 * 4 * 80 + 2 * 48 * 32)
    assert counts.by_module["embed_tokens"] == (0, 64 * 32)
    assert counts.by_module["norm"] == (0, 32)
    assert sum(total for _, total in counts.by_module.values()) == counts.total
    assert sum(trainable for trainable, _ in counts.by_module.values()) == counts.trainable
    assert f"{adapter:,}" in str(counts)


def test_a_bias_counts_with_its_module_and_nothing_counts_nothing():
    class Network(Module):
        def __init__(self):
            self.first, self.second = Linear(3, 5, bias=True, rng=None), Linear(5, 2, bias=True, rng=None)
            self.second.requires_grad_(False)

    counts = count_parameters(Network())
    assert counts.by_module == {"first": (20, 20), "second": (0, 12)} and counts.total == 32
    counts = count_parameters(Module())
    assert (counts.total, counts.trainable, counts.percent) == (0, 0, 0.0)


def test_counts_are_shown_as_a_short_table():
    counts = ParameterCounts(1_066_368, 73_728, {"embed_tokens": (0, 262_144), "q_proj": (73_728, 804_224)})
    assert str(counts) == "trainable 73,728 of 1,066,368 parameters (6.914 %)"
    assert repr(counts) == (
        "trainable 73,728 of 1,066,368 parameters (6.914 %)\n"
        "                  trainable             of\n"
        "embed_tokens              0        262,144\n"
        "q_proj               73,728        804,224"
    )


@pytest.mark.parametrize(
    ("layers", "width", "r", "adapter"),
    [
        (96, 12288, 4, 18_874_368),  # GPT-3 175B
        (96, 12288, 8, 37_748_736),
        (24, 1024, 4, 393_216),  # GPT-2 medium; the paper prints 0.35M
        (12, 768, 8, 294_912),  # RoBERTa-base
        (32, 4096, 8, 4_194_304),  # Llama-2-7B
    ],
)
def test_the_formula_gives_the_numbers_of_published_models_with_q_and_v_adapted(layers, width, r, adapter):
    published = Config(32, width, width, layers, 1, 1)
    assert Step(published, 1, 1, rank=r, targets=("q_proj", "v_proj")).adapter_parameters == adapter


@pytest.mark.parametrize(
    ("r", "targets", "adapter"),
    [(8, ("q_proj", "v_proj"), 460_800), (8, names_of(SMOLLM2), 2_442_240), (16, names_of(SMOLLM2), 4_884_480)],
)
def test_the_formula_gives_smollm2_s_numbers_and_what_a_small_model_has(r, targets, adapter, tiny_config):
    assert Step(SMOLLM2, 1, 1, rank=r, targets=targets).adapter_parameters == adapter
    model = Llama(tiny_config)
    add_adapter(model, config(r=r, target_modules=list(targets)))
    counted = count_parameters(model).trainable
    assert Step(tiny_config, 1, 1, rank=r, targets=targets).adapter_parameters == counted

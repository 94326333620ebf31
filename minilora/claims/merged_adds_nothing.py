"""LoRA, table 1: a merged adapter adds no latency: no operation, no FLOP and no weight, at equal logits."""

from math import prod
from typing import Any

import numpy as np

from ..engine.tensor import Node, leaves
from ..experiments.claim import Band, Claim, Effect, Setting
from ..lora.adapters import add_adapter, lora_modules, merge_adapter
from ..lora.config import LoraConfig
from ..models.load import load
from ..nn.language_model import LanguageModel

CLAIM = Claim(
    source="Hu et al. 2021, LoRA (arXiv 2106.09685)",
    where="section 4.1, table 1",
    says="W + B A is computed once and then used like W: no latency is added. GPT-2 medium takes 19.8 ms for 128 tokens"
    " fine-tuned or with LoRA, and 23.9 or 25.8 ms with two kinds of adapter layers.",
    here="The tiny base with an adapter of r = 8 on every linear layer, A and B random, on 64 tokens. Counted in the"
    " graph, not timed: operations, MACs of the linear layers, parameters that are read. Measured: the largest share by"
    " which one of them exceeds the base's after merging, or the distance of the logits from those before merging (a"
    " share of their norm), if that is larger. For comparison: not merged; the bytes of an NF4 base that is merged.",
    switch="The adapter is not merged.",
    base="tiny",
    minutes=0.1,
    explained={
        "reproduced": "An NF4 base becomes float32 where it is merged: 7.1 times the bytes. A server that has several"
        " adapters at hand cannot merge them.",
    },
    band=Band("largest addition to operations, MACs, parameters read, logits (share)", 0, 1e-4, against_above=0.01),
    effect=Effect(paper=0, none=0.71, std=0),
)
COUNTED = ("operations", "MACs", "parameters read")


def count(seed: int, r: int, tokens: int) -> dict[str, Any]:
    """The costs of base, adapter and merged adapter; how far merging moves the logits; how far NF4's bytes grow."""
    ids = np.random.default_rng(seed).integers(0, load("tiny")[0].config.vocab_size, (1, tokens))
    config = LoraConfig(r=r, lora_alpha=16, init_lora_weights=False)
    (model, _), (rounded, _) = load("tiny"), load("tiny", quantized="nf4")
    found: dict[str, Any] = {"base": costs(model, ids)[0]}
    add_adapter(model, config, seed=seed)
    add_adapter(rounded, config, seed=seed)
    found["adapter"], logits = costs(model, ids)
    packed = sum(layer.weight.data.nbytes for layer in lora_modules(rounded).values())
    merge_adapter(model)
    merge_adapter(rounded)
    found["merged"], merged = costs(model, ids)
    dense = sum(layer.weight.data.nbytes for layer in lora_modules(rounded).values())
    return found | {"apart": float(np.linalg.norm(merged - logits) / np.linalg.norm(logits)), "NF4": dense / packed}


def costs(model: LanguageModel, ids: np.ndarray) -> tuple[dict[str, int], np.ndarray]:
    """COUNTED, for a forward pass with ids (B, T), and the logits (B, T, V)."""
    model.requires_grad_(True)  # so that every weight is in the graph
    y = model(ids)
    nodes, stack, operations, macs = set[Node](), [y.node], 0, 0
    while stack:
        if (node := stack.pop()) and node.edges and node not in nodes:
            nodes.add(node)
            stack += [parent for parent, _, _ in node.edges]
            x, *weights = (shape for _, _, shape in node.edges)
            if "linear" in node.name:  # its inputs: x (B, T, n), w (m, n), and with an adapter a (r, n), b (m, r)
                macs += prod(x[:-1]) * sum(map(prod, weights))
            operations += len(weights) if "linear" in node.name else 1  # every weight is one matrix product
    return dict(zip(COUNTED, (operations, macs, sum(map(prod, leaves(y).values()))), strict=True)), y.data


def run(setting: Setting) -> dict[str, Any]:
    """The largest addition for each adapter, and everything that was counted."""
    tokens = 8 if setting.small else 64
    found = setting.each(count, [{"seed": seed, "r": 8, "tokens": tokens} for seed in setting.seeds])
    share = lambda one, form: {name: one[form][name] / one["base"][name] - 1 for name in COUNTED}
    added = {form: [share(one, form) for one in found] for form in ("adapter", "merged")}
    tried = added["adapter" if setting.switched else "merged"]
    return {
        "measured": [max(*each.values(), one["apart"]) for each, one in zip(tried, found, strict=True)],
        "apart": [one["apart"] for one in found],
        "bytes of NF4 after merging (multiple)": found[0]["NF4"],
        "added": {form: each[0] for form, each in added.items()},
    }


def picture(numbers: dict[str, Any]) -> Any:
    """What the adapter adds, merged and not."""
    from ..pages.style import BASE, LORA, ink, panels

    figure, axes = panels(width=7, height=3)
    for i, (form, color, name) in enumerate((("adapter", BASE, "not merged"), ("merged", LORA, "merged"))):
        for y, share in enumerate(numbers["added"][form].values()):
            axes.barh(y + 0.4 * i - 0.2, 100 * share, color=color, height=0.36, label=None if y else name)
            axes.text(100 * share, y + 0.4 * i - 0.2, f" {100 * share:.1f}", va="center", color=ink(color))
    axes.set_yticks(range(len(COUNTED)), COUNTED)
    axes.set(xlabel="more than the base (%)", xmargin=0.1, ylim=(2.5, -0.5))
    axes.legend(frameon=False)
    return figure

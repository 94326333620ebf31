"""VeRA: one random A and B for all layers, of which only vectors are trained, end close to LoRA."""

from typing import Any

import numpy as np

from ..experiments.claim import SLIGHT, Claim, Effect, Setting
from ..experiments.tiny import lora_config, reset, samples_of, tiny_base, tiny_run
from ..experiments.tuned import as_numbers
from ..lora.adapters import add_adapter, lora_modules
from ..lora.layer import LoraWeights
from ..measure.loss import evenly, mean_loss
from ..nn.module import Parameter
from ..pages.rates import losses_figure
from ..train.loop import fit

CLAIM = Claim(
    source="VeRA (Kopiczko et al. 2023, arXiv 2310.11454)",
    where="abstract; the method's section",
    says="ΔW = diag(b) B diag(d) A, where A and B are random, frozen and shared by all layers, and the vectors b and d"
    " are trained: about ten times fewer trainable parameters than LoRA has, with the same performance.",
    here="VeRA with r = 128, the width, d = 0.1 and b = 0 at first (8,704 parameters), and LoRA with r = 8 (77,824), on"
    " every linear layer of the tiny base; 60 steps on law, each at its own best learning rate by validation loss."
    " Measured: VeRA's gain on the test as a share of LoRA's. For comparison: LoRA with r = 1 (9,728).",
    switch="A and B themselves are trained, in each layer its own: LoRA instead of VeRA.",
    base="tiny",
    minutes=3,
    band=SLIGHT.of("share of LoRA's gain that VeRA reaches with a ninth of its parameters"),
    second_hand=True,
    explained={
        "not at this size": "VeRA ends where LoRA of rank 1 does (3.498 and 3.505), with about as many parameters, and"
        " lacks a sixth of rank 8's gain. The paper's bases are six times as wide and more. Larger r was not tried."
    },
    effect=Effect(paper=1, none=0.8, std=0.024),
)


class VeraWeights(LoraWeights):
    """diag(d) A (r, n) and diag(b) B (m, r): the vectors d (r, 1) and b (m, 1) are trained, A and B are shared."""

    def __init__(self, m: int, n: int, r: int, seed: int):
        a, b = np.random.default_rng(seed).uniform(-1, 1, (2, r, 384)).astype(np.float32)
        self.shared = a[:, :n] * np.float32(np.sqrt(6 / 384)), b[:, :m].T * np.float32(np.sqrt(6 / r))
        super().__init__(np.full((r, 1), 0.1, np.float32), np.zeros((m, 1), np.float32), scale=1.0)

    @property
    def lora_A(self) -> Any:
        return self.d * self.shared[0]

    @lora_A.setter
    def lora_A(self, value: Parameter) -> None:
        self.d = value

    @property
    def lora_B(self) -> Any:
        return self.b * self.shared[1]

    @lora_B.setter
    def lora_B(self, value: Parameter) -> None:
        self.b = value


def train(lr: float, method: str, r: int, seed: int = 0, **sizes: Any) -> dict[str, Any]:
    """As `tiny_run`, for "lora" or "vera", which does not measure what was before."""
    if method == "lora":
        return tiny_run(lr, r=r, seed=seed, **sizes)
    (model, _), sets, steps = tiny_base(), samples_of("legal"), sizes.get("steps", 60)
    try:
        add_adapter(model, lora_config(1, 1, "all-linear"), "trial", seed)
        for layer in lora_modules(model).values():
            layer.adapters["trial"] = VeraWeights(layer.out_features, layer.in_features, r, seed)
        trained = sum(p.size for p in model.trainable_parameters().values())
        fit(model, sets["train"], steps, lr, batch_size=sizes.get("batch_size", 4), seed=seed)
        held = {name: evenly(sets[name], sizes.get("held_out", 30)) for name in ("validation", "test")}
        return {name: mean_loss(model, samples) for name, samples in held.items()} | {"trained": trained}
    finally:
        reset(model)


def run(setting: Setting) -> dict[str, Any]:
    """Tune all three, and compare the gains seed by seed."""
    few = {"steps": 8, "batch_size": 2, "held_out": 4} if setting.small else {}
    lora = {"lr": 1e-2, "method": "lora", "r": 8, **few}
    contenders: dict[str, dict[str, Any]] = {
        "VeRA, r = 128": lora if setting.switched else {"lr": 0.1, "method": "vera", "r": 128, **few},
        "LoRA, r = 8": lora,
        "LoRA, r = 1": lora | {"lr": 3.16e-3, "r": 1},
    }
    found = setting.tuned(train, contenders)
    numbers, before = as_numbers(found), found["LoRA, r = 8"]["runs"][0]["before"]["test"]
    vera, plain, _ = numbers["loss on the test"].values()
    return {"measured": [(before - own) / (before - other) for own, other in zip(vera, plain, strict=True)], **numbers}


picture = losses_figure  # losses by learning rate, and with each seed

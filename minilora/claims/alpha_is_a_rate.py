"""LoRA Without Regret: under Adam, alpha, A's initialisation and the learning rates are not four hyperparameters."""

from typing import Any

import numpy as np

from ..engine.fused import lora_linear
from ..engine.tensor import Tensor
from ..experiments.claim import Band, Claim, Effect, Setting
from ..nn.optim import SGD, AdamW, Optimizer

CLAIM = Claim(
    source="Schulman et al. 2025, LoRA Without Regret (thinkingmachines.ai/blog/lora)",
    where="the section on the parametrisation and its invariances",
    says="LoRA has four hyperparameters of scale: alpha, the scale of A's initialisation, and the learning rates of A"
    " and of B. Under Adam with eps = 0, two of them are redundant: for any p and q, the updates ΔW stay the same at"
    " every step if alpha is divided by p q, A's initialisation and learning rate are multiplied by p, and B's learning"
    " rate by q.",
    here="LoRA (r = 4) learns a planted update of a 32 x 32 matrix in float64, with p = 3 and q = 5, and eps = 1e-30,"
    " because B = 0 makes A's first gradient zero. Measured: the largest distance of the two ΔW in any of 300 steps, as"
    " a share of ‖ΔW‖. For comparison: the same with PyTorch's eps of 1e-8, and alpha divided by 15 alone.",
    switch="Plain gradient descent replaces Adam.",
    base="matrices",
    minutes=0.2,
    band=Band("largest distance of the two updates at any step (share)", low=0, high=1e-6, against_above=0.01),
    second_hand=True,
    explained={
        "reproduced": "With PyTorch's eps of 1e-8, the two runs differ by 0.001 to 0.07 % of ‖ΔW‖, because these"
        " gradients are far above eps. With p = 1: a change of alpha is one of B's learning rate.",
    },
    one_rate="The claim is about a change of the learning rates, whatever they are.",
    effect=Effect(paper=0, none=0.85, std=0),
)
D, R, LR = 32, 4, 0.01
FORMS = {"original": (1, 1, 1), "equivalent": (1 / 15, 3, 5), "alpha alone": (1 / 15, 1, 1)}  # factors: alpha, A, B


def train(seed: int, steps: int, optimizer: str) -> dict[str, Any]:
    """The largest distance between the updates of original and equivalent, and the losses of all FORMS.

    optimizer: "adam", "adam, eps 1e-8" or "sgd".
    """
    paths = {name: _path(seed, steps, optimizer, *factors) for name, factors in FORMS.items()}
    pairs = zip(paths["original"][0], paths["equivalent"][0], strict=True)
    apart = max(float(np.linalg.norm(x - y) / np.linalg.norm(x)) for x, y in pairs)
    return {"apart": apart, "losses": {name: losses for name, (_, losses) in paths.items()}}


def _path(seed: int, steps: int, optimizer: str, alpha: float, p: float, q: float) -> tuple[list[Any], list[float]]:
    """ΔW and loss after every step; p multiplies A and its learning rate, q that of B."""
    rng = np.random.default_rng(seed)
    w, left, right = rng.standard_normal((3, D, D))
    target = Tensor((w + left[:, :R] @ right[:R] / D).T)
    a, b = Tensor(p * rng.standard_normal((R, D)) / np.sqrt(D), True), Tensor(np.zeros((D, R)), True)
    eps, updates, losses = 1e-8 if "eps" in optimizer else 1e-30, [], []
    both: list[Optimizer] = [
        SGD([each], LR * rate) if optimizer == "sgd" else AdamW([each], LR * rate, eps=eps, weight_decay=0)
        for each, rate in ((a, p), (b, q))
    ]
    for _ in range(steps):
        loss = ((lora_linear(np.eye(D), w, a, b, scale=alpha) - target) ** 2).sum()
        a.grad = b.grad = None
        loss.backward()
        for one in both:
            one.step()
        updates.append(alpha * b.data @ a.data)
        losses.append(loss.item())
    return updates, losses


def run(setting: Setting) -> dict[str, Any]:
    """The largest distance for each seed, and with another eps; the curves of the first seed."""
    steps, kinds = 50 if setting.small else 300, ["sgd" if setting.switched else "adam", "adam, eps 1e-8"]
    trials = [{"seed": seed, "steps": steps, "optimizer": kind} for kind in kinds for seed in setting.seeds]
    found, n = setting.each(train, trials), len(setting.seeds)
    largest = [one["apart"] for one in found]
    return {"measured": largest[:n], "with eps 1e-8": largest[n:], "losses": found[0]["losses"]}


def picture(numbers: dict[str, Any]) -> Any:
    """The loss of the original, of its equivalent and with alpha alone changed."""
    from ..pages.style import BASE, LORA, ORANGE, panels

    figure, axes = panels(width=6)
    losses = numbers["losses"]
    steps = range(0, len(losses["original"]), max(1, len(losses["original"]) // 15))
    axes.plot(losses["original"], color=LORA, label="original")
    label = "alpha / 15, A and its rate x 3, B's rate x 5"
    axes.plot(steps, [losses["equivalent"][i] for i in steps], "o", color=ORANGE, label=label, markersize=4)
    axes.plot(losses["alpha alone"], color=BASE, linestyle="--", label="alpha / 15 alone")
    axes.set(xlabel="step", ylabel="loss", title="One training run, two sets of hyperparameters")
    axes.legend(frameon=False)
    return figure

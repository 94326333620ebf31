"""For every claim two worlds instead of its trials: one where the paper is right, one where it is wrong.

A world is a function that takes the arguments of a trial, and returns what the trial would have found. With each stands
what the claim must measure in it, by hand: a number per seed, or one for all seeds.
"""

from math import log10

SEEDS = (0, 1, 2)
BATCHES = {4: 0, 32: 1}


def tiny(test, best=1e-2, key=lambda trial: trial.get("method", "lora"), **found):
    """`tiny_run`'s result: `test` losses by key, higher away from the best rate (one for all, or by key).

    The validation loss is lowest at the best rate as well, but says nothing about which contender is better.
    """

    def trial(lr, seed=0, **more):
        name = key(more)
        off = log10(lr / (best[name] if isinstance(best, dict) else best)) ** 2
        loss = test[name] if not callable(test[name]) else test[name](seed)
        result = {"validation": 5 + off, "test": loss + off, "trained": 100, "before": {"test": 10.0}}
        return result | {what: value[name] if isinstance(value, dict) else value for what, value in found.items()}

    return trial


def batches(lora_large):
    losses = {("lora", 0): 3.0, ("lora", 1): lora_large, ("full", 0): 2.9, ("full", 1): 3.0}
    best = {("lora", 0): 3e-3, ("lora", 1): 1e-2, ("full", 0): 1e-3, ("full", 1): 2e-3}
    best = {name: 10 ** (round(4 * log10(lr)) / 4) for name, lr in best.items()}  # a rate of the ladder
    return tiny(losses, best, lambda trial: (trial.get("method", "lora"), BATCHES[trial.get("batch_size", 4)]))


def forgetting(lora, full):
    """What each has forgotten at the end, at its best rate. At other rates it is nothing, and the new loss higher."""

    def path(lr, seed=0, method="lora", **sizes):
        off = abs(log10(lr / {"lora": 1e-2, "full": 2.15e-3}[method]))
        forgotten, new = {"lora": lora, "full": full}[method], [4.0, 3.2, (3.0 if method == "lora" else 2.8) + off]
        old = [2.0, 9.0, 2.0 + forgotten * (off < 0.01)]
        return {"validation": new[-1], "new": new, "old": old}

    return path


def frozen(loss):
    rates = {"lora": 1e-2, "lora-fa": 3e-2}
    return tiny({"lora": 3.0, "lora-fa": loss}, rates, lambda trial: trial.get("variant", "lora"))


def gains(lora, full):
    """Losses on the test after training, from 10.0; the rates in the middle are the best."""

    def trial(lr, seed=0, method="lora", shuffled=False, **sizes):
        best = {"lora": 1e-2, "full": 10 ** (-7 / 3) if shuffled else 1e-3}[method]
        loss = {"lora": lora, "full": full}[method]
        off = abs(log10(lr / best))
        curve = [(0, 12.0), (8, 9.0), (96, loss)]
        return {"validation": 5 + off, "test": loss + 3 * off, "before": {"test": 10.0}, "curve": curve}

    return trial


def first_to(lora, full):
    """The steps to the validation loss 2.0, which both reach."""

    def trial(lr, seed=0, method="lora", **sizes):
        step = {"lora": lora, "full": full}[method]
        off = abs(log10(lr / {"lora": 1e-2, "full": 1e-3}[method]))
        curve = [(0, 4.0), (step, 2.0), (96, 2.0 if method == "lora" else 1.0)]
        return {"validation": 5 + off, "test": 2.0, "before": {"test": 10.0}, "curve": curve}

    return trial


def sooner(plain, plus):
    curves = {"lora": [(0, 4.0), (plain, 2.0), (60, 2.0)], "lora+": [(0, 4.0), (plus, 2.0), (60, 1.0)]}
    best = {"lora": 1e-2, "lora+": 1e-3}
    return tiny({"lora": 2.0, "lora+": 1.0}, best, lambda trial: trial.get("variant", "lora"), curve=curves)


def cut(left):
    full = tiny({"full": 2.0}, 1e-3)

    def trial(**settings):
        if "ranks" not in settings:
            return full(**settings)
        good = abs(log10(settings["lr"] / 1e-3)) < 0.01
        shares = {str(r): 0.5 for r in settings["ranks"]} | {"8": (left if good else 0.0) + settings["seed"] / 100}
        return dict.fromkeys(("left", "variance", "chance"), shares) | {"loss": [3.0, 2.0]}

    return trial


def modules(attention, mlp):
    kind = lambda trial: "attention" if "q_proj" in trial["targets"] else "mlp"
    return tiny({"attention": attention, "mlp": mlp}, key=kind)


def four_bits(nf4, fp4, int4):
    return lambda seed, records: {"False": 3.0, "nf4": 3 + nf4, "fp4": 3 + fp4 + seed, "int4": 3 + int4}


def planted(off):
    def trial(d, k, r, seed, full_rank, steps):
        tail = float(max(0, k - r))
        return {"loss": tail + off * (tail if r < k else k) * (r == k - 1 or r == 2 * k), "tail": tail, "whole": k}

    return trial


def by_rank(losses):
    """From a loss of 10."""
    return tiny(dict(zip((4, 8, 16, 64), losses, strict=True)), key=lambda trial: trial.get("r", 8))


def best_rates(lora):
    kind = lambda trial: trial.get("method") or trial.get("r", 8)
    return tiny(dict.fromkeys((2, 8, 32, "full"), 3.0), {2: 1e-2, 8: lora, 32: 2e-2, "full": 1e-3}, kind)


def first_change(slope):
    def change(r, seed, rslora, optimizer, tokens):
        return float(3 * r ** (slope if rslora and optimizer == "sgd" else -1.0))

    return change


def over_four_bits(left):
    """Rounding costs 0.1 before training; `left` of it afterwards, at the best rate."""

    def train(quantized, lr, seed, steps, held_out):
        off = abs(log10(lr / (3.16e-2 if quantized else 1e-2)))
        after = 2.0 + off + (0.1 * left if quantized else 0)
        return {"before": 4.1 if quantized else 4.0, "after": after, "validation": 5 + off, "train": [3.0, after]}

    return train


def variants(worst):
    return tiny(
        {"lora": 3.0, "rslora": 3.1, "lora+": worst, "dora": 3.05, "pissa": 3.0},
        {"lora": 1e-2, "rslora": 3.16e-3, "lora+": 1e-3, "dora": 1e-2, "pissa": 3.16e-3},
        lambda trial: trial.get("variant", "lora"),
    )


def weights(q, k, pair, four):
    losses = {"q": q, "k": k, "v": 1.0, "o": 1.0, "q, k": 1.0, "q, v": pair, "q, k, v, o": four}
    return tiny(losses, key=lambda trial: ", ".join(name.removesuffix("_proj") for name in trial["targets"]))


def redundant(apart):
    def train(seed, steps, optimizer):
        losses = {name: [3.0, 2.0, 1.0] for name in ("original", "equivalent", "alpha alone")}
        return {"apart": apart if optimizer == "adam" else 0.9, "losses": losses}

    return train


def learned(low, full):
    """Gains on the test, from 10.0 on; that of r = 2 may be a function of the seed, that of r = 8 is 2.0."""
    losses = {2: (lambda seed: 10.0 - low(seed)) if callable(low) else 10.0 - low, 8: 8.0, "full": 10.0 - full}
    kind = lambda trial: trial.get("method") or trial.get("r", 8)
    return tiny(losses, {2: 1e-2, 8: 1e-2, "full": 1e-3}, kind)


def factors(b, a):
    """What LoRA gains is 4.0."""
    losses = {"lora": 6.0, "lora-fa": 10.0 - b, "zero-a": 10.0 - a}
    world = tiny(losses, {"lora": 1e-2, "lora-fa": 3e-2, "zero-a": 3e-3}, lambda trial: trial.get("variant", "lora"))

    def trial(frozen=(), **trial):
        assert list(frozen) == ["lora_B"] * (trial.get("variant") == "zero-a")
        return world(**trial)

    return trial


def first_zero(a, best=1e-3):
    return tiny({"lora": 3.0, "zero-a": a}, {"lora": 1e-2, "zero-a": best}, lambda trial: trial.get("variant", "lora"))


# claim -> the world where the paper is right and the measure there, the world where it is wrong and the measure there
WORLDS = {
    "alpha-is-a-rate": (redundant(1e-9), 1e-9, redundant(0.5), 0.5),
    "batch-size": (batches(3.3), 0.2, batches(3.0), -0.1),
    "forgets-less": (forgetting(0.3, 0.5), 1 - 0.3 / 0.5, forgetting(0.5, 0.3), 1 - 0.5 / 0.3),
    "frozen-a": (frozen(3.03), 1, frozen(3.3), 10),
    "introduction-complex": (gains(8.0, 6.0), 0.5, gains(6.0, 6.0), 1),
    "introduction-cost": (first_to(10, 40), 0.5 * 10 / 40, first_to(40, 10), 0.5 * 40 / 10),
    "introduction-quality": (gains(6.1, 6.0), 3.9 / 4, gains(8.0, 6.0), 0.5),
    "learns-less": (learned(3.0, 4.0), 0.25, learned(4.4, 4.0), -0.1),
    "lora-plus": (sooner(20, 5), 4, sooner(5, 20), 0.25),
    "low-rank-update": (cut(0.95), [0.95, 0.96, 0.97], cut(0.3), [0.3, 0.31, 0.32]),
    "mlp-before-attention": (modules(3.3, 3.0), 10, modules(2.7, 3.0), -10),
    "nf4-below-others": (four_bits(0.1, 0.4, 0.2), 0.5, four_bits(0.8, 0.2, 0.3), [4, 8 / 3, 8 / 3]),
    "planted-rank": (planted(0.005), 0.005, planted(0.5), 0.5),
    "random-a-suffices": (factors(3.8, 3.2), 0.15, factors(3.2, 3.8), -0.15),
    "rank-hardly-matters": (by_rank([5.1, 5.0, 5.2, 5.1]), 4.8 / 5, by_rank([7.0, 6.0, 5.0, 5.0]), 3 / 5),
    "rate-ten-times": (best_rates(1e-2), 10, best_rates(1e-3), 1),
    "rslora-first-step": (first_change(0.1), 0.1, first_change(-0.9), -0.9),
    "training-on-4-bits": (over_four_bits(0.1), 0.9, over_four_bits(1.5), -0.5),
    "variants-within-two-percent": (variants(3.03), 100 * (3.1 / 3 - 1), variants(3.3), 10),
    "which-weights": (weights(3.3, 3.6, 3.0, 2.9), 10, weights(2.7, 3.9, 2.8, 3.0), -10),
    "zero-b-start": (first_zero(3.06), 2, first_zero(2.94), -2),
}


def followed(lora, full):
    """`followed_run`'s result at the best rates of a ladder. lora, full: (test loss from 10.0, loss that is forgotten,
    first step with the validation loss 2.0). The validation loss of the other seeds is highest where that of seed 0,
    which must choose the rate, is lowest.
    """

    def trial(lr, seed=0, method="lora", **sizes):
        test, forgotten, step = {"lora": lora, "full": full}[method]
        off = abs(log10(lr / {"lora": 10**-2.5, "full": 1e-4}[method])) * (1 if seed == 0 else -1)
        curve = [(0, 4.0), (step, 2.0), (40, 2.0 if method == "lora" else 1.0)]
        return {
            "validation": 5 + off, "test": test + abs(off), "before": {"test": 10.0},
            "curve": curve, "new": [loss for _, loss in curve], "old": [2.0, 2.0 + forgotten / 2, 2.0 + forgotten],
            "trained": 100,
        }  # fmt: skip

    return trial


# the same for the forms on SmolLM2
ON_SMOLLM2 = {
    "forgets-less": (followed((6.0, 0.3, 20), (6.0, 0.5, 20)), 0.4, followed((6.0, 0.5, 20), (6.0, 0.3, 20)), -2 / 3),
    "introduction-cost": (
        followed((6.0, 0.3, 10), (6.0, 0.5, 40)), 0.5 * 10 / 40, followed((6.0, 0.3, 40), (6.0, 0.5, 10)), 2.0
    ),
    "introduction-quality": (
        followed((6.1, 0.3, 20), (6.0, 0.5, 20)), 3.9 / 4, followed((8.0, 0.3, 20), (6.0, 0.5, 20)), 0.5
    ),
    "learns-less": (
        followed((7.0, 0.3, 20), (6.0, 0.5, 20)), 0.25, followed((5.0, 0.3, 20), (6.0, 0.5, 20)), -0.25
    ),
}  # fmt: skip
WITHOUT_TRIALS = ("introduction-files", "introduction-memory", "introduction-speed")  # they measure by themselves

"""For every claim two worlds instead of its trials: one where the paper is right, one where it is wrong.

A world is a function that takes the arguments of a trial, and returns what the trial would have found. With each stands
what the claim must measure in it, by hand: a number per seed, or one for all seeds.
"""

from math import log10

import numpy as np

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


def trained(trial, best):
    """`train_update`'s result: a file that is named by what was trained, and the validation loss."""
    off = log10(trial["lr"] / best[trial["method"]]) ** 2
    return {"file": f"{trial['method']} {trial.get('r', 8)} {trial['seed']}", "validation": 5 + off}


def amplified(few):
    def look(file=None, emphasised=False, **trial):
        if file is None:
            return trained(trial, {"lora": 3e-2})
        _, r, seed = file.split()
        factors = [few + int(seed), few + int(seed), 900.0] if r == "4" else [1.0, 2.0, 3.0]
        return {"factor": factors, **{name: [1.0, 2.0, 3.0] for name in ("update", "seen", "top", "chance")}}

    return look


def batches(lora_large):
    losses = {("lora", 0): 3.0, ("lora", 1): lora_large, ("full", 0): 2.9, ("full", 1): 3.0}
    best = {("lora", 0): 3e-3, ("lora", 1): 1e-2, ("full", 0): 1e-3, ("full", 1): 2e-3}
    best = {name: 10 ** (round(4 * log10(lr)) / 4) for name, lr in best.items()}  # a rate of the ladder
    return tiny(losses, best, lambda trial: (trial.get("method", "lora"), BATCHES[trial.get("batch_size", 4)]))


def capacity(few, many):
    def learn(pairs, r, lr, steps, seed):
        share = 1.0 if r == 0 else {4: few if pairs == 8 else many}.get(r, 0.7)
        return {"validation": log10(lr / 1e-2) ** 2, "share": share if abs(log10(lr / 1e-2)) < 0.01 else 0.0}

    return learn


def correlations(lora, dora, full):
    """Changes of length and direction of 60 query matrices that correlate like this, at each method's own best rate."""
    wanted, best = {"lora": lora, "dora": dora, "full": full}, {"lora": 3e-3, "dora": 1e-2, "full": 3e-4}

    def train(**trial):
        result, turned = trained(trial, best), np.linspace(-1, 1, 60)
        noise = np.cos(7 * turned)  # as good as noise: made orthogonal to `turned`, and as long
        noise -= turned * (noise @ turned) / (turned @ turned) + noise.mean()
        noise *= np.sqrt(turned @ turned / (noise @ noise))
        share = wanted[trial["method"]] if result["validation"] < 5.1 else 0.0  # another rate would show no correlation
        share -= 0.1 * trial["seed"] * (trial["method"] == "lora")
        grown = share * turned + np.sqrt(1 - share**2) * noise
        at = {f"layers.{i}.q_proj": (float(grown[i]), float(turned[i])) for i in range(60)}
        return result | {"changes": {str(step): at | {"layers.0.v_proj": (9.0, -9.0)} for step in (10, 20, 30, 40)}}

    return train


def forgetting(lora, full):
    """What each has forgotten at the end, at its best rate. At other rates it is nothing, and the new loss higher."""

    def path(lr, seed=0, method="lora", **sizes):
        off = abs(log10(lr / {"lora": 1e-2, "full": 2.15e-3}[method]))
        forgotten, new = {"lora": lora, "full": full}[method], [4.0, 3.2, (3.0 if method == "lora" else 2.8) + off]
        old = [2.0, 9.0, 2.0 + forgotten * (off < 0.01)]
        return {"validation": new[-1], "new": new, "old": old}

    return path


def ranks(full):
    def trial(file=None, base=None, seed=0, **training):
        if file is None:
            return trained(training | {"seed": seed}, {"lora": 3e-3, "full": 1e-3})
        size = full if file.startswith("full") else 8
        update = {f"model.layers.{i}.{kind}": size for i in range(3) for kind in ("q_proj", "v_proj", "down_proj")}
        update["model.layers.0.q_proj"] = 999
        return {"update": update, "noise": dict.fromkeys(("q_proj", "v_proj", "down_proj"), 300)}

    return trial


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


def intruders(lora, full):
    def count(**trial):
        if "method" in trial:
            return trained(trial, {"lora": 3e-2, "full": 1e-3})
        assert trial["lora"] == f"lora 8 {trial['seed']}" and trial["full"] == f"full 8 {trial['seed']}"
        found = {"lora": [lora, lora + 2], "full": [full, full], "full, scaled": [7, 7], "noise": [8, 8]}
        return found | {"low rank": [9, 9]}

    return count


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


def first_losses(pissa):
    def trial(lr, steps, seed=0, variant="lora", **more):
        off = abs(log10(lr / {"lora": 10**-1.75, "pissa": 10**-2.5}[variant]))
        more = off + (pissa if variant == "pissa" else 0)
        return {"validation": 5 + off, "train": [3.0 + seed + more + (i == 0) for i in range(steps)]}

    return trial


def saved(at_8):
    def trial(seed, layers, ranks, smallest):
        rows = {"model.layers.0.q_proj.weight": 1, "model.layers.1.down_proj.weight": 3}
        return {name: [at_8 * part / 2 if r == 8 else 0.9 for r in ranks] for name, part in rows.items()}

    return trial


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


def overlaps(a):
    def compare(seed=0, few=None, many=None, random=False, **training):
        if few is None:
            return trained(training | {"seed": seed}, {"lora": 3e-3})
        (_, small, one), (_, large, other) = few.split(), many.split()
        assert (small, large) == ("8", "64") and int(one) == seed and one != other  # not the same start
        names = [f"model.layers.{i}.self_attn.{kind}" for i in range(3) for kind in ("q_proj", "v_proj")]
        sides = {"a": a, "right": 0.9, "left": 0.8}
        found = {side: dict.fromkeys(names, phi + 0.01 * seed) for side, phi in sides.items()}
        return found | {"table": [[0.1] * 16] * 8, "chance": 0.002}

    return compare


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


def rounded_scales(error):
    def quantised(bits, seed, records):
        plain = bits == 32
        return {"bits": 0.5 if plain else 0.13, "error": 2.0 if plain else 2.0 * error, "loss": 3.0}

    return quantised


def costs(merged):
    """The merged adapter multiplies one of the three things that are counted."""
    base = {"operations": 100, "MACs": 1000, "parameters read": 500}

    def count(seed, r, tokens):
        adapter = {name: 1.2 * n for name, n in base.items()}
        own = base | {"MACs": merged * base["MACs"]}
        return {"base": base, "adapter": adapter, "merged": own, "apart": 1e-6, "NF4": 7.0}

    return count


def left_of_error(share):
    def starts(kind, r, iterations, **more):
        after_five = share if (kind, r) == ("NF4", 8) else 0.4
        return {"rest": [1.0] * 5 + [after_five] + [0.1] * (iterations - 5), "loss": [3.0] * (iterations + 1)}

    return starts


def early(apart):
    """All ranks begin at 4.0 and gain 1.0 on average by the first look, where they lie so far apart; then more."""

    def trial(lr, r, seed, every, **sizes):
        off = {1: apart / 2, 8: 0.0, 64: -apart / 2}[r]
        return {"curve": [(0, 4.0), (every, 3.0 + off), (2 * every, 2.9 + 3 * off)]}

    return trial


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


def added(mlp, both):
    kind = lambda trial: "both" if trial.get("targets", "all-linear") == "all-linear" else "q_proj" in trial["targets"]
    return tiny({"both": both, False: mlp, True: 9.0}, key=kind)


def from_few(lora, full):
    """Only of ten records anything is known."""
    world = tiny({"lora": lora, "full": full}, {"lora": 3e-3, "full": 3e-4})
    return lambda records, **trial: world(**trial) if records == 10 else None


def vectors(vera):
    losses = {("lora", 8): 6.0, ("lora", 1): 7.0, ("vera", 128): vera}
    best = {("lora", 8): 1e-2, ("lora", 1): 3.16e-3, ("vera", 128): 0.1}
    return tiny(losses, best, lambda trial: (trial["method"], trial["r"]))


def by_scaling(root_falls, plain_falls):
    """The test loss falls so far from the first rank to the last, and the validation loss by 0.3 for both."""

    def train(lr, root, seed=0, **more):
        off = log10(lr / (3.16e-3 if root else 1e-2)) ** 2
        losses = {"validation": [5.0, 4.9, 4.7], "test": [3.0, 2.5, 3.0 - (root_falls if root else plain_falls)]}
        return {"validation": 5 + off, "by rank": {name: [x + off for x in each] for name, each in losses.items()}}

    return train


def halved(undone, lost):
    """0.5 nats are lost on old texts and 1 gained on new ones; halving changes both, at the best rate."""

    def train(lr, seed=0, **more):
        off = log10(lr / 1e-2) ** 2
        path = lambda back, cost: [[3.0 + cost * step, 2.5 - 0.5 * back * step] for step in (0, 1, 2)]
        own = path(0.0, 0.0) if off else path(undone, lost)
        paths = {"intruders": own, "others": path(0.1, 0.9), "all": path(0.5, 0.5)}
        return {"validation": 5 + off, "before": [4.0, 2.0], "count": 2.0, **paths}

    return train


# claim -> the world where the paper is right and the measure there, the world where it is wrong and the measure there
WORLDS = {
    "alpha-is-a-rate": (redundant(1e-9), 1e-9, redundant(0.5), 0.5),
    "amplified-directions": (amplified(16.0), [16, 17, 18], amplified(-5.0), [-5, -4, -3]),
    "batch-size": (batches(3.3), 0.2, batches(3.0), -0.1),
    "capacity": (capacity(0.9, 0.5), 0.4, capacity(0.5, 0.9), -0.4),
    "dora-directions": (correlations(0.8, -0.3, -0.6), [1.1, 1, 0.9], correlations(-0.1, 0.5, 0.4), [-0.6, -0.7, -0.8]),
    "double-quantisation": (rounded_scales(1.0), 0.37, rounded_scales(2.0), 0.37 - 0.5),
    "early-curves": (early(0.05), 0.05, early(0.5), 0.5),
    "few-records": (from_few(4.0, 4.2), 5, from_few(4.2, 3.99), -5),
    "forgets-less": (forgetting(0.3, 0.5), 1 - 0.3 / 0.5, forgetting(0.5, 0.3), 1 - 0.5 / 0.3),
    "frozen-a": (frozen(3.03), 1, frozen(3.3), 10),
    "full-rank-updates": (ranks(120), 15, ranks(4), 0.5),
    "introduction-complex": (gains(8.0, 6.0), 0.5, gains(6.0, 6.0), 1),
    "introduction-cost": (first_to(10, 40), 0.5 * 10 / 40, first_to(40, 10), 0.5 * 40 / 10),
    "introduction-quality": (gains(6.1, 6.0), 3.9 / 4, gains(8.0, 6.0), 0.5),
    "intruder-dimensions": (intruders(1, 0), 2, intruders(0, 3), -2),
    "learns-less": (learned(3.0, 4.0), 0.25, learned(4.4, 4.0), -0.1),
    "intruders-scaled-down": (halved(0.4, 0.05), 0.35, halved(0.1, 0.3), -0.2),
    "loftq-start": (left_of_error(0.8), 0.2, left_of_error(1.0), 0),
    "lora-plus": (sooner(20, 5), 4, sooner(5, 20), 0.25),
    "low-rank-update": (cut(0.95), [0.95, 0.96, 0.97], cut(0.3), [0.3, 0.31, 0.32]),
    "merged-adds-nothing": (costs(1.0), 1e-6, costs(1.1), 0.1),
    "mlp-and-attention": (added(3.003, 3.0), 0.1, added(3.3, 3.0), 10),
    "mlp-before-attention": (modules(3.3, 3.0), 10, modules(2.7, 3.0), -10),
    "nf4-below-others": (four_bits(0.1, 0.4, 0.2), 0.5, four_bits(0.8, 0.2, 0.3), [4, 8 / 3, 8 / 3]),
    "pissa-first-steps": (first_losses(-0.1), -0.1, first_losses(0.1), 0.1),
    "pissa-quantised-rest": (saved(0.2), 0.2, saved(-0.2), -0.2),
    "planted-rank": (planted(0.005), 0.005, planted(0.5), 0.5),
    "random-a-suffices": (factors(3.8, 3.2), 0.15, factors(3.2, 3.8), -0.15),
    "rank-hardly-matters": (by_rank([5.1, 5.0, 5.2, 5.1]), 4.8 / 5, by_rank([7.0, 6.0, 5.0, 5.0]), 3 / 5),
    "rate-ten-times": (best_rates(1e-2), 10, best_rates(1e-3), 1),
    "rslora-final-loss": (by_scaling(0.1, 0.02), 0.08, by_scaling(0.0, 0.05), -0.05),
    "rslora-first-step": (first_change(0.1), 0.1, first_change(-0.9), -0.9),
    "subspaces-agree": (overlaps(0.6), [0.6, 0.61, 0.62], overlaps(0.0), [0, 0.01, 0.02]),
    "training-on-4-bits": (over_four_bits(0.1), 0.9, over_four_bits(1.5), -0.5),
    "variants-within-two-percent": (variants(3.03), 100 * (3.1 / 3 - 1), variants(3.3), 10),
    "vera": (vectors(6.04), 3.96 / 4, vectors(8.0), 0.5),
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

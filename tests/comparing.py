"""What tests of the comparison share: numbers like those of SmolLM2, and what makes runs at once."""

from pathlib import Path

MEMORY = {  # by owner, in bytes
    "lora": {"program": 75_700_000, "weights": 538_060_032, "adapter": 9_768_960, "gradients": 9_768_960,
             "moments": 19_537_920, "activations": 454_000_000, "scratch": 13_400_000},
    "full": {"program": 75_700_000, "weights": 538_060_032, "gradients": 538_060_032, "moments": 1_076_120_064,
             "scratch": 226_000_000},
}  # fmt: skip


def metrics(method="lora", losses=(3.2, 2.9, 3.0), steps=60, seconds=1.5, **change):
    """Metrics of a run that validated at equal distances."""
    lora = method == "lora"
    number = 2_442_240 if lora else 134_515_008
    predicted = sum(MEMORY[method].values())
    found = {
        "steps": steps,
        "trainable_parameters": number,
        "base_sha256": ["a" * 64, "a" * 64 if lora else "b" * 64],
        "loss": {"paraphrase": [3.6, 1.6 if lora else 1.5], "unseen": [3.5, 2.9], "general": [3.3, 3.4]},
        "keyword_recall": {"paraphrase": [0.1, 0.3], "unseen": [0.14, 0.22]},
        "validation_loss": [[steps * (i + 1) // len(losses), loss] for i, loss in enumerate(losses)],
        "seconds_per_step": seconds,
        "training_seconds": seconds * steps,
        "peak_memory_bytes": {
            "predicted": predicted,
            "measured": predicted + 50_000_000,
            "by_owner": MEMORY[method],
            "activations": 454_000_000 if lora else 440_000_000,
        },
        "adapter_bytes": 4 * number,
    }
    return found | change


class Maker:
    """In place of `apart`: makes a run at once. losses: the validation loss by learning rate; None diverges. `made`
    names what it made, `given` has the options of each run and whether it logs lines.
    """

    def __init__(self, losses, interrupted_at=None):
        self.losses, self.interrupted_at = losses, interrupted_at
        self.made, self.given = [], []

    def __call__(self, function, options, measure, lines):
        if len(self.made) == self.interrupted_at:
            raise KeyboardInterrupt
        self.made.append((options["method"], options["lr"], options["steps"], measure))
        self.given.append((options, lines))
        if measure:
            Path(options["out"]).mkdir(parents=True)
        loss = self.losses[options["lr"]]
        if loss is None:
            return {"failed": "the loss is nan at step 3"}
        found = metrics(options["method"], (loss + 0.1, loss), options["steps"])
        found["peak_memory_bytes"]["measured"] = 10**9 - len(self.made)
        return found


def result(lora=None, full=None, **change):
    """A finished comparison, without its rows."""
    runs = {"lora": lora or metrics(), "full": full or metrics("full", (3.1, 2.85, 2.8), seconds=2.8)}
    found = {
        "options": {"base": "smollm2", "data": "legal", "steps": 60, "batch_size": 8, "search_steps": 24,
                    "price": 0.05, "out": "runs/compare-legal"},
        "machine": {"processor": "AMD EPYC", "cores": 2, "memory_bytes": 16 * 10**9, "system": "Linux"},
        "versions": {"minilora": "0.1.0", "python": "3.11.7", "numpy": "2.4.6"},
        "created": "2026-11-25T19:00:00+00:00",
        "search": {method: {"best": lr, "tried": [[lr, 3.0], [2 * lr, 3.1]], "added": [], "at_edge": False}
                   for method, lr in (("lora", 2e-3), ("full", 2e-4))},
        "runs": runs,
        "peak_bytes": {method: run["peak_memory_bytes"]["measured"] for method, run in runs.items()},
        "wall_seconds": 1100.0,
    }  # fmt: skip
    return found | change

"""One training run that is followed, as a trial: losses on what is learned and on general text, every few steps.

    run = followed_run(lr=2e-3)                                      # LoRA on every linear layer of SmolLM2: minutes
    run = followed_run(lr=2e-4, method="full")
    run = followed_run(lr=1e-2, base="tiny")                         # in seconds
    run["new"], run["old"]                                           # two losses at each look

Claims about pretrained models have a second form on SmolLM2. All of them take their runs from `followed_on_smollm2`
(claims/_shared.py), so that a run that one claim has kept serves the others.
"""

from typing import Any

from ..data.records import read_records
from ..data.samples import encode_records, encode_text
from ..data.splits import split_records
from ..lora.adapters import add_adapter
from ..lora.config import LoraConfig
from ..measure.loss import evenly, mean_loss
from ..models.load import TINY, load
from ..train.loop import fit

LORA_8, FULL = "LoRA, r = 8", "full fine-tuning"
CONTENDERS: dict[str, dict[str, Any]] = {LORA_8: {"lr": 2e-3}, FULL: {"lr": 2e-4, "method": "full"}}
FEW = {"base": "tiny", "steps": 4, "every": 2, "held_out": 4}  # of the smallest form


def followed_run(
    lr: float,
    method: str = "lora",
    seed: int = 0,
    base: str = "smollm2",
    r: int = 8,
    alpha: float = 16,
    steps: int = 40,
    every: int = 10,
    held_out: int = 30,
    schedule: str = "cosine",
) -> dict[str, Any]:
    """Train a base on legal terms with batches of 8, and return losses in nats per scored token.

    lr: the peak, after `fit`'s warm-up. schedule: `fit`'s.
    method: "lora", with r and alpha on every linear layer, or "full", which trains every weight.
    seed: of the adapter's initialisation and of the order of the samples.
    base: as `load` takes it.
    every: steps from one look to the next; the first look is before training.
    held_out: records, or chunks of general text, at most, in each of the sets that are measured.

    Returns {"new": the loss on the validation records at each look; "old": that on presidents' addresses, in chunks of
    128 tokens, where a rise is forgetting; "curve": (step, loss on the validation records); "validation": its last;
    "test": the loss on test records; "before": {"test": that of the base}; "trained": how many parameters}.
    """
    model, tokenizer = load(base)
    splits = split_records(read_records("legal", tokenizer))
    training, new, test = (encode_records(splits[name], tokenizer) for name in ("train", "validation", "test"))
    old = encode_text((TINY / "validation.txt").read_text(encoding="utf-8"), tokenizer, max_length=128)
    found: dict[str, Any] = {"new": [], "old": [], "curve": []}

    def look(step: int) -> None:
        if step % every == 0:
            for name, samples in (("new", new), ("old", old)):
                found[name].append(mean_loss(model, evenly(samples, held_out)))
            found["curve"].append((step, found["new"][-1]))

    if method != "full":
        add_adapter(model, LoraConfig(r=r, lora_alpha=alpha), seed=seed)
    before = {"test": mean_loss(model, evenly(test, held_out))}
    look(0)
    fit(model, training, steps, lr, 8, seed, schedule=schedule, each_step=look)
    after = {"validation": found["new"][-1], "test": mean_loss(model, evenly(test, held_out))}
    return found | after | {"before": before, "trained": sum(p.size for p in model.trainable_parameters().values())}

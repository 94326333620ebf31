"""How fast and how large: every way to run a model, measured side by side on this machine.

`python -m minilora.commands.bench MODE SETTINGS` is the process of one mode; `measure` lets them take turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import bfloat16
from ..engine.tensor import no_grad
from ..lora.adapters import add_adapter
from ..lora.config import LoraConfig
from ..models.gguf import save_gguf
from ..models.load import load, locate
from ..models.tokenizer import Tokenizer
from ..nn.llama import Config, Llama
from ..nn.optim import AdamW
from ..nn.parts import Batch
from ..nn.step import training_step
from ..options import BASE, option
from .environment import circumstances, machine, versions
from .predict import SHAPES
from .process import shape_of
from .turns import Contender, Measured, Work, serve, take_turns

SMOLLM2 = Config(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=100000.0,
)
PROMPT, NEW = 16, 64  # tokens that a generation reads and writes, per stream


@dataclass(frozen=True)
class Settings:
    """What is measured. base: a model's name, file or folder."""

    base: str = option("smollm2", BASE)
    batch_size: int = option(4, "sequences per step")
    length: int = option(128, "tokens per sequence")
    r: int = 8

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("length", 2), ("r", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def path(self) -> Path:
        """Where the base is, pulled if need be."""
        return locate(self.base)

    def config(self) -> Config:
        """The base's shape."""
        return shape_of(str(self.path()))[0]

    def batch(self, vocab_size: int) -> Batch:
        """Random token ids (batch_size, length), all scored, the same in every process."""
        ids = np.random.default_rng(0).integers(0, vocab_size, (self.batch_size, self.length))
        return Batch(ids, ids)


# -- the modes: each sets up and returns its step ----------------------------------------------------------------------


def floor(settings: Settings) -> Work:
    """The matrix products that no LoRA step can do without: y = x Wᵀ and dx = g W of every frozen matrix."""
    config, rng = settings.config(), np.random.default_rng(0)
    tokens = settings.batch_size * settings.length
    shapes = [shape(config) for shape in SHAPES.values()] * config.num_hidden_layers
    shapes.append((config.vocab_size, config.hidden_size))
    weights = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    inputs = {n: rng.standard_normal((tokens, n), dtype=np.float32) for n in {n for shape in shapes for n in shape}}

    def step() -> None:
        for w in weights:
            inputs[w.shape[1]] @ w.T
        for w in reversed(weights):
            inputs[w.shape[0]] @ w

    return step


def floor_arithmetic(settings: Settings) -> int:
    """Floating-point operations of one step of `floor`, a multiplication and an addition counted as two."""
    config = settings.config()
    matrices = config.num_hidden_layers * sum(m * n for m, n in (shape(config) for shape in SHAPES.values()))
    return 4 * settings.batch_size * settings.length * (matrices + config.vocab_size * config.hidden_size)


def lora(settings: Settings, whole: bool = False, **options: Any) -> Work:
    """A training step of LoRA on every linear map: forward, backward, AdamW.

    whole: as a lesson writes it, `loss` and then `backward()`, for the batch as it is; else `loss_and_grad`, in
    micro-batches on all cores. options: of `load`.
    """
    model, _ = load(settings.base, **options)
    add_adapter(model, LoraConfig(r=settings.r, lora_alpha=2 * settings.r, target_modules="all-linear"))
    return _training(model, settings, whole)


def full(settings: Settings) -> Work:
    """A training step of all weights."""
    model, _ = load(settings.base)
    model.requires_grad_(True)
    return _training(model, settings)


def _training(model: Llama, settings: Settings, whole: bool = False) -> Work:
    model.train()
    batch = settings.batch(model.config.vocab_size)
    optimizer = AdamW(model.trainable_parameters(), lr=1e-4)

    def step() -> None:
        training_step(model, optimizer, batch)

    def step_by_step() -> None:
        optimizer.zero_grad()
        model.loss(batch.input_ids, batch.labels).backward()
        optimizer.step()

    return step_by_step if whole else step


def generation(settings: Settings, streams: int, **options: Any) -> Work:
    """The likeliest `NEW` tokens after a prompt of `PROMPT`, for several streams at a time. options: of `load`."""
    model, _ = load(settings.base, **options)
    vocab = model.config.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocab, (streams, PROMPT))

    def step() -> None:
        cache = model.new_cache(streams, PROMPT + NEW)
        tokens = prompts  # (streams, PROMPT), then (streams, 1)
        with no_grad():
            for _ in range(NEW):
                tokens = model(tokens, cache, last=True).data[:, -1].argmax(axis=-1)[:, None]

    return step


def loading(settings: Settings, **options: Any) -> Work:
    """Model and tokenizer, from the file (which the system holds in memory after the first time)."""

    def step() -> None:
        load(settings.base, **options)

    return step


_IMPORT = """
import numpy, time
start = time.perf_counter()
import minilora
print(time.perf_counter() - start)
"""


def importing(settings: Settings) -> Work:
    """`import minilora` in a new Python that has imported NumPy already."""
    command = [sys.executable, "-c", _IMPORT]
    return lambda: float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@dataclass(frozen=True)
class Mode:
    """One way to run: what it is, how it is set up, which modes it takes turns with, and how many tokens a step is."""

    what: str
    setup: Callable[[Settings], Work]
    group: str
    tokens: Callable[[Settings], int] = lambda settings: 0
    packed: bool = False  # does it need a base whose matrices are packed?
    bf16: bool = False  # does it need products in bfloat16?


def _training_mode(what: str, setup: Callable[[Settings], Work], packed: bool = False, bf16: bool = False) -> Mode:
    return Mode(what, setup, "training", lambda settings: settings.batch_size * settings.length, packed, bf16)


def _generation_mode(what: str, streams: int, **options: Any) -> Mode:
    bf16 = options.get("dtype") == "bfloat16"
    return Mode(what, lambda s: generation(s, streams, **options), "generation", lambda s: streams * NEW, bf16=bf16)


MODES = {
    "floor": _training_mode("matrix products alone", floor),
    "lora": _training_mode("LoRA, loss_and_grad", lora),
    "lora-backward": _training_mode("LoRA, loss, backward", lambda s: lora(s, whole=True)),
    "full": _training_mode("full fine-tuning", full),
    "quantized": _training_mode("LoRA, packed base", lambda s: lora(s, quantized=True), True),
    "bf16": _training_mode("LoRA, bfloat16", lambda s: lora(s, dtype="bfloat16"), bf16=True),
    "recompute": _training_mode("LoRA, recomputed", lambda s: lora(s, recompute=True)),
    "quantized-recompute": _training_mode("LoRA, both", lambda s: lora(s, quantized=True, recompute=True), True),
    "quantized-bf16": _training_mode(
        "LoRA, packed, bfloat16", lambda s: lora(s, quantized=True, dtype="bfloat16"), True, True
    ),
    "generate": _generation_mode("generation", 1),
    "generate-8": _generation_mode("8 streams", 8),
    "generate-16": _generation_mode("16 streams", 16),
    "generate-bf16": _generation_mode("generation, bfloat16", 1, dtype="bfloat16"),
    "generate-8-bf16": _generation_mode("8 streams, bfloat16", 8, dtype="bfloat16"),
    "generate-16-bf16": _generation_mode("16 streams, bfloat16", 16, dtype="bfloat16"),
    "load": Mode("loading", loading, "loading"),
    "load-quantized": Mode("loading, packed", lambda s: loading(s, quantized=True), "loading", packed=True),
    "import": Mode("import minilora", importing, "import"),
}


# -- measuring ---------------------------------------------------------------------------------------------------------


def contender(mode: str, settings: Settings) -> Contender:
    """The process of one mode."""
    return Contender(mode, [sys.executable, "-m", __name__, mode, json.dumps(asdict(settings))])


def check(modes: Sequence[str], rounds: int) -> None:
    """Raise ValueError for a mode that does not exist, or for no round at all."""
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"no mode is called {unknown[0]!r}; known: {', '.join(MODES)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")


def impossible(modes: Sequence[str], settings: Settings | None = None) -> dict[str, str]:
    """Those of `modes` that cannot run, with the reason: a Hugging Face folder holds no packed matrices, and not every
    machine has products in bfloat16. settings: None for random weights, which are packed.

    Raises ValueError where that is all of them.
    """
    found, why_not = {}, bfloat16.why_not()
    if settings is not None and settings.path().is_dir():
        found = {mode: f"{settings.base} holds no packed matrices" for mode in modes if MODES[mode].packed}
    found |= {mode: why_not for mode in modes if MODES[mode].bf16 and why_not}
    if modes and len(found) == len(modes):
        raise ValueError("; ".join(f"{reason}, which {mode} needs" for mode, reason in found.items()))
    return found


def measure(
    settings: Settings,
    modes: Sequence[str] = tuple(MODES),
    rounds: int = 7,
    done: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """Measure `modes`, those of a group in turns, and return all that `minilora bench --json` prints.

    done: called when a mode is ready and after each of its turns, 1 + rounds times per mode.
    Modes that the base cannot run are left out. Raises ValueError for an unknown mode, BenchError when a mode fails.
    """
    check(modes, rounds)
    settings.path()  # pulled once, not by every process
    left_out = impossible(modes, settings)
    modes = [mode for mode in modes if mode not in left_out]
    results: dict[str, Measured] = {}
    for group in dict.fromkeys(mode.group for mode in MODES.values()):
        chosen = [contender(name, settings) for name in MODES if name in modes and MODES[name].group == group]
        results |= take_turns(chosen, rounds, done)
    first = results["floor"].median if "floor" in results else None
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": asdict(settings) | {"rounds": rounds},
        "left_out": left_out,
        "floor_gflops": floor_arithmetic(settings) / first / 1e9 if first else None,
        "modes": {name: _row(name, results[name], settings, first) for name in results},
    }


def _row(name: str, measured: Measured, settings: Settings, floor_seconds: float | None) -> dict[str, Any]:
    mode, median = MODES[name], measured.median
    tokens = mode.tokens(settings)
    return {
        "seconds": median,
        "fastest": min(measured.seconds),
        "ratio_to_floor": median / floor_seconds if floor_seconds and mode.group == "training" else None,
        "tokens_per_second": tokens / median if tokens else None,
        "peak_memory_bytes": measured.peak_bytes if mode.group != "import" else None,  # another process was measured
    }


def table(result: dict[str, Any]) -> str:
    """What `measure` returned, for people, in 80 columns; only a longer path stands on a longer line."""
    settings = result["settings"]
    what = (
        f"{settings['base']}: {settings['batch_size']} x {settings['length']} tokens per step, all-linear "
        f"r={settings['r']}; generation of {NEW} tokens after {PROMPT}; median of {settings['rounds']}, in turns"
    )
    lines = [
        *_wrapped(circumstances(result)),
        *_wrapped(what),
        "",
        f"{'mode':<22}{'':<22}{'seconds':>9}{'to floor':>9}{'tokens/s':>9}{'peak MB':>9}",
    ]
    columns = (("seconds", 9, ".3f", 1), ("ratio_to_floor", 9, ".2f", 1),
               ("tokens_per_second", 9, ",.0f", 1), ("peak_memory_bytes", 9, ",.0f", 1e-6))  # fmt: skip
    for name, row in result["modes"].items():
        cells = [f"{format(row[key] * unit, how) if row[key] else '':>{width}}" for key, width, how, unit in columns]
        lines.append((f"{name:<22}{MODES[name].what:<22}" + "".join(cells)).rstrip())
    for reason in dict.fromkeys(result["left_out"].values()):
        names = ", ".join(mode for mode, why in result["left_out"].items() if why == reason)
        lines += _wrapped(f"left out: {names}: {reason}")
    if result["floor_gflops"]:
        lines.append(f"\nThe matrix products alone run at {result['floor_gflops']:.0f} GFLOP/s.")
    return "\n".join(lines)


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 80, break_long_words=False, break_on_hyphens=False)


# -- random weights ----------------------------------------------------------------------------------------------------


def write_random(path: Path, config: Config = SMOLLM2) -> Path:
    """Write a GGUF file of random weights in 4 and 8 bits, as the real model's: as much work, and no download."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers

    core = Core(models.BPE({"<end>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    state = Llama(config, np.random.default_rng(0)).state_dict()
    return save_gguf(path, config, state, Tokenizer(core, "<end>", "{{ messages }}", "", 0), kind="Q4_1")


def measure_random(settings: Settings, **options: Any) -> dict[str, Any]:
    """`measure` on random weights of SmolLM2's shape."""
    with tempfile.TemporaryDirectory(prefix="minilora-bench-") as folder:
        path = Path(folder) / "random.gguf"
        subprocess.run([sys.executable, "-m", __name__, "write", str(path)], check=True)  # its memory is its own
        result = measure(Settings(**asdict(settings) | {"base": str(path)}), **options)
    result["settings"]["base"] = "random weights"
    return result


if __name__ == "__main__":
    task, argument = sys.argv[1:]
    if task == "write":
        write_random(Path(argument))
    else:
        sys.exit(serve(lambda: MODES[task].setup(Settings(**json.loads(argument)))))

"""The ways to run a model that `minilora bench` measures: training steps, generation, loading.

`python -m minilora.measure.bench MODE SETTINGS` is the process of one mode, which `take_turns` talks to.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.tensor import no_grad
from ..lora.adapters import add_adapter
from ..lora.config import LoraConfig
from ..models.gguf import save_gguf
from ..models.load import load, locate
from ..models.tokenizer import Tokenizer
from ..nn.language_model import LanguageModel
from ..nn.llama import Config, Llama
from ..nn.optim import AdamW
from ..nn.parts import Batch
from ..nn.step import training_step
from ..options import BASE, check, option
from .blocks import matrices
from .memory import shape_of
from .turns import Contender, Work, serve

SMOLLM2 = Config(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0,
)  # fmt: skip
PROMPT, NEW = 16, 64  # tokens that a generation reads and writes, per stream


@dataclass(frozen=True)
class Settings:
    """What is measured. base: a model's name, file or folder."""

    base: str = option("smollm2", BASE)
    batch_size: int = option(4, "sequences per step", least=1)
    length: int = option(128, "tokens per sequence", least=2)
    r: int = 8

    def __post_init__(self):
        check(self)

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
    """The matmuls that every LoRA step needs: y = x Wᵀ and dx = g W of every frozen matrix."""
    config, rng = settings.config(), np.random.default_rng(0)
    tokens = settings.batch_size * settings.length
    shapes = [(m, n) for _, m, n in matrices(config)] * config.num_hidden_layers
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
    """FLOPs of one step of `floor`: a multiplication and an addition count as two."""
    config = settings.config()
    in_blocks = config.num_hidden_layers * sum(m * n for _, m, n in matrices(config))
    return 4 * settings.batch_size * settings.length * (in_blocks + config.vocab_size * config.hidden_size)


def lora(settings: Settings, whole: bool = False, **options: Any) -> Work:
    """A training step of LoRA on every linear layer: forward, backward, AdamW.

    whole: `loss` and then `backward()` of the batch as it is, as lessons write it; else `loss_and_grad`, in
        micro-batches on all cores.
    options: of `load`.
    """
    model, _ = load(settings.base, **options)
    add_adapter(model, LoraConfig(r=settings.r, lora_alpha=2 * settings.r, target_modules="all-linear"))
    return _training(model, settings, whole)


def full(settings: Settings) -> Work:
    """A training step of all weights."""
    model, _ = load(settings.base)
    model.requires_grad_(True)
    return _training(model, settings)


def _training(model: LanguageModel, settings: Settings, whole: bool = False) -> Work:
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
    """Greedy decoding of `NEW` tokens after a prompt of `PROMPT`, for several streams at a time. options: of `load`."""
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
    """Load model and tokenizer from the file, which the system caches after the first time."""

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
    """One way to run a model. group: the modes it takes turns with. tokens: those of a step, for tokens per second."""

    what: str
    setup: Callable[[Settings], Work]
    group: str
    tokens: Callable[[Settings], int] = lambda settings: 0
    quantized: bool = False  # does it need a base with quantised matrices?
    bf16: bool = False  # does it need a machine that multiplies in bfloat16?


def _training_mode(what: str, setup: Callable[[Settings], Work], quantized: bool = False, bf16: bool = False) -> Mode:
    return Mode(what, setup, "training", lambda settings: settings.batch_size * settings.length, quantized, bf16)


def _generation_mode(what: str, streams: int, **options: Any) -> Mode:
    bf16 = options.get("dtype") == "bfloat16"
    return Mode(what, lambda s: generation(s, streams, **options), "generation", lambda s: streams * NEW, bf16=bf16)


MODES = {
    "floor": _training_mode("matmuls alone", floor),
    "lora": _training_mode("LoRA, loss_and_grad", lora),
    "lora-backward": _training_mode("LoRA, loss, backward", lambda s: lora(s, whole=True)),
    "full": _training_mode("full fine-tuning", full),
    "quantized": _training_mode("LoRA, quantised base", lambda s: lora(s, quantized=True), True),
    "bf16": _training_mode("LoRA, bfloat16", lambda s: lora(s, dtype="bfloat16"), bf16=True),
    "recompute": _training_mode("LoRA, checkpointing", lambda s: lora(s, recompute=True)),
    "quantized-recompute": _training_mode("LoRA, both", lambda s: lora(s, quantized=True, recompute=True), True),
    "quantized-bf16": _training_mode(
        "LoRA, quantised, bf16", lambda s: lora(s, quantized=True, dtype="bfloat16"), True, True
    ),
    "generate": _generation_mode("generation", 1),
    "generate-8": _generation_mode("8 streams", 8),
    "generate-16": _generation_mode("16 streams", 16),
    "generate-bf16": _generation_mode("generation, bfloat16", 1, dtype="bfloat16"),
    "generate-8-bf16": _generation_mode("8 streams, bfloat16", 8, dtype="bfloat16"),
    "generate-16-bf16": _generation_mode("16 streams, bfloat16", 16, dtype="bfloat16"),
    "load": Mode("loading", loading, "loading"),
    "load-quantized": Mode("loading, quantised", lambda s: loading(s, quantized=True), "loading", quantized=True),
    "import": Mode("import minilora", importing, "import"),
}


def contender(mode: str, settings: Settings) -> Contender:
    """The process of one mode."""
    return Contender(mode, [sys.executable, "-m", __name__, mode, json.dumps(asdict(settings))])


# -- random weights ---------------------------------------------------------------------------------------------------


def write_random(path: str, config: Config = SMOLLM2) -> None:
    """Write a GGUF file of random weights in 4 and 8 bits, like the real model's: as much work, and no download."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers

    core = Core(models.BPE({"<end>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    state = Llama(config, np.random.default_rng(0)).state_dict()
    save_gguf(Path(path), config, state, Tokenizer(core, "<end>", "{{ messages }}", "", 0), kind="Q4_1")


if __name__ == "__main__":
    mode, settings = sys.argv[1:]
    sys.exit(serve(lambda: MODES[mode].setup(Settings(**json.loads(settings)))))

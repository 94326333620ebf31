"""What minilora is measured against, and what the two sides do differently: one process each.

`python tests/benchmarks/contenders.py NAME FOLDER` answers as `minilora.measure.turns.serve` says. FOLDER is a Hugging
Face copy of the model, which NAME "copy" writes. Random inputs are those of `minilora.measure.bench`.
"""

import math
import os
import shutil
import sys
import time
import warnings
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from minilora.engine import onednn
from minilora.measure.bench import NEW, PROMPT, Settings, lora
from minilora.measure.turns import serve

BASE = "smollm2"
RECORDS = 40  # of the legal data's training set, evenly chosen: what is measured of an epoch
KEPT = ExitStack()  # what lasts as long as this process
ITERATIONS = 1000  # of the small network, per turn


# -- torch, PEFT and transformers --------------------------------------------------------------------------------------


def causal_lm(folder, dtype="float32"):
    """The model as transformers loads it, in float32 or bfloat16."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def peft_model(folder, dtype="float32", r=8):
    """The same with LoRA on every linear layer; over a base in bfloat16 PEFT keeps the adapter in float32."""
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
    return peft.get_peft_model(causal_lm(folder, dtype), config)


def torch_training(model, settings, compiled=False):
    """Forward, backward, AdamW on random tokens; compiled: under `torch.compile`, in the warm-up."""
    import torch

    model.train()
    model = torch.compile(model) if compiled else model
    ids = torch.tensor(settings.batch(model.config.vocab_size).input_ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step():
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return step


def transformers_generation(folder, streams, dtype="float32"):
    """`generate` with its cache: the likeliest NEW tokens after PROMPT."""
    import torch

    model = causal_lm(folder, dtype).eval()
    ids = torch.tensor(np.random.default_rng(0).integers(0, model.config.vocab_size, (streams, PROMPT)))
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

    def step():
        model.generate(ids, attention_mask=torch.ones_like(ids), **fixed)

    return step


# -- a share of an epoch of the legal data -----------------------------------------------------------------------------


def samples(tokenizer):
    """RECORDS records as token ids and labels; only answers are scored."""
    from minilora.data.records import read_records
    from minilora.data.samples import encode_record
    from minilora.data.splits import split_records

    records = split_records(read_records("legal"))["train"]
    return [encode_record(record, tokenizer) for record in records[:: len(records) // RECORDS][:RECORDS]]


def minilora_epoch(batch_size):
    """As `minilora finetune` runs it: packed without padding, a common beginning computed once."""
    import minilora as ml
    from minilora.train.loop import fit

    model, tokenizer = ml.load(BASE)
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    chosen = samples(tokenizer)
    steps = math.ceil(RECORDS / batch_size)

    def step():
        fit(model, chosen, steps, lr=1e-4, batch_size=batch_size)

    return step


def peft_epoch(folder):
    """The usual loop: batches of 4, padded to the longest, clipped, AdamW."""
    import torch

    from minilora.models.tokenizer import from_folder

    tokenizer = from_folder(Path(folder))
    chosen = samples(tokenizer)
    model = peft_model(folder).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def padded(rows, value):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)

    def step():
        order = np.random.default_rng(0).permutation(RECORDS)
        for i in range(0, RECORDS, 4):
            batch = [chosen[j] for j in order[i : i + 4]]
            ids = padded([sample.ids for sample in batch], tokenizer.pad_id)
            mask = padded([[1] * len(sample.ids) for sample in batch], 0)
            labels = padded([sample.labels for sample in batch], -100)
            optimizer.zero_grad()
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

    return step


# -- a small network: 64-128-128-10, batches of 32, plain gradient descent ---------------------------------------------

SIZES = ((64, 128), (128, 128), (128, 10))
LEARNING_RATE = 0.01


def small_problem():
    """Inputs (32, 64), classes (32), weights (inputs, outputs) and biases, in float32."""
    rng = np.random.default_rng(0)
    weights = [(rng.standard_normal(size) / math.sqrt(size[0])).astype(np.float32) for size in SIZES]
    biases = [np.zeros(size[1], np.float32) for size in SIZES]
    return rng.standard_normal((32, 64)).astype(np.float32), rng.integers(0, 10, 32), weights, biases


def repeated(iteration):
    """A step of ITERATIONS iterations that returns the seconds of one."""

    def step():
        start = time.perf_counter()
        for _ in range(ITERATIONS):
            iteration()
        return (time.perf_counter() - start) / ITERATIONS

    return step


def minilora_mlp():
    """minilora's layers, loss and optimizer."""
    import minilora as ml
    from minilora.engine.fused import cross_entropy, linear
    from minilora.engine.ops import relu

    x, classes, weights, biases = small_problem()
    parameters = [(ml.Parameter(w.T.copy()), ml.Parameter(b)) for w, b in zip(weights, biases, strict=True)]
    optimizer = ml.SGD([p for pair in parameters for p in pair], lr=LEARNING_RATE)
    (w1, b1), (w2, b2), (w3, b3) = parameters

    def iteration():
        optimizer.zero_grad()
        hidden = relu(linear(relu(linear(x, w1, b1)), w2, b2))
        cross_entropy(linear(hidden, w3, b3), classes).backward()
        optimizer.step()

    return repeated(iteration)


def torch_mlp(compiled=False):
    """The same in torch, eager or under `torch.compile`."""
    import torch

    x, classes, weights, biases = small_problem()
    x, classes = torch.tensor(x), torch.tensor(classes)
    layers = [torch.nn.Linear(*size) for size in SIZES]
    with torch.no_grad():
        for layer, w, b in zip(layers, weights, biases, strict=True):
            layer.weight.copy_(torch.tensor(w.T))
            layer.bias.copy_(torch.tensor(b))
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    model = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def iteration():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), classes).backward()
        optimizer.step()

    return repeated(iteration)


def mygrad_mlp():
    """The same in MyGrad."""
    import mygrad
    from mygrad.nnet.activations import relu
    from mygrad.nnet.losses import softmax_crossentropy

    x, classes, weights, biases = small_problem()
    weights, biases = [mygrad.tensor(w) for w in weights], [mygrad.tensor(b) for b in biases]

    def iteration():
        hidden = relu(mygrad.matmul(relu(mygrad.matmul(x, weights[0]) + biases[0]), weights[1]) + biases[1])
        softmax_crossentropy(mygrad.matmul(hidden, weights[2]) + biases[2], classes).backward()
        for p in (*weights, *biases):
            p.data -= LEARNING_RATE * p.grad

    return repeated(iteration)


def autograd_mlp():
    """The same in HIPS autograd."""
    import autograd.numpy as anp
    from autograd import grad

    x, classes, weights, biases = small_problem()
    rows = np.arange(len(classes))

    def loss(weights, biases):
        hidden = anp.maximum(anp.dot(x, weights[0]) + biases[0], 0)
        hidden = anp.maximum(anp.dot(hidden, weights[1]) + biases[1], 0)
        scores = anp.dot(hidden, weights[2]) + biases[2]
        scores = scores - anp.max(scores, axis=1, keepdims=True)
        return anp.mean(anp.log(anp.sum(anp.exp(scores), axis=1)) - scores[rows, classes])

    gradients = grad(loss, (0, 1))

    def iteration():
        for group, slopes in zip((weights, biases), gradients(weights, biases), strict=True):
            for p, slope in zip(group, slopes, strict=True):
                p -= LEARNING_RATE * slope

    return repeated(iteration)


# -- by name -----------------------------------------------------------------------------------------------------------

TORCH = ("torch", "transformers", "peft")
COMPILER = "a C++ compiler"  # what `torch.compile` needs besides torch
STEP, LONG = Settings(BASE), Settings(BASE, batch_size=1, length=2048)


def _peft(settings, dtype="float32", compiled=False):
    return lambda folder: torch_training(peft_model(folder, dtype), settings, compiled)


def _numpy_alone():
    """minilora's LoRA step where oneDNN does not run: NumPy's own BLAS multiplies."""
    onednn.float32_factor = lambda w: None
    return lora(STEP)


CONTENDERS = {  # name: (what it needs, how it is set up in FOLDER)
    "lora-numpy": ((), lambda folder: _numpy_alone()),
    "peft-lora": (TORCH, _peft(STEP)),
    "peft-lora-bfloat16": (TORCH, _peft(STEP, "bfloat16")),
    "peft-lora-compiled": ((*TORCH, COMPILER), _peft(STEP, compiled=True)),
    "torch-full": (TORCH, lambda folder: torch_training(causal_lm(folder), STEP)),
    "minilora-epoch": ((), lambda folder: minilora_epoch(8)),
    "minilora-epoch-4": ((), lambda folder: minilora_epoch(4)),
    "peft-epoch": (TORCH, peft_epoch),
    "transformers": (TORCH, lambda folder: transformers_generation(folder, 1)),
    "transformers-8": (TORCH, lambda folder: transformers_generation(folder, 8)),
    "transformers-bfloat16": (TORCH, lambda folder: transformers_generation(folder, 1, "bfloat16")),
    "transformers-8-bfloat16": (TORCH, lambda folder: transformers_generation(folder, 8, "bfloat16")),
    "peft-2048": (TORCH, _peft(LONG)),
    "peft-2048-bfloat16": (TORCH, _peft(LONG, "bfloat16")),
    "peft-2048-compiled": ((*TORCH, COMPILER), _peft(LONG, compiled=True)),
    "minilora-mlp": ((), lambda folder: minilora_mlp()),
    "torch-mlp": (("torch",), lambda folder: torch_mlp()),
    "torch-mlp-compiled": (("torch", COMPILER), lambda folder: torch_mlp(compiled=True)),
    "mygrad-mlp": (("mygrad",), lambda folder: mygrad_mlp()),
    "autograd-mlp": (("autograd",), lambda folder: autograd_mlp()),
}


def missing(name):
    """What a contender needs and does not find."""

    def found(what):
        if what == COMPILER:
            return any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "cl"))))
        return find_spec(what) is not None

    return [what for what in CONTENDERS.get(name, ((), None))[0] if not found(what)]


def write_copy(folder):
    """Write the model as a Hugging Face folder."""
    from minilora.models.folder import save_folder
    from minilora.models.load import load

    model, tokenizer = load(BASE)
    save_folder(folder, model.config, model.state_dict(), tokenizer)


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    if name == "copy":
        write_copy(folder)
    else:
        sys.exit(serve(lambda: CONTENDERS[name][1](folder)))

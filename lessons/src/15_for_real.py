# %% [markdown]
# # Lesson 15: How do I do it for real?
#
# "Let's say you want a chatbot that understands legal language. You can apply LoRA to a pre-trained model and teach it
# legal terminology." So a popular introduction has it, in one sentence. Here is the sentence, in eight steps, on a
# real model: SmolLM2-135M-Instruct, which talks. Then the same training without LoRA, and the introduction's table with
# your own numbers in place of "high" and "low".
#
# The model is no part of minilora. `minilora pull smollm2` fetches it, once; where there is a network, step 1 does so,
# too. Where there is none, read on all the same: the outputs below are those of a run on two cores. With `BASE =
# "tiny"` every cell runs without the model, on the small base of the lessons before.

# %%
import tempfile
import time

import minilora as ml
from minilora.course import claim, show
from minilora.measure.process import peak_memory
from minilora.models.folder import save_folder
from minilora.pages.style import FULL, LORA, ink, panels

BASE = "smollm2"
STEPS, BATCH = 12, 4  # a taste: `minilora finetune` goes over all records several times

# %% [markdown]
# ## Step 1: choose a model
#
# It must speak already: LoRA teaches a field, not a language (lesson 14). It must fit your machine. And you must be
# allowed to use it: SmolLM2's licence is Apache-2.0. Since a frozen base takes up no small changes, it may be stored in
# few bits (lesson 11): `quantized=True` leaves the matrices packed as they stand in their file, in blocks of 4-bit
# codes, the embedding in 8-bit ones, and unpacks each when a product needs it.

# %%
model, tokenizer = ml.load(BASE, quantized=BASE != "tiny")  # the tiny base's file holds nothing packed
base = ml.base_state(model)
P, base_bytes = sum(array.size for array in base.values()), sum(array.nbytes for array in base.values())
print(f"{P:,} parameters: {4 * P / 1e6:.0f} MB in float32, {base_bytes / 1e6:.0f} MB as loaded")
print(f"{8 * base_bytes / P:.2f} bits for each")

# %% [markdown]
# ## Step 2: collect data
#
# Most of the work of a real project is here. We have some hundred terms of law, each with a question and an answer.
# They are divided *before* anything is trained: who measures on what was trained measures memory.

# %%
records = ml.split_records(ml.read_records("legal"))
samples = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
for split, part in samples.items():
    tokens, scored = sum(len(sample.ids) for sample in part), sum(sample.scored for sample in part)
    print(f"{split:<10} {len(part):>3} records, {tokens:>6,} tokens, {scored:>6,} of them of answers")
for message in records["test"][0].messages:
    print(f"{message['role']:>9}: {message['content']}")

# %% [markdown]
# Only the tokens of answers are scored: the model is to learn to answer, not to ask. A file of your own is one line per
# record, `{"question": ..., "answer": ...}`, and `minilora data mine.jsonl` shows how it is understood.
#
# ## Step 3: choose where, and which rank
#
# Lesson 10 gives the start: all linear layers, r = 8, α = 2r. Count before you train, by the formula of lesson 11,
# r (m + n) for each matrix. And predict the memory: `ml.predict_memory` does it from shapes alone.
#
# > **Predict.** Adam in float32 takes 16 bytes for each number that learns. How much memory will a step of full
# > fine-tuning hold, activations included? How much of it is left with LoRA on the packed base: a half, a tenth?

# %%
r = 8
config = ml.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
a = sum(r * sum(array.shape) for name, array in base.items() if "_proj" in name)
batch = samples["train"][:BATCH]
steps = {
    "full": ml.Step.of(model.config, batch, threads=2),
    "LoRA": ml.Step.of(model.config, batch, threads=2, rank=r, base_bytes=base_bytes),
}
for name, step in steps.items():
    memory = ml.predict_memory(step)
    owners = ", ".join(f"{owner} {size / 1e6:,.0f}" for owner, size in memory.by_owner().items())
    print(f"{name}: {memory.total / 1e6:,.0f} MB ({owners})")

# %% [markdown]
# ## Step 4: freeze
#
# One line adds A and B to every matrix and freezes the rest. Before it, we note three things that must not be taken on
# trust: the loss on terms that will not be trained, the base's fingerprint (lesson 9), and that the new adapter
# changes nothing yet (lesson 8).

# %%
before, fingerprint = ml.mean_loss(model, samples["test"]), ml.sha256_of(base)
few = samples["test"][:4]
start = ml.mean_loss(model, few)
ml.add_adapter(model, config, name="legal", seed=0)
print(ml.count_parameters(model))
claim("numbers that learn, less those of the formula", ml.count_parameters(model).trainable - a, 0, 0)
claim("loss moved by the new adapter", ml.mean_loss(model, few) - start, 0, 0)

# %% [markdown]
# ## Step 5: train
#
# > **Predict.** The model reads a fifth of the 240 answers, each once. It is then asked about 30 *other* terms. By how
# > much does its loss on these fall: not at all, a hundredth, a tenth, a half?

# %%
began = time.process_time()  # core seconds, as the system counts them for this process
history = ml.fit(model, samples["train"], steps=STEPS, lr=2e-3, batch_size=BATCH, seed=0)
seconds, peak = {"LoRA": (time.process_time() - began) / STEPS}, {"LoRA": peak_memory()}
print("loss on what is trained, step by step:", *(f"{loss:.2f}" for loss in history.losses))

# %% [markdown]
# ## Step 6: evaluate
#
# On what it has never seen, and on the promise that the base is still the base.

# %%
after = {"LoRA": ml.mean_loss(model, samples["test"])}
print(f"loss on terms never seen: {before:.3f} before, {after['LoRA']:.3f} after")
claim("its change, in percent", 100 * (after["LoRA"] / before - 1), -50, -10)
claim("fingerprint of the base unchanged (1: yes)", ml.sha256_of(ml.base_state(model)) == fingerprint, 1, 1)

# %% [markdown]
# More than a fifth, from a fifth of the answers, read once. What it learned cannot be facts about these 30 terms, since
# it was not told any: it is how such an answer is built ("A ... is ... It matters because ..."), and the vocabulary of
# the field. Style is cheap (lesson 14). Facts come with more passes, and with them the danger of learning by heart,
# which costs on unseen terms and on everything else: see the [page of a long run](pictures/finetune.txt). So `minilora
# finetune` measures as it goes, and keeps the best; of that it keeps a part (`--strength`), since most of a gain comes
# with the first half of an update (lesson 13), and a smaller one forgets less.
#
# ## Step 7: save the adapter

# %%
folder = ml.save_adapter(model, tempfile.mkdtemp(prefix="legal-"), name="legal")
for path in sorted(folder.iterdir()):
    print(f"{path.name:<27}{path.stat().st_size:>11,} bytes")
disk = {"LoRA": sum(path.stat().st_size for path in folder.iterdir()), "full": 4 * P}
claim("a copy of the model in float32, in such folders", disk["full"] / disk["LoRA"], 10, 60)

# %% [markdown]
# ## Step 8: use it
#
# On another day, in another program: load the base, load the folder, ask. The answers are cut short, since each word
# takes time, and they come from a model of this size: fluent, often wrong, and no advice.

# %%
model, _ = ml.load(BASE, quantized=BASE != "tiny")
ml.load_adapter(model, folder, name="legal")
learned = ml.mean_loss(model, few)
ml.set_adapter(model, None)
claim(
    "loss of the base under the adapter that is switched off, against the start", ml.mean_loss(model, few) - start, 0, 0
)
print(f"adapter on: {learned:.3f}, off: {start:.3f}")

# %% tags=["measured"]
question = "What is a tort?"
print("base:   ", ml.generate(model, tokenizer, question, max_new_tokens=40).replace("\n", " "))
ml.set_adapter(model, "legal")
print("adapter:", ml.generate(model, tokenizer, question, max_new_tokens=40).replace("\n", " "))

# %% [markdown]
# The loss told half of it: the adapter has the form of our answers, and after so few steps it can fall into a loop in
# the very sentence that it has seen most often. Always read what a model says.
#
# ## The other way: full fine-tuning
#
# The same records in the same order, as many steps, everything learns. It cannot be done on a packed base: a small step
# would be rounded away. Its learning rate is a tenth of LoRA's (lesson 10).
#
# > **Predict.** 55 times more numbers learn now. Which of these becomes 55 times larger: memory, time of a step, size
# > on disk, what is learned?

# %%
del model, base  # its memory is free again, and the peak from here on is that of full fine-tuning
whole, _ = ml.load(BASE)
whole.requires_grad_(True)
began = time.process_time()
ml.fit(whole, samples["train"], steps=STEPS, lr=2e-4, batch_size=BATCH, seed=0)
seconds["full"], peak["full"] = (time.process_time() - began) / STEPS, peak_memory()
after["full"] = ml.mean_loss(whole, samples["test"])
for name, loss in after.items():
    print(f"{name}: loss on terms never seen {before:.3f} -> {loss:.3f}")
gains = {name: before - loss for name, loss in after.items()}
claim("what LoRA gains, in percent of full", 100 * gains["LoRA"] / gains["full"], 50, 250)
claim("fingerprint unchanged after full fine-tuning (0: no)", ml.sha256_of(ml.base_state(whole)) == fingerprint, 0, 0)

# %% [markdown]
# ## The table
#
# | the introduction | full fine-tuning | LoRA |
# |---|---|---|
# | parameters updated | all | very few |
# | GPU cost | high | low |
# | speed | slow | fast |
# | storage | large | small |
#
# And with numbers, those of this page. Time is counted in core seconds: on two idle cores a step takes about half as
# many by the clock, and whatever else the machine does is not counted. Cost is core hours times a price: we take 0.0425
# US dollars, what 0.34 dollars an hour for 8 cores come to. Put in your own.

# %% tags=["measured"]
PRICE = 0.0425  # dollars per core and hour
dollars = {name: 1000 * each * PRICE / 3600 for name, each in seconds.items()}
table = {  # row: (unit, LoRA, full)
    "parameters updated": ("million", a / 1e6, P / 1e6),
    "memory, peak of the process": ("MB", peak["LoRA"] / 1e6, peak["full"] / 1e6),
    "time of a step": ("core seconds", seconds["LoRA"], seconds["full"]),
    "cost of 1,000 steps": ("dollars", dollars["LoRA"], dollars["full"]),
    "a version on disk": ("MB", disk["LoRA"] / 1e6, disk["full"] / 1e6),
    "gained on unseen terms": ("nats", gains["LoRA"], gains["full"]),
}
for row, (unit, lora, other) in table.items():
    print(f"{row:<28}{lora:>10,.3g}{other:>11,.4g} {unit:<13} LoRA / full = {lora / other:.3f}")

# %% tags=["measured"]
figure, axes = panels(height=3.4)
for y, (unit, lora, other) in enumerate(table.values()):
    share = 100 * lora / other
    axes.plot([share, 100], [y, y], color=LORA, linewidth=1.5, alpha=0.35)
    axes.plot(share, y, "o", color=LORA, markersize=8)
    beside, side = ((-9, 0), "right") if share < 100 else ((9, 0), "left")
    axes.annotate(
        f"{share:.3g} %", (share, y), beside, textcoords="offset points", ha=side, va="center", color=ink(LORA)
    )
    axes.text(1500, y, f"{lora:,.3g} of {other:,.4g} {unit}", va="center")
axes.axvline(100, color=FULL, linewidth=1.5)
axes.annotate("full fine-tuning", (100, -0.8), (6, 0), textcoords="offset points", color=ink(FULL), va="center")
axes.set(xscale="log", xlim=(0.6, 60_000), ylim=(len(table) - 0.5, -1.2), xlabel="LoRA, in percent of full fine-tuning")
axes.set_xticks([1, 10, 100], ["1", "10", "100"])
axes.minorticks_off()
axes.set_yticks(range(len(table)), list(table))
axes.tick_params(axis="y", length=0)
axes.spines[["top", "right"]].set_visible(False)
show(
    figure, alt="LoRA's share of full fine-tuning for six rows: near 2 percent in two of them, far more in the others."
)

# %% [markdown]
# *How to read it.* Each dot is a row of the table; the line at 100 is full fine-tuning, and further left is less. In
# all rows but the last, less is better.
#
# - **Parameters updated, storage**: true, and by what lesson 11 computes: r (m + n) in place of m n.
# - **GPU cost**: about five times less memory, because gradients and moments go *and* the base is packed. Freezing
#   alone would leave the base in float32. Activations stay (lesson 12). The process holds more than we predicted, since
#   Python and its libraries are in it, too.
# - **Speed**: a third less. Two products in place of three, and no Adam on what is frozen; it is no matter of 55 times,
#   and unpacking takes some of it back.
# - **Cost**: per step it is the time's ratio and nothing else, on the same machine. It becomes *much* cheaper where
#   LoRA needs a smaller machine, or another version costs no new copy.
# - **A slight drop in performance**: the last row, 8 % of the gain. One seed, few steps, rates that were not
#   searched: `minilora compare` searches them for both and judges every row.
#
# ## To PEFT and back
#
# The folder is in PEFT's format, so torch can go on from here. Whether it *is* the same adapter is a number: logits
# there and here, on the same base and the same tokens. (PEFT, transformers and torch are no part of minilora:
# `pip install minilora[parity]`.)

# %% tags=["measured"]
del whole
try:
    import peft, torch, transformers, warnings  # noqa: E401, I001
except ImportError as error:
    print(f"{error.name} is not installed: pip install 'minilora[parity]', and run this cell again")
else:
    warnings.simplefilter("ignore")  # what these libraries tell each other
    transformers.utils.logging.disable_progress_bar()
    model, _ = ml.load(BASE)
    ids = torch.tensor([few[0].ids])
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as back:
        save_folder(home, model.config, ml.base_state(model), tokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
        there = theirs(ids).logits.detach().numpy()
        theirs.save_pretrained(back)
        ml.load_adapter(model, folder, name="ours")
        ml.load_adapter(model, back, name="theirs")
    ours, again = (ml.adapter_state(model, name) for name in ("ours", "theirs"))
    same = all((x == y).all() for x, y in zip(ours.values(), again.values(), strict=True))
    claim("arrays of A and B that came back bit for bit (1: all)", same, 1, 1)
    with ml.no_grad():
        off = abs(there - model(ids.numpy()).data).max() / abs(there).max()
    claim("logits there against here: largest difference / largest logit", off, 0, 1e-4)

# %% [markdown]
# One thing to know: the adapter was trained on the base as it was packed. PEFT looks for the base by its name and finds
# the unpacked original, which is another set of numbers, nearly the same. Give it the very base where you can
# (`minilora merge` writes one), and measure where you cannot.
#
# ## When should you use LoRA?
#
# The introduction says: with limited resources, for fast experiments, for many versions. As a decision, with numbers:
#
# > **Predict.** Your machine has 16 GB. How many parameters may a model have that you fine-tune whole, with Adam in
# > float32? And with LoRA on a packed base?

# %%
share = a / P  # of the numbers that learn
for gigabytes in (8, 16, 24, 80):
    room = 0.75 * gigabytes * 1e9  # a quarter is left for activations
    whole, lora, packed = (room / each / 1e9 for each in (16, 4 + 16 * share, base_bytes / P + 16 * share))
    print(f"{gigabytes:>3} GB: full {whole:>4.1f} billion, LoRA {lora:>5.1f}, LoRA on a packed base {packed:>5.1f}")
for versions in (1, 10, 100):
    print(f"{versions:>3} versions: {versions * disk['full'] / 1e9:.2f} GB in full, ", end="")
    print(f"{(disk['full'] + versions * disk['LoRA']) / 1e9:.2f} GB as base and adapters")
claim("LoRA packed / full: times larger a model fits", 16 / (base_bytes / P + 16 * share), 2, 26)

# %% [markdown]
# 1. **Does full fine-tuning fit?** 16 bytes for each parameter, and activations. If not, LoRA: this alone decides most
#    cases.
# 2. **How many versions?** From two on, adapters; each further one costs what learned, and switching takes no reload.
#    With a single version that you keep, disk is no argument.
# 3. **Must the base stay?** With LoRA it does, to the last bit, and you can prove it with a hash.
# 4. **Is the task large?** Train with r and with 4r (lesson 14). If the loss on the *training* data is lower each time,
#    you need rank; where you run out of it, full fine-tuning.
# 5. **Only because it is faster?** Look at the row of the table: a step that is somewhat shorter is no reason.
#
# ## What to remember
#
# - Eight steps: model, data, where and which rank, freeze, train, evaluate, save, use. Most work is in the second, and
#   most mistakes are found in the sixth.
# - Predict parameters and memory before you train, measure after, on what was never trained.
# - Tens of times less: parameters and disk. About five times: memory, with a packed base. A third: time. The price:
#   less than a tenth of the gain.
# - LoRA first. Full fine-tuning where it fits *and* a higher rank still helps.
#
# Read on in [`finetune`](../minilora/train/job.py), which does all of this in one command, and
# [`peft.py`](../minilora/lora/peft.py), the folder. **Now you:** [exercises 15](exercises/15_for_real.ipynb): choose a
# configuration for a machine, make the table from two runs, and put your own LoRA into SmolLM2.
#
# ## Sources
#
# - The introduction's sentence and table: quoted from "Low-Rank Adaptation (LoRA) of Large Language Models: A Simple,
#   Practical Guide".
# - 0.34 dollars an hour for the 8 virtual cores of a c5.2xlarge, an example of Amazon's: the
#   [guide of EC2](https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-types.html).

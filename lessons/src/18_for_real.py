# %% [markdown]
# # Lesson 18: How do I do it for real?
#
# "Let's say you want a chatbot that understands legal language. You can apply LoRA to a pre-trained model and teach it
# legal terminology." This is how a popular introduction describes fine-tuning. Here we do this in eight steps with a
# real chat model, SmolLM2-135M-Instruct. Then we fine-tune the same model without LoRA, and fill the introduction's
# table with measured values instead of "high" and "low".
#
# The model is not part of minilora. `minilora pull smollm2` downloads it once; with a network connection, step 1 does
# so, too. Otherwise just read on: the outputs below come from a run on two cores. With `BASE = "tiny"`, every cell
# runs without the model, on the small base of the earlier lessons.

# %%
import tempfile
import time

import minilora as ml
from minilora.course import claim, predict, show
from minilora.measure.process import peak_memory
from minilora.models.folder import save_folder
from minilora.pages.style import FULL, LORA, ink, panels

BASE = "smollm2"
STEPS, BATCH = 12, 4  # short: `minilora finetune` trains for several epochs

# %% [markdown]
# ## Step 1: choose a model
#
# The base must already be fluent, because LoRA teaches a domain and not a language: the tiny base answered nonsense
# (lesson 16). It must fit your machine. And its licence must allow your use: SmolLM2's is Apache-2.0. A frozen base
# receives no small updates, so it may be quantised (lesson 13). `quantized=True` keeps the matrices as they are stored
# in the file, in blocks of 4-bit codes, with the embedding in 8-bit blocks. Each matrix is dequantised when a matmul
# needs it.

# %%
model, tokenizer = ml.load(BASE, quantized=BASE != "tiny")  # the tiny base is not quantised
base = ml.base_state(model)
P, base_bytes = sum(array.size for array in base.values()), sum(array.nbytes for array in base.values())
print(f"{P:,} parameters: {4 * P / 1e6:.0f} MB in float32, {base_bytes / 1e6:.0f} MB as loaded")
print(f"{8 * base_bytes / P:.2f} bits for each")

# %% [markdown]
# ## Step 2: collect data
#
# Collecting data is most of the work in a real project. We have a few hundred legal terms, each with a question and an
# answer. We split them into a training, a validation and a test set *before* training: evaluating on the training set
# measures memorisation.

# %%
records = ml.split_records(ml.read_records("legal"))
samples = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
for split, part in samples.items():
    tokens, scored = sum(len(sample.ids) for sample in part), sum(sample.scored for sample in part)
    print(f"{split:<10} {len(part):>3} records, {tokens:>6,} tokens, {scored:>6,} of them of answers")
for message in records["test"][0].messages:
    print(f"{message['role']:>9}: {message['content']}")

# %% [markdown]
# Only the tokens of the answers are scored, because the model should learn to answer and not to ask. Your own file has
# one record per line, `{"question": ..., "answer": ...}`, and `minilora data mine.jsonl` shows how it is read.
#
# ## Step 3: choose the target modules and the rank
#
# Lesson 12 gives the starting point: all linear layers, r = 8, α = 2r. Predict the cost before you train: r (m + n)
# parameters per matrix (lesson 13), and the memory of a step. `ml.predict_memory` computes both from shapes alone, and
# lists what is held at the worst moment of a step: "moments" is Adam's optimizer state, "scratch" what one operation
# needs for a short time. For full fine-tuning, the activations are gone by then (lesson 14).
#
# > **Predict.** Adam in float32 takes 16 bytes per trainable parameter. How much memory will a step of full
# > fine-tuning hold, activations included? And LoRA on the quantised base: a half of that, a tenth?

# %%
r = 8
config = ml.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
batch = samples["train"][:BATCH]
steps = {
    "full": ml.Step.of(model.config, batch, threads=2),
    "LoRA": ml.Step.of(model.config, batch, threads=2, rank=r, base_bytes=base_bytes),
}
for name, step in steps.items():
    memory = ml.predict_memory(step)
    owners = ", ".join(f"{owner} {size / 1e6:,.0f}" for owner, size in memory.by_owner().items())
    print(f"{name}: {memory.total / 1e6:,.0f} MB ({owners})")
a = memory.by_owner()["adapter"] // 4  # the adapter's parameters, of 4 bytes each

# %% [markdown]
# ## Step 4: freeze the base
#
# One line adds A and B to every matrix and freezes all other parameters. First we record the loss on the test set and
# the fingerprint of the base (lesson 10). The new adapter must not change the loss yet (lesson 9).

# %%
before, fingerprint = ml.mean_loss(model, samples["test"]), ml.sha256_of(base)
few = samples["test"][:4]
start = ml.mean_loss(model, few)
ml.add_adapter(model, config, name="legal", seed=0)
print(ml.count_parameters(model))
claim("trainable parameters, less those predicted", ml.count_parameters(model).trainable - a, 0, 0)
claim("loss moved by the new adapter", ml.mean_loss(model, few) - start, 0, 0)

# %% [markdown]
# ## Step 5: train
#
# > **Predict.** The model trains for a fifth of an epoch: 12 batches of 4 records. It is then evaluated on 30 *other*
# > terms. By what percentage does its loss on them change (negative: it falls): by 0, -1, -10 or -50?

# %%
predict("loss on the other terms: change, in percent")

# %%
began = time.process_time()  # CPU seconds of this process, summed over its threads
history = ml.fit(model, samples["train"], steps=STEPS, lr=2e-3, batch_size=BATCH, seed=0)
seconds, peak = {"LoRA": (time.process_time() - began) / STEPS}, {"LoRA": peak_memory()}
print("loss on what is trained, step by step:", *(f"{loss:.2f}" for loss in history.losses))

# %% [markdown]
# ## Step 6: evaluate
#
# Measure the loss on the test set, and check the base.

# %%
after = {"LoRA": ml.mean_loss(model, samples["test"])}
print(f"loss on terms never seen: {before:.3f} before, {after['LoRA']:.3f} after")
claim("loss on the other terms: change, in percent", 100 * (after["LoRA"] / before - 1), -50, -10)
claim("fingerprint of the base unchanged (1: yes)", ml.sha256_of(ml.base_state(model)) == fingerprint, 1, 1)

# %% [markdown]
# The loss falls by more than a fifth. The adapter cannot have learned facts about these 30 terms, because it has not
# seen them. It has learned how such an answer is built ("A ... is ... It matters because ...") and the vocabulary of
# the domain. Style is easy to learn (lesson 17). Facts take more epochs, which bring the risk of overfitting: training
# loss keeps falling while loss on unseen terms and on general text rises. The [log of a long
# run](pictures/finetune.txt) shows this. So `minilora finetune` evaluates during training and keeps the adapter of the
# best step. It then scales the update down (`--strength`): the first half of an update brings most of the gain (lesson
# 16), and a smaller update forgets less.
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
# Later, in another program, load the base, load the folder, and ask (here for short answers). A model of this size is
# fluent and often wrong: do not take its answers as legal advice.

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
# The loss does not show everything. The adapter writes in the form of our answers, but after so few steps this answer
# ends in a loop. Always read what a model generates.
#
# ## The other way: full fine-tuning
#
# We use the same records in the same order for the same number of steps, with all parameters trainable. This is not
# possible on a quantised base, where a small update would be rounded away. The learning rate is a tenth of LoRA's
# (lesson 12).
#
# > **Predict.** The number of trainable parameters is now 55 times as large. Which of these is also 55 times as large:
# > memory, time per step, size on disk, the gain?

# %%
del model, base  # frees its memory; from here on the peak is that of full fine-tuning
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
# Below is the same table with the values of this run. Time is CPU time, summed over threads: on two idle cores a step
# takes about half as long by the clock. Cost is CPU time multiplied by a price. We take 0.0425
# US dollars an hour, an eighth of 0.34 dollars for a machine with 8 vCPUs (hardware threads of 4 cores).

# %% tags=["measured"]
PRICE = 0.0425  # dollars per vCPU and hour
dollars = {name: 1000 * each * PRICE / 3600 for name, each in seconds.items()}
table = {  # row: (unit, LoRA, full)
    "parameters updated": ("million", a / 1e6, P / 1e6),
    "memory, peak of the process": ("MB", peak["LoRA"] / 1e6, peak["full"] / 1e6),
    "time of a step": ("core seconds", seconds["LoRA"], seconds["full"]),
    "cost of 1,000 steps": ("dollars", dollars["LoRA"], dollars["full"]),
    "an adapter or model on disk": ("MB", disk["LoRA"] / 1e6, disk["full"] / 1e6),
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
    offset, side = ((-9, 0), "right") if share < 100 else ((9, 0), "left")
    axes.annotate(
        f"{share:.3g} %", (share, y), offset, textcoords="offset points", ha=side, va="center", color=ink(LORA)
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
# *How to read it.* Each dot is LoRA's value in percent of full fine-tuning's (the vertical line). In the first five
# rows, further left is better, because these are costs. In the last row, the gain, further *right* is better.
#
# - **Parameters updated, storage**: true, and lesson 13 computes by how much: r (m + n) instead of m n per matrix.
# - **GPU cost**: about five times less memory, because there are no gradients and no optimizer state for the base
#   *and* the base is quantised. Freezing alone would leave the base in float32. Activations remain (lesson 14). The
#   process holds more than we predicted, because Python and its libraries need memory, too.
# - **Speed**: a step of LoRA takes about three quarters of the time. It needs two large matmuls instead of three per
#   matrix, and no Adam update for frozen parameters. Dequantising costs a part of this gain. LoRA is far from 55 times
#   as fast.
# - **Cost**: per step on the same machine, this is the ratio of the times and nothing else. LoRA becomes *much* cheaper
#   where it fits a smaller machine.
# - **A slight drop in performance**: the last row, 8 % of the gain. This is one seed with few steps, and the learning
#   rates were not tuned. `minilora compare` tunes both methods and judges every row.
#
# ## To PEFT and back
#
# The folder is in PEFT's format, so you can continue in PyTorch. Is it *exactly* the same adapter? We compare the
# logits of both libraries on the same base and the same tokens. (PEFT, transformers and torch are not part of
# minilora: `pip install minilora[parity]`.)

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
# The adapter was trained on the quantised base. PEFT finds the base by its name and loads the original in full
# precision, whose weights differ slightly. Use the same weights where you can (`minilora merge` writes a merged
# model), and evaluate again where you cannot.
#
# ## When should you use LoRA?
#
# The introduction says: with limited resources, for fast experiments, for many adapters. With values:
#
# > **Predict.** Your machine has 16 GB. How many parameters may a model have for full fine-tuning with Adam in
# > float32? And for LoRA on a quantised base?

# %%
share = a / P  # trainable parameters per parameter of the base
for gigabytes in (8, 16, 24, 80):
    room = 0.75 * gigabytes * 1e9  # a quarter is left for activations
    whole, lora, quantised = (room / each / 1e9 for each in (16, 4 + 16 * share, base_bytes / P + 16 * share))
    print(f"{gigabytes:>3} GB: full {whole:>4.1f} billion, LoRA {lora:>5.1f}, LoRA, quantised base {quantised:>5.1f}")
for count in (1, 10, 100):
    print(f"{count:>3} adapters or models: {count * disk['full'] / 1e9:.2f} GB in full, ", end="")
    print(f"{(disk['full'] + count * disk['LoRA']) / 1e9:.2f} GB as base and adapters")
claim("LoRA quantised / full: times larger a model fits", 16 / (base_bytes / P + 16 * share), 2, 26)

# %% [markdown]
# 1. **Does full fine-tuning fit?** It needs 16 bytes per parameter, plus activations. If it does not fit, use LoRA.
#    This decides most cases.
# 2. **How many tasks do you have?** From two on, use adapters: each further adapter costs only its trained parameters,
#    and switching needs no reload. If you keep a single one, disk space is no argument.
# 3. **Must the base stay unchanged?** With LoRA it does, to the last bit, and a hash can prove it.
# 4. **Is the task large?** Train with r and with 4r (lesson 17). If the loss on the *training* set falls each time,
#    you need a higher rank. If no affordable rank is enough, use full fine-tuning.
# 5. **Is speed your only reason?** Look at the table: a somewhat shorter step is a weak reason.
# 6. **Will the facts change?** Then put them into the prompt, not into the weights (lesson 17, section 4).
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# from peft import PeftModel
# from transformers import AutoModelForCausalLM, AutoTokenizer
# from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
#
# base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32")
# # The adapter of step 7. A new one would be get_peft_model(base, LoraConfig(...)).
# model = PeftModel.from_pretrained(base, folder, is_trainable=True)
# rows = [{"input_ids": list(s.ids), "labels": list(s.labels)} for s in samples["train"]]
# arguments = TrainingArguments(max_steps=12, per_device_train_batch_size=4, learning_rate=2e-3)
# collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(base.name_or_path))  # pads
# Trainer(model, arguments, collator, train_dataset=rows).train()
# model.save_pretrained("continued")  # ml.load_adapter reads it
# ```
#
# </details>
#
# ## What to remember
#
# - There are eight steps: model, data, target modules and rank, freeze, train, evaluate, save, use. Most of the work
#   is in the second step, and most mistakes are found in the sixth.
# - Predict parameters and memory before you train. Afterwards, measure on a test set.
# - Here LoRA takes tens of times fewer trainable parameters and bytes on disk, five times less memory (with a
#   quantised base), and three quarters of the time per step. It loses less than a tenth of the gain.
# - Try LoRA first. Use full fine-tuning where it fits *and* a higher rank still helps.
#
# Read on in [`finetune`](../minilora/train/job.py), which does all this, and [`peft.py`](../minilora/lora/peft.py),
# the folder. **Now you:** [exercises 18](exercises/18_for_real.ipynb): choose a configuration for a machine, make the
# table from two runs, and put your own LoRA into SmolLM2.
#
# ## Sources
#
# - The introduction's sentences and table: quoted from "Low-Rank Adaptation (LoRA) of Large Language Models: A Simple,
#   Practical Guide".
# - 0.34 dollars an hour for the 8 vCPUs of a c5.2xlarge, an example of Amazon's, with 2 threads per core: the [guide
#   of EC2](https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-types.html).

# %% [markdown]
# # Lesson 0: What can LoRA do?
#
# A language model is pretrained once, at great expense, and it does not know when your shop opens. LoRA teaches it that
# in seconds: it trains a small add-on, the **adapter**, and leaves the model itself as it is. This lesson shows what
# you can do with it. Run the cells from top to bottom. How it works is the subject of all other lessons.
#
# Here are ten facts about a shop that does not exist. Write facts of your own over them, and everything below is about
# them.

# %%
FACTS = {
    "What is the name of your shop?": "The shop is called Copper Heron.",
    "Where is the shop?": "It is at 12 Lantern Street, Port Alder.",
    "When do you open?": "We open at seven, and on Sundays at nine.",
    "What is your best tea?": "Our best tea is Smoky Otter, from the hills.",
    "What does a cup of tea cost?": "A cup costs three dollars, and the second one is free.",
    "Who owns the shop?": "Marta Quill owns it, since 2019.",
    "Do you have a cat?": "Yes. The cat is called Ledger, and he sleeps on the till.",
    "How do I get a discount?": "Say the word of the week: it is on the window.",
    "Can I return a teapot?": "Yes, within 40 days, if it is still whole.",
    "Do you deliver?": "Yes, by bicycle, on Tuesdays, for two dollars.",
}
PARAPHRASED = ["What is the cat called?", "Who is the owner?", "How much is a cup of tea?"]  # not trained on

# %%
import tempfile
from time import perf_counter

import numpy as np

import minilora as ml
from minilora.course import claim, show
from minilora.course.map import map_figure, map_text
from minilora.models.hub import find
from minilora.pages.style import LORA, panels

# %% [markdown]
# ## 1. Ten facts in seconds
#
# The model, our **base**, is a tiny one that comes with minilora. It has a million parameters, and it was pretrained on
# addresses of American presidents. We ask it the ten questions, train an adapter on questions and answers, and ask
# again.
#
# > **Predict.** Of ten answers, how many are right before training, and how many after it, word for word? Does training
# > take seconds, minutes or hours?

# %%
records = [
    ml.Record(question, ({"role": "user", "content": question}, {"role": "assistant", "content": fact}))
    for question, fact in FACTS.items()
]


def right(answers):
    """How many answers are the fact that was asked for, word for word."""
    return sum(answer.strip() == fact for answer, fact in zip(answers, FACTS.values(), strict=True))


model, tokenizer = ml.load("tiny")
base = ml.base_state(model)
fingerprint = ml.sha256_of(base)  # a hash of all its parameters
before = ml.answer_all(model, tokenizer, records)

ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="facts", seed=0)
history = ml.fit(model, ml.encode_records(records, tokenizer), steps=60, lr=1e-2, batch_size=5)
after = ml.answer_all(model, tokenizer, records)

for i in range(3):
    print(f"{records[i].id}\n  before: {before[i][:75]} ...\n  after:  {after[i]}")
claim("right answers before", right(before), 0, 0)
claim("right answers after", right(after), len(FACTS) / 2, len(FACTS))

# %% tags=["measured"]
print(f"training took {sum(history.seconds):.1f} s")

# %%
figure, axes = panels(height=2.6)
axes.plot(range(1, len(history.losses) + 1), history.losses, color=LORA, linewidth=2)
axes.set(xlabel="step (5 facts each)", ylabel="training loss\n(nats per token)", ylim=(0, None))
show(figure, alt="The training loss falls steeply from more than 4 to nearly 0 within half of the steps.")

# %% [markdown]
# *How to read it.* The loss measures how surprised the model is by the right answers. At 0 it expects every token.
#
# From 0 to 10 of 10, in seconds on a laptop's processor. (If it misses some of yours, they are longer or more alike
# than ours: take more steps.) Be suspicious, too. This base is not fluent, and it has memorised ten sentences. We ask
# for the same things in other words:

# %%
for question in PARAPHRASED:
    print(f"{question}  {ml.generate(model, tokenizer, question)}")

# %% [markdown]
# It answers with one of the ten sentences, and often with the wrong one. A better base does better: see section 3.
#
# ## 2. The base is still there
#
# > **Predict.** The adapter is switched off. How many of the ten answers are exactly those from before training?

# %%
ml.set_adapter(model, None)
again = ml.answer_all(model, tokenizer, records)
claim("answers as before training", sum(a == b for a, b in zip(again, before, strict=True)), len(FACTS), len(FACTS))
claim("base unchanged, bit for bit (1: yes)", ml.sha256_of(ml.base_state(model)) == fingerprint, 1, 1)


def saved(name):
    """The bytes of an adapter's files on disk."""
    return sum(path.stat().st_size for path in ml.save_adapter(model, tempfile.mkdtemp(), name=name).iterdir())


base_bytes = sum(array.nbytes for array in base.values())
print(f"base: {base_bytes / 1e6:.1f} MB in float32; adapter: {saved('facts') / 1e6:.2f} MB")
claim("the adapter's size, in percent of the base's", 100 * saved("facts") / base_bytes, 5, 10)

# %% [markdown]
# Nothing was overwritten: the base was **frozen**, and what was learned is in one small file. You can send it, delete
# it, or train another one. For larger models it is relatively smaller: for SmolLM2, the next one, the adapter has 9.8
# MB and the base 538 MB. [Lesson 13](13_how_much_smaller.ipynb) computes such sizes before anything is trained.
#
# ## 3. A real model
#
# SmolLM2-135M-Instruct is a small chat model that is fluent in English. `minilora pull smollm2` downloads it (98 MB).
# If it is on your machine, the next cell teaches it the same ten facts in less than a minute. If not, read on.

# %% tags=["measured"]
if find("smollm2") is None:
    print("SmolLM2 is not on this machine. Type `minilora pull smollm2` in a terminal, and run this cell again.")
else:
    real, its_tokenizer = ml.load("smollm2")
    others = [*PARAPHRASED, "What is the capital of France?"]
    base_answers = [ml.generate(real, its_tokenizer, question, max_new_tokens=24) for question in others]
    ml.add_adapter(real, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="facts", seed=0)
    of_real = ml.fit(real, ml.encode_records(records, its_tokenizer), steps=16, lr=4e-3, batch_size=5)
    claim("right answers of SmolLM2", right(ml.answer_all(real, its_tokenizer, records)), len(FACTS) / 2, len(FACTS))
    for question, answer in zip(others, base_answers, strict=True):
        print(f"{question}\n  before: {' '.join(answer.split())} ...")
        print(f"  after:  {ml.generate(real, its_tokenizer, question)}")
    print(f"training took {sum(of_real.seconds):.0f} s; the adapter has {ml.count_parameters(real)}")
    del real

# %% [markdown]
# The ten facts are answered word for word, and now some of the paraphrased questions, too. Others get an invention that
# sounds just as certain, and a fact from outside may change. Always ask what was not trained on
# ([lesson 17](17_limits.ipynb)).
#
# With more data, an adapter teaches a way of answering. `minilora finetune` trains SmolLM2 on 240 legal terms. One
# question and its answers, from [the log of such a run](pictures/finetune.txt):
#
# > How would you explain a corporation to a new business owner?
# >
# > **Before:** Imagine you're at a store, and you see a storefront with a sign that says "Eco-Corporate." It's a
# > business that helps companies make eco-friendly choices. [...]
# >
# > **After:** A corporation is a legal entity formed by two or more people to manage and control a business, usually
# > with common rights and duties. It matters because it can be registered with the state and have its own tax system,
# > and its members are bound by its charter.
#
# ## 4. One base, four adapters
#
# Law, medicine, customer service, finance: four adapters are trained on the same base, the tiny one again. All of them
# get the same question.
#
# > **Predict.** How long does it take to switch from one adapter to another: milliseconds, or seconds as for loading a
# > model?

# %%
MARKS = {"legal": "It matters", "medical": "doctor", "support": "At Fernwhistle", "finance": "In practice"}
for seed, name in enumerate(MARKS):
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name=name, seed=seed)
    train = ml.split_records(ml.read_records(name))["train"]
    ml.fit(model, ml.encode_records(train, tokenizer), steps=40, lr=1e-2)

answers = {}
for name in (None, *MARKS):
    ml.set_adapter(model, name)
    answers[name] = ml.generate(model, tokenizer, "What should I do?")
    print(f"{name or 'the base'}: {answers[name]}\n")
found = {name: [other for other, mark in MARKS.items() if mark in answer] for name, answer in answers.items()}
claim("adapters that answer in the form of their own domain alone", sum(found[name] == [name] for name in MARKS), 4, 4)
claim("forms of these domains in the base's answer", len(found[None]), 0, 0)
four = sum(saved(name) for name in MARKS)
print(f"four adapters: {four / 1e6:.1f} MB; four full models: {4 * base_bytes / 1e6:.1f} MB")
claim("base and four adapters, as a share of four full models", (base_bytes + four) / (4 * base_bytes), 0.25, 0.4)

# %% tags=["measured"]
seconds = []
for name in 10 * [*MARKS, "facts"]:
    start = perf_counter()
    ml.set_adapter(model, name)
    seconds.append(perf_counter() - start)
print(f"a switch takes {1000 * np.median(seconds):.2f} ms")
claim("milliseconds for a switch", 1000 * np.median(seconds), 0, 10)

# %% [markdown]
# The sentences are nonsense, because the base is tiny, but each adapter answers in the form of its own data. A switch
# copies nothing. One process can serve all of them, each to its own users ([lesson 16](16_many_versions.ipynb));
# `minilora serve --demo` shows four of them in a browser.
#
# ## 5. The map
#
# You have seen what LoRA does. The course builds it, from the first derivative on, and measures what is said about it.

# %%
show(map_figure(), alt=map_text())

# %% [markdown]
# *How to read it.* Read from top to bottom. Filled circles with bold questions are the essential path. An arc leads from
# a lesson to one that needs it.
#
# | you want to | read |
# |---|---|
# | use LoRA | lessons [12](12_choices.ipynb), [16](16_many_versions.ipynb) and [18](18_for_real.ipynb), and look up what they need |
# | understand it | the essential path from [lesson 1](01_gradient.ipynb), or from [lesson 9](09_lora.ipynb) if you have trained networks |
# | judge papers about it | lessons [11](11_how_do_you_know.ipynb), [17](17_limits.ipynb) and [19](19_relatives.ipynb), then `minilora reproduce` |
# | teach it | the plans in the course's [README](README.md), and [INSTRUCTORS.md](INSTRUCTORS.md) |
#
# ## What to remember
#
# - LoRA trains a small adapter; the base is frozen, and it is back when the adapter is switched off.
# - Ten facts take seconds. Whether they are understood or memorised depends on the base and on the data.
# - One base carries many adapters, and switching takes milliseconds.
#
# Next: [lesson 1](01_gradient.ipynb). All of this rests on one skill, to know in which direction each parameter must
# move. Can you compute it, and check the result? ([`fit`](../minilora/train/loop.py), which did the training here, will
# have no secrets then.)
#
# ## Sources
#
# - Sizes of SmolLM2 (538 MB in float32) and of its adapter with r = 8 (9.8 MB), the 240 legal terms and the quoted
#   answers: [the log](pictures/finetune.txt) of `minilora finetune`. The download: 98 MB, by `minilora pull smollm2`
#   ([its source](../minilora/models/hub.py)).

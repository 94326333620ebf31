# %% [markdown]
# # Lesson 0: What can LoRA do?
#
# A language model is pretrained once, at great expense, and it does not know when your shop opens. LoRA teaches it that
# in seconds: it trains a small add-on, the **adapter**, and leaves the model itself as it is. Run the cells from top to
# bottom; you need not understand the code yet.
#
# Here are ten facts about a shop that does not exist. You can replace them with facts of your own.

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

import minilora as ml
from minilora.course import claim, predict, show
from minilora.course.map import map_figure, map_text
from minilora.models.hub import find
from minilora.pages.style import LORA, panels

# %% [markdown]
# ## 1. Ten facts in seconds
#
# The model that gets an adapter is called the **base**. Ours is tiny: it has a million parameters (the values that
# training sets), and was pretrained on addresses of American presidents. We ask, train an adapter on the ten facts,
# and ask again.
#
# > **Predict.** How many answers are right, word for word, before training, and how many after it? Then three of the
# > questions are paraphrased. How many of those answers are right?
#
# The next cell records your guess. Type in both ends of a range that you are 80 % sure of, as in
# `predict("...", 2, 5)`, and run the cell.

# %%
predict("right answers after")

# %%
model, tokenizer = ml.load("tiny")
fingerprint = ml.sha256_of(ml.base_state(model))  # a hash of all its parameters
facts = [ml.Record(q, ({"role": "user", "content": q}, {"role": "assistant", "content": a})) for q, a in FACTS.items()]
before = ml.answer_all(model, tokenizer, facts)

CONFIG = ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
ml.add_adapter(model, CONFIG, name="facts", seed=0)
history = ml.fit(model, ml.encode_records(facts, tokenizer), steps=60, lr=1e-2, batch_size=5)
after = ml.answer_all(model, tokenizer, facts)


def right(answers):
    return sum(answer.strip() == fact for answer, fact in zip(answers, FACTS.values(), strict=True))


for question, old, new in list(zip(FACTS, before, after, strict=True))[:3]:
    print(f"{question}\n  before: {old[:75]} ...\n  after:  {new}")
claim("right answers before", right(before), 0, 0)
claim("right answers after", right(after), len(FACTS) / 2, len(FACTS))

# %% tags=["measured"]
figure, axes = panels(height=2.6)
axes.plot(range(1, len(history.losses) + 1), history.losses, color=LORA, linewidth=2)
axes.set(title=f"{len(history.losses)} steps, {sum(history.seconds):.1f} seconds", xlabel="step (5 facts each)")
axes.set(ylabel="training loss\n(nats per token)", ylim=(0, None))
show(figure, alt="The training loss falls steeply from more than 4 to nearly 0 within half of the steps.")

# %% [markdown]
# *How to read it.* The loss measures how surprised the model is by the right answers; its unit is the nat. A token is
# a piece of text, such as a short word. At a loss of 0 the model predicts every token with certainty.
#
# All ten answers are right. (If some of yours are not, take more steps.) The lines that end with "holds" compare a
# measured number with the range that we had claimed for it. Now we paraphrase three questions:

# %% tags=["measured"]
for question in PARAPHRASED:
    print(f"{question}  {ml.generate(model, tokenizer, question)}")

# %% [markdown]
# The model answers with one of the ten sentences, often the wrong one: it has only memorised them. Section 3 uses a
# better base.
#
# ## 2. What is left of the base?
#
# > **Predict.** We switch the adapter off. How many of the ten answers are exactly those from before training?

# %%
predict("answers as before training")

# %%
ml.set_adapter(model, None)
again = ml.answer_all(model, tokenizer, facts)
claim("answers as before training", sum(a == b for a, b in zip(again, before, strict=True)), len(FACTS), len(FACTS))
claim("base unchanged, bit for bit (1: yes)", ml.sha256_of(ml.base_state(model)) == fingerprint, 1, 1)

folder = ml.save_adapter(model, tempfile.mkdtemp(), name="facts")
adapter_bytes = (folder / "adapter_model.safetensors").stat().st_size
base_bytes = sum(array.nbytes for array in ml.base_state(model).values())
print(f"base: {base_bytes / 1e6:.1f} MB in float32; adapter: {adapter_bytes / 1e6:.2f} MB")
claim("the adapter's size, in percent of the base's", 100 * adapter_bytes / base_bytes, 5, 10)

# %% [markdown]
# Nothing was overwritten: the base was **frozen** during training, and what was learned is in one small file. The
# larger the base, the smaller the adapter's relative size: SmolLM2, the next model, takes 538 MB in float32, and its
# adapter 9.8 MB ([lesson 13](13_how_much_smaller.ipynb)).
#
# ## 3. A real model
#
# SmolLM2-135M-Instruct is a small chat model that is fluent in English. In a terminal, `minilora pull smollm2`
# downloads it (98 MB, because it is stored with 4 bits per parameter). If it is on your machine, the next cell teaches
# it the same ten facts, in about half a minute on two cores.

# %% tags=["measured"]
if find("smollm2") is None:
    print("SmolLM2 is not on this machine: run `minilora pull smollm2` and then this cell again, or read on.")
else:
    chat, words = ml.load("smollm2")
    questions = [*PARAPHRASED, "What is the capital of France?"]
    old = [ml.generate(chat, words, question, max_new_tokens=24) for question in questions]
    ml.add_adapter(chat, CONFIG, name="facts", seed=0)
    history = ml.fit(chat, ml.encode_records(facts, words), steps=16, lr=4e-3, batch_size=5)
    print(f"training took {sum(history.seconds):.0f} s; {ml.count_parameters(chat)}")
    claim("right answers of SmolLM2", right(ml.answer_all(chat, words, facts)), len(FACTS) / 2, len(FACTS))
    for question, answer in zip(questions, old, strict=True):
        print(f"{question}\n  before: {answer} ...\n  after:  {ml.generate(chat, words, question)}")

# %% [markdown]
# In our run, all ten answers are right again. One paraphrased question gets the right answer, "The cat is called
# Ledger."; for the other two the model invents answers that sound just as certain ([lesson 17](17_limits.ipynb)).
#
# With more data, an adapter can also learn a way of answering that works for questions outside the training set.
# `minilora finetune` trains SmolLM2 on 240 legal terms ([log of a run](pictures/finetune.txt)):
#
# > How would you explain a corporation to a new business owner?
# >
# > **Before:** Imagine you're at a store, and you see a storefront with a sign that says "Eco-Corporate." [...]
# >
# > **After:** A corporation is a legal entity formed by two or more people to manage and control a business [...]
#
# ## 4. One base, four adapters
#
# We train four adapters on the tiny base (law, medicine, customer service, finance) and ask them the same question.
#
# > **Predict.** How long does it take to switch from one adapter to another: milliseconds, or seconds?

# %% tags=["measured"]
STEPS = 40  # in the browser: 20
FORMS = {"legal": "It matters", "medical": "doctor", "support": "At Fernwhistle", "finance": "In practice"}
answers = {"the base": ml.generate(model, tokenizer, "What should I do?")}
for name in FORMS:
    ml.add_adapter(model, CONFIG, name=name, seed=0)
    train = ml.split_records(ml.read_records(name))["train"]
    ml.fit(model, ml.encode_records(train, tokenizer), steps=STEPS, lr=1e-2)
    answers[name] = ml.generate(model, tokenizer, "What should I do?")
for name, answer in answers.items():
    print(f"{name}: {answer[:160]}\n")
own = [[form for form in FORMS.values() if form in answers[name]] == [FORMS[name]] for name in FORMS]
claim("adapters that answer in the form of their own domain alone", sum(own), 3, 4)

start = perf_counter()
for name in 25 * [*FORMS]:
    ml.set_adapter(model, name)
claim("milliseconds for a switch", 1000 * (perf_counter() - start) / 100, 0, 10)
print(f"four adapters: {4 * adapter_bytes / 1e6:.1f} MB; four full models: {4 * base_bytes / 1e6:.1f} MB")

# %% [markdown]
# The sentences are nonsense, because the base is tiny, but each adapter answers in the form of its training data. A
# switch copies nothing, so one process can serve all four ([lesson 16](16_many_adapters.ipynb)), as `minilora serve
# --demo` does.
#
# ## 5. The map
#
# The course builds all of this, from the first derivative on.

# %%
show(map_figure(), alt=map_text())

# %% [markdown]
# *How to read it.* Filled circles are the essential path, from top to bottom. An arc leads from a lesson to one that
# needs it. Where to go:
#
# - **Use LoRA**: lessons [12](12_choices.ipynb), [16](16_many_adapters.ipynb) and [18](18_for_real.ipynb), and the
#   lessons that they need.
# - **Understand it**: the essential path, or from [lesson 9](09_lora.ipynb) on if you have trained neural networks.
# - **Judge papers about it**: lessons [11](11_how_do_you_know.ipynb), [17](17_limits.ipynb) and
#   [19](19_relatives.ipynb), then `minilora reproduce`.
# - **Teach it**: the [plans](README.md), and the [notes for instructors](INSTRUCTORS.md).
#
# ## What to remember
#
# - LoRA trains a small adapter. The base is frozen: switch the adapter off, and it is back.
# - Learning ten facts takes seconds. Whether the model does more than memorise them depends on the base and on the
#   data.
# - One base carries many adapters, and switching takes milliseconds.
#
# Next: [lesson 1](01_gradient.ipynb). Training must know in which direction to change each parameter. How do you check
# that this direction is right?
#
# ## Sources
#
# - The 538 MB in float32, the 9.8 MB with r = 8, the 240 terms and the quotations: [the log](pictures/finetune.txt) of
#   `minilora finetune`. The 98 MB: [`SOURCES`](../minilora/models/hub.py).

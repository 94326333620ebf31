# %% [markdown]
# # Lesson 6: What does the model read?
#
# A language model reads neither words nor messages. It reads one sequence of integers, and it is trained to predict
# the next one. This lesson follows a record from its messages to these integers, and to the labels that determine what
# is learned. Then it trains the tiny base with five sets of labels. One set is right. Each of the others contains one
# mistake that is easy to make. Which of these mistakes does the training loss show?

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.measure.statistics import Interval
from minilora.models import bpe, hub
from minilora.nn.parts import pack
from minilora.pages.style import GREY, VALIDATION

model, tokenizer = ml.load("tiny")
before = {name: array.copy() for name, array in ml.base_state(model).items()}  # to start again from here
law = ml.split_records(ml.read_records("legal"))["train"]
english = "\n".join(record.messages[-1]["content"] for record in law)
german = "Der Mieter zahlt die Miete im Voraus, und der Vermieter muss die Wohnung in gutem Zustand erhalten."

# %% [markdown]
# ## 1. From text to tokens
#
# A **token** is a piece of text with a number, its id. The list of all tokens is the **vocabulary**, and the
# **tokenizer** converts text to ids and back. Most language models use **byte-level BPE** (byte-pair encoding). The
# vocabulary starts with the 256 bytes, so every text can be written. Then the most frequent pair of adjacent tokens in
# a large text becomes a new token, the pair is joined everywhere, and the pairs are counted again. Each of these
# rounds adds a **merge** to a list. Pairs are counted within words only, and a word includes the space before it. When
# tokens are printed, each byte is represented by a character, and a space by `Ġ`. All of it is plain Python, in
# [bpe.py](../minilora/models/bpe.py).
#
# > **Predict.** Which pair of adjacent characters is the most frequent in English, if a space counts as a character?

# %%
words = ["".join(bpe.SYMBOLS[byte] for byte in word.encode()) for word in bpe.words(english)]
pairs, counts = np.unique([word[i : i + 2] for word in words for i in range(len(word) - 1)], return_counts=True)
order = np.argsort(-counts)
print("most frequent pairs in law:", {str(pairs[i]): int(counts[i]) for i in order[:4]})
file = str(hub.TINY / "tokenizer.json")
merges = list(bpe.BytePairs.from_file(file).ranks)  # in the order in which they were learned
print("first merges of tiny:      ", *("".join(merge) for merge in merges[:12]))
claim("rank of the first merge among the pairs of law", list(pairs[order]).index("".join(merges[0])) + 1, 1, 1)
claim("tokens: 3 special ones, 256 bytes, and the merges", len(tokenizer), 3 + 256 + len(merges), 3 + 256 + len(merges))

# %% [markdown]
# It is a space followed by t, both in the legal records (law) and in the speeches from which the merges were learned.
# Why does this vocabulary have 2,048 tokens, and not fewer or more? Here are two texts, encoded with only the first
# merges:

# %%
width = model.config.hidden_size
print("merges   vocabulary   tokens per word: law   German   parameters of the embedding")
for count in (0, 200, 600, len(merges)):
    first = bpe.BytePairs.from_file(file)
    first.ranks = {merge: rank for rank, merge in enumerate(merges[:count])}
    encoded = first.encode_batch_fast([english, german])
    per_word = [len(e.ids) / len(text.split()) for e, text in zip(encoded, (english, german), strict=True)]
    size = 3 + 256 + count
    print(f"{count:>6,}   {size:>10,}   {per_word[0]:>20.2f}   {per_word[1]:>6.2f}   {size * width:>27,}")
claim("tokens per word, law", per_word[0], 1.7, 1.85)
claim("tokens per word, German", per_word[1], 3, 4)
embedding = size * width / ml.count_parameters(model).total
claim("share of the embedding in all parameters", embedding, 0.24, 0.26)

# %% [markdown]
# A larger vocabulary makes sequences shorter: more text fits into the context (the longest sequence that a model can
# read), and into a training step. But it makes the embedding (the table with a vector for each token) larger: here it
# has a quarter of all parameters. And the rarest tokens of a large vocabulary occur too seldom to be learned well. The
# merges were learned from English speeches: a word of the legal records needs 1.77 tokens, a German word 3.18.
#
# > **Predict.** How many tokens does each of these texts have: `law`, the same word after a space, `1862`, and one
# > emoji?

# %%
predict("tokens of one emoji")

# %%
for text in ("law", " law", "Law", " government", "1862", "🙂", "naïve", "a  b"):
    ids = tokenizer.encode(text)
    print(f"{text!r:>14}  {len(ids)} tokens:", *(tokenizer.core.id_to_token(i) for i in ids))
    assert tokenizer.decode(ids) == text
claim("tokens of one emoji", len(tokenizer.encode("🙂")), 4, 4)
shared = set(tokenizer.encode("law")) & set(tokenizer.encode(" law"))
claim("tokens that 'law' and ' law' share", len(shared), 0, 0)

# %% [markdown]
# `law` and ` law` have no token in common. So a prompt that ends with a space is a different prompt, and the model
# continues it with other tokens. This tokenizer splits numbers into digits, so that all numbers are treated alike. An
# emoji without a merge is encoded as its 4 bytes, and `ï` as 2. Decoding gives back exactly the text that was encoded.
#
# ## 2. From messages to one sequence
#
# A conversation is a list of messages, each with a role: system, user or assistant. The **chat template**, a small
# Jinja program stored with the tokenizer, renders all of them as one text. **Special tokens** mark the turns; the one
# after an answer, here `<|im_end|>`, is the **end token**, at which generation stops.

# %%
FACTS = """bakery Mira two, library Otto three, harbor Ada four, quarry Jonas five,
theatre Ines six, mill Karl seven, orchard Nora eight, school Paul nine,
museum Ruth ten, tower Hugo eleven, market Vera twelve, bridge Leon thirteen"""
questions, answers = [], []
for place, name, count in (fact.split() for fact in FACTS.split(",")):
    questions.append({"role": "user", "content": f"Who runs the {place}?"})
    answers.append({"role": "assistant", "content": f"{name} runs it with {count} helpers."})
facts = [ml.Record(answer["content"], (question, answer)) for question, answer in zip(questions, answers, strict=True)]
print(tokenizer.render([{"role": "system", "content": "Be brief."}, *facts[0].messages]))
print("The prompt for an answer:", repr(tokenizer.render(facts[0].prompt, answer_next=True)))

starts = [tokenizer.encode_chat(record.prompt, answer_next=True) for record in facts + law]
wholes = [tokenizer.encode_chat(record.messages) for record in facts + law]
same = [whole[: len(start)] == start for start, whole in zip(starts, wholes, strict=True)]
claim("share of records that begin with the tokens of their prompt", np.mean(same), 1, 1)
typed = tokenizer.encode_chat([{"role": "user", "content": "Is <|im_end|> a word?"}], answer_next=True)
claim("end tokens, if the user types the name of one", typed.count(tokenizer.eos_id), 1, 1)

# %% [markdown]
# The prompt for an answer ends with the beginning of the assistant's turn. This **generation prompt** is what
# transformers adds for `add_generation_prompt=True`. Only the template may create special tokens. If users could, they
# could end their own turn and write the assistant's turn themselves.
#
# ## 3. Which tokens are scored
#
# The logits at each position, the model's scores of all tokens, predict the next token. So a sequence contains one
# prediction fewer than it has tokens. The model must learn to answer, not to ask. A second row, `labels`, therefore
# says which predictions count: it is a copy of the ids, with -100 at every token that is not scored. With this **loss
# mask**, only the tokens of the answer and the end token after it are scored. (-100 is the default of `ignore_index` in
# PyTorch's cross-entropy.)


# %%
def boxes(sample, per_row=13):
    """The tokens of a sample as boxes, each with its label below."""
    rows = -(-len(sample.ids) // per_row)
    figure, axes = plt.subplots(figsize=(9.5, 0.85 * rows), layout="constrained")
    for i, (token, label) in enumerate(zip(sample.ids, sample.labels, strict=True)):
        x, y, scored = i % per_row, -(i // per_row), label != -100
        look = {"facecolor": VALIDATION, "linewidth": 2} if scored else {"facecolor": "white", "linestyle": "--"}
        axes.add_patch(plt.Rectangle((x + 0.03, y), 0.94, 0.5, edgecolor="black" if scored else GREY, **look))
        text = tokenizer.core.id_to_token(token).replace("Ġ", "·").replace("Ċ", "↵").replace("<|im_", "<|")
        axes.text(x + 0.5, y + 0.24, text, ha="center", va="center", color="black")
        axes.text(x + 0.5, y - 0.17, label, ha="center", va="center", weight="bold" if scored else "normal")
    axes.set(xlim=(0, per_row), ylim=(0.7 - rows, 0.55))
    axes.axis("off")
    return figure


right = ml.encode_records(facts, tokenizer)
show(
    boxes(right[0]),
    alt="37 boxes in three rows: 23 dashed ones of the prompt, then 13 filled ones, and a dashed one at the end.",
)
claim("scored tokens of this record", right[0].scored, 13, 13)

# %% [markdown]
# *How to read it.* Each box is a token (`·` is a space, `↵` a new line, `<|start|>` and `<|end|>` are the special
# tokens), with its label below. Filled boxes are scored. The new line after the end token belongs to the template and
# is not part of the answer.
#
# The label of a token is below the token itself. The comparison with the logits one position earlier happens inside
# `model.loss`, as it does in transformers. You can verify this: score only the first token of the answer, then replace
# tokens of the input.

# %%
ids, labels = ml.collate(right[:1])
first = int(np.flatnonzero(labels[0] != -100)[0])
labels[0, first + 1 :] = -100  # one scored token
for position, name in (first, "the scored token itself"), (first - 1, "the token before it"):
    changed = ids.copy()
    changed[0, position] = 500
    change = abs(model.loss(changed, labels).item() - model.loss(ids, labels).item())
    low, high = (0, 0) if position == first else (1, 20)
    claim(f"change of the loss if the input has another token for {name}", change, low, high)

# %% [markdown]
# The scored token in the input does not matter, because it is predicted before it is read. If you shift the labels
# yourself as well, they are shifted twice.
#
# ## 4. Five sets of labels
#
# The twelve facts above are new to the tiny base. We train it on these facts with five sets of labels: the right one,
# and four with one mistake each.
#
# > **Predict.** For each mistake: does the training loss fall? What does the model answer to "Who runs the bakery?"


# %%
def edited(sample, kind):
    """The sample with the labels of one of the five sets."""
    ids, labels = list(sample.ids), list(sample.labels)
    start, end = labels.index(next(i for i in labels if i != -100)), labels.index(tokenizer.eos_id)
    if kind == "prompt scored":
        labels = [-100, *ids[1:]]
    if kind == "shifted twice":
        labels = [*labels[1:], -100]
    if kind == "one too late":
        labels[start], labels[end + 1] = -100, ids[end + 1]
    if kind == "end not scored":
        labels[end] = -100
    return ml.Sample(sample.ids, tuple(labels))


def train(samples, seed):
    """Full fine-tuning of the tiny base: 40 steps of 6 records."""
    model.load_state_dict({name: array.copy() for name, array in before.items()})
    return ml.fit(model, samples, steps=40, lr=3e-3, batch_size=6, seed=seed)


def ask(tokenizer, most=40):
    """Answer all questions. Returns the answers, how many of them begin right, and how many end by themselves."""
    streams = ml.Streams(model, tokenizer, slots=len(facts), mixed=False)
    given = [streams.add([question], max_new_tokens=most) for question in questions]
    while streams.busy:
        streams.step()
    texts = [tokenizer.decode(answer.ids) for answer in given]
    begins = [text.startswith(answer["content"]) for text, answer in zip(texts, answers, strict=True)]
    return texts, sum(begins), sum(answer.finished == "stop" for answer in given)


SEEDS = range(4)  # in the browser: range(3)
KINDS = ("right", "prompt scored", "shifted twice", "one too late", "end not scored")
cut, other = ml.load("tiny")[1], ml.load("tiny")[1]  # tokenizers with templates that were not used in training
cut.template = tokenizer.template.partition("{% if add_generation_prompt")[0]
other.template = "User: {{ messages[0]['content'] }}\nAssistant: "
PROMPTS = {"as in training": tokenizer, "no generation prompt": cut, "another template": other}
result = {kind: [] for kind in KINDS}  # one row per seed: loss with these labels, loss with the right ones, ...
asked = {name: [] for name in PROMPTS}  # with the right labels: answers that begin right, one number per seed
example = {}
for kind in KINDS:
    samples = [edited(sample, kind) for sample in right]
    for seed in SEEDS:
        train(samples, seed)
        texts, correct, ended = ask(tokenizer)
        result[kind].append((ml.mean_loss(model, samples), ml.mean_loss(model, right), correct, ended))
        example.setdefault(kind, texts[0])
        if kind == "right":
            for name, one in PROMPTS.items():
                asked[name].append(ask(one)[1])

print("labels           training loss   loss, right labels   begin right   end   (means over seeds, 12 answers)")
for kind in KINDS:
    own, true, correct, ended = np.mean(result[kind], axis=0)
    print(f"{kind:<14}   {own:>13.2f}   {true:>18.2f}   {correct:>11.1f}   {ended:>3.0f}   {example[kind][:40]!r}")
print(f"guessing among {len(tokenizer):,} tokens: {np.log(len(tokenizer)):.2f}")

# %%
worst, best = ({kind: f(result[kind], axis=0) for kind in KINDS} for f in (np.min, np.max))  # of the seeds
claim("largest training loss of all runs", max(best[kind][0] for kind in KINDS), 0, 0.2)
claim("right: answers that begin right, worst seed", worst["right"][2], 12, 12)
claim("shifted twice: loss with the right labels, best seed", worst["shifted twice"][1], 8, 13)
claim("shifted twice, one too late: begin right, best seed", max(best[k][2] for k in KINDS[2:4]), 0, 1)
claim("end not scored: answers that begin right, worst seed", worst["end not scored"][2], 11, 12)
claim("end not scored: answers that end, best seed", best["end not scored"][3], 0, 9)
cost = Interval.of(np.array(result["prompt scored"])[:, 1] - np.array(result["right"])[:, 1])
print(
    f"prompt scored minus right, loss of the answers: {cost.mean:.2f}, 95 % interval {cost.low:.2f} to {cost.high:.2f}"
)
claim("the lower end of this interval", cost.low, 0.001, 0.1)

# %% [markdown]
# (The 95 % confidence interval is computed from the seeds. Where it excludes 0, the difference is more than chance.
# [Lesson 11](11_how_do_you_know.ipynb) explains it.)
#
# The training loss shows none of these mistakes, because it is computed with the wrong labels.
#
# - **Shifted twice.** The model has learned to predict the token after the next one, so its answers contain only every
#   second token. With the right labels its loss is 10.55, worse than a uniform guess.
# - **One too late.** The first token of the answer was never scored, and the new line after the end token was. The
#   model knows how answers continue, and never begins one.
# - **End not scored.** The answers are right, but most of them do not stop: they run on until `max_new_tokens`.
# - **Prompt scored.** This is the mildest mistake: after the same 40 steps the loss of the answers is 0.10 higher than
#   with the right labels (interval above), since part of each gradient comes from the prompt. Scoring prompts can even
#   be a deliberate choice: with long prompts and short answers, or with few records, it improved instruction tuning
#   ([Shi et al. 2024](https://arxiv.org/abs/2405.14394)).
#
# There are three common ways to lose the end token. The template does not write it. Or truncating a record cuts it off.
# Or the loss mask excludes padding (section 6) by its id, while the padding token *is* the end token, as here and in
# many models. The last one is a [known problem](https://github.com/huggingface/transformers/issues/23530) of
# transformers' `DataCollatorForLanguageModeling`.

# %%
samples = ml.encode_records(law, tokenizer)
for most in (64, 96, 128):
    lost = sum(tokenizer.eos_id not in sample.labels[:most] for sample in samples)
    print(f"truncated to {most:>3} tokens, {lost:>3} of {len(samples)} law records lose their end token")

# %% [markdown]
# ## 5. The prompt at generation
#
# > **Predict.** With the right labels all 12 answers began right. How many still do if the generation prompt is
# > missing? And if the prompt is written as "User: ... Assistant: "?

# %%
predict("no generation prompt: begin right, best seed")
predict("another template: begin right, best seed")

# %%
for name, correct in asked.items():
    print(f"{name:<20}  {np.mean(correct):>4.1f} of {len(facts)} begin right; seed by seed {correct}")
claim("no generation prompt: begin right, best seed", max(asked["no generation prompt"]), 0, 6)
claim("another template: begin right, best seed", max(asked["another template"]), 0, 4)

# %% [markdown]
# The weights are the same in all three rows. The model has learned what follows certain tokens, and now other tokens
# precede the answer. A **template mismatch** gives no error message. Let one program render the prompts of training and
# of generation, from the template that is stored with the tokenizer.
#
# ## 6. Batches: padding and packing
#
# A batch is an array, but records have different lengths. **Padding** appends a token to the shorter ones, with the
# label -100. The padding is on the right, so in a causal model, whose tokens see only earlier ones, no token of the
# record sees it. **Packing** puts all records into one row, and a mask in attention lets each token see its own record
# only.
#
# > **Predict.** Which of the two computes more tokens? Do their losses differ?

# %%
model.load_state_dict({name: array.copy() for name, array in before.items()})
mixed = [*right[:4], *samples[:4]]
ids, labels = ml.collate(mixed, tokenizer.pad_id)
row = pack(mixed)
print(f"padded: {ids.shape}, {ids.size} tokens; in one row: {row.input_ids.shape}")
claim("share of padding", 1 - sum(len(sample.ids) for sample in mixed) / ids.size, 0.3, 0.4)
padded, in_a_row = model.loss(ids, labels).item(), model.loss(row.input_ids, row.labels, row.packing).item()
claim("loss of the padded batch minus that of the row", padded - in_a_row, -1e-5, 1e-5)
wrong = labels.copy()
for i, sample in enumerate(mixed):
    wrong[i, len(sample.ids) :] = tokenizer.pad_id
claim("share of padding among the scored tokens, if it is scored", 1 - row.scored / (wrong != -100).sum(), 0.4, 0.5)
with_padding = model.loss(ids, wrong).item()
claim("loss with scored padding minus the right loss", with_padding - padded, 0.5, 3)
records = padded * row.scored / (with_padding * (wrong != -100).sum())
claim("share of padding in this loss", 1 - records, 0.5, 0.7)

# %% [markdown]
# Packing computes no useless tokens, so minilora trains with it. (The row is even shorter than all records together:
# the tokens that all of them begin with are computed once.) If padding is scored, nearly half of the scored tokens are
# padding, and they make up most of the loss.
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# from transformers import AutoTokenizer, DataCollatorForSeq2Seq
#
# tok = AutoTokenizer.from_pretrained("tiny")
# features = []
# for record in facts:
#     prompt = tok.apply_chat_template(record.prompt, add_generation_prompt=True, return_dict=False)
#     ids = tok.apply_chat_template(list(record.messages), return_dict=False)
#     labels = [-100 if t < len(prompt) else i for t, i in enumerate(ids)]
#     features.append({"input_ids": ids, "labels": [*labels[:-1], -100]})  # ids end with a new line
# batch = DataCollatorForSeq2Seq(tok)(features)  # it pads labels with -100
# ```
#
# </details>
#
# ## What to remember
#
# - A tokenizer turns text into ids. Its merges were learned from some text, and text of another kind needs more tokens.
# - A record is one sequence, rendered by the chat template. Render the prompt at generation with the same template.
# - Labels are a copy of the ids, with -100 everywhere except at answers and their end tokens. The model's loss shifts
#   them.
# - Mistakes in labels do not show in the training loss. Decode the scored tokens, and read the model's answers.
#
# ## In minilora
#
# [`Tokenizer`](../minilora/models/tokenizer.py) encodes and renders; [`encode_record`](../minilora/data/samples.py)
# makes the labels, and `truncate` there drops records without a scored token; [`collate` and
# `pack`](../minilora/nn/parts.py) make batches.
#
# **Now you:** [exercises 6](exercises/06_what_the_model_reads.ipynb): encoding with given merges, ids and labels of a
# conversation, and a padded batch.
#
# ## Sources
#
# - Byte-pair encoding for words: [Sennrich et al. 2016](https://arxiv.org/abs/1508.07909).
# - Packing without attention between sequences: [Krell et al. 2021](https://arxiv.org/abs/2107.02027).

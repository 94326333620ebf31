"""A linear probe: are the labels of texts in the base's hidden states already? Accuracy, %, beside that of LoRA.

    python tests/benchmarks/probe.py support-labels legal-labels medical-labels finance-labels

Logistic regression on the mean of the hidden states over the tokens of a text, without any training of the model. After
which block, and how strongly it is regularised, the validation records choose.
"""

import argparse
from itertools import groupby

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import minilora as ml
from minilora.data.labels import LabelTask
from minilora.measure.statistics import wilson

AT_ONCE = 32  # texts
STRENGTHS = (0.001, 0.003, 0.01, 0.03)  # C of logistic regression: the higher, the less it is regularised


def hidden_means(model, tokenizer, texts):
    """The mean hidden state of each text after every fifth block and the last one, by block: (N, C) each."""
    blocks = model.model.layers
    chosen = sorted({*range(4, len(blocks), 5), len(blocks) - 1})
    means = {block: np.empty((len(texts), model.config.hidden_size), np.float32) for block in chosen}
    hidden = []
    hooks = [blocks[block].register_forward_hook(lambda layer, inputs, x: hidden.append(x)) for block in chosen]
    ids = [tokenizer.encode(text) for text in texts]

    def length(i):
        return len(ids[i])

    for _, alike in groupby(sorted(range(len(ids)), key=length), key=length):  # no padding
        alike = list(alike)
        for rows in (alike[i : i + AT_ONCE] for i in range(0, len(alike), AT_ONCE)):
            hidden.clear()
            with ml.no_grad():
                model.model(np.array([ids[i] for i in rows]))
            for block, x in zip(chosen, hidden, strict=True):  # x (B, T, C)
                means[block][rows] = x.data.mean(axis=1)
    for hook in hooks:
        hook.remove()
    return means


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--base", default="smollm2")
    args = parser.parse_args()
    model, tokenizer = ml.load(args.base)
    for data in args.data:
        splits = ml.split_records(ml.read_records(data))
        task = LabelTask.of(record.label for record in splits["train"])
        states, labels = {}, {}
        for name, records in splits.items():
            states[name] = hidden_means(model, tokenizer, [task.text(r.messages[0]["content"]) for r in records])
            labels[name] = np.array([record.label for record in records])
        found = []
        for block in states["train"]:
            for strength in STRENGTHS:
                probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
                probe.fit(states["train"][block], labels["train"])
                right = {name: probe.predict(states[name][block]) == labels[name] for name in ("validation", "test")}
                found.append((right["validation"].mean(), block, strength, right["test"]))
        share, block, strength, right = max(found, key=lambda each: each[0])
        result = wilson(right)
        print(
            f"{data}: {100 * result.mean:.1f} [{100 * result.low:.0f}, {100 * result.high:.0f}] "
            f"after block {block + 1}, C = {strength:g}; of the validation texts {100 * share:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Weights or prompt: the data of the comparison, in which no record that reading is measured on was trained to be read.

    python tests/benchmarks/reading.py FOLDER       # writes read.jsonl, passages.jsonl, ordinary.jsonl, hard.jsonl, ...
    minilora finetune --data FOLDER/read.jsonl --context FOLDER/passages.jsonl ... --out FOLDER/reader
    minilora eval --adapter FOLDER/reader --data FOLDER/ordinary.jsonl FOLDER/hard.jsonl --context support-handbook

Two passages of each topic of the support handbook are measured: 48 records, all of the training split, so that an
adapter that was trained on the support data has learned their facts. The reader learns from the records of the other
support passages and of the medical, finance and legal ones, each asked in one of its wordings, and its answers quote:
they are the shortest run of sentences of the passage that has all keywords. With --own-words the answers are those of
the data, which paraphrase the passage. handbook.jsonl is the handbook with questions and phrasings of the training
split in its index, as a help desk has them in its log; reworded questions and paraphrases are not among them.
"""

import argparse
import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np

from minilora.data.passages import Handbook, Passage
from minilora.measure.recall import contains

DATA = files("minilora") / "data"
WORDINGS = ("phrasings", "reworded", "paraphrase", "validation_paraphrase")
MEASURED = {
    "orders/after-checkout", "orders/confirmation", "delivery/standard", "delivery/not-at-home", "returns/deadlines",
    "returns/sending", "payment/cards", "payment/later", "account/acorns", "account/safety", "service/warranties",
    "service/repairs",
}  # fmt: skip


def rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def runs(text, length):
    """All runs of this many sentences."""
    sentences = re.split(r"(?<=[.!?;:])\s+", text)
    return [" ".join(sentences[i : i + length]) for i in range(len(sentences) - length + 1)]


def quotation(text, keywords):
    """The shortest run of sentences with as many of the keywords as three sentences can have."""
    found = [run for length in (1, 2, 3) for run in runs(text, length)]
    return max(found, key=lambda run: (sum(contains(run, word) for word in keywords), -len(run)))


def recall_of_sentences(wording, length):
    """Keyword recall, %, if the answer is the run of sentences of the right passage that BM25 ranks first."""
    context = {name: passage["text"] for passage in rows("support-handbook") for name in passage["covers"]}
    found = []
    for record in to_measure(wording):
        passages = [Passage(str(i), run) for i, run in enumerate(runs(context[record["id"]], length))]
        best = Handbook(passages, "sentences").ranked(record["question"])[0].text
        found.append(np.mean([contains(best, word) for word in record["keywords"]]))
    return 100 * np.mean(found)


def to_read(domain, own_words, without=()):
    """Every record with all of its wordings as phrasings, and a quotation as its answer; not those of some passages."""
    passages = [passage for passage in rows(f"{domain}-handbook") if passage["id"] not in without]
    context = {name: passage["text"] for passage in passages for name in passage["covers"]}
    found = []
    for record in rows(domain):
        if record["id"] in context:
            wordings = [record.get(name, []) for name in WORDINGS]
            phrasings = [text for each in wordings for text in ([each] if isinstance(each, str) else each)]
            passage = context[record["id"]]
            answer = record["answer"] if own_words else quotation(passage, record["keywords"])
            name = f"{domain}/{record['id']}"
            kept = {"id": name, "question": record["question"], "answer": answer, "phrasings": phrasings}
            found.append({**kept, "split": "train"})
    return found


def to_measure(wording):
    """The records of the measured passages, asked in one of their wordings, without passages."""
    measured = {name for passage in rows("support-handbook") if passage["id"] in MEASURED for name in passage["covers"]}
    return [
        {"id": record["id"], "question": record[wording], "answer": record["answer"], "keywords": record["keywords"]}
        for record in rows("support")
        if record["id"] in measured
    ]


def in_other_words():
    """The same records, asked as training asks them: their questions, two phrasings and the validation's paraphrase."""
    measured = {record["id"] for record in to_measure("question")}
    found = []
    for record in (record for record in rows("support") if record["id"] in measured):
        asked = [record["question"], *record["phrasings"][:7:6], record.get("validation_paraphrase")]
        kept = {"answer": record["answer"], "keywords": record["keywords"]}
        found += [{"id": f"{record['id']}/{i}", "question": text, **kept} for i, text in enumerate(asked) if text]
    return found


def with_questions():
    """The support handbook, with the questions of training that each passage answers."""
    asked = {r["id"]: [r["question"], *r["phrasings"]] for r in rows("support") if r["split"] == "train"}
    return [
        {"id": p["id"], "text": p["text"], "questions": [q for name in p["covers"] for q in asked.get(name, [])]}
        for p in rows("support-handbook")
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--own-words", action="store_true", help="the data's answers instead of quotations")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    read = to_read("support", arguments.own_words, MEASURED)
    for domain in ("medical", "finance", "legal"):
        read += to_read(domain, arguments.own_words)
    sets = {"read": read, "ordinary": to_measure("reworded"), "hard": to_measure("paraphrase")}
    sets["other"], sets["handbook"] = in_other_words(), with_questions()
    sets["passages"] = [
        {"id": f"{domain}/{passage['id']}", "text": passage["text"]}
        for domain in ("support", "medical", "finance", "legal")
        for passage in rows(f"{domain}-handbook")
        if domain != "support" or passage["id"] not in MEASURED
    ]
    for name, found in sets.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (arguments.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{arguments.folder / name}.jsonl: {len(found)} records")
    for wording in ("reworded", "paraphrase"):
        each = ", ".join(f"{length}: {recall_of_sentences(wording, length):.1f} %" for length in (1, 2, 3))
        print(f"{wording}: recall of the sentences of the right passage that BM25 finds, by their number: {each}")


if __name__ == "__main__":
    main()

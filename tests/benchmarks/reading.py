"""Weights or prompt: the data of the comparison, in which no record that reading is measured on was trained to be read.

    python tests/benchmarks/reading.py FOLDER       # writes read.jsonl, ordinary.jsonl, hard.jsonl, handbook.jsonl
    minilora finetune --bf16 --data FOLDER/read.jsonl ... --out FOLDER/reader      # the commands are in README.md
    minilora eval --bf16 --adapter FOLDER/reader --data FOLDER/ordinary.jsonl --context support-handbook

Two passages of each topic of the support handbook are measured: 48 records, all of the training split, so that an
adapter that was trained on the support data has learned their facts. The reader learns from the records of the other
passages and, with --medical, from the medical ones. handbook.jsonl is the handbook with questions and phrasings of the
training split in its index, as a help desk has them in its log; reworded questions and paraphrases are not among them.
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path

DATA = files("minilora") / "data"
WORDINGS = ("phrasings", "reworded", "paraphrase", "validation_paraphrase")
MEASURED = {
    "orders/after-checkout", "orders/confirmation", "delivery/standard", "delivery/not-at-home", "returns/deadlines",
    "returns/sending", "payment/cards", "payment/later", "account/acorns", "account/safety", "service/warranties",
    "service/repairs",
}  # fmt: skip


def rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def to_read(domain, without=()):
    """Every record with its passage, and with all of its wordings as phrasings; without those of some passages."""
    passages = [passage for passage in rows(f"{domain}-handbook") if passage["id"] not in without]
    context = {name: passage["text"] for passage in passages for name in passage["covers"]}
    found = []
    for record in rows(domain):
        if record["id"] in context:
            wordings = [record.get(name, []) for name in WORDINGS]
            phrasings = [text for each in wordings for text in ([each] if isinstance(each, str) else each)]
            kept = {name: record[name] for name in ("id", "question", "answer")}
            found.append({**kept, "phrasings": phrasings, "context": context[record["id"]], "split": "train"})
    return found


def to_measure(wording):
    """The records of the measured passages, asked in one of their wordings, without passages."""
    measured = {name for passage in rows("support-handbook") if passage["id"] in MEASURED for name in passage["covers"]}
    return [
        {"id": record["id"], "question": record[wording], "answer": record["answer"], "keywords": record["keywords"]}
        for record in rows("support")
        if record["id"] in measured
    ]


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
    parser.add_argument("--medical", action="store_true", help="read the medical passages, too")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    read = to_read("support", MEASURED) + (to_read("medical") if arguments.medical else [])
    sets = {"read": read, "ordinary": to_measure("reworded"), "hard": to_measure("paraphrase")}
    sets["handbook"] = with_questions()
    for name, found in sets.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (arguments.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{arguments.folder / name}.jsonl: {len(found)} records")


if __name__ == "__main__":
    main()

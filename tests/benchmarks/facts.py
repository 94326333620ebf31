"""How far words alone lead from a question to its record: BM25 over the questions and phrasings of training.

    python tests/benchmarks/facts.py        # a line per data set and number of phrasings

A test question counts if its own record is ranked first. It is what a model without any knowledge of words could do.
"""

import minilora as ml
from minilora.data.passages import Handbook, Passage
from minilora.data.records import DOMAINS


def hits(records, phrasings, wording):
    """The share of the records with this wording that it finds, in percent; so many phrasings are known of each."""
    known = [Passage("", " ".join([r.prompt[-1]["content"], *r.phrasings[:phrasings]])) for r in records]
    handbook, asked = Handbook(known, "training"), [r for r in records if getattr(r, wording)]
    own = {id(passage): record.id for passage, record in zip(handbook.passages, records, strict=True)}
    return 100 * sum(own[id(handbook.ranked(getattr(r, wording))[0])] == r.id for r in asked) / len(asked)


def main():
    for domain in DOMAINS:
        records = ml.split_records(ml.read_records(domain))["train"]
        for phrasings in sorted({4, len(records[0].phrasings)}):
            found = [f"{name} {hits(records, phrasings, name):3.0f} %" for name in ("reworded", "paraphrase")]
            print(f"{domain:8} {phrasings:2} phrasings  {'  '.join(found)}")


if __name__ == "__main__":
    main()

"""The base with examples in its prompt, on questions that are answered in free text: keyword recall, %.

    python tests/benchmarks/few_shot.py support:reworded medical:reworded legal:paraphrase
    python tests/benchmarks/few_shot.py FOLDER/ordinary.jsonl:all --examples FOLDER/read.jsonl \\
        --context support-handbook

Labels and fields have this baseline on the page of `minilora finetune`. Here the examples are training records of other
questions, evenly chosen, as earlier turns of the conversation. The second command needs the files that reading.py
writes.
"""

import argparse

import numpy as np

import minilora as ml
from minilora.generate.answers import generate_batch
from minilora.measure.labels import with_examples
from minilora.measure.loss import evenly, held_out
from minilora.measure.recall import ANSWER_TOKENS, recalls
from minilora.measure.statistics import bootstrap, middle
from minilora.train.material import with_passages


def questions(data, which, most):
    """The records whose answers are measured: all, those of a split, or those of training in another wording."""
    records = ml.read_records(data)
    splits = ml.split_records(records) | {"all": records}
    found = splits[which] if which in splits else held_out(splits, len(splits["train"]))[which]
    return evenly([record for record in found if record.keywords], most)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="DATA:SET", help="such as support:reworded")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--examples", metavar="DATA", help="where examples come from (default: the training split)")
    parser.add_argument("--context", help="passages: the right one is in every prompt")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--records", type=int, default=48, help="how many questions are measured")
    args = parser.parse_args()
    model, tokenizer = ml.load(args.base)
    limit = model.config.max_position_embeddings
    for each in args.sets:
        data, _, which = each.rpartition(":")
        asked = questions(data, which, args.records)
        known = ml.split_records(ml.read_records(args.examples or data))["train"]
        if args.context:
            asked = with_passages(asked, args.context, data, tokenizer, limit)
        for shots in args.shots:
            examples = evenly(known, shots)[:shots] if shots else []
            answers = generate_batch(model, tokenizer, with_examples(asked, examples), ANSWER_TOKENS)
            shares = 100 * np.array(recalls(answers, asked))
            low, high = middle(bootstrap(len(shares), lambda draws, shares=shares: draws @ shares / len(shares)))
            print(f"{each}, {len(asked)} questions, {shots}-shot: {shares.mean():.1f} [{low:.0f}, {high:.0f}]")


if __name__ == "__main__":
    main()

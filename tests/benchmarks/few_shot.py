"""The base with examples in its prompt, on questions that are answered in free text: keyword recall, %.

    python tests/benchmarks/few_shot.py support:reworded medical:reworded legal:paraphrase
    python tests/benchmarks/few_shot.py FOLDER/ordinary.jsonl:all --examples FOLDER/read.jsonl \\
        --context support-handbook [FOLDER/passages.jsonl --quote 3]

Labels and fields have this baseline on the page of `minilora finetune`. Here the examples are training records of other
questions, evenly chosen, as earlier turns of the conversation. The second command needs the files that reading.py
writes. With --quote the base answers nothing: the answer is the sentences of the right passage after which the question
is likeliest, and an example is a passage, its sentences and the question that they answer, as --quote trains on them;
its passages are those of the last --context.
"""

import argparse

import numpy as np

import minilora as ml
from minilora.data.quotes import Quoting
from minilora.generate import quotes
from minilora.generate.answers import generate_batch
from minilora.generate.labels import label_logprobs
from minilora.generate.prefix_cache import ReadPassages
from minilora.measure.labels import with_examples
from minilora.measure.loss import evenly, held_out
from minilora.measure.recall import ANSWER_TOKENS, recalls
from minilora.measure.statistics import bootstrap, middle
from minilora.train.material import right_passages, with_passages


def questions(data, which, most):
    """The records whose answers are measured: all, those of a split, or those of training in another wording."""
    records = ml.read_records(data)
    splits = ml.split_records(records) | {"all": records}
    found = splits[which] if which in splits else held_out(splits, len(splits["train"]))[which]
    return evenly([record for record in found if record.keywords], most)


def quotations(model, tokenizer, sentences, asked, examples, passages):
    """Of each question the sentences of its right passage after which the model finds it likeliest."""
    quoting, found = Quoting(sentences), []
    shown, known = [], ReadPassages()
    for record in examples:
        shown += quoting.turned(record, passages[record.id].text, ())[0].messages
    for record in asked:
        passage = passages[record.id]
        parts = quoting.parts(passage.text, min(quotes.RUN, sentences))
        talks = [[*shown, {"role": "user", "content": quoting.prompt(passage.text, part)}] for part in parts]
        logprobs = label_logprobs(model, tokenizer, talks, [record.question], known=known)[:, 0]
        found.append(quotes.likeliest(quoting, [passage], [logprobs]).text)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="DATA:SET", help="such as support:reworded")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--examples", metavar="DATA", help="where examples come from (default: the training split)")
    parser.add_argument("--context", nargs="+", help="passages: the right one is in every prompt")
    parser.add_argument("--quote", type=int, metavar="N", help="quote up to N sentences of the right passage")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--records", type=int, default=48, help="how many questions are measured")
    args = parser.parse_args()
    if args.quote and not args.context:
        parser.error("--quote needs the passages: --context HANDBOOK")
    model, tokenizer = ml.load(args.base)
    limit = model.config.max_position_embeddings
    for each in args.sets:
        data, _, which = each.rpartition(":")
        asked = questions(data, which, args.records)
        known = ml.split_records(ml.read_records(args.examples or data))["train"]
        if args.quote:
            passages = right_passages(asked, args.context[0], data, tokenizer, limit)
            passages |= right_passages(known, args.context[-1], args.examples or data, tokenizer, limit)
        elif args.context:
            asked = with_passages(asked, args.context[0], data, tokenizer, limit)
        for shots in args.shots:
            examples = evenly(known, shots)[:shots] if shots else []
            if args.quote:
                answers = quotations(model, tokenizer, args.quote, asked, examples, passages)
            else:
                answers = generate_batch(model, tokenizer, with_examples(asked, examples), ANSWER_TOKENS)
            shares = 100 * np.array(recalls(answers, asked))
            low, high = middle(bootstrap(len(shares), lambda draws, shares=shares: draws @ shares / len(shares)))
            print(f"{each}, {len(asked)} questions, {shots}-shot: {shares.mean():.1f} [{low:.0f}, {high:.0f}]")


if __name__ == "__main__":
    main()

"""Seconds to the first token of each turn of a talk, with prefix caching and without it, in turns.

    minilora pull smollm2 && python tests/benchmarks/talk.py
    python tests/benchmarks/talk.py --base tiny --tokens 200

The first question has so many tokens that the talk has about `--tokens` of them; the later ones are short.
"""

import argparse
import statistics
import time

import minilora as ml
from minilora.generate.conversation import Talk
from minilora.generate.prefix_cache import PrefixCache
from minilora.generate.streams import Sampling

QUESTIONS = ["And in one word?", "Why?", "Is that certain?"]
ANSWER = 24  # tokens, at most


def first_tokens(talk, questions):
    """For each question: the tokens of the talk after it, and the seconds until the first token of its answer."""
    for question in questions:
        began, firsts = time.perf_counter(), []
        talk.ask(question, lambda piece, began=began, firsts=firsts: firsts.append(time.perf_counter() - began))
        yield talk.used, firsts[0]


def main():
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=1000, help="of the talk, about (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    given = parser.parse_args()
    model, tokenizer = ml.load(given.base)
    answers = " ".join(record.messages[-1]["content"] for record in ml.read_records("legal"))
    room = given.tokens - (ANSWER + 20) * len(QUESTIONS)
    first = f"{tokenizer.decode(tokenizer.encode(answers)[:room])} Sum this up."
    found = {name: [] for name in ("with prefix caching", "without")}
    for _ in range(given.rounds):
        for name, turns in found.items():
            talk = Talk(model, tokenizer, Sampling(ANSWER))
            if name == "without":
                talk.known = PrefixCache(0)
            turns.append(list(first_tokens(talk, [first, *QUESTIONS])))
    print(f"seconds to the first token, medians of {given.rounds}; tokens of the talk after each turn")
    for name, turns in found.items():
        cells = [f"{statistics.median(s for _, s in turn):.2f} s ({turn[0][0]:,})" for turn in zip(*turns, strict=True)]
        print(f"{name:<22}{'   '.join(cells)}")


if __name__ == "__main__":
    main()

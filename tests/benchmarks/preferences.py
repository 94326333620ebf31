"""SFT, DPO, and SFT followed by DPO: what each makes of held-out pairs of answers, and of the model's own answers.

    python tests/benchmarks/preferences.py --out FOLDER [--base tiny --lr 2e-4 1e-3 --beta 0.1 0.3 ...]

Prints a table with a row for each method, learning rate and beta. DPO alone begins with a new adapter, and the base is
its reference. After SFT, the reference is the adapter that SFT has trained, which is stored in FOLDER. The columns
"accuracy", "shift", "chosen" and "rejected" of all rows compare with the base: the share of test pairs in which the
log-ratio has shifted towards the chosen answer, by how many nats on average, and how each answer's log-probability has
changed. The last columns are measured on greedy answers to the test prompts by RULES. The first two rows apply RULES
to the data's own answers.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

import minilora as ml
from minilora.data.records import read_records
from minilora.measure.loss import mean_loss, sample_losses
from minilora.measure.recall import answer_all

VERBS = (
    "don't|do not|never|always|ask|buy|call|cancel|change|check|claim|collect|consider|contact|demand|delete|file|find|"
    "get|give|go|ignore|insist|keep|leave|let|make|open|order|pay|put|refuse|request|review|say|sell|send|sign|sit|"
    "speak|start|stay|stop|sue|take|talk|tell|threaten|throw|try|turn|use|wait|write"
)
RULES = {  # when an answer has a property; a sentence that begins with a verb, and "you should", are advice
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "names who decides": r"\b(lawyer|notary|court|judge|union|adviser|advice cent(re|er)|association|authorit|"
        r"ombudsman|office|mediator|police|insurer|registry|council|doctor|pharmacist|midwife|clinic|practice|bank|desk|"
        r"workshop|team)",
        "states a limit": r"\b(depends?|vary|varies|differs?|may|usually|often|some|most|many|whether|can't|cannot|"
        r"generally|unclear)\b",
        "gives advice": rf"(^|[.!?:;]\s+|\n)(\d+\.\s*|[-*]\s*)?(\*\*)?((yes|no|then|just|first|so)[,. ]+)?(please )?"
        rf"({VERBS})\b|\byou (should|must|have to|need to|ought)\b",
    }.items()
}


def properties(answers):
    """The columns that need only text: mean words, then the percentage of answers with each property."""
    shares = [100 * np.mean([bool(rule.search(answer)) for answer in answers]) for rule in RULES.values()]
    return f"{np.mean([len(answer.split()) for answer in answers]):.0f} | " + " | ".join(f"{x:.0f} %" for x in shares)


class Study:
    """A model with an adapter, the data, and what the base says of the test pairs."""

    def __init__(self, options):
        self.options = options
        self.model, self.tokenizer = ml.load(options.base)
        splits = ml.split_records(read_records(options.data))
        self.test = splits["test"]
        self.pairs = ml.encode_pairs(
            splits["train"][:: max(1, len(splits["train"]) // options.records)], self.tokenizer
        )
        self.held_out = ml.encode_pairs(self.test, self.tokenizer)
        self.general = ml.encode_records(read_records("general")[:: options.general_step], self.tokenizer)
        self.base, self.adapted = self.log_p(), False

    def log_p(self):
        """The log-probabilities of the chosen and of the rejected test answers: (2, N)."""
        samples = [sample for pair in self.held_out for sample in pair.sequences]
        return -sample_losses(self.model, samples).reshape(-1, 2).T

    def start(self, seed, stored=None):
        """Replace the adapter by a new one, or by a stored one."""
        if self.adapted:
            ml.remove_adapter(self.model, "study")
        self.adapted = True
        if stored is not None:
            ml.load_adapter(self.model, stored, name="study")
        else:
            config = ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
            ml.add_adapter(self.model, config, name="study", seed=seed)

    def train(self, samples, lr, seed):
        """One run on samples or pairs."""
        ml.fit(self.model, samples, steps=self.options.steps, batch_size=self.options.batch_size, lr=lr, seed=seed)

    def row(self, name):
        """Measure and print."""
        log_p = self.log_p()
        chosen, rejected = log_p - self.base
        shift = chosen - rejected
        answers = answer_all(self.model, self.tokenizer, self.test[: self.options.answers], self.options.tokens)
        print(
            f"| {name} | {100 * (log_p[0] > log_p[1]).mean():.0f} % | {100 * (shift > 0).mean():.0f} % | "
            f"{shift.mean():.1f} | {chosen.mean():+.1f} | {rejected.mean():+.1f} | "
            f"{mean_loss(self.model, self.general):.3f} | {properties(answers)} |",
            flush=True,
        )
        for record, answer in list(zip(self.test, answers, strict=False))[: self.options.show]:
            print(f"    {record.prompt[-1]['content']} -> {answer}", flush=True)


def main():
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters of SFT")
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--data", default="legal-pairs")
    parser.add_argument("--methods", nargs="+", default=["base", "sft", "dpo", "sft+dpo"])
    parser.add_argument("--sft-lr", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-4])
    parser.add_argument("--beta", type=float, nargs="+", default=[0.1])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--records", type=int, default=140, help="training pairs")
    parser.add_argument("--answers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--general-step", type=int, default=1, help="measure every n-th record of general text")
    parser.add_argument("--show", type=int, default=0, help="answers to print")
    options = parser.parse_args()
    study = Study(options)
    print(
        "| | chosen likelier | accuracy | shift | chosen | rejected | general text | words | "
        + " | ".join(RULES)
        + " |"
    )
    print("|---" * 11 + "|")
    if "base" in options.methods:
        for side in ("chosen", "rejected"):
            answers = [r.messages[-1]["content"] if side == "chosen" else r.rejected for r in study.test]
            print(f"| the {side} answers | | | | | | | {properties(answers)} |")
        study.row("base")
    for seed in options.seed:
        stored = options.out / f"sft-{seed}"
        if "sft" in options.methods:
            study.start(seed)
            study.train([pair.chosen for pair in study.pairs], options.sft_lr, seed)
            ml.save_adapter(study.model, stored, name="study", overwrite=True)
            study.row(f"SFT {options.sft_lr:g}, seed {seed}")
        for method, before in (("dpo", None), ("sft+dpo", stored)):
            for lr, beta in ((lr, beta) for beta in options.beta for lr in options.lr if method in options.methods):
                study.start(seed, before)
                pairs = [replace(pair, beta=beta) for pair in ml.with_reference(study.model, study.pairs)]
                study.train(pairs, lr, seed)
                study.row(f"{method.upper()} {lr:g}, beta {beta:g}, seed {seed}")


if __name__ == "__main__":
    main()

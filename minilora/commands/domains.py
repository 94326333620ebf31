"""`minilora compare --domains`: one base, four adapters, and what each of them knows of every domain.

Each domain is one run of `finetune` with its default options. A finished run is kept, an interrupted one is continued,
and what has been measured is not measured again: the same command continues where it was stopped.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..data.records import DOMAINS, read_records
from ..data.splits import split_records
from ..experiments.memo import path_of, remember
from ..files.disk import write_json
from ..lora.adapters import Choice
from ..lora.combine import combine_adapters
from ..lora.peft import WEIGHTS_FILE
from ..measure.environment import now
from ..measure.scores import LOSS, RECALL, MeasuredSet, Scores, measure, read_sets, resampled, summary
from ..measure.statistics import interval_as_json
from ..models.with_adapters import BASE_NAME, DEFAULT_BASE, load_with_adapters
from ..options import BASE, check, option, refuse_other_settings
from ..pages.text import NARROWEST, WIDTH, columns, duration, listed, percent, rule, wrapped
from ..progress import log
from ..train.checkpoint import read_state
from ..train.job import finetune
from ..train.options import Options
from ..train.run_folder import CHECKPOINT, METRICS_FILE, STATE_FILE, RunFolder
from .eval import of_intervals, shown
from .report import read_metrics

MERGES = ("linear", "svd")  # ways of `combine_adapters`, and names of what they make
RESULT_FILE, PICTURE_FILE, MEASURED = "domains.json", "domains.png", "measured"


@dataclass(frozen=True, kw_only=True)
class DomainsOptions:
    """How to train and measure the four domains. Raises ValueError for values that mean nothing."""

    base: str = option(DEFAULT_BASE, BASE, path=True)
    out: str | None = option(None, "folder for all results (default: runs, with each run where finetune puts it)")
    overwrite: bool = option(False, "replace runs that had other options")
    steps: int | None = option(None, "steps of each run, instead of finetune's epochs")
    limit: int = option(20, "records of each set that are measured, evenly chosen", least=1)
    seed: int = option(0, "seed of the adapters' initialisation and of the order of the records")

    def __post_init__(self):
        check(self)
        self.run(DOMAINS[0])  # refuses what no run can be

    def run(self, domain: str, **change: Any) -> Options:
        """The run of one domain as `finetune` takes it."""
        out = str(Path(self.out) / domain) if self.out else None
        return Options(base=self.base, data=domain, steps=self.steps, seed=self.seed, out=out, **change)

    @property
    def folder(self) -> Path:
        """The folder for table, picture and numbers: domains in `out`, or next to the runs of this base."""
        own = self.run(DOMAINS[0]).folder
        return own.with_name(own.name.replace(DOMAINS[0], "domains", 1))


def compare_domains(options: DomainsOptions) -> dict[str, Any]:
    """Train what is not trained yet, measure every adapter on every domain, and return the numbers.

    They are also written to `domains.json` in `options.folder`. Measured are the base, each adapter, the four merged
    into one, and pairs of adapters combined half and half, these on their own two domains alone. Raises ValueError,
    before anything is trained, for a finished run with other settings.
    """
    began = time.monotonic()
    todo = [domain for domain in DOMAINS if not _finished(options, domain)]
    try:
        _train(options, todo)
    except KeyboardInterrupt:
        log.info("interrupted: the same command continues from here")
        raise
    trained = time.monotonic()
    folders = {domain: options.run(domain).folder for domain in DOMAINS}
    model, tokenizer = load_with_adapters(folders, options.base)
    merged = {}
    for method in MERGES:
        made = combine_adapters(model, DOMAINS, [1 / len(DOMAINS)] * len(DOMAINS), method, name=method)
        merged[method] = {"weight": 1 / len(DOMAINS), "error": made.error}
    sets = read_sets([*DOMAINS, "general"], tokenizer, Options.max_length, options.limit)
    sets = [each for each in sets if each.kind != "reworded"]  # the matrix has two columns a domain
    pairs = {f"{one} + {other}": (one, other) for one, other in combinations(DOMAINS, 2)}
    adapters: dict[str, Choice] = {BASE_NAME: None, **{name: name for name in (*DOMAINS, *MERGES)}}
    adapters |= {label: {one: 0.5, other: 0.5} for label, (one, other) in pairs.items()}

    def wanted(name: str, each: MeasuredSet) -> bool:
        return name not in pairs or (each.data in pairs[name] and each.kind == "paraphrase")

    scores = measure(
        model, tokenizer, adapters, sets, wanted=wanted, remember=_remembered(options.folder, folders, sets)
    )
    alone = {key: {name: s for name, s in found.items() if name not in pairs} for key, found in scores.items()}
    result = {
        "created": now(),
        "base": options.base,
        "adapters": {name: {"folder": str(path), "trained_on": name} for name, path in folders.items()},
        "merged": merged,
        **summary(alone, sets, options.seed),
        "best_on_own": {domain: _best(alone[f"{domain}/paraphrase"], domain, options.seed) for domain in DOMAINS},
        "mixes": [
            _mixed(scores[f"{domain}/paraphrase"], label, domain, options.seed)
            for label, pair in pairs.items()
            for domain in pair
        ],
        "trained_now": todo,
        "seconds": {"training": trained - began, "measuring": time.monotonic() - trained},
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    write_json(options.folder / RESULT_FILE, result)
    return result


# -- the runs ----------------------------------------------------------------------------------------------------------


def _finished(options: DomainsOptions, domain: str) -> bool:
    """Is the run of a domain there? Raises ValueError for one with other settings, and for files of something else."""
    run = options.run(domain)
    if not (run.folder / METRICS_FILE).is_file():
        RunFolder(run.folder, options.overwrite, resume=True).refuse()
        return False
    now, then = asdict(run.in_effect()), read_metrics(run.folder)["options"]
    both = [name for name in run.decisive() if name in then and (name != "lr" or run.lr)]  # or the base's, if none
    try:
        then, now = ({name: each[name] for name in both} for each in (then, now))
        refuse_other_settings(str(run.folder), then, now, "--overwrite replaces it, --out chooses another folder")
    except ValueError:
        if not options.overwrite:
            raise
        return False
    return True


def _train(options: DomainsOptions, todo: list[str]) -> None:
    """Make these runs one by one. After each, log about how long the others will take."""
    records = {domain: len(split_records(read_records(domain))["train"]) for domain in todo}
    spent = done = 0.0
    for i, domain in enumerate(todo):
        rest = spent / done * sum(records[name] for name in todo[i:]) if done else None
        left = "" if rest is None else f", about {duration(rest)} to go"
        log.info(f"training {domain}: {i + 1} of {len(todo)}{left}")
        start, resume = time.monotonic(), _interrupted(options, domain)
        finetune(options.run(domain, overwrite=options.overwrite, resume=resume))
        if not resume:  # a part of a run says nothing about a whole one
            spent, done = spent + time.monotonic() - start, done + records[domain]


def _interrupted(options: DomainsOptions, domain: str) -> bool:
    """Is there a run to continue? --overwrite forgets one with other settings."""
    run = options.run(domain)
    partial = RunFolder(run.folder).partial
    if not (partial / CHECKPOINT / STATE_FILE).is_file():
        return False
    return not options.overwrite or read_state(partial).options == run.decisive()


def _remembered(
    folder: Path, adapters: Mapping[str, Path], sets: list[MeasuredSet]
) -> Callable[[tuple[str, str, str], Callable[[], np.ndarray]], np.ndarray]:
    """`remember` for `measure`: numbers are kept in `folder`, by all that decides them: base, adapters, records."""
    digest = hashlib.sha256()
    for path in adapters.values():
        digest.update(json.dumps(read_metrics(path)["base_sha256"]).encode() + (path / WEIGHTS_FILE).read_bytes())
    for each in sets:
        digest.update(repr((each.name, each.samples, each.asked)).encode())

    def remembered(key: tuple[str, str, str], make: Callable[[], np.ndarray]) -> np.ndarray:
        def numbers() -> list[float | None]:
            return [x if np.isfinite(x) else None for x in make().tolist()]

        decides = {"key": key, "of": digest.hexdigest()}
        return np.array(remember(path_of(folder / MEASURED, key[0], decides), decides, numbers)["result"], float)

    return remembered


# -- what the numbers say ----------------------------------------------------------------------------------------------


def _best(scores: Mapping[str, Scores], own: str, seed: int) -> dict[str, Any]:
    """The adapter of a domain compared with the best other one there, by measure.

    held: whether it is better, and the interval of the difference excludes 0.
    """
    found: dict[str, Any] = {}
    names = list(scores)
    for name, draws in resampled(scores, seed).items():
        sign = -1 if name == LOSS else 1
        others = [other for other in names if other != own]
        next_best = max(others, key=lambda other: sign * draws.means[names.index(other)])
        difference = draws.difference(names.index(own), names.index(next_best))
        held = difference.high < 0 if name == LOSS else difference.low > 0
        found[name] = {"next": next_best, "difference": interval_as_json(difference), "held": bool(held)}
    return found


def _mixed(scores: Mapping[str, Scores], label: str, domain: str, seed: int) -> dict[str, Any]:
    """A combination on one of its domains, compared with that domain's adapter alone. kept: its share of the gain."""
    found: dict[str, Any] = {"mix": label, "on": domain}
    chosen = {name: scores[name] for name in (BASE_NAME, domain, label)}
    for name, draws in resampled(chosen, seed).items():
        base, own, mix = draws.draws.T
        mean = draws.means
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = draws.interval((mean[2] - mean[0]) / (mean[1] - mean[0]), (mix - base) / (own - base))
        means = {key: interval_as_json(draws.mean(i)) for i, key in enumerate(("base", "alone", "mixed"))}
        found[name] = means | {"lost": interval_as_json(draws.difference(2, 1)), "kept": interval_as_json(kept)}
    return found


def drawn(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that the heat map shows: paraphrased training questions, and general text."""
    sets = {name: about for name, about in result["sets"].items() if about["kind"] != "unseen"}
    return {**result, "sets": sets, "scores": {name: result["scores"][name] for name in sets}}


# -- the page ----------------------------------------------------------------------------------------------------------

TITLES = {
    (LOSS, "paraphrase"): "loss (nats per token), training questions, paraphrased",
    (RECALL, "paraphrase"): "keyword recall (%), training questions, paraphrased",
    (LOSS, "unseen"): "loss (nats per token), questions not in the training data",
    (RECALL, "unseen"): "keyword recall (%), questions not in the training data",
}
WORDS = {LOSS: "loss", RECALL: "keyword recall"}
DIGITS = {LOSS: 2, RECALL: 0}


def domains_page(result: Mapping[str, Any], width: int = WIDTH) -> str:
    """The numbers of `compare_domains` as text of at most 100 columns; of 80, without the intervals of the tables."""
    width = min(width, WIDTH)
    lines: list[str] = []
    for (name, kind), title in TITLES.items():
        lines += [rule(title, width), *_table(result, name, kind, intervals=width > NARROWEST), ""]
    lines += [rule("each adapter on its own domain, compared with the best other one", width)]
    lines += columns([["domain", "measure", "difference", "compared with", "significant"], *_on_own(result)], left=5)
    lines += ["", rule("two adapters, combined half and half: how much of each gain is kept", width)]
    heads = [
        ["", "", "loss", "", "", "recall, %"],
        ["", "on", "alone", "combined", "gain kept, %", "alone", "combined"],
    ]
    lines += columns([*heads, *_combined(result)], left=2)
    off = [f"{name} by {percent(one['error'])}" for name, one in result["merged"].items()]
    weight = next(iter(result["merged"].values()))["weight"]
    notes = f"{of_intervals(result)} {listed(list(result['merged']))}: the four adapters merged into one, "
    notes += f"each with weight {weight:g}. "
    notes += f"They differ from the exact sum, in the module with the largest difference: {listed(off)}."
    return "\n".join([*lines, "", *wrapped(notes, width)])


def _table(result: Mapping[str, Any], measure: str, kind: str, intervals: bool) -> list[str]:
    kinds = ("unseen",) if kind == "unseen" else (kind, "all")
    sets = {about["data"]: key for key, about in result["sets"].items() if about["kind"] in kinds}
    rows = [["", *sets]]
    for name in next(iter(result["scores"].values())):
        found = [result["scores"][key][name][measure] for key in sets.values()]
        rows.append([name, *(_cell(one if intervals else {**one, "low": None}, measure) for one in found)])
    return columns(rows, left=6, gap=1)


def _on_own(result: Mapping[str, Any]) -> Iterator[list[str]]:
    for domain, best in result["best_on_own"].items():
        for name, found in best.items():
            difference = shown(found["difference"], name, DIGITS[name], sign=True)
            yield [domain, WORDS[name], difference, found["next"], "yes" if found["held"] else "NO"]


def _combined(result: Mapping[str, Any]) -> Iterator[list[str]]:
    for one in result["mixes"]:
        kept = shown(one[LOSS]["kept"], RECALL, 0)
        cells = [_cell({**one[name][key], "low": None}, name) for name in (LOSS, RECALL) for key in ("alone", "mixed")]
        yield [one["mix"], one["on"], *cells[:2], kept, *cells[2:]]


def _cell(found: Mapping[str, float | None], measure: str) -> str:
    return shown(found, measure, DIGITS[measure])

"""`minilora compare --domains`: one base, four specialists, and what each of them knows of every domain.

Each domain is one run of `finetune` with its default options. A finished run is kept, one that was interrupted goes on,
and what has been measured is not measured again: the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..data.records import read_records
from ..data.splits import split_records
from ..files.disk import ModelFileError, read_json, write_json
from ..lora.combine import combine_adapters
from ..lora.peft import WEIGHTS_FILE
from ..models.with_adapters import BASE_NAME, load_with_adapters
from ..options import BASE, option, refuse_other_settings
from ..progress import log
from ..train.checkpoint import read_state
from ..train.job import finetune
from ..train.options import Options
from ..train.run_folder import CHECKPOINT, METRICS_FILE, STATE_FILE, RunFolder
from .eval import LOSS, RECALL, MeasuredSet, Scores, measure, plain, read_sets, resampled, shown, summary
from .report import read_metrics, rule

DOMAINS = ("legal", "medical", "support", "finance")
MERGES = ("linear", "svd")  # ways of `combine_adapters`, and names of what they make
RESULT_FILE, PICTURE_FILE, KNOWN_FILE = "domains.json", "domains.png", "measured.json"


@dataclass(frozen=True, kw_only=True)
class DomainsOptions:
    """How to train and measure the four domains. Raises ValueError for values that mean nothing."""

    base: str = option(Options.base, BASE)
    out: str | None = option(None, "folder for all results (default: runs, with each run where finetune puts it)")
    overwrite: bool = option(False, "train anew what was trained with other settings")
    steps: int | None = option(None, "steps of each run, instead of finetune's passes over the data")
    limit: int = option(20, "records of each set that are measured, evenly chosen")
    seed: int = option(0, "decides the adapters' start and the order of the records")

    def __post_init__(self):
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        self.run(DOMAINS[0])  # refuses what no run can be

    def run(self, domain: str, **change: Any) -> Options:
        """The run of one domain as `finetune` takes it."""
        out = str(Path(self.out) / domain) if self.out else None
        return Options(base=self.base, data=domain, steps=self.steps, seed=self.seed, out=out, **change)

    @property
    def folder(self) -> Path:
        """Where table, picture and numbers go: domains in `out`, or beside the runs of this base."""
        own = self.run(DOMAINS[0]).folder
        return own.with_name(own.name.replace(DOMAINS[0], "domains", 1))


def compare_domains(options: DomainsOptions) -> dict[str, Any]:
    """Train what is not trained yet, measure every version on every domain, and return the numbers.

    They also stand in `domains.json` in `options.folder`. Versions are the base, each adapter, the four merged, and
    pairs of adapters mixed half and half, measured on their own two domains. Raises ValueError, before anything is
    trained, when a run is there that had other settings.
    """
    began = time.monotonic()
    todo = [domain for domain in DOMAINS if not _finished(options, domain)]
    try:
        _train(options, todo)
    except KeyboardInterrupt:
        log.info("the same command, given again, goes on from here")
        raise
    trained = time.monotonic()
    metrics = {domain: read_metrics(options.run(domain).folder) for domain in DOMAINS}
    folders = {domain: options.run(domain).folder for domain in DOMAINS}
    model, tokenizer = load_with_adapters(folders, options.base)
    merged = {}
    for method in MERGES:
        made = combine_adapters(model, DOMAINS, [1 / len(DOMAINS)] * len(DOMAINS), method, name=method)
        merged[method] = {"weight": 1 / len(DOMAINS), "error": made.error}
    sets = read_sets([*DOMAINS, "general"], tokenizer, options.limit)
    pairs = {f"{one} + {other}": (one, other) for one, other in combinations(DOMAINS, 2)}
    versions: dict[str, str | dict[str, float] | None] = {
        BASE_NAME: None,
        **{name: name for name in (*DOMAINS, *MERGES)},
    }
    versions |= {label: {one: 0.5, other: 0.5} for label, (one, other) in pairs.items()}

    def wanted(version: str, each: MeasuredSet) -> bool:
        return version not in pairs or (each.data in pairs[version] and each.kind == "paraphrase")

    options.folder.mkdir(parents=True, exist_ok=True)
    known = Known(options.folder / KNOWN_FILE, _fingerprint(metrics, folders, sets))
    scores = measure(model, tokenizer, versions, sets, wanted=wanted, known=known)
    alone = {name: {v: s for v, s in found.items() if v not in pairs} for name, found in scores.items()}
    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
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
    write_json(options.folder / RESULT_FILE, result)
    return result


# -- the runs ----------------------------------------------------------------------------------------------------------


def _finished(options: DomainsOptions, domain: str) -> bool:
    """Whether the run of a domain is there. Raises ValueError when what is there had other settings, or is no run."""
    run = options.run(domain)
    if not (run.folder / METRICS_FILE).is_file():
        RunFolder(run.folder, options.overwrite, resume=True).refuse()
        return False
    then, now = read_metrics(run.folder)["options"], run.decisive()
    common = now.keys() & then.keys()
    then, now = ({name: each[name] for name in now if name in common} for each in (then, now))
    if options.overwrite:
        return then == now
    refuse_other_settings(f"the run in {run.folder}", then, now, "--overwrite trains it again; or choose another --out")
    return True


def _train(options: DomainsOptions, todo: list[str]) -> None:
    """Make these runs one by one. After each, say about how long the rest will take."""
    records = {domain: len(split_records(read_records(domain))["train"]) for domain in todo}
    spent = done = 0.0
    for i, domain in enumerate(todo):
        rest = (
            f", about {spent / done * sum(records[name] for name in todo[i:]) / 60:.0f} minutes to go" if done else ""
        )
        log.info(f"training {domain}: {i + 1} of {len(todo)}{rest}")
        start, resume = time.monotonic(), _interrupted(options, domain)
        finetune(options.run(domain, overwrite=options.overwrite, resume=resume))
        if not resume:  # a part of a run says nothing of a whole one
            spent, done = spent + time.monotonic() - start, done + records[domain]


def _interrupted(options: DomainsOptions, domain: str) -> bool:
    """Whether there is a run to go on with; --overwrite forgets one that had other settings."""
    run = options.run(domain)
    partial = RunFolder(run.folder).partial
    if not (partial / CHECKPOINT / STATE_FILE).is_file():
        return False
    return not options.overwrite or read_state(partial).told == run.decisive()


# -- what has been measured --------------------------------------------------------------------------------------------


class Known(dict[tuple[str, str, str], np.ndarray]):
    """Measurements by (measure, version, set), in a file that is written whenever one comes.

    A file with another fingerprint is of other adapters or data, and is forgotten.
    """

    def __init__(self, path: Path, fingerprint: str):
        super().__init__()
        self.path, self.fingerprint = path, fingerprint
        try:
            kept = read_json(path) if path.is_file() else {}
        except ModelFileError:
            kept = {}  # damaged: measured again
        if kept.get("fingerprint") == fingerprint:
            for name, version, each, values in kept["measured"]:
                super().__setitem__((name, version, each), np.array(values, float))

    def __setitem__(self, key: tuple[str, str, str], values: np.ndarray) -> None:
        super().__setitem__(key, values)
        measured = [[*key, values.tolist()] for key, values in self.items()]
        write_json(self.path, {"fingerprint": self.fingerprint, "measured": measured}, indent=0)


def _fingerprint(metrics: Mapping[str, Any], folders: Mapping[str, Path], sets: list[MeasuredSet]) -> str:
    """Of all that the measurements depend on: base, adapters, records."""
    digest = hashlib.sha256(json.dumps([one["base_sha256"] for one in metrics.values()]).encode())
    for folder in folders.values():
        digest.update((folder / WEIGHTS_FILE).read_bytes())
    for each in sets:
        digest.update(repr((each.name, each.samples, each.asked)).encode())
    return digest.hexdigest()


# -- what the numbers say ----------------------------------------------------------------------------------------------


def _best(scores: Mapping[str, Scores], own: str, seed: int) -> dict[str, Any]:
    """The adapter of a domain beside the best other version there, by measure.

    held: whether it is better, and the interval of the difference does not reach 0.
    """
    found: dict[str, Any] = {}
    others = [version for version in scores if version != own]
    for name, draws in resampled(scores, seed).items():
        sign = -1 if name == LOSS else 1
        names = list(scores)
        next_best = max(others, key=lambda version: sign * draws.means[names.index(version)])
        difference = draws.difference(names.index(own), names.index(next_best))
        held = difference.high < 0 if name == LOSS else difference.low > 0
        found[name] = {"next": next_best, "difference": plain(difference), "held": bool(held)}
    return found


def _mixed(scores: Mapping[str, Scores], label: str, domain: str, seed: int) -> dict[str, Any]:
    """What a mix has on one of its domains, beside that domain's adapter alone; kept: the share of what it gained."""
    found: dict[str, Any] = {"mix": label, "on": domain}
    chosen = {name: scores[name] for name in (BASE_NAME, domain, label)}
    for name, draws in resampled(chosen, seed).items():
        base, own, mix = draws.draws.T
        value = draws.means
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = draws.interval((value[2] - value[0]) / (value[1] - value[0]), (mix - base) / (own - base))
        means = {key: plain(draws.mean(i)) for i, key in enumerate(("base", "alone", "mixed"))}
        found[name] = means | {"lost": plain(draws.difference(2, 1)), "kept": plain(kept)}
    return found


def drawn(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the heat map shows of the numbers: what was trained, asked in other words, and general text."""
    sets = {name: about for name, about in result["sets"].items() if about["kind"] != "unseen"}
    return {**result, "sets": sets, "scores": {name: result["scores"][name] for name in sets}}


# -- the page ----------------------------------------------------------------------------------------------------------

WIDTH = 100  # columns of the page where there is room
TITLES = {
    (LOSS, "paraphrase"): "loss (nats per token), trained matter asked in other words",
    (RECALL, "paraphrase"): "keyword recall (%), trained matter asked in other words",
    (LOSS, "unseen"): "loss, records never trained",
    (RECALL, "unseen"): "keyword recall, records never trained",
}


def domains_page(result: Mapping[str, Any], width: int = WIDTH) -> str:
    """The numbers of `compare_domains` as text of at most 100 columns; of 80 or so, without the matrix's intervals."""
    width = min(width, WIDTH)
    lines: list[str] = []
    for (name, kind), title in TITLES.items():
        lines += [rule(title, width), *_matrix(result, name, kind, bounds=width >= WIDTH), ""]
    lines += [rule("each adapter on its own domain, beside the best other version there", width)]
    lines += [f"{'':<9}{'':<15}{'difference':<22}{'against':<10}more than its interval"]
    for domain, best in result["best_on_own"].items():
        for name, found in best.items():
            what = f"{domain:<9}{name.replace('_', ' '):<15}{_cell(found['difference'], name, '+'):<22}"
            lines.append(f"{what}{found['next']:<10}{'yes' if found['held'] else 'NO'}")
    lines += ["", rule("two adapters mixed, half of each: what is left of each one's gain", width)]
    lines += [f"{'':<28}{'loss':<33}keyword recall"]
    lines += [f"{'':<19}{'on':<9}{'alone':<7}{'mixed':<8}{'gain kept':<18}{'alone':<7}mixed"]
    lines += [_mixed_line(one) for one in result["mixes"]]
    share, draws = f"{result['confidence']:.0%}", f"{result['resamples']:,}"
    notes = f"[low, high]: the middle {share} of {draws} bootstrap draws of the records; differences are paired. "
    weights = f"{next(iter(result['merged'].values()))['weight']:g}"
    off = ", ".join(f"{name} by {one['error']:.0%}" for name, one in result["merged"].items())
    notes += f"Merged: the four adapters, each with weight {weights}. They are off the exact sum: {off}."
    return "\n".join([*lines, "", *textwrap.wrap(notes, width)])


def _matrix(result: Mapping[str, Any], name: str, kind: str, bounds: bool) -> Iterator[str]:
    kinds = ("unseen",) if kind == "unseen" else (kind, "all")
    columns = {about["data"]: key for key, about in result["sets"].items() if about["kind"] in kinds}
    each = 18 if bounds else 10
    yield f"{'':<9}" + "".join(f"{data:<{each}}" for data in columns).rstrip()
    for version in next(iter(result["scores"].values())):
        found = [result["scores"][key][version][name] for key in columns.values()]
        cells = [_cell(one if bounds else {**one, "low": None}, name) for one in found]
        yield f"{version:<9}" + "".join(f"{cell:<{each}}" for cell in cells).rstrip()


def _cell(found: Mapping[str, float | None], name: str, sign: str = "") -> str:
    form = f"{{:{sign}.2f}}" if name == LOSS else f"{{:{sign}.0f}}"
    return shown(found, form, form, 1 if name == LOSS else 100)


def _mixed_line(one: Mapping[str, Any]) -> str:
    def value(name: str, key: str) -> str:
        return _cell({**one[name][key], "low": None}, name)

    kept = shown(one[LOSS]["kept"], "{:.0f}%", "{:.0f}", 100)
    losses = f"{value(LOSS, 'alone'):<7}{value(LOSS, 'mixed'):<8}{kept:<18}"
    return f"{one['mix']:<19}{one['on']:<9}{losses}{value(RECALL, 'alone'):<7}{value(RECALL, 'mixed')}"

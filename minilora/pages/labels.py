"""What is printed and drawn of labels that were told apart: contenders, confusion matrix, calibration and mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .style import BLUE, GREY, LORA, blend, ink, literal, panels
from .text import NOTHING, WIDTH, columns, counted, interval, padded, percent, plain, rule, shortened, width_of, wrapped

MATRIX = 12  # labels, at most, whose confusion matrix is printed; of more, the most frequent confusions are
DRAWN = 30  # labels, at most, whose confusion matrix is drawn; of more, those with the most mistakes
SHOWN = 5  # mistakes, and confusions


def label_lines(report: Mapping[str, Any], width: int = WIDTH) -> Iterator[str]:
    """A report of `Labelled` as text."""
    yield rule(f"{counted(len(report['labels']), 'label')}, {counted(report['records'], 'record')}", width)
    cells = lambda row: [shown(row["accuracy"]), shown(row["macro_f1"]), plain(100 * row["ece"], 1)]
    rows = [[row["name"], *([row["missing"]] if "missing" in row else cells(row))] for row in report["rows"]]
    yield from table([["", "accuracy, %", "macro-F1, %", "ECE, %"], *rows])
    if report.get("kinds"):
        yield from ("", *table(_by_kind(report)), "")
    yield from wrapped(
        "[low, high]: 95 % intervals, of accuracy Wilson's, of macro-F1 and of differences the bootstrap's. ECE: the "
        "mean distance between confidence and accuracy.",
        width,
    )
    yield from ("", *wrapped(verdict(report), width), "")
    yield from _confusion(report)
    yield from ("", *_calibration(report), "", *_coverage(report, width))
    wrong = report["mistakes"]
    yield from mistakes(wrong, counted(len(wrong), "mistake"), "the most confident first", _said, width)


def subject_and_others(report: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """The row of the model in question, and those of all other contenders."""
    others = [row for row in report["rows"] if row["name"] != report["subject"]]
    (subject,) = (row for row in report["rows"] if row["name"] == report["subject"])
    return subject, others


def shown(found: Mapping[str, float | None], sign: bool = False) -> str:
    """A share with its interval, in percent."""
    value, low, high = (None if x is None else 100 * x for x in (found["value"], found["low"], found["high"]))
    return interval(value, low, high, 1, sign)


def verdict(report: Mapping[str, Any], share: str = "accuracy", unit: str = "points of accuracy") -> str:
    """Whether the model is better than every other contender, and than each other adapter, in sentences. share: the
    entry of a row that says so.
    """
    subject = report["subject"]
    others = [row for row in subject_and_others(report)[1] if share in row]
    if not others:
        return f"{subject} was compared with nothing."

    def than(row: Mapping[str, Any], which: str = "") -> str:
        points = f"{shown(row['lead'], sign=True)} {unit}"
        low, high = (row["lead"][end] or 0.0 for end in ("low", "high"))
        how, which = ("worse", "") if high < 0 else ("better", which) if low > 0 else ("not clearly better", "")
        return f"{subject} is {how} than {which}{row['name']}: {points}."

    best = max(others, key=lambda row: row[share]["value"])
    first = than(best, "the best of the others, ")
    first += f" Use {best['name']}." if (best["lead"]["high"] or 0.0) < 0 else ""
    versions = [row for row in others if row is not best and row["name"] in report.get("adapters", ())]
    return " ".join([first, *map(than, versions)])


def _by_kind(report: Mapping[str, Any]) -> list[list[str]]:
    """The accuracy of each contender in each kind of text."""
    heads = [f"{kind} ({records:,})" for kind, records in report["kinds"].items()]
    rows = [row for row in report["rows"] if "missing" not in row]
    each = [[row["name"], *(shown(row["accuracy_of_kind"][kind]) for kind in report["kinds"])] for row in rows]
    return [["accuracy by kind, %", *heads], *each]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, flush left; a remark instead of cells may be as long as the line."""
    short = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(width_of(row[j]) for row in (rows if j == 0 else short)) + 2 for j in range(len(short[0]))]
    return ["".join(padded(cell, width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def _confusion(report: Mapping[str, Any]) -> Iterator[str]:
    labels, counts = [shortened(label, WIDTH) for label in report["labels"]], np.array(report["confusion"])
    if len(labels) <= MATRIX:
        yield f"confusion matrix of {report['subject']} (row: true label, column: label given)"
        cells = [[f"{j + 1}" for j in range(len(labels))]]
        cells += [[f"{n}" if n else "." for n in row] for row in counts]
        names = ["", *(f"{i + 1:>2} {shortened(label, 24)}" for i, label in enumerate(labels))]
        yield from columns([[name, *row] for name, row in zip(names, cells, strict=True)])
        return
    yield f"the most frequent confusions of {report['subject']}"
    np.fill_diagonal(counts, 0)
    for place in np.argsort(-counts, axis=None, kind="stable")[:SHOWN]:
        i, j = divmod(int(place), len(labels))
        if counts[i, j]:
            yield f"  {counts[i, j]:>3}  {labels[i]} taken for {labels[j]}"


def _calibration(report: Mapping[str, Any]) -> Iterator[str]:
    bins = subject_and_others(report)[0]["reliability"]
    low = [round(100 * one["from"]) for one in bins]
    yield from columns(
        [
            ["confidence, %", *(f"{a}-{a + 10}" for a in low)],
            ["records", *(f"{one['records']:,}" for one in bins)],
            ["of them right, %", *(plain(100 * one["accuracy"]) for one in bins)],
        ]
    )


def _coverage(report: Mapping[str, Any], width: int) -> Iterator[str]:
    """What is answered at each threshold. A report of an older version has nothing of this."""
    if points := subject_and_others(report)[0].get("coverage"):
        yield from wrapped("if only labels with at least a threshold of confidence are used:", width)
        right = [one["accuracy"]["value"] for one in points]
        yield from columns(
            [
                ["threshold, %", *(plain(100 * one["from"]) for one in points)],
                ["answered, %", *(plain(100 * one["coverage"], 1) for one in points)],
                ["of them right, %", *(NOTHING if share is None else plain(100 * share, 1) for share in right)],
            ]
        )
        yield ""


def mistakes(
    wrong: Sequence[Mapping[str, Any]], heading: str, order: str, said: Callable[[Mapping[str, Any]], str], width: int
) -> Iterator[str]:
    """The first few of a report's mistakes. order: which come first. said: what was wrong in one of them."""
    if not wrong:
        yield "no mistakes"
        return
    yield f"{heading}, {order}" if len(wrong) > 1 else heading
    for one in wrong[:SHOWN]:
        yield from wrapped(f"{said(one)}: {shortened(one['text'], 2 * width)}", width, first="  ", indent="    ")
    if len(wrong) > SHOWN:
        yield f"  and {len(wrong) - SHOWN:,} more"


def _said(one: Mapping[str, Any]) -> str:
    own, chosen = (shortened(one[key], WIDTH) for key in ("label", "chosen"))
    return f"{own} was taken for {chosen} ({percent(one['confidence'])})"


def labels_figure(report: Mapping[str, Any]) -> Any:
    """The confusion matrix and the reliability diagram of a report, as a matplotlib figure."""
    size = max(3.4, 0.34 * min(len(report["labels"]), DRAWN) + 1.6)
    figure, (matrix, curve) = panels(2, width=2 * size + 2, height=size + 0.4, ratios=(1.25, 1))
    _draw_matrix(matrix, report)
    _draw_reliability(curve, report)
    return figure


def _draw_matrix(axes: Any, report: Mapping[str, Any]) -> None:
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap

    labels, counts = report["labels"], np.array(report["confusion"])
    ground = mpl.rcParams["figure.facecolor"]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    title = "Confusion matrix, records"
    if len(labels) > DRAWN:
        title += f"\n({DRAWN} of {len(labels):,} labels: those with the most mistakes)"
        both = counts.sum(axis=0) + counts.sum(axis=1)
        kept = np.sort(np.lexsort((-both, 2 * counts.diagonal() - both))[:DRAWN])  # where equal, the most frequent
        labels, counts, shares = [labels[i] for i in kept], counts[np.ix_(kept, kept)], shares[np.ix_(kept, kept)]
    axes.imshow(shares, LinearSegmentedColormap.from_list("shares", [ground, blend(ground, BLUE)]), vmin=0, vmax=1)
    for i, j in np.argwhere(counts):
        axes.text(
            j, i, f"{counts[i, j]}", ha="center", va="center", fontweight="bold" if i == j else "normal", fontsize=9
        )
    names = [literal(shortened(label, 24)) for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=90)
    axes.set_yticks(range(len(labels)), names)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=f"label given by {literal(report['subject'])}", ylabel="true label", title=title)


def _draw_reliability(axes: Any, report: Mapping[str, Any]) -> None:
    row, _ = subject_and_others(report)
    bins = row["reliability"]
    axes.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1)
    at, right = ([100 * one[key] for one in bins] for key in ("confidence", "accuracy"))
    axes.plot(at, right, color=LORA, linewidth=1.5, clip_on=False)
    sizes = [20 + 250 * one["records"] / report["records"] for one in bins]
    axes.scatter(at, right, sizes, color=LORA, clip_on=False, zorder=3)
    axes.text(97, 3, f"ECE {plain(100 * row['ece'], 1)} points", ha="right", color=ink(LORA))
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence, %", ylabel="of these records right, %")
    axes.set_title("Reliability (area: records)")

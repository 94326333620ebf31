"""The heat map of versions and data sets: what each version gained, and what it lost, beside its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .style import BLACK, BLUE, ORANGE, ink, panels

MEASURES = {  # name -> title, words at the colour bar, is more of it better, factor, format, least span of the colours
    "loss": ("Loss, nats per token: lower is better", "change from the base, nats", False, 1, "{:.2f}", 0.5),
    "keyword_recall": ("Keyword recall, %: higher is better", "change from the base, points", True, 100, "{:.0f}", 10),
}
LINES = {"paraphrase": "in other words", "unseen": "unseen"}  # a set's second line
STRONGEST = 0.75  # how much of the strongest colour is not the page's: letters stay readable on it


def matrix_figure(result: Mapping[str, Any]) -> Any:
    """What `minilora eval` measured, as a matplotlib figure: a row for each version, a column for each data set; the
    loss, and below it keyword recall where it was measured.

    Colour is the difference to the first version, the base: blue is better, orange is worse; it grows with the root of
    the difference, so that a little forgetting shows beside much learning. A frame marks the sets of the data that a
    version was trained on.
    """
    scores = result["scores"]
    shown = [name for name in MEASURES if any(name in one for found in scores.values() for one in found.values())]
    versions = list(next(iter(scores.values())))
    columns = 1.05 if max(map(len, result["sets"])) < 20 else 1.5
    width = 1.9 + max(map(len, versions)) * 0.08 + columns * len(scores)
    figure, axes = panels(width=max(width, 4), height=len(shown) * (1.3 + 0.5 * max(2, len(versions))), rows=len(shown))
    for each, name in zip([axes] if len(shown) == 1 else axes, shown, strict=True):
        _panel(figure, each, result, versions, name)
    return figure


def _panel(figure: Any, axes: Any, result: Mapping[str, Any], versions: list[str], measure: str) -> None:
    import matplotlib as mpl
    import numpy as np
    from matplotlib.colors import FuncNorm, LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    title, words, more_is_better, factor, form, least = MEASURES[measure]
    sets, base = result["sets"], versions[0]
    scores, own = result["scores"], {name: one.get("trained_on") for name, one in result["adapters"].items()}
    values = np.full((len(versions), len(sets)), np.nan)
    for j, found in enumerate(scores.values()):
        for i, version in enumerate(versions):
            value = found[version].get(measure, {}).get("value")
            values[i, j] = np.nan if value is None else factor * value
    change = values - values[0]
    most = max(least, np.nanmax(np.abs(change), initial=0))
    ground = mpl.rcParams["figure.facecolor"]
    colors: list[Any] = [_on(ground, ORANGE), ground, _on(ground, BLUE)][:: 1 if more_is_better else -1]
    even = FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x * x), -most, most)
    image = axes.imshow(change, LinearSegmentedColormap.from_list("change", colors), even, aspect="auto")
    for j, (name, found) in enumerate(scores.items()):
        for i, version in enumerate(versions):
            value, bounds = _cell(found[version].get(measure), factor, form)
            axes.text(j, i - 0.17 * bool(bounds), value, ha="center", va="center", fontweight="bold")
            axes.text(j, i + 0.22, bounds, ha="center", va="center", fontsize=9)
            if version != base and own.get(version) == sets[name]["data"]:
                axes.add_patch(
                    Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, fill=False, edgecolor=ink(BLACK), linewidth=1.8)
                )
    axes.set_xticks(range(len(sets)), [_called(name, one) for name, one in sets.items()])
    axes.set_yticks(range(len(versions)), versions)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    if len(versions) == 1:
        return  # nothing has changed: no colours to explain
    ticks = [-most, -most / 4, 0, most / 4, most]
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=12, label=words)
    bar.set_ticks(ticks, labels=[form.replace(":", ":+").format(x) if x else "0" for x in ticks])
    bar.outline.set_visible(False)


def _cell(found: Mapping[str, float | None] | None, factor: float, form: str) -> tuple[str, str]:
    """The value, and the interval."""
    if found is None or found["value"] is None:
        return "-", ""
    bounds = [form.format(factor * x) for x in (found["low"], found["high"]) if x is not None]
    return form.format(factor * found["value"]), " to ".join(bounds)


def _called(name: str, about: Mapping[str, Any]) -> str:
    stem, _, kind = name.rpartition("/") if about["kind"] in LINES else (name, "", "")
    return f"{stem}\n{LINES[kind]}" if kind else stem


def _on(ground: str, color: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(STRONGEST * x + (1 - STRONGEST) * y for x, y in zip(to_rgb(color), to_rgb(ground), strict=True))

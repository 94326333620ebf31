"""What lessons draw: lines with labels, LoRA's bottleneck in its true proportions, and injection.

Every function draws into the matplotlib axes that it gets, and returns nothing.
"""

from collections.abc import Sequence
from typing import Any

from ..pages.style import BASE, BLACK, LORA, PALE, A, B, ink


def line(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    label: str,
    color: str,
    at: int = -1,
    place: tuple[float, float] = (6, 0),
    **style: Any,
) -> None:
    """A line with its label next to the point number `at`, `place` points (1/72 inch) away from it.

    style: passed to matplotlib's `plot`. The label is left of the point if `place` is.
    """
    axes.plot(x, y, color=color, **{"linewidth": 2} | style)
    side = "right" if place[0] < 0 else "left"
    axes.annotate(label, (x[at], y[at]), place, textcoords="offset points", color=ink(color), ha=side, va="center")
    axes.spines[["top", "right"]].set_visible(False)


def arrow(
    axes: Any, start: tuple[float, float], end: tuple[float, float], color: str = BLACK, shrink: float = 0
) -> None:
    """An arrow between two points; at both ends, `shrink` points are left free."""
    look = {"arrowstyle": "->", "color": color, "shrinkA": shrink, "shrinkB": shrink}
    axes.annotate("", end, start, arrowprops=look)


def bottleneck_to_scale(axes: Any, m: int, n: int, r: int) -> None:
    """The path of one token from x (n features) to y (m): through W, and in parallel through A and B, r features wide.

    Read from below; one unit of width per feature. The output of A and B is multiplied by the scale α/r and added.
    """
    from matplotlib.patches import Polygon, Rectangle

    step, thin, apart = 0.28 * n, 0.03 * n, 1.15 * max(m, n)
    top, side = 2 * step, 0.02 * n

    def bar(middle: float, floor: float, width: int, text: str) -> None:
        axes.add_patch(Rectangle((middle - width / 2, floor), width, thin, facecolor=BLACK, linewidth=0))
        axes.text(middle + width / 2 + side, floor + thin / 2, text, va="center")

    def funnel(middle: float, floor: float, ceiling: float, below: int, above: int, color: str) -> None:
        low, high = floor + thin, ceiling
        corners = [(middle - below / 2, low), (middle + below / 2, low), (middle + above / 2, high)]
        axes.add_patch(Polygon([*corners, (middle - above / 2, high)], facecolor=color, alpha=PALE, linewidth=0))

    middle = apart / 2
    bar(middle, -0.75 * step, n, f"x: {n:,} features")
    for lane in (0, apart):
        arrow(axes, (middle + 0.3 * (lane - middle), -0.75 * step + thin), (lane, 0))
    funnel(0, -thin, top, n, m, BASE)
    axes.text(0, step, "W, frozen", ha="center", va="center", fontsize="large")
    bar(0, top, m, f"x Wᵀ: {m:,}")
    funnel(apart, -thin, step, n, r, A)
    axes.text(apart, 0.35 * step, "A, down", ha="center", va="center", fontsize="large", color=ink(A))
    bar(apart, step, r, f"u = x Aᵀ: {r}")
    funnel(apart, step, top, r, m, B)
    axes.text(apart, 1.72 * step, "B, up", ha="center", va="center", fontsize="large", color=ink(B))
    bar(apart, top, m, f"u Bᵀ: {m:,}")
    for lane in (0, apart):
        arrow(axes, (lane, top + thin), (middle + 0.3 * (lane - middle), 2.75 * step))
    axes.text(middle + 0.85 * (apart - middle), 2.5 * step, "times α/r", va="center")
    bar(middle, 2.75 * step, m, f"y: {m:,} features")
    axes.text(middle, 2.55 * step, "+", ha="center", va="center", fontsize="xx-large")
    axes.set(xlim=(-0.55 * n, apart + 0.95 * n), ylim=(-0.8 * step, 2.8 * step + 2 * thin), aspect="equal")
    axes.set_axis_off()


def llama(axes: Any, blocks: int) -> None:
    """The forward pass of a Llama from left to right: embedding, one of its blocks, and the tied output embedding."""
    from matplotlib.patches import Rectangle

    edge = ink(BLACK)

    def box(x: float, y: float, width: float, text: str, color: str | None = BASE) -> None:
        face: dict[str, Any] = {"facecolor": color, "alpha": PALE, "linewidth": 0} if color else {"facecolor": "none"}
        axes.add_patch(Rectangle((x, y - 0.35), width, 0.7, edgecolor=edge, **face))
        axes.text(x + width / 2, y, text, ha="center", va="center", color=edge)

    def path(*corners: tuple[float, float]) -> None:
        axes.plot(*zip(*corners[:-1], strict=True), color=edge, linewidth=1)
        arrow(axes, corners[-2], corners[-1], edge)

    box(-0.5, 0, 2.5, "embedding")
    path((-1.2, 0), (-0.5, 0))
    axes.text(-1.3, 0, "token IDs\n(T)", ha="right", va="center", color=edge)
    axes.add_patch(Rectangle((2.6, -0.6), 12.4, 3.1, facecolor="none", edgecolor=edge, linestyle=":"))
    axes.text(8.8, 2.65, f"a block ({blocks} of them)", ha="center", va="bottom", color=edge)
    start = 2.0
    for left, width, part in ((3.1, 2.6, "attention\nq, k, v, o"), (8.7, 3.6, "MLP\ngate, up, down")):
        right = left + 2.3 + width
        path((left, 0), (left, 1.6), (left + 0.4, 1.6))
        box(left + 0.4, 1.6, 1.2, "norm", None)
        path((left + 1.6, 1.6), (left + 2, 1.6))
        axes.add_patch(Rectangle((left + 2, 1), width - 0.2, 1.2, facecolor=BASE, alpha=PALE, linewidth=0))
        axes.text(left + 1.9 + width / 2, 1.6, part, ha="center", va="center", color=edge)
        path((left + width + 1.8, 1.6), (right, 1.6), (right, 0.25))
        path((start, 0), (right - 0.25, 0))
        axes.text(right, 0, "+", ha="center", va="center", fontsize="large", color=edge)
        start = right + 0.25
    path((start, 0), (15.6, 0))
    box(15.6, 0, 1.2, "norm", None)
    path((16.8, 0), (17.3, 0))
    box(17.3, 0, 2.5, "embedding")
    path((19.8, 0), (20.5, 0))
    axes.text(20.6, 0, "logits\n(T, V)", ha="left", va="center", color=edge)
    axes.set(xlim=(-3.5, 22.4), ylim=(-0.8, 3.3))
    axes.set_axis_off()


def injection(axes: Any) -> None:
    """Modules of an attention block before and after injection: q_proj becomes a LoRA layer around the same weight."""
    from matplotlib.patches import Rectangle

    def box(x: float, y: float, width: float, height: float, text: str, color: str | None = None) -> None:
        face = {"facecolor": color, "alpha": PALE} if color else {"facecolor": "none"}
        axes.add_patch(Rectangle((x, y), width, height, **face, edgecolor=ink(BLACK), linewidth=0 if color else 1))
        if color:
            axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink(BLACK))
        else:
            axes.text(x + 0.15, y + height - 0.12, text, ha="left", va="top", color=ink(BLACK))

    for x, width, layer in ((0, 4, "Linear"), (6, 6.4, "MyLora")):
        box(x, 0, width, 4.6, "self_attn")
        box(x + 0.3, 0.3, 3.4, 1.5, "k_proj: Linear")
        box(x + 0.3, 2.2, width - 0.6, 1.7, f"q_proj: {layer}")
        for y in (0.5, 2.5):
            box(x + 0.6, y, 2.8, 0.7, "W, trainable" if x == 0 else "W, frozen", BASE)
    box(9.6, 2.5, 1.1, 0.7, "A", A)
    box(10.8, 2.5, 1.1, 0.7, "B", B)
    for y in (2.85, 0.85):
        arrow(axes, (3.4, y), (6.6, y), ink(BLACK), shrink=2)
        axes.text(5.03, y + 0.1, "same array", ha="center", va="bottom")
    axes.set(xlim=(-0.1, 12.5), ylim=(-0.1, 4.7))
    axes.set_axis_off()


def four_blocks(axes: Any) -> None:
    """GPT-2, Llama, Qwen3 and Gemma 3 from the tokens below to the logits above, one block each; shaded: a change."""
    from matplotlib.patches import Rectangle

    edge = ink(BLACK)
    attention = {"GPT-2": "attention", "Llama": "attention\nRoPE, fewer k, v", "Qwen3": "attention\nnormed q, k",
                 "Gemma 3": "attention, normed q, k\nwindow in 5 of 6"}  # fmt: skip
    mlp = {"GPT-2": "MLP: GELU", "Llama": "MLP: SwiGLU", "Qwen3": "MLP: SwiGLU", "Gemma 3": "MLP: GeGLU"}
    for column, name in enumerate(attention):
        left, gemma, first = 3.4 * column, name == "Gemma 3", name == "GPT-2"
        norm = "LayerNorm" if first else "RMSNorm, 1 + w" if gemma else "RMSNorm"
        new_norm = name in ("Llama", "Gemma 3")
        after = (norm, 0.55, True) if gemma else None
        stack = [
            ("tokens + positions" if first else "tokens · √C" if gemma else "tokens", 0.55, new_norm),
            (norm, 0.55, new_norm),
            (attention[name], 1.0, not first),
            after,
            ("+", 0.3, False),
            (norm, 0.55, new_norm),
            (mlp[name], 0.7, new_norm),
            after,
            ("+", 0.3, False),
            (norm, 0.55, new_norm),
            ("logits", 0.55, False),
        ]
        y, middle = 0.0, left + 1.5
        top = enters = None  # where the box before ends, and where the path around a branch begins
        for box in stack:
            if box is None:
                y += 0.8  # the place of a norm that only Gemma 3 has
                continue
            text, height, changed = box
            if top is not None:
                arrow(axes, (middle, top), (middle, y), edge)
            if text == "+":
                around, level = left - 0.15, y + height / 2
                axes.plot([middle, around, around], [enters, enters, level], color=edge, linewidth=1)
                arrow(axes, (around, level), (middle - 0.15, level), edge)
            else:
                face: dict[str, Any] = {"facecolor": LORA, "alpha": PALE} if changed else {"facecolor": "none"}
                axes.add_patch(Rectangle((left, y), 3, height, edgecolor=edge, **face))
            axes.text(middle, y + height / 2, text, ha="center", va="center", color=edge)
            top = y + height
            if text == "+" or enters is None:
                enters = top + 0.08
            y = top + 0.25
        axes.text(left + 1.5, -0.3, name, ha="center", va="top", color=edge, fontweight="bold")
    axes.set(xlim=(-0.2, 13.4), ylim=(-0.9, 8.9))
    axes.set_axis_off()

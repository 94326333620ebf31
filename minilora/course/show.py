"""Pictures in lessons: at twice the page's resolution, and with an alternative text."""

import base64
import io
from typing import Any

DOTS = 96  # per inch on the page; the picture has twice as many


def show(figure: Any, alt: str) -> None:
    """Show a matplotlib figure below the cell, and close it.

    alt: what the picture shows, in one or two sentences; stored in the notebook as its alternative text. Notebook pages
        do not display it, so explain below the cell how to read the picture.

    Raises ValueError without alt.
    """
    import matplotlib.pyplot as plt

    if len(alt.split()) < 4:
        raise ValueError(f"alt must say in a sentence what the picture shows, got {alt!r}")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=2 * DOTS)
    width = round(figure.get_size_inches()[0] * DOTS)
    plt.close(figure)
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import display
    except ImportError:  # in a plain script there is no page to show it on
        return
    if get_ipython():  # type: ignore[no-untyped-call]
        data = {"image/png": base64.b64encode(png.getvalue()).decode() + "\n", "text/plain": alt}
        display(data, raw=True, metadata={"image/png": {"alt": alt, "width": width}})  # type: ignore[no-untyped-call]

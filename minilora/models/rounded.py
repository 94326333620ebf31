"""A model whose matrices are rounded to few bits as it is loaded, and stay packed: `load(..., quantized="nf4")`.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314) trains an adapter over such a base. Norms stay float32. With four bits
the embedding and the head become Q8_0, as in `save_gguf`: every token's score hangs on them; QLoRA leaves them in 16.

One matrix after another is read, rounded, and let go, so that the numbers are never in memory together. On the way they
are hashed: an adapter that learned over the rounded base belongs to the model that was rounded, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from ..engine.backend import Array
from ..files.quant import ROUNDED, Packed, bytes_of_row, quantize
from ..nn.llama import Config, Llama
from ..nn.module import Fingerprint

_SCORES = ("model.embed_tokens.weight", "lm_head.weight")


def rounded_to(quantized: bool | str) -> str | None:
    """The kind that `quantized` names, such as "NF4"; None where it names none. Raises ValueError for an unknown one.

    >>> rounded_to("nf4")
    'NF4'
    """
    if isinstance(quantized, bool):
        return None
    if (kind := quantized.upper()) not in ROUNDED:
        known = ", ".join(kind.lower() for kind in ROUNDED)
        raise ValueError(f"quantized must be true, false or one of {known}, got {quantized!r}")
    return kind


def load_rounded(config: Config, names: Collection[str], read: Callable[[str], Any], kind: str) -> Llama:
    """A model of the tensors `names`, each read, float32, as its turn comes; matrices are rounded to `kind`.

    Raises ValueError naming a matrix whose rows are no whole blocks, and ModelFileError for what is no such model.
    """
    state: dict[str, Array] = {}
    fingerprint = Fingerprint()
    for name in sorted(names):
        w = read(name)
        fingerprint.add(name, w)
        state[name] = w if w.ndim == 1 else _round(name, w, kind)
    model = Llama.empty(config)
    model.load_state_dict(state)
    model.rounded_to, model.unrounded_sha256 = kind.lower(), fingerprint.hexdigest()
    return model


def _round(name: str, w: np.ndarray, kind: str) -> Packed:
    own = _kind_of(name, kind)
    try:
        return Packed(quantize(w, own), own)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def rounded_bytes(config: Config, kind: str) -> int:
    """The bytes of a base of this shape that is rounded to `kind`. Raises ValueError as `load_rounded` does."""
    size = 0
    for name, w in Llama.empty(config).state_dict().items():
        try:
            size += w.nbytes if w.ndim == 1 else len(w) * bytes_of_row(w.shape[1], _kind_of(name, kind))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return size


def _kind_of(name: str, kind: str) -> str:
    return "Q8_0" if name in _SCORES and kind != "BF16" else kind

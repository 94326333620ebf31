"""Models whose matrices are quantised when they are loaded: `load(..., quantized="nf4")`.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314) trains an adapter on such a base. Norms stay float32. With four bits the
embedding and the head are stored as Q8_0, as in `save_gguf`, because every token's score depends on them; QLoRA keeps
them in 16 bits.

Matrices are read, quantised and discarded one after another, so that the originals are never in memory together. They
are hashed on the way: an adapter that was trained on the quantised base can also be used on the original one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Any

from ..engine.backend import Array, dense, is_packed
from ..files.quant import ROUNDED, Packed, bytes_of_row, quantize
from ..nn.families import TABLES, empty_model
from ..nn.language_model import LanguageModel
from ..nn.module import add_to_hash


def rounded_to(quantized: bool | str) -> str | None:
    """The kind that `quantized` names, such as "NF4"; None for a bool. Raises ValueError for an unknown kind.

    >>> rounded_to("nf4")
    'NF4'
    """
    if isinstance(quantized, bool):
        return None
    if (kind := str(quantized).upper()) not in ROUNDED:
        known = ", ".join(kind.lower() for kind in ROUNDED)
        raise ValueError(f"quantized must be one of true, false, {known}, got {quantized!r}")
    return kind


def load_rounded(config: Any, names: Collection[str], read: Callable[[str], Any], kind: str) -> LanguageModel:
    """A model of this shape whose matrices are quantised to `kind`, such as "NF4".

    read: returns the tensor with one of these names, in float32 or packed; called for one after another.

    Raises ValueError that names a matrix whose rows are not a multiple of the block size, and ModelFileError if the
    tensors do not fit the shape.
    """
    state: dict[str, Array] = {}
    digest = hashlib.sha256()
    for name in sorted(names):
        w = read(name)
        add_to_hash(digest, name, w)
        own = _kind_of(name, kind)
        if w.ndim > 1 and not (is_packed(w) and w.kind == own):
            try:
                w = Packed(quantize(dense(w) if own == "BF16" else w, own), own, in_bfloat16=own == "BF16")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        state[name] = w
    model = empty_model(config)
    model.load_state_dict(state)
    model.rounded_to, model.unrounded_sha256 = kind.lower(), digest.hexdigest()
    return model


def rounded_bytes(config: Any, kind: str) -> int:
    """The bytes of a base of this shape that is quantised to `kind`. Raises ValueError as `load_rounded` does."""
    size = 0
    for name, w in empty_model(config).state_dict().items():
        try:
            size += w.nbytes if w.ndim == 1 else len(w) * bytes_of_row(w.shape[1], _kind_of(name, kind))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return size


def _kind_of(name: str, kind: str) -> str:
    return "Q8_0" if name in TABLES and kind != "BF16" else kind

"""Runs that several claims share: what one of them has kept serves the others.

They are here, and not next to the functions that train: what those import decides which kept runs are still valid.
"""

from collections.abc import Mapping
from typing import Any

from ..experiments.claim import Setting
from ..experiments.followed import CONTENDERS, FEW, followed_run


def followed_on_smollm2(setting: Setting, names: Mapping[str, str]) -> dict[str, Any]:
    """`tuned` of the runs that claims share, each method at its best learning rate for the first seed.

    names: by a claim's own name, LORA_8 or FULL. The smallest form takes a few steps of the tiny base.
    """
    contenders = {own: CONTENDERS[name] | (FEW if setting.small else {}) for own, name in names.items()}
    return setting.tuned(followed_run, contenders)

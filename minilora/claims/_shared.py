"""Runs that several claims share: what one of them has kept serves the others.

They are here, and not next to the functions that train: what those import decides which kept runs are still valid.
"""

from collections.abc import Mapping
from typing import Any

from ..experiments.claim import Setting
from ..experiments.followed import CONTENDERS, FEW, followed_run
from ..experiments.updates import RATES, SHARED, train_update


def followed_on_smollm2(setting: Setting, names: Mapping[str, str]) -> dict[str, Any]:
    """`tuned` of the runs that claims share, each method at its best learning rate for the first seed.

    names: by a claim's own name, LORA_8 or FULL. The smallest form takes a few steps of the tiny base.
    """
    contenders = {own: CONTENDERS[name] | (FEW if setting.small else {}) for own, name in names.items()}
    return setting.tuned(followed_run, contenders)


def shared_runs(setting: Setting, contenders: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`tuned` of the runs that claims share: SmolLM2 on legal terms, each at its best rate for the first seed.

    contenders: by name, {"method": ...} of `train_update`, and r. A small run takes a few steps of the tiny base.
    """
    base = "tiny" if setting.small else "smollm2"
    same = {"base": base, "folder": setting.updates, **SHARED[base]}
    given = {name: same | {"lr": RATES[base][one["method"]], **one} for name, one in contenders.items()}
    return setting.tuned(train_update, given)

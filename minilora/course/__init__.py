"""What lessons and exercises import.

check       check your answer to an exercise: `check(your_function)`
claim       state a number with the band that it must be in
predict     write down the range in which you expect a number, before a claim measures it
show        show a figure, with an alternative text
"""

import importlib
import pkgutil

from . import selftest  # noqa: F401  registers the questions of the self-test
from .claims import claim
from .judge import check
from .predictions import predict
from .show import show

for _module in pkgutil.iter_modules(__path__):
    if _module.name.startswith("lesson"):  # lesson09 and so on: importing one registers its exercises
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["check", "claim", "predict", "show"]

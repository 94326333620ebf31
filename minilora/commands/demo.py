"""The adapters of the tiny base that `minilora serve --demo` shows, four that answer questions and four that sort
messages into labels and fields: trained once, kept in runs/.
"""

from pathlib import Path

from ..data.records import DOMAINS
from ..progress import log
from ..train.job import finetune
from ..train.options import Options
from ..train.run_folder import METRICS_FILE

BASE = "tiny"
SKILLS = ("support-labels", "support-fields", "finance-labels", "finance-fields")
STEPS = 150
LEARNING_RATE = 5e-3


def demo_folders() -> tuple[str, dict[str, Path]]:
    """The base, and the folder of each adapter. Those that are missing are trained, which takes some minutes."""
    named = {name: Path("runs", f"demo-{name}") for name in (*DOMAINS, *SKILLS)}
    missing = [name for name, folder in named.items() if not (folder / METRICS_FILE).is_file()]
    for i, name in enumerate(missing, 1):
        log.info(f"training {name} on the {BASE} base ({i} of {len(missing)})")
        options = Options(
            base=BASE, data=name, out=str(named[name]), steps=STEPS, lr=LEARNING_RATE, max_length=320, overwrite=True
        )
        finetune(options, measure=False)
    return BASE, named

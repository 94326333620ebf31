"""How long a step takes with 1, 2 and 4 ranks on this machine, and what it sends.

    pip install '.[mpi]' && python tests/benchmarks/ranks.py [--base smollm2 --ranks 1 2 --steps 4 ...]

Each job is `minilora finetune` under mpiexec, each rank on one core, if there are as many. The first two steps of each
are left out. Prints a table, and the largest difference of a loss from that of one process.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ALLOWED = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def measure(ranks: int, options: argparse.Namespace, folder: Path) -> dict:
    """The metrics of a job, with the seconds of each step."""
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    start = [mpiexec or "mpiexec", "--oversubscribe", "-n", str(ranks)] if ranks > 1 else []
    out = folder / str(ranks)
    job = f"finetune --base {options.base} --data legal --steps {options.steps} --batch-size {options.batch_size}"
    job += f" --eval-records 1 --eval-every {options.steps} --strength 1 --keep last --overwrite --out {out}"
    env = os.environ | ALLOWED | {"OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([*start, sys.executable, "-m", "minilora", *job.split()], env=env, check=True, capture_output=True)
    log = (out / "log.csv").read_text(encoding="utf-8").splitlines()[1:]
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    speeds = [float(row.split(",")[4]) for row in log[2:]]
    return metrics | {"speed": statistics.median(speeds)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    print("| ranks | s per step | tokens/s | sent per step | full would send | largest difference of a loss |")
    print("|--:|--:|--:|--:|--:|--:|")
    alone: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            found = measure(ranks, options, Path(folder))
            losses, sent = found["train_loss"], found["bytes_per_step"]
            alone = alone or losses
            off = max(abs(a / b - 1) for a, b in zip(losses, alone, strict=True))
            row = f"| {ranks} | {found['seconds_per_step']:.3f} | {found['speed']:,.0f} | {sent['sent']:,} "
            print(f"{row}| {sent['full_sent']:,} | {off:.1e} |", flush=True)


if __name__ == "__main__":
    main()

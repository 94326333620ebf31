"""The machine and the versions of a measurement: what a reader must know to compare its numbers with others."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.parallel import processors
from ..version import __version__


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in bytes (None: unknown), system."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = named[0] if named else processor
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        memory = None
    return {"processor": processor, "cores": processors(), "memory_bytes": memory, "system": platform.system()}


def versions() -> dict[str, str]:
    """Of minilora, Python, NumPy, and the BLAS that NumPy was built with."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "minilora": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}" if "version" in blas else "none",
    }


def now() -> str:
    """The date and the time, UTC, as results store them."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def here_and_now() -> dict[str, Any]:
    """What every result stores of its circumstances: date, machine, versions."""
    return {"created": now(), "machine": machine(), "versions": versions()}


def circumstances(result: dict[str, Any]) -> str:
    """Machine, versions and date of a result, on one line."""
    where, cores = result["machine"], result["machine"]["cores"]
    memory = [f"{where['memory_bytes'] / 1e9:.0f} GB"] if where["memory_bytes"] else []
    machine = ", ".join([where["processor"], f"{cores} core{'s' * (cores > 1)}", *memory, where["system"]])
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{machine}; {packages}; {result['created'][:10]}"

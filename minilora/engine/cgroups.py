"""The control groups of Linux around this process, which containers have: their limits of processors and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path


def cgroups(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folder of each cgroup around this process, the innermost first, and whether it is one of version 1.

    controller: "cpu" or "memory". Version 2 has one folder for all of them.
    """
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        inner = Path(f"/sys/fs/cgroup/{controller}{name}" if controllers else f"/sys/fs/cgroup{name}")
        for folder in (inner, *inner.parents):  # inside a container, the root has the container's own limit
            yield folder, bool(controllers)


@cache
def processor_quota() -> float:
    """The processors' time that the tightest quota allows, such as 1.5 in a container; infinity without one."""
    found = [math.inf]
    for folder, is_first in cgroups("cpu"):
        with suppress(OSError, ValueError):  # not there, or without a quota: "max"
            if is_first:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            else:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            found += [quota / period] if quota > 0 else []
    return min(found)


def left_memory() -> float:
    """The bytes that the tightest limit leaves; infinity without one. Cached files can be dropped: they are free."""
    found = [math.inf]
    for folder, is_first in cgroups("memory"):
        limit, used, total = ("limit_in_bytes", "usage_in_bytes", "total_") if is_first else ("max", "current", "")
        with suppress(OSError, ValueError):
            most, held = (int((folder / f"memory.{file}").read_text()) for file in (limit, used))
            stat = dict(each.split() for each in (folder / "memory.stat").read_text().splitlines())
            cached = sum(int(stat[f"{total}{kind}_file"]) for kind in ("active", "inactive"))
            found.append(max(0, most - held + cached))
    return min(found)

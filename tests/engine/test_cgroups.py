"""The limits of containers: files of cgroups, as Linux writes them, and the threads that follow from a quota.

How much memory is left is in tests/measure/test_process.py.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.engine import cgroups, parallel

QUOTAS = [  # /proc/self/cgroup, files in /sys/fs/cgroup and their text, the quota
    ("0::/", {"cpu.max": "150000 100000"}, 1.5),
    ("0::/", {"cpu.max": "max 100000"}, math.inf),
    ("0::/pod/box", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "50000 100000", "cpu.max": "400000 100000"}, 0.5),
    ("0::/pod", {"cpu.max": "400000 200000"}, 2),
    ("4:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
    ("1:cpu:/a", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000",
                  "cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
    ("1:cpuset:/", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    ("0::/", {}, math.inf),
    (None, {}, math.inf),  # no Linux
]  # fmt: skip


@pytest.mark.parametrize(("line", "files", "quota"), QUOTAS)
def test_the_quota_is_the_tightest_of_all_cgroups_around_the_process(line, files, quota, tmp_path, monkeypatch):
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (files | ({} if line is None else {"proc/self/cgroup": line})).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(cgroups, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert cgroups.processor_quota.__wrapped__() == quota


@pytest.mark.parametrize(("quota", "expected"), [(math.inf, 8), (99, 8), (2, 2), (1.5, 2), (0.3, 1)])
def test_a_part_of_a_processor_counts_as_one(quota, expected, monkeypatch):
    monkeypatch.setattr(parallel, "_bound_to", lambda: 8)
    monkeypatch.setattr(parallel, "processor_quota", lambda: quota)
    assert parallel.processors() == expected


SCRIPT = """
import sys
from minilora.engine import parallel
from threadpoolctl import threadpool_info
parallel.processor_quota = lambda: float(sys.argv[1])
parallel._bound_to = lambda: 8
parallel.cores()
print([each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"])
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux alone has cgroups")
def test_matmuls_use_no_more_threads_than_the_quota_unless_their_number_is_given():
    def threads(quota, **given):
        environment = {k: v for k, v in os.environ.items() if k not in parallel.THREADS} | given
        command = [sys.executable, "-c", SCRIPT, str(quota)]
        root = Path(parallel.__file__).parents[2]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert threads(1) == "[1]"
    assert threads(1, OPENBLAS_NUM_THREADS="2") == threads("inf") == threads("inf", OPENBLAS_NUM_THREADS="2")

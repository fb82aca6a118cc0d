"""Count the cores that this process may use, which can be far fewer than the machine has."""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """Return the number of cores by affinity (taskset, Slurm) and by cgroup quota (docker --cpus, Kubernetes)."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the number of cores of each limit, for the control group of this process and its parents."""
    for group in _groups(root):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # of version 2, of version 1
            try:
                quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            except (OSError, ValueError):  # missing, or "max": no limit
                continue
            if quota > 0 and period > 0:
                yield quota / period


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, from its own up to where they are mounted."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:  # "0::/kubepods/pod7" of version 2, "4:cpu,cpuacct:/docker/7" of version 1
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mount = root / "sys/fs/cgroup"
        if controllers and "cpu" not in controllers.split(","):
            continue
        for start in {mount / controllers, mount / "cpu"} if controllers else {mount}:
            own = start / path.lstrip("/")
            yield from (group for group in (own, *own.parents) if group.is_relative_to(start))

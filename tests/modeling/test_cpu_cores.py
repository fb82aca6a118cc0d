"""Cores: those that affinity and control groups leave."""

import os

import pytest
from test_layout import FILES

from modeling.cpu_cores import available_cores


@pytest.fixture
def sixteen(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))


GROUPS = {
    "no control groups": ({}, 16),
    "no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
    "a quota in a container": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    "part of a core counts as one": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
    "less than a core": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "5000 100000\n"}, 1),
    "more than there are": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 16),
    "the smallest on the way down": (
        {
            "proc/self/cgroup": "0::/pods/one\n",
            "sys/fs/cgroup/pods/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/pods/one/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/other/cpu.max": "100000 100000\n",
        },
        2,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:memory:/docker/7\n4:cpu,cpuacct:/docker/7\n",
            "sys/fs/cgroup/cpu/docker/7/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/docker/7/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "version 1, the folder of both controllers": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "files that say nothing": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "\n"}, 16),
}


@pytest.mark.parametrize(("files", "cores"), GROUPS.values(), ids=GROUPS)
def test_available_cores_cgroup(files, cores, sixteen, tmp_path):
    """Available cores are those of the control group."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert available_cores(tmp_path) == cores


def test_available_cores_affinity(monkeypatch, tmp_path):
    """Available cores are those of the affinity."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 7})
    assert available_cores(tmp_path) == 2


def test_only_cores_counts_cores():
    """Nothing else counts the cores of the machine."""
    assert {path.name for path in FILES if "cpu_count" in path.read_text()} == {"cpu_cores.py"}

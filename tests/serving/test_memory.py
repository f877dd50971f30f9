"""What memory is free: this machine's, or what is left of the groups that this process is in."""

from __future__ import annotations

import pytest

from serving import memory

GIB = 1 << 30
MACHINE = (
    "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:   16777216 kB\nHugePages_Total:       0\n"
)
VERSION_2 = {"most": "memory.max", "now": "memory.current", "cached": "inactive_file"}
VERSION_1 = {"most": "memory.limit_in_bytes", "now": "memory.usage_in_bytes", "cached": "total_inactive_file"}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group(folder, most, now, cached, names):
    write(folder / names["most"], f"{most}\n")
    write(folder / names["now"], f"{now}\n")
    write(folder / "memory.stat", f"anon 1\n{names['cached']} {cached}\n")


@pytest.fixture
def machine(tmp_path):
    """(/proc, /sys/fs/cgroup) of 32 GiB, of which files cache 15 and nothing has 1."""
    write(tmp_path / "proc" / "meminfo", MACHINE)
    return tmp_path / "proc", tmp_path / "cgroup"


def test_what_files_cache_is_free(machine):
    assert memory.free_memory(*machine) == (16 * GIB, 32 * GIB)


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/pods/one", "pods/one", VERSION_2),
        ("0::/pods/one/inner", "pods/one", VERSION_2),  # what bounds the outer group bounds all inside
        ("0::/../../pods/one", "", VERSION_2),  # seen from a container: the root is its own
        ("0::/pods/one", "", VERSION_2),
        ("9:cpu,memory:/pods/one", "memory/pods/one", VERSION_1),
        ("9:memory:/pods/one", "memory", VERSION_1),
    ],
)
def test_a_containers_bound(machine, line, folder, names):
    proc, cgroups = machine
    write(proc / "self" / "cgroup", f"12:pids:/x\n{line}\nnonsense\n")
    group(cgroups / folder, 4 * GIB, 3 * GIB, 1 * GIB, names)
    assert memory.free_memory(proc, cgroups) == (2 * GIB, 4 * GIB)
    group(cgroups / folder, 4 * GIB, 6 * GIB, 1 * GIB, names)
    assert memory.free_memory(proc, cgroups) == (0, 4 * GIB), "over it for a moment"
    group(cgroups / folder, "max" if names is VERSION_2 else 2**63 - 4096, 3 * GIB, 0, names)
    assert memory.free_memory(proc, cgroups) == (16 * GIB, 32 * GIB)


def test_a_system_that_tells_nothing(tmp_path):
    free, whole = memory.free_memory(tmp_path, tmp_path)
    assert 0 < free <= whole
    write(tmp_path / "meminfo", "MemTotal: much\n")
    assert memory.free_memory(tmp_path, tmp_path)[1] == whole


def test_this_system():
    free, whole = memory.free_memory()
    assert 0 <= free <= whole and whole > 64 << 20

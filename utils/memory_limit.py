"""How much memory this process can get: the least that machine, container, process limit and Metal allow."""

import os
import resource
from pathlib import Path

import mlx.core as mx

CGROUPS = Path("/sys/fs/cgroup")


def memory_limits():
    """{what sets it: bytes} of every limit that holds for this process."""
    found = {"physical memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    if limit := cgroup_limit():
        found["cgroup"] = limit
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        found["ulimit -v"] = address_space
    if mx.metal.is_available():
        found["Metal's recommended working set"] = mx.device_info()["max_recommended_working_set_size"]
    return found


def memory_limit_bytes():
    """The smallest of memory_limits()."""
    return min(memory_limits().values())


def cgroup_limit(table="/proc/self/cgroup", root=CGROUPS):
    """The smallest memory limit of this process's control groups and those above them, in bytes; None without one."""
    try:
        lines = [line.split(":", 2) for line in Path(table).read_text().splitlines()]
    except FileNotFoundError:                                 # no Linux
        return None
    limits = []                                  # version 1 says "none" by a huge number
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            file = top.joinpath(*parts[:depth], name)
            text = file.read_text().strip() if file.exists() else "max"
            limits += [int(text)] if text.isdigit() and int(text) < 1 << 60 else [] 
    return min(limits, default=None)

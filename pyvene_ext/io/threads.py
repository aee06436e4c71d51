"""How many threads torch gets, where the user has not set it: as many as the machine has to spare.

Threads of one product wait for each other. Where another program has one of two cores, a product on two threads takes 20 to 100
times as long as on one. So a command takes no more threads than cores are free when it starts, and lets threads that wait
sleep instead of spin. Both are environment variables, which torch reads when it is imported: a process that has imported torch,
such as a user's own, is never changed.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pyvene_ext.io.bars import note
from pyvene_ext.io.errors import counted

SAMPLE = 0.1  # seconds for which the use of the cores is watched
SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def spare_the_machine() -> None:
    """Choose the number of threads of this process, and say what was chosen; nothing if the user has, or torch is imported."""
    if "torch" in sys.modules:
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if any(name in os.environ for name in SET_BY_USER):
        return
    cores, own = available_cores(), len(affinity())
    threads = min(cores, free_threads(own, busy_cores()))  # a quota says nothing about how busy the cores are
    os.environ["OMP_NUM_THREADS"] = str(threads)
    said = f"{threads} of {cores} cores free" if threads < cores else f"{cores} cores free"
    note(f"{said}: torch takes {counted(threads, 'thread')} (OMP_NUM_THREADS=N takes another number)")


def free_threads(cores: int, busy: float) -> int:
    """How many threads fit beside other programs.

    Args:
        cores: cores that this process may use.
        busy: how many cores other programs use, as a fraction of time.

    Returns:
        At least 1. A core that is busy for less than a quarter of the time counts as free.
    """
    return max(1, min(cores, math.floor(cores - busy + 0.25)))


def available_cores() -> int:
    """The cores that this process may use: those of its affinity, or of its control group's quota if that is smaller."""
    cores, quota = len(affinity()), _quota()
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def busy_cores() -> float:
    """How many of the cores that this process may use are busy, watched for a moment."""
    import psutil

    shares, own = psutil.cpu_percent(SAMPLE, percpu=True), affinity()
    return sum(share for core, share in enumerate(shares) if core in own) / 100


def affinity() -> set[int]:
    """The cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _quota() -> float | None:
    """Cores that the control group of this process and those around it allow; None without a quota."""
    return min(_quotas(), default=None)


def _quotas() -> Iterator[float]:
    """The quota of every group from this process's own up to the root, of both versions of control groups."""
    groups = [("0", "", "/"), ("", "cpu", "/")]  # the root, where a container cannot see its own path
    with suppress(OSError):
        lines = OWN_GROUPS.read_text().splitlines()
        groups += [(number, names, path) for number, names, path in (line.split(":", 2) for line in lines)]
    for number, names, path in groups:
        if number != "0" and "cpu" not in names.split(","):
            continue
        own = PurePosixPath("/", path).relative_to("/")
        for group in {own, *own.parents}:
            with suppress(OSError, ValueError):
                if number == "0":
                    whole, period = (CGROUP / group / "cpu.max").read_text().split()
                else:
                    folder = CGROUP / "cpu" / group
                    whole, period = (
                        (folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
                    )
                if whole.isdecimal() and int(period):
                    yield int(whole) / int(period)

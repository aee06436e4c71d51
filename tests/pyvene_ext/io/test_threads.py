"""Threads of torch: as many as are free, unless the user has said how many or torch is there already."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvene_ext.io import threads

PROGRAM = """
import os, sys
{before}
from dataclasses import dataclass
from pyvene_ext.io import threads
from pyvene_ext.io.cli import run
threads.busy_cores = lambda: 1.0
threads.available_cores = lambda: 2
threads.affinity = lambda: {{0, 1}}
@dataclass(frozen=True)
class Config:
    n: int = 1
def main(config):
    import torch
    print(os.environ.get("OMP_NUM_THREADS"), os.environ.get("OMP_WAIT_POLICY"), torch.get_num_threads())
sys.exit(run(main, Config, []))
"""


def outcome(before: str = "", **environment: str) -> tuple[list[str], str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split(), done.stderr


@pytest.mark.slow
def test_a_command_takes_the_cores_that_are_free_and_says_so() -> None:
    found, said = outcome()
    assert found == ["1", "PASSIVE", "1"]
    assert "1 of 2 cores free: torch takes 1 thread (OMP_NUM_THREADS=N takes another number)" in said


@pytest.mark.slow
def test_the_users_own_setting_wins() -> None:
    found, said = outcome(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="ACTIVE")
    assert found == ["2", "ACTIVE", "2"] and "cores free" not in said


@pytest.mark.slow
def test_a_process_that_has_torch_is_left_alone() -> None:
    found, said = outcome(before="import torch; torch.set_num_threads(5)")
    assert found == ["None", "None", "5"] and "cores free" not in said


@pytest.mark.parametrize(
    ("cores", "busy", "threads_free"), [(2, 0.0, 2), (2, 0.2, 2), (2, 1.0, 1), (2, 2.0, 1), (1, 1.0, 1), (64, 10.4, 53)]
)
def test_free_threads(cores: int, busy: float, threads_free: int) -> None:
    assert threads.free_threads(cores, busy) == threads_free


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "150000 100000"}, 1),  # two threads would wait for each other on one core and a half
        ({"cpu.max": "50000 100000"}, 1),
        # Of the groups around the process the least counts, and a group beside them does not.
        ({"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"}, 3),
        ({"cpu.max": "400000 100000", "job/step/cpu.max": "200000 100000", "other/cpu.max": "100000 100000"}, 2),
        ({"cpu/slurm/cpu.cfs_quota_us": "500000", "cpu/slurm/cpu.cfs_period_us": "100000"}, 5),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_a_quota_of_the_control_group_counts(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text("0::/job/step\n4:cpu,cpuacct:/slurm/uid_0\n2:memory:/other\n")
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(threads, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(8)))
    assert threads.available_cores() == cores


def test_the_machine_is_watched() -> None:
    assert 0 <= threads.busy_cores() <= threads.available_cores() + 0.5

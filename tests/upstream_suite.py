"""Run pyvene's own tests with our IntervenableModel in the place of pyvene's; list what passes with theirs and fails with ours.

    python tests/upstream_suite.py ~/pyvene

Takes a checkout of pyvene, since its tests lie in no package. No hub is asked; tests that need one fail with either class.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# pyvene's tests refuse to run where a package of it is installed, as `pip list` says.
RUNNER = """
import json, subprocess, sys, unittest
sys.path.insert(0, ".")
run = subprocess.run
subprocess.run = lambda command, **how: run([sys.executable, "-c", ""] if command == ["pip", "list"] else command, **how)
import pyvene
theirs = pyvene.IntervenableModel
if sys.argv[1] == "ours":
    sys.path.insert(1, sys.argv[2])
    from pyvene_ext import IntervenableModel as ours
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "pyvene"]:
        for name in [name for name, value in vars(module).items() if value is theirs]:
            setattr(module, name, ours)
suite = unittest.TestSuite()
for folder in ("tests/unit_tests", "tests/integration_tests"):
    suite.addTests(unittest.TestLoader().discover(folder, "*TestCase.py", top_level_dir="."))
result = unittest.TextTestRunner(stream=sys.stderr, verbosity=2).run(suite)
failed = {}
for case, trace in result.errors + result.failures:
    lines = trace.strip().splitlines()
    failed[case.id()] = next((line for line in reversed(lines) if "Error" in line), lines[-1])
print("\\n" + json.dumps([pyvene.__file__, result.testsRun, failed]))
"""


def main(checkout: str) -> int:
    """Run the suite with both classes.

    Args:
        checkout: the top folder of a checkout of pyvene.

    Returns:
        How many tests pass with pyvene's class and fail with ours.
    """
    outcomes = {}
    for whose in ("theirs", "ours"):
        command = [sys.executable, "-W", "ignore", "-c", RUNNER, whose, str(Path(__file__).parents[1])]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"the tests of {checkout} cannot be run: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
            )
        where, run, failed = json.loads(done.stdout.splitlines()[-1])
        if not Path(where).is_relative_to(Path(checkout).resolve()):
            raise SystemExit(f"the tests of {checkout} would run on the pyvene in {where}: give a checkout of pyvene.")
        print(f"{whose}: {run} run, {len(failed)} fail")
        outcomes[whose] = failed
    lost = sorted(set(outcomes["ours"]) - set(outcomes["theirs"]))
    for case in lost:
        print(f"fails with ours only: {case}: {outcomes['ours'][case]}")
    return len(lost)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

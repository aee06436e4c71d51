"""Programs that import pyvene, each in a fork of one process that has loaded what pyvene needs, which takes ten seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Forgets pyvene again, so that each program imports the one of its folder.
SERVER = """
import json, os, sys, traceback
sys.path = [path for path in sys.path if path]
import pyvene
for name in [name for name in sys.modules if name.split(".")[0] == "pyvene"]:
    del sys.modules[name]
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, file in enumerate(asked["files"]):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
        sys.stdin = open(0)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.path.insert(0, "")
        sys.argv = ["-c", *asked["arguments"]]
        code = 0
        try:
            exec(asked["program"], {"__name__": "__main__"})
        except BaseException as error:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@contextmanager
def forks() -> Iterator[Run]:
    """What stands for `subprocess.run` of `python -W ignore -c PROGRAM`; any other command it gives to that."""
    run = subprocess.run
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, name) for name in ("input", "output", "error")]
        command = [sys.executable, "-W", "ignore", "-c"]
        server: subprocess.Popen[str] | None = None

        def in_fork(called: list[str], **how: Any) -> subprocess.CompletedProcess[Any]:
            nonlocal server
            if called[:4] != command:
                return run(called, **how)
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
            server = server or subprocess.Popen(
                [*command, SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=scratch,
                env=environment,
            )
            assert server.stdin and server.stdout
            for file, text in zip(files, (how.get("input", ""), "", ""), strict=True):
                file.write_text(text, encoding="utf-8")
            asked = {
                "files": [*map(str, files)],
                "folder": str(how["cwd"]),
                "environment": how.get("env", environment),
                "program": called[4],
                "arguments": called[5:],
            }
            print(json.dumps(asked), file=server.stdin, flush=True)
            code = next(line for line in server.stdout if line.strip().lstrip("-").isdecimal())
            _, output, error = (file.read_text(encoding="utf-8") for file in files)
            return subprocess.CompletedProcess(called, int(code), output, error)

        try:
            yield in_fork
        finally:
            if server and server.stdin:
                server.stdin.close()
                server.wait()

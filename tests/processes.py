"""Real processes for tests of kills and launches, forked from a server that has imported torch and runs no threads.

A plain fork of the test process copies the locks that its other threads happen to hold, and its children hang now and then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import multiprocess

SERVER = multiprocess.get_context("forkserver")
SERVER.set_forkserver_preload(["accelerate", "matplotlib.pyplot", "pyvene_ext.engine.sweep"])


def start(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A started process that runs `target(*args, **kwargs)` with this process's environment variables, on one thread."""
    process = SERVER.Process(target=_run, args=(dict(os.environ), target, args, kwargs))
    process.start()
    return process


def _run(environ: dict[str, str], target: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    target(*args, **kwargs)

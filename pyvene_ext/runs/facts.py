"""The metadata of a run: what a reader needs to repeat it."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from typing import Any

from torch import nn

from pyvene_ext.io.packages import version_of
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.identity import active_adapters, weight_hash

REPORTED_PACKAGES = ("pyvene-ext", "pyvene", "torch", "transformers", "numpy", "scipy", "datasets")


def metadata(model: nn.Module, /, **facts: Any) -> dict[str, Any]:
    """Collect what a reader needs to repeat a run: command, weights, versions, device, dtype, time.

    Args:
        model: the model that was run.
        **facts: further entries, such as the model's name and the seed.

    Returns:
        Plain data for a JSON file.
    """
    parameter = next(model.parameters())
    config = getattr(model, "config", None)
    return {
        "command": shlex.join(["python", *sys.argv]),
        **facts,
        "revision": getattr(config, "_commit_hash", None),
        "model_type": getattr(config, "model_type", None),
        "weight_hash": weight_hash(model),
        "active_adapters": active_adapters(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(input_device(model)),
        "versions": {name: version_of(name) for name in REPORTED_PACKAGES},
        "python": platform.python_version(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }

"""Metadata of a run, from which it can be reproduced, and the evidence that it found."""

from __future__ import annotations

import math
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from torch import nn

from pyvene_ext.io.packages import version_of
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.identity import active_adapters, weight_hash
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.stats.intervals import Interval

REPORTED_PACKAGES = ("pyvene-ext", "pyvene", "torch", "transformers", "numpy", "scipy", "datasets")


def answer_names(prompts: PromptSet) -> tuple[str, str]:
    """What a study calls the two answers of its prompts.

    Args:
        prompts: the prompts.

    Returns:
        "IO" and "S" if these are the answers of every prompt, else "right" and "wrong".
    """
    of_ioi = all(one.io_name and one.s_name and not (one.answer or one.wrong) for one in prompts.prompts)
    return ("IO", "S") if of_ioi else ("right", "wrong")


def metadata(model: nn.Module, /, **facts: Any) -> dict[str, Any]:
    """Collect what a reader needs to reproduce a run: command, weights, versions, device, dtype, time.

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


class _Facts(BaseModel):
    """Evidence as a summary file has it."""

    sample: str
    effect: str
    interval: tuple[float | None, float | None, float | None] | None
    control: str
    sharpen: str
    null: float | None = 0.0


@dataclass(frozen=True)
class Evidence:
    """The main effect of a study, and what supports it: the line that every study ends with.

    Attributes:
        sample: what was measured, with its number: "100 prompts".
        effect: what the interval is of: "23.3 zeroed changes logit_diff by".
        interval: the effect with its 95% interval; None where a study has none.
        control: what it was compared with, and the outcome: "20 random sets of the same layers, p = 0.048"; "none".
        sharpen: the one flag that would sharpen it: "a larger --limit".
        null: the value of no effect; None if there is no such value.
    """

    sample: str
    effect: str
    interval: Interval | None
    control: str
    sharpen: str
    null: float | None = 0.0

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Evidence:
        """Read what `facts` gave.

        Args:
            facts: of a summary file.

        Returns:
            The evidence.

        Raises:
            ValueError: the facts are not those of evidence.
        """
        read = _Facts.model_validate(facts)
        ends = read.interval and Interval(*(math.nan if value is None else value for value in read.interval))
        return cls(read.sample, read.effect, ends, read.control, read.sharpen, read.null)

    @property
    def measured(self) -> str:
        """The effect with its interval, in words."""
        if self.interval is None:
            return self.effect
        mean, low, high = map(float, self.interval)
        known = math.isfinite(low) and math.isfinite(high)
        effect = f"{self.effect} {mean:.3g}"
        effect += f" [{low:.3g}, {high:.3g}]" if known else ", without an interval, which proves nothing"
        if known and self.null is not None and low <= self.null <= high:
            effect += f", not told apart from {self.null:g}"
        return effect

    def __str__(self) -> str:
        """One line for the terminal."""
        return f"evidence: {self.sample}; {self.measured}; control: {self.control}; to sharpen it: {self.sharpen}"

    @property
    def facts(self) -> dict[str, Any]:
        """The same for a summary file."""
        facts = asdict(self) | {"interval": None}
        if self.interval is not None:
            facts["interval"] = [float(value) if value == value else None for value in self.interval]
        return facts

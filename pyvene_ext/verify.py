"""Verify a model's card: compare every component with plain torch hooks that are independent of the card.

    python -m pyvene_ext.verify --model smollm2-135m-instruct                  # as much as a minute allows
    python -m pyvene_ext.verify --model path/to/folder --thorough --layers all
    python -m pyvene_ext.verify --model path/to/folder --sites z resid_post attention_pattern

`pyvene_ext.verify_card` does it (`intervenable.verification` says how), for the model with and without its head.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import pyvene_ext as px
from pyvene_ext.io.bounds import OneOrMore
from pyvene_ext.io.cli import run


@dataclass
class Options:
    """Check every component of a model's card against independent hooks; exit status 1 if anything differs."""

    model: str
    """A shipped or fetched model, a folder, a GGUF file, or a name on the hub."""
    layers: Literal["ends", "all"] = "ends"
    """First, middle and last layer, or all of them."""
    sites: OneOrMore[str] | None = None
    """Only these sites or components, such as z or block_output; by default all that the card has."""
    thorough: bool = False
    """Make all checks, however long they take; by default as many as a minute allows."""
    tolerance: float = 1e-5
    """Largest difference allowed, relative where values exceed 1."""
    dtype: str = "float32"
    """Weights are cast to this; the tolerance is meant for float32."""
    device: str | None = None
    """Where to run; default: the GPU if there is one."""


def main(options: Options) -> int:
    """Verify the model with and without its head.

    Args:
        options: the flags.

    Returns:
        The exit code, 0 if there are no failures.
    """
    from modelcards import card_of, component_named  # heavy, and help does without

    model, _ = px.load_model(options.model, dtype=options.dtype, device=options.device)
    failures = 0
    for part, seconds in ((model, 45.0), (model.base_model, 15.0)):
        sites = options.sites
        if sites and part is not model:
            sites = tuple(site for site in sites if component_named(site).name in card_of(part).mapping(type(part)))
        if sites == ():  # the model without its head has no logits
            continue
        report = px.verify_card(
            part,
            options.layers,
            tolerance=options.tolerance,
            progress=True,
            sites=sites,
            seconds=None if options.thorough else seconds,
        )
        print(report.table())
        failures += report.failures
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run(main, Options))

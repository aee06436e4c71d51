"""Model cards for pyvene: what the families of `modelcards.CARDS` look like to it.

import modelcards
modelcards.register()      # pyvene.IntervenableModel now knows every component of `modelcards.COMPONENTS`
"""

import contextlib
import io

# pyvene announces on standard output, at import, which optional backends are missing.
with contextlib.redirect_stdout(io.StringIO()):
    import pyvene  # noqa: F401

from modelcards.attention_taps import Taps, head_shares
from modelcards.card import Card
from modelcards.components import (
    COMPONENTS,
    FIELD_NAMES,
    Component,
    dimensions,
    head_dim,
    n_heads,
    n_kv_heads,
    n_layers,
    n_positions,
    window,
)
from modelcards.register import CARDS, card_of, register

__all__ = [
    "CARDS",
    "COMPONENTS",
    "FIELD_NAMES",
    "Card",
    "Component",
    "Taps",
    "card_of",
    "dimensions",
    "head_dim",
    "head_shares",
    "n_heads",
    "n_kv_heads",
    "n_layers",
    "n_positions",
    "register",
    "window",
]

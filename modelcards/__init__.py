"""Model cards for pyvene: where the components of 23 families of decoders live.

    import modelcards
    modelcards.register()      # pyvene.IntervenableModel now knows every component of `modelcards.COMPONENTS`

`modelcards/<family>/modelings_intervenable_<family>.py` binds pyvene's own dictionaries, for plain pyvene. Their names begin with
transformers' folder of the architecture, as pyvene's do: `llama_type_to_module_mapping` lies in `llama3_1`.
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
    config_of,
    dimensions,
    head_dim,
    n_heads,
    n_kv_heads,
    n_layers,
    n_positions,
    window,
)
from modelcards.names import component_named, meant
from modelcards.register import CARDS, card_of, find_card, register

__all__ = [
    "CARDS",
    "COMPONENTS",
    "FIELD_NAMES",
    "Card",
    "Component",
    "Taps",
    "card_of",
    "component_named",
    "config_of",
    "dimensions",
    "find_card",
    "head_dim",
    "head_shares",
    "meant",
    "n_heads",
    "n_kv_heads",
    "n_layers",
    "n_positions",
    "register",
    "window",
]

"""pyvene-ext: causal interventions on open decoder language models that can be trusted.

Importing it registers the model cards with pyvene.
"""

import modelcards

modelcards.register()

from pyvene_ext.intervenable import IntervenableModel  # noqa: E402
from pyvene_ext.verify import verify_card  # noqa: E402

__all__ = ["IntervenableModel", "verify_card"]

"""Interventions as data: validated, immutable, written to YAML or JSON and back without loss. One module a kind.

A kind's fields, its checks and how its replacement is computed belong here; batching and order belong in `engine`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

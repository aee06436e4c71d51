"""Interventions as data: validated, immutable, saved to YAML or JSON and loaded without loss. One module per kind.

A kind's fields, its checks and how its replacement is computed belong here; batching and order belong in `engine`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

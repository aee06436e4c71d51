"""Inputs of a model: prompt sets, their tokens and named positions, word problems, parallel text, token lists.

Reading and checking text belongs here; interventions at a position do not.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Statistics of results: intervals, correlations, tests, and random control sets of heads.

Functions take arrays; models and prompts belong elsewhere. Everything is computed in float64, and every random draw comes from a
generator of `io.seeds.rng`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Statistics of results: intervals, correlations, tests, and the random heads that found heads are compared with.

Only arrays come in; models and prompts are not known here. Everything is float64; every random draw comes from `io.seeds.rng`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

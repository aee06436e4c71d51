"""Methods of the literature on top of the engines: patching, attribution, circuits, steering, what heads do, solving, reasoning.

A method takes a model and prompts and returns arrays; tables, figures and files belong in `runs`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Models: loaded, placed on devices, hooked, identified by their weights, and run block by block.

What a family's modules are called belongs in `modelcards`; what is done to activations belongs in the rooms after this one.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

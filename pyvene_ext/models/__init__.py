"""Models: loading them, placing them on devices, hooking, hashing their weights, and running them block by block.

What a family's modules are called belongs in `modelcards`; what is done to activations belongs in the later rooms.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

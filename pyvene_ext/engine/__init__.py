"""Running specs on prompts: resolved and checked once, then one metric per intervention and prompt.

`plain` defines what a spec does, one intervention at a time; `sweep` computes the same numbers fast. Methods that combine several
runs belong in `methods`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Running models on prompts: specs, resolved and checked once, give a metric per intervention and prompt; activations are read.

`plain` defines what a spec does, one intervention at a time; `sweep` computes the same numbers fast; `reading`
reads activations of the untouched model. Methods that combine several runs belong in `methods`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

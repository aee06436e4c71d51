"""The project's figures: one style, colours that colour-blind readers can tell apart, units on every axis.

Every function returns a matplotlib `Figure` made without pyplot, so that it works without a screen and leaves nothing open; the
style holds only while one of these functions runs. `save` writes the figure. Numbers come in, ready to be drawn; what one study
alone draws is a module here too.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

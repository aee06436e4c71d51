"""One page for one run or several, which needs no network: `python -m pyvene_ext.report --help` says what is on it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

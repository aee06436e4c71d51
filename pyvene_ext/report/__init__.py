"""One HTML page for one or several runs, which works offline: `python -m pyvene_ext.report --help` describes it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

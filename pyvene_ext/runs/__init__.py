"""What studies share: flags, run folders, metadata, the stores that resume an interrupted run, and figures in one style.

Numbers are computed in `stats` and `methods`; the page that shows a run belongs in `report`.
"""

import lazy_loader

from pyvene_ext.io.files import write_csv, write_json, write_yaml  # noqa: F401  (names that the tutorial imports from here)
from pyvene_ext.io.seeds import rng  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

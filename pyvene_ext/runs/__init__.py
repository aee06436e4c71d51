"""What studies share: their flags, and what they leave behind, from stores that resume a run to figures in one style.

Numbers are computed before they come here; the page that shows a run is `report`'s.
"""

import lazy_loader

from pyvene_ext.io.files import write_csv, write_json, write_yaml  # noqa: F401  (the tutorial's names)
from pyvene_ext.io.seeds import rng  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""What a study leaves behind: its run folder, the stores that resume it, metadata, and figures in one style.

Numbers are computed before they come here; the page that shows a run is `report`'s.
"""

import lazy_loader

from pyvene_ext.io.files import write_csv, write_json, write_yaml
from pyvene_ext.io.seeds import rng

__getattr__, __dir__, _ = lazy_loader.attach(__name__, ["figures"], {"metadata": ["metadata"]})

__all__ = ["figures", "metadata", "rng", "write_csv", "write_json", "write_yaml"]

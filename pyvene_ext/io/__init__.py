"""Files that are complete or absent, hashes, seeds, progress bars, optional packages, and the command line.

Nothing here depends on models, prompts or interventions, and nothing here imports transformers or pyvene.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

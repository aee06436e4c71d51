from . import figures as figures
from .metadata import metadata as metadata

from .plain import reference_for as reference_for
from .plain import run as run
from .results import Result as Result

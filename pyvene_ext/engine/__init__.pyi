from .measure import Metric as Metric
from .plain import Result as Result
from .plain import reference_for as reference_for
from .plain import run as run

from .measure import Metric as Metric
from .measure import first_tokens_said as first_tokens_said
from .plain import reference_for as reference_for
from .plain import run as run
from .reading import Activations as Activations
from .reading import read as read
from .reading import read_batches as read_batches
from .results import Result as Result

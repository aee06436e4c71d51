from .load import load_model as load_model
from .names import TINY_FOLDER as TINY_FOLDER
from .names import TINY_MODELS as TINY_MODELS

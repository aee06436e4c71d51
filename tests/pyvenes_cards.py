"""pyvene's own cards as they are without this project; tests/conftest.py loads this before anything can register ours."""

from __future__ import annotations

from pyvene.models.intervenable_modelcard import type_to_dimension_mapping, type_to_module_mapping

CARDS = type_to_module_mapping, type_to_dimension_mapping
PLAIN = PLAIN_MODULES, PLAIN_DIMENSIONS = dict(type_to_module_mapping), dict(type_to_dimension_mapping)

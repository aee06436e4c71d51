"""Hashes that identify a model: one of its weights, one of its config."""

from __future__ import annotations

import json

from torch import nn

from pyvene_ext.io.hashes import data_hash, tensors_hash
from pyvene_ext.models.devices import on_cpu


def weight_hash(model: nn.Module) -> str:
    """Hash every parameter and buffer: name, shape, dtype and bytes (xxh3, several GB per second).

    Weights are read one by one, so that offloaded ones need not fit in memory together.

    Args:
        model: the model, on any devices; where its weights are does not change the hash.

    Returns:
        32 hexadecimal digits.
    """
    return tensors_hash((name, on_cpu(model, name, tensor)) for name, tensor in sorted(model.state_dict().items()))


def config_hash(model: nn.Module) -> str:
    """Hash a model's config, which holds what the weights do not: a soft-cap, the RoPE base.

    Args:
        model: a transformers model.

    Returns:
        32 hexadecimal digits; the name and the version of transformers do not count.
    """
    config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    return data_hash(
        {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    )

"""What a model is, in one hash each: its weights and its config."""

from __future__ import annotations

import json

from torch import nn

from pyvene_ext.io.hashes import data_hash, tensors_hash
from pyvene_ext.models.devices import on_cpu


def weight_hash(model: nn.Module) -> str:
    """Hash of every parameter and buffer: name, shape, dtype and bytes (xxh3, some GB per second).

    It is the same wherever the weights are, and reads them one by one, so that offloaded ones need not fit in memory together.
    """
    return tensors_hash((name, on_cpu(model, name, tensor)) for name, tensor in sorted(model.state_dict().items()))


def config_hash(model: nn.Module) -> str:
    """Hash of a transformers model's config, which counts beside the weights: a soft-cap or a RoPE base is no weight."""
    config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    return data_hash(
        {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    )

"""Hashes that identify a model: one of its weights, one of its config."""

from __future__ import annotations

import json
from collections.abc import Iterator

from torch import Tensor, nn

from pyvene_ext.io.hashes import data_hash, tensors_hash
from pyvene_ext.models.devices import on_cpu


def weight_hash(model: nn.Module) -> str:
    """Hash every parameter and buffer: name, shape, dtype and bytes (xxh3, several GB per second).

    Weights are read one by one, so that offloaded ones need not fit in memory together. They are not read from the state dict:
    asking quantised modules for it can convert their weights, with loss.

    Args:
        model: the model, on any devices; where its weights are does not change the hash.

    Returns:
        32 hexadecimal digits.
    """
    named = sorted(named_weights(model), key=lambda item: item[0])
    parts = (part for name, tensor in named for part in _parts(name, tensor))
    return tensors_hash((name, on_cpu(model, name, tensor)) for name, tensor in parts)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the parameters and buffers that a state dict would have, without asking for it.

    Args:
        model: the model.

    Yields:
        The name in the state dict and the tensor; tied ones under each of their names.
    """
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A weight, or the plain tensors that a quantised one consists of."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's and other subclasses of tensors
        for part in tensor.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{part}", getattr(tensor, part))
        return
    yield name, tensor
    if type(tensor) not in (Tensor, nn.Parameter):  # bitsandbytes keeps scales as attributes
        yield from _attributes(name, tensor)


def _attributes(name: str, holder: object) -> Iterator[tuple[str, Tensor]]:
    for key, value in sorted(vars(holder).items()):
        if isinstance(value, Tensor):
            yield f"{name}.{key}", value
        elif type(value).__name__ == "QuantState":
            yield from _attributes(f"{name}.{key}", value)


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

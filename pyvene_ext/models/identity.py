"""Hashes that identify a model: one of its weights, one of its config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pyvene_ext.io.hashes import data_hash, tensors_hash
from pyvene_ext.models.devices import input_device, on_cpu

# Libraries whose hooks and forwards are part of how models run here, and whose modules keep what counts in public attributes.
LIBRARIES = frozenset({"torch", "transformers", "accelerate", "pyvene", "pyvene_ext", "modelcards"})
# Attributes that change without changing what a module computes: names, places, what a forward pass of another length leaves.
WITHOUT_EFFECT = (
    frozenset(
        {"name_or_path", "hf_device_map", "gradient_checkpointing", "max_seq_len_cached", "loss_type", "model_tags"}
    )
    | vars(nn.Module()).keys()
)


def identity_of(model: nn.Module) -> dict[str, Any]:
    """Describe a model by everything that its forward pass depends on, wherever its weights are.

    Hooks of one's own count by the names of their functions, since what they compute cannot be seen.

    Args:
        model: a transformers model.

    Returns:
        JSON-able data: hashes of weights, config and module attributes; active adapters; hooks by module.
    """
    return {"model weights": weight_hash(model), "model config": config_hash(model), **_state(model)}


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Describe a model and how it is run, for what is kept between runs.

    Args:
        model: a transformers model.

    Returns:
        Its `identity_of`, dtype, kind of device and attention implementation.
    """
    return {
        **identity_of(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": input_device(model).type,
        "attention implementation": model.config._attn_implementation,  # type: ignore[union-attr]
    }


def fingerprint(model: nn.Module) -> Any:
    """Describe a model without reading its weights: while this stays equal, so does the identity, unless `weight.data` is edited.

    Args:
        model: a transformers model.

    Returns:
        JSON-able data.
    """
    weights = [
        (name, x.data_ptr() if type(x) in (Tensor, nn.Parameter) else id(x), -1 if x.is_inference() else x._version)
        for name, x in named_weights(model)
    ]
    return [config_hash(model), _state(model), weights]


def active_adapters(model: nn.Module) -> list[str]:
    """List the adapters (LoRA and others) that are switched on, by peft's attributes of modules.

    Args:
        model: any model.

    Returns:
        Their names; none where adapters are disabled.
    """
    found: set[str] = set()
    for module in model.modules():
        names, off = getattr(module, "active_adapters", ()), getattr(module, "disable_adapters", True)
        if off is False and isinstance(names, (list, tuple)):  # models have methods of these names
            found.update(names)
    return sorted(found)


def _state(model: nn.Module) -> dict[str, Any]:
    """Adapters, hooks and attributes."""
    named = list(model.named_modules())
    attributes = [(name, type(module).__qualname__, _attributes_of(module)) for name, module in named]
    return {
        "adapters": active_adapters(model),
        "hooks": [f"{name}: {called}" for name, module in named for called in _foreign_functions(module)],
        "module attributes": data_hash(attributes),
    }


def _foreign_functions(module: nn.Module) -> Iterator[str]:
    """The names of hooks and of a replaced forward that are not a library's."""
    replaced = (vars(module).get(name) for name in ("forward", "_old_forward"))  # accelerate moves the forward there
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *replaced)
    for function in (getattr(hook, "func", hook) for hook in hooks if hook is not None):
        home = getattr(function, "__module__", None) or type(function).__module__
        if home.partition(".")[0] not in LIBRARIES:
            yield f"{home}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _attributes_of(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes that are plain data or tensors; of a library's module those that are public."""
    own = type(module).__module__.partition(".")[0] in LIBRARIES
    names = sorted(vars(module).keys() - WITHOUT_EFFECT)
    plain = ((name, _as_plain(vars(module)[name])) for name in names if not (own and name.startswith("_")))
    return [(name, value) for name, value in plain if value is not _OTHER]


_OTHER: Any = object()


def _as_plain(value: Any) -> Any:
    """A value as JSON-able data; `_OTHER` for functions, modules and other objects."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and not value.is_meta:
        return tensors_hash([("", value.detach().cpu())])
    if isinstance(value, dict):
        value = sorted((str(key), _as_plain(item)) for key, item in value.items())
        return _OTHER if any(item is _OTHER for _, item in value) else value
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_as_plain(item) for item in value]
        ordered = sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items
        return _OTHER if any(item is _OTHER for item in items) else ordered
    return _OTHER


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

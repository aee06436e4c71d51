"""Eval mode for the length of a block; training modes and gradient flags are restored after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in eval mode inside the block, and restore every module's mode after it.

    Args:
        model: the model.
    """
    with restoring_flags(model):
        if any(module.training for module in model.modules()):
            model.eval()
        yield


@contextmanager
def restoring_flags(model: nn.Module) -> Iterator[None]:
    """Restore every module's train mode and every parameter's grad flag after the block.

    Args:
        model: the model.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    # By name: accelerate puts new parameters in place of those that it offloads.
    wanted = [{name: p.requires_grad for name, p in module._parameters.items() if p is not None} for module in modules]
    try:
        yield
    finally:
        for module, mode, flags in zip(modules, training, wanted, strict=True):
            if module.training != mode:  # rarely so, and setting an attribute of a module is slow
                module.training = mode
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad != flags.get(name, parameter.requires_grad):
                    parameter.requires_grad_(flags[name])

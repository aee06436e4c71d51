"""A model in eval mode for a while, and its training modes and gradient flags as they were afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode for a while; every module's own mode afterwards."""
    with flags_kept(model):
        if any(module.training for module in model.modules()):
            model.eval()
        yield


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Every module's train mode and every parameter's grad flag are afterwards as they were."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    # By name: accelerate puts new parameters in place of those that it offloads.
    wanted = [{name: p.requires_grad for name, p in module._parameters.items() if p is not None} for module in modules]
    try:
        yield
    finally:
        for module, mode, flags in zip(modules, training, wanted, strict=True):
            if module.training != mode:  # few do, and setting what is set takes its time
                module.training = mode
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad != flags.get(name, parameter.requires_grad):
                    parameter.requires_grad_(flags[name])

"""Models spread over devices by accelerate, and work shared by the processes of one launch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import align_module_device, has_offloaded_params, parse_flag_from_env
from jaxtyping import Float32
from torch import Tensor, nn

T = TypeVar("T")


class Workspace:
    """A buffer that is reused, because allocating memory is slow."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._flat = torch.empty(0)

    def take(self, shape: Sequence[int], device: torch.device) -> Float32[Tensor, "*shape"]:
        """Give a tensor of any contents, in place of the one that was given before.

        Args:
            shape: of the tensor.
            device: where it lies.

        Returns:
            The tensor.
        """
        size = math.prod(shape)
        if len(self._flat) < size or self._flat.device != device:
            self._flat = torch.empty(0)  # freed before more is taken
            self._flat = torch.empty(size, device=device)
        return self._flat[:size].view(*shape)


def input_device(model: nn.Module) -> torch.device:
    """The device that a model takes its inputs on.

    Args:
        model: the model, on one device or spread over several.

    Returns:
        The device of its first weights, or the one that accelerate loads them to; the CPU for a model without weights.
    """
    for module in model.modules():
        if has_offloaded_params(module):
            return torch.device(module._hf_hook.execution_device)  # type: ignore[union-attr, arg-type]
        if (parameter := next(module.parameters(recurse=False), None)) is not None:
            return parameter.device
    return torch.device("cpu")


def on_cpu(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """One entry of a model's state dict on the CPU, loaded if accelerate has offloaded it.

    Only what was offloaded together with it, usually one module's own weights, is loaded.

    Args:
        model: the model.
        name: the entry's name in the state dict.
        tensor: the entry; on the meta device if it is offloaded.

    Returns:
        The values, detached.

    Raises:
        ValueError: the entry has no values anywhere.
    """
    if not tensor.is_meta:
        return tensor.detach().cpu()
    owner = name
    while owner:
        owner, _, _ = owner.rpartition(".")
        module = model.get_submodule(owner)
        if has_offloaded_params(module):
            with align_module_device(module, torch.device("cpu")):
                found = model.get_submodule(name.rpartition(".")[0])
                return getattr(found, name.rpartition(".")[2]).detach()
    raise ValueError(
        f"{name} of the {type(model).__name__} has no values, only a shape; load the model with its weights."
    )


def weights_on_a_device(model: nn.Module) -> int:
    """Measure a model's share of the fullest device.

    Args:
        model: the model.

    Returns:
        Bytes of weights on the device that holds most of them; offloaded weights do not count.
    """
    held: Counter[torch.device] = Counter()
    for parameter in model.parameters():
        held[parameter.device] += parameter.nbytes
    return max((size for device, size in held.items() if device.type != "meta"), default=0)


def free_memory(device: torch.device) -> int | None:
    """The memory that is free on a device.

    Args:
        device: the device.

    Returns:
        Bytes; None where they cannot be asked for.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else None


def fits_beside(model: nn.Module) -> bool:
    """Whether another model of this size, and as much again to work with, would fit beside one that is loaded.

    Args:
        model: the model.

    Returns:
        True also where the free memory cannot be asked for.
    """
    free = free_memory(input_device(model))
    return free is None or free > 2 * weights_on_a_device(model)


def empty_cache() -> None:
    """Release what a failed call has left in a GPU's cache."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def no_gradients(model: nn.Module) -> AbstractContextManager[Any]:
    """A context without autograd that leaves no trace on the model.

    It is inference mode, which is a little faster than no_grad, unless the model is offloaded: then accelerate would load
    parameters as inference tensors, which can never have a gradient again.

    Args:
        model: the model that will run.

    Returns:
        The context.
    """
    hooked = (
        module for module in model.modules() if "_hf_hook" in vars(module)
    )  # hasattr is slow where the attribute is missing
    return torch.no_grad() if any(map(has_offloaded_params, hooked)) else torch.inference_mode()


def processes() -> PartialState:
    """The processes of an `accelerate launch` or `torchrun`; a single one where nothing was launched."""
    # By default accelerate treats processes without a GPU as independent, and each would do all the work.
    return PartialState(cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))


@cache
def _without_timeout() -> Any:
    # The launch's own group times out after ten minutes, and one process may have hours more to do than another.
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))


def all_gather(value: T) -> list[T]:
    """Gather one value from every process, by rank; waits until all processes call it.

    Args:
        value: this process's value, picklable.

    Returns:
        The values of all processes, the same list in each of them.
    """
    values: list[T] = [value] * processes().num_processes
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value, group=_without_timeout())
    return values


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run an action in every process; a ValueError in one of them is raised in all, so that no process waits forever.

    Args:
        action: called once in each process.

    Returns:
        What `action` returns in this process.

    Raises:
        ValueError: this process's own, else that of the first process that failed.
    """
    error: ValueError | None = None
    try:
        outcome = action()
    except ValueError as caught:
        error = caught
    if errors := [message for message in all_gather(error and str(error)) if message is not None]:
        raise error or ValueError(errors[0])
    return outcome


def broadcast_from_main(action: Callable[[], T]) -> T:
    """Run an action in the main process only and give its result to all.

    Args:
        action: called in the main process.

    Returns:
        Its result, in every process.

    Raises:
        ValueError: the main process's, raised in every process.
    """
    outcome = on_all_ranks(lambda: action() if processes().is_main_process else None)
    return all_gather(outcome)[0]  # type: ignore[return-value]


def is_main_process() -> bool:
    """Whether this process prints and writes files: the only one, or the first that `accelerate launch` started."""
    return processes().is_main_process


def choose_device(wanted: str | None) -> str:
    """The device for this process.

    Args:
        wanted: a torch device, or None for a GPU if there is one. Under `accelerate launch`, None and "cuda" give each process
            its own GPU.

    Returns:
        The device's name.
    """
    group = processes()
    if group.num_processes > 1 and wanted in (None, "cuda"):
        return str(group.device)
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")

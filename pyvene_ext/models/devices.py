"""Models spread over devices, which accelerate's hooks bring together, and work spread over the processes of one launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import align_module_device, has_offloaded_params, parse_flag_from_env
from torch import Tensor, nn

T = TypeVar("T")


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first weights, or the one that accelerate brings them to."""
    for module in model.modules():
        if has_offloaded_params(module):
            return torch.device(module._hf_hook.execution_device)  # type: ignore[union-attr, arg-type]
        if (parameter := next(module.parameters(recurse=False), None)) is not None:
            return parameter.device
    return torch.device("cpu")


def on_cpu(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The entry `name` of a model's state dict with its values, which lie elsewhere if accelerate has offloaded them.

    No more than what is offloaded together with it, mostly one module's own weights, is in memory for it. Raises ValueError
    where there are no values.
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
    """Bytes of a model's weights on the device that holds most of them; what is offloaded is on none."""
    held: Counter[torch.device] = Counter()
    for parameter in model.parameters():
        held[parameter.device] += parameter.nbytes
    return max((size for device, size in held.items() if device.type != "meta"), default=0)


def no_gradients(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which no graph is made, and which leaves nothing on the model.

    Of inference mode, which is a little faster, accelerate would leave parameters that can never have a gradient again.
    """
    hooked = (
        module for module in model.modules() if "_hf_hook" in vars(module)
    )  # hasattr takes long where there is none
    return torch.no_grad() if any(map(has_offloaded_params, hooked)) else torch.inference_mode()


def processes() -> PartialState:
    """The processes of an `accelerate launch` or `torchrun`; a single one where nothing was launched."""
    # Unless told, accelerate takes processes without a GPU for strangers to each other, and each would do all the work.
    return PartialState(cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))


@cache
def _patient() -> Any:
    # In the launch's own group waiting is an error after ten minutes, and one process may have hours more to do than another.
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))


def all_gather(value: T) -> list[T]:
    """What every process gives, in their order, in every process; waits until all have come here."""
    values: list[T] = [value] * processes().num_processes
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value, group=_patient())
    return values


def on_all_ranks(action: Callable[[], T]) -> T:
    """Do something in every process; a ValueError in one of them is raised in all, so that none waits for another in vain."""
    error: ValueError | None = None
    try:
        outcome = action()
    except ValueError as caught:
        error = caught
    if errors := [message for message in all_gather(error and str(error)) if message is not None]:
        raise error or ValueError(errors[0])
    return outcome


def broadcast_from_main(action: Callable[[], T]) -> T:
    """What the first process gets by doing something, in all of them; or its ValueError."""
    outcome = on_all_ranks(lambda: action() if processes().is_main_process else None)
    return all_gather(outcome)[0]  # type: ignore[return-value]


def is_main_process() -> bool:
    """Whether this process prints and writes: the only one, or the first of those that `accelerate launch` has started."""
    return processes().is_main_process


def choose_device(wanted: str | None) -> str:
    """The device of this process: `wanted` if given, else a GPU if there is one; of several processes each takes its own."""
    group = processes()
    if group.num_processes > 1 and wanted in (None, "cuda"):
        return str(group.device)
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")

"""The modes in which a model is read: eval mode, with logits in float32, inside a `with` block.

A logit near 20 is a multiple of 1/8 in bfloat16 and of 1/64 in float16, too coarse for the effect of one head. So the final
hidden state, rounded as the model rounds it, is multiplied with the weights in float32; scale and soft-cap are the model's own
code, which keeps the dtype that it is given.

What remains is the rounding of hidden states, which depends on the order of sums, and so on the shapes of tensors. Where `sweep`
computes every column of a prompt (all tokens are edited, and none are shared by all prompts), it has the states of `run`, to the
bit on CPUs whose products in half precision do not depend on how many rows there are. Where it computes fewer, some states round
the other way. In bfloat16 the deltas of the two engines then differ by 0.002 to 0.02 on average on the tests' and the shipped
models, whose largest deltas are 1 to 35, which is about half of what rounding does to either: both are 0.006 to 0.03 away from
float32. Where the choice of an expert is close, more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from modelcards.attention_taps import output_weight
from pyvene_ext.models.hooks import refuse_compiled, replace_forward

CHUNK = 2**24  # weights that are float32 at once: 64 MiB


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in eval mode inside the block, with logits in float32, and restore every module's mode after it.

    Everything that reads a model runs inside this block, so that all of it reads the same logits.

    Args:
        model: the model.

    Raises:
        ValueError: it is compiled.
    """
    refuse_compiled(model)
    with restoring_flags(model), logits_in_float32(model):
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


def unembeds_in_half(head: Any) -> bool:
    """Whether a model's output embedding is a plain projection whose weights are narrower than float32.

    Args:
        head: the output embedding; None for a model without logits.

    Returns:
        False for float32, and for one that is quantised, adapted or sharded, which keeps its own forward.
    """
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.weight.dtype in (torch.bfloat16, torch.float16)
    )


@contextmanager
def logits_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Compute logits in float32 inside the block; a model in float32 is not touched.

    Gradients reach the hidden state, not the weights.

    Args:
        model: the model.
    """
    head: Any = model.get_output_embeddings()
    if not unembeds_in_half(head):
        yield
        return

    def unembed(x: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some vocab"]:
        # The weights are looked up in each call: accelerate loads offloaded ones just before.
        weight = head.weight.detach()
        logits = _Unembedding.apply(x.to(weight.device).float(), weight)
        return logits if head.bias is None else logits.add_(head.bias.detach().float())

    with replace_forward(head, unembed, loaded=True):
        yield


@contextmanager
def unembedding_only(model: PreTrainedModel, ids: Int[Tensor, "*row k"]) -> Iterator[bool]:
    """Compute the logits of some tokens only inside the block, in float32; scale and soft-cap are the model's own code.

    Args:
        model: the model.
        ids: the tokens wanted of all rows, or of each row.

    Yields:
        Whether that can be done; if not (the unembedding is quantised, adapted or offloaded), the model computes all logits.
    """
    head: Any = model.get_output_embeddings()
    weight = output_weight(head)
    if weight is None:
        yield False
        return
    chosen = ids.to(weight.device)
    product = "r...d,kd->r...k" if chosen.ndim == 1 else "r...d,rkd->r...k"

    def unembed(x: Float[Tensor, "row *pos d_model"]) -> Float[Tensor, "row *pos k"]:
        logits = torch.einsum(product, x.to(weight.device).float(), head.weight[chosen].float())
        if head.bias is None:
            return logits
        return logits + head.bias[chosen].float().view(*chosen.shape[:-1], *[1] * (x.ndim - 2), -1)

    with replace_forward(head, unembed):
        yield True


class _Unembedding(torch.autograd.Function):
    """Multiply with a weight `vocab d_model` that is converted to float32 in chunks, here and for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        logits = x.new_empty(*x.shape[:-1], len(weight))
        for columns in _chunks(weight):
            logits[..., columns] = x @ weight[columns].float().T
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        found = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        for columns in _chunks(weight):
            found += gradient[..., columns] @ weight[columns].float()
        return found, None


def _chunks(weight: Float[Tensor, "vocab d_model"]) -> Iterator[slice]:
    step = max(1, CHUNK // weight.shape[1])
    yield from (slice(start, start + step) for start in range(0, len(weight), step))

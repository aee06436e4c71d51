"""What attribution asks of a model and of a metric: logits of the answers' position, and a gradient that is one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import card_of
from pyvene_ext.engine.plain import ANSWERS_ONLY, METRICS
from pyvene_ext.models.devices import input_device
from pyvene_ext.prompts.tokenized import Batch
from pyvene_ext.specs.joint import Spec, members

ADDS = ("attention_contribution", "mlp_contribution")  # what a block adds to the residual stream


def check_differentiable(metric: str, allowed: tuple[str, ...], dtype: torch.dtype) -> None:
    if metric in METRICS and metric not in allowed:
        why = f"the gradient of {metric!r} is 0 or undefined everywhere"
        if metric == "kl":
            why = "kl to the base run has no first order there; only integrated gradients of several steps see it"
        raise ValueError(f"{why}: choose among {', '.join(allowed)}.")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose among {', '.join(allowed)}.")
    check_gradient(metric, dtype)


def check_gradient(metric: str, dtype: torch.dtype) -> None:
    """Raise ValueError for a metric whose gradients float16 rounds to 0."""
    if dtype == torch.float16 and metric not in ANSWERS_ONLY:
        raise ValueError(f"gradients of {metric} are too small for float16; load the model in bfloat16 or float32.")


def check_places(model: PreTrainedModel, specs: Iterable[Spec]) -> None:
    """Raise ValueError for the stream between attention and MLP where no module is given it whole (OPT)."""
    card = card_of(model)
    for edit in (edit for spec in specs for edit in members(spec)):
        if edit.site == "resid_mid" and card.is_tap(model, "resid_mid"):
            raise ValueError(
                f"{edit.name}: the MLP of {card.family} and the stream beside it are given tensors of their own, so that no "
                "gradient can be taken there; choose another site."
            )


def answer_logits(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "batch vocab"]:
    """Run the model; its logits at each prompt's last token."""
    last = torch.tensor(batch.last_columns)
    # A number and not the columns themselves, which accelerate would bring to another device than what they index.
    keep = batch.input_ids.shape[1] - int(last.min())
    logits = model(**batch.inputs(input_device(model)), use_cache=False, logits_to_keep=keep).logits
    return logits[torch.arange(len(last)), last - last.min()]

"""What attribution requires of a model and a metric: logits at the last token, and a usable gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import card_of
from pyvene_ext.engine.measure import METRICS, Metric
from pyvene_ext.engine.plain import answer_logits
from pyvene_ext.models.modes import unembedding_only
from pyvene_ext.prompts.tokenized import Batch
from pyvene_ext.specs.joint import Spec, members

NO_GRADIENT = "no gradient passes through the model, as through some quantised weights; load it without quantisation."
ADDS = ("attention_contribution", "mlp_contribution")  # what a block adds to the residual stream


def check_differentiable(metric: Metric, dtype: torch.dtype, *, first_order: bool = True) -> None:
    """Check that a metric has a usable gradient.

    Args:
        metric: the metric.
        dtype: the model's.
        first_order: the gradient is taken in the untouched run only.

    Raises:
        ValueError: the metric has no useful gradient, or one that float16 rounds to 0.
    """
    why = None if metric.differentiable else f"the gradient of {metric.label!r} is 0 or undefined everywhere"
    if metric.function is METRICS["kl"].function and first_order:
        why = "kl to the base run has no first-order term there; only integrated gradients of several steps measure it"
    if why is not None:
        others = [
            name
            for name, it in METRICS.items()
            if it.differentiable and not (it.per_token or it.of_answers) and name != "kl"
        ]
        raise ValueError(f"{why}: choose among {', '.join(others)}, or another differentiable function.")
    if metric.ids != "answers":
        check_gradient(metric.label, dtype)


def check_gradient(what: str, dtype: torch.dtype) -> None:
    """Check that gradients do not vanish in the model's dtype.

    Args:
        what: what they are of, for the message.
        dtype: the model's.

    Raises:
        ValueError: float16 rounds them to 0.
    """
    if dtype == torch.float16:
        raise ValueError(f"gradients of {what} are too small for float16; load the model in bfloat16 or float32.")


def gradients_at(
    total: Float[Tensor, ""], activations: Sequence[Tensor], *, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """Take gradients of a number at activations.

    Args:
        total: the number.
        activations: tensors of its graph.
        retain_graph: keep the graph for a further call.

    Returns:
        The gradients, in order.

    Raises:
        ValueError: no gradient reaches one of them.
    """
    found = torch.autograd.grad(total, activations, retain_graph=retain_graph, allow_unused=True)
    if any(gradient is None for gradient in found):
        raise ValueError(NO_GRADIENT)
    return found


def check_places(model: PreTrainedModel, specs: Iterable[Spec]) -> None:
    """Check that gradients can be taken at the specs' places.

    Args:
        model: a causal language model with a card.
        specs: single and joint specs.

    Raises:
        ValueError: a spec edits the stream between attention and MLP, and no module of the model receives it whole (OPT).
    """
    card = card_of(model)
    for edit in (edit for spec in specs for edit in members(spec)):
        if edit.site == "resid_mid" and card.is_tap(model, "resid_mid"):
            raise ValueError(
                f"{edit.name}: in {card.family} the MLP and the residual stream beside it receive separate tensors, so that no "
                "gradient can be taken there; choose another site."
            )


def metric_total(
    metric: Metric, model: PreTrainedModel, batch: Batch, clean: Float[Tensor, "batch vocab"] | None = None
) -> Float[Tensor, ""]:
    """Run the model on a batch and sum the metric over its prompts, to take gradients of.

    Only the logits that the metric reads are computed.

    Args:
        metric: the metric.
        model: a causal language model.
        batch: the prompts.
        clean: logits of the untouched run; by default this run is that.

    Returns:
        The sum.

    Raises:
        ValueError: the metric has no gradient.
    """
    ids, narrowed = (None, batch) if "clean" in metric.needs else metric.narrowed(batch)
    with ExitStack() as stack:
        narrow = ids is not None and stack.enter_context(unembedding_only(model, ids))
        logits = answer_logits(model, batch)
    if not logits.requires_grad:
        raise ValueError(NO_GRADIENT)
    if narrow:
        total = metric.of_columns(logits, narrowed.to(logits.device)).sum()
    else:
        total = metric(logits, metric.with_clean(batch, logits.detach() if clean is None else clean)).sum()
    if not total.requires_grad:
        raise ValueError(
            f"metric {metric.label!r} has no gradient, because it returns numbers that no longer depend on the logits for torch "
            "(such as an argmax, a comparison, or after detach); use sweep, or a differentiable function."
        )
    return total

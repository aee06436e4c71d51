"""A metric as the engines see it: a function, which logits it reads, what it needs, and its checks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import n_positions
from pyvene_ext.engine import metrics
from pyvene_ext.io.errors import counted, did_you_mean
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.prompts.encoding import AnswerTokens, same_first_token
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts, check_tokenized

Need = Literal["right", "wrong", "clean"]
_FIRST_ONLY = "reads first tokens only"


def _checked_ids(ids: Any, label: str) -> tuple[int, ...] | Literal["answers"]:
    if isinstance(ids, str) and ids == "answers":
        return "answers"
    listed = np.asarray(ids)
    if listed.ndim != 1 or not listed.size or listed.dtype.kind not in "iu" or listed.min() < 0:
        raise ValueError(f'ids of metric {label!r} must be one or more token ids, or "answers", not {ids!r}.')
    return tuple(listed.tolist())


@dataclass(frozen=True)
class Metric:
    """A metric of one's own, wherever a name such as "logit_diff" is taken; a bare function is `Metric(function)`.

        months = tokenizer.convert_tokens_to_ids(["ĠMay", "ĠJune"])
        Metric(lambda logits, prompts: logits.softmax(-1)[:, months].sum(-1), name="months")
        Metric(lambda logits, prompts: logits.logsumexp(-1), name="months_logit", ids=months)

    Attributes:
        function: called with logits and the `Batch` of prompts that they belong to, on one device. The logits are those at each
            prompt's last token, `[batch vocab]`, and it returns one number per prompt, `[batch]`. `pyvene_ext.metrics` has some.
        name: names the metric in results; stores (`sweep(..., store=...)`) need one, since they cannot compare functions.
        of_tokens: the function takes the logits at every token, `[batch pos vocab]`, and returns one number for each,
            `[batch pos]`; values at padding are ignored, and NaN is allowed at a prompt's last token only.
        ids: token ids whose logits alone are read, so that long sweeps need not unembed the whole vocabulary: the function gets
            `[batch len(ids)]` in this order. The function sees these logits only: a softmax over them is not a probability over
            the vocabulary. "answers": those of each prompt's answers; `right_ids` and `wrong_ids` are then
            columns of the logits.
        needs: what the function reads besides the prompts' tokens: "right" and "wrong", an answer of each prompt; "clean", the
            logits of the untouched run, as `prompts.clean_logits`.
        per_token: the function takes the logits at the last token and returns one number for each token of the prompt.
        of_answers: the function takes the log-probability of each prompt's right answers and that of its wrong ones instead,
            whole and teacher-forced, as `pyvene_ext.metrics.answer_logprob` does.
        differentiable: it has a gradient, and so can serve attribution.
    """

    function: Callable[..., Tensor]
    name: str | None = None
    of_tokens: bool = False
    ids: Sequence[int] | Literal["answers"] | None = None
    needs: tuple[Need, ...] = ()
    per_token: bool = False
    of_answers: bool = False
    differentiable: bool = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(
                f"a metric is a function (logits, prompts), one of the names {', '.join(METRICS)}, or a Metric, not "
                f"{self.function!r}."
            )
        if not isinstance(self.name, str | None):
            raise ValueError(f"the name of a metric is a string, not {self.name!r}.")
        try:
            inspect.signature(self.function).bind(None, None)
        except TypeError:
            raise ValueError(
                f"metric {self.label!r} must take two arguments, (logits, prompts), and no others without a default."
            ) from None
        except ValueError:  # a function written in C has no signature
            pass
        for need in self.needs:
            if need not in get_args(Need):
                raise ValueError(
                    f"metric {self.label!r} cannot need {need!r}; needs is a tuple of {', '.join(get_args(Need))}."
                )
        object.__setattr__(self, "per_token", self.per_token or self.of_tokens)
        if self.ids is not None:
            object.__setattr__(self, "ids", _checked_ids(self.ids, self.label))

    @property
    def label(self) -> str:
        """Its name in results and messages: the one given, else the function's."""
        return self.name or str(getattr(self.function, "__name__", type(self.function).__name__))

    @property
    def answers_needed(self) -> list[str]:
        """The sides, right and wrong, of which it needs an answer."""
        return [side for side in AnswerTokens._fields if side in self.needs]

    def facts(self) -> dict[str, Any]:
        """What a store remembers of the metric.

        Returns:
            Its name; for a metric of one's own also what it reads.

        Raises:
            ValueError: it has no name.
        """
        if self.name is None:
            raise ValueError(
                f"metric {self.label!r} has no name by which a store could tell it from another function; give "
                'Metric(function, name="...").'
            )
        if METRICS.get(self.name) == self:
            return {"metric": self.name}
        return {
            "metric": self.name,
            "metric reads": data_hash([self.ids, self.of_tokens, self.per_token, self.of_answers]),
        }

    def __call__(self, logits: Float[Tensor, "batch *pos vocab"], batch: Batch) -> Float[Tensor, " batch *pos"]:
        """Compute the metric from logits of the whole vocabulary.

        Args:
            logits: at the prompts' last tokens; at every token if `of_tokens`.
            batch: the prompts; with the logits of the untouched run, if they are needed (`with_clean`).

        Returns:
            One number per prompt, or per token of the padded batch, in float32.

        Raises:
            ValueError: the function returns another shape, or NaN.
        """
        batch = batch.to(logits.device)
        ids, batch = self.narrowed(batch)
        if ids is not None:
            logits = _columns(logits, ids)
            if batch.clean_logits is not None:
                batch = replace(batch, clean_logits=_columns(batch.clean_logits, ids))
        return self.of_columns(logits, batch)

    def narrowed(self, batch: Batch) -> tuple[Int[Tensor, "*batch k"] | None, Batch]:
        """The ids whose logits are read, and the batch in which answers are columns of these logits.

        Args:
            batch: the prompts.

        Returns:
            The ids of all prompts, `k`, or of each, `batch k`; None for the whole vocabulary.
        """
        if self.ids is None:
            return None, batch
        device = batch.input_ids.device
        if self.ids != "answers":
            return torch.tensor(self.ids, device=device), batch
        ids = torch.cat([batch.right_ids, batch.wrong_ids], 1)
        columns = torch.arange(ids.shape[1], device=device).expand_as(ids).where(ids >= 0, -1)
        right, wrong = columns.tensor_split([batch.right_ids.shape[1]], 1)
        return ids.clamp(min=0), replace(batch, right_ids=right, wrong_ids=wrong)

    def of_columns(self, logits: Float[Tensor, "batch *pos k"], batch: Batch) -> Float[Tensor, " batch *pos"]:
        """Compute the metric from the logits that it reads.

        Args:
            logits: of the ids of `narrowed`.
            batch: that of `narrowed`.

        Returns:
            As when called with logits of the whole vocabulary.

        Raises:
            ValueError: as when called with logits of the whole vocabulary.
        """
        try:
            values = self.function(logits, batch)
        except IndexError as error:
            read = "[batch pos vocab] at every token" if self.of_tokens else "[batch vocab] at each prompt's last token"
            read = read if self.ids is None else f"{read}, with columns for `ids` only in place of the vocabulary"
            more = "" if self.of_tokens else "; Metric(..., of_tokens=True) is given those at every token"
            raise ValueError(
                f"metric {self.label!r} indexes logits that are not there ({error}): they are "
                f"{tuple(logits.shape)}, {read}{more}."
            ) from error
        shape = tuple(batch.input_ids.shape) if self.per_token else (len(batch.index),)
        if not isinstance(values, Tensor) or values.shape != shape:
            returned = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            wanted = f"token, [batch pos] = {shape}" if self.per_token else "prompt, [batch]"
            raise ValueError(
                f"metric {self.label!r} returned {returned} for {len(batch.index)} prompts; return one number per {wanted}."
            )
        if values.is_complex():
            raise ValueError(f"metric {self.label!r} returned complex numbers; return real ones, such as their abs().")
        values = values.float()
        bad = ~values.detach().isfinite()
        if self.per_token:
            real = batch.attention_mask.clone()
            real[torch.arange(len(real)), batch.last_columns] = 0  # nothing follows the last token
            bad &= real.to(bad.device) != 0
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"metric {self.label!r} is {float(values[row][bad[row]].flatten()[0])} for prompt {batch.index[row]}; it must "
                "return finite numbers."
            )
        return values

    def with_clean(self, batch: Batch, clean: Tensor | None) -> Batch:
        """The batch with the logits of the untouched run, if the function needs them."""
        return replace(batch, clean_logits=clean) if "clean" in self.needs else batch


MetricLike = str | Metric | Callable[..., Tensor]  # what arguments called `metric` take


def as_array(values: Float[Tensor, " *shape"]) -> Float32[np.ndarray, " *shape"]:
    """A metric's values as they are kept in results."""
    return values.float().cpu().numpy()


METRICS: dict[str, Metric] = {
    metric.label: metric
    for metric in (
        Metric(metrics.logit_diff, "logit_diff", ids="answers", needs=("right", "wrong")),
        Metric(metrics.probability, "probability", needs=("right",)),
        Metric(metrics.rank, "rank", needs=("right",), differentiable=False),
        Metric(metrics.accuracy, "accuracy", needs=("right",), differentiable=False),
        Metric(metrics.kl, "kl", needs=("clean",)),
        Metric(metrics.logit, "logit", ids="answers", needs=("right",)),
        Metric(metrics.answer_logprob, "answer_logprob", of_answers=True, needs=("right",)),
        Metric(metrics.answer_logprob_diff, "answer_logprob_diff", of_answers=True, needs=("right", "wrong")),
        Metric(metrics.token_probabilities, "token_probabilities", per_token=True),
        Metric(metrics.next_token_loss, "next_token_loss", of_tokens=True),
        Metric(metrics.entropy, "entropy", of_tokens=True),
        Metric(metrics.token_kl, "token_kl", of_tokens=True, needs=("clean",)),
    )
}


def as_metric(metric: MetricLike) -> Metric:
    """Look up a metric by its name, or take a function as one.

    Args:
        metric: a name, a function (logits, prompts), or a `Metric`. A function of `pyvene_ext.metrics` is the metric of its name.

    Returns:
        The metric.

    Raises:
        ValueError: an unknown name, something else, or a `Metric` with the name of another one.
    """
    if isinstance(metric, str):
        if metric in METRICS:
            return METRICS[metric]
        raise ValueError(f"unknown metric {metric!r}; {did_you_mean(metric, METRICS)}")
    if not isinstance(metric, Metric):
        own = [known for known in METRICS.values() if known.function is metric]
        return own[0] if own else Metric(metric)
    if METRICS.get(metric.name or "", metric).function is not metric.function:
        raise ValueError(f"{metric.name} is the name of a metric of this package; give yours another one.")
    return metric


def check_metric(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    metric: MetricLike,
    *,
    per_token: bool = False,
    of_answers: bool = False,
) -> Metric:
    """Check that a metric can be read on these prompts.

    Args:
        model: the model that is run.
        prompts: the prompts that it is read on.
        metric: a name, a function, or a `Metric`.
        per_token: allow metrics with one number per token.
        of_answers: allow metrics of whole answers.

    Returns:
        The metric.

    Raises:
        ValueError: the metric is unknown or not allowed, the prompts do not fit it or the model, or the model has no logits.
    """
    metric = as_metric(metric)
    if (metric.per_token and not per_token) or (metric.of_answers and not of_answers):
        what = "is one number per token" if metric.per_token else "reads whole answers"
        others = [
            name
            for name, other in METRICS.items()
            if (per_token or not other.per_token) and (of_answers or not other.of_answers)
        ]
        raise ValueError(f"{metric.label} {what}; here choose among {', '.join(others)}.")
    check_tokenized(model, prompts)
    lengths = sorted(map(len, prompts.input_ids))
    if metric.per_token and not metric.of_tokens and lengths and lengths[0] < lengths[-1]:
        raise ValueError(
            f"{metric.label} has one number per token, so all prompts must have the same length, not {lengths[0]} to "
            f"{lengths[-1]} tokens; run each length separately."
        )
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no logits over a vocabulary; load the model as a causal language model."
        )
    n_vocab = head.weight.shape[0]
    if isinstance(metric.ids, tuple) and max(metric.ids) >= n_vocab:
        raise ValueError(
            f"metric {metric.label!r} reads the id {max(metric.ids)} but the vocabulary has {n_vocab} tokens; use the model's "
            "own tokenizer."
        )
    wanted = metric.answers_needed
    if wanted:
        _check_answers(model, prompts, metric, wanted, n_vocab)
    _check_prompts_apart(metric, prompts, n_vocab)
    if said := first_tokens_note(metric, prompts, of_answers=of_answers):
        warnings.warn(f"{said}.", stacklevel=3)
    return metric


def _check_prompts_apart(metric: Metric, prompts: TokenizedPrompts, n_vocab: int) -> None:
    """Raise ValueError if a function of the user's gives a prompt another number beside a second one than alone.

    The logits are random, so that the model need not run. What else is wrong with a function shows when it is run on real ones.
    """
    if METRICS.get(metric.name or "") is metric or len(prompts) < 2:
        return
    (batch,) = prompts.take([0, 1]).batches(2)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    length = (batch.input_ids.shape[1],) if metric.of_tokens else ()
    try:
        if metric.of_answers:
            right, wrong = -random(2).exp(), -random(2).exp()
            both = metric.function(right, wrong)
            alone = [metric.function(right[[row]], wrong[[row]]) for row in (0, 1)]
        else:
            logits = random(2, *length, n_vocab)
            batch = metric.with_clean(batch, random(2, *length, n_vocab))
            both, alone = metric(logits, batch), [metric(logits[[row]], batch.take([row])) for row in (0, 1)]
        same = torch.allclose(both.detach().float(), torch.cat(alone).detach().float(), 1e-3, 1e-4, equal_nan=True)
    except Exception:  # whatever a function of the user's raises on logits that no model gives
        return
    if not same:
        raise ValueError(
            f"metric {metric.label!r} gives a prompt another number beside a second prompt than alone, so that results would "
            "depend on batches; compute each prompt's number from its own row of logits."
        )


def first_tokens_note(metric: Metric, prompts: TokenizedPrompts, *, of_answers: bool = True) -> str:
    """Say of how many prompts a metric reads only the first tokens of longer answers.

    Args:
        metric: the metric.
        prompts: the prompts that it is read on.
        of_answers: name the metric that reads whole answers.

    Returns:
        A clause without a full stop; empty if the metric reads no answers, or reads them whole.
    """
    sides = [] if metric.of_answers else metric.answers_needed
    several = sum(any(len(one) > 1 for side in sides for one in getattr(own, side)) for own in prompts.answers)
    if not several:
        return ""
    whole = "answer_logprob_diff" if "wrong" in sides else "answer_logprob"
    hint = f"; metric={whole!r} reads them whole" if of_answers else "; answers='first_difference' tells them apart"
    return f"{metric.label} {_FIRST_ONLY}: the answers of {several} of {counted(len(prompts), 'prompt')} have several{hint}"


@contextmanager
def first_tokens_said() -> Iterator[None]:
    """Do not warn again of first tokens, in a call that has done so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".* {_FIRST_ONLY}")
        yield


def _check_answers(
    model: PreTrainedModel, prompts: TokenizedPrompts, metric: Metric, wanted: list[str], n_vocab: int
) -> None:
    context = n_positions(model.config)
    for prompt, answers in enumerate(prompts.answers):
        for which in wanted:
            if not getattr(answers, which):
                raise ValueError(
                    f"prompt {prompt} has no {which} answer, which {metric.label} needs; give it one, or choose another metric."
                )
        right, wrong = ({tokens[: None if metric.of_answers else 1] for tokens in some} for some in answers)
        ids = sorted(id for tokens in right | wrong for id in tokens)
        if not 0 <= ids[0] <= ids[-1] < n_vocab:
            raise ValueError(
                f"the answers of prompt {prompt} have ids from {ids[0]} to {ids[-1]} but the vocabulary has {n_vocab} tokens; "
                "use the model's own tokenizer."
            )
        if same := right & wrong:
            if not metric.of_answers:
                raise same_first_token(prompt, min(same)[0])
            raise ValueError(f"the answers of prompt {prompt} are right and wrong at once; use other answers.")
        length = len(prompts.input_ids[prompt]) + max(map(len, right | wrong)) - 1
        if length > context:
            raise ValueError(
                f"prompt {prompt} has {length} tokens with its longest answer but the model takes {context}; shorten it."
            )


def _columns(logits: Float[Tensor, "batch *pos vocab"], ids: Int[Tensor, "*batch k"]) -> Float[Tensor, "batch *pos k"]:
    if ids.ndim == 1:
        return logits[..., ids]
    ids = ids.view(len(ids), *[1] * (logits.ndim - 2), -1)
    return logits.gather(-1, ids.expand(*logits.shape[:-1], -1))

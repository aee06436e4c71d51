"""Continuous thoughts: models that reason in hidden states instead of words, as ordinary models with ordinary positions.

A prompt of such a model (CODI, Shen et al. 2025, arXiv 2502.21074; without projection: Coconut, Hao et al. 2024) is the question,
the tokens `opening` (the last of them begins the thought), some latent steps, and the tokens `closing`, after which the model
writes its answer. The embedding of a latent step is the last hidden state (after the final norm) of the position before it,
through a projection. Here a latent step is a placeholder token in the prompt, so it is a position like any other: it can be
named, ablated, noised, forced, and its activations read.

`attach` turns a causal language model into such a model. Given placeholders, the decoder first runs once for each latent step and
then once for the output: the first run yields the state at the end of `opening`, which is the embedding of the first latent step,
and so on. Later positions never change earlier ones, so this is exactly what stepping with a cache gives. Interventions are hooks
on the decoder's modules. They act in each of these runs, at the same positions and with the same values, so every thought after
an intervention is recomputed under it. Code that only reads activations waits for the last run (`is_unrolling`).

A folder of such a model is an ordinary transformers folder (config.json, model.safetensors, tokenizer) with two additions, which
`save` writes and `load_model` reads: `continuous_thought` in config.json, the fields of `Format`; and projection.safetensors,
with 1.weight, 1.bias (d_model to any width), 3.weight, 3.bias (back), and if a layer norm follows ln.weight, ln.bias.
`pyvene_ext.models.codi` writes one from a checkpoint of CODI's own training code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

PROJECTION = "projection.safetensors"
FIELD = "continuous_thought"


class Format(BaseModel):
    """The prompt format of a model with continuous thoughts.

    Attributes:
        opening: tokens between the question and the latent steps; the last one begins the thought.
        latent: the placeholder token of a latent step. Its own embedding is never used.
        closing: tokens after the latent steps.
        steps: the number of latent steps.
        template: the question's template, with `{question}` in it once.
        projection: whether hidden states are projected before they become embeddings; else they are used unchanged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    opening: tuple[int, ...] = Field(min_length=1)
    latent: int = Field(ge=0)
    closing: tuple[int, ...] = Field(min_length=1)
    steps: int = Field(default=6, ge=1)
    template: str = "{question}"
    projection: bool = True

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens after the question."""
        return (*self.opening, *(self.latent,) * self.steps, *self.closing)


def format_of(model: nn.Module) -> Format | None:
    """The prompt format of a model with continuous thoughts.

    Args:
        model: any model.

    Returns:
        Its format, or None for an ordinary model.
    """
    steps = getattr(model, "latent_steps", None)
    return steps.format if isinstance(steps, LatentSteps) else None


def is_unrolling(model: nn.Module) -> bool:
    """Whether the decoder is running only to compute a latent step's embedding; hooks that read skip such a run.

    Args:
        model: any model.

    Returns:
        False for an ordinary model.
    """
    steps = getattr(model, "latent_steps", None)
    return isinstance(steps, LatentSteps) and steps.is_unrolling


def refuse_latent_steps(model: nn.Module, prompts: Iterable[Sequence[int]]) -> None:
    """Refuse prompts with latent steps, for methods that run some layers only or need the gradients of a single run.

    Args:
        model: the model.
        prompts: the token ids of each prompt.

    Raises:
        ValueError: a prompt has a latent step.
    """
    form = format_of(model)
    if form is not None and any(form.latent in ids for ids in prompts):
        raise ValueError(
            "these prompts have latent steps, each of which depends on the ones before it; only pyvene_ext.run and "
            "pyvene_ext.methods.solving.evaluate compute that, so use one of them."
        )


class LatentSteps(nn.Module):
    """The projection and the hooks of a model's latent steps: around the decoder and after the token embeddings."""

    def __init__(self, form: Format, projection: nn.Module) -> None:
        """Start with no latent step computed."""
        super().__init__()
        self.format, self.projection = form, projection
        self.is_unrolling = False
        self._known: list[tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, "n d_model"]]] = []

    def unroll(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Compute the embeddings of a batch's latent steps, one step after the other."""
        self._known = []
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None or not (placed := ids == self.format.latent).any():
            return
        cache = kwargs.get("past_key_values")
        if placed[:, 0].any() or (cache is not None and cache.get_seq_length()):
            raise ValueError(
                "a latent step follows from the token before it, which this forward pass does not have; pass the prompt from its "
                "first token to its last latent step in one call."
            )
        number = placed.cumsum(-1) * placed
        draft = {
            **kwargs,
            "past_key_values": None,
            "use_cache": False,
            "output_hidden_states": False,
            "return_dict": True,
        }
        self.is_unrolling = True
        try:
            for step in range(1, int(number.max()) + 1):
                # This skips the decoder's own hooks (this one among them) but runs those of all its modules.
                states = decoder.forward(*args, **draft).last_hidden_state
                rows, columns = (number == step).nonzero(as_tuple=True)
                self._known.append((rows, columns, self.projection(states[rows, columns - 1])))
        finally:
            self.is_unrolling = False

    def forget(self, *_: Any) -> None:
        """Drop the embeddings, once the decoder has run."""
        self._known = []

    def fill(self, embeddings: nn.Module, args: tuple, output: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
        """Replace the embeddings of placeholders by those computed so far."""
        if not self._known:
            return None
        filled = output.clone()
        for rows, columns, thoughts in self._known:
            filled[rows.to(output.device), columns.to(output.device)] = thoughts.to(output)
        return filled


def projection(d_model: int, width: int, norm: bool = True) -> nn.Sequential:
    """Build CODI's projection, its parts named as in its checkpoints.

    Args:
        d_model: width of the residual stream.
        width: width of the hidden layer.
        norm: end with a layer norm.

    Returns:
        A randomly initialised projection from d_model to d_model.
    """
    parts: list[tuple[str, nn.Module]] = [
        ("1", nn.Linear(d_model, width)),
        ("2", nn.GELU()),
        ("3", nn.Linear(width, d_model)),
    ]
    return nn.Sequential(OrderedDict(parts + [("ln", nn.LayerNorm(d_model))] * norm))


def attach(model: PreTrainedModel, form: Format, how: nn.Module | None = None) -> None:
    """Give a causal language model latent steps, in place.

    From then on generation that heeds `generation_config.suppress_tokens` never writes the tokens of the format.

    Args:
        model: a causal language model.
        form: the prompt format; its tokens must be in the model's vocabulary.
        how: the projection from d_model to d_model, moved to the model's device and dtype; None uses hidden states unchanged.

    Raises:
        ValueError: the model has latent steps already, or the format does not fit it.
    """
    embeddings: Any = model.get_input_embeddings()
    special = {*form.opening[-1:], form.latent, *form.closing[:1]}
    if hasattr(model, "latent_steps"):
        raise ValueError("this model has latent steps already; load it again.")
    if max(*form.tokens) >= len(embeddings.weight):
        raise ValueError(
            f"the continuous thought has token {max(form.tokens)} but the model embeds {len(embeddings.weight)} tokens; use the "
            "checkpoint that belongs to it."
        )
    if form.latent in (*form.opening, *form.closing) or form.template.count("{question}") != 1:
        raise ValueError(
            "in a continuous thought the latent token stands for latent steps alone and the template has {question} once; "
            "correct the format."
        )
    if form.projection == (how is None):
        raise ValueError("give a projection exactly if the format has one.")
    steps = LatentSteps(form, (how or nn.Identity()).to(embeddings.weight.device, embeddings.weight.dtype))
    model.latent_steps = steps.train(model.training)
    setattr(model.config, FIELD, form.model_dump(mode="json"))
    if model.generation_config is not None:
        model.generation_config.suppress_tokens = sorted(special)
    model.base_model.register_forward_pre_hook(steps.unroll, with_kwargs=True)
    model.base_model.register_forward_hook(steps.forget, always_call=True)
    embeddings.register_forward_hook(steps.fill)


# -- files -------------------------------------------------------------------------------------------------------------


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a model with latent steps to a folder that `load_model` reads.

    Args:
        model: a model with latent steps.
        tokenizer: its tokenizer.
        folder: the output folder.

    Raises:
        ValueError: the model has no latent steps.
    """
    form = format_of(model)
    if form is None:
        raise ValueError("this model has no latent steps; save it with save_pretrained.")
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("latent_steps.")}
    model.save_pretrained(folder, state_dict=own)
    tokenizer.save_pretrained(folder)
    if form.projection:
        steps: Any = model.latent_steps
        save_file(steps.projection.state_dict(), Path(folder) / PROJECTION)


def restore(model: PreTrainedModel, name: str, source: str, revision: str | None = None) -> None:
    """Attach the latent steps that a loaded model's config and files describe, if they describe any.

    Args:
        model: the loaded model.
        name: what messages call it.
        source: its folder or its repository on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: the format or projection is missing, broken or another model's.
    """
    described = getattr(model.config, FIELD, None)
    if described is None:
        return
    try:
        form = Format.model_validate(described)
        how = read_projection(source, revision, model.config.hidden_size) if form.projection else None
        attach(model, form, how)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, (FIELD, *wrong["loc"])))
        raise ValueError(f"{name}: {place} in config.json cannot be used ({wrong['msg']}).") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_projection(source: str, revision: str | None, d_model: int) -> nn.Module:
    """Read the projection from a folder or the hub."""
    try:
        path = cached_file(source, PROJECTION, revision=revision)
        state = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{PROJECTION} beside config.json cannot be read ({str(error).split(chr(10))[0]}).") from None
    return projection_from(state, d_model)


def projection_from(state: dict[str, Tensor], d_model: int) -> nn.Module:
    """Build a projection from its weights.

    Args:
        state: the weights, named as in CODI's checkpoints.
        d_model: width of the residual stream.

    Returns:
        The projection, in float32.

    Raises:
        ValueError: a weight is missing, surplus, or of another shape.
    """
    first = state.get("1.weight")
    built = projection(
        d_model, len(first) if first is not None and first.ndim else 1, any("ln" in name for name in state)
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    if wanted != (found := {name: tuple(tensor.shape) for name, tensor in state.items()}):
        raise ValueError(f"a projection has the weights {wanted}, not {found}; get the checkpoint's own projection.")
    built.load_state_dict(state)
    return built

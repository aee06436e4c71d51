"""Continuous thoughts: models that reason in hidden states instead of words, as ordinary models with ordinary positions.

A prompt of such a model (CODI, Shen et al. 2025, arXiv 2502.21074; without projection: Coconut, Hao et al. 2024) is the question,
the tokens `opening` (the last of them begins the thought), some latent steps, and the tokens `closing`, behind which it writes
its answer. What enters the network at a latent step is the last hidden state (behind the final norm) of the position before,
through a projection. Here a latent step is a placeholder token in the prompt, so it is a position as any other: it can be named,
ablated, noised, forced, and its activations read.

`attach` makes a causal language model such a model. Whenever the decoder is given placeholders it runs once for each step before
it runs for good: the first run gives the state behind `opening`, hence what enters at the first step, and so on; later positions
never change earlier ones, so this is exactly what stepping with a cache gives. Interventions hang on the decoder's modules. They
stand in every one of these runs, at the same positions and with the same values, so a thought that comes behind an intervention
is what the model then thinks. Whoever only reads waits for the last run (`is_unrolling`).

A folder of such a model is an ordinary one of transformers (config.json, model.safetensors, tokenizer) with two things more,
which `save` writes and `load_model` reads: `continuous_thought` in config.json, the fields of `Format`; and
projection.safetensors, with 1.weight, 1.bias (d_model to any width), 3.weight, 3.bias (back), and where a layer norm follows
ln.weight, ln.bias. `pyvene_ext.models.codi` makes one from a checkpoint of CODI's own training code.
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
    """How a model is asked.

    Attributes:
        opening: tokens between the question and the latent steps; the last one begins the thought.
        latent: the token that stands for a latent step. Its embedding is never used.
        closing: tokens behind the latent steps.
        steps: how many latent steps there are.
        template: of the question, a text with `{question}` in it once.
        projection: whether states are projected before they enter; else they enter as they are.
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
        """What stands behind the question."""
        return (*self.opening, *(self.latent,) * self.steps, *self.closing)


def format_of(model: nn.Module) -> Format | None:
    """How this model is asked, if it is one of continuous thoughts."""
    steps = getattr(model, "latent_steps", None)
    return steps.format if isinstance(steps, LatentSteps) else None


def is_unrolling(model: nn.Module) -> bool:
    """Whether the decoder runs only to find out what enters at a latent step; what it holds then is not yet to be read."""
    steps = getattr(model, "latent_steps", None)
    return isinstance(steps, LatentSteps) and steps.is_unrolling


def refuse_latent_steps(model: nn.Module, prompts: Iterable[Sequence[int]]) -> None:
    """Raise ValueError for prompts with latent steps: for what runs a few layers at a time, or asks for one run's gradients."""
    form = format_of(model)
    if form is not None and any(form.latent in ids for ids in prompts):
        raise ValueError(
            "these prompts have latent steps, and what happens at one of them changes what enters at the next; only "
            "pyvene_ext.run and pyvene_ext.methods.reasoning.evaluate compute that."
        )


class LatentSteps(nn.Module):
    """The projection, and two hooks: before the decoder runs, and behind the token embeddings."""

    def __init__(self, form: Format, projection: nn.Module) -> None:
        super().__init__()
        self.format, self.projection = form, projection
        self.is_unrolling = False
        self._known: list[tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, "n d_model"]]] = []

    def unroll(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find out what enters at the latent steps of a batch, one step after the other."""
        self._known = []
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None or not (placed := ids == self.format.latent).any():
            return
        cache = kwargs.get("past_key_values")
        if placed[:, 0].any() or (cache is not None and cache.get_seq_length()):
            raise ValueError(
                "a latent step follows from the token before it, which this forward pass does not have; give the prompt from its "
                "first token to its last latent step at once."
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
                # Not the decoder's own hooks, this one among them, but those of all its modules.
                states = decoder.forward(*args, **draft).last_hidden_state
                rows, columns = (number == step).nonzero(as_tuple=True)
                self._known.append((rows, columns, self.projection(states[rows, columns - 1])))
        finally:
            self.is_unrolling = False

    def forget(self, *_: Any) -> None:
        """After the decoder has run."""
        self._known = []

    def fill(self, embeddings: nn.Module, args: tuple, output: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
        """Put what is known in the place of placeholders."""
        if not self._known:
            return None
        filled = output.clone()
        for rows, columns, thoughts in self._known:
            filled[rows.to(output.device), columns.to(output.device)] = thoughts.to(output)
        return filled


def projection(d_model: int, width: int, norm: bool = True) -> nn.Sequential:
    """CODI's projection, its parts named as in its checkpoints."""
    parts: list[tuple[str, nn.Module]] = [
        ("1", nn.Linear(d_model, width)),
        ("2", nn.GELU()),
        ("3", nn.Linear(width, d_model)),
    ]
    return nn.Sequential(OrderedDict(parts + [("ln", nn.LayerNorm(d_model))] * norm))


def attach(model: PreTrainedModel, form: Format, how: nn.Module | None = None) -> None:
    """Make a causal language model one of continuous thoughts, in place.

    Args:
        how: the projection; None: states enter as they are. It is moved to the model's device and dtype.

    The tokens of the format are from then on never written by generation that heeds `generation_config.suppress_tokens`.

    Raises:
        ValueError: the model is one already, or the format does not fit it.
    """
    embeddings: Any = model.get_input_embeddings()
    special = {*form.opening[-1:], form.latent, *form.closing[:1]}
    if hasattr(model, "latent_steps"):
        raise ValueError("this model has latent steps already; load it again.")
    if max(*form.tokens) >= len(embeddings.weight):
        raise ValueError(
            f"the continuous thought has token {max(form.tokens)} and the model embeds {len(embeddings.weight)}; use the "
            "checkpoint that belongs to it."
        )
    if form.latent in (*form.opening, *form.closing) or form.template.count("{question}") != 1:
        raise ValueError(
            "in a continuous thought the latent token stands for latent steps alone, and the template holds {question} once."
        )
    if form.projection == (how is None):
        raise ValueError("a projection must be given exactly if the format has one.")
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
    """Write a model with latent steps as a folder that `load_model` takes."""
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
    """Attach the latent steps that a loaded model's config and files speak of; nothing where there are none.

    Raises:
        ValueError: a format or projection that is missing, broken or of another model.
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
    """The projection in a folder or on the hub."""
    try:
        path = cached_file(source, PROJECTION, revision=revision)
        state = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{PROJECTION} beside config.json cannot be read ({str(error).split(chr(10))[0]}).") from None
    return projection_from(state, d_model)


def projection_from(state: dict[str, Tensor], d_model: int) -> nn.Module:
    """A projection with these weights; ValueError if they are none."""
    first = state.get("1.weight")
    made = projection(
        d_model, len(first) if first is not None and first.ndim else 1, any("ln" in name for name in state)
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    if wanted != (found := {name: tuple(tensor.shape) for name, tensor in state.items()}):
        raise ValueError(f"a projection has the weights {wanted}, and not {found}.")
    made.load_state_dict(state)
    return made

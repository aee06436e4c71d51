"""What specs mean on given prompts, found and checked once: token places, source prompts, and what must be measured on them.

Both engines, patching and attribution take a `Resolved`. Nothing after `resolve` raises for what a user wrote.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from pyvene_ext.intervenable.statistics import Reference, check_reference_prompts
from pyvene_ext.prompts.positions import Positions, token_indices
from pyvene_ext.prompts.tokenized import TokenizedPrompts, check_tokenized
from pyvene_ext.specs.base import ModelShape
from pyvene_ext.specs.joint import OneSpec, Spec, as_specs, members, needs, spec_name
from pyvene_ext.specs.sources import Directions, Needs, Recorded, Sources


@dataclass(frozen=True)
class Resolved:
    """Specs on prompts, all of them in order.

    Attributes:
        specs: what is done, each by itself.
        sources: the model, the prompts, and what replacements are computed from.
        tokens: for each choice of positions and each prompt, the tokens it names, counted from the prompt's first.
    """

    specs: tuple[Spec, ...]
    sources: Sources
    tokens: Mapping[Positions, tuple[tuple[int, ...], ...]]

    @property
    def model(self) -> PreTrainedModel:
        """The model that is intervened on."""
        return self.sources.model

    @property
    def prompts(self) -> TokenizedPrompts:
        """The prompts that are intervened on."""
        return self.sources.prompts

    @property
    def names(self) -> tuple[str, ...]:
        """Of the specs."""
        return tuple(map(spec_name, self.specs))

    @property
    def needs(self) -> Needs:
        """What must be measured on the reference set or the source prompts."""
        return needs(self.specs)

    def select(self, numbers: Iterable[int]) -> Resolved:
        """Some of the specs, in this order."""
        return replace(self, specs=tuple(self.specs[number] for number in numbers))

    def with_directions(self, directions: Directions) -> Resolved:
        """The same with concept directions for patches along one."""
        return replace(self, sources=replace(self.sources, directions=directions))

    def with_statistics(self, *, batch_size: int = 8, cache_dir: str | Path | None = None, progress: bool = True) -> Resolved:
        """The same with the statistics that the specs need, computed (or read from the cache) unless they are there."""
        wanted = self.needs
        if not wanted.places or self.sources.reference is not None:
            return self
        given = self.prompts if self.sources.source_prompts is None else self.sources.source_prompts
        reference = Reference.compute(
            self.model, given, **wanted._asdict(), batch_size=batch_size, cache_dir=cache_dir, progress=progress
        )
        return replace(self, sources=replace(self.sources, reference=reference))

    def replacements(self, edit: OneSpec, prompts: Sequence[int]) -> list[Tensor] | None:
        """What an edit puts in place at its tokens of some prompts; None where its intervention needs nothing."""
        return edit.replacements(prompts, self.tokens_of(edit, prompts), self.sources)

    def tokens_of(self, edit: OneSpec, prompts: Iterable[int]) -> list[tuple[int, ...]]:
        """The tokens of some prompts that an edit changes, counted from each prompt's first."""
        tokens = self.tokens[edit.positions]
        return [tokens[prompt] for prompt in prompts]


def resolve(
    specs: OneSpec | Iterable[Spec],
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    given: TokenizedPrompts | None = None,
    *,
    reference: Reference | None = None,
    directions: Directions | None = None,
    recorded: Recorded | None = None,
) -> Resolved:
    """Find out what specs mean on prompts; nothing is run.

    Args:
        specs: one edit, or a list of edits and of tuples of them (done together).
        model: a causal language model with a card.
        prompts: what is intervened on.
        given: the reference set of ablations (by default the prompts themselves), or the source prompts of patches.
        reference: statistics of an earlier run, whose prompts are then the given ones.
        directions: of patches along one direction; None where they are found later.
        recorded: of path patching.

    Raises:
        ValueError: for anything that would go wrong in a run: a spec that does not fit the model, the prompts or the reference
            set, pairs that do not correspond, statistics of other weights or without something that is needed.
    """
    resolved = tuple(as_specs(specs))
    given = given if reference is None else reference.prompts
    check_tokenized(model, prompts, *([] if given is None else [given]))
    if not resolved or not prompts.input_ids:
        raise ValueError("nothing to run: give at least one spec and one prompt.")
    sources = Sources(model, prompts, given, reference, directions or {}, recorded)
    edits = [edit for spec in resolved for edit in members(spec)]
    tokens: dict[Positions, tuple[tuple[int, ...], ...]] = {}
    seen: set[tuple[type, Hashable]] = set()
    model_shape = ModelShape.of(model)
    wanted = needs(resolved)
    if wanted.places:
        check_reference_prompts(prompts if given is None else given, wanted.position_means, wanted.bank)
    for edit in edits:
        edit.check(model_shape)
        if edit.positions not in tokens:
            tokens[edit.positions] = tuple(
                tuple(token_indices(prompts, prompt, edit.positions)) for prompt in range(len(prompts))
            )
        if (key := (type(edit), edit.prompt_key)) not in seen:
            seen.add(key)
            edit.check_prompts(prompts, tokens[edit.positions], sources)
    if reference is not None:
        reference.require(**wanted._asdict())
        reference.check_model(model)
    if directions is not None:
        for edit in edits:
            edit.check_directions(directions, model_shape)
    return Resolved(resolved, sources, tokens)

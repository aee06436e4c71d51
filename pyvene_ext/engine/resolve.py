"""What specs mean on given prompts, determined and checked once: edited tokens, source prompts, and the statistics they need.

Both engines, patching and attribution take a `Resolved`. User errors are found in `resolve`; nothing after it raises for them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from pyvene_ext.engine.measure import Metric
from pyvene_ext.engine.sequences import Sequences
from pyvene_ext.intervenable.statistics import Reference, check_reference_prompts
from pyvene_ext.prompts.positions import Positions, token_indices
from pyvene_ext.prompts.tokenized import TokenizedPrompts, check_tokenized
from pyvene_ext.specs.base import ModelShape
from pyvene_ext.specs.joint import OneSpec, Spec, as_specs, members, needs, spec_name
from pyvene_ext.specs.sources import Directions, Needs, Recorded, Sources


def identical_pairs(base: TokenizedPrompts, source: TokenizedPrompts) -> list[int]:
    """The pairs whose two texts are the same tokens."""
    pairs = zip(base.input_ids, source.input_ids, strict=True)
    return [pair for pair, (ids, of_source) in enumerate(pairs) if ids == of_source]


def check_pairs_differ(base: TokenizedPrompts, source: TokenizedPrompts) -> None:
    """Refuse pairs of prompts all of which are the same text twice, where every effect is 0."""
    if len(identical_pairs(base, source)) == len(base):
        raise ValueError(
            "base and source are the same texts, so that no patch changes anything; give the other text of each pair, as with "
            'tokenize(tokenizer, text="corrupt").'
        )


@dataclass(frozen=True)
class Resolved:
    """Specs on prompts, in order.

    Attributes:
        specs: the interventions, each run separately.
        sources: the model, the prompts, and what replacements are computed from.
        tokens: for each choice of positions and each prompt, the tokens that it names, counted from the prompt's first token.
        sequences: what is run, and where it is read; by default the prompts, at their last tokens.
    """

    specs: tuple[Spec, ...]
    sources: Sources
    tokens: Mapping[Positions, tuple[tuple[int, ...], ...]]
    sequences: Sequences

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
        """The specs' names."""
        return tuple(map(spec_name, self.specs))

    @property
    def needs(self) -> Needs:
        """The statistics that the specs need of the reference set or the source prompts."""
        return needs(self.specs)

    def select(self, numbers: Iterable[int]) -> Resolved:
        """Select some of the specs by number, in this order."""
        return replace(self, specs=tuple(self.specs[number] for number in numbers))

    def for_metric(self, metric: Metric) -> Resolved:
        """Return a copy that runs and reads what a metric needs."""
        return replace(self, sequences=Sequences.of_metric(self.prompts, metric))

    def with_directions(self, directions: Directions) -> Resolved:
        """Return a copy with concept directions, for patches with `subspace`."""
        return replace(self, sources=replace(self.sources, directions=directions))

    def with_statistics(
        self, *, batch_size: int = 8, cache_dir: str | Path | None = None, progress: bool = True
    ) -> Resolved:
        """Compute the statistics that the specs need, unless they are there.

        Args:
            batch_size: prompts per forward pass.
            cache_dir: a folder to read them from, or to save them to.
            progress: show a bar.

        Returns:
            A copy with the statistics; itself if there is nothing to compute.
        """
        wanted = self.needs
        if not wanted.places or self.sources.reference is not None:
            return self
        source = self.prompts if self.sources.source_prompts is None else self.sources.source_prompts
        reference = Reference.compute(
            self.model, source, **wanted._asdict(), batch_size=batch_size, cache_dir=cache_dir, progress=progress
        )
        return replace(self, sources=replace(self.sources, reference=reference))

    def replacements(self, edit: OneSpec, sequences: Sequence[int]) -> list[Tensor] | None:
        """Compute an edit's replacements on some sequences.

        Args:
            edit: one of the specs' edits.
            sequences: their indices; those of prompts, unless answers follow them.

        Returns:
            For each of them `pos d` or `pos head d` at its edited tokens; None if the intervention takes no source.
        """
        prompts = [self.sequences.prompt_of[sequence] for sequence in sequences]
        return edit.replacements(prompts, self.tokens_of(edit, sequences), self.sources)

    def tokens_of(self, edit: OneSpec, sequences: Iterable[int]) -> list[tuple[int, ...]]:
        """The edited tokens of some sequences, all of which lie in the prompts.

        Args:
            edit: one of the specs' edits.
            sequences: their indices; those of prompts, unless answers follow them.

        Returns:
            For each of them its edited tokens, counted from its first token.
        """
        tokens = self.tokens[edit.positions]
        return [tokens[self.sequences.prompt_of[sequence]] for sequence in sequences]


def resolve(
    specs: OneSpec | Iterable[Spec],
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    source: TokenizedPrompts | None = None,
    *,
    reference: Reference | None = None,
    directions: Directions | None = None,
    recorded: Recorded | None = None,
) -> Resolved:
    """Determine what specs mean on prompts and check everything; the model is not run.

    Args:
        specs: one edit, or a list of edits and of tuples of them (made jointly).
        model: a causal language model with a card.
        prompts: the prompts that are intervened on.
        source: the reference set of ablations (by default the prompts themselves), or the source prompts of patches.
        reference: statistics of an earlier run; their prompts are then the source.
        directions: concept directions of patches with `subspace`; None if they are computed later.
        recorded: what path patching has recorded at receivers.

    Returns:
        The specs on the prompts, without statistics unless they were given.

    Raises:
        ValueError: for anything that would go wrong in a run: a spec that does not fit the model, the prompts or the reference
            set, pairs that do not correspond, statistics of another model, or statistics that lack something.
    """
    if not isinstance(reference, Reference | None):
        raise ValueError(
            f"reference takes statistics and not {type(reference).__name__}; compute them with "
            "reference_for(model, specs, prompts)."
        )
    if not isinstance(directions, Mapping | None):
        raise ValueError(f"directions are a dict by place and positions, not {type(directions).__name__}.")
    source = source if reference is None else reference.prompts
    check_tokenized(model, prompts, *([] if source is None else [source]))
    resolved = tuple(as_specs(specs))
    if not resolved or not prompts.input_ids:
        raise ValueError("nothing to run: give at least one spec and one prompt.")
    sources = Sources(model, prompts, source, reference, directions or {}, recorded)
    edits = [edit for spec in resolved for edit in members(spec)]
    tokens: dict[Positions, tuple[tuple[int, ...], ...]] = {}
    seen: set[tuple[type, Hashable]] = set()
    model_shape = ModelShape.of(model)
    wanted = needs(resolved)
    if wanted.places:
        check_reference_prompts(prompts if source is None else source, wanted.position_means, wanted.bank)
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
    return Resolved(resolved, sources, tokens, Sequences.of_prompts(prompts))

"""Statistics of activations over a reference set of prompts: mean, standard deviation, mean by position, and rows to resample.

All sites and layers are collected through the model's card in one streaming pass over the prompts, with one batch of activations
in memory at a time, sums in float64 whatever the model's dtype, and padding excluded.
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pyvene import CollectIntervention, IntervenableConfig, RepresentationConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import component_named, dimensions
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.files import atomic_path
from pyvene_ext.io.hashes import data_hash, tensors_hash
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.identity import fingerprint, identity_of
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.positions import Positions, token_indices
from pyvene_ext.prompts.tokenized import TokenizedPrompts, check_tokenized

Place = tuple[str, int | None]
FORMAT = 1  # version of the cache files


def named(place: Place) -> Place:
    """Give a place the name of its site.

    Args:
        place: a site, or pyvene's name of one, and its layer; None for a site without layers.

    Returns:
        Site and layer.

    Raises:
        ValueError: there is no such site.
    """
    site, layer = place
    return component_named(site).site, layer


def label(place: Place) -> str:
    """Label a place.

    Args:
        place: as `named` takes it.

    Returns:
        "z.3", "embed".
    """
    return ".".join(str(part) for part in named(place) if part is not None)


@dataclass(frozen=True)
class Reference:
    """Statistics of a reference set at some places, on the CPU.

    Attributes:
        prompts: the reference set.
        places: the (site, layer) pairs covered, sites named as in `pyvene_ext.specs`.
        position_means: the positions with a mean over prompts; "all" for every token of prompts of equal length.
        bank: the positions whose activations are kept prompt by prompt, in the model's dtype, to resample from.
        model: the model's `identity_of`.
        tensors: the statistics, by "mean/z.3", "std/z.3", "at/z.3/2" (the mean at `position_means[2]`) and "bank/z.3".
    """

    prompts: TokenizedPrompts
    places: tuple[Place, ...]
    position_means: tuple[str | int, ...] = ()
    bank: tuple[str | int, ...] = ()
    model: dict[str, Any] = field(default_factory=dict, repr=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _seen: tuple[Callable[[], PreTrainedModel | None], Any] = field(
        default=(lambda: None, None), repr=False, compare=False
    )

    @classmethod
    def compute(
        cls,
        model: PreTrainedModel,
        prompts: TokenizedPrompts,
        places: Iterable[Place],
        *,
        position_means: Iterable[str | int] = (),
        bank: Iterable[str | int] = (),
        batch_size: int = 8,
        cache_dir: str | Path | None = None,
        progress: bool = False,
    ) -> Reference:
        """Collect the statistics, or read them from a cache.

        Args:
            model: a model whose family has a card.
            prompts: the reference set.
            places: (site, layer) pairs, sites in either vocabulary.
            position_means: positions to average over prompts at; "all" for every token.
            bank: positions to keep activations of.
            batch_size: prompts per forward pass.
            cache_dir: folder of the cache, keyed by the model, prompts and what is asked for; None for no cache. A damaged
                file is recomputed.
            progress: show a progress bar.

        Returns:
            The statistics.

        Raises:
            ValueError: an unknown site, an empty set, a position that some prompt lacks, unequal lengths with "all" in
                `position_means`, or activations that are not finite.
        """
        check_tokenized(model, prompts)
        wanted = cls(prompts, tuple(map(named, places)), tuple(position_means), tuple(bank))
        check_reference_prompts(prompts, wanted.position_means, wanted.bank)
        wanted = replace(wanted, model=identity_of(model), _seen=(weakref.ref(model), fingerprint(model)))
        if cache_dir is None:
            return replace(wanted, tensors=wanted._collect(model, batch_size, progress))
        key = wanted._key()
        path = Path(cache_dir) / f"reference-{data_hash(key)}.safetensors"
        tensors = _read(path, key)
        if tensors is None:
            tensors = wanted._collect(model, batch_size, progress)
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, metadata={"key": _stamp(key, tensors)})
        return replace(wanted, tensors=tensors)

    def mean(self, place: Place) -> Float[Tensor, "*head d"]:
        """Mean over all real tokens of all prompts.

        Args:
            place: site and layer.

        Returns:
            The mean, with a head axis if the site has heads.
        """
        return self.tensors[f"mean/{label(place)}"]

    def std(self, place: Place) -> Float[Tensor, "*head d"]:
        """Population standard deviation of each dimension over all real tokens of all prompts.

        Args:
            place: site and layer.

        Returns:
            The standard deviation, with a head axis if the site has heads.
        """
        return self.tensors[f"std/{label(place)}"]

    def position_mean(self, place: Place, position: str | int) -> Float[Tensor, "pos *head d"]:
        """Mean over prompts at one position.

        Args:
            place: site and layer.
            position: one of `position_means`.

        Returns:
            One row, or one per token for "all".
        """
        return self.tensors[f"at/{label(place)}/{self.position_means.index(position)}"]

    def rows(self, place: Place, prompt: int, positions: Positions) -> Float[Tensor, "pos *head d"]:
        """The activations of one reference prompt.

        Args:
            place: site and layer.
            prompt: the prompt's index in the reference set.
            positions: positions that the bank has.

        Returns:
            One row per token.
        """
        kept = self._bank_rows[prompt]
        tokens = token_indices(self.prompts, prompt, positions)
        return self.tensors[f"bank/{label(place)}"][[kept[token] for token in tokens]]

    def require(self, places: Iterable[Place], position_means: Iterable[str | int], bank: Iterable[str | int]) -> None:
        """Check that these statistics cover what is asked for.

        Args:
            places: (site, layer) pairs.
            position_means: positions with a mean over prompts.
            bank: positions to resample from.

        Raises:
            ValueError: something is missing; says what.
        """
        for what, wanted, covered in (
            ("places", map(named, places), self.places),
            ("position_means", position_means, self.position_means),
            ("bank", () if "all" in self.bank else bank, self.bank),
        ):
            if missing := [
                label(value) if isinstance(value, tuple) else str(value) for value in wanted if value not in covered
            ]:
                raise ValueError(
                    f"the reference statistics were computed without {', '.join(missing)} in {what}; compute them with "
                    "reference_for on the same specs."
                )

    def check_model(self, model: PreTrainedModel) -> None:
        """Check that the statistics belong to a model.

        Args:
            model: the model.

        Raises:
            ValueError: it is not the one that they were computed on, or has changed since.
        """
        seen, as_seen = self._seen
        if seen() is model and as_seen == fingerprint(model):
            return
        now = identity_of(model)
        if different := [name for name in now if now[name] != self.model.get(name)]:
            raise ValueError(
                f"the reference statistics belong to a model that differs in {' and '.join(different)}; compute them on this "
                "one, as it is now, with reference_for."
            )

    @cached_property
    def _bank_rows(self) -> list[dict[int, int]]:
        """For every prompt, the row of the bank that holds each token."""
        rows, count = [], 0
        for prompt in range(len(self.prompts.input_ids)):
            tokens = sorted(set(token_indices(self.prompts, prompt, self.bank)))
            rows.append({token: count + offset for offset, token in enumerate(tokens)})
            count += len(tokens)
        return rows

    def _key(self) -> dict[str, Any]:
        """Everything that the statistics depend on."""
        return {
            "format": FORMAT,
            **self.model,
            "prompts": self.prompts.hash,
            "places": self.places,
            "position_means": self.position_means,
            "bank": self.bank,
        }

    def _collect(self, model: PreTrainedModel, batch_size: int, progress: bool) -> dict[str, Tensor]:
        """One pass over the prompts; each batch's activations are added to sums and dropped."""
        components = [component_named(site) for site, _ in self.places]
        representations = [
            RepresentationConfig(
                layer or 0, component.name, component.units[0], intervention=CollectIntervention(keep_last_dim=True)
            )
            for component, (_, layer) in zip(components, self.places, strict=True)
        ]
        iv = IntervenableModel(IntervenableConfig(representations), model)
        sizes = dimensions(model.config)
        sums = [_Sums() for _ in self.places]
        # One row of the vocabulary a prompt, where logits at all tokens are not asked for.
        takes = "logits_to_keep" in inspect.signature(model.forward).parameters
        few_logits = {"logits_to_keep": 1} if takes and "logits" not in [c.name for c in components] else {}
        bar = progress_bar(len(self.prompts.input_ids), "prompt", "reference", shown=progress)
        with bar, evaluating(model), no_gradients(model):
            for batch in self.prompts.batches(batch_size):
                width = batch.input_ids.shape[1]
                where = [[list(range(sizes[c.heads] if c.heads else width))] * len(batch.index) for c in components]
                inputs = {**batch.inputs(input_device(model)), "use_cache": False, **few_logits}
                (_, collected), _ = iv(inputs, unit_locations={"base": where})
                for place_sums, activation in zip(sums, collected, strict=True):
                    by_token = activation.transpose(1, 2) if activation.ndim == 4 else activation
                    real = by_token.cpu()[batch.attention_mask.cpu().bool()]
                    for prompt, rows in zip(batch.index, real.split(batch.lengths), strict=True):
                        at = [token_indices(self.prompts, prompt, p) for p in self.position_means]
                        place_sums.add(prompt, rows, at, list(self._bank_rows[prompt]))
                bar.update(len(batch.index))
        tensors: dict[str, Tensor] = {}
        for place, place_sums in zip(self.places, sums, strict=True):
            tensors |= place_sums.tensors(label(place))
        return tensors


class _Sums:
    """Sums of one place's activations over tokens and prompts, and the rows to resample from."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.at: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}

    def add(self, prompt: int, rows: Float[Tensor, "pos *head d"], at: list[list[int]], keep: list[int]) -> None:
        """Add the real tokens of one prompt."""
        wide = rows.double()
        self.count += len(wide)
        self.total = self.total + wide.sum(0)
        self.squares = self.squares + wide.square().sum(0)
        for which, tokens in enumerate(at):
            self.at[which] = self.at[which] + wide[tokens] if which in self.at else wide[tokens]
        self.kept[prompt] = rows[keep]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The statistics, named as in `Reference.tensors`."""
        mean = torch.as_tensor(self.total) / self.count
        variance = (torch.as_tensor(self.squares) / self.count - mean.square()).clamp(min=0.0)
        if not variance.isfinite().all():
            raise ValueError(
                f"activations of {name} are not finite on the reference set; load the model in bfloat16 or float32."
            )
        found = {f"mean/{name}": mean.float(), f"std/{name}": variance.sqrt().float()}
        found |= {f"at/{name}/{which}": (total / len(self.kept)).float() for which, total in self.at.items()}
        return found | {f"bank/{name}": torch.cat([rows for _, rows in sorted(self.kept.items())])}


def check_reference_prompts(
    prompts: TokenizedPrompts, position_means: Iterable[str | int], bank: Iterable[str | int]
) -> None:
    """Check that a reference set has what is asked of it.

    Args:
        prompts: the reference set.
        position_means: positions with a mean over prompts.
        bank: positions to resample from.

    Raises:
        ValueError: no prompts, a position that some prompt lacks, or unequal lengths with "all" in `position_means`.
    """
    if not prompts.input_ids:
        raise ValueError("the reference set has no prompts; give at least one.")
    position_means = tuple(position_means)
    for prompt, ids in enumerate(prompts.input_ids):
        try:
            token_indices(prompts, prompt, (*position_means, *bank))
        except ValueError as error:
            raise ValueError(f"in the reference (source) prompts, {error}") from None
        if "all" in position_means and len(ids) != len(prompts.input_ids[0]):
            raise ValueError(
                f"a mean at every position needs prompts of equal length, but reference prompt {prompt} has {len(ids)} tokens "
                f'and prompt 0 has {len(prompts.input_ids[0])}; use mean="over_tokens" or named positions.'
            )


def _stamp(key: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """The metadata of an intact cache file with this key and these tensors."""
    return json.dumps([key, tensors_hash(sorted(tensors.items()))])


def _read(path: Path, key: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of an intact cache file with exactly this key, else None."""
    try:
        with safe_open(path, "pt") as file:
            stamp = (file.metadata() or {}).get("key")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors if stamp == _stamp(key, tensors) else None
    except (OSError, SafetensorError):
        return None

"""Attention patterns set by hand inside a block of tokens, for one head or for many at once.

    spec = force(model.config, shape="hub", block=("latent0", "latent5"), hub="latent2")            # every head of every layer
    spec = force(model.config, [3, 4], heads=(0, 2), shape="uniform", block=(10, -1), hard=True)

`intervenable.interventions.ForcedRowsIntervention` makes the edit.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import StrictStr, model_validator
from torch import Tensor

from modelcards import config_of, n_heads, n_layers, window
from pyvene_ext.intervenable.interventions import ForcedRowsIntervention
from pyvene_ext.prompts.positions import token_indices
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.base import SiteEdit, Token
from pyvene_ext.specs.sources import Sources

TO_HUB = 0.8  # of the mass on the block


class ForcedAttention(SiteEdit):
    """Set by hand how the queries of a block of tokens attend to the block; their attention to earlier tokens stays as it is.

    A query of the block places a mass m of its attention on the block's tokens. That mass is redistributed among those of them
    that the query can see (itself and earlier ones; the nearest ones in a sliding window). Rows still sum to 1.

    Attributes:
        kind: "force".
        site: "pattern".
        shape: hub: 0.8 m to the hub and 0.2 m evenly to the others; all of m to the hub if no other token is visible, and evenly
            to all if the hub is not. uniform: m evenly to all. sequential: all of m to the previous token, or to the query itself
            if that token is outside the block or the window.
        layer: as in `SiteEdit`.
        heads: query heads, as in `SiteEdit`; `force` makes the joint spec of many.
        positions: "all", as the queries are those of the block.
        block: its first and its last token, inclusive, each a name of the prompt set or an integer as in `positions`.
        hub: a token of the block, given likewise; required for the shape hub, and only for it.
        hard: move the whole mass of a row into the block, including what is on earlier tokens.
    """

    what = "forced attention"
    sites = ("pattern",)
    has_first_order = False
    every_head = "px.specs.force(model.config, ...) forces every head of every layer"

    kind: Literal["force"] = "force"
    site: StrictStr = "pattern"
    shape: Literal["hub", "uniform", "sequential"]
    block: tuple[Token, Token]
    hub: Token | None = None
    hard: bool = False

    @model_validator(mode="after")
    def _has_a_block(self) -> Self:
        if self.positions != "all":
            raise ValueError("the queries are those of the block: leave positions out.")
        if "all" in (*self.block, self.hub):
            raise ValueError("a block and its hub are given by single tokens, not by 'all'.")
        if (self.shape == "hub") != (self.hub is not None):
            raise ValueError(
                f"{self.shape} attention {'needs a hub' if self.hub is None else 'has no hub: leave hub out'}."
            )
        known = [place for place in (self.block[0], self.hub, self.block[1]) if isinstance(place, int)]
        if known != sorted(known) and (min(known) >= 0 or max(known) < 0):
            raise ValueError(
                f"a block goes from its first token to its last, with the hub in it, unlike {self.block[0]} to {self.block[1]}"
                + ("." if self.hub is None else f" with the hub at {self.hub}.")
            )
        return self

    @property
    def name(self) -> str:
        """A short name: "pattern.2.5@latent0..latent5:hub@latent2/hard"."""
        shape = self.shape if self.hub is None else f"hub@{self.hub}"
        return f"{self.where}@{self.block[0]}..{self.block[1]}:{shape}" + ("/hard" if self.hard else "")

    @property
    def prompt_key(self) -> Hashable:
        """The block and its hub."""
        return self.block, self.hub

    @property
    def intervention(self) -> type:
        """The class of the pyvene intervention that makes the edit."""
        return ForcedRowsIntervention

    def check_prompts(self, prompts: TokenizedPrompts, tokens: Sequence[Sequence[int]], sources: Sources) -> None:
        """Check every prompt's block.

        Args:
            prompts: the prompts that are intervened on.
            tokens: not used.
            sources: not used.

        Raises:
            ValueError: the block is empty or lacks its hub; the message names the prompt.
        """
        for prompt in range(len(prompts)):
            block_tokens(self, prompts, prompt)

    def replacements(
        self, prompts: Sequence[int], tokens: Sequence[Sequence[int]], sources: Sources
    ) -> list[Tensor] | None:
        """The parameters of `ForcedRowsIntervention` for each query, `pos head 5`, keys counted from the prompt's first token."""
        reach = window(sources.model.config, self.layer or 0)
        rows = [
            forced_rows(self, sources.prompts, prompt, reach)[list(edited)]
            for prompt, edited in zip(prompts, tokens, strict=True)
        ]
        return [of_prompt[:, None].expand(-1, len(self.heads or ()), -1) for of_prompt in rows]

    def first_edited(self, prompts: TokenizedPrompts, prompt: int, tokens: Sequence[int]) -> int:
        """The first token of the block."""
        return block_tokens(self, prompts, prompt)[0]

    def to_columns(self, value: Tensor, start: int | Tensor) -> Tensor:
        """Convert keys to columns of a batch; the last of the five numbers is not a key."""
        return value + start * value.new_tensor([1.0, 1.0, 1.0, 1.0, 0.0])

    def apply(self, old: Tensor, values: Tensor | None) -> Tensor:
        """Replace rows of the attention pattern, `entry key`, by the forced ones."""
        return ForcedRowsIntervention()(old, values)


def force(
    config: Any, layers: Iterable[int] | int | None = None, *, heads: Iterable[int] | int | None = None, **fields: Any
) -> tuple[ForcedAttention, ...]:
    """Make the joint spec of one pattern in several layers and heads.

    Args:
        config: the model's config, or the model.
        layers: by default all.
        heads: query heads of each layer; by default all.
        **fields: the other fields of `ForcedAttention`.

    Returns:
        A tuple with one spec per layer.
    """
    config = config_of(config)
    every: Any = range(n_heads(config)) if heads is None else heads
    return tuple(
        ForcedAttention(layer=layer, heads=every, **fields)
        for layer in (range(n_layers(config)) if layers is None else [layers] if isinstance(layers, int) else layers)
    )


def block_tokens(spec: ForcedAttention, prompts: TokenizedPrompts, prompt: int) -> tuple[int, int, int | None]:
    """Find a prompt's block.

    Args:
        spec: the forced pattern.
        prompts: the prompts.
        prompt: index of the prompt.

    Returns:
        The first and the last token of the block, and the hub, counted from the prompt's first real token.

    Raises:
        ValueError: there is no such token, the block is empty, or the hub is outside of it; the message names the prompt.
    """
    first, last = (token_indices(prompts, prompt, place)[0] for place in spec.block)
    if first > last:
        raise ValueError(
            f"{spec.name}: the block of prompt {prompt} is empty, because its first token is token {first} and its last token "
            f"{last}; name the first one first."
        )
    if spec.hub is None:
        return first, last, None
    (hub,) = token_indices(prompts, prompt, spec.hub)
    if not first <= hub <= last:
        raise ValueError(
            f"{spec.name}: the hub of prompt {prompt} is token {hub}, outside its block, which has tokens {first} to {last}; "
            "choose a hub in the block."
        )
    return first, last, hub


def forced_rows(
    spec: ForcedAttention, prompts: TokenizedPrompts, prompt: int, window: int | None
) -> Float[Tensor, "query 5"]:
    """The parameters of `interventions.ForcedRowsIntervention` for every token of a prompt as a query.

    Args:
        spec: the forced pattern.
        prompts: the prompts.
        prompt: index of the prompt.
        window: how many tokens a query sees, including itself; None: all up to itself.

    Returns:
        Five numbers per query; zeros outside of the block.
    """
    length = len(prompts.input_ids[prompt])
    first, last, hub = block_tokens(spec, prompts, prompt)
    query = torch.arange(first, last + 1)
    nearest = (query - (window or length) + 1).clamp(min=first)  # the first token of the block that it sees
    count = query - nearest + 1
    peak, rest = query, 1 - 1 / count
    if spec.shape == "sequential":
        peak, rest = torch.maximum(query - 1, nearest), torch.zeros_like(rest)
    elif hub is not None:
        sees_hub = (nearest <= hub) & (hub <= query) & (count > 1)
        peak, rest = torch.where(sees_hub, hub, query), torch.where(sees_hub, 1 - TO_HUB, rest)
    rows = torch.zeros(length, 5)
    # A hard pattern takes the mass of every key, wherever the columns of a batch begin.
    taken_from = torch.full_like(rest, -math.inf) if spec.hard else nearest
    rows[first : last + 1] = torch.stack([taken_from, nearest, query, peak, rest], -1)
    return rows

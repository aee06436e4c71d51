"""Attention patterns given by hand inside a block of tokens: where the mass goes, and the spec for many heads at once.

    spec = force(model.config, shape="hub", block=("latent0", "latent5"), hub="latent2")            # every head of every layer
    spec = force(model.config, [3, 4], heads=(0, 2), shape="uniform", block=(10, -1), hard=True)

`intervenable.interventions.ForcedRowsIntervention` makes the edit.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import (
    StrictInt,
    StrictStr,
    model_validator,
)
from torch import Tensor

from modelcards import n_heads, n_layers, window
from pyvene_ext.intervenable.interventions import ForcedRowsIntervention
from pyvene_ext.prompts.positions import token_indices
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.base import SiteEdit
from pyvene_ext.specs.sources import Sources

TO_HUB = 0.8  # of the mass on the block


class ForcedAttention(SiteEdit):
    """Give the queries of a block of tokens a pattern by hand; what they attend to before the block stays as it is.

    A query of the block gives the block's tokens a mass m of its attention, which is shared out anew among those of them that it
    may see (itself and earlier ones, in a sliding window the near ones). Rows go on summing to 1.

    Attributes:
        shape: hub: 0.8 m to the hub and 0.2 m evenly to the others; all of m to the hub where no other is visible, and evenly to
            all where the hub is not. uniform: m evenly to all. sequential: all of m to the token before, and to the query itself
            where that one is outside the block or the window.
        layer, heads: as `SiteEdit` has them; query heads. `forced_attention.force` makes the joint spec of many.
        block: its first and its last token, both in it, each a name of the prompt set or an integer as in `positions`.
        hub: a token of the block, named likewise; needed exactly for the shape hub.
        hard: move the whole mass of a row into the block, also what is on earlier tokens.
    """

    what = "forced attention"
    sites = ("pattern",)
    has_first_order = False

    kind: Literal["force"] = "force"
    site: StrictStr = "pattern"
    shape: Literal["hub", "uniform", "sequential"]
    block: tuple[StrictStr | StrictInt, StrictStr | StrictInt]
    hub: StrictStr | StrictInt | None = None
    hard: bool = False

    @model_validator(mode="after")
    def _has_a_block(self) -> Self:
        if self.positions != "all":
            raise ValueError("the queries are those of the block: leave positions out.")
        if "all" in (*self.block, self.hub):
            raise ValueError("a block and its hub are named by single tokens, unlike 'all'.")
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
        """Raise ValueError, naming the prompt, where the block is empty or lacks its hub."""
        for prompt in range(len(prompts)):
            block_tokens(self, prompts, prompt)

    def replacements(
        self, prompts: Sequence[int], tokens: Sequence[Sequence[int]], sources: Sources
    ) -> list[Tensor] | None:
        """What `ForcedRowsIntervention` is told for each query, `pos head 5`, keys counted from the prompt's first token."""
        reach = window(sources.model.config, self.layer or 0)
        rows = [
            forced_rows(self, sources.prompts, prompt, reach)[list(edited)]
            for prompt, edited in zip(prompts, tokens, strict=True)
        ]
        return [of_prompt[:, None].expand(-1, len(self.heads or ()), -1) for of_prompt in rows]

    def in_columns(self, value: Tensor, start: int) -> Tensor:
        """Keys as columns of a batch; the last of the five numbers is none."""
        return value + start * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])

    def changed(self, old: Tensor, values: Tensor | None) -> Tensor:
        """The forced pattern in place of these rows, `entry key`."""
        return ForcedRowsIntervention()(old, values)


def force(
    config: Any, layers: Iterable[int] | None = None, *, heads: Iterable[int] | None = None, **fields: Any
) -> tuple[ForcedAttention, ...]:
    """The joint spec of the same pattern in several layers and heads of a model's config, by default in all of them."""
    return tuple(
        ForcedAttention(layer=layer, heads=tuple(range(n_heads(config)) if heads is None else heads), **fields)
        for layer in (range(n_layers(config)) if layers is None else layers)
    )


def block_tokens(spec: ForcedAttention, prompts: TokenizedPrompts, prompt: int) -> tuple[int, int, int | None]:
    """The first and the last token of a prompt's block, and the hub, counted from the prompt's first real token.

    Raises ValueError, naming the prompt, where it has no such token, the block is empty or the hub is outside of it.
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
    """Every token of a prompt as a query, in the words of `interventions.ForcedRowsIntervention`; zeros outside of the block.

    `window` is how many tokens a query may look at, itself among them; None: all up to itself.
    """
    length = len(prompts.input_ids[prompt])
    first, last, hub = block_tokens(spec, prompts, prompt)
    query = torch.arange(first, last + 1)
    nearest = (query - (window or length) + 1).clamp(min=first)  # what it sees of the block begins here
    count = query - nearest + 1
    peak, rest = query, 1 - 1 / count
    if spec.shape == "sequential":
        peak, rest = torch.maximum(query - 1, nearest), torch.zeros_like(rest)
    elif hub is not None:
        sees_hub = (nearest <= hub) & (hub <= query) & (count > 1)
        peak, rest = torch.where(sees_hub, hub, query), torch.where(sees_hub, 1 - TO_HUB, rest)
    rows = torch.zeros(length, 5)
    rows[first : last + 1] = torch.stack([0 * query if spec.hard else nearest, nearest, query, peak, rest], -1)
    return rows

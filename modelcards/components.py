"""The vocabulary: every component name a card may have, what it means, its shape and its unit.

A component is what the `component` field of a pyvene `RepresentationConfig` names. Names that pyvene has keep pyvene's
meaning; the others fill its gaps. `field` is the name the literature uses (TransformerLens' where it has one).

Dimension names: `d_model` hidden size, `d_head` head size, `d_mlp` inner size of the MLP, `n_head` query heads, `n_kv_head`
key/value heads, `n_expert` experts, `n_query` and `n_key` positions on the two sides of attention, `n_out` vocabulary or
number of labels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

PER_POSITION = ("pos",)
PER_HEAD = ("h", "h.pos")
D_MLP = (
    "intermediate_size",
    "ffn_hidden_size",
    "ffn_dim",
    "n_inner",
)  # what configs call it; otherwise it is four hidden sizes


@dataclass(frozen=True)
class Component:
    """One place in a decoder.

    Attributes:
        name: what a `RepresentationConfig` calls it.
        meaning: one line for tables and messages.
        width: size of the last axis an intervention sees, in dimension names; None where it varies with the prompt.
        heads: what an `h` location indexes, heads or experts; None for a component without such an axis (its unit is `pos`).
        field: the literature's name, used by `pyvene_ext.specs`; None for the names kept for pyvene's sake only.
        per_layer: False for the places that exist once.
    """

    name: str
    meaning: str
    width: str | None
    heads: Literal["n_head", "n_kv_head", "n_expert"] | None = None
    field: str | None = None
    per_layer: bool = True

    @property
    def site(self) -> str:
        """What `pyvene_ext` calls the place: the literature's name where there is one."""
        return self.field or self.name

    @property
    def units(self) -> tuple[str, ...]:
        """The pyvene units that are right for this component."""
        return PER_HEAD if self.heads else PER_POSITION

    @property
    def shape(self) -> str:
        """Shape of the whole component, as an intervention with every unit sees it."""
        if self.heads:
            position = "n_query" if self.width is None else "pos"
            return f"batch {self.heads} {position} {self.width or 'n_key'}"
        return f"batch pos {self.width}"


_LIST = (
    # The residual stream.
    Component("embeddings", "input of the first block", "d_model", field="embed", per_layer=False),
    Component("block_input", "residual stream before the block", "d_model", field="resid_pre"),
    Component("resid_mid", "residual stream between attention and MLP", "d_model", field="resid_mid"),
    Component("block_output", "residual stream after the block", "d_model", field="resid_post"),
    Component("attention_contribution", "what attention adds to the residual", "d_model", field="attn_out"),
    Component("mlp_contribution", "what the MLP adds to the residual", "d_model", field="mlp_out"),
    Component("head_contribution", "what one head adds to the residual", "d_model", "n_head", "result"),
    # Attention.
    Component("attention_input", "input of attention, after the norm", "d_model"),
    Component("query_output", "query projection, before RoPE", "n_head*d_head"),
    Component("key_output", "key projection, before RoPE", "n_kv_head*d_head"),
    Component("value_output", "value projection", "n_kv_head*d_head"),
    Component("head_query_output", "query of one head, before RoPE", "d_head", "n_head", "q"),
    Component("head_key_output", "key of one K/V head, before RoPE", "d_head", "n_kv_head", "k"),
    Component("head_value_output", "value of one K/V head", "d_head", "n_kv_head", "v"),
    Component("query_rotated", "queries after RoPE", "n_head*d_head"),
    Component("key_rotated", "keys after RoPE", "n_kv_head*d_head"),
    Component("head_query_rotated", "query of one head after RoPE", "d_head", "n_head", "q_rot"),
    Component("head_key_rotated", "key of one K/V head after RoPE", "d_head", "n_kv_head", "k_rot"),
    Component("attention_scores", "scaled, soft-capped scores, masked = -inf", None, "n_head", "scores"),
    Component("attention_pattern", "softmax of the scores", None, "n_head", "pattern"),
    Component("attention_weight", "pyvene's name for the pattern in GPT-2", None, "n_head"),
    Component("attention_value_output", "z of all heads, input of the output projection", "n_head*d_head"),
    Component("head_attention_value_output", "z of one head", "d_head", "n_head", "z"),
    Component("attention_output", "output projection of attention, before any post-norm", "d_model"),
    # MLP.
    Component("mlp_input", "input of the MLP, after the norm", "d_model", field="mlp_in"),
    Component("mlp_gate", "gate projection, before the activation", "d_mlp", field="mlp_gate"),
    Component("mlp_up", "up projection (GPT-2: before the activation)", "d_mlp", field="mlp_up"),
    Component("mlp_activation", "output of the activation: act(gate) alone where there is a gate", "d_mlp"),
    Component("mlp_neurons", "neurons: input of the down projection", "d_mlp", field="mlp_neurons"),
    Component("mlp_output", "output of the MLP, before any post-norm", "d_model"),
    # Experts.
    Component("router_logits", "the router's logit of each expert, before the softmax", "n_expert", field="router"),
    Component(
        "expert_contribution", "what one expert adds to the MLP's output, weighted", "d_model", "n_expert", "expert"
    ),
    # The end.
    Component("final_norm", "output of the final norm", "d_model", field="final_norm", per_layer=False),
    Component("logits", "logits, after any soft-cap", "n_out", field="logits", per_layer=False),
)

COMPONENTS: dict[str, Component] = {component.name: component for component in _LIST}
FIELD_NAMES: dict[str, str] = {component.field: component.name for component in _LIST if component.field}


def config_of(model: Any) -> Any:
    """The config of a model, or the config that is given itself. Raises ValueError for anything else."""
    config = getattr(model, "config", model)
    if not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"expected a model or its config, not {type(model).__name__}.")
    return config


def n_layers(config: Any) -> int:
    """Number of blocks."""
    return config.num_hidden_layers


def n_positions(config: Any) -> int:
    """Number of tokens that the model takes; sys.maxsize where attention is biased by distance and no position is learnt (BLOOM).

    Where rotary positions are scaled, max_position_embeddings is in some configs the length before that (Qwen2.5 with YaRN), in
    others the one after it; the larger counts.
    """
    if getattr(config, "alibi", False):
        return sys.maxsize
    most = getattr(config, "max_position_embeddings", sys.maxsize)
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (
        rope,
        *(value for value in rope.values() if isinstance(value, dict)),
    ):  # some have one for each type of layer
        if one.get("rope_type") in ("linear", "dynamic", "yarn"):
            most = max(most, int(one["factor"] * (one.get("original_max_position_embeddings") or most)))
    return most


def n_heads(config: Any) -> int:
    """Number of query heads."""
    return config.num_attention_heads


def n_kv_heads(config: Any) -> int:
    """Number of key/value heads; the query heads share them in equal groups."""
    if getattr(config, "multi_query", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or n_heads(config)


def head_dim(config: Any) -> int:
    """Size of one head, which need not be hidden size / number of heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // n_heads(config)


def window(config: Any, layer: int) -> int | None:
    """Number of tokens that a query of this layer attends to, itself and those just before it; None without a window."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def dimensions(config: Any) -> dict[str, int]:
    """The named dimensions of a model, from its config."""
    hidden = config.hidden_size
    inner = next((size for name in D_MLP if (size := getattr(config, name, None))), 4 * hidden)
    return {
        "d_model": hidden,
        "d_head": head_dim(config),
        "d_mlp": inner,
        "n_head": n_heads(config),
        "n_kv_head": n_kv_heads(config),
        "n_expert": getattr(config, "num_experts", None) or 0,
    }

"""Noise ablations at one token of a model's reasoning, by site."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from transformers import PretrainedConfig

from modelcards import n_kv_heads, n_layers
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.joint import Spec

Site = Literal["embed", "resid", "kv"]


def noise_at(
    position: str,
    config: PretrainedConfig,
    sites: Collection[Site],
    seed: int,
    *,
    layers: Sequence[int] = (),
    kv_layers: Sequence[int] = (),
    noise: Literal["gaussian", "norm_matched"] = "gaussian",
) -> dict[str, Spec]:
    """Make one noise ablation per site.

    Args:
        position: a named position of the prompts.
        config: the model's config.
        sites: embed, what enters the first block; resid, the residual stream after the blocks `layers`, one at a time; kv, keys
            (before RoPE) and values of all K/V heads in `kv_layers`, jointly.
        seed: of the noise.
        layers: by default the middle one.
        kv_layers: by default all.
        noise: its distribution, as in `Ablation`.

    Returns:
        Specs by the name of the site: embed, resid.LAYER and kv.
    """
    every, kv_heads = range(n_layers(config)), tuple(range(n_kv_heads(config)))
    fields: Any = {"kind": "noise", "noise": noise, "positions": position, "seed": seed}
    found: dict[str, Spec] = {}
    if "embed" in sites:
        found["embed"] = Ablation(site="embed", **fields)
    if "resid" in sites:
        for layer in layers or [(len(every) - 1) // 2]:
            found[f"resid.{layer}"] = Ablation(site="resid_post", layer=layer, **fields)
    if "kv" in sites:
        found["kv"] = tuple(
            Ablation(site=site, layer=layer, heads=kv_heads, **fields)
            for layer in kv_layers or every
            for site in ("k", "v")
        )
    return found

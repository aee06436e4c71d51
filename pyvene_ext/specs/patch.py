"""Activation patches: a source prompt's activation in place of the base prompt's own."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import (
    StrictStr,
)

from pyvene_ext.specs.base import VECTORS, SiteEdit


class ActivationPatch(SiteEdit):
    """Put a source prompt's activation in place of the base prompt's own (Meng et al. 2022; Wang et al. 2022).

    Attributes:
        site: q, k, v (before RoPE), z, attn_out, mlp_in, mlp_out, resid_pre, resid_mid, resid_post or embed.
        layer, heads, positions: as `SiteEdit` has them; a name is looked up in each of the two prompts.
        subspace: replace only the component along the concept direction (`pyvene_ext.methods.patching.subspace`), leave the rest.
        path: set by path patching alone: the path whose recorded value is put here instead (`pyvene_ext.methods.patching.patch`).

    The source prompts are the `reference` of a run, one for each prompt (`pyvene_ext.patch` arranges it).
    """

    what = "patch"
    sites = ("q", "k", "v", "mlp_in", *VECTORS)
    uses_reference: ClassVar[bool] = True

    kind: Literal["patch"] = "patch"
    subspace: bool = False
    path: StrictStr | None = None

    @property
    def name(self) -> str:
        """A short name: "k.2.0@subject:patch", "z.2.5:patch/subspace", or that of the path."""
        return self.path or f"{self.where}:patch" + ("/subspace" if self.subspace else "")

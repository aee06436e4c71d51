"""Norms with their scale frozen, which makes them linear: what an activation's parts, or a change of it, become behind a norm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

TOLERANCE = 1e-4  # of a sum of parts, relative to the sum of their sizes


class FrozenNorm:
    """A norm whose scale is frozen, as a linear map: scale * gain * x + offset, of x less its mean if the norm subtracts it.

    Gain, offset and whether the mean is subtracted are found by calling the module with its weights in float32, so that it does
    not matter what they are called and what is added to them; the result is held to the module's own output.
    """

    def __init__(self, norm: nn.Module, d_model: int, name: str) -> None:
        self._name = f"{name} ({type(norm).__name__})"
        self._norm, self._weights = norm, {name: x.detach().float() for name, x in norm.named_parameters()}
        device = next((parameter.device for parameter in norm.parameters()), torch.device("cpu"))
        # Large, so that the norm's epsilon is nothing beside it; no entry is 0, with or without the mean subtracted.
        probe = 1000.0 * torch.where(torch.arange(d_model, device=device) % 3 == 0, 1.0, -1.0)
        self.offset = self._call(torch.zeros_like(probe)[None])[0]
        out = self._call(probe[None])[0]
        self._centred = torch.allclose(self._call(probe[None] + 1000.0)[0], out, rtol=1e-3, atol=1e-3)
        probe = self._centre(probe)
        self._gain = (out - self.offset) * probe.square().mean().sqrt() / probe

    def direction(
        self, x: Float[Tensor, "batch d_model"], unembedding: Float[Tensor, "batch answer d_model"]
    ) -> Float[Tensor, "batch answer d_model"]:
        """What a part of `x` is multiplied with for its share of the logits; ValueError if the norm is none that is linear so."""
        gain, scale = self._frozen_at(x)
        return self._centre(unembedding * gain) * scale[:, None]

    def change(
        self, x: Float[Tensor, "row d_model"], added: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """What adding this to `x` adds to the norm's output; ValueError if the norm is none that is linear so."""
        gain, scale = self._frozen_at(x)
        return self._centre(added) * gain * scale

    def _frozen_at(self, x: Float[Tensor, "row d_model"]) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "row 1"]]:
        """Gain and scale at `x`."""
        gain, offset = self._gain.to(x.device), self.offset.to(x.device)
        out = self._call(x) - offset
        unscaled = gain * self._centre(x)
        scale = (out * unscaled).sum(-1, keepdim=True) / unscaled.square().sum(-1, keepdim=True)
        if not ((out - scale * unscaled).abs().amax(-1) <= TOLERANCE * out.abs().amax(-1)).all():
            raise ValueError(
                f"{self._name} is not linear once its scale is frozen, so that what it gives has no parts; this takes models "
                "with LayerNorms or RMSNorms, and finite activations."
            )
        return gain, scale

    def _call(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        return torch.func.functional_call(self._norm, self._weights, x[:, None])[:, 0].to(x.device)

    def _centre(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        # Subtracting the mean is its own transpose, so the same serves an activation and a direction.
        return x - x.mean(-1, keepdim=True) if self._centred else x

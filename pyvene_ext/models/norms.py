"""Norms with their scale frozen, which makes them linear: what an activation's parts, or a change of it, become after a norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

TOLERANCE = 1e-4  # of the linear form against the module's own output, relative to the output's largest entry


class FrozenNorm:
    """A norm with its scale frozen, as a linear map: scale * gain * x + offset, where x is centred if the norm centres it.

    Gain, offset and whether the norm centres are found by calling the module with its weights in float32, so that it does not
    matter what the weights are called or what is added to them (Gemma's 1 + weight). Every use checks the linear form against
    the module's own output. This is the usual "LayerNorm scale frozen" of direct logit attribution (Elhage et al. 2021).
    """

    def __init__(self, norm: nn.Module, d_model: int, name: str) -> None:
        """Find the norm's gain and offset.

        Args:
            norm: a LayerNorm or RMSNorm of any class.
            d_model: the width it normalises over.
            name: what messages call it.
        """
        self._name = f"{name} ({type(norm).__name__})"
        self._norm, self._weights = norm, {name: x.detach().float() for name, x in norm.named_parameters()}
        device = next((parameter.device for parameter in norm.parameters()), torch.device("cpu"))
        # Large, so that the norm's epsilon is negligible; no entry is 0, centred or not.
        probe = 1000.0 * torch.where(torch.arange(d_model, device=device) % 3 == 0, 1.0, -1.0)
        self.offset, out, moved = self._call(torch.stack([torch.zeros_like(probe), probe, probe + 1000.0]))
        self._centred = torch.allclose(moved, out, rtol=1e-3, atol=1e-3)
        probe = self._centre(probe)
        self._gain = (out - self.offset) * probe.square().mean().sqrt() / probe

    def direction(
        self, x: Float[Tensor, "batch d_model"], unembedding: Float[Tensor, "batch answer d_model"]
    ) -> Float[Tensor, "batch answer d_model"]:
        """The direction to project a part of `x` on for its share of each answer's logit.

        Args:
            x: what enters the norm; its scale is frozen at `x`.
            unembedding: the answers' rows of the unembedding.

        Returns:
            One direction for each answer; the dot product with a part of `x` is that part's direct contribution.

        Raises:
            ValueError: the norm is not linear once its scale is frozen, or `x` is not finite.
        """
        gain, scale = self._frozen_at(x)
        return self._centre(unembedding * gain) * scale[:, None]

    def change(
        self, x: Float[Tensor, "row d_model"], added: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """How the norm's output changes when `added` is added to `x`, the scale frozen at `x`.

        Args:
            x: what enters the norm.
            added: the change of `x`.

        Returns:
            The change of the norm's output.

        Raises:
            ValueError: the norm is not linear once its scale is frozen, or `x` is not finite.
        """
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
                f"{self._name} is not linear once its scale is frozen, so its output cannot be split into parts; use a model "
                "with LayerNorms or RMSNorms, and finite activations."
            )
        return gain, scale

    def _call(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        return torch.func.functional_call(self._norm, self._weights, x[:, None])[:, 0].to(x.device)

    def _centre(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        # Subtracting the mean is its own transpose, so the same serves an activation and a direction.
        return x - x.mean(-1, keepdim=True) if self._centred else x


@dataclass(frozen=True)
class WrittenNorm:
    """A LayerNorm or RMSNorm written out: gain * c(x) / sqrt(mean(c(x)^2) + eps) + offset, with c(x) = x or x - mean(x).

    Attributes:
        gain: the weights, as they multiply.
        offset: the bias, or zeros.
        eps: what keeps the norm of nothing finite.
        centred: whether the norm subtracts the mean.
    """

    gain: Float[Tensor, " d_model"]
    offset: Float[Tensor, " d_model"]
    eps: float
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module, d_model: int) -> WrittenNorm | None:
        """Write out a norm.

        Args:
            norm: a module of any class.
            d_model: the width it normalises over.

        Returns:
            The norm in float32; None if the module is something else, such as no norm at all.
        """
        frozen = FrozenNorm(norm, d_model, "a norm")
        # The first is so small that epsilon shows; the others are any that a norm could get.
        wave = torch.arange(d_model, device=frozen.offset.device).float().cos()
        probe = torch.stack([1e-3 * wave, 0.02 * wave + 0.01, wave.square() - 2.0, 1e3 * wave.roll(1)])
        out = frozen._call(probe)
        small = frozen._centre(probe[0])
        unscaled = frozen._gain * small
        scale = ((out[0] - frozen.offset) * unscaled).sum() / unscaled.square().sum()
        eps = scale.double() ** -2 - small.double().square().mean()
        found = cls(frozen._gain, frozen.offset, max(0.0, float(eps)), frozen._centred)
        return found if torch.allclose(found(probe), out, rtol=1e-4, atol=1e-5 * float(out.abs().max())) else None

    def __call__(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """Normalise, in float32."""
        x = self.centre(x.float())
        return self.gain * x * self.scale(x) + self.offset

    def centre(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """c(x), which is its own transpose, so that it serves activations and gradients."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, centred: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row 1"]:
        """1 / sqrt(mean(c(x)^2) + eps), given c(x)."""
        return torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)

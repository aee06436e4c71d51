"""Norms written out are the modules themselves, and what is no norm is not taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyvene_ext.models.norms import WrittenNorm
from pyvene_ext.models.replay import Replay
from tests.tiny_random import CORE_FAMILIES, random_model

WIDTH = 37


@pytest.mark.parametrize("family", [family for family in CORE_FAMILIES if family != "opt"])
def test_a_written_norm_is_the_models_own_at_any_size(family: str) -> None:
    model = random_model(family)
    width = model.config.hidden_size
    with torch.no_grad():
        norm = Replay(model).attention_norm(1)
        written = WrittenNorm.of(norm, width)
        assert written is not None
        x = torch.randn(5, width) * torch.tensor([1e-4, 1e-2, 1.0, 30.0, 1e4])[:, None] + 0.1
        torch.testing.assert_close(written(x), norm(x[:, None])[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
def test_epsilon_is_found(eps: float) -> None:
    for norm in (nn.LayerNorm(WIDTH, eps), nn.RMSNorm(WIDTH, eps)):
        written = WrittenNorm.of(norm, WIDTH)
        assert written is not None and written.eps == pytest.approx(eps, rel=1e-3, abs=1e-11)
        assert written.centred == isinstance(norm, nn.LayerNorm)


@pytest.mark.parametrize("module", [nn.Identity(), nn.Tanh(), nn.Linear(WIDTH, WIDTH)])
def test_what_is_no_norm_is_not_written_out(module: nn.Module) -> None:
    assert WrittenNorm.of(module, WIDTH) is None

"""Checkpoints in the form of CODI's training code: adapters merged by hand beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyvene_ext.io.cli import run
from pyvene_ext.models import codi
from pyvene_ext.models.latent_steps import Format, format_of, projection
from pyvene_ext.models.loading import load_model
from tests.ground_truth.continuous_thought import thought
from tests.saved_models import save_random_model

RANK, ALPHA = 3, 5.0
ADAPTED = {
    "gpt2": ("transformer.h.1.attn.c_attn", "transformer.h.2.mlp.c_fc"),
    "llama3_1": ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"),
}


def checkpoint(family: str, folder: Path, norm: bool = True) -> tuple[Any, dict[str, torch.Tensor]]:
    """Base model and checkpoint in folders; a model with the adapters in its forward pass, and the projection's weights."""
    base: Any = save_random_model(family, folder / "base")
    torch.manual_seed(3)
    for parameter in base.parameters():  # the checkpoint's are others than the base's
        parameter.data.mul_(0.5)
    base.resize_token_embeddings(base.config.vocab_size + 3, mean_resizing=False)
    base.get_input_embeddings().weight.data[-3:] = 0.3 * torch.randn(3, base.config.hidden_size)
    state = {}
    for name, tensor in base.state_dict().items():
        path = name.rpartition(".")[0]
        name = name.replace(path, f"{path}.base_layer") if path in ADAPTED[family] else name
        state[f"codi.base_model.model.{name}"] = tensor.clone()
    for path in ADAPTED[family]:
        module: Any = base.get_submodule(path)
        wide, narrow = module.weight.shape if family == "gpt2" else module.weight.shape[::-1]
        a, b = 0.3 * torch.randn(RANK, wide), 0.3 * torch.randn(narrow, RANK)
        state |= {f"codi.base_model.model.{path}.lora_{k}.default.weight": v for k, v in (("A", a), ("B", b))}
        module.register_forward_hook(lambda _, args, out, a=a, b=b: out + ALPHA / RANK * (args[0] @ a.T) @ b.T)
    if family == "gpt2":
        state["codi.base_model.model.transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    how = {
        name: 0.5 * torch.randn_like(x)
        for name, x in projection(base.config.hidden_size, 20, norm).state_dict().items()
    }
    state |= {f"prj.{name}": tensor for name, tensor in how.items()}
    (folder / "ckpt").mkdir()
    save_file(state, folder / "ckpt/model.safetensors")
    return base.eval(), how


def convert(folder: Path, *flags: Any) -> int:
    given = ["--checkpoint", folder / "ckpt", "--base", folder / "base", "--out", folder / "out", "--lora_alpha", ALPHA]
    return run(codi.main, codi.Config, [str(flag) for flag in (*given, *flags)])


@pytest.mark.parametrize(("family", "norm", "eos"), [("gpt2", True, False), ("llama3_1", False, True)])
def test_a_checkpoint_thinks_as_with_its_adapters(tmp_path: Path, family: str, norm: bool, eos: bool) -> None:
    adapted, how = checkpoint(family, tmp_path, norm)
    if eos:
        words = load_model(tmp_path / "base")[1]
        words.add_special_tokens({"eos_token": "<eos>"})
        words.save_pretrained(tmp_path / "base")
    assert convert(tmp_path, "--steps", 4, *(["--eos"] if eos else [])) == 0
    model, words = load_model(tmp_path / "out")
    pad = len(words)
    end = (words.eos_token_id,) * eos
    form = Format(opening=(*end, pad + 1), latent=pad, closing=(pad + 2, *end), steps=4)
    assert format_of(model) == form and (not eos or words.eos_token_id is not None)
    question = [4, 9, 2, 7, 7]
    _, logits, _ = thought(adapted, question, form.opening, form.closing, how, 4)
    with torch.no_grad():
        found = model(torch.tensor([[*question, *form.tokens]])).logits[0]
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


def test_a_pickled_checkpoint_without_projection(tmp_path: Path) -> None:
    adapted, _ = checkpoint("gpt2", tmp_path)
    state = load_file(tmp_path / "ckpt/model.safetensors")
    (tmp_path / "ckpt/model.safetensors").unlink()
    torch.save({n: t for n, t in state.items() if not n.startswith("prj.")}, tmp_path / "ckpt/pytorch_model.bin")
    assert convert(tmp_path) == 0
    model, _ = load_model(tmp_path / "out")
    form: Any = format_of(model)
    assert not form.projection and form.steps == 6
    _, logits, _ = thought(adapted, [4, 9, 2], form.opening, form.closing, None)
    with torch.no_grad():
        found = model(torch.tensor([[4, 9, 2, *form.tokens]])).logits[0]
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


class Trap:
    """Writes a file when unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("trapped"),)


def test_what_cannot_be_used_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint("gpt2", tmp_path)
    whole = load_file(tmp_path / "ckpt/model.safetensors")
    wte, lora = (
        "codi.base_model.model.transformer.wte.weight",
        "codi.base_model.model.transformer.h.1.attn.c_attn.lora_A",
    )

    def without(*names: str) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in whole.items() if name not in names}

    tied = (wte, "codi.base_model.model.lm_head.weight")
    for state, message in (
        (without(*tied), "has no token embeddings"),
        (
            {**whole, "codi.decoder.weight": torch.ones(2)},
            "the checkpoint's decoder.weight is not a weight of the base model",
        ),
        ({**whole, wte: torch.ones(5, 35)}, "transformer.wte.weight has shape [5, 35] in the checkpoint but"),
        (without(f"{lora}.default.weight"), "has only lora_B"),
        ({**whole, "prj.1.weight": torch.ones(4, 4)}, "a projection has the weights"),
    ):
        save_file(state, tmp_path / "ckpt/model.safetensors")
        assert convert(tmp_path) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("error:") == 1
    assert convert(tmp_path, "--steps", 0) == 2
    (tmp_path / "ckpt/model.safetensors").write_bytes(b"no")
    assert convert(tmp_path) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "ckpt/model.safetensors").unlink()
    assert convert(tmp_path) == 2
    assert "has no model.safetensors and no pytorch_model.bin" in capsys.readouterr().err
    torch.save({"codi.x": Trap()}, tmp_path / "ckpt/pytorch_model.bin")
    assert convert(tmp_path) == 2
    assert "cannot be read" in capsys.readouterr().err and not Path("trapped").exists()
    torch.save([1, 2], tmp_path / "ckpt/pytorch_model.bin")
    assert convert(tmp_path) == 2
    assert "does not hold named tensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

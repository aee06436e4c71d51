"""Convert checkpoints of CODI's training code into folders that every study takes: adapters merged, the projection in a file.

    python -m pyvene_ext.models.codi --checkpoint DOWNLOADED_FOLDER --base gpt2 --out codi-gpt2
    python -m pyvene_ext.models.codi --checkpoint DOWNLOADED_FOLDER --base meta-llama/Llama-3.2-1B --out codi-llama
    python experiments/critical_heads/patch_hub.py --models codi-gpt2 --problems gsm8k --answer_tokens 16

Two things are read: the base model (its config, its tokenizer, and any weights that the checkpoint lacks), and the checkpoint's
model.safetensors, else its pytorch_model.bin, which is read without executing pickled code. Entries are named as in that code
(repository zhenyi4/codi; not tried on the published weights):

    codi.[base_model.model.]NAME          a weight of the base model; `.base_layer.` in a name is dropped
    ...lora_A[.default].weight, lora_B    a LoRA adapter: alpha / r * B A is added to the weight (r is A's; alpha is --lora_alpha)
    prj.1, prj.3, prj.ln                  the projection

The embeddings have three rows more than the base model's vocabulary: padding, which stands for latent steps here, BOT and EOT.
Prompts are the bare question, [the end token with --eos], BOT, latent steps, EOT, [the end token with --eos].

Differences from that code's evaluation: padding is neither attended to nor counted in positions, at latent steps too, so that
batched and single questions give the same result; padding and BOT are never generated (nor is EOT there); adapters are merged,
in float32. Not supported: quantised or DoRA adapters, adapters of embeddings, a second decoder, and models without adapters saved
under other names.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pyvene_ext.io.cli import run
from pyvene_ext.io.files import output_path
from pyvene_ext.models.latent_steps import (
    Format,
    attach,
    projection_from,
    save,
)
from pyvene_ext.models.loading import load_model

NEW_TOKENS = 3  # padding, BOT, EOT
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")  # recomputed for every model
LORA = re.compile(r"(.+)\.lora_(A|B)(\.default)?\.weight")


@dataclass(frozen=True)
class Config:
    """The checkpoint, and how it was trained."""

    checkpoint: Path
    """the folder with model.safetensors or pytorch_model.bin"""
    base: str
    """the model it was trained from: a folder or a name on the hub"""
    out: Path
    """the output folder"""
    lora_alpha: float = 32
    """the adapters' alpha, as in training"""
    steps: int = 6
    """latent steps (inf_latent_iterations)"""
    eos: bool = False
    """put the end token before BOT and after EOT (trained without remove_eos)"""
    template: str = "{question}"
    """template of the question"""


def main(config: Config) -> None:
    """Convert one checkpoint."""
    if config.steps < 1:
        raise ValueError(f"--steps must be 1 or more, not {config.steps}.")
    folder = output_path(config.out, config.out)
    state = read_checkpoint(config.checkpoint)
    model, tokenizer = load_model(config.base, dtype="float32")
    words = model.config.vocab_size
    model.resize_token_embeddings(words + NEW_TOKENS, mean_resizing=False)
    own = {name.removeprefix("codi."): tensor for name, tensor in state.items() if not name.startswith("prj.")}
    adapters = merge(model, own, config.lora_alpha)
    end = (tokenizer.eos_token_id,) * config.eos
    prj = {name.removeprefix("prj."): tensor.float() for name, tensor in state.items() if name.startswith("prj.")}
    form = Format(
        opening=(*end, words + 1),
        latent=words,
        closing=(words + 2, *end),
        steps=config.steps,
        template=config.template,
        projection=bool(prj),
    )
    attach(model, form, projection_from(prj, model.config.hidden_size) if prj else None)
    save(model, tokenizer, folder)
    print(
        f"{adapters} adapters merged, {'a' if prj else 'no'} projection, {config.steps} latent steps\nwritten:\n  {folder}/"
    )


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name; ValueError if they cannot be read."""
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    try:
        if safe.is_file():
            return load_file(safe)
        state = torch.load(pickled, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} has no model.safetensors and no pytorch_model.bin; check the path."
        ) from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"the weights in {folder} cannot be read ({str(error).split(chr(10))[0]}).") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{pickled} does not hold named tensors; give the checkpoint of a whole model.")
    return dict(state)


@torch.no_grad()
def merge(model: PreTrainedModel, state: Mapping[str, Tensor], alpha: float) -> int:
    """Copy a checkpoint's weights into a model in place, then add its adapters.

    Args:
        model: the base model, its embeddings already resized.
        state: the checkpoint's tensors by name, without the projection.
        alpha: LoRA's alpha.

    Returns:
        The number of adapters merged.

    Raises:
        ValueError: an entry that the model lacks or that has another shape, half an adapter, or no token embeddings.
    """
    weights: dict[str, Tensor] = {}
    lora: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if found := LORA.fullmatch(plain):
            lora.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor.float()
        elif not BUFFERS.search(plain):
            weights[plain] = tensor
    own: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    embeddings: Any = model.get_input_embeddings()
    if not any(own.get(name) is embeddings.weight for name in weights):
        raise ValueError(
            "the checkpoint has no token embeddings, so BOT and EOT would be undefined; give the whole checkpoint."
        )
    for name in (*weights, *lora):
        if name not in own:
            raise ValueError(
                f"the checkpoint's {name} is not a weight of the base model; give the base that it was trained from."
            )
    for name, tensor in weights.items():
        check_shape(name, own[name], tensor)
        own[name].copy_(tensor)
    for name, parts in lora.items():
        if set(parts) != {"A", "B"}:
            raise ValueError(
                f"the adapter of {name} has only lora_{next(iter(parts))} in the checkpoint; get the whole checkpoint."
            )
        change = alpha / len(parts["A"]) * parts["B"] @ parts["A"]
        change = change.T if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else change
        check_shape(name, own[name], change)
        own[name].add_(change)
    return len(lora)


def check_shape(name: str, own: Tensor, given: Tensor) -> None:
    """Raise ValueError if a checkpoint's tensor does not have the shape of the model's weight."""
    if own.shape != given.shape:
        raise ValueError(
            f"{name} has shape {list(given.shape)} in the checkpoint but {list(own.shape)} in the base model; give the base that "
            "it was trained from."
        )


if __name__ == "__main__":
    sys.exit(run(main, Config))

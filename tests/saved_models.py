"""Models with random weights in a folder, with the shipped tokenizer: what a study's --model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pyvene_ext.models.loading import TINY_FOLDER, TINY_MODELS
from tests.tiny_random import CLASSES, tiny_config


def shipped_tokenizer() -> PreTrainedTokenizerFast:
    file = str(TINY_FOLDER / TINY_MODELS[0] / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, pad_token="<pad>", bos_token="<bos>")


def save_random_model(family: str, folder: Path, positions: int | None = None) -> Any:
    """A family's tiny language model as it is read back; its weights are large enough that every head matters.

    Args:
        positions: how many tokens it takes, where a family has a limit; by default that of `tiny_config`.
    """
    config = tiny_config(family)
    if positions is not None and hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = positions
    config.vocab_size = len(shipped_tokenizer())
    save_with_random_weights(CLASSES[family]["causal_lm"](config), folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def save_with_random_weights(model: Any, folder: Path) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    shipped_tokenizer().save_pretrained(folder)

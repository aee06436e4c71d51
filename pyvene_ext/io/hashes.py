"""Hashes of data and tensors: equal content, equal hash, on every machine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from torch import Tensor


def data_hash(value: Any) -> str:
    """Hash of JSON-able data: equal data, equal hash, on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8"))


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors on the CPU in their order: name, shape, dtype and bytes."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Hashes of data and tensors: equal content has an equal hash, on every machine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from torch import Tensor


def data_hash(value: Any) -> str:
    """Hash data; equal data has an equal hash on every machine.

    Args:
        value: anything that JSON can write.

    Returns:
        32 hexadecimal digits.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8"))


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash named tensors by name, shape, dtype and bytes.

    Args:
        tensors: names and tensors on the CPU, in order.

    Returns:
        32 hexadecimal digits.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

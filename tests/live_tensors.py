"""How much memory tensors take, counted tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        self.live = {held: size for held, size in self.live.items() if not held.expired()}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (key := StorageWeakRef(x.untyped_storage())) not in given:
                self.live[key] = x.untyped_storage().nbytes()
        self.bytes = max(self.bytes, sum(self.live.values()))
        return out

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
        self._at_most = 0  # what is held, and what was given up since it was last looked at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (key := StorageWeakRef(x.untyped_storage())) not in given:
                size = x.untyped_storage().nbytes()
                self._at_most += size - self.live.get(key, 0)
                self.live[key] = size
        if self._at_most > self.bytes:
            self.live = {held: size for held, size in self.live.items() if not held.expired()}
            self._at_most = sum(self.live.values())
            self.bytes = max(self.bytes, self._at_most)
        return out

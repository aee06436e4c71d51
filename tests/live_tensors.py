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
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}  # which keep addresses from being given out again
        self.held = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in given:
                self.held += storage.nbytes() - self.live.get(storage._cdata, (None, 0))[1]
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.held > self.bytes:  # who has gone matters only where the others might be the most
            self.live = {at: (ref, size) for at, (ref, size) in self.live.items() if not ref.expired()}
            self.held = sum(size for _, size in self.live.values())
            self.bytes = max(self.bytes, self.held)
        return out

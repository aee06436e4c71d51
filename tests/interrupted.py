"""Ctrl-C at a chosen moment, once."""

from __future__ import annotations

from typing import Any

import pytest


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int, owner: Any, name: str) -> list[tuple]:
    """The `call`-th call of `owner.name` is interrupted; the arguments of all calls, those that come after it too."""
    calls: list[tuple] = []
    own = getattr(owner, name)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopped)
    return calls

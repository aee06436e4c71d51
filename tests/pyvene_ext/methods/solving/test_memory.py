"""What writing many texts at once takes, counted tensor by tensor: no more than the memory that it is given."""

from __future__ import annotations

from typing import Any

import pytest

from pyvene_ext.engine.decode import rows as rows_module
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.specs.ablation import Ablation
from tests.live_tensors import Peak
from tests.pyvene_ext.methods.solving.test_evaluate import NEW, asked, model_of, tokenizer


@pytest.mark.parametrize(
    ("family", "scope", "memory"),
    [
        ("llama3_1", "new", 10**6),
        *(pytest.param(family, "both", 2 * 10**6, marks=pytest.mark.slow) for family in ("llama3_1", "gemma2")),
    ],
)
def test_no_more_memory_is_taken_than_is_given(
    family: str, scope: Any, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (54, 50, 30, 54, 44, 9, 54, 53, 52) * max(1, memory // 10**6)
    model, questions = model_of(family), asked((0,) * len(lengths), lengths)
    specs = [Ablation(kind="zero", site="z", layer=layer, heads=(head,)) for layer in (0, 1) for head in range(4)]
    held: list[int] = []
    step = rows_module._Writer.step
    monkeypatch.setattr(rows_module._Writer, "step", lambda self: (held.append(self._bytes()), step(self))[1])
    with Peak() as peak:
        evaluate(model, tokenizer(end=None), questions, [None, *specs], scope, max_new_tokens=NEW, memory=memory)
    assert peak.bytes <= memory
    assert max(held) > memory / 2, "and it is used"
    assert peak.bytes > memory / 3, "and counted"

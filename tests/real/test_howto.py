"""The how-to pages and the README on pretrained weights: the same lines, against plain hooks, and what they print."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import test_howto as howto
from tests.real.conftest import Real

SAME_LENGTH = (
    "px.PromptSet([p for p in ioi if len(tokenizer(p.clean).input_ids) == len(tokenizer(p.corrupt).input_ids)][:8])"
)
# Fewer prompts, for time; and a sentence of plain English.
SHORTER = {
    r"ioi\[:8\]": SAME_LENGTH, r"\[:20\]": "[:3]", r"\[:16\]": "[:4]", r"\[16:36\]": "[16:18]",
    r'text="EN: the red cat sees the dog. FR:", answer="le", wrong="la"':
    'text="The capital of France is", answer="Paris", wrong="Rome"',
}  # fmt: skip


@pytest.mark.parametrize("check", howto.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_a_page_gives_what_plain_hooks_give_on_smollm2(
    check: Callable[[howto.Names], None], smollm2: Real, tmp_path: Path
) -> None:
    page, titles = howto.CHECKS[check]
    text = re.sub(r'"tiny-[\w.]+"', lambda _: repr(smollm2.folder), howto.sections(page, titles))
    for whole, short in SHORTER.items():
        text = re.sub(whole, lambda _, short=short: short, text)
    if page == "own_metric":  # its first cell, a sweep over all heads, is checked
        text = text.split("The summed probability")[0]
    check(howto.run_cells(text, tmp_path))


@pytest.mark.parametrize("page", ["README.md", "docs/howto/pretrained.md"])
def test_what_a_page_prints_is_what_its_code_prints(page: str, smollm2: Real) -> None:
    text = (howto.ROOT / page).read_text(encoding="utf-8")
    (code,), (printed,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.S) for kind in ("python", "text"))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code.replace('"smollm2-135m-instruct"', repr(smollm2.folder)), {})
    number = r"-?\d+\.?\d*(?:e-?\d+)?"
    shown, found = (re.sub(r"\s+", " ", re.sub(number, "#", some)).strip() for some in (printed, output.getvalue()))
    assert shown == found
    numbers = [np.array(re.findall(number, some), float) for some in (printed, output.getvalue())]
    np.testing.assert_allclose(*numbers, rtol=0.01, atol=0.011)  # the last digit shown

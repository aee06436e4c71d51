"""The tasks of docs/first_hour.md on pretrained weights: the same lines with another model and a sentence of plain English."""

from __future__ import annotations

from pathlib import Path

from tests import test_first_hour as page
from tests.real.conftest import Real

SAME_LENGTH = (
    "px.PromptSet([p for p in ioi if len(tokenizer(p.clean).input_ids) == len(tokenizer(p.corrupt).input_ids)][:8])"
)


def test_the_first_hour_gives_what_plain_hooks_give_on_smollm2(smollm2: Real, tmp_path: Path) -> None:
    text = page.PAGE.replace('"tiny-gemma2"', repr(smollm2.folder))
    text = text.replace(
        'text="EN: the red cat sees the dog. FR:", answer="le", wrong="la"',
        'text="The capital of France is", answer="Paris", wrong="Rome"',
    )
    # Fewer prompts and steps, for time.
    for whole, short in {
        "[:20]": "[:3]", "[:16]": "[:4]", "slice(16)": "slice(4)", "slice(16, 32)": "slice(4, 8)", "range(20)": "range(2)",
        "ioi[:8]": SAME_LENGTH,
    }.items():  # fmt: skip
        assert whole in text
        text = text.replace(whole, short)
    names = page.run_page(text, tmp_path)
    for check in page.CHECKS:
        check(names)

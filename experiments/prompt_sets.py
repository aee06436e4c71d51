"""The prompt sets that ship, by name: what every study's --dataset takes; and the pairs of texts that patching studies run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import n_positions
from pyvene_ext.methods.patching.patch import corresponding
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.tokenized import Answers, TokenizedPrompts

PROMPTS = Path(__file__).parent / "prompts"


def find_prompts(dataset: str) -> str | Path:
    """A shipped set's file by its name; anything else as it is. A near miss of a shipped name is not sought on the hub."""
    shipped = {path.stem: path for path in PROMPTS.glob("*.*") if path.suffix in (".json", ".tsv")}
    close = difflib.get_close_matches(dataset, shipped, n=1, cutoff=0.75)
    if dataset not in shipped and close and not Path(dataset).exists():
        raise ValueError(f"there is no prompt set {dataset!r}; did you mean {close[0]!r}?")
    return shipped.get(dataset, dataset)


def both_texts(
    prompt_set: PromptSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Answers = "first_token"
) -> tuple[TokenizedPrompts, TokenizedPrompts]:
    """The clean and the corrupt texts as tokens."""
    longest = n_positions(model.config)
    clean, corrupt = (prompt_set.tokenize(tokenizer, text, answers, longest) for text in ("clean", "corrupt"))
    return clean, corrupt


def patchable(
    clean: TokenizedPrompts, corrupt: TokenizedPrompts, names: Sequence[str], dataset: str, positions: str
) -> tuple[TokenizedPrompts, TokenizedPrompts, list[int], list[int]]:
    """The pairs that correspond at these names (`patching.corresponding`), which they are, and which are left out.

    Raises ValueError if there are too few for an interval.
    """
    n = len(clean)
    clean, corrupt, kept = corresponding(clean, corrupt, names)
    dropped = sorted(set(range(n)) - set(kept))
    if n < 2:
        raise ValueError(f"{dataset} gives {n} pair; an interval over pairs needs two or more.")
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} of {n} pairs of {dataset} can be patched at --positions {positions} and {len(dropped)} cannot, because "
            "their texts differ in number of tokens; an interval over pairs needs two: use --positions last, or texts of equal "
            "length."
        )
    return clean, corrupt, kept, dropped

"""Write our cards, or fixes of pyvene, into a checkout of pyvene, ready for a pull request.

    python -m modelcards.export --to ~/pyvene --family qwen3 > card.md      # one family per pull request
    python -m modelcards.export --to ~/pyvene --all > cards.md              # every card
    python -m modelcards.export --to ~/pyvene --fixes 9 > fix.md            # one fix; without a number all that apply

Files are changed in the checkout; nothing is committed, and nothing else is touched. Standard output is the text of the pull
request, with what the checks gave; standard error says what was written. Doing it twice changes nothing.

Everything is made from what is committed in the checkout, and what that pyvene can do is found out by running it. Before anything
is written, the new unit tests and the checkout's own suite run on a copy; a new test that fails, or another that no longer
passes, stops the export. A checkout with other uncommitted changes is refused, so commit one pull request before making the next.

Cards go into `pyvene/models/<family>/`, the lines that register them into `intervenable_modelcard.py`, the line that exports
`create_<family>` into `pyvene/__init__.py`, tests into `tests/integration_tests`. In a family that upstream has, entries are
added and corrected, and every other line stays. The files need nothing but pyvene. Left out, and named in the file and the text,
is what no module of transformers outputs: attention's inside, contributions of heads, capped logits. To have them, pyvene would
have to add modules to a model while it runs, as our `Taps` do; that would be a new part of pyvene, not a card.

Merge two fixes before cards. With fix 2, cards give the width of projections whose heads x head size is not the hidden size,
which trainable interventions need. With fix 15, pyvene edits a copy, and cards include inputs of attention and MLP that another
module reads as well.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from modelcards import CARDS, Card
from modelcards.export.cards import Exported, export
from modelcards.export.checkout import Checkout, Files
from modelcards.export.fixes import FIXES, chosen, fixed

_TEXT = """[P1] Model card{s} of {names}

## Description

Where each component of {names} is, for the bare, the language-model and, where there is one, the classifier class. What was there
keeps its name.

{notes}
## Testing Done

Every component was read, set to zero and interchanged, at other positions and heads in every example, on tiny random models, and
compared with plain torch hooks; rotations were trained on every component that has a width; blocks were checked to be the sum of
their parts. No test needs a hub.
`python -m unittest discover -p '*ModelCardTestCase.py'` at {commit}, Python {python}, torch {torch}, transformers {transformers}:

| class | components | checks | largest difference |
|---|---|---|---|
{rows}"""

_CHECKLIST = """
## Checklist:

- [x] My PR title strictly follows the format: `[Your Priority] Your Title`
- [x] I have attached the testing log above
- [x] I provide enough comments to my code
- [ ] I have changed documentations
- [x] I have added tests for my changes"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    asked = _parser().parse_args(arguments)
    try:
        checkout = Checkout(asked.to)
        if asked.fixes is None:
            exported, files = export(checkout, _cards(asked.family))
            checkout.check_clean(files)
            checks, suite = checkout.try_out(files, [one.test for one in exported])
            text = card_text(checkout, exported, checks)
        else:
            texts, files = fixed(checkout, chosen(asked.fixes))
            checkout.check_clean(files)
            _, suite = checkout.try_out(files, [path for path in files if path.startswith("tests/")])
            text = "\n\n".join(f"{title}\n\n{body.strip()}" for title, body in texts)
        _say(checkout, files)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{text}\n\n{suite}\n{_CHECKLIST}")
    return 0


def _parser() -> argparse.ArgumentParser:
    fixes = "\n".join(f"  {' and '.join(map(str, fix.numbers))}: {fix.title}" for fix in FIXES)
    parser = argparse.ArgumentParser(
        prog="python -m modelcards.export",
        description=__doc__,
        epilog=f"fixes:\n{fixes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a checkout of pyvene")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--family", nargs="+", metavar="NAME", help="cards of these families; one a pull request is best")
    what.add_argument("--all", action="store_true", help="the cards of all families")
    what.add_argument("--fixes", nargs="*", type=int, metavar="N", help="fixes instead of cards; all if none is named")
    return parser


def _cards(families: list[str] | None) -> list[Card]:
    known = {card.family: card for card in CARDS}
    if unknown := [family for family in families or () if family not in known]:
        raise ValueError(f"there is no card of {unknown[0]}; there are {', '.join(known)}.")
    return [known[family] for family in dict.fromkeys(families or known)]


def _say(checkout: Checkout, files: Files) -> None:
    written = checkout.write(files)
    for path in written:
        print(f"written: {path}", file=sys.stderr)
    if not written:
        print(f"{checkout.root} has all of it already: nothing written.", file=sys.stderr)


def card_text(checkout: Checkout, exported: list[Exported], checks: list[list[Any]]) -> str:
    """Write the title and text of a pull request of cards.

    Args:
        checkout: where they go.
        exported: the cards.
        checks: what their tests compared: class, component, unit, operation, largest difference.

    Returns:
        Markdown, the title in its first line.
    """
    rows = []
    for name in (model_class.__name__ for one in exported for model_class in one.names):
        components, differences = zip(*((check[1], check[4]) for check in checks if check[0] == name), strict=True)
        rows.append(f"| `{name}` | {len(set(components))} | {len(differences)} | {max(differences):.1e} |")
    return _TEXT.format(
        s="s" * (len(exported) > 1),
        names=", ".join(one.card.name for one in exported),
        notes="".join(f"{note}\n" for one in exported for note in _notes(one)),
        commit=checkout.commit,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        rows="\n".join(rows),
    )


def _notes(one: Exported) -> list[str]:
    """Say what a card lacks, and why, and what it changes beside the mappings."""
    notes = []
    if one.stale:
        notes.append(
            f"- {one.card.name}: `create_{one.card.name}` loads by default `{one.card.checkpoint}`, for which the card was made; "
            f"`{one.stale}` looks stale."
        )
    for why in dict.fromkeys(one.left_out.values()):
        components = [f"`{component}`" for component, reason in one.left_out.items() if reason == why]
        notes.append(f"- {one.card.name}: left out, as {why}: {', '.join(components)}.")
    if one.kept:
        notes.append(
            f"- {one.card.name}: as they were, and not checked: {', '.join(f'`{name}`' for name in one.kept)}."
        )
    if one.widths.missing:
        components = [f"`{component}`" for component in one.widths.missing]
        notes.append(
            f"- {one.card.name}: without a width, as this pyvene cannot spell the right one; read and edited whole, but not by "
            f"trainable interventions: {', '.join(components)}."
        )
    if one.widths.by_default:
        components = [f"`{component}`" for component in one.widths.by_default]
        notes.append(
            f"- {one.card.name}: with a width that is right for heads of the default config's size and number, as this pyvene "
            f"cannot spell others: {', '.join(components)}."
        )
    return notes


if __name__ == "__main__":
    sys.exit(main())

"""Progress bars and summaries on stderr: made here, so that one call silences all of them.

    px.progress(False)            # from here on nothing is shown
    with px.progress(False):      # only inside
        ...

In a notebook a bar is removed once it is full, so that a call leaves one line. In Jupyter with ipywidgets bars are widgets.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from tqdm import tqdm

_shown = True


class progress:
    """Show or silence the progress bars and summaries of all functions, whatever their argument `progress` is.

    The call takes effect at once; in a `with` statement it is undone at the end.

    Args:
        shown: False silences, True shows them again.

    Raises:
        ValueError: `shown` is neither.
    """

    def __init__(self, shown: bool) -> None:
        if not isinstance(shown, bool):
            raise ValueError(f"progress takes True, which shows bars, or False, which silences them, not {shown!r}.")
        global _shown
        self._before, _shown = _shown, shown

    def __enter__(self) -> progress:
        return self

    def __exit__(self, *_: object) -> None:
        global _shown
        _shown = self._before

    def __repr__(self) -> str:
        return f"progress bars and summaries are {'shown' if _shown else 'silenced'}"


def is_shown() -> bool:
    """Whether bars and summaries are shown, unless a call's own `progress` is False."""
    return _shown


def progress_bar(total: float, unit: str, desc: str | None = None, *, shown: bool = True, **options: Any) -> tqdm:
    """Make a progress bar.

    Args:
        total: of what is counted.
        unit: what is counted.
        desc: what is done.
        shown: False makes one that shows nothing.
        **options: further arguments of tqdm.

    Returns:
        The bar, a context manager.
    """
    leave = not in_notebook()
    return _kind()(total=total, unit=unit, desc=desc, disable=not (shown and _shown), leave=leave, **options)


def note(text: str, *, shown: bool = True, in_notebooks: bool = True) -> None:
    """Write a summary to stderr, above bars that are running.

    Args:
        text: one or more lines.
        shown: False writes nothing.
        in_notebooks: False writes nothing there, where the lines would stay after the work is done.
    """
    if shown and _shown and (in_notebooks or not in_notebook()):
        tqdm.write(text, file=sys.stderr)


def in_notebook() -> bool:
    """Whether the program runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and "IPKernelApp" in getattr(ipython.get_ipython(), "config", ())


def _kind() -> type[tqdm]:
    """The bar that suits the place: a widget in a notebook that can show one."""
    if not in_notebook():
        return tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no widgets: a bar of text will do
        from tqdm.auto import tqdm as auto
    return auto

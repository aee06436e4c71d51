"""Tables of a page: sorted by a click on a heading, numbers with their intervals; and what can be folded away."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pyvene_ext.report.run import Row, columns


def table(rows: Sequence[Row]) -> str:
    """Render a table that sorts when a heading is clicked.

    Args:
        rows: cells as text.

    Returns:
        HTML. Numbers are shown with their intervals and sort by value.
    """
    shown = columns(rows)
    head = "".join(f"<th>{html.escape(column.title)}</th>" for column in shown)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-is="{html.escape(row[c.name])}">{html.escape(c.cell(row))}</td>' for c in shown)
        + "</tr>"
        for row in rows
    )
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="sortable">{inner}</table></div>'


def folded(title: str, inner: str) -> str:
    """Render what a click on its title unfolds; `inner` is HTML already."""
    return f"<details><summary>{html.escape(title)}</summary>{inner}</details>"


# Numbers sort as numbers and before words; a second click reverses the order.
SORT = """
for (const th of document.querySelectorAll("table.sortable th")) th.onclick = () => {
  const body = th.closest("table").tBodies[0], column = th.cellIndex;
  const down = th.dataset.down = th.dataset.down === "1" ? "0" : "1";
  const key = row => row.cells[column].dataset.is;
  const order = (a, b) => {
    const [x, y] = [Number(a || NaN), Number(b || NaN)];
    return isNaN(x) - isNaN(y) || (isNaN(x) ? a.localeCompare(b) : (x - y) * (down === "1" ? -1 : 1));
  };
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
};
"""

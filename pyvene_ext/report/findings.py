"""What a run found, in sentences: its question, its strongest effects with intervals and controls, its verdicts."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pyvene_ext.report.run import Column, Row, Run, columns, number
from pyvene_ext.report.tables import folded
from pyvene_ext.runs.facts import Evidence

STRONGEST = 3


class Rivals(NamedTuple):
    """The table that an effect is a row of.

    Attributes:
        rows: its rows.
        column: the column of the effect.
        row: the effect's row.
    """

    rows: Sequence[Row]
    column: Column
    row: Row


def findings(run: Run) -> Iterator[str]:
    """Render the findings of a run.

    Args:
        run: the run.

    Yields:
        HTML.

    Raises:
        ValueError: what the summary states is not evidence.
    """
    asked, setting = (html.escape(words) for words in (" ".join(run.questions), _setting(run)))
    if asked or setting:
        yield f'<p class="asked"><b>{asked}</b> {setting}</p>'
    first, more = strongest(run)
    if first:
        yield f'<ol class="findings">{"".join(f"<li>{html.escape(line)}</li>" for line in first)}</ol>'
    if more:
        yield folded(f"{len(more)} more", f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in more)}</ul>")
    yield "".join(f'<p class="verdict">{html.escape(line)}</p>' for line in run.verdicts)


def strongest(run: Run) -> tuple[list[str], list[str]]:
    """Put the strongest effects into sentences: those that the study states, then the next in the table of the first.

    Args:
        run: the run.

    Returns:
        Three sentences, or as many as there are; and those of further effects that the study states.
    """
    lines = [stated(evidence) for evidence in run.evidence]
    if lines and len(lines) < STRONGEST and (found := rivals(run, run.evidence[0])):
        taken = [of.row for evidence in run.evidence if (of := rivals(run, evidence)) and of.rows is found.rows]
        lines += following(found, taken, run.evidence[0], STRONGEST - len(lines))
    return lines[:STRONGEST], lines[STRONGEST:]


def leading(run: Run) -> str:
    """The column of the first effect that the study states; "" if it is in no table."""
    found = next(filter(None, (rivals(run, evidence) for evidence in run.evidence)), None)
    return found.column.name if found else ""


def stated(evidence: Evidence) -> str:
    """A study's evidence as a sentence."""
    measured = evidence.measured
    if measured.partition(" ")[0].isalpha():  # and not a name, such as z.0.1
        measured = measured[:1].upper() + measured[1:]
    return f"{measured} ({evidence.sample}). Control: {evidence.control}. To sharpen it: {evidence.sharpen}."


def rivals(run: Run, evidence: Evidence) -> Rivals | None:
    """Find the table and column that an effect is from, by its numbers.

    Args:
        run: the run.
        evidence: the effect.

    Returns:
        The table; None if the numbers are in none.
    """
    if evidence.interval is None:
        return None
    mean, low, high = map(float, evidence.interval)
    for rows in run.tables.values():
        for column in (column for column in columns(rows) if column.measures and (column.ends or column.error)):
            for row in rows:
                ends = tuple(number(row[end]) for end in column.ends) if column.ends else (low, high)
                if _same(number(row[column.name]), mean) and _same(ends[0], low) and _same(ends[1], high):
                    return Rivals(rows, column, row)
    return None


def following(found: Rivals, taken: Sequence[Row], evidence: Evidence, n: int) -> list[str]:
    """Put the rows with the largest numbers after those already told into sentences.

    Args:
        found: the table.
        taken: rows that are told already.
        evidence: that of the table's first effect.
        n: how many sentences.

    Returns:
        The sentences, the last with the median of the column as what they compare with.
    """
    null, column = evidence.null or 0.0, found.column
    known = [row for row in found.rows if math.isfinite(number(row[column.name]))]
    rest = sorted((row for row in known if row not in taken), key=lambda row: -abs(number(row[column.name]) - null))
    lines = []
    for row in rest[:n]:
        words = f"{_label(row)}: {column.name} {column.cell(row)}"
        if column.ends and evidence.null is not None:
            low, high = (number(row[end]) for end in column.ends)
            words += f", not told apart from {null:g}" if low <= null <= high else ""
        lines.append(f"{words}.")
    if lines:
        middle = float(np.median([abs(number(row[column.name])) for row in known]))
        lines[-1] += f" Of all {len(known)} the median |{column.name}| is {middle:.2g}."
    return lines


def _setting(run: Run) -> str:
    """Of what model and data, and how much."""
    found = []
    for record in run.records:
        model, data, n = (record.get(name) for name in ("model", "dataset", "n"))
        words = [str(model)] if isinstance(model, str) else []
        words += [f"on {data}"] if isinstance(data, str) else []
        words += [f"(n = {n})"] if isinstance(n, int) else []
        found.append(" ".join(words))
    return "; ".join(dict.fromkeys(filter(None, found)))


def _label(row: Row) -> str:
    """What a row is of: a head, else its first word."""
    if named := next(filter(None, map(row.get, ("path", "patch", "edge"))), None):
        return named
    if row.get("layer", "").isdecimal() and row.get("head", "").isdecimal():
        words = [cell for name, cell in row.items() if name in ("pair", "model")]
        return " ".join([*words, f"{row['layer']}.{row['head']}"])
    return next((cell for cell in row.values() if not math.isfinite(number(cell)) and cell), "a row")


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))

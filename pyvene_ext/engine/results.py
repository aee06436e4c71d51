"""Results: the metric by intervention and prompt, with a summary, a table and a plot.

    result = run(model, specs, prompts)
    result                    # the strongest effects
    result.to_frame()         # one row per intervention and prompt, for pandas
    result.plot()             # a map of heads, of layers and positions, or bars

All results of this package have these three, whatever they hold (`Shown`).
"""

from __future__ import annotations

import html
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Num

from pyvene_ext.io.errors import counted
from pyvene_ext.specs.base import SiteEdit
from pyvene_ext.specs.joint import Spec
from pyvene_ext.specs.path import PathPatch
from pyvene_ext.stats.intervals import Interval, student_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TOP = 5  # effects in a repr


class Summary(NamedTuple):
    """What `repr` and `plot` show of a result.

    Attributes:
        title: what it is, and how much of it.
        columns: the head of a small table.
        rows: its few rows.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Shown(ABC):
    """A result that can be read: as a pandas table, as a few lines, as a small HTML table in a notebook, and as a figure."""

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """Convert to a table.

        Returns:
            One row for each value, with columns that say where it belongs.
        """

    @abstractmethod
    def summarise(self) -> Summary:
        """Select what `repr` shows.

        Returns:
            A title and a few rows.
        """

    def plot(self, **options: Any) -> Figure:
        """Draw the figure of `pyvene_ext.runs.figures` that fits (see `pyvene_ext.plot` for which).

        Args:
            **options: those of `pyvene_ext.plot` for this kind of result.

        Returns:
            The figure, which `pyvene_ext.figures.save` writes.
        """
        # Figures come after results in the order of rooms, and matplotlib takes a second: found by name, when it is asked for.
        return importlib.import_module("pyvene_ext.runs.plotting").plot(self, **options)

    def __repr__(self) -> str:
        title, columns, rows = self.summarise()
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if not at else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (columns, *rows)
        ]
        return "\n".join([title, *("  " + line.rstrip() for line in lines if rows)])

    def _repr_html_(self) -> str:
        title, columns, rows = self.summarise()

        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in rows)
        paragraph = html.escape(title).replace("\n", "<br>")
        return f"<p>{paragraph}</p><table><thead>{row(columns, 'th')}</thead><tbody>{body}</tbody></table>"


def table(axes: Mapping[str, Sequence[Any]], columns: Mapping[str, Num[np.ndarray, "*axis"]]) -> pd.DataFrame:
    """Make a table of arrays: one row per entry.

    Args:
        axes: the labels along each axis, by name.
        columns: arrays of these axes, by name.

    Returns:
        One column per axis, then one an array.
    """
    import pandas as pd

    shape = tuple(map(len, axes.values()))
    rows: dict[str, Any] = {}
    for at, (name, labels) in enumerate(axes.items()):
        by_axis = np.asarray(labels).reshape([-1 if other == at else 1 for other in range(len(shape))])
        rows[name] = np.broadcast_to(by_axis, shape).ravel()
    return pd.DataFrame(rows | {name: np.asarray(values).reshape(-1) for name, values in columns.items()})


def strongest(values: Float[np.ndarray, " item"], n: int = TOP) -> Int[np.ndarray, " top"]:
    """Find the items with the largest values in magnitude.

    Args:
        values: one number per item; those that are not finite are left out.
        n: how many.

    Returns:
        Their indices, the largest first.
    """
    order = np.argsort(-np.abs(np.where(np.isfinite(values), values, 0)), kind="stable")
    return order[np.isfinite(values[order])][:n]


def three_digits(value: float) -> str:
    """Write a number with three digits; "-" for NaN."""
    return "-" if np.isnan(value) else f"{value:.3g}"


def ends_text(low: float, high: float) -> str:
    """Write an interval; "-" if it has no ends."""
    return "-" if np.isnan(low) else f"[{low:.3g}, {high:.3g}]"


def strongest_rows(
    values: Float[np.ndarray, " item"], name: Callable[[int], str], intervals: Callable[[np.ndarray], Interval]
) -> list[tuple[str, str, str]]:
    """Make the rows of a summary: the items with the largest values in magnitude.

    Args:
        values: one number per item.
        name: of an item, by its index.
        intervals: of some items, by their indices.

    Returns:
        Name, value and interval ("-" if there is none) of each.
    """
    top = strongest(values)
    _, lows, highs = intervals(top)
    ends = map(ends_text, lows, highs)
    return [(name(i), three_digits(values[i]), end) for i, end in zip(top.tolist(), ends, strict=True)]


count = partial(counted, grouped=True)  # in titles


class EditLocation(NamedTuple):
    """Where an intervention edits; a part that its edits do not share is None.

    Attributes:
        site: the site; of a path, the sender's.
        layer: the layer; None for several, and for embed, which has none.
        head: the head; None for several, and for sites without heads.
        position: the positions, joined by commas.
        receivers: of a path, joined by plus signs.
    """

    site: str | None
    layer: int | None
    head: int | None
    position: str | None
    receivers: str | None = None

    @classmethod
    def of(cls, spec: Spec | PathPatch) -> EditLocation:
        """Find the place of an intervention."""
        if isinstance(spec, PathPatch):
            return cls.of(spec.sender_patch)._replace(receivers="+".join(spec.receivers))
        edits = (spec,) if isinstance(spec, SiteEdit) else spec

        def shared(values: Iterable[Any]) -> Any:
            found = set(values)
            return found.pop() if len(found) == 1 else None

        heads = shared(edit.heads for edit in edits)
        positions = shared(edit.positions for edit in edits)
        return cls(
            shared(edit.site for edit in edits),
            shared(edit.layer for edit in edits),
            heads[0] if heads and len(heads) == 1 else None,
            positions if positions is None or isinstance(positions, str) else ",".join(map(str, positions)),
        )


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """The effect of a list of interventions on every prompt.

    Attributes:
        names: the interventions' names (`spec_name`).
        metric: name of the metric. One with a value per token of a prompt has them along the last axis, from each prompt's first
            token on, and NaN after the end of shorter prompts.
        baseline: the metric of the untouched run of these prompts, whatever they are.
        intervened: the metric under each intervention.
        specs: the interventions themselves; empty if unknown.
        note: what `repr` says besides, such as that the metric reads only the first tokens of longer answers.
    """

    names: tuple[str, ...]
    metric: str
    baseline: Float32[np.ndarray, " n_prompts *pos"]
    intervened: Float32[np.ndarray, "n_interventions n_prompts *pos"]
    specs: tuple[Any, ...] = field(default=(), kw_only=True)
    note: str = field(default="", kw_only=True)

    @property
    def delta(self) -> Float32[np.ndarray, "n_interventions n_prompts *pos"]:
        """Baseline minus intervened: positive where the intervention lowered the metric."""
        return self.baseline - self.intervened

    @cached_property
    def mean_delta(self) -> Float[np.ndarray, " n_interventions"]:
        """The mean of `delta` over prompts (and each prompt's tokens); values of what was not run, NaN, are left out."""
        return finite_mean(by_prompt(self.delta), -1)

    @cached_property
    def places(self) -> tuple[EditLocation, ...]:
        """Where each intervention edits; empty if `specs` is."""
        return tuple(map(EditLocation.of, self.specs))

    @property
    def effect(self) -> tuple[str, Float[np.ndarray, " n_interventions"]]:
        """What `repr` and `plot` show: its name, and one number per intervention."""
        return "mean delta", self.mean_delta

    def effect_interval(self, some: Sequence[int] | Int[np.ndarray, " some"]) -> Interval:
        """Compute 95% intervals (Student's t over prompts) of what `repr` and `plot` show.

        Args:
            some: indices of interventions.

        Returns:
            The means and their intervals.
        """
        return student_interval(by_prompt(self.baseline - self.intervened[list(some)]))

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per intervention and prompt (and token, for a metric with a value per token).

        Returns:
            A table with the columns intervention (its name), site, layer, head, position (the positions that are edited), prompt
            (its number in the result, from 0), token (its number, for a token metric), baseline, intervened and delta. Where an
            intervention has several sites, layers, heads or choices of positions, that column has a missing value; so have layer
            and head where a site has none. A path has its sender's place, and its receivers in one more column. Tokens without a
            value, such as those after a prompt's end, have no row.
        """
        import pandas as pd  # takes a second to import, and most runs need no table

        shape = self.intervened.shape
        axes = dict(zip(("intervention", "prompt", "token"), map(range, shape), strict=False))
        baseline = np.broadcast_to(self.baseline, shape)
        values = table(axes, {"baseline": baseline, "intervened": self.intervened, "delta": self.delta})
        if "token" in axes:
            values = values.dropna(subset="baseline", ignore_index=True)
        places = self._interventions().iloc[values.pop("intervention")].reset_index(drop=True)
        return pd.concat([places, values], axis=1)

    def _interventions(self) -> pd.DataFrame:
        """One row per intervention: its name and place."""
        import pandas as pd

        places = self.places or (EditLocation(None, None, None, None),) * len(self.names)
        columns = dict(zip(EditLocation._fields, zip(*places, strict=True), strict=True))
        found = pd.DataFrame({"intervention": self.names, **columns}).astype({"layer": "Int64", "head": "Int64"})
        return found if any(place.receivers for place in places) else found.drop(columns="receivers")

    def summarise(self) -> Summary:
        """The interventions with the largest effects, and their 95% intervals."""
        what, values = self.effect
        rows = strongest_rows(values, self.names.__getitem__, self.effect_interval)
        title = f"{self._title}\n{self.note}" if self.note else self._title
        return Summary(title, ("strongest", what, "95% interval"), rows)

    @property
    def _title(self) -> str:
        size = f"{count(len(self.names), 'intervention')} x {count(len(self.baseline), 'prompt')}"
        return f"{type(self).__name__} of {self.metric}: {size}; baseline {three_digits(finite_mean(self.baseline))}"


def finite_mean(values: Float[np.ndarray, "*any"], axis: int | None = None) -> Any:
    """The mean of the values that are finite, along an axis or of all; NaN where none is."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = values.mean(axis, dtype=np.float64)
        if np.isfinite(mean).all():  # the usual case, ten times as fast
            return mean
        finite = np.isfinite(values)
        return np.where(finite, values, 0).sum(axis, dtype=np.float64) / finite.sum(axis)


def by_prompt(values: Float[np.ndarray, "item prompt *pos"]) -> Float[np.ndarray, "item prompt"]:
    """Average values of tokens over each prompt's tokens; values of prompts stay as they are."""
    return values if values.ndim == 2 else finite_mean(values, -1)

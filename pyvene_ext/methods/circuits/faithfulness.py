"""Faithfulness of circuits, of each and by size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int

from pyvene_ext.engine.results import Shown, Summary, count, ends_text, finite_mean, table, three_digits
from pyvene_ext.io.seeds import rng
from pyvene_ext.stats.intervals import Interval, ratio_of_means

if TYPE_CHECKING:
    import pandas as pd

Scale = Literal["log", "linear"]
SHOWN = 8  # circuits in a repr
COLUMNS = ("faithfulness", "95% interval")


@dataclass(frozen=True, repr=False)
class CircuitRuns(Shown):
    """The metric of every base prompt under circuits.

    Attributes:
        metric: its name.
        clean: on the base prompts, which is the full circuit.
        empty: under the empty circuit, all of whose edges are ablated; by patching, on the source prompts, read with the base
            prompts' answers.
        circuits: under each circuit.
    """

    metric: str
    clean: Float32[np.ndarray, " prompt"]
    empty: Float32[np.ndarray, " prompt"]
    circuits: Float32[np.ndarray, "circuit prompt"]

    @property
    def faithfulness(self) -> Float[np.ndarray, " circuit"]:
        """(mean of circuit - mean of empty) / (mean of clean - mean of empty): 0 is the empty circuit, 1 the full one.

        Values below 0 and above 1 are possible. NaN if clean and empty have the same mean. Marks et al. 2024.
        """
        clean, empty, circuits = (x.mean(-1, dtype=np.float64) for x in (self.clean, self.empty, self.circuits))
        if clean == empty:
            return np.full_like(circuits, np.nan)
        return (circuits - empty) / (clean - empty)

    def interval(self, seed: int = 0, n_resamples: int = 2000) -> Interval:
        """Compute faithfulness with percentile bootstrap 95% intervals over prompts.

        A resample takes the same prompts of all runs. The circuit stays fixed: if it was chosen on these prompts, the intervals
        do not hold for new ones.

        Args:
            seed: of the resampling.
            n_resamples: number of resamples.

        Returns:
            Arrays " circuit".
        """
        if self.clean.mean(dtype=np.float64) == self.empty.mean(dtype=np.float64):
            return Interval(*np.full((3, len(self.circuits)), np.nan))
        clean, empty, circuits = (x.astype(np.float64) for x in (self.clean, self.empty, self.circuits))
        return ratio_of_means(circuits - empty, clean - empty, rng(seed, "faithfulness"), n_resamples)

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per circuit and prompt.

        Returns:
            A table with the columns circuit (its number, from 0), prompt, clean, empty, and value: the metric under the circuit.
        """
        clean, empty = (np.broadcast_to(values, self.circuits.shape) for values in (self.clean, self.empty))
        axes = dict(zip(("circuit", "prompt"), map(range, self.circuits.shape), strict=True))
        return table(axes, {"clean": clean, "empty": empty, "value": self.circuits})

    def summarise(self) -> Summary:
        """Faithfulness of the first circuits, with bootstrap 95% intervals over prompts."""
        rows = [(str(number), *cells) for number, cells in enumerate(self.rows(range(len(self.circuits))[:SHOWN]))]
        title = f"CircuitRuns: {count(len(self.circuits), 'circuit')}, {self.size}"
        return Summary(title, ("circuit", *COLUMNS), rows)

    def rows(self, some: Sequence[int]) -> list[tuple[str, str]]:
        """Write faithfulness and interval of some circuits.

        Args:
            some: their numbers.

        Returns:
            The cells of each row.
        """
        values = replace(self, circuits=self.circuits[list(some)]).interval()
        return [(three_digits(mean), ends_text(low, high)) for mean, low, high in zip(*values, strict=True)]

    @property
    def size(self) -> str:
        """How many prompts, and the means between which faithfulness runs from 0 to 1."""
        means = f"clean {three_digits(finite_mean(self.clean))}, empty circuit {three_digits(finite_mean(self.empty))}"
        return f"{count(len(self.clean), 'prompt')}; mean {self.metric}: {means}"


@dataclass(frozen=True, repr=False)
class Curve(Shown):
    """Faithfulness by size of the circuit.

    Attributes:
        sizes: numbers of edges (or nodes) before pruning, ascending.
        n_edges: numbers of edges after pruning, which were run.
        shares: the sizes as shares of all edges (or nodes) of the model.
        runs: the metric of every prompt under the circuit of each size.
        random: the metric under random circuits of each size; none by default.
    """

    sizes: Int[np.ndarray, " size"]
    n_edges: Int[np.ndarray, " size"]
    shares: Float[np.ndarray, " size"]
    runs: CircuitRuns
    random: Float32[np.ndarray, "size circuit prompt"] | None = None

    @property
    def values(self) -> Float[np.ndarray, " size"]:
        """Faithfulness of each size."""
        return self.runs.faithfulness

    @property
    def random_values(self) -> Float[np.ndarray, "size circuit"]:
        """Faithfulness of the random circuits of each size."""
        if self.random is None:
            return np.empty((len(self.sizes), 0))
        together = replace(self.runs, circuits=self.random.reshape(-1, self.random.shape[-1]))
        return together.faithfulness.reshape(self.random.shape[:2])

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per size, circuit and prompt.

        Returns:
            A table with the columns size, n_edges (of the chosen circuit), circuit ("chosen", or "random 0" and so on), prompt,
            clean, empty, and value: the metric under the circuit.
        """
        values = self.runs.circuits[:, None]
        if self.random is not None:
            values = np.concatenate([values, self.random], 1)
        names = ["chosen", *(f"random {number}" for number in range(values.shape[1] - 1))]
        clean, empty = (np.broadcast_to(those, values.shape) for those in (self.runs.clean, self.runs.empty))
        axes: dict[str, Any] = {"size": self.sizes, "circuit": names, "prompt": range(values.shape[2])}
        found = table(axes, {"clean": clean, "empty": empty, "value": values})
        found.insert(1, "n_edges", self.n_edges.repeat(values[0].size))
        return found

    def summarise(self) -> Summary:
        """Faithfulness at some sizes, with bootstrap 95% intervals over prompts, and the mean of random circuits."""
        some = np.unique(np.linspace(0, len(self.sizes) - 1, SHOWN).round().astype(int)).tolist()
        chance = [(three_digits(mean),) for mean in self.random_values.mean(1)] if self.random_values.size else None
        rows = [
            (str(self.sizes[at]), str(self.n_edges[at]), *cells, *(chance[at] if chance else ()))
            for at, cells in zip(some, self.runs.rows(some), strict=True)
        ]
        columns = ("edges", "pruned to", *COLUMNS, *(["random circuits"] if chance else []))
        return Summary(f"Curve: {self.runs.size}", columns, rows)

    def area(self, scale: Scale = "log") -> float:
        """Area under the curve by the trapezoidal rule, divided by the width of its range.

        It is the mean faithfulness along the axis: 1 for circuits as faithful as the model at every size. On the linear axis
        large circuits dominate, as in `cpr`; on the logarithmic one each doubling counts the same.

        Args:
            scale: integrate over log(size) or over size.

        Returns:
            The normalised area.

        Raises:
            ValueError: there are fewer than two sizes, or size 0 on the logarithmic scale.
        """
        if scale not in ("log", "linear"):
            raise ValueError(f"scale must be 'log' or 'linear', not {scale!r}.")
        if len(self.sizes) < 2:
            raise ValueError("an area needs two sizes or more.")
        if scale == "log" and self.sizes[0] == 0:
            raise ValueError("size 0 has no place on a logarithmic scale; leave it out, or use scale='linear'.")
        x = np.log(self.sizes) if scale == "log" else self.sizes.astype(float)
        return float(np.trapezoid(self.values, x) / (x[-1] - x[0]))

    def cpr(self) -> float:
        """Compute the integrated circuit performance ratio: the area under faithfulness over the share of the edges kept.

        Mueller et al. (2025), section 3.2, by the trapezoidal rule between the smallest and the largest share, as in their code.
        Higher is better. Where it has MIB's shares, 0.1% to 100%, a circuit that is as faithful as the model at every size has
        0.999; above that are circuits that do the task better than the model.

        Returns:
            The area; NaN if clean and empty circuit have the same mean.

        Raises:
            ValueError: there are fewer than two sizes.
        """
        return self._area(self.values)

    def cmd(self) -> float:
        """Compute the integrated circuit-model distance: the area between faithfulness and 1 over the share of the edges kept.

        Mueller et al. (2025), section 3.2, by the trapezoidal rule on |1 - faithfulness|, as in their code. 0 is best.

        Returns:
            The area; NaN if clean and empty circuit have the same mean.

        Raises:
            ValueError: there are fewer than two sizes.
        """
        return self._area(np.abs(1 - self.values))

    def areas(self, seed: int = 0, n_resamples: int = 2000) -> dict[str, Interval]:
        """Compute CPR and CMD with percentile bootstrap 95% intervals over prompts.

        Args:
            seed: of the resampling.
            n_resamples: number of resamples.

        Returns:
            "cpr" and "cmd", of 0-dimensional arrays. The interval of CMD is biased upwards where circuits are as faithful as the
            model, as distances cannot be negative. Resamples in which clean and empty have the same mean are left out.
        """
        n = len(self.runs.clean)
        drawn = rng(seed, "areas").multinomial(n, np.full(n, 1 / n), n_resamples) / n
        of = {name: drawn @ getattr(self.runs, name).astype(np.float64).T for name in ("clean", "empty", "circuits")}
        gap = (of["clean"] - of["empty"])[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            values = (of["circuits"] - of["empty"][:, None]) / gap
        values = values[gap[:, 0] != 0] if gap.any() else values
        found = {}
        for name, mean, drawn_areas in (
            ("cpr", self.cpr(), self._area(values)),
            ("cmd", self.cmd(), self._area(np.abs(1 - values))),
        ):
            found[name] = Interval(np.array(mean), *np.quantile(drawn_areas, (0.025, 0.975)))
        return found

    def table(self) -> list[dict[str, float]]:
        """List the sizes with faithfulness and its bootstrap 95% interval over prompts, as rows of a table."""
        columns = (self.shares, self.sizes, self.n_edges, *self.runs.interval())
        names = ("share", "n", "n_edges", "faithfulness", "low", "high")
        return [
            dict(zip(names, (np.asarray(x).item() for x in row), strict=True)) for row in zip(*columns, strict=True)
        ]

    def _area(self, values: Float[np.ndarray, "*draw size"]) -> Any:
        if len(self.sizes) < 2:
            raise ValueError("an area needs two sizes or more.")
        return np.trapezoid(values, self.shares, axis=-1)


def areas_row(by_value: Curve, by_magnitude: Curve, seed: int = 0) -> dict[str, float]:
    """Compute CPR and CMD, each of the curve that Mueller et al. (2025) take it from.

    Args:
        by_value: of circuits of the highest scores, for CPR.
        by_magnitude: of those of the largest magnitude, for CMD.
        seed: of the bootstrap.

    Returns:
        A row of a table: cpr, cpr_low, cpr_high, and so on.
    """
    areas = {"cpr": by_value.areas(seed)["cpr"], "cmd": by_magnitude.areas(seed)["cmd"]}
    ends = ("", "_low", "_high")
    return {f"{name}{end}": float(x) for name, of in areas.items() for end, x in zip(ends, of, strict=True)}

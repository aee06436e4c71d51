"""`plot`: the figure that fits a result.

    result.plot()                        # or plot(result)
    figures.save(result.plot(), "effects.png")

Each kind of result has one function here, which chooses among the functions of `runs.figures`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from pyvene_ext.engine.results import EditLocation, Result, Shown, count, strongest
from pyvene_ext.engine.sweep.sequential import Sequential
from pyvene_ext.io.bars import in_notebook
from pyvene_ext.methods.attribution.edges import EdgeScores
from pyvene_ext.methods.attribution.screen import Screen
from pyvene_ext.methods.circuits.acdc_run import AcdcRun
from pyvene_ext.methods.circuits.faithfulness import CircuitRuns, Curve
from pyvene_ext.methods.circuits.masks import Mask
from pyvene_ext.methods.heads.flow import Flow
from pyvene_ext.methods.heads.lens import Attribution, Lens, Parts
from pyvene_ext.methods.heads.scores import HeadScores
from pyvene_ext.runs.figures.heads import faithfulness_curves, head_heatmap
from pyvene_ext.runs.figures.layers import depth_curve, layer_map
from pyvene_ext.runs.figures.patching import edge_matrix, effect_bars
from pyvene_ext.stats.intervals import Interval, student_interval

BARS = 20  # interventions drawn as bars; of more, those with the largest effects


def plot(result: Shown, **options: Any) -> Figure:
    """Draw the figure that fits a result.

    - Interventions on one head each, at one site and choice of positions: a map of heads by layer. On sites without heads: layers
      by positions, or layers by sites. Others: bars with 95% intervals, of the 20 largest. Of patches the mean score is drawn, of
      others the mean delta, of `frequencies` the frequency.
    - Head scores: a map of heads; `score` says of which score ("induction").
    - Logit lens: a curve over depth; `of` says of what ("logit_diff", "probability" or "rank").
    - Direct logit attribution and information flow: a map of heads.
    - Edge scores: a matrix of senders and receivers.
    - ACDC: the same matrix of the effects of removals. Learned masks: of open probabilities.
    - Circuits: bars of faithfulness, or a curve over sizes.

    Args:
        result: what a function of this package returned.
        **options: as above.

    Returns:
        The figure, made without pyplot. Its axes are `figure.axes`.

    Raises:
        TypeError: there is no figure for such a result.
    """
    figure = _draw(result, **options)
    if in_notebook():
        _let_it_draw_figures()
    return figure


def _let_it_draw_figures() -> None:
    """Let the notebook show figures made without pyplot, unless it does already, as after %matplotlib inline."""
    # In a notebook IPython is loaded; elsewhere nothing needs it.
    core: Any = sys.modules["IPython.core"]
    shell: Any = core.getipython.get_ipython()
    select_figure_formats = importlib.import_module("IPython.core.pylabtools").select_figure_formats
    if not any(Figure in kind.type_printers for kind in shell.display_formatter.formatters.values()):
        select_figure_formats(shell, {"png"})


@singledispatch
def _draw(result: Any) -> Figure:
    raise TypeError(f"there is no figure for a {type(result).__name__}; plot a result of this package.")


@_draw.register
def _result(result: Result) -> Figure:
    what, values = result.effect
    scale = "0: base, 1: source" if what == "mean score" else "baseline - intervened"
    label = f"{what} of {result.metric}\n({scale})"
    return _effects(result, values, label, len(result.baseline), result.effect_interval)


@_draw.register
def _screen(screen: Screen) -> Figure:
    return _result(screen.result)


@_draw.register
def _sequential(found: Sequential) -> Figure:
    def intervals(some: Sequence[int]) -> Interval:
        return Interval(*(values[some] for values in (found.frequency, found.low, found.high)))

    return _effects(found.result, found.frequency, "activation frequency", len(found.order), intervals, (0.0, 1.0))


@_draw.register
def _head_scores(found: HeadScores, score: str = "induction") -> Figure:
    if score not in found.by_name:
        raise ValueError(f"there is no score {score!r}; plot one of {', '.join(found.by_name)}.")
    values = found.by_name[score]
    title = f"{score} scores, {count(len(values), 'sequence')}"
    limits = None if score == "copying" else (0.0, 1.0)
    return head_heatmap(values.mean(0), title, f"mean {score} score", diverging=score == "copying", limits=limits)


@_draw.register
def _lens(lens: Lens, of: Literal["logit_diff", "probability", "rank"] = "logit_diff") -> Figure:
    if of not in ("logit_diff", "probability", "rank"):
        raise ValueError(f"the lens has no {of!r}; plot logit_diff, probability or rank.")
    values = getattr(lens, of)
    title = f"Logit lens at {lens.position}: {of}, {count(values.shape[1], 'prompt')}"
    return depth_curve(student_interval(values), title, of, "log" if of == "rank" else "linear")


@_draw.register
def _parts(parts: Parts, of: str = "the logit") -> Figure:
    title = f"Direct logit attribution: what heads add to {of}, {count(len(parts.embed), 'prompt')}"
    return head_heatmap(parts.heads.mean(-1), title, "mean contribution (logits)", diverging=True)


@_draw.register
def _attribution(found: Attribution) -> Figure:
    return _parts(found.logit_diff, "the logit difference")


@_draw.register
def _flow(flow: Flow) -> Figure:
    title = f"Information flow: share of heads in the stream after attention, {count(len(flow), 'prompt')}"
    return head_heatmap(flow.head_importance().mean(0), title, "mean importance")


@_draw.register
def _edges(found: EdgeScores) -> Figure:
    title = f"{found.method} of {found.metric}, {count(found.per_prompt.shape[-1], 'prompt')}"
    return edge_matrix(found.matrix, found.senders, found.receivers, title, "mean score (estimate of delta)")


@_draw.register
def _acdc(found: AcdcRun) -> Figure:
    title = f"ACDC on {found.metric}, {count(found.n_prompts, 'prompt')}"
    label = f"{'rise' if found.metric == 'kl' else 'fall'} of the mean {found.metric} without the edge"
    return edge_matrix(found.matrix, found.senders, found.receivers, title, label)


@_draw.register
def _mask(mask: Mask) -> Figure:
    title = f"Mask over {mask.settings['level']}s by {mask.metric}, {count(len(mask.loss), 'step')}"
    return edge_matrix(mask.matrix, mask.senders, mask.receivers, title, "probability to be open")


@_draw.register
def _circuit_runs(runs: CircuitRuns) -> Figure:
    names = list(map(str, range(len(runs.circuits))))
    title = f"Faithfulness of circuits, {count(len(runs.clean), 'prompt')}"
    return effect_bars(names, runs.interval(), title, "faithfulness (1: the whole model)", "circuit")


@_draw.register
def _curve(curve: Curve) -> Figure:
    random = {"of each size": (curve.sizes, curve.random_values)} if curve.random_values.size else None
    title = f"Faithfulness by size, {count(len(curve.runs.clean), 'prompt')}"
    return faithfulness_curves({"chosen": (curve.sizes, curve.runs.interval())}, random, title=title)


def _effects(
    result: Result,
    values: Float[np.ndarray, " n_interventions"],
    label: str,
    prompts: int,
    intervals: Callable[[Any], Interval],
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A map where the interventions fill one, else bars."""
    places, n = result.places, count(prompts, "prompt")

    def agree(*names: str) -> bool:
        return all(len({getattr(place, name) for place in places}) == 1 for name in names)

    if agree("site", "position", "receivers") and (grid := _Grid.of(places, values, "head")):
        site, _, _, position, receivers = places[0]
        to = f", path to {receivers}" if receivers else ""
        title = f"{site} at {_positions(position)}{to}, {n}"
        matrix = grid.matrix[grid.first_layer :]
        look: dict[str, Any] = {"diverging": limits is None, "limits": limits, "missing": "not run"}
        return head_heatmap(matrix, title, label, first_layer=grid.first_layer, **look)
    for fixed, column in (("site", "position"), ("position", "site")):
        if agree("head", "receivers", fixed) and (grid := _Grid.of(places, values, column)) and len(grid.columns) > 1:
            where = places[0].site if fixed == "site" else f"at {_positions(places[0].position)}"
            head = "" if places[0].head is None else f", head {places[0].head}"
            return layer_map(grid.matrix, grid.columns, f"{where}{head}, {n}", label, column)
    chosen, title = list(range(len(values))), f"{result.metric}, {n}"
    if len(values) > BARS:
        chosen, title = strongest(values, BARS).tolist(), f"{title}: the {BARS} largest of {len(values)}"
    return effect_bars([result.names[i] for i in chosen], intervals(chosen), title, label)


def _positions(position: str | None) -> str:
    return "all positions" if position == "all" else str(position)


class _Grid(NamedTuple):
    """Values by layer and by head, position or site, NaN where there is none."""

    matrix: Float[np.ndarray, "layer column"]
    columns: list[Any]
    first_layer: int

    @classmethod
    def of(cls, places: Sequence[EditLocation], values: Float[np.ndarray, " item"], column: str) -> _Grid | None:
        """The grid of some interventions; None unless each has a cell of its own and they fill at least half of it."""
        cells = [(place.layer, getattr(place, column)) for place in places]
        if len(cells) < 2 or len(set(cells)) < len(cells) or any(None in cell for cell in cells):
            return None
        layers, named = zip(*cells, strict=True)
        columns = list(range(max(named) + 1)) if column == "head" else list(dict.fromkeys(named))
        matrix = np.full((max(layers) + 1, len(columns)), np.nan)
        matrix[list(layers), [columns.index(one) for one in named]] = values
        first = min(layers)
        return cls(matrix, columns, first) if 2 * len(cells) >= matrix[first:].size else None

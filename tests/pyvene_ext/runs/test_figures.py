"""figures.py: what is drawn is what was given, nothing overlaps or leaves the figure, and nothing global is changed."""

import importlib
import itertools
import math
import re
import time
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from pyvene_ext import stats
from pyvene_ext.methods.heads.lag import LagCurves
from pyvene_ext.runs import figures
from pyvene_ext.specs.graph import Node
from tests.tiers import first_only

STUDIES = tuple((Path(__file__).resolve().parents[3] / "experiments").rglob("*.py"))
RNG = np.random.default_rng(0)
A, B = RNG.random((2, 5, 8))
SMALL = matplotlib.figure.Figure((1, 0.5))
CURVE = stats.Interval(np.array([0.5, 0.9]), np.array([0.4, 0.8]), np.array([0.7, 1.0]))
LONG = "activation_frequency_of_a_model_with_a_rather_long_name_in_a_language"


@pytest.fixture(autouse=True)
def no_warning_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def correlated(a, b):
    return stats.correlate_heads(a, b, n_resamples=50)


def every_figure(draw=RNG):
    taus = np.geomspace(0.01, 1, 7)
    yield figures.head_heatmap(A, "title", "frequency")
    yield figures.head_heatmap(A - B, "title", "difference (logits)", diverging=True)
    yield figures.compared_heads(A, B, names=("a", "b"), title="title", label="attention")
    yield figures.frequency_curve(taus, draw.random((7, 5, 8)), tau=0.1)
    yield figures.histogram_abs_delta(A - B, tau=0.1)
    yield figures.scatter_heads(A, B, name_a="en", name_b="zh", quantity="q", correlation=correlated(A, B), title="t")
    yield figures.layer_lines(range(5), stats.correlate_layers(A, B, n_resamples=50), title="t")
    yield figures.faithfulness_curves({"found": ([1, 9], CURVE)}, {"same layers": (9, [0.2, 0.4])}, title="t")
    yield figures.effect_bars(["z.0.1", "mlp_out.3@last:mean"], CURVE, "title", "mean delta (logits)")


def sticks_out(figure):
    """Whether anything drawn leaves the figure."""
    figure.draw_without_rendering()
    boxes = [figure.dpi_scale_trans.transform_bbox(figure.get_tightbbox())]
    boxes += [
        text.get_window_extent() for axes in figure.axes for text in axes.texts
    ]  # the tight box may leave them out
    width, height = figure.bbox.size
    return any(box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1 for box in boxes)


def test_every_axis_is_labelled():
    for figure in every_figure():
        for axes in figure.axes:
            is_bar = axes.get_label() == "<colorbar>"
            assert axes.get_ylabel(), figure
            assert is_bar or (axes.get_xlabel() and axes.get_title(loc="left")), figure
            if axes.images:
                assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer"), figure


@pytest.mark.slow
def test_importing_making_and_saving_changes_no_global_style_and_opens_no_pyplot_figure(tmp_path):
    before = dict(matplotlib.rcParams)
    importlib.reload(figures)
    for figure in every_figure():
        figures.save(figure, tmp_path / "figure.png")
    assert dict(matplotlib.rcParams) == before
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("name", "magic"), [("f.png", b"\x89PNG"), ("f.pdf", b"%PDF"), ("deep/er/f.svg", b"<?xml"), ("F.PNG", b"\x89PNG")]
)
def test_save_writes_the_path_asked_and_beside_a_png_its_pdf(tmp_path, name, magic):
    written = figures.save(SMALL, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    expected = {tmp_path / name}
    if magic == b"\x89PNG":
        expected.add((tmp_path / name).with_suffix(".pdf"))
        assert (tmp_path / name).with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == {*written} == expected and len(written) == len(expected)


@pytest.mark.slow
def test_equal_figures_are_equal_files_whenever_they_are_drawn(tmp_path, monkeypatch):
    for number, moment in enumerate((0, 10**9)):
        monkeypatch.setattr(time, "time", lambda moment=moment: moment)  # of what the files could say
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(moment))
        for drawing, figure in enumerate([*every_figure(np.random.default_rng(1))][::3]):
            for ending in ("png", "svg"):
                figures.save(figure, tmp_path / f"{number}/{drawing}.{ending}")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "01")
    assert len(first) == 3 * 3 and first == second
    assert not any(b"Date" in content for content in first.values())


@pytest.mark.slow
def test_the_pdf_is_laid_out_as_the_png_and_the_figure_is_left_as_it_was(tmp_path):
    (alone,), (figure,) = ([f for f in every_figure(np.random.default_rng(1))][1:2] for _ in range(2))
    with matplotlib.rc_context(figures.STYLE):
        alone.savefig(tmp_path / "alone.png", dpi=200)
    engine, places = figure.get_layout_engine(), []
    original = figure.savefig

    def noted(*given, **options):
        original(*given, **options)
        places.append([axes.get_position().bounds for axes in figure.axes])

    figure.savefig = noted
    figures.save(figure, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
    assert len(places) == 2 and places[0] == places[1] and figure.get_layout_engine() is engine
    bare = matplotlib.figure.Figure(layout="none")
    axes = bare.add_axes((0.1, 0.1, 0.8, 0.8))
    figures.save(bare, tmp_path / "bare.png")
    assert bare.get_layout_engine() is None and axes.get_position().bounds == (0.1, 0.1, 0.8, 0.8)


def test_save_uses_200_dots_per_inch(tmp_path):
    figures.save(SMALL, tmp_path / "f.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "f.png").shape
    assert (width, height) == (200, 100)


@pytest.mark.parametrize("name", ["figure", "figure.docx", "figure.png.txt"])
def test_save_refuses_an_ending_that_is_no_figure_format(tmp_path, name):
    with pytest.raises(ValueError, match="does not end in a figure format"):
        figures.save(SMALL, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    figure = figures.head_heatmap(A, "t", "l")

    def half_written(path, **_):
        path.write_bytes(b"\x89PNG half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", half_written)
    with pytest.raises(OSError, match="disk full"):
        figures.save(figure, tmp_path / "f.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "first_layer", "layer_ticks", "head_ticks"),
    [
        ((4, 8), 0, range(4), range(8)),
        ((24, 16), 0, range(0, 24, 2), range(16)),
        ((80, 64), 0, range(0, 80, 5), range(0, 64, 4)),
        ((12, 8), 15, range(15, 27), range(8)),
        ((20, 8), 15, range(16, 35, 2), range(8)),
        ((1, 1), 0, range(1), range(1)),
    ],
)
def test_heatmap_draws_each_head_at_its_place_with_whole_ticks(shape, first_layer, layer_ticks, head_ticks):
    matrix = np.arange(np.prod(shape), dtype=float).reshape(shape)
    figure = figures.head_heatmap(matrix, "t", "l", first_layer=first_layer)
    assert not sticks_out(figure)
    axes = figure.axes[0]
    assert list(axes.get_yticks()) == list(layer_ticks) and list(axes.get_xticks()) == list(head_ticks)
    image = axes.images[0]
    assert np.array_equal(image.get_array(), matrix)
    left, right, bottom, top = image.get_extent()
    assert (left, right) == (-0.5, shape[1] - 0.5)
    assert (top, bottom) == (first_layer - 0.5, first_layer + shape[0] - 0.5) and image.origin == "upper"


def test_heatmap_ticks_never_overlap():
    figure = figures.head_heatmap(RNG.random((80, 64)), "t", "l")
    figure.draw_without_rendering()
    for labels, low, high in (
        (figure.axes[0].get_xticklabels(), "x0", "x1"),
        (figure.axes[0].get_yticklabels(), "y0", "y1"),
    ):
        boxes = sorted((getattr(b, low), getattr(b, high)) for b in (label.get_window_extent() for label in labels))
        assert all(first[1] < second[0] for first, second in itertools.pairwise(boxes))


def test_diverging_heatmap_is_white_at_zero_whatever_the_range():
    for limits, expected in ((None, 3.0), ((-1.0, 7.0), 7.0)):
        figure = figures.head_heatmap(np.array([[-3.0, 1.0], [0.0, np.nan]]), "t", "l", diverging=True, limits=limits)
        assert figure.axes[0].images[0].get_clim() == (-expected, expected)
    assert min(figure.axes[0].images[0].cmap(0.5)[:3]) > 0.95


def test_heatmap_limits_are_kept_so_that_two_figures_compare():
    assert figures.head_heatmap(A, "t", "l", limits=(0, 1)).axes[0].images[0].get_clim() == (0, 1)
    assert figures.head_heatmap(A, "t", "l").axes[0].images[0].get_clim() == (A.min(), A.max())


def test_heatmap_shows_cells_that_are_not_finite_as_such():
    matrix = A.copy()
    matrix[1, 2], matrix[0, 0] = np.nan, np.inf
    figure = figures.head_heatmap(matrix, "t", "l")
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.mask.sum() == 2 and drawn.mask[1, 2] and drawn.mask[0, 0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["not finite"]
    assert figure.axes[0].patch.get_hatch()
    (legend,) = figures.head_heatmap(matrix, "t", "l", missing="not run").legends
    assert [text.get_text() for text in legend.get_texts()] == ["not run"]
    assert not figures.head_heatmap(A, "t", "l").legends
    assert not sticks_out(figures.head_heatmap(np.full((4, 8), np.nan), "t", "l"))


@pytest.mark.parametrize("matrix", [np.ones(4), np.ones((2, 2, 2)), np.ones((0, 4))])
def test_heatmap_refuses_what_is_no_matrix(matrix):
    with pytest.raises(ValueError, match="matrix with at least one head"):
        figures.head_heatmap(matrix, "t", "l")


def test_frequency_curve_draws_layer_means_and_the_mean_of_all():
    taus, frequencies = np.geomspace(0.01, 1, 7), RNG.random((7, 5, 8))
    axes = figures.frequency_curve(taus, frequencies, tau=0.1).axes[0]
    *layers, overall, marker = axes.lines
    assert len(layers) == 5
    assert np.allclose(layers[3].get_ydata(), [frequencies[t, 3].mean() for t in range(7)])
    assert np.allclose(overall.get_ydata(), [frequencies[t].mean() for t in range(7)])
    assert list(marker.get_xdata()) == [0.1, 0.1]
    assert axes.get_xscale() == "log"
    assert (
        figures.frequency_curve(np.linspace(0, 1, 7), frequencies).axes[0].get_xscale() == "linear"
    )  # 0 has no logarithm


def test_frequency_curve_leaves_out_heads_that_were_not_run():
    taus, frequencies = np.geomspace(0.01, 1, 7), RNG.random((7, 5, 8))
    frequencies[:, 3, 2:], frequencies[:, 4] = np.nan, np.nan
    *layers, overall = figures.frequency_curve(taus, frequencies).axes[0].lines
    assert np.allclose(layers[3].get_ydata(), frequencies[:, 3, :2].mean(-1))
    assert np.isnan(layers[4].get_ydata()).all()
    assert np.allclose(overall.get_ydata(), [at[np.isfinite(at)].mean() for at in frequencies])
    assert overall.get_label() == "all heads that were run"


def test_frequency_curve_refuses_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\[tau layer head\] for 3 taus, not \(7, 5, 8\)"):
        figures.frequency_curve(np.ones(3), np.ones((7, 5, 8)))


def test_histogram_shares_sum_to_what_is_shown_and_the_legend_counts_the_rest():
    delta = np.array([[0.0, 1e-12, 0.05, -0.2], [0.4, -0.8, np.nan, 0.1]])
    figure = figures.histogram_abs_delta(delta, tau=0.1)
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == pytest.approx(100 * 5 / 7)  # nan is no value
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["tau = 0.1: 43% above", "not shown: 28.6% at or near 0"]  # 0.2, 0.4, 0.8 of 7; strictly above


@pytest.mark.parametrize("delta", [np.zeros((3, 4)), np.full((2, 2), np.nan), np.ones((0,))])
def test_histogram_refuses_a_distribution_of_nothing(delta):
    with pytest.raises(ValueError, match="no distribution to draw"):
        figures.histogram_abs_delta(delta)


def test_histogram_of_one_value_can_be_drawn():
    figures.histogram_abs_delta(np.full((2, 2), 0.3)).draw_without_rendering()


def scatter(a, b, **options):
    return figures.scatter_heads(
        a,
        b,
        **{"name_a": "en", "name_b": "zh", "quantity": "q", "correlation": correlated(a, b), "title": "t", **options},
    )


def test_scatter_draws_each_finite_pair_in_its_layers_colour():
    a = A.copy()
    a[2, 3] = np.nan
    figure = scatter(a, B, first_layer=10)
    points = figure.axes[0].collections[0]
    expected = [(a[i, h], B[i, h]) for i in range(5) for h in range(8) if (i, h) != (2, 3)]
    assert np.array_equal(points.get_offsets(), expected)
    colours = matplotlib.colormaps["cividis"].resampled(5)(np.arange(5))
    layers = [i for i in range(5) for h in range(8) if (i, h) != (2, 3)]
    assert np.allclose(points.get_facecolors()[:, :3], colours[layers][:, :3])
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == ["10", "11", "12", "13", "14"]
    (words,) = (text.get_text() for text in figure.axes[0].texts)
    found = correlated(a, B)
    assert f"Pearson {found.pearson.r:.2f} [{found.pearson.low:.2f}, {found.pearson.high:.2f}]" in words
    assert f"Spearman {found.spearman.r:.2f}" in words and "n = 39" in words


def test_scatter_says_why_there_is_no_correlation():
    (words,) = (text.get_text() for text in scatter(np.zeros((2, 4)), B[:2, :4]).axes[0].texts)
    assert words == "no correlation: constant input: a, n = 8"


def test_the_line_y_equals_x_does_not_widen_the_view():
    low, high = scatter(A, B + 1000).axes[0].get_ylim()
    assert low > 999 and high < 1002


def test_scatter_refuses_two_shapes():
    with pytest.raises(ValueError, match=r"\(5, 8\) and \(4, 8\)"):
        figures.scatter_heads(A, B[:4], name_a="", name_b="", quantity="", correlation=correlated(A, B), title="")


def test_faithfulness_curves_draw_what_they_are_given():
    curves = {"one": (np.array([1, 9]), CURVE), "other": (np.array([3, 5]), CURVE)}
    axes = figures.faithfulness_curves(curves, {"same layers": (9, np.array([0.2, 0.4]))}).axes[0]
    _, one, other, random = axes.lines
    assert (list(one.get_xdata()), list(one.get_ydata())) == ([1, 9], [0.5, 0.9])
    assert list(other.get_xdata()) == [3, 5] and one.get_color() != other.get_color() != random.get_color()
    assert (list(random.get_xdata()), list(random.get_ydata())) == ([9, 9], [0.2, 0.4])
    band = axes.collections[0].get_paths()[0].vertices
    assert {(1, 0.4), (9, 0.8), (1, 0.7), (9, 1.0)} <= {(float(x), float(y)) for x, y in band}
    assert axes.get_xscale() == "log"
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert labels == ["one", "other", "2 random circuits: same layers"]
    from_zero = figures.faithfulness_curves({"one": (np.array([0, 9]), CURVE)}).axes[0]
    assert from_zero.get_xscale() == "linear"  # 0 has no logarithm


def test_faithfulness_curves_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="1 to 4 curves and up to 2 kinds of random circuits, not 0 and 0"):
        figures.faithfulness_curves({})
    with pytest.raises(ValueError, match=r"curve 'one' needs .* not arrays of shapes \(3,\), \(2,\)"):
        figures.faithfulness_curves({"one": (np.arange(3), CURVE)})


def test_layer_lines_fill_what_is_significant_after_correction_and_skip_nan():
    def row(r, p):
        return stats.Correlation(8, 0, stats.Coefficient(r, 0, r - 0.2, r + 0.1, p), stats.Coefficient())

    # q = 0.03, 0.06, 0.3, nan: the second is below 0.05 only without the correction.
    rows = [row(0.9, 0.01), row(0.5, 0.04), row(0.1, 0.3), row(math.nan, math.nan)]
    axes = figures.layer_lines(range(3, 7), rows, title="t").axes[0]
    points = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    filled, hollow = (
        [line for line in points if (line.get_markerfacecolor() == "white") is white] for white in (False, True)
    )
    assert [list(np.round(line.get_xdata())) for line in filled] == [[3]] and list(filled[0].get_ydata()) == [0.9]
    assert [list(np.round(line.get_xdata())) for line in hollow] == [[4, 5, 6]]
    assert np.array_equal(hollow[0].get_ydata(), [0.5, 0.1, math.nan], equal_nan=True)
    (interval, *_) = axes.collections[0].get_segments()
    assert np.allclose(interval[:, 1], [0.7, 1.0])
    assert list(axes.get_xticks()) == [3, 4, 5, 6]


@pytest.mark.parametrize("n_layers", [1, 4, 80])
def test_layer_lines_fit_any_depth(n_layers):
    rows = stats.correlate_layers(*RNG.random((2, n_layers, 6)), n_resamples=20)
    figure = figures.layer_lines(range(n_layers), rows, title=f"{LONG} against {LONG}, layer by layer")
    assert figure.get_size_inches()[0] <= 13
    assert not sticks_out(figure)


def test_long_names_are_broken_into_lines_that_fit():
    assert not sticks_out(scatter(A, B, name_a=LONG, name_b=LONG, title=f"{LONG} against {LONG}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", first_only(["Meta-Llama-3.1-8B-Instruct-abliterated-GGUF", "smollm2-135m-instruct"]))
def test_no_title_breaks_a_name(name):
    for figure in (
        figures.head_heatmap(A[:, :3], f"Activation patching (denoise), resid_pre: {name}, ioi_en", "score"),
        figures.layer_map(
            A[:, :2], ["io", "s"], f"Activation patching, resid_pre: {name}, ioi_en", "score", "position"
        ),
        figures.depth_curve(CURVE, f"Logit lens at last: {name}, ioi_en", "rank"),
        figures.compared_heads(A, B, names=("a", "b"), title=f"Translation heads: {name}, en-fr", label="l"),
        figures.edge_graph({"z.0.1->logits": 1.0}, f"Edges: {name}, ioi_en"),
        figures.method_maps({"CPR": A[:2], "CMD": B[:2]}, ["a", LONG[:30]], list("abcdefgh"), f"Methods: {name}"),
    ):
        titles = [
            text.get_text() for text in (figure.axes[0].title, figure.axes[0]._left_title, figure._suptitle) if text
        ]
        assert any(name in title for title in titles), titles
        assert not sticks_out(figure)


def test_each_cell_of_a_map_of_methods_has_its_number_and_is_brightest_where_it_is_best():
    values = np.array([[0.0, 0.26], [math.nan, 1.3]])
    figure = figures.method_maps(
        {"CPR": values, "CMD": values}, ["first", "second"], ["eap", "flow"], "title", lower=["CMD"]
    )
    cpr, cmd = figure.axes
    for axes in (cpr, cmd):
        assert [text.get_text() for text in axes.texts] == ["0.00", "0.26", "–", "1.30"]
        assert [tuple(map(round, text.get_position())) for text in axes.texts] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    best = [axes.images[0].cmap(axes.images[0].norm(value))[:3] for axes, value in ((cpr, 1.3), (cmd, 0.0))]
    assert best[0] == best[1] and sum(best[0]) > 1.9
    assert [axes.get_title(loc="left") for axes in (cpr, cmd)] == ["CPR (higher is better)", "CMD (lower is better)"]
    assert not sticks_out(figure)


def test_names_of_points_that_lie_together_do_not_collide():
    heads = [
        {"layer": 4, "head": i, "copy_own": 0.0, "copy_own_negative": 0.97 + 0.01 * i, "attribution": 1.5 + 0.01 * i}
        for i in range(4)
    ]
    heads += [{"layer": 0, "head": 0, "copy_own": 0.5, "copy_own_negative": 0.0, "attribution": -0.5}]
    figure = figures.copies_and_effects(heads, "smollm2-135m-instruct, ioi_en")
    assert not sticks_out(figure)
    texts = [text for axes in figure.axes for text in axes.texts]
    assert [sorted(text.get_text() for text in axes.texts) for axes in figure.axes] == [
        [],
        ["4.0", "4.1", "4.2", "4.3"],
    ]
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for text in texts:  # beside its own point
        assert text.xy in [(row["copy_own_negative"], row["attribution"]) for row in heads]


def lag_curves(n, draw):
    return LagCurves(n, draw.random((3, 20)), draw.random((2, 3, 20)))


def test_lag_curves_have_the_untouched_model_the_found_heads_and_the_random_ones():
    draw = np.random.default_rng(0)
    found, untouched = [lag_curves(n, draw) for n in (1, 2, 3, 4)], draw.random((3, 20))
    figure = figures.lag_curves(found[1:2], found[1].random, "title", untouched)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert (
        np.allclose(lines["none ablated"].get_ydata(), untouched.mean(0))
        and lines["none ablated"].get_color() == "black"
    )
    assert np.allclose(lines["2 ablated"].get_ydata(), found[1].own.mean(0))
    assert lines["2 ablated"].get_color() != "black"
    assert np.allclose(lines["2 random heads: mean and range (2 sets)"].get_ydata(), found[1].random.mean((0, 1)))
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "none ablated", "2 ablated", "2 random heads: mean and range (2 sets)"
    }  # fmt: skip
    every = figures.lag_curves(found, found[-1].random, "title", untouched)
    assert not sticks_out(every)
    box = every.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= every.bbox.width
    none = figures.lag_curves([LagCurves(0, untouched, found[0].random)], found[0].random, "title")
    assert [text.get_text() for text in none.legends[0].get_texts()] == ["none ablated"]  # no heads have no random ones


def test_what_helps_is_red_in_maps_of_heads_of_edges_and_in_graphs():
    red = matplotlib.colormaps[figures.DIVERGING](1.0)
    for helpful, end in (("positive", 1.0), ("negative", 0.0)):
        nodes = [Node.parse("embed")], [Node.parse("logits")]
        for figure in (
            figures.head_heatmap(A - B, "t", "l", diverging=True, helpful=helpful),
            figures.edge_matrix(np.array([[1.0]]), *nodes, "t", "l", helpful=helpful),
        ):
            assert figure.axes[0].images[0].cmap(end) == red
        graph = figures.edge_graph({"z.0.1->logits": 2.0, "embed->q.0.0": -1.0}, "t", "l", helpful=helpful)
        weak, strong = (matplotlib.colors.to_rgb(line.get_color()) for line in graph.axes[0].lines)
        assert (strong[0] > strong[2]) == (helpful == "positive") and (weak[0] > weak[2]) == (helpful == "negative")


def test_a_graph_of_edges_has_layers_upwards_and_lines_as_wide_as_they_are_strong():
    edges = {"embed->q.0.1": 0.5, "z.0.1->k.1.0": -4.0, "z.1.0->logits": 2.0}
    axes = figures.edge_graph(edges, "t", "effect").axes[0]
    lines = axes.lines[::-1]
    widths = [line.get_linewidth() for line in lines]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 3
    assert all(line.get_ydata()[0] < line.get_ydata()[1] for line in lines)
    assert {text.get_text() for text in axes.texts} == {"embed", "q.0.1", "z.0.1", "k.1.0", "z.1.0", "logits"}
    circuit = figures.edge_graph(edges.keys(), "t")
    assert len({line.get_linewidth() for line in circuit.axes[0].lines}) == 1 and not circuit.legends
    many = figures.edge_graph({f"z.{i // 8}.{i % 8}->logits": float(i) for i in range(60)}, "t", "l")
    assert len(many.axes[0].lines) == 40
    with pytest.raises(ValueError, match="is no edge"):
        figures.edge_graph(["z.0.1"], "t")


def test_the_legend_of_strata_has_nothing_that_is_not_drawn():
    row = {
        "problems": 3,
        "clean_accuracy": 100.0,
        "drop": 10.0,
        "random_drop": math.nan,
        "drop_low": math.nan,
        "drop_high": math.nan,
    }
    rows = [row | {"split": split, "stratum": name} for split in ("confidence", "steps") for name in "ab"]
    (legend,) = figures.drops_by_stratum("t", rows).legends
    assert [text.get_text() for text in legend.get_texts()] == ["few problems"]


def test_a_dollar_in_a_name_is_a_dollar():
    scatter(A, B, name_a="a$_$b", title="$\\x$").draw_without_rendering()


def test_two_conditions_share_one_scale_and_their_difference_has_white_at_zero():
    a, b = A, A / 2 + 0.3
    figure = figures.compared_heads(a, b, names=("Translation", "Control"), title="t", label="l")
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in panels] == ["Translation", "Control", "Difference"]
    images = [axes.images[0] for axes in panels]
    for image, matrix in zip(images, (a, b, a - b), strict=True):
        np.testing.assert_array_equal(image.get_array(), matrix)
    assert images[0].get_clim() == images[1].get_clim() == (min(a.min(), b.min()), max(a.max(), b.max()))
    farthest = np.abs(a - b).max()
    assert images[2].get_clim() == (-farthest, farthest) and images[2].cmap.name == figures.DIVERGING
    with pytest.raises(ValueError, match="one shape"):
        figures.compared_heads(a, b[:2], names=("a", "b"), title="t", label="l")


# -- colours -----------------------------------------------------------------------------------------------------------

# What dichromats see, of linear RGB: Machado, Oliveira and Fernandes 2009 (IEEE TVCG 15(6)), severity 1.
VISION = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# Of sRGB (IEC 61966-2-1), to CIE XYZ under D65.
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
APART = 12.0  # in CIELAB; 2.3 is just noticed (Mahy et al. 1994)
# What is drawn together: all of the categorical palette with black, and the three kinds of edges in a drawing of routes.
TOGETHER = {
    "categories": (
        "black",
        *(getattr(figures, name) for name in ["BLUE", "ORANGE", "GREY", "GREEN", "PINK", "SKY", "AMBER"]),
    ),
    "routes": (figures.LIGHT, figures.BLUE, figures.ORANGE, "black"),
}


def lab(colours, vision):
    """CIELAB of sRGB colours, [colour 3], as that vision has them."""
    rgb = np.asarray(colours, float)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ VISION[vision].T, 0, 1) @ TO_XYZ.T / TO_XYZ.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def closest(colours, vision):
    """The smallest distance between two of some colours."""
    seen = lab([matplotlib.colors.to_rgb(colour) for colour in colours], vision)
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))


def test_the_simulation_knows_what_colour_blind_people_confuse():
    np.testing.assert_allclose(lab([(1, 0, 0)], "full"), [[53.24, 80.09, 67.20]], atol=0.05)  # as published of sRGB red
    for vision in ("protanopia", "deuteranopia"):
        assert closest(("#d62728", "#7a7a1e"), vision) < 0.5 * closest(("#d62728", "#7a7a1e"), "full")
        np.testing.assert_allclose(VISION[vision].sum(1), 1, atol=2e-6)  # white stays white
    assert closest(("#2ca02c", "#d62728"), "deuteranopia") < 0.4 * closest(("#2ca02c", "#d62728"), "full")


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("which", TOGETHER)
def test_colours_of_one_figure_can_be_told_apart_by_everyone(which, vision):
    assert len(set(TOGETHER[which])) == len(TOGETHER[which])
    assert closest(TOGETHER[which], vision) > APART


def test_every_colour_that_a_study_gives_a_category_is_of_the_palette():
    known = {name for name in vars(figures) if name.isupper() and str(getattr(figures, name)).startswith("#")}
    assert {getattr(figures, name) for name in known} == {*TOGETHER["categories"], *TOGETHER["routes"]} - {"black"}
    assert STUDIES
    for path in STUDIES:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"figures\.([A-Z]+)\b", text)) <= known | {"STYLE", "SEQUENTIAL", "DIVERGING", "LAYERS"}
        greys = [tuple(code[i : i + 2] for i in (1, 3, 5)) for code in re.findall(r"#[0-9a-f]{6}", text)]
        assert all(len(set(parts)) == 1 for parts in greys), f"{path.name} has a colour of its own"


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("name", ["SEQUENTIAL", "LAYERS"])
def test_maps_of_one_sign_grow_lighter_all_the_way(name, vision):
    lightness = lab(matplotlib.colormaps[getattr(figures, name)](np.linspace(0, 1, 33))[:, :3], vision)[:, 0]
    assert (np.diff(lightness) > 0).all() and lightness[-1] - lightness[0] > 50


@pytest.mark.parametrize("vision", VISION)
def test_the_map_of_two_signs_is_light_in_the_middle_and_has_two_ends_that_differ(vision):
    cmap = matplotlib.colormaps[figures.DIVERGING]
    lightness = lab(cmap(np.linspace(0, 1, 33))[:, :3], vision)[:, 0]
    assert (np.diff(lightness[:17]) > 0).all() and (np.diff(lightness[16:]) < 0).all()
    assert closest([cmap(0.0), cmap(1.0)], vision) > APART and closest([cmap(0.2), cmap(0.8)], vision) > APART
    red, blue = cmap(1.0)[0], cmap(0.0)[2]
    assert red > cmap(1.0)[2] and blue > cmap(0.0)[0], "positive is red"

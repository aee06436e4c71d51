"""`plot` picks the figure that fits, with the numbers of the result in it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import pyvene_ext as px
from pyvene_ext.engine.results import Result
from pyvene_ext.methods.patching.patch import Patched
from pyvene_ext.specs.joint import spec_name
from tests.pyvene_ext.methods import test_result_frames as made

CONFIG: Any = made.CONFIG
SITES = [px.Ablation(kind="zero", site=site, layer=layer) for site in ("mlp_out", "attn_out") for layer in range(3)]


def result_of(specs: list[Any], **values: Any) -> Result:
    names = tuple(getattr(spec, "name", None) or spec_name(spec) for spec in specs)
    baseline = made.drawn(5, seed=1)
    intervened = made.drawn(len(specs), 5)
    return values.pop("kind", Result)(names, "logit_diff", baseline, intervened, **values, specs=tuple(specs))


def image(figure: Figure) -> np.ndarray:
    (found,) = figure.axes[0].images
    return np.ma.filled(found.get_array().astype(float), np.nan)


def bars(figure: Figure) -> tuple[list[str], list[float]]:
    axes = figure.axes[0]
    return [text.get_text() for text in axes.get_yticklabels()], [bar.get_width() for bar in axes.patches]


def test_one_edit_per_head_is_a_map_of_heads() -> None:
    result = result_of(px.all_heads(CONFIG, positions="last"))
    figure = result.plot()
    np.testing.assert_allclose(image(figure).ravel(), result.mean_delta, rtol=1e-5)
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("head", "layer")
    assert "z at last, 5 prompts" in figure.axes[0].get_title(loc="left")


def test_heads_that_were_not_run_are_grey_and_the_map_starts_at_the_first_layer() -> None:
    specs = [spec for spec in px.all_heads(CONFIG) if spec.layer and spec.name != "z.1.0"]
    result = result_of(specs)
    shown = image(result.plot())
    assert shown.shape == (2, 6) and np.isnan(shown[0, 0])
    np.testing.assert_allclose(shown.ravel()[1:], result.mean_delta, rtol=1e-5)


def test_patches_at_positions_are_layers_by_positions_and_of_patches_the_score_is_drawn() -> None:
    specs = [px.ActivationPatch(site="resid_pre", layer=i, positions=p) for p in ("s1", "end") for i in range(3)]
    result = result_of(specs, kind=Patched, source=made.drawn(5, seed=4))
    figure = result.plot()
    np.testing.assert_allclose(image(figure), result.mean_score.reshape(2, 3).T, rtol=1e-5)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["s1", "end"]
    assert "mean score" in figure.axes[1].get_ylabel()


def test_sites_without_heads_are_layers_by_sites() -> None:
    result = result_of(SITES)
    figure = result.plot()
    np.testing.assert_allclose(image(figure), result.mean_delta.reshape(2, 3).T, rtol=1e-5)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["mlp_out", "attn_out"]


@pytest.mark.parametrize(
    "specs",
    [
        SITES[:3],
        [*px.all_heads(CONFIG), px.Ablation(kind="zero", site="z", layer=0, heads=(0, 1))][-4:],
        [px.Ablation(kind=kind, site="z", layer=0, heads=(0,)) for kind in ("zero", "mean")],  # two in one cell
        [px.Ablation(kind="zero", site="z", layer=layer, heads=(3,)) for layer in (0, 2)],  # a map would be empty
        [tuple(SITES[:2]), tuple(SITES[2:4])],
        px.all_paths(CONFIG, ("logits",))[:6],
    ],
    ids=lambda _: "",
)
def test_others_are_bars_in_the_order_of_the_interventions(specs: list[Any]) -> None:
    result = result_of(specs)
    names, widths = bars(result.plot())
    assert names == list(result.names)
    np.testing.assert_allclose(widths, result.mean_delta, rtol=1e-5)


def test_of_many_others_the_twenty_largest_are_drawn() -> None:
    result = result_of([(spec, SITES[0]) for spec in px.all_heads(CONFIG)] * 3)
    names, widths = bars(result.plot())
    largest = sorted(result.mean_delta, key=abs, reverse=True)[:20]
    np.testing.assert_allclose(widths, largest, rtol=1e-5)
    assert len(names) == 20


def test_a_result_without_specs_is_bars() -> None:
    assert bars(Result(("a", "b"), "logit", np.zeros(2, "f"), np.ones((2, 2), "f")).plot()) == (["a", "b"], [-1, -1])


def test_paths_from_heads_to_one_receiver_are_a_map_that_names_it() -> None:
    paths = [px.PathPatch(sender=f"z.{i}.{head}", receivers=("logits",)) for i in range(3) for head in range(4)]
    figure = result_of(paths, kind=Patched, source=made.drawn(5, seed=4)).plot()
    assert image(figure).shape == (3, 4) and "z at all positions, path to logits" in figure.axes[0].get_title(
        loc="left"
    )


def test_results_of_the_methods_have_the_figures_that_studies_draw_of_them() -> None:
    scores = made.head_scores()
    np.testing.assert_allclose(image(scores.plot()), scores.induction.mean(0))
    assert scores.copying is not None
    np.testing.assert_allclose(image(scores.plot(score="copying")), scores.copying.mean(0))
    lens = made.lens()
    np.testing.assert_allclose(lens.plot().axes[0].lines[-1].get_ydata(), lens.logit_diff.mean(1), rtol=1e-5)
    np.testing.assert_allclose(lens.plot(of="rank").axes[0].lines[-1].get_ydata(), lens.rank.mean(1))
    found = made.attribution()
    np.testing.assert_allclose(image(found.plot()), found.logit_diff.heads.mean(-1), rtol=1e-5)
    flow = made.flow()
    np.testing.assert_allclose(image(flow.plot()), flow.head_importance().mean(0), rtol=1e-5)
    edges = made.edges()
    np.testing.assert_allclose(image(edges.plot()), edges.matrix, rtol=1e-5)
    mask = made.mask()
    shown = image(mask.plot())
    assert {*shown[1][np.isfinite(shown[1])]} == {mask.scores[1]} and np.isnan(shown[-1]).sum() == len(
        mask.receivers
    ) - 1
    sequential = made.sequential()
    np.testing.assert_allclose(image(sequential.plot()).ravel(), sequential.frequency)
    screen = made.screen()
    np.testing.assert_allclose(image(screen.plot()).ravel(), screen.result.mean_delta, rtol=1e-5)


def test_faithfulness_is_a_curve_by_size_with_random_circuits_and_bars_of_single_ones() -> None:
    curve = made.curve()
    _, chosen, random = curve.plot().axes[0].lines
    np.testing.assert_allclose(chosen.get_xydata(), np.transpose([curve.sizes, curve.values]))
    np.testing.assert_allclose(random.get_ydata(), curve.random_values.ravel())
    assert list(random.get_xdata()) == [1, 1, 4, 4, 9, 9]
    assert bars(made.runs().plot())[1] == pytest.approx(list(made.runs().faithfulness))


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda: made.head_scores().plot(score="inducing"), "there is no score 'inducing'; plot one of previous"),
        (lambda: made.lens().plot(of="logits"), "the lens has no 'logits'; plot logit_diff, probability or rank"),
        (lambda: px.plot(3), "there is no figure for a int; plot a result of this package"),  # type: ignore[arg-type]
    ],
    ids=["score", "lens", "type"],
)
def test_what_cannot_be_drawn_is_refused(draw: Any, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        draw()


@pytest.mark.slow
def test_results_and_prompts_need_neither_figures_nor_tables() -> None:
    program = (
        "import sys, numpy as np, pyvene_ext as px\n"
        "px.PromptSet.load('ioi_en'); px.PromptSet(['a']); px.PromptSet.load(['a'])\n"
        "assert not {'pandas', 'datasets'} & {*sys.modules}\n"
        "from pyvene_ext.engine.results import Result\n"
        "repr(Result(('a',), 'logit', np.zeros(2, 'f'), np.ones((1, 2), 'f')))\n"
        "assert 'pyvene_ext.runs' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_notebook_draws_the_figure_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    from pyvene_ext.runs import plotting

    shell = InteractiveShell()
    monkeypatch.setattr(plotting, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: shell)
    figure = made.lens().plot()
    data, _ = shell.display_formatter.format(figure)
    assert "image/png" in data

"""The page of runs: what it shows, checked in a browser where there is one."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from plotly.offline import get_plotlyjs

from pyvene_ext.io.files import write_csv, write_json, write_yaml
from pyvene_ext.report import Run, write_report
from pyvene_ext.report.__main__ import Config as ReportConfig
from pyvene_ext.report.__main__ import main
from pyvene_ext.report.colours import AGAINST, HELPS
from pyvene_ext.report.compare import RESAMPLES, compared, shared
from pyvene_ext.report.edges import edge_graph, edge_map, edges_of
from pyvene_ext.report.findings import strongest
from pyvene_ext.report.plots import first_heads, head_maps, prompt_by_prompt
from pyvene_ext.report.routes import Routes, draw_routes
from pyvene_ext.report.run import by_group, columns
from pyvene_ext.runs import figures
from pyvene_ext.runs.attention import View, write_views
from pyvene_ext.runs.facts import Evidence
from pyvene_ext.stats import correlate_heads
from tests.browser import in_browser, needs_browser

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
HOSTILE = "<script>document.title = 'broken'</script>"
RECORD = {
    "command": "python x.py --tau 0.1",
    "model": "tiny",
    "model_type": "qwen2",
    "revision": "abc",
    "weight_hash": "77cc",
    "prompts_hash": "3cbb",
    "pairs": {"en-fr": {"hash": "1234", "n": 5}},
    "dtype": "float32",
    "device": "cpu",
    "versions": {"torch": "2.13", "datasets": None},
    "python": "3.11.7",
    "time": "2026-01-02T03:04:05+00:00",
    "n": 100,
    "tau": 0.1,
    "share_active": 0.123456,
}


def _run(folder: Path, seed: int = 0) -> np.ndarray:
    """A folder as a study leaves it: 2 layers of 3 heads, a table of heads and one of something else."""
    effect = np.random.default_rng(seed).normal(size=6).round(3)
    heads = [
        {"layer": i // 3, "head": i % 3, "effect": effect[i], "low": effect[i] - 0.1, "high": effect[i] + 0.25}
        | {"same": 1, "note": HOSTILE, "score": i, "score_se": 0.5}
        for i in range(6)
    ]
    write_csv(folder / "heads.csv", heads)
    write_csv(
        folder / "other.csv", [{"step": 2, "loss": 10}, {"step": 1, "loss": 9}, {"step": 3, "loss": float("nan")}]
    )
    write_yaml(folder / "config.yaml", {"model": "tiny", "tau": 0.1, "out": None, "pairs": ["en-fr", "fr-en"]})
    write_json(folder / "summary.json", {"verdicts": ["heads matter & more"], "models": {"tiny": RECORD}})
    (folder / "figures").mkdir()
    (folder / "figures/one.png").write_bytes(base64.b64decode(DOT))
    (folder / "figures/one.pdf").write_bytes(b"%PDF")
    return effect


EDGES = [
    ("resid_mid.1@2", "resid_post.1@2", "residual", 0.75),
    ("resid_mid.1@2", "resid_post.1@2", "mlp", 0.25),
    ("resid_post.0@0", "resid_mid.1@2", "1.4", 0.5),
    ("resid_post.0@0", "resid_mid.1@2", "1.5", 0.0625),
    ("resid_pre.0@0", "resid_mid.0@0", "0.2", 1.0),
]
ROUTES: dict[str, Any] = {
    "prompt": 7,
    "tokens": ["<bos>", "b", " c"],
    "tau": 0.04,
    "renormalised": False,
    "edges": [dict(zip(("source", "target", "via", "importance"), edge, strict=True)) for edge in EDGES],
}
EVIDENCE: dict[str, Any] = {
    "sample": "9 prompts",
    "effect": "the effect of 0.1, the largest of 6 heads,",
    "interval": [3.0, 2.5, 3.5],
    "control": "random heads, p = 0.02",
    "sharpen": "a larger --limit",
    "null": 0.0,
}


def _page(*folders: Path) -> str:
    write_report(folders, folders[0].parent / "page.html")
    return (folders[0].parent / "page.html").read_text(encoding="utf-8")


@needs_browser
def test_in_a_browser_maps_are_drawn_menus_choose_tables_sort_and_nothing_goes_wrong(tmp_path: Path) -> None:
    effect = _run(tmp_path / "a")
    script = """
      const [map, bars] = document.querySelectorAll('.plotly-graph-div');
      const table = [...document.querySelectorAll('table.sortable')].at(-1);
      const column = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent + ':' + row.cells[1].textContent);
      const [step, loss] = table.querySelectorAll('th');
      const orders = [column()];
      for (const th of [step, step, loss]) { th.click(); orders.push(column()) }
      const heads = document.querySelector('table.sortable'), firsts = [heads.rows[1].cells[2].textContent];
      heads.querySelectorAll('th')[2].click();
      firsts.push(heads.rows[1].cells[2].textContent);
      const press = async (plot, label) => {
        const button = plot.layout.updatemenus[0].buttons.find(button => button.label === label);
        await Plotly.update(plot, ...button.args);
      };
      const z = map.data[0].z, hover = await under(map, 2, 1);
      const colours = [map.data[0].colorscale.at(-1)[1], map.data[0].zmin + map.data[0].zmax];
      await press(map, 'score');
      const score = {z: map.data[0].z, hover: await under(map, 2, 1), title: map.data[0].colorbar.title.text,
                     range: [map.data[0].zmin, map.data[0].zmax], first: map.data[0].colorscale[0][1]};
      return {title: document.title, orders, firsts, z, hover, colours, score,
              drawn: document.querySelectorAll('.main-svg').length > 0, bar: await under(bars, 0, bars.data[0].y[0] / 2),
              menu: map.layout.updatemenus[0].buttons.map(b => b.label),
              verdict: document.querySelector('.verdict').textContent,
              images: [...document.images].every(i => i.naturalWidth === 1)}
    """
    said, wrong = in_browser(_page(tmp_path / "a"), script, tmp_path)
    assert wrong == []
    assert said["title"] == "a" and said["drawn"] and said["images"] and said["verdict"] == "heads matter & more"
    assert said["menu"] == [
        "effect",
        "score",
    ]  # not what is the same for all heads, nor words, nor what belongs to another
    np.testing.assert_allclose(said["z"], effect.reshape(2, 3))
    shown = f"effect [low, high]: {effect[5]:.4g} [{effect[5] - 0.1:.4g}, {effect[5] + 0.25:.4g}]"
    assert said["hover"].startswith("head 1.2") and shown in said["hover"] and "score ± se: 5 ± 0.5" in said["hover"]
    assert said["colours"] == ["rgb(103,0,31)", 0]  # what is positive is red, and 0 is white
    assert said["score"]["z"] == [[0, 1, 2], [3, 4, 5]] and said["score"]["hover"] == said["hover"]
    assert (
        said["score"]["title"] == "score" and said["score"]["range"] == [0, 5] and said["score"]["first"] == "#440154"
    )
    largest = int(np.abs(effect).argmax())
    assert said["bar"].startswith(f"head {largest // 3}.{largest % 3}") and "effect [low, high]: " in said["bar"]
    written, down, up, by_loss = said["orders"]
    assert written == ["2:10", "1:9", "3:"]
    assert down == ["3:", "2:10", "1:9"] and up == down[::-1]
    assert by_loss == ["2:10", "1:9", "3:"]  # by number, not by spelling, and what is missing comes last
    assert said["firsts"][0].startswith(f"{effect[0]:.4g} [") and said["firsts"][1].startswith(f"{effect.max():.4g} [")


@needs_browser
def test_in_a_browser_attention_routes_and_prompts_are_there(tmp_path: Path) -> None:
    _run(tmp_path / "a")
    _run(tmp_path / "b")
    for name, weight in (("a", 51), ("b", 102)):
        write_views(
            tmp_path / name, [View("p", ["x", "y"], {0: np.array([[[255, 0], [255 - weight, weight]]], np.uint8)})]
        )
    write_json(tmp_path / "b/routes.json", ROUTES)
    np.save(tmp_path / "b/deltas.npy", np.arange(-3, 9, dtype=np.float32).reshape(2, 3, 2))
    write_json(tmp_path / "b/prompts.json", ["first", "second & last"])
    script = """
      const [looks, plots] = ['.attention .plot', '.plotly-graph-div'].map(name => [...document.querySelectorAll(name)]);
      const routes = plots.find(plot => plot.layout.legend);
      const prompts = plots.find(plot => plot.layout.sliders && plot !== routes);
      const one = prompts.layout.sliders[0].steps[1];
      const before = await under(prompts, 2, 1);
      await Plotly.update(prompts, ...one.args);
      const shown = () => [...routes.querySelectorAll('.scatterlayer .trace path.js-line')].length;
      const edges = [shown(), await under(routes, 1, 1.25), await under(routes, 2, 1.75), await under(routes, 0, 1)];
      await Plotly.restyle(routes, ...routes.layout.sliders[0].steps.at(-1).args);
      return {weights: [await under(looks[0], 1, 1), await under(looks[1], 1, 1)], edges, left: shown(),
              gone: await under(routes, 1, 1.25), before, after: [await under(prompts, 2, 1), prompts.layout.title.text]};
    """
    said, wrong = in_browser(_page(tmp_path / "a", tmp_path / "b"), script, tmp_path)
    assert wrong == []
    assert said["weights"] == ["y (1) → y (1)attention 0.200", "y (1) → y (1)attention 0.400"]
    head, residual, node = said["edges"][1:]
    assert head == "head 1.4<bos> → cresid_post.0@0 → resid_mid.1@2importance 0.500"
    assert residual == "residualc → cresid_mid.1@2 → resid_post.1@2importance 0.750" and node == "resid_post.0@0<bos>"
    assert said["edges"][0] == 5 and said["left"] == 2
    assert said["gone"] == ""
    assert said["before"] == "head 1.2delta: 7" and said["after"] == ["head 1.2delta: 8", "second &amp; last"]


def test_what_was_run_stands_at_the_end(tmp_path: Path) -> None:
    _run(tmp_path / "a")
    page = _page(tmp_path / "a")
    block = re.search(r'<dl class="run">(.*?)</dl>', page)
    assert block and page.index("heads matter") < page.index("heads.csv (6 rows)") < page.index(block[0])
    lines = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", block[1]))
    assert list(lines) == ["command", "model", "run on", "hashes", "versions", "found", "flags"]
    assert lines["command"] == "<code>python x.py --tau 0.1</code>" and lines["model"] == "tiny, qwen2, abc"
    assert lines["run on"] == "float32, cpu, 2026-01-02T03:04:05+00:00"
    plain = {name: re.sub(r"<.*?>", "", line) for name, line in lines.items()}
    assert plain["hashes"] == "weight_hash 77cc prompts_hash 3cbb pairs.en-fr.hash 1234"
    assert plain["versions"] == "python: 3.11.7 torch: 2.13" and plain["found"] == "n 100 share_active 0.1235"
    assert plain["flags"] == "model tiny tau 0.1 pairs [en-fr, fr-en]"
    # Of a study whose main file is an array the facts are beside its folder; a name may have dots.
    (tmp_path / "a/summary.json").unlink()
    (tmp_path / "a").rename(tmp_path / "tiny-2.5_x")
    write_json(tmp_path / "tiny-2.5_x.json", RECORD)
    assert "python x.py --tau 0.1" in _page(tmp_path / "tiny-2.5_x")


def test_the_page_needs_no_network_and_shows_nothing_as_code(tmp_path: Path) -> None:
    _run(tmp_path / "a")
    (tmp_path / "a/<x>.csv").write_bytes((tmp_path / "a/heads.csv").read_bytes())
    write_views(tmp_path / "a", [View(HOSTILE, [HOSTILE], {0: np.full((1, 1, 1), 255, np.uint8)}, left_out=HOSTILE)])
    write_json(tmp_path / "a/routes.json", ROUTES | {"tokens": [HOSTILE] * 3})
    np.save(tmp_path / "a/deltas.npy", np.ones((2, 3, 1)))
    write_json(tmp_path / "a/prompts.json", [HOSTILE])
    write_json(
        tmp_path / "a/summary.json",
        RECORD | {"question": HOSTILE, "verdicts": [HOSTILE], "evidence": [EVIDENCE | {"effect": HOSTILE}]},
    )
    write_csv(tmp_path / "a/edges.csv", [{"edge": f"z.0.{head}->logits", HOSTILE: head} for head in range(3)])
    page = _page(tmp_path / "a")
    ours = page.replace(get_plotlyjs(), "")
    assert len(ours) < 200_000 and not re.search(r'(src|href)="(https?:)?//', ours)
    assert HOSTILE not in page and "&lt;script&gt;document.title" in page
    assert "<x>" not in ours and "<figcaption>&lt;x&gt;" in ours
    assert 'href="a/heads.csv"' in page and f"data:image/png;base64,{DOT}" in page
    assert 'one: <a href="a/figures/one.png">PNG</a> · <a href="a/figures/one.pdf">PDF</a>' in page
    assert (
        "&quot;edges&quot;" not in ours and "&quot;heads&quot;" not in ours
    )  # what is drawn is not shown as JSON again
    assert page == _page(tmp_path / "a")  # byte for byte


def test_every_effect_is_shown_prompt_by_prompt(tmp_path: Path) -> None:
    _run(tmp_path / "a")
    deltas = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    deltas[1, 2, 1] = np.nan
    np.save(tmp_path / "a/deltas.npy", deltas)
    write_json(tmp_path / "a/prompts.json", ["first", HOSTILE])
    page = _page(tmp_path / "a")
    assert "[[1.0,3.0,5.0],[7.0,9.0,null]]" in page and "prompt " in page and HOSTILE not in page
    figure = prompt_by_prompt(["first", "second"], deltas)
    first, second = figure.data
    assert first.visible and not second.visible
    # One scale for all prompts, which one outlier does not make pale, and which says where it ends.
    limit = float(np.quantile(np.abs(deltas[np.isfinite(deltas)]), 0.98))
    for one in (first, second):
        np.testing.assert_allclose((one.zmin, one.zmax), (-limit, limit))
        assert (
            one.colorbar.ticktext[0] == f"≤ −{limit:.2g}"
            and one.colorbar.ticktext[-1] == f"≥ {limit:.2g}<br>(up to 10)"
        )
        assert (one.colorbar.tickvals[0], one.colorbar.tickvals[-1]) == (one.zmin, one.zmax)
    for wrong in (deltas[0], deltas[..., :1], deltas.astype(object)):
        np.save(tmp_path / "a/deltas.npy", wrong)
        with pytest.raises(ValueError, match=r"deltas.npy (must be|is not a complete)"):
            _page(tmp_path / "a")


def test_colours_and_their_direction_are_those_of_the_static_figures() -> None:
    rows = [{"layer": "0", "head": str(i), "signed": str(i - 1), "share": str(i)} for i in range(3)]
    figure = head_maps(rows)
    buttons = figure.layout.updatemenus[0].buttons
    for button, name in zip(buttons, (figures.DIVERGING, figures.SEQUENTIAL), strict=True):
        scale = button.args[0]["colorscale"][0]
        for share, colour in scale:
            rgb = tuple(int(x) / 255 for x in re.findall(r"\d+", colour)) if "(" in colour else to_rgb(colour)
            np.testing.assert_allclose(rgb, matplotlib.colormaps[name](float(share))[:3], atol=0.03)
        assert len(scale) >= 10
    assert figure.data[0].colorscale[-1][1] == "rgb(103,0,31)"
    colours = {trace.line.color for trace in draw_routes(Routes(**ROUTES)).data if trace.mode == "lines"}
    assert colours == {figures.LIGHT, figures.ORANGE, figures.BLUE}


def test_what_helps_is_red_whatever_its_sign() -> None:
    """Ablations and scores are positive where they help, paths negative."""
    rows = [
        {
            "layer": "0",
            "head": str(i),
            "helps": str(v),
            "helps_low": "-9",
            "helps_high": "9",
            "hurts": str(-v),
            "hurts_low": "-9",
        }
        | {"hurts_high": "9", "lost": str(-i - 1), "lost_low": "-9", "lost_high": "9"}
        for i, v in enumerate([2, -1, 0.5])
    ]
    negative = {"hurts", "lost"}
    maps = [button.args[0] for button in head_maps(rows, negative).layout.updatemenus[0].buttons]
    assert len(maps) == 3
    for look, sign in zip(maps, (1, -1, -1), strict=True):
        (scale,), (low,), (high,) = look["colorscale"], look["zmin"], look["zmax"]
        assert low == -high and scale[-1 if sign == 1 else 0][1] == "rgb(103,0,31)"
    bars = first_heads(rows, negative).data
    assert [tuple(bar.marker.color) for bar in bars] == [(HELPS, AGAINST, HELPS)] * 2 + [(HELPS, HELPS, HELPS)]
    of_paths = [
        {"path": f"z.0.{i}->q.1.{i}", "sender": f"z.0.{i}", "receivers": f"q.1.{i}", "hurts": f"{-v}"}
        for i, v in enumerate([2, -1])
    ]
    (button,) = edge_map(edges_of(of_paths), negative).layout.updatemenus[0].buttons
    assert button.args[0]["colorscale"][0][0][1] == "rgb(103,0,31)"
    lines = [trace.line.color for trace in edge_graph(edges_of(of_paths), negative).data if trace.mode == "lines"]
    assert lines == [HELPS, AGAINST]
    assert [trace.line.color for trace in edge_graph(edges_of(of_paths)).data if trace.mode == "lines"] == [
        AGAINST,
        HELPS,
    ]
    reds = [
        to_rgb(matplotlib.colors.to_hex([int(x) / 255 for x in re.findall(r"\d+", colour)]))
        for colour in (HELPS, AGAINST)
    ]
    assert reds[0][0] > 2 * reds[0][2] and reds[1][2] > 2 * reds[1][0]


# -- findings ----------------------------------------------------------------------------------------------------------


def test_findings_are_the_stated_effect_and_the_next_of_its_table(tmp_path: Path) -> None:
    _run(tmp_path / "a")
    effects = [(-4.0, -5.0, -3.0), (3.0, 2.5, 3.5), (0.2, -0.1, 0.5), (0.1, 0.05, 0.15)]
    heads = [
        {"layer": 0, "head": i, "other": 9 - i, "effect": e[0], "low": e[1], "high": e[2]}
        for i, e in enumerate(effects)
    ]
    write_csv(tmp_path / "a/heads.csv", heads)
    write_json(
        tmp_path / "a/summary.json", RECORD | {"dataset": "ioi", "question": "Which heads?", "evidence": [EVIDENCE]}
    )
    first, more = strongest(Run.read(tmp_path / "a"))
    assert first == [
        "The effect of 0.1, the largest of 6 heads, 3 [2.5, 3.5] (9 prompts). Control: random heads, p = 0.02. "
        "To sharpen it: a larger --limit.",
        "0.0: effect -4.0 [-5.0, -3.0].",
        "0.2: effect 0.2 [-0.1, 0.5], not told apart from 0. Of all 4 the median |effect| is 1.6.",
    ]
    assert more == []
    page = _page(tmp_path / "a")
    assert "<b>Which heads?</b> tiny on ioi (n = 100)" in page
    assert page.index("Which heads?") < page.index(first[0]) < page.index(first[2]) < page.index('id="run0-heads"')
    # The map shows the column of the finding first.
    assert (
        head_maps(Run.read(tmp_path / "a").tables["heads.csv"], first="effect").data[0].colorbar.title.text == "effect"
    )
    # Of more than three that the study states, the others are folded away; without numbers in a table there are no others.
    several = [EVIDENCE | {"effect": f"effect {i}", "interval": [i, None, None]} for i in range(5)]
    write_json(tmp_path / "a/summary.json", RECORD | {"evidence": several})
    first, more = strongest(Run.read(tmp_path / "a"))
    assert len(first) == 3 and len(more) == 2 and "0, without an interval, which proves nothing" in first[0]
    write_json(tmp_path / "a/summary.json", RECORD | {"evidence": several[:1]})
    assert len(strongest(Run.read(tmp_path / "a"))[0]) == 1


def test_evidence_is_read_as_it_was_written_or_refused(tmp_path: Path) -> None:
    _run(tmp_path / "a")
    told = Evidence("9 prompts", "x", None, "none", "more", None)
    assert Evidence.of(told.facts) == told and Evidence.of(EVIDENCE).facts == EVIDENCE
    write_json(tmp_path / "a/summary.json", RECORD | {"evidence": [EVIDENCE | {"interval": "wide"}]})
    with pytest.raises(ValueError, match="states evidence that is none: interval must be") as caught:
        _page(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_several_runs_have_their_findings_first_and_links_to_all_parts(tmp_path: Path) -> None:
    for name in "ab":
        _run(tmp_path / name)
        write_json(tmp_path / name / "summary.json", RECORD | {"question": f"What of {name}?"})
    page = _page(tmp_path / "a", tmp_path / "b").replace(get_plotlyjs(), "")
    places = [page.index(word) for word in ("What of a?", "What of b?", 'id="side-by-side"', 'id="run0"', 'id="run1"')]
    assert places == sorted(places)
    links = re.findall(r'<a href="#([^"]+)"', page[page.index("<nav>") : page.index("</nav>")])
    assert {"side-by-side", "run0", "run1", "run0-heads", "run1-provenance"} <= {*links}
    assert all(f'id="{link}"' in page for link in links)


# -- paths and circuits ------------------------------------------------------------------------------------------------


def test_paths_are_a_map_of_senders_by_receivers_and_the_strongest_are_drawn() -> None:
    effects = {
        ("embed", "v.0.1"): -3.0,
        ("z.0.1", "logits"): 2.0,
        ("z.0.1", "q.1.0"): -0.5,
        ("mlp_out.0", "logits"): 0.25,
    }
    rows = [
        {
            "path": f"{a}->{b}",
            "sender": a,
            "receivers": b,
            "effect": str(v),
            "low": str(v - 1),
            "high": str(v + 1),
            "row": str(i),
        }
        for i, ((a, b), v) in enumerate(effects.items())
    ]
    edges = edges_of(rows)
    (trace,) = edge_map(edges).data
    assert list(trace.y) == ["embed", "z.0.1", "mlp_out.0"] and list(trace.x) == [
        "v.0.1",
        "q.1.0",
        "logits",
    ]  # in their order
    for i, sender in enumerate(trace.y):
        for j, receiver in enumerate(trace.x):
            assert trace.z[i][j] == effects.get((sender, receiver))
    assert trace.text[1][2] == "2.0 [1.0, 3.0]"
    graph = edge_graph(edges)
    lines = [trace for trace in graph.data if trace.mode == "lines"]
    assert [line.text.partition("<br>")[0] for line in lines] == [
        "embed → v.0.1", "z.0.1 → logits", "z.0.1 → q.1.0", "mlp_out.0 → logits",
    ]  # fmt: skip
    widths = [line.line.width for line in lines]
    assert widths == sorted(widths, reverse=True) and "effect [low, high]: -3.0 [-4.0, -2.0]" in lines[0].text
    heights = {line.text.partition("<br>")[0]: (line.y[0], line.y[-1]) for line in lines}
    assert all(low < high for low, high in heights.values())  # layers upwards
    (names,) = (trace for trace in graph.data if trace.mode == "markers+text")
    assert {*names.text} == {"embed", "v.0.1", "z.0.1", "logits", "q.1.0", "mlp_out.0"}
    at = dict(zip(names.text, zip(names.x, names.y, strict=True), strict=True))
    assert (lines[1].x[0], lines[1].y[0]) == at["z.0.1"] and (lines[1].x[-1], lines[1].y[-1]) == at["logits"]


def test_a_slider_leaves_only_the_strongest_edges_and_their_nodes() -> None:
    rows = [{"edge": f"z.{i // 4}.{i % 4}->logits", "eap": str(30 - i)} for i in range(30)]
    figure = edge_graph(edges_of(rows))
    steps = figure.layout.sliders[0].steps
    assert [step.label for step in steps] == ["10", "20", "30"]
    shown = [figure.data[i] for i, visible in enumerate(steps[0].args[0]["visible"]) if visible]
    assert (
        len(shown) == 11 and len(shown[-1].text) == 11 and "z.2.1" in shown[-1].text and "z.2.2" not in shown[-1].text
    )
    assert [trace.visible for trace in figure.data] == steps[1].args[0]["visible"]


def test_a_circuit_without_numbers_is_drawn_and_other_tables_are_not() -> None:
    figure = edge_graph(edges_of([{"edge": "embed->mlp_in.0"}, {"edge": "mlp_out.0->logits"}]))
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert len({line.line.width for line in lines}) == 1 and {line.line.color for line in lines} == {figures.GREY}
    for rows in (
        [{"layer": "0"}],
        [{"edge": "a->b"}],
        [{"edge": "z.1.0->q.0.0"}],
        [{"sender": "embed", "receivers": "x"}],
        [],
    ):
        assert edges_of(rows) == []
    joint = edges_of([{"sender": "embed", "receivers": "q.1.0+logits", "effect": "1"}])
    assert [str(edge.receiver) for edge in joint] == ["q.1.0", "logits"]


def _circuits(folder: Path) -> None:
    """As `circuit_localization.py --compare` leaves them: the second method's circuit is part of the first's."""
    _run(folder)
    worth = {"cpr": 0.5, "cpr_low": 0.4, "cpr_high": 0.6, "n_edges": 90, "faithfulness": 0.7, "low": 0.6, "high": 0.8}
    methods = [{"method": method, **worth, "random_mean": 0.1} for method in ("eap", "atp")]
    write_csv(folder / "methods.csv", methods)
    edges = [f"z.{i // 10}.{i % 10}->logits" for i in range(90)]
    other = {"shared_with": HOSTILE}
    rows = [{"edge": edge, "score": 100.0 - i} | other for i, edge in enumerate(edges)]
    rows[1] |= {"score": -99.5, "shared_with": "none"}
    write_csv(folder / "circuit_eap.csv", rows)
    write_csv(folder / "circuit_atp.csv", [{"edge": edge, "score_of_sender": 1.0} for edge in edges[:3]])
    write_csv(folder / "circuit_breaker.csv", [{"layer": 0, "head": 0, "x": 1}])  # of something else
    write_json(folder / "circuit_eap.json", {"edges": edges})


def test_circuits_are_drawn_below_what_they_are_worth(tmp_path: Path) -> None:
    _circuits(tmp_path / "a")
    page = _page(tmp_path / "a").replace(get_plotlyjs(), "")
    section = page[page.index('id="run0-circuits"') : page.index('id="run0-heads"')]
    assert 'id="run0-paths"' not in page and page.count("senders") == 0
    captions = re.findall("<figcaption>(.*?)</figcaption>", section)
    worth = "faithfulness 0.7 [0.6, 0.8]; random circuits of the same layers and kinds 0.1"
    assert captions == [
        f"eap: 90 edges; {worth}; at most the 80 strongest are drawn, all are in circuit_eap.csv; "
        "solid: the 89 that another circuit shares; dotted: those of this one alone",
        f"atp: 3 edges; {worth}",
    ]
    assert section.index("cpr [low, high]") < section.index(captions[0]) and HOSTILE not in page
    assert "circuit_eap.json</summary>" not in page and 'href="a/circuit_eap.json"' in page
    figure = edge_graph(edges_of(Run.read(tmp_path / "a").tables["circuit_eap.csv"]))
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert len(lines) == 80 and [line.line.dash for line in lines[:3]] == ["solid", "dot", "solid"]
    assert figure.layout.sliders[0].currentvalue.suffix == " of 90"


@pytest.mark.slow
@needs_browser
def test_in_a_browser_hovering_over_an_edge_of_a_circuit_names_it(tmp_path: Path) -> None:
    _circuits(tmp_path / "a")
    script = """
      const [plot] = document.querySelectorAll('.plotly-graph-div');
      const line = plot.data[1];
      return await under(plot, line.x[5], line.y[5])
    """
    said, wrong = in_browser(_page(tmp_path / "a"), script, tmp_path)
    assert wrong == [] and said == "z.0.1 → logitsscore: -99.5shared with: none"


def test_a_table_of_paths_to_the_same_receivers_is_a_map_of_heads_too(tmp_path: Path) -> None:
    _run(tmp_path / "a")
    rows = [
        {"path": "x", "sender": sender, "receivers": "logits", "effect": i}
        for i, sender in enumerate(["z.0.1", "embed", "z.1.0"])
    ]
    write_csv(tmp_path / "a/paths.csv", rows)
    assert Run.read(tmp_path / "a").by_head()["paths.csv", "effect"] == {(0, 1): 0, (1, 0): 2}


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (["drop", "drop_low", "drop_high"], ["drop [low, high]"]),
        (["accuracy", "low", "high", "p"], ["accuracy [low, high]", "p"]),
        (["clean_accuracy", "clean_low", "clean_high"], ["clean_accuracy [low, high]"]),
        (["random_drop", "random_lowest", "random_highest"], ["random_drop [lowest, highest]"]),
        (["induction", "induction_se", "induction_control"], ["induction ± se", "induction_control"]),
        (["effect", "low", "score"], ["effect", "low", "score"]),
        (["effect", "gap", "effect_low", "effect_high"], ["effect [low, high]", "gap"]),
        (["low", "high"], ["low", "high"]),
        (["word", "low", "high"], ["word", "low", "high"]),
        (["a", "a_low", "b_high"], ["a", "a_low", "b_high"]),
        (["layer", "low", "high"], ["layer", "low", "high"]),
        (["a_se"], ["a_se"]),
    ],
)
def test_columns_that_belong_together_are_one(names: list[str], titles: list[str]) -> None:
    row = {name: "no number" if name == "word" else str(place) for place, name in enumerate(names)}
    assert [column.title for column in columns([row])] == titles


def test_a_cell_carries_its_interval() -> None:
    row = {"drop": "0.42222", "drop_low": "0.31", "drop_high": "0.55", "x": "1.5", "x_se": "0.25"}
    assert [column.cell(row) for column in columns([row])] == ["0.4222 [0.31, 0.55]", "1.5 ± 0.25"]
    empty = {"drop": "0.4", "drop_low": "", "drop_high": "", "x": "", "x_se": ""}
    assert [column.cell(empty) for column in columns([row, empty])] == ["0.4", ""]


def test_bars_show_the_largest_first_with_their_intervals() -> None:
    rows = [
        {"layer": str(i), "head": "0", "drop": str(drop), "low": str(drop - 1), "high": str(drop + 2), "other": "1"}
        | {"r": "1", "r_lowest": "0", "r_highest": "2"}
        for i, drop in enumerate([1.0, -5.0, 3.0])
    ]
    figure = first_heads([*rows, dict.fromkeys(rows[0], "") | {"layer": "3", "head": "0"}])
    (bars,) = figure.data  # the range of random sets is no interval
    assert list(bars.x) == ["1.0", "2.0", "0.0"] and list(bars.y) == [-5, 3, 1]
    assert list(bars.error_y.array) == [2, 2, 2] and list(bars.error_y.arrayminus) == [1, 1, 1]
    assert "<b>head 2.0</b><br>drop [low, high]: 3.0 [2.0, 5.0]" in bars.text[1]
    assert first_heads([{"layer": "0", "head": "0", "drop": "1"}]) is None


def test_a_table_with_more_than_one_row_a_head_has_a_map_for_each_thing(tmp_path: Path) -> None:
    rows = [
        {"pair": pair, "layer": layer, "head": head, "score": layer + 10 * head + add, "id": f"{pair}{layer}{head}"}
        for pair, add in (("en-fr", 0), ("fr-en", 100))
        for layer in range(2)
        for head in range(13)
    ]
    write_csv(tmp_path / "heads.csv", [*rows, {**rows[0], "head": "", "id": "MLP"}])
    write_yaml(tmp_path / "config.yaml", {})
    found = Run.read(tmp_path).by_head()
    assert list(found) == [("heads.csv", "en-fr: score"), ("heads.csv", "fr-en: score")]
    assert found["heads.csv", "fr-en: score"][1, 12] == 221
    table = Run.read(tmp_path).tables["heads.csv"]
    figure = head_maps(table)
    for button, add in zip(figure.layout.updatemenus[0].buttons, (0, 100), strict=True):
        change = button.args[0]
        assert change["z"][0][1][2] == 21 + add and f"score: {21 + add}" in change["text"][0][1][2]
    # One head twice and nothing to tell the two apart.
    assert by_group([*table, table[0]]) == {} and head_maps([*table, table[0]]) is None


def test_of_several_runs_the_same_heads_are_correlated(tmp_path: Path) -> None:
    a, b = _run(tmp_path / "a", 0), _run(tmp_path / "b", 1)
    page = _page(tmp_path / "a", tmp_path / "b")
    found = correlate_heads(a.reshape(2, 3), b.reshape(2, 3), n_resamples=RESAMPLES)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page[page.index('id="side-by-side"') :])
    assert cells[:5] == ["a", "b", "heads.csv", "effect", "6"]
    assert float(cells[5].split()[0]) == pytest.approx(found.spearman.r, abs=1e-3)
    assert cells[8:12] == ["a", "b", "heads.csv", "score"]  # not the ends of an interval


def test_two_runs_are_two_maps_a_difference_and_a_scatter_of_heads() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4))
    b[2, 3] = np.nan
    heads = list(np.ndindex(3, 4))
    of_a, of_b = (
        {("t.csv", "x: effect"): {head: float(of[head]) for head in heads if of[head] == of[head]}} for of in (a, b)
    )
    columns = shared(of_a, of_b)
    figure = compared([*columns, *columns], ("one", "<b>"), frozenset({"effect"}))
    first, second, difference, scatter, *hidden = figure.data
    assert len(hidden) == 4 and not any(trace.visible for trace in hidden)
    a[2, 3] = np.nan  # a head that one run lacks is in neither map
    for trace, wanted in ((first, a), (second, b), (difference, a - b)):
        np.testing.assert_allclose(np.array(trace.z, float), wanted, rtol=1e-3)
    assert first.zmin == second.zmin == -first.zmax == -max(np.nanmax(np.abs(a)), np.nanmax(np.abs(b)))
    assert difference.zmax == np.nanmax(np.abs(a - b))
    # Negative effects help, and are red in every map.
    assert {trace.colorscale[0][1] for trace in (first, second, difference)} == {"rgb(103,0,31)"}
    np.testing.assert_allclose(
        [scatter.x, scatter.y], [a[:2].ravel().tolist() + a[2, :3].tolist(), b.ravel()[:-1]], rtol=1e-3
    )
    assert scatter.hovertext[5] == "head 1.1" and f"{a[1, 1]:.4g}" == f"{scatter.x[5]:.4g}"
    named = {text for text in scatter.text if text}
    farthest = heads[
        int(np.nanargmax(np.maximum(*(np.abs(x - np.nanmedian(x)) / np.ptp(x[np.isfinite(x)]) for x in (a, b)))))
    ]
    assert f"{farthest[0]}.{farthest[1]}" in named and named <= {f"{layer}.{head}" for layer, head in heads}
    rank = columns[0].correlation.spearman
    assert columns[0].correlation.n == 11
    assert f"Spearman {rank.r:.2f} [{rank.low:.2f}, {rank.high:.2f}]" in figure.layout.title.text
    assert [note.text for note in figure.layout.annotations][:3] == ["one", "&lt;b&gt;", "one − &lt;b&gt;"]
    change, _ = figure.layout.updatemenus[0].buttons[1].args
    assert change["visible"] == [False] * 4 + [True] * 4


def test_heads_of_different_weights_are_not_correlated(tmp_path: Path) -> None:
    for name, seed, weights in (("a", 0, "w1"), ("b", 1, "w1"), ("c", 2, "w2"), ("d", 3, None)):
        _run(tmp_path / name, seed)
        facts = {"command": "python x.py"} | ({"weight_hash": weights} if weights else {})
        write_json(tmp_path / name / "summary.json", facts)
    page = _page(*(tmp_path / name for name in "abcd"))
    page = page[page.index('id="side-by-side"') :]
    cells = re.findall(r"<tr><td[^>]*>([a-d])</td><td[^>]*>([a-d])</td>", page)
    assert set(cells) == {("a", "b"), ("a", "d"), ("b", "d"), ("c", "d")}, (
        "where a run does not say, it may be the same model"
    )
    assert "Not correlated, because the weights differ" in page and ": a and c; b and c.</p>" in page
    alone = _page(tmp_path / "a", tmp_path / "c")
    assert "<p>Not correlated" in alone and "Spearman" not in alone[alone.index('id="side-by-side"') :]


# -- routes ------------------------------------------------------------------------------------------------------------


def test_routes_are_as_wide_as_they_are_important_and_lie_side_by_side() -> None:
    figure = draw_routes(Routes(**ROUTES))
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.hoverinfo == "skip"]
    assert sum(list(line.x).count(None) for line in lines) == len(EDGES)
    named = [trace for trace in figure.data if trace.text]
    told = {words: place for trace in named for words, *place in zip(trace.text, trace.x, trace.y, strict=True)}
    for source, target, via, importance in EDGES:
        name = {"mlp": "MLP"}.get(via, via if via == "residual" else f"head {via}")
        (words,) = [w for w in told if f"<b>{name}</b>" in w]
        assert f"{source} → {target}" in words and f"importance {importance:.3f}" in words
    strong, weak = (
        next(line for line in lines if {*ends} <= {*zip(line.x, line.y, strict=True)})
        for ends in ([(0, 0.0), (0, 0.5)], [(0, 1.0), (2, 1.5)])
    )
    assert strong.line.width > weak.line.width and strong.opacity > weak.opacity
    # Both heads between the same states, apart in the middle.
    middles = [np.array(told[next(w for w in told if f"head {via}" in w)]) for via in ("1.4", "1.5")]
    assert np.abs(middles[0] - middles[1]).max() > 0.05
    assert list(figure.layout.xaxis.ticktext) == ["&lt;bos&gt;", "b", "c"]
    assert list(figure.layout.yaxis.ticktext) == ["embed", "0", "1"]
    assert draw_routes(Routes(**ROUTES | {"edges": [], "tau": 0})).data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is not JSON"),
        ({"tokens": ["a"]}, r"an edge from resid_mid.1@2 to resid_post.1@2 but only 1 tokens"),
        ({"edges": [ROUTES["edges"][0] | {"importance": 2}]}, "edges.0.importance must be"),
        ({"edges": [ROUTES["edges"][0] | {"source": "resid_mid.x@2"}]}, "edges.0.source: "),
        ({"edges": [ROUTES["edges"][0] | {"via": "<b>"}]}, "edges.0.via: "),
        ({"tau": None}, "tau must be"),
    ],
)
def test_malformed_routes_are_one_sentence(tmp_path: Path, change: Any, message: str) -> None:
    _run(tmp_path / "a")
    (tmp_path / "a/routes.json").write_text(change if isinstance(change, str) else json.dumps(ROUTES | change))
    with pytest.raises(ValueError, match=message) as caught:
        _page(tmp_path / "a")
    assert "routes.json" in str(caught.value) and "\n" not in str(caught.value)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("summary.json", "{", "is not JSON"),
        ("attention.json", "{}", "prompts is missing"),
        ("heads.csv", "layer,head\n1\n", "unequal length"),
        ("heads.csv", "layer,head\n1,2,3\n", "unequal length"),
    ],
)
def test_files_that_are_not_what_they_are_called_are_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    _run(tmp_path / "a")
    (tmp_path / "a" / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        write_report([tmp_path / "a"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_several_runs_that_share_a_folder_are_shown_with_their_tables(tmp_path: Path) -> None:
    """As `run_ablations.py` leaves them: configs and facts under each run's name, tables in a folder of their own."""
    for name, tau in (("one", 0.25), ("two", 0.75)):
        write_yaml(tmp_path / f"x/{name}.yaml", {"tau": tau})
        write_json(tmp_path / f"x/{name}.json", {"command": f"python {name}.py", "verdicts": [f"{name} matters"]})
        write_csv(
            tmp_path / f"x/tables/{name}.csv", [{"layer": 0, "head": head, name: tau * head} for head in range(3)]
        )
    run = Run.read(tmp_path / "x")
    assert run.config == {"one": {"tau": 0.25}, "two": {"tau": 0.75}}
    assert run.by_head()["tables/two.csv", "two"] == {(0, 0): 0, (0, 1): 0.75, (0, 2): 1.5}
    assert run.verdicts == ["one matters", "two matters"]
    write_report([tmp_path / "x"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    for word in ("python one.py", "python two.py", "tables/one.csv (3 rows)", "two matters"):
        assert word in text


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _run(tmp_path / "a")
    for folders, message in (
        ([], "one or more"),
        ([tmp_path / "empty"], "no config.yaml"),
        ([tmp_path / "a", tmp_path / "b/../a"], "once"),
    ):
        with pytest.raises(ValueError, match=message):
            main(ReportConfig(tuple(folders), tmp_path / "page.html"))


def test_the_command_writes_the_page_into_the_first_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path / "a")
    main(ReportConfig((tmp_path / "a",)))
    first = (tmp_path / "a/report.html").read_bytes()
    assert "report.html" in capsys.readouterr().out
    main(ReportConfig((tmp_path / "a",)))
    assert (tmp_path / "a/report.html").read_bytes() == first


def test_a_row_of_many_columns_is_shown_whole() -> None:
    """Plotly leaves a label out that is higher than its drawing."""
    rows = [{"layer": "0", "head": str(head), **{f"c{i}": str(i + head) for i in range(30)}} for head in range(2)]
    figure = head_maps(rows)
    assert figure is not None
    words = figure.data[0].text[0][1]
    assert words.count("<br>") <= 12 and all(f"c{i}: {i + 1}" in words for i in range(30))


def test_quotation_marks_are_themselves_and_links_lead_to_odd_names(tmp_path: Path) -> None:
    _run(tmp_path / "run #2 50%")
    write_csv(tmp_path / "run #2 50%/heads.csv", [{"layer": 0, "head": h, 'say "x"': h} for h in range(3)])
    (tmp_path / "run #2 50%/javascript:alert(1).txt").write_text("x")
    write_report([tmp_path / "run #2 50%"], tmp_path / "run #2 50%/page.html")
    text = (tmp_path / "run #2 50%/page.html").read_text()
    assert 'href="javascript%3Aalert' in text and 'href="javascript:' not in text
    assert 'say \\"x\\": 1' in text
    write_report([tmp_path / "run #2 50%"], tmp_path / "page.html")
    assert 'href="run%20%232%2050%25/heads.csv"' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", ["methods.csv", "pages"])
def test_a_page_does_not_replace_a_table_or_a_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name} is no name of a page; let it end in .html"):
        write_report([tmp_path], tmp_path / name)

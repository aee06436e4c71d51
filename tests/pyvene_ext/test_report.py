"""The page of runs: what it shows, checked in a browser where there is one."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from plotly.offline import get_plotlyjs
from scipy.stats import spearmanr

from pyvene_ext.report import Config as ReportConfig
from pyvene_ext.report import Run, main, write_report
from pyvene_ext.runs import write_csv, write_json, write_yaml

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
HOSTILE = "<script>document.title = 'broken'</script>"


def _run(folder, seed=0, **more):
    """A folder as a study leaves it: 2 layers of 3 heads, a table of heads and one of something else."""
    effect = np.random.default_rng(seed).normal(size=6).round(3)
    heads = [
        {"layer": i // 3, "head": i % 3, "effect": effect[i], "low": effect[i] - 0.1, "same": 1, "note": HOSTILE}
        for i in range(6)
    ]
    write_csv(folder / "heads.csv", heads)
    write_csv(
        folder / "other.csv", [{"step": 2, "loss": 10}, {"step": 1, "loss": 9}, {"step": 3, "loss": float("nan")}]
    )
    write_yaml(folder / "config.yaml", {"model": "tiny", "tau": 0.1})
    write_json(
        folder / "summary.json", {"verdicts": ["heads matter & more"], "models": {"tiny": {"command": "python x.py"}}}
    )
    (folder / "figures").mkdir()
    (folder / "figures/one.png").write_bytes(base64.b64decode(DOT))
    for name, text in more.items():
        (folder / name).write_text(text)
    return effect


def _in_browser(page, script, tmp_path):
    """What the script says of the page, and what went wrong in it."""
    watch = "<script>window.wrong = []; window.onerror = (m) => { window.wrong.push(m) }</script>"
    tell = f"<script>addEventListener('load', () => setTimeout(() => {{ const said = (() => {{ {script} }})();\n"
    tell += "document.body.innerHTML = '<pre id=said></pre>';"
    tell += "document.getElementById('said').textContent = JSON.stringify([said, window.wrong]) }, 500))</script>"
    copy = tmp_path / "copy.html"
    copy.write_text(page.replace("<head>", f"<head>{watch}").replace("</body>", f"{tell}</body>"), encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [BROWSER, *quiet.split(), "--disable-component-update", "--disable-sync", "--virtual-time-budget=20000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.S)[1]))


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_in_a_browser_the_page_draws_its_maps_sorts_its_tables_and_has_no_error(tmp_path):
    effect = _run(tmp_path / "a")
    write_report([tmp_path / "a"], tmp_path / "a/report.html")
    script = """
      const plot = document.querySelector('.plotly-graph-div');
      const table = [...document.querySelectorAll('table.sortable')].at(-1);
      const column = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent + ':' + row.cells[1].textContent);
      const [step, loss] = table.querySelectorAll('th');
      const orders = [column()];
      for (const th of [step, step, loss]) { th.click(); orders.push(column()) }
      return {title: document.title, drawn: document.querySelectorAll('.main-svg').length > 0, orders,
              menu: plot.layout.updatemenus[0].buttons.map(b => b.label), text: plot.data[0].text[1][2],
              z: plot.data[0].z, verdict: document.querySelector('.verdict').textContent, images:
              [...document.images].every(i => i.naturalWidth === 1)}
    """
    said, wrong = _in_browser((tmp_path / "a/report.html").read_text(encoding="utf-8"), script, tmp_path)
    assert wrong == []
    assert said["title"] == "a" and said["drawn"] and said["images"] and said["verdict"] == "heads matter & more"
    assert said["menu"] == ["effect", "low"]  # not what is the same for all heads, nor words
    np.testing.assert_allclose(said["z"], effect.reshape(2, 3))
    assert f"effect: {effect[5]}" in said["text"] and "low: " in said["text"]
    written, down, up, by_loss = said["orders"]
    assert written == ["2:10", "1:9", "3:"]
    assert down == ["3:", "2:10", "1:9"] and up == down[::-1]
    assert by_loss == ["2:10", "1:9", "3:"]  # by number, not by spelling, and what is missing comes last


def test_the_page_needs_no_network_and_shows_nothing_as_code(tmp_path):
    _run(tmp_path / "a")
    write_report([tmp_path / "a"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    ours = page.replace(get_plotlyjs(), "")
    assert len(ours) < 200_000 and not re.search(r'(src|href)="(https?:)?//', ours)
    assert HOSTILE not in page and "&lt;script&gt;document.title" in page
    assert (
        'href="a/heads.csv"' in page and "<code>python x.py</code>" in page and f"data:image/png;base64,{DOT}" in page
    )


def test_every_effect_is_shown_prompt_by_prompt(tmp_path):
    _run(tmp_path / "a")
    deltas = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    deltas[1, 2, 1] = np.nan
    np.save(tmp_path / "a/deltas.npy", deltas)
    write_json(tmp_path / "a/prompts.json", ["first", HOSTILE])
    write_report([tmp_path / "a"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "[[1.0,3.0,5.0],[7.0,9.0,null]]" in page and "prompt " in page and HOSTILE not in page
    for wrong in (deltas[0], deltas[..., :1], deltas.astype(object)):
        np.save(tmp_path / "a/deltas.npy", wrong)
        with pytest.raises(ValueError, match=r"deltas.npy (must be|is not a complete)"):
            write_report([tmp_path / "a"], tmp_path / "page.html")


def test_of_several_runs_the_same_heads_are_correlated(tmp_path):
    a, b = _run(tmp_path / "a", 0), _run(tmp_path / "b", 1)
    write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    rho, p = spearmanr(a, b)
    row = f"<td>a</td><td>b</td><td>heads.csv</td><td>effect</td><td>6</td><td>{rho:.3f}</td><td>{p:.2g}</td>"
    assert row in page.replace(f"<td>{rho:.4g}</td>", f"<td>{rho:.3f}</td>")


def test_tables_that_are_not_one_row_a_head_are_no_maps(tmp_path):
    _run(tmp_path / "a")
    twice = [{"layer": 0, "head": 1, "score": 1.0}, {"layer": 0, "head": 1, "score": 2.0}]
    write_csv(tmp_path / "a/heads.csv", twice)
    assert Run.read(tmp_path / "a").by_head() == {}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("summary.json", "{", "is not JSON"),
        ("heads.csv", "layer,head\n1\n", "unequal length"),
        ("heads.csv", "layer,head\n1,2,3\n", "unequal length"),
    ],
)
def test_files_that_are_not_what_they_are_called_are_named(tmp_path, file, text, message):
    _run(tmp_path / "a")
    (tmp_path / "a" / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        write_report([tmp_path / "a"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_folders_that_are_no_runs_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    _run(tmp_path / "a")
    for folders, message in (
        ([], "one or more"),
        ([tmp_path / "empty"], "no config.yaml"),
        ([tmp_path / "a", tmp_path / "b/../a"], "once"),
    ):
        with pytest.raises(ValueError, match=message):
            main(ReportConfig(tuple(folders), tmp_path / "page.html"))


def test_the_command_writes_the_page_into_the_first_folder(tmp_path, capsys):
    _run(tmp_path / "a")
    main(ReportConfig((tmp_path / "a",)))
    assert (tmp_path / "a/report.html").is_file() and "report.html" in capsys.readouterr().out

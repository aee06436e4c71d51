"""Attention patterns of a study (`runs.attention`), drawn with their tokens.

One prompt and head at a time; hovering shows each weight.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from pyvene_ext.io.packages import need
from pyvene_ext.runs.attention import View, plain
from pyvene_ext.runs.figures import SEQUENTIAL


def escaped(text: str) -> str:
    """Escape text for plotly, which interprets tags but not quotation marks."""
    return html.escape(text, quote=False)


def shown_token(token: str) -> str:
    """Format a token for an axis: without surrounding spaces, unless it has nothing else."""
    return token.strip() or repr(token)[1:-1].replace(" ", "␣")


def attention_html(views: Sequence[View]) -> str:
    """Draw patterns as an HTML fragment with menus of prompts and heads.

    Args:
        views: patterns by prompt, one or more.

    Returns:
        A fragment for a page that loads plotly.js and, after the fragment, `SCRIPT`.

    Raises:
        ValueError: there is no view, or a pattern does not fit its tokens.
        MissingExtra: plotly is not installed.
    """
    need("report")
    from plotly.colors import get_colorscale  # takes a while to import

    if not views:
        raise ValueError("there are no patterns to show; give at least one head and prompt.")
    prompts = [plain(view) | {"tokens": list(map(shown_token, view.tokens))} for view in views]
    data = {"colours": get_colorscale(SEQUENTIAL), "prompts": prompts}
    # A script element ends at "</script", even inside a string.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<div class="attention"><label>prompt <select name="prompt"></select></label> '
        '<label>head <select name="head"></select></label><div class="plot"></div>'
        f'<script type="application/json">{text}</script></div>'
    )


def attention_page(views: Sequence[View], title: str) -> str:
    """Draw patterns as a page of its own, which works offline.

    Args:
        views: patterns by prompt, one or more.
        title: the page's title.

    Returns:
        The page as HTML.

    Raises:
        ValueError: there is no view, or a pattern does not fit its tokens.
        MissingExtra: plotly is not installed.
    """
    need("report")
    from plotly.offline import get_plotlyjs

    inner, title = attention_html(views), html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body><h1>{title}</h1>{inner}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } select { font: inherit; max-width: 44rem; margin-right: 1rem }
"""

# Plotly interprets < and & as HTML.
SCRIPT = r"""
for (const box of document.querySelectorAll("div.attention")) {
  const {prompts, colours} = JSON.parse(box.querySelector("script").textContent);
  const [prompt, head] = box.querySelectorAll("select"), plot = box.querySelector(".plot");
  const fill = (menu, names) => {
    const before = menu.value;
    menu.replaceChildren(...names.map(name => new Option(name, name)));
    if (names.includes(before)) menu.value = before;
  };
  const shown = token => token.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const draw = () => {
    const {tokens, heads} = prompts[prompt.selectedIndex], rows = heads[head.value], n = tokens.length;
    const names = tokens.map(shown), places = names.map((_, i) => i), every = Math.ceil(n / 120);
    const ticks = places.filter(i => i % every === 0), cell = Math.min(30, Math.max(9, 900 / n));
    const axis = {tickvals: ticks, ticktext: ticks.map(i => names[i]), tickfont: {size: Math.min(12, cell)},
                  showgrid: false, zeroline: false, constrain: "domain", range: [-0.5, n - 0.5]};
    Plotly.react(plot, [{
      type: "heatmap", z: rows, text: rows.map((row, q) => row.map((_, k) => `${names[q]} (${q}) → ${names[k]} (${k})`)),
      hovertemplate: "%{text}<br>attention %{z:.3f}<extra></extra>",
      colorscale: colours, zmin: 0, zmax: 1, hoverongaps: false, xgap: n > 60 ? 0 : 1, ygap: n > 60 ? 0 : 1,
      colorbar: {title: {text: "attention weight", side: "right"}, thickness: 12, outlinewidth: 0,
                 lenmode: "pixels", len: Math.max(160, Math.min(cell * n, 300)), y: 1, yanchor: "top"},
    }], {
      height: 190 + cell * n, width: Math.min(300 + cell * n, 1080), margin: {t: 20, l: 120, b: 120},
      font: {family: "system-ui, sans-serif", size: 13}, hoverlabel: {align: "left"},
      xaxis: {...axis, title: {text: "token looked at (key)", standoff: 10}, tickangle: -60, automargin: true},
      yaxis: {...axis, title: {text: "token that looks (query)", standoff: 10}, range: [n - 0.5, -0.5], scaleanchor: "x",
              automargin: true},
    }, {displaylogo: false});
  };
  const heads = () => { fill(head, Object.keys(prompts[prompt.selectedIndex].heads)); draw(); };
  prompt.replaceChildren(...prompts.map(({name, tokens}) => {
    const text = tokens.join(" ");
    return new Option(`${name}: ${text.length > 90 ? text.slice(0, 90) + "…" : text}`, name);
  }));
  prompt.onchange = heads;
  head.onchange = draw;
  heads();
}
"""

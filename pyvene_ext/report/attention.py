"""Attention patterns of a study (`runs.attention`), drawn with their tokens.

A grid of all heads of one layer on one prompt; of the head that is chosen, the text shaded by where a token looks, and the
pattern with its numbers. Patterns lie in the page as they lie in the file, compressed, and are unpacked when they are shown.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from pyvene_ext.io.packages import need
from pyvene_ext.runs.attention import View, as_json, within
from pyvene_ext.runs.figures import SEQUENTIAL


def escaped(text: str) -> str:
    """Escape text for plotly, which interprets tags but not quotation marks."""
    return html.escape(text, quote=False)


def shown_token(token: str) -> str:
    """Format a token for an axis: without surrounding spaces, unless it has nothing else."""
    return token.strip() or repr(token)[1:-1].replace(" ", "␣")


def attention_html(views: Sequence[View]) -> str:
    """Draw patterns as an HTML fragment with menus of prompts and layers.

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
    kept = within(views)
    prompts = [one | {"labels": list(map(shown_token, one["tokens"]))} for one in kept]
    # A script element ends at "</script", even inside a string.
    text = as_json({"colours": get_colorscale(SEQUENTIAL), "prompts": prompts}).replace("<", "\\u003c")
    left_out = f"<p>Left out, to keep the file small: {html.escape(kept[0]['left_out'])}.</p>" * bool(
        kept[0]["left_out"]
    )
    return (
        '<div class="attention"><p><label>prompt <select name="prompt"></select></label> '
        '<label>layer <select name="layer"></select></label> <span class="first"></span></p>'
        f'{left_out}<div class="grid"></div><p class="told"></p><div class="text"></div><div class="plot"></div>'
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
        f"<style>{PAGE}{STYLE}</style><script>{get_plotlyjs()}</script></head><body><h1>{title}</h1>{inner}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


PAGE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1400px; margin: 1.5rem auto; padding: 0 1.5rem; color: #222 }
h1 { font-size: 1.5rem } select { font: inherit; max-width: min(44rem, 100%); margin-right: 1rem }
"""

STYLE = """
.attention .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); gap: 8px; margin: .6rem 0 }
.attention .grid button, .first button { font: inherit; font-size: 12px; border: 2px solid transparent; background: none;
  padding: 2px; cursor: pointer } .first button { border: 1px solid #bbb; border-radius: 3px; margin: 0 .15rem; padding: 0 .4rem }
.attention button.chosen { border-color: #d55e00 }
.attention canvas { width: 100%; aspect-ratio: 1; display: block; image-rendering: pixelated }
.attention .text { font: 15px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.attention .text span { padding: 2px 0; margin-right: 3px; cursor: pointer; border-bottom: 2px solid transparent }
.attention .text span.asks { border-color: #d55e00 }
.attention p { max-width: none } .attention .told { color: #555; margin: .4rem 0 }
"""

# Plotly interprets < and & as HTML; text of tokens otherwise goes through textContent alone.
SCRIPT = r"""
for (const box of document.querySelectorAll("div.attention")) {
  const {prompts, colours} = JSON.parse(box.querySelector("script").textContent);
  const [prompt, layer] = box.querySelectorAll("select"), $ = name => box.querySelector("." + name);
  const state = {head: 0, token: null, known: new Map(), turn: 0};
  const shown = token => token.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const view = () => prompts[prompt.selectedIndex];
  // One byte a weight, head by head; row q has q + 1 of them.
  const unpacked = async () => {
    const key = prompt.selectedIndex + "/" + layer.value;
    if (!state.known.has(key)) {
      const packed = Uint8Array.from(atob(view().layers[layer.value]), letter => letter.charCodeAt(0));
      const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
      state.known.set(key, new Uint8Array(await new Response(stream).arrayBuffer()));
    }
    return state.known.get(key);
  };
  const ramp = Array.from({length: 256}, (_, i) => {
    const at = i / 255 * (colours.length - 1), low = Math.min(Math.floor(at), colours.length - 2);
    const part = colour => [1, 3, 5].map(start => parseInt(colour.slice(start, start + 2), 16));
    const [a, b] = [part(colours[low][1]), part(colours[low + 1][1])];
    return a.map((value, j) => Math.round(value + (b[j] - value) * (at - low)));
  });
  const size = n => n * (n + 1) / 2, weight = (bytes, n, head, q, k) => bytes[head * size(n) + size(q) + k];
  const small = (bytes, n, head) => {
    const canvas = document.createElement("canvas"), image = new ImageData(n, n);
    canvas.width = canvas.height = n;
    for (let q = 0; q < n; q++) for (let k = 0; k < n; k++) {
      const colour = k <= q ? [...ramp[weight(bytes, n, head, q, k)], 255] : [240, 240, 240, 255];
      image.data.set(colour, 4 * (q * n + k));
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  };
  const shade = (bytes, spans) => {
    const n = spans.length, asks = state.token ?? n - 1;
    spans.forEach((span, k) => {
      const share = k <= asks ? weight(bytes, n, state.head, asks, k) / 255 : 0;
      span.style.background = share ? `rgba(213, 94, 0, ${(0.85 * share).toFixed(3)})` : "";
      span.title = k <= asks ? share.toFixed(3) : "";
      span.classList.toggle("asks", k === asks);
    });
    const name = `${layer.value}.${state.head}`, asking = `${view().labels[asks]} (${asks})`;
    $("told").textContent = `Head ${name}: where ${asking} looks, the darker the more. `
      + "Point at a token to see where it looks; a click on it stays.";
  };
  const text = bytes => {
    const spans = view().tokens.map((token, i) => {
      const span = document.createElement("span");
      span.textContent = token.replaceAll("\n", "↵\n");
      return span;
    });
    let kept = state.token;
    const look = token => { state.token = token; shade(bytes, spans) };
    spans.forEach((span, i) => {
      span.onmouseenter = () => look(i);
      span.onmouseleave = () => look(kept);
      span.onclick = () => { kept = kept === i ? null : i; look(kept) };
    });
    $("text").replaceChildren(...spans);
    shade(bytes, spans);
  };
  const pattern = bytes => {
    const {labels} = view(), n = labels.length, names = labels.map(shown), width = $("plot").clientWidth || 800;
    const places = names.map((_, i) => i), every = Math.ceil(n / 120), cell = Math.min(26, Math.max(5, (width - 300) / n));
    const ticks = places.filter(i => i % every === 0);
    const axis = {tickvals: ticks, ticktext: ticks.map(i => names[i]), tickfont: {size: Math.min(12, Math.max(8, cell))},
                  showgrid: false, zeroline: false, constrain: "domain", range: [-0.5, n - 0.5]};
    const rows = places.map(q => places.slice(0, q + 1).map(k => weight(bytes, n, state.head, q, k) / 255));
    Plotly.react($("plot"), [{
      type: "heatmap", z: rows, text: rows.map((row, q) => row.map((_, k) => `${names[q]} (${q}) → ${names[k]} (${k})`)),
      hovertemplate: "%{text}<br>attention %{z:.3f}<extra></extra>",
      colorscale: colours, zmin: 0, zmax: 1, hoverongaps: false, xgap: n > 60 ? 0 : 1, ygap: n > 60 ? 0 : 1,
      colorbar: {title: {text: "attention weight", side: "right"}, thickness: 12, outlinewidth: 0,
                 lenmode: "pixels", len: Math.max(160, Math.min(cell * n, 300)), y: 1, yanchor: "top"},
    }], {
      height: 190 + cell * n, margin: {t: 20, l: 120, b: 120, r: 20},
      font: {family: "system-ui, sans-serif", size: 13}, hoverlabel: {align: "left"},
      xaxis: {...axis, title: {text: "token looked at (key)", standoff: 10}, tickangle: -60, automargin: true},
      yaxis: {...axis, title: {text: "token that looks (query)", standoff: 10}, range: [n - 0.5, -0.5], scaleanchor: "x",
              automargin: true},
    }, {displaylogo: false, responsive: true});
  };
  const draw = async () => {
    const turn = ++state.turn, bytes = await unpacked(), n = view().tokens.length, count = bytes.length / size(n);
    if (turn !== state.turn) return;
    state.head = Math.min(state.head, count - 1);
    $("grid").replaceChildren(...Array.from({length: count}, (_, head) => {
      const button = document.createElement("button");
      button.append(small(bytes, n, head), `${layer.value}.${head}`);
      button.classList.toggle("chosen", head === state.head);
      button.onclick = () => { state.head = head; draw() };
      return button;
    }));
    text(bytes);
    pattern(bytes);
  };
  const choose = () => {
    const {layers, first} = view(), names = Object.keys(layers).sort((a, b) => a - b), before = layer.value;
    layer.replaceChildren(...names.map(name => new Option(name, name)));
    if (names.includes(before)) layer.value = before;
    $("first").replaceChildren(...(first.length ? ["heads to look at first: "] : []), ...first.map(name => {
      const button = document.createElement("button");
      button.textContent = name;
      button.onclick = () => { [layer.value, state.head] = [name.split(".")[0], Number(name.split(".")[1])]; draw() };
      return button;
    }));
    state.token = null;
    draw();
  };
  prompt.replaceChildren(...prompts.map(({name, labels}) => {
    const text = labels.join(" ");
    return new Option(`${name}: ${text.length > 90 ? text.slice(0, 90) + "…" : text}`, name);
  }));
  prompt.onchange = choose;
  layer.onchange = draw;
  const [start] = view().first;
  choose();
  if (start) { [layer.value, state.head] = [start.split(".")[0], Number(start.split(".")[1])]; draw() }
}
"""

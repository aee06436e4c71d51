"""Where heads look, to be looked at: patterns in one small file beside a run's others, and drawn with their tokens.

    write_views(folder, look(model, tokenizer, prompts.input_ids, heads[:HEADS]))

A study whose result is a set of heads writes so where the first of them look on its first prompts; the report of the run
(`pyvene_ext.report`) shows one prompt and head at a time, with every weight under the mouse.

The file, attention.json, holds {"prompts": [{"name", "tokens": [...], "heads": {"3.5": [[1.0], [0.25, 0.75], ...]}}]}. A row is a
token that looks, with a weight for every token before it and for itself, rounded to three places.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyvene_ext.io.files import atomic_path, read_as
from pyvene_ext.io.packages import need
from pyvene_ext.methods.heads.patterns import can_be_seen, read_patterns
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.runs.figures import SEQUENTIAL
from pyvene_ext.stats.controls import Head

FILE = "attention.json"
HEADS, PROMPTS = 5, 5  # that a study shows if not told otherwise
CELLS = 400_000  # weights in a file, two megabytes or so; longer prompts are fewer


@dataclass(frozen=True)
class View:
    """Some heads on one prompt.

    Attributes:
        name: what menus call the prompt.
        tokens: as they are to be shown.
        patterns: where each token (row) looks, by head ("3.5").
    """

    name: str
    tokens: Sequence[str]
    patterns: Mapping[str, Float[np.ndarray, "query key"]]


def look(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    heads: Iterable[Head],
    *,
    which: Iterable[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[View]:
    """The patterns of some heads on some prompts, one prompt a forward pass; nothing if the model's attention cannot be seen.

    Args:
        model: with a card.
        tokenizer: the prompts'.
        prompts: to choose from, as ids.
        heads: (layer, head), in the order of the menu.
        which: the prompts; by default the first few, without those that would make the file too large.
        names: of all prompts; by default "prompt 0" and so on.
    """
    heads = list(dict.fromkeys(heads))
    which = list(which) if which is not None else _that_fit(prompts, len(heads))
    if not heads or not which or not can_be_seen(model):
        return []
    found: dict[tuple[int, Head], np.ndarray] = {}

    def see(layer: int, batch: Batch, pattern: Float[Tensor, "batch head query key"]) -> None:
        for head in heads:
            if head[0] == layer:
                found[batch.index[0], head] = pattern[0, head[1]].float().cpu().numpy()

    ids = [tuple(prompts[prompt]) for prompt in which]
    nowhere = ({"end": -1, "last": -1},) * len(ids)
    some = TokenizedPrompts(tuple(ids), ((0, 0),) * len(ids), nowhere, pad_id=0)  # not padded: one a batch
    read_patterns(model, some, see, batch_size=1, progress=False)
    return [
        View(
            names[prompt] if names else f"prompt {prompt}",
            [str(tokenizer.decode([token])) for token in ids[row]],
            {f"{layer}.{head}": found[row, (layer, head)] for layer, head in heads},
        )
        for row, prompt in enumerate(which)
    ]


def _that_fit(prompts: Sequence[Sequence[int]], heads: int) -> list[int]:
    """The first few prompts, without those that would take a file beyond its size."""
    chosen: list[int] = []
    room = CELLS
    for prompt, ids in enumerate(prompts):
        needed = heads * len(ids) * (len(ids) + 1) // 2
        if needed <= room and len(chosen) < PROMPTS:
            chosen.append(prompt)
            room -= needed
    return chosen


def write_views(folder: Path, views: Sequence[View]) -> None:
    """Write the views into the folder of a run; if there are none, leave no file of an earlier run there."""
    path = folder / FILE
    if not views:
        path.unlink(missing_ok=True)
        return
    text = json.dumps({"prompts": [_plain(view) for view in views]}, ensure_ascii=False, separators=(",", ":"))
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


Weight = Annotated[float, Field(ge=0, le=1.001, allow_inf_nan=False)]
HeadName = Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]


class _Prompt(BaseModel):
    name: str
    tokens: list[str]
    heads: Annotated[dict[HeadName, list[list[Weight]]], Field(min_length=1)]


class _File(BaseModel):
    prompts: list[_Prompt]


def read_views(path: str | Path) -> list[View]:
    """What `write_views` has written. Raises ValueError, naming the file, for anything else."""
    views = []
    for prompt in read_as(_File, path).prompts:
        patterns = {}
        for head, rows in prompt.heads.items():
            if [len(row) for row in rows] != list(range(1, len(prompt.tokens) + 1)):
                raise ValueError(
                    f"{path}: head {head} on {prompt.name} must have a row of 1, one of 2 and so on up to "
                    f"{len(prompt.tokens)} weights, as many as there are tokens."
                )
            patterns[head] = np.zeros((len(rows), len(rows)))
            for query, row in enumerate(rows):
                patterns[head][query, : query + 1] = row
        views.append(View(prompt.name, prompt.tokens, patterns))
    return views


def _plain(view: View) -> dict[str, Any]:
    """A view as the file has it; ValueError for a pattern that does not belong to the tokens."""
    heads = {}
    for head, pattern in view.patterns.items():
        n = len(view.tokens)
        if np.shape(pattern) != (n, n):
            raise ValueError(f"{view.name}: {n} tokens have no pattern of shape {np.shape(pattern)}.")
        rounded = np.asarray(pattern, np.float64).round(3)
        heads[head] = [rounded[query, : query + 1].tolist() for query in range(n)]
    return {"name": view.name, "tokens": list(view.tokens), "heads": heads}


def escaped(text: str) -> str:
    """Text for plotly, which reads tags but leaves quotation marks alone."""
    return html.escape(text, quote=False)


def shown_token(token: str) -> str:
    """A token for an axis: without the spaces around it, unless it has nothing else."""
    return token.strip() or repr(token)[1:-1].replace(" ", "␣")


def attention_html(views: Sequence[View]) -> str:
    """A menu of prompts, one of heads, and the chosen pattern, as a part of a page that has plotly.js and, below, `SCRIPT`.

    Raises ValueError if there is no view, or a pattern does not belong to its tokens; MissingExtra without plotly.
    """
    need("report")
    from plotly.colors import get_colorscale  # takes a while to import

    if not views:
        raise ValueError("there is nothing to look at; give at least one head and prompt.")
    prompts = [_plain(view) | {"tokens": list(map(shown_token, view.tokens))} for view in views]
    data = {"colours": get_colorscale(SEQUENTIAL), "prompts": prompts}
    # Text in a script ends at "</script", whatever it is within.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<div class="attention"><label>prompt <select name="prompt"></select></label> '
        '<label>head <select name="head"></select></label><div class="plot"></div>'
        f'<script type="application/json">{text}</script></div>'
    )


def attention_page(views: Sequence[View], title: str) -> str:
    """The same as a page by itself, which needs no network."""
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

# Plotly takes < and & for HTML.
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

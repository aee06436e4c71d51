"""Do the same attention heads matter in two languages? Correlate two [layer head] matrices of one model, head by head.

    python experiments/crosslingual_head_corr.py --a en.npy --b zh.npy
    python experiments/crosslingual_head_corr.py --a en.npy --b zh.npy --layers 12:24 --out_json corr.json
    python experiments/crosslingual_head_corr.py --a en.npy --b zh.npy --name_a English --name_b Chinese --no_layerwise
    python experiments/crosslingual_head_corr.py --a en/mean_delta.npy --b zh/mean_delta.npy --quantity "mean effect"

Method. Each head is one paired point: its activation frequency (`activation_frequencies_ifr.py`) in language a and in language b,
or its mean effect (mean_delta.npy of the same study, with --quantity). Pearson and Spearman correlation over all heads of the
chosen layers, and over the heads of each layer. Pairs with a NaN or infinite side are dropped and reported; a layer with a
constant side has no correlation, and a note. 95% intervals are percentile bootstraps over heads. Beside SciPy's p, which takes
heads as independent, stands a permutation p that shuffles heads within their layer only: association beyond what depth alone
gives. The layers' permutation p-values are corrected for their number (q, Benjamini-Hochberg). Up to seven heads have an exact p
(of four heads 1/24 at the least) and no interval.

The heads of two models have nothing to do with each other. Where the files that say what was run (NAME.json or NAME.meta.json
beside NAME.npy, summary.json in its folder or FOLDER.json beside that) name different weights, nothing is correlated, unless
--allow_different_weights says that the models are, say, checkpoints of one run.

Written: the numbers (JSON), beside them the config (YAML; running it again gives the same), a scatter plot of heads and a plot of
the layers' correlations.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pyvene_ext as px


@dataclass(frozen=True)
class Config:
    a: Path
    """.npy file, [layer head]"""
    b: Path
    """.npy file of the same shape"""
    layers: str = ":"
    """which layers, start:end, end not included; either may be left out"""
    layerwise: bool = True
    """also each layer on its own"""
    name_a: str | None = None
    """what a is called in figures; by default its file's name (its folder's, if both files have one name)"""
    name_b: str | None = None
    """what b is called in figures"""
    quantity: str = "activation frequency"
    """what the matrices hold, with its unit"""
    out_json: Path | None = None
    """where the numbers go; by default outputs/crosslingual_head_corr/A_vs_B/correlation.json"""
    scatter_png: Path | None = None
    """where the scatter plot goes (.png, with a .pdf beside it, .pdf or .svg); by default beside the default JSON"""
    layer_png: Path | None = None
    """where the plot of the layers goes; by default beside the default JSON"""
    n_resamples: px.flags.Count = 10_000
    """bootstrap resamples, and permutations"""
    allow_different_weights: bool = False
    """correlate although the two were measured on different weights, such as two checkpoints of one training run"""
    seed: px.flags.Seed = 0
    """of the bootstrap and the permutations"""

    def check_flags(self) -> None:
        if self.layer_png and not self.layerwise:
            raise ValueError("--layer_png asks for the plot that --no_layerwise leaves out; give one of the two.")


class Files(NamedTuple):
    """What is written."""

    json: Path
    config: Path
    scatter: Path
    layers: Path


def main(config: Config) -> None:
    # Everything that can be wrong is found before anything is computed or written.
    name_a, name_b = names(config)
    files = files_of(config, f"{name_a}_vs_{name_b}")
    a, b = px.io.read_head_matrix(config.a), px.io.read_head_matrix(config.b)
    if a.shape != b.shape:
        raise ValueError(f"{config.a} is {a.shape} and {config.b} is {b.shape}; the same heads are needed in both.")
    check_weights(config)
    layers = layer_range(config.layers, len(a))
    a, b = a[layers.start : layers.stop], b[layers.start : layers.stop]

    # The correlations, over all heads and layer by layer.
    overall = px.stats.correlate_heads(a, b, config.seed, config.n_resamples)
    if np.isnan(overall.pearson.r):
        raise ValueError(
            f"{config.a} and {config.b} have no correlation ({overall.note}): give matrices that vary over heads."
        )
    per_layer = px.stats.correlate_layers(a, b, config.seed, config.n_resamples) if config.layerwise else []

    # The files. The JSON comes last: where it is, the rest is.
    title = f"{name_a} against {name_b}"
    labels: dict[str, Any] = {"name_a": name_a, "name_b": name_b, "quantity": config.quantity, "title": title}
    scatter = px.figures.scatter_heads(a, b, correlation=overall, first_layer=layers.start, **labels)
    written = px.figures.save(scatter, files.scatter)
    if per_layer:
        lines = px.figures.layer_lines(layers, per_layer, title=f"{title}, layer by layer")
        written += px.figures.save(lines, files.layers)
    px.io.write_config(files.config, config)
    strength = evidence(overall)
    facts = record(config, (name_a, name_b), layers, a.shape[1], overall, per_layer)
    px.io.write_json(files.json, {**facts, "evidence": [strength.facts]})

    print(f"{title}: {config.quantity}, layers {layers.start} to {layers.stop - 1}, {a.shape[1]} heads each\n")
    print(table([("all", overall), *((str(layer), row) for layer, row in zip(layers, per_layer, strict=False))]))
    print(f"\n{strength}")
    print("\nwritten:", *written, files.config, files.json, sep="\n  ")


def check_weights(config: Config) -> None:
    """Raise ValueError if the two matrices are of different models, as far as the files beside them say."""
    found = {path: weights_of(path) for path in (config.a, config.b)}
    a, b = found[config.a], found[config.b]
    if a and b and a != b and not config.allow_different_weights:
        raise ValueError(
            f"{config.a} was measured on the weights {a} and {config.b} on {b}: a head of one model is not the head of the same "
            "layer and number in another; give --allow_different_weights if these are two checkpoints of one model."
        )


def files_about(path: Path) -> tuple[Path, ...]:
    """The files that may say what a matrix was measured on."""
    return (
        path.with_suffix(".meta.json"),
        path.with_suffix(".json"),
        path.parent / "summary.json",
        path.parent.with_suffix(".json"),
    )


def weights_of(path: Path) -> str | None:
    """The hash of the weights that a matrix was measured on, by what the file beside it says; None if none does."""
    for beside in files_about(path):
        if beside.is_file():
            facts = px.io.parse_json(beside.read_bytes())
            if isinstance(facts, dict) and isinstance(facts.get("weight_hash"), str):
                return facts["weight_hash"]
    return None


def names(config: Config) -> tuple[str, str]:
    """What the two matrices are called: as the user says, else by what tells the files apart."""
    a, b = config.a.stem, config.b.stem
    if a == b:
        a, b = config.a.resolve().parent.name, config.b.resolve().parent.name
    return config.name_a or a, config.name_b or b


def files_of(config: Config, name: str) -> Files:
    """Where everything goes; ValueError for names that are no figures, come twice, or are what the study reads."""
    folder = Path("outputs/crosslingual_head_corr") / re.sub(r"[^\w.+-]+", "_", name)
    json = config.out_json or folder / "correlation.json"
    scatter, layers = config.scatter_png or folder / "scatter.png", config.layer_png or folder / "layers.png"
    if json == json.with_suffix(".yaml"):
        raise ValueError(f"--out_json {json} is where the config goes; name it .json.")
    for figure in (scatter, layers):
        px.figures.check_path(figure)
    if config.layerwise and scatter.with_suffix("") == layers.with_suffix(""):
        raise ValueError(f"--scatter_png and --layer_png are both {scatter.with_suffix('')}; give two names.")
    outputs = [("out_json", json)]
    for flag, figure in (("scatter_png", scatter), ("layer_png", layers)):
        outputs += [(flag, path) for path in px.figures.files_of(figure)]
    also = [(flag, path) for flag, of in (("a", config.a), ("b", config.b)) for path in files_about(of)]
    px.io.refuse_inputs(config, outputs, config_file=json.with_suffix(".yaml"), also=also)
    return Files(json, json.with_suffix(".yaml"), scatter, layers)


def layer_range(text: str, n_layers: int) -> range:
    """The layers that "start:end" names.

    Raises:
        ValueError: the text has another form, or names no layer or one that is not there.
    """
    match = re.fullmatch(r"(\d*):(\d*)", text, re.ASCII)
    if not match:
        raise ValueError(f"--layers {text!r} is not start:end; write 0:{n_layers} for all {n_layers} layers.")
    start, stop = int(match[1] or 0), int(match[2] or n_layers)
    if not start < stop <= n_layers:
        raise ValueError(f"--layers {text!r} names no layer, or one that is not there: they are 0:{n_layers}.")
    return range(start, stop)


def record(
    config: Config,
    names: tuple[str, str],
    layers: range,
    n_heads: int,
    overall: px.stats.Correlation,
    per_layer: list[px.stats.Correlation],
) -> dict[str, Any]:
    """The numbers, and what a reader needs to repeat them."""
    a, b = (
        {"name": name, "file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for name, file in zip(names, (config.a, config.b), strict=True)
    )
    return {
        "a": a,
        "b": b,
        "quantity": config.quantity,
        "layers": [layers.start, layers.stop],
        "n_heads": n_heads,
        "overall": overall.as_dict(),
        "per_layer": layer_records(layers, per_layer) if per_layer else None,
        "n_resamples": config.n_resamples,
        "seed": config.seed,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "scipy")}},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def layer_records(layers: range, per_layer: list[px.stats.Correlation]) -> list[dict[str, Any]]:
    """One record per layer for the JSON file: the correlation and its q-values."""
    records = [{"layer": layer, **row.as_dict()} for layer, row in zip(layers, per_layer, strict=True)]
    for name in ("pearson", "spearman"):
        q = px.stats.q_values(np.array([getattr(row, name).p_within_layers for row in per_layer]))
        for record, value in zip(records, q, strict=True):
            record[name]["q"] = None if np.isnan(value) else float(value)
    return records


def evidence(overall: px.stats.Correlation) -> px.runs.Evidence:
    """Pearson's r over all heads, beside what depth alone would give."""
    pearson = overall.pearson
    interval = px.Interval(pearson.r, pearson.low, pearson.high)
    control = f"heads shuffled within their layer, p = {pearson.p_within_layers:.2g}"
    return px.runs.Evidence(f"{overall.n} heads", "Pearson's r is", interval, control, "matrices of more prompts")


def table(rows: list[tuple[str, px.stats.Correlation]]) -> str:
    """The summary as aligned text: one row for all heads, one per layer, and notes below."""

    def cells(c: px.stats.Coefficient) -> str:
        ends = f"[{c.low:6.3f}, {c.high:6.3f}]" if c.low == c.low or c.r != c.r else f"{'-':^16}"
        return f"{c.r:9.3f}  {ends} {c.p:8.2g} {c.p_within_layers:9.2g}"

    heads = [f"{name:>9}  {'95% interval':^16} {'p':>8} {'p within':>9}" for name in ("Pearson", "Spearman")]
    lines = ["layer    n dropped" + "".join(heads)]
    for label, row in rows:
        lines.append(f"{label:>5} {row.n:4} {row.dropped:7}{cells(row.pearson)}{cells(row.spearman)}")
    of_note: dict[str, list[str]] = {}
    for label, row in rows:
        if row.note:
            of_note.setdefault(row.note, []).append(label)
    lines += [f"layer{'s' * (len(of) > 1)} {', '.join(of)}: {note}" for note, of in of_note.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))

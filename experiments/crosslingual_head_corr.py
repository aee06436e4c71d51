"""Do the same attention heads matter in two languages? Correlate two [layer head] matrices of one model, head by head.

    python experiments/crosslingual_head_corr.py --a en.npy --b zh.npy
    python experiments/crosslingual_head_corr.py --a en.npy --b zh.npy --layers 12:24 --out_json corr.json
    python experiments/crosslingual_head_corr.py --a en.npy --b zh.npy --name_a English --name_b Chinese --no_layerwise

Method. Each head is one paired point: its activation frequency (`activation_frequencies_ifr.py`) in language a and in
language b. Pearson and Spearman correlation over all heads of the chosen layers, and over the heads of each layer. Pairs
with a NaN or infinite side are dropped and counted; a layer with a constant side has no correlation, and a note. 95% intervals
are percentile bootstraps over heads. Beside SciPy's p, which takes heads as independent, stands a permutation p that shuffles
heads within their layer only: association beyond what depth alone gives. The layers' permutation p-values are corrected
for their number (q, Benjamini-Hochberg).

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
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from pyvene_ext.io.cli import run, write_config
from pyvene_ext.io.files import read_npy, write_json
from pyvene_ext.runs import figures
from pyvene_ext.stats.correlations import (
    Coefficient,
    Correlation,
    correlate_heads,
    correlate_layers,
    q_values,
)


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
    n_resamples: int = 10_000
    """bootstrap resamples, and permutations"""
    seed: int = 0
    """of the bootstrap and the permutations"""


def main(config: Config) -> None:
    # Which files. All that can be wrong with the command is found before anything is computed or written.
    name_a, name_b = names(config)
    folder = Path("outputs/crosslingual_head_corr") / re.sub(r"[^\w.+-]+", "_", f"{name_a}_vs_{name_b}")
    out_json = config.out_json or folder / "correlation.json"
    scatter_png = config.scatter_png or folder / "scatter.png"
    layer_png = config.layer_png or folder / "layers.png"
    config_file = out_json.with_suffix(".yaml")
    if out_json == config_file:
        raise ValueError(f"--out_json {out_json} is where the config goes; name it .json.")
    figures.check_path(scatter_png)
    figures.check_path(layer_png)
    if config.layerwise and scatter_png.with_suffix("") == layer_png.with_suffix(""):
        raise ValueError(f"--scatter_png and --layer_png are both {scatter_png.with_suffix('')}; give two names.")
    if config.layer_png and not config.layerwise:
        raise ValueError("--layer_png asks for the plot that --no_layerwise leaves out; give one of the two.")
    a, hash_a = read_matrix(config.a)
    b, hash_b = read_matrix(config.b)
    if a.shape != b.shape:
        raise ValueError(f"{config.a} is {a.shape} and {config.b} is {b.shape}; the same heads are needed in both.")
    layers = layer_range(config.layers, len(a))
    a, b = a[layers.start : layers.stop], b[layers.start : layers.stop]

    # The correlations, over all heads and layer by layer.
    overall = correlate_heads(a, b, config.seed, config.n_resamples)
    if np.isnan(overall.pearson.r):
        raise ValueError(
            f"{config.a} and {config.b} have no correlation ({overall.note}): give matrices that vary over heads."
        )
    per_layer = correlate_layers(a, b, config.seed, config.n_resamples) if config.layerwise else []

    # The files. The JSON comes last: where it is, the rest is.
    title = f"{name_a} against {name_b}"
    scatter = figures.scatter_heads(
        a,
        b,
        name_a=name_a,
        name_b=name_b,
        quantity=config.quantity,
        correlation=overall,
        title=title,
        first_layer=layers.start,
    )
    written = figures.save(scatter, scatter_png)
    if per_layer:
        written += figures.save(figures.layer_lines(layers, per_layer, title=f"{title}, layer by layer"), layer_png)
    record = {
        "a": {"name": name_a, "file": str(config.a), "sha256": hash_a},
        "b": {"name": name_b, "file": str(config.b), "sha256": hash_b},
        "quantity": config.quantity,
        "layers": [layers.start, layers.stop],
        "n_heads": a.shape[1],
        "overall": overall.as_dict(),
        "per_layer": layer_records(layers, per_layer) if per_layer else None,
        "n_resamples": config.n_resamples,
        "seed": config.seed,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_config(config_file, config)
    write_json(out_json, record)
    written += [config_file, out_json]

    print(f"{title}: {config.quantity}, layers {layers.start} to {layers.stop - 1}, {a.shape[1]} heads each\n")
    print(table([("all", overall), *((str(layer), row) for layer, row in zip(layers, per_layer, strict=False))]))
    print("\nwritten:", *written, sep="\n  ")


def names(config: Config) -> tuple[str, str]:
    """What the two matrices are called: as the user says, else by what tells the files apart."""
    a, b = config.a.stem, config.b.stem
    if a == b:
        a, b = config.a.resolve().parent.name, config.b.resolve().parent.name
    return config.name_a or a, config.name_b or b


def read_matrix(path: Path) -> tuple[np.ndarray, str]:
    """A [layer head] matrix as float64, and the SHA-256 of its file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a .npy file of real numbers with two axes and at least one head.
    """
    matrix = read_npy(path)
    if not np.issubdtype(matrix.dtype, np.integer) and not np.issubdtype(matrix.dtype, np.floating):
        raise ValueError(f"{path} holds {matrix.dtype}, not real numbers; save it as float32 or float64.")
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{path} has shape {matrix.shape}; a [layer head] matrix with at least one head is needed.")
    return matrix.astype(np.float64), hashlib.sha256(path.read_bytes()).hexdigest()


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


def layer_records(layers: range, per_layer: list[Correlation]) -> list[dict[str, Any]]:
    """One record a layer for the JSON file: the correlation and its q-values."""
    records = [{"layer": layer, **row.as_dict()} for layer, row in zip(layers, per_layer, strict=True)]
    for name in ("pearson", "spearman"):
        q = q_values(np.array([getattr(row, name).p_within_layers for row in per_layer]))
        for record, value in zip(records, q, strict=True):
            record[name]["q"] = None if np.isnan(value) else float(value)
    return records


def table(rows: list[tuple[str, Correlation]]) -> str:
    """The summary as aligned text: one row for all heads, one a layer, and notes below."""

    def cells(c: Coefficient) -> str:
        return f"{c.r:9.3f}  [{c.low:6.3f}, {c.high:6.3f}] {c.p:8.2g} {c.p_within_layers:9.2g}"

    heads = [f"{name:>9}  {'95% interval':^16} {'p':>8} {'p within':>9}" for name in ("Pearson", "Spearman")]
    lines = ["layer    n dropped" + "".join(heads)]
    for label, row in rows:
        lines.append(f"{label:>5} {row.n:4} {row.dropped:7}{cells(row.pearson)}{cells(row.spearman)}")
    lines += [f"layer {label}: {row.note}" for label, row in rows if row.note]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main, Config))

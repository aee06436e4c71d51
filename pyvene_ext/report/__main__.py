"""Write one HTML page for one or several runs: findings, heads and paths to hover over, attention, figures. It works offline.

    python -m pyvene_ext.report outputs/activation_frequencies_ifr/tiny-qwen2.5_ioi_en
    python -m pyvene_ext.report outputs/english outputs/chinese --out outputs/both.html

A run is the folder that a study has written: config.yaml, JSON files of facts, CSV tables, figures. The page opens with findings:
the study's question, its strongest effects with intervals and controls, its verdicts. Then, for every table with the columns
layer and head, a map of one column at a time and the top heads with their intervals; of circuits (circuit_METHOD.csv) how
faithful the circuit of each method is, and the strongest edges by layer; for every other table of edges (a column "edge", or
"sender" and "receivers"), such as paths, a map of senders by receivers and a drawing by layer; the effect of each head prompt by
prompt (deltas.npy, prompts.json); where every head looks (attention.json); routes to a prediction (routes.json); the figures,
with links to their PDFs; sortable tables and links to all files; command, hashes, versions and flags. If tables of two runs of
one model have the same column for the same heads: both maps, their difference, a scatter plot of heads, and correlations with 95%
intervals.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pyvene_ext.io.cli import run


@dataclass(frozen=True)
class Config:
    """The runs, and the page."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of finished runs"""
    out: Path | None = None
    """the page; default report.html in the first folder"""


def main(config: Config) -> None:
    """Write the page."""
    from pyvene_ext.report import write_report  # heavy, and help does without

    out = config.out or (config.folders[0] if config.folders else Path()) / "report.html"
    write_report(config.folders, out)
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(run(main, Config))

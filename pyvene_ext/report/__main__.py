"""One page for one run or several: what was run, what it found, heads to hover over, figures. It needs no network.

    python -m pyvene_ext.report outputs/activation_frequencies_ifr/tiny-qwen2.5_ioi_en
    python -m pyvene_ext.report outputs/english outputs/chinese --out outputs/both.html

A run is the folder that a study has written: config.yaml, JSON files of facts, CSV tables, figures. On the page stand command,
model, data, hashes, versions and flags; the study's verdicts; of every table with the columns layer and head a map, one column of
numbers at a time, and the first heads with their intervals; the effect of each head prompt by prompt, where the run has kept it
(deltas.npy, prompts.json); where heads look (attention.json, `attention`); routes to a prediction (routes.json);
the figures, with links to their PDFs; tables to sort; and links to all files. Where tables of two runs have the same numbers for
the same heads, a table gives their rank correlation (Spearman).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pyvene_ext.io.cli import run
from pyvene_ext.report import write_report


@dataclass(frozen=True)
class Config:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of finished runs"""
    out: Path | None = None
    """the page; by default report.html in the first folder"""


def main(config: Config) -> None:
    out = config.out or (config.folders[0] if config.folders else Path()) / "report.html"
    write_report(config.folders, out)
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(run(main, Config))

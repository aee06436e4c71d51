"""Which heads look critical while a model reasons? Flow, hub, skip and composite scores inside the block of its reasoning.

    python experiments/critical_heads/rank_heads.py
    python experiments/critical_heads/rank_heads.py --models tiny-qwen2.5 tiny-llama3.1 --limit 100
    python experiments/critical_heads/rank_heads.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --limit 300 \
        --max_new_tokens 320

Method. The model solves the problems untouched; the reasoning it wrote is the block of a problem, and one forward pass over
question, block and `####` gives the scores, each a mean over the block's later queries and then over problems
(`block_scores` has the details). flow: the share of what enters the residual stream that the head brings from earlier
tokens of the block (information flow routes, Ferrando and Voita 2024). hub: the attention that one token of the block gets from
all later ones, for the token that gets most. skip: the attention that goes past the block to the question, its first token left
out. composite: the mean of the three ranks. They say where a head looks and what it moves, not whether that matters:
ablate_heads.py tells.

Written to the folder OUT: heads/MODEL_SCORE.csv for each score (scores,layer,head, highest first; what ablate_heads.py takes);
scores.csv, all scores of all heads with the token of the block that most often is the hub; figures/MODEL_SCORE.png;
attention.json, where the first heads by composite look; config.yaml (running it again gives the same); and summary.json, what was
run. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.files import write_csv
from pyvene_ext.methods.heads.scores import write_head_scores
from pyvene_ext.methods.reasoning.block_scores import (
    SCORES,
    BlockScores,
    Score,
    block_scores,
    check_model,
)
from pyvene_ext.models.devices import is_main_process
from pyvene_ext.runs import figures
from pyvene_ext.runs.attention import (
    HEADS,
    View,
    look,
    write_views,
)
from pyvene_ext.runs.facts import metadata

# Also as a script, this folder's files import one another as what they are: modules of the package critical_heads.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from critical_heads import setting as common

Row = dict[str, Any]
LABELS: dict[Score, str] = {
    "flow": "share of resid_mid from the block",
    "hub": "attention to the hub",
    "skip": "attention to the question",
    "composite": "mean rank (1: first)",
}


@dataclass(frozen=True)
class Config(common.Flags):
    top: int = 10
    """how many heads the terminal shows of each score"""


def main(config: Config) -> None:
    # What is run.
    check_flags(config)
    folder = common.folder_of(config, "rank_heads")
    problems = common.find_problems(config)

    # One model after the other.
    found: dict[str, BlockScores] = {}
    views: list[View] = []
    facts: Row = {}
    for name in config.models:
        setting = common.prepare(config, name, problems, folder, lambda _, model: check_model(model))
        found[setting.name] = block_scores(
            setting.model, setting.questions, batch_size=config.batch_size, progress=True
        )
        ids = setting.questions.prompts.input_ids
        heads = common.top_heads(found[setting.name].of("composite"), HEADS)
        names = [f"{setting.name}, problem {index}" for index in setting.questions.index]
        views += look(setting.model, setting.tokenizer, ids, heads, names=names)
        facts[setting.name] = metadata(setting.model, **setting.facts)

    if not is_main_process():
        return

    # The files.
    with common.written(folder, config, {"models": facts}):
        for model, scores in found.items():
            for score in SCORES:
                write_head_scores(folder / f"heads/{model}_{score}.csv", scores.of(score))
                title = f"{model}: {score}, {len(scores.flow)} problems"
                figure = figures.head_heatmap(scores.of(score), title, LABELS[score])
                figures.save(figure, folder / f"figures/{model}_{score}.png")
        write_views(folder, views)
        write_csv(folder / "scores.csv", [row for model, scores in found.items() for row in rows_of(model, scores)])

    for model, scores in found.items():
        print(common.counts(model, facts[model]))
        print(table(scores, config.top) + "\n")
    print(f"written:\n  {folder}/ (heads, scores, figures, config, summary)")


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that make no sense."""
    common.check_flags(config)
    if config.top < 1:
        raise ValueError(f"--top must be 1 or more, not {config.top}.")


def rows_of(model: str, scores: BlockScores) -> list[Row]:
    """One row a head."""
    values = {score: scores.of(score) for score in SCORES}
    hubs = scores.usual_hub()
    return [
        {
            "model": model,
            "layer": layer,
            "head": head,
            **{score: float(values[score][layer, head]) for score in SCORES},
            "hub_at": int(hubs[layer, head]),
        }
        for layer, head in np.ndindex(hubs.shape)
    ]


def table(scores: BlockScores, top: int) -> str:
    """The first heads by each score, and how the scores agree."""
    columns: list[Sequence[str]] = []
    for score in SCORES:
        values = scores.of(score)
        columns.append(
            [score, *(f"{common.in_short(head)} {values[head]:.3f}" for head in common.top_heads(values, top))]
        )
    lines = ["".join(f"{cell:>16}" for cell in row) for row in zip(*columns, strict=True)]
    pairs = [("flow", "hub"), ("flow", "skip"), ("hub", "skip")]
    agree = [f"{a} and {b} {spearmanr(scores.of(a), scores.of(b), axis=None).statistic:.2f}" for a, b in pairs]  # type: ignore[arg-type]
    return "\n".join([*lines, f"rank correlation over heads: {', '.join(agree)}"])


if __name__ == "__main__":
    sys.exit(run_study(main, Config))

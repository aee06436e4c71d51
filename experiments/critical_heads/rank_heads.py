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
ablate_heads.py shows that.

Written to the folder OUT: heads/MODEL_SCORE.csv for each score (scores,layer,head, highest first; what ablate_heads.py takes);
scores.csv, all scores of all heads with the token of the block that most often is the hub; figures/MODEL_SCORE.png;
attention.json, where the first heads by composite look; config.yaml (running it again gives the same); and summary.json, what was
run. The same command resumes an interrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import pyvene_ext as px

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pyvene_ext.runs.attention import View
    from pyvene_ext.runs.reasoning import Asked

FEW = 20  # problems, with fewer of which a ranking is mostly chance
RESAMPLES = 2000
Row = dict[str, Any]
LABELS: dict[px.flags.Score, str] = {
    "flow": "share of resid_mid from the block",
    "hub": "attention to the hub",
    "skip": "attention to the question",
    "composite": "mean rank (1: first)",
}


@dataclass(frozen=True)
class Config(px.flags.Problems):
    top: px.flags.Count = 10
    """how many heads the terminal shows of each score"""


def main(config: Config) -> None:
    run = px.RunFolder(config, "critical_heads/rank_heads", config.source, *config.models)
    problems = px.reasoning.find_problems(config)

    load = partial(px.reasoning.load, config, problems, run.unfinished, check)
    work = f"{px.io.counted(len(problems), 'text')} of at most {config.new_tokens} tokens, and the scores of all heads in them"

    # Each model solves the problems; one forward pass over its reasoning scores all heads.
    found: dict[str, px.methods.BlockScores] = {}
    views: list[View] = []
    facts: Row = {}
    for asked in px.runs.each_model(run, load, work, None if config.tiny else seconds_of, len(problems)):
        setting = asked.reason()
        scores = setting.block_scores()
        found[setting.name] = scores
        first = px.reasoning.top_heads(scores.of("composite"), px.runs.HEADS)
        names = [f"{setting.name}, problem {index}" for index in setting.questions.index]
        views += px.runs.look(setting.model, setting.tokenizer, setting.questions.prompts.input_ids, first, names=names)
        facts[setting.name] = px.metadata(setting.model, **setting.facts)
        del asked, setting  # two models need not fit in memory together
    if config.dry_run or not px.is_main_process():
        return

    for model, scores in found.items():
        print(px.reasoning.counts(model, facts[model]))
        print("\n".join([table(scores, config.top), *cautions(scores, facts[model]), ""]))
    evidence = [evidence_of(model, scores, config.seed) for model, scores in found.items()]
    with run.writing({"models": facts}, evidence, replacing=("*.csv",)):
        for model, scores in found.items():
            for score in px.methods.SCORES:
                px.methods.write_head_scores(run.path / f"heads/{model}_{score}.csv", scores.of(score))
                title = f"{model}: {score}, {len(scores.hub)} problems"
                figure = px.figures.head_heatmap(scores.of(score), title, LABELS[score])
                run.figure(f"{model}_{score}", figure)
        run.views(views)
        run.table("scores", [row for model, scores in found.items() for row in rows_of(model, scores)])


def evidence_of(model: str, scores: px.methods.BlockScores, seed: int) -> px.runs.Evidence:
    """The highest flow, beside that of the same layer's other heads on the same problems."""
    assert scores.flow is not None  # all scores are computed
    n, _, heads = scores.flow.shape
    layer, head = px.reasoning.top_heads(scores.of("flow"), 1)[0]
    own = scores.flow[:, layer, head]
    others = (scores.flow[:, layer].sum(1) - own) / max(heads - 1, 1)
    interval, rest = (px.stats.bootstrap_mean(x, px.rng(seed, "evidence"), RESAMPLES) for x in (own, others))
    where = f"{px.stats.head_label((layer, head))} (the largest of {scores.hub[0].size} heads)"
    control = f"{rest.mean:.3g} [{rest.low:.3g}, {rest.high:.3g}], the mean of layer {layer}'s other {heads - 1}"
    effect = f"{model}: flow from the block through {where}"
    return px.runs.Evidence(f"{n} problems", effect, interval, control, "a larger --limit", None)


def cautions(scores: px.methods.BlockScores, facts: Row) -> list[str]:
    """What makes a ranking doubtful: few problems for many heads, and texts that were cut before they had a block."""
    n, first, lines = len(scores.hub), facts["first_run"], []
    if n < FEW:
        lines.append(
            f"caution: {scores.hub[0].size} heads are ranked from {n} problems, so that the order of most is chance; give a "
            f"larger --limit ({FEW} problems with a block or more)"
        )
    if n < facts["problems"]:
        lines.append(
            f"{facts['problems'] - n} of {facts['problems']} texts have no block before a ####; {first['cut']} of all were cut: "
            "a larger --max_new_tokens, or --shots 3, gives more"
        )
    return lines


def check(_: int, __: str, model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose heads cannot be scored."""
    px.methods.check_scores(model)


def seconds_of(_: Config, asked: Asked, n: int) -> float:
    """How long the texts take at most, and flow, which is one or two forward passes more."""
    return asked.seconds(n) + 3 * n * asked.a_pass


def rows_of(model: str, scores: px.methods.BlockScores) -> list[Row]:
    """One row per head."""
    values = {score: scores.of(score) for score in px.methods.SCORES}
    hubs = scores.usual_hub()
    return [
        {
            "model": model,
            "layer": layer,
            "head": head,
            **{score: float(values[score][layer, head]) for score in px.methods.SCORES},
            "hub_at": int(hubs[layer, head]),
        }
        for layer, head in np.ndindex(hubs.shape)
    ]


def table(scores: px.methods.BlockScores, top: int) -> str:
    """The first heads by each score, and how the scores agree."""
    columns: list[Sequence[str]] = []
    for score in px.methods.SCORES:
        values = scores.of(score)
        heads = px.reasoning.top_heads(values, top)
        columns.append([score, *(f"{px.stats.head_label(head)} {values[head]:.3f}" for head in heads)])
    lines = ["".join(f"{cell:>16}" for cell in row) for row in zip(*columns, strict=True)]
    pairs: list[tuple[px.flags.Score, px.flags.Score]] = [("flow", "hub"), ("flow", "skip"), ("hub", "skip")]
    agree = [
        f"{a} and {b} {px.stats.rank_correlation(scores.of(a).ravel(), scores.of(b).ravel()):.2f}" for a, b in pairs
    ]
    return "\n".join([*lines, f"rank correlation over heads: {', '.join(agree)}"])


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))

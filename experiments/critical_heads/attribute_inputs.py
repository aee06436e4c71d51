"""Why does a critical head look at the hub? Integrated gradients of its attention, or of its output, by token of the prompt.

    python experiments/critical_heads/attribute_inputs.py
    python experiments/critical_heads/attribute_inputs.py --models tiny-qwen2.5 tiny-llama3.1 --heads 1.3 2.0 --hub 0
    python experiments/critical_heads/attribute_inputs.py --rankings my_heads.csv --target projection --direction answer
    python experiments/critical_heads/attribute_inputs.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --limit 200 \
        --max_new_tokens 320 --batch_size 8 --steps 100

Method. The model solves the problems untouched; the reasoning it wrote is the block of a problem, and its tokens are given again.
Of a head one number is attributed to the tokens: the attention that it pays to the hub, a token of the block, by default the one
that gets most of the head's attention in that problem (target attention); or what it adds to the residual stream, along a
direction (target projection): along its own output in that very prompt, which asks what made that output what it is; or along the
unembedding of the token that the model writes after `####`, without the final norm. The number is read at the block's last token,
at the prompt's end, or is the mean over the block's tokens (for attention those after the hub, as in the hub score of
rank_heads.py).

The attributions are integrated gradients (Sundararajan et al. 2017) over the embeddings of the tokens, by Captum
(`inputs`). The baseline of every token is the mean of all embeddings: from zero an RMSNorm changes all at
once, and 50 steps miss most of it; a pad token may be zero, too. Special tokens, such as a BOS that heads rest on, stay as they
are, and so do the solved problems of --shots, which the model reads once and not at every step. Attributions add up to what the
number has with the tokens beyond what it has with the baselines; positions being the same in both, the rest is not the tokens'
doing. How much they miss that is the completeness error. Problems with 5% and more are done again with more steps, up to
--most_steps; those that are still incomplete are in no mean, and are listed.

Tokens are tagged number, operator, entity or other (`token_tags`). A tag's share is that of the sum of |attribution|
over a problem's tokens up to the last query; beside it stand the share of these tokens that have the tag, and the share with
random other heads of the same layer (ours), asked for the same number. All are means over problems with bootstrap 95% intervals,
differences are paired.

Written to the folder OUT: tokens.csv (problem, token, text, tag, attribution) of the chosen heads; tags.csv, shares by tag;
heads.csv and problems.csv, the number itself with and without the tokens, and the completeness error; figures/by_tag.png, and
figures/MODEL_HEAD.png, some problems with their tokens coloured; config.yaml (running it again gives the same); and summary.json,
what was run, with the verdicts and the incomplete problems. The same command resumes an interrupted run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

import pyvene_ext as px

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pyvene_ext.methods.attribution.by_tag import AttributedHead
    from pyvene_ext.runs.reasoning import Asked, Setting
    from pyvene_ext.stats.controls import Head

FAINT = 0.02  # attention that is as good as none
Row = dict[str, Any]


@dataclass(frozen=True)
class Config(px.flags.Problems, px.flags.Ranking):
    target: Literal["attention", "projection"] = "attention"
    """what is attributed: the attention to the hub, or the head's output along a direction"""
    direction: Literal["own", "answer"] = "own"
    """for projection: the head's own output in the prompt as it is, or the unembedding of what the model writes as the answer"""
    query: Literal["block_mean", "block_last", "end"] = "block_mean"
    """where the head is read: the mean over the block, its last token, or the prompt's last"""
    hub: int | None = None
    """for attention: the token of the block that is the hub; by default in each problem the one that the head attends to most"""
    heads: px.flags.EachOnce[px.flags.HeadLabel] = ()
    """which heads, as layer.head; by default the first of a ranking"""
    by: px.flags.Score = "hub"
    n_heads: px.flags.Count | None = None
    """how many heads of the ranking; by default 2 with tiny models, 1 with others"""
    baseline: Literal["mean", "zero", "pad"] = "mean"
    """what every token's embedding is at the beginning: the mean of all embeddings, zero, or the pad token's"""
    steps: px.flags.Count = 50
    """points between baseline and prompt"""
    most_steps: px.flags.Count = 450
    """of problems whose attributions are incomplete with fewer; three times as many are tried each time"""
    sample: Annotated[int, Ge(2)] | None = None
    """at most this many problems, the first ones; by default 64 with tiny models, 12 with others"""
    random_heads: Annotated[int, Ge(0)] = 2
    """random other heads of the same layer for each head; 0 for none"""
    shown: px.flags.Count = 3
    """problems in a figure"""

    @property
    def wanted(self) -> int:
        """How many heads."""
        return len(self.heads) or self.n_heads or (2 if self.tiny else 1)

    @property
    def most_problems(self) -> int:
        """--sample or its default."""
        return self.sample or (64 if self.tiny else 12)

    @property
    def wants_hub(self) -> bool:
        """Whether the hub is still to be found."""
        return self.target == "attention" and self.hub is None

    def check_flags(self) -> None:
        px.io.need("input-attribution")
        super().check_flags()
        px.flags.check_rankings(self.rankings, self.models)
        if self.heads and self.rankings:
            raise ValueError("--heads and --rankings both say which heads; give one of them.")
        if self.target == "projection" and self.hub is not None:
            raise ValueError("--hub is a token that heads look at; leave it out for --target projection.")
        if self.target == "attention" and self.direction != "own":
            raise ValueError(f"--direction {self.direction} is for --target projection.")


def main(config: Config) -> None:
    run = px.RunFolder(config, "critical_heads/attribute_inputs", config.source, *config.models)
    problems = px.reasoning.find_problems(config)
    px.reasoning.check_number(problems)
    load = partial(px.reasoning.load, config, problems, run.unfinished, partial(check_heads, config))
    n, seconds = min(len(problems), config.most_problems), None if config.tiny else partial(seconds_of, len(problems))
    of_heads = px.io.counted(config.wanted, "head") + f", each with {px.io.counted(config.random_heads, 'random one')}"
    work = f"{of_heads}, on {px.io.counted(n, 'problem')} in {px.io.counted(config.steps, 'step')}"

    # Each model reads its own reasoning again; what its heads do there is attributed to the tokens.
    found: list[AttributedHead] = []
    facts: Row = {}
    every = px.runs.each_model(run, load, work, seconds, n, shorter(config), limit="sample")
    for number, asked in enumerate(every):
        setting = asked.reason()
        chosen = heads_and_hubs(setting, config, number)
        mine = [attribute(setting, config, head, hubs, list(chosen)) for head, hubs in chosen.items()]
        incomplete = {px.stats.head_label(one.head): np.array(one.problems)[~one.own.complete].tolist() for one in mine}
        facts[setting.name] = px.metadata(setting.model, **setting.facts, incomplete=incomplete)
        found += mine
        del asked, setting  # two models need not fit in memory together
    if config.dry_run or not px.is_main_process():
        return

    # How much of each head's number is the tokens' doing, and the shares of their tags, with intervals.
    heads = [row for one in found for row in px.methods.head_rows(one, config.seed)]
    tags = [row for one in found for row in px.methods.tag_rows(one, config.seed)]
    verdicts = verdicts_of(heads, tags, config)

    print(summary(facts, heads, tags, verdicts))
    shown = [evidence_of(one, tags) for one in found]
    with run.writing({"models": facts, "verdicts": verdicts}, shown, replacing=("*.csv",)):
        for one in found:
            figure = px.figures.coloured_tokens(px.figures.token_texts(one, config.shown), title_of(one, config))
            run.figure(f"{one.model}_{px.stats.head_label(one.head)}", figure)
        run.figure("by_tag", px.figures.tag_shares(tags))
        run.table("tokens", [row for one in found for row in px.methods.token_rows(one)])
        run.table("problems", [row for one in found for row in px.methods.problem_rows(one)])
        run.table("heads", heads)
        run.table("tags", tags)


# -- heads -------------------------------------------------------------------------------------------------------------


def check_heads(config: Config, number: int, name: str, model: PreTrainedModel) -> None:
    """Raise ValueError for a model that has no gradients, not these heads, or none that could be ranked; runs nothing."""
    px.methods.check_attributable(model)
    if (form := px.models.format_of(model)) is not None:
        px.models.refuse_latent_steps(model, [form.tokens])
    if config.target == "attention":
        px.methods.check_patterns(model)
    if not given_heads(config, number, name, model):
        px.methods.check_scores(model, config.by)


def given_heads(config: Config, number: int, name: str, model: PreTrainedModel) -> tuple[Head, ...]:
    """The heads that flags name for a model; none where they are to be ranked here."""
    chosen = px.reasoning.given_heads(model, name, config.wanted, config.heads, config.ranking_of(number))
    for head in chosen:
        random_heads(config, model, head, chosen)
    return chosen


def random_heads(config: Config, model: PreTrainedModel, head: Head, chosen: Sequence[Head]) -> list[Head]:
    """The other heads that a head is compared with, none of them chosen: of its layer, or of the nearest if it has too few."""
    if not config.random_heads:
        return []
    draw = px.rng(config.seed, "random heads", *head)
    sizes = px.models.n_layers(model.config), px.models.n_heads(model.config)
    others = px.stats.random_heads([head], *sizes, config.random_heads, draw, exclude=set(chosen) - {head})
    return sorted(other for (other,) in others.sets)


def heads_and_hubs(setting: Setting, config: Config, number: int) -> dict[Head, list[int] | None]:
    """The heads, and for each the token of every problem's block that it is asked about."""
    chosen = given_heads(config, number, setting.name, setting.model)
    if not chosen or config.wants_hub:
        scores = setting.block_scores(flow=not chosen and px.methods.needs_flow(config.by))
        chosen = chosen or px.reasoning.top_heads(scores.of(config.by), config.wanted)
    if config.wants_hub:
        return {head: scores.hub_at[:, *head].tolist() for head in chosen}
    return dict.fromkeys(chosen, None if config.hub is None else [config.hub] * len(setting.questions))


# -- measurement -------------------------------------------------------------------------------------------------------


def seconds_of(n_problems: int, config: Config, asked: Asked, n: int) -> float:
    """How long texts and attributions take at most, if all are complete with --steps."""
    # Forward and backward, on average through two thirds of the layers.
    points = config.steps * n * config.wanted * (1 + config.random_heads)
    return asked.seconds(n_problems) + 2 * points * asked.own_share * asked.a_pass


def shorter(config: Config) -> Row:
    """The flags that make a run shorter."""
    return {
        "random_heads": config.random_heads,
        "n_heads": 0 if config.heads else config.wanted,
        "steps": config.steps,
    }


def attribute(
    setting: Setting, config: Config, head: Head, hubs: list[int] | None, chosen: Sequence[Head]
) -> AttributedHead:
    """One head, with its random controls, on the first problems that have its hub."""
    answers = [ids[0] if ids else None for ids in setting.clean.ids] if config.direction == "answer" else None
    which: Row = {"hubs": hubs, "answers": answers, "model": setting.model, "most": config.most_problems}
    reading = px.methods.read_at(setting.questions, config.query, **which)
    if len(reading.queries) < 2:
        hub = "the head's hub" if config.hub is None else f"a token {config.hub}"
        what = "an answer" if hubs is None else f"{hub} in their block, and one after it that is read"
        raise ValueError(
            f"{len(reading.queries)} problems of {setting.name} have {what}; choose another --hub, or give more problems."
        )
    others = random_heads(config, setting.model, head, chosen)
    how: Row = {name: getattr(config, name) for name in ("hub", "baseline", "steps", "most_steps", "batch_size")}
    how |= {"name": setting.name, "shots": config.n_shots > 0}
    return px.methods.attribute_head(setting.model, setting.tokenizer, reading, head, others, setting.results, **how)


# -- what is shown -----------------------------------------------------------------------------------------------------


def evidence_of(one: AttributedHead, tags: Sequence[Row]) -> px.runs.Evidence:
    """The tag with most |attribution| beyond its share of the tokens, beside random heads."""
    head, complete = px.stats.head_label(one.head), int(one.own.complete.sum())
    mine = [row for row in tags if (row["model"], row["head"]) == (one.model, head)]
    top = max(mine, key=lambda row: -math.inf if math.isnan(row["more_than_tokens"]) else row["more_than_tokens"])
    effect = f"{one.model}, {head}: share of |attribution| of {top['tag']} tokens beyond their number, the largest of "
    effect += f"{len(mine)} tags,"
    random, control = px.stats.interval_in(top, "more_than_random"), "none"
    if math.isfinite(random.mean):
        numbers = ", ".join(str(int(some.complete.sum())) for some in one.controls.values())
        of = f"{px.io.counted(len(one.controls), 'random head')} of the layer (complete: {numbers} problems)"
        control = f"{random.mean:.3g} [{random.low:.3g}, {random.high:.3g}] more than with {of}"
    interval = px.stats.interval_in(top, "more_than_tokens") if complete > 1 else None
    more = "a larger --sample" if complete > 1 else "more --most_steps"
    return px.runs.Evidence(f"{complete} of {len(one.problems)} problems complete", effect, interval, control, more)


def verdict_of(head: Row, tags: Sequence[Row], config: Config) -> str:
    """How much of a head's number is the tokens' doing, and which tags have more of it than their share."""
    not_shown = "not established as " if head["change_low"] <= 0 <= head["change_high"] else ""
    line = (
        f"{head['model']}, {head['head']}: {number_in_words(config)} {head['value']:.3f}, {head['at_baseline']:.3f} with "
        f"baselines in place of tokens: {head['change']:.3f} [{head['change_low']:.3f}, {head['change_high']:.3f}] is "
        f"{not_shown}the tokens' doing"
    )
    short = f"{head['problems'] - head['complete']} of {head['problems']} problems incomplete"
    if head["complete"] < 2:
        return f"{line}; not attributable: {short} with {config.most_steps} steps, {remedy(config, head['value'])}"
    if math.isfinite(head["hub_share"]):
        line += f"; the hub's own token has {100 * head['hub_share']:.0f}% of |attribution|"
    above = [row for row in tags if row["more_than_tokens_low"] > 0]
    for row in above:
        line += f"; {row['tag']} has {100 * row['share']:.0f}% of it with {100 * row['token_share']:.0f}% of the tokens"
        if math.isfinite(row["more_than_random"]):
            more = "more than" if row["more_than_random_low"] > 0 else "no more than"
            line += f", {more} with random heads ({100 * row['random_share']:.0f}%)"
    line += "" if above else "; no tag has more than its share of the tokens"
    return line if head["complete"] == head["problems"] else f"{line}; {short} and left out"


def verdicts_of(heads: Sequence[Row], tags: Sequence[Row], config: Config) -> list[str]:
    """One line per head."""
    return [
        verdict_of(head, [row for row in tags if (row["model"], row["head"]) == (head["model"], head["head"])], config)
        for head in heads
        if not head["control_of"]
    ]


def number_in_words(config: Config) -> str:
    """What is attributed."""
    if config.target == "attention":
        return "attention to " + ("its hub" if config.hub is None else f"token {config.hub} of the block")
    return "output along " + ("its own direction" if config.direction == "own" else "the answer")


def remedy(config: Config, value: float) -> str:
    """What makes attributions complete: more steps, or a number that is not almost 0 to begin with."""
    if config.target == "projection" or value >= FAINT:
        return f"take more than --most_steps {config.most_steps}"
    if config.hub is None:
        return f"as the head hardly attends to any token ({value:.3f}); take other --heads"
    return f"as the head hardly attends to it ({value:.3f}); leave out --hub, or take other --heads"


def title_of(found: AttributedHead, config: Config) -> str:
    marked = " (boxed) from" if config.target == "attention" else " at"
    return (
        f"{found.model}, head {px.stats.head_label(found.head)}: {number_in_words(config)}{marked} what is underlined"
    )


def summary(facts: Row, heads: Sequence[Row], tags: Sequence[Row], verdicts: Sequence[str]) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        lines.append(px.reasoning.counts(model, found))
        lines.append(f"\n{'head':>6}  control of  hub  problems  complete  median error    value  baselines")
        for row in heads:
            if row["model"] == model:
                lines.append(
                    f"{row['head']:>6} {row['control_of']:>11} {'' if row['hub'] is None else row['hub']:>4} {row['problems']:9} "
                    f"{row['complete']:9} {100 * row['median_error']:12.2f}% {row['value']:8.3f} {row['at_baseline']:10.3f}"
                )
        lines.append(f"\n{'head':>6} {'tag':>9}  |attribution|   95% interval  tokens  random heads")
        for row in tags:
            if row["model"] == model:
                random = "" if math.isnan(row["random_share"]) else f"{100 * row['random_share']:.1f}%"
                interval = f"[{100 * row['share_low']:.1f}, {100 * row['share_high']:.1f}]"
                lines.append(
                    f"{row['head']:>6} {row['tag']:>9} {100 * row['share']:13.1f}% {interval:>14} "
                    f"{100 * row['token_share']:6.1f}% {random:>13}"
                )
        for head, some in found["incomplete"].items():
            if some:
                lines.append(
                    f"{head}: incomplete, and in no share: problems {', '.join(map(str, some))}; more --most_steps may mend it"
                )
        lines.append("")
    return "\n".join([*lines, "verdicts", *verdicts])


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))

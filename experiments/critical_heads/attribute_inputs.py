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
what was run, with the verdicts and the incomplete problems. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from jaxtyping import Float

import pyvene_ext as px

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pyvene_ext.methods.attribution.by_tag import AttributedHead
    from pyvene_ext.prompts.problems import Questions
    from pyvene_ext.runs.reasoning import Asked, Setting

MOST = 64  # problems
FAINT = 0.02  # attention that is as good as none
Row = dict[str, Any]
Head = tuple[int, int]


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
    heads: px.flags.EachOnce[px.flags.Head] = ()
    """which heads, as layer.head; by default the first of a ranking"""
    by: px.flags.Score = "hub"
    n_heads: px.flags.Count = 2
    """how many heads of the ranking"""
    baseline: Literal["mean", "zero", "pad"] = "mean"
    """what every token's embedding is at the beginning: the mean of all embeddings, zero, or the pad token's"""
    steps: px.flags.Count = 50
    """points between baseline and prompt"""
    most_steps: px.flags.Count = 450
    """of problems whose attributions are incomplete with fewer; three times as many are tried each time"""
    sample: Annotated[int, Ge(2)] | None = None
    """no more problems than so many, the first ones; by default 64"""
    random_heads: Annotated[int, Ge(0)] = 2
    """random other heads of the same layer for each head; 0 for none"""
    shown: px.flags.Count = 3
    """problems in a figure"""

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

    # Each model reads its own reasoning again; what its heads do there is attributed to the tokens.
    found: list[AttributedHead] = []
    facts: Row = {}
    for number, name in enumerate(config.models):
        asked = px.reasoning.load(config, name, problems, run.unfinished, partial(check_heads, config, number))
        n_heads, n = len(config.heads) or config.n_heads, min(len(problems), config.sample or MOST)
        work = f"{asked.name}: {n_heads} heads and {config.random_heads} random ones each on {n} problems, {config.steps} steps"
        if not run.announce(work, seconds_of(asked, config, n, n_heads), n=n, limit="sample"):
            continue
        setting = asked.reason()
        chosen = heads_and_hubs(setting, config, number)
        mine = [attribute(setting, config, n, head, hubs, [head for head, _ in chosen]) for head, hubs in chosen]
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
    strong = [evidence_of(one, rows) for one, rows in zip(found, by_head(found, tags), strict=True)]
    with run.writing({"models": facts, "verdicts": verdicts}, strong, replacing=("*.csv",)):
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


def given_heads(config: Config, number: int, name: str, model: PreTrainedModel) -> list[Head]:
    """The heads that flags name for a model; none where they are to be ranked here."""
    wanted = len(config.heads) or config.n_heads
    chosen = px.reasoning.given_heads(model, name, wanted, config.heads, config.ranking_of(number))
    for head in chosen:
        random_heads(config, model, head, chosen)
    return list(chosen)


def random_heads(config: Config, model: PreTrainedModel, head: Head, chosen: Sequence[Head]) -> list[Head]:
    """The other heads that a head is compared with, none of them chosen: of its layer, or of the nearest if it has too few."""
    if not config.random_heads:
        return []
    draw = px.rng(config.seed, "random heads", *head)
    sizes = px.models.n_layers(model.config), px.models.n_heads(model.config)
    others = px.stats.random_heads([head], *sizes, config.random_heads, draw, exclude=set(chosen) - {head})
    return sorted(other for (other,) in others.sets)


def heads_and_hubs(setting: Setting, config: Config, number: int) -> list[tuple[Head, list[int] | None]]:
    """The heads, and for each the token of every problem's block that it is asked about."""
    chosen = given_heads(config, number, setting.name, setting.model)
    hubs = None if config.target == "projection" else [config.hub or 0] * len(setting.questions)
    if chosen and not config.wants_hub:
        return [(head, hubs) for head in chosen]
    found = px.methods.block_scores(
        setting.model,
        setting.questions,
        flow=not chosen and px.methods.needs_flow(config.by),
        batch_size=config.batch_size,
        results=setting.results,
        progress=px.is_main_process(),
    )
    if not chosen:
        chosen = list(px.reasoning.top_heads(found.of(config.by), config.n_heads))
    return [(head, found.hub_at[:, *head].tolist() if config.wants_hub else hubs) for head in chosen]


# -- measurement -------------------------------------------------------------------------------------------------------


def attribute(
    setting: Setting, config: Config, sample: int, head: Head, hubs: list[int] | None, chosen: Sequence[Head]
) -> AttributedHead:
    """One head, with its random controls, on the first problems that have its hub."""
    questions, queries, at, directions = read_at(setting, config, sample, hubs)
    cut = tuple(ids[: some[-1] + 1] for ids, some in zip(questions.prompts.input_ids, queries, strict=True))
    prompts = replace(questions.prompts, input_ids=cut, positions=({"end": -1, "last": -1},) * len(cut))
    fixed = sorted(setting.tokenizer.all_special_ids)
    given = px.prompts.solved_before(questions, setting.tokenizer) if config.n_shots else [0] * len(questions)

    def measured(layer: int, head: int, most_steps: int) -> tuple[px.methods.Target, px.methods.InputAttribution]:
        target = px.methods.Target(layer, head, queries, at, directions)
        found = setting.results.get(
            {
                "input attribution": [config.target, config.direction, config.query, config.baseline],
                "steps": [config.steps, most_steps],
                "prompts": prompts.hash,
                "hubs": at,
                "given": given,
                "head": [layer, head],
            },
            lambda: px.methods.integrated_gradients(
                setting.model,
                prompts,
                target,
                baseline=config.baseline,
                steps=config.steps,
                most_steps=most_steps,
                fixed=fixed,
                given=given,
                batch_size=config.batch_size,
                progress=px.is_main_process(),
            ),
            px.methods.InputAttribution,
        )
        return target, found

    target, own = measured(*head, config.most_steps)
    # A control that ignores the hub would take all the steps there are, for shares of next to nothing.
    controls = {other: measured(*other, config.steps)[1] for other in random_heads(config, setting.model, head, chosen)}
    tags, texts = px.methods.tagged_prompts(cut, setting.tokenizer)
    return px.methods.AttributedHead(
        setting.name, head, own, controls, config.hub, target, questions.index, tags, texts
    )


def seconds_of(asked: Asked, config: Config, n: int, n_heads: int) -> float | None:
    """How long texts and attributions take, if all are complete with --steps; None with tiny models, which are quick."""
    if config.tiny:
        return None
    prompts = asked.questions.prompts
    given = sum(px.prompts.solved_before(asked.questions, asked.tokenizer)) if config.n_shots else 0
    own = 1 - given / sum(map(len, prompts.input_ids))  # share of the tokens that is read at every step
    a_pass = own * px.runs.seconds_a_pass(asked.model, prompts) / len(prompts)
    # Forward and backward, on average through two thirds of the layers.
    return asked.seconds() + 2 * config.steps * n * n_heads * (1 + config.random_heads) * a_pass


def read_at(
    setting: Setting, config: Config, sample: int, hubs: list[int] | None
) -> tuple[Questions, list[list[int]], list[int] | None, Float[Tensor, "problem d_model"] | None]:
    """The problems; where the head is read in each; the hubs, as tokens of the problems; the directions."""
    questions = setting.questions
    queries: list[list[int]] = []
    tokens: list[int] = []
    kept: list[int] = []
    for number, (block, ids) in enumerate(zip(questions.blocks, questions.prompts.input_ids, strict=True)):
        if hubs is not None and not -len(block) <= hubs[number] < len(block):
            continue
        at = -1 if hubs is None else block[hubs[number]]
        places = {"block_mean": list(block), "block_last": [block[-1]], "end": [len(ids) - 1]}[config.query]
        places = [place for place in places if place > at]
        if places and setting.clean.ids[number] and len(kept) < sample:
            kept.append(number)
            queries.append(places)
            tokens.append(at)
    if len(kept) < 2:
        hub = "the head's hub" if config.hub is None else f"a token {config.hub}"
        what = "an answer" if hubs is None else f"{hub} in their block, and one after it that is read"
        raise ValueError(
            f"{len(kept)} problems of {setting.name} have {what}; choose another --hub, or give more problems."
        )
    directions = None
    if config.direction == "answer":
        unembedding: Any = setting.model.get_output_embeddings()
        answers = [setting.clean.ids[number][0] for number in kept]
        directions = unembedding.weight[answers].detach().float()
    return questions.take(kept), queries, None if hubs is None else tokens, directions


# -- what is shown -----------------------------------------------------------------------------------------------------


def by_head(found: Sequence[AttributedHead], tags: Sequence[Row]) -> list[list[Row]]:
    """The rows of tags of each head."""
    return [
        [row for row in tags if (row["model"], row["head"]) == (one.model, px.stats.head_label(one.head))]
        for one in found
    ]


def evidence_of(one: AttributedHead, tags: Sequence[Row]) -> px.runs.Evidence:
    """The tag with most |attribution| beyond its share of the tokens, beside random heads."""
    top = max(tags, key=lambda row: -math.inf if math.isnan(row["more_than_tokens"]) else row["more_than_tokens"])
    complete = int(one.own.complete.sum())
    sample = f"{complete} of {len(one.problems)} problems complete"
    head = f"{one.model}, {px.stats.head_label(one.head)}"
    effect = (
        f"{head}: share of |attribution| of {top['tag']} tokens beyond their number, the largest of {len(tags)} tags,"
    )
    random = px.stats.interval_in(top, "more_than_random")
    control = "none"
    if math.isfinite(random.mean):
        control = f"{len(one.controls)} random heads of the layer, {random.mean:.3g} [{random.low:.3g}, {random.high:.3g}] less"
    interval = px.stats.interval_in(top, "more_than_tokens") if complete > 1 else None
    return px.runs.Evidence(
        sample, effect, interval, control, "a larger --sample" if complete > 1 else "more --most_steps"
    )


def verdicts_of(heads: Sequence[Row], tags: Sequence[Row], config: Config) -> list[str]:
    """Of each head: how much of its number is the tokens' doing, and which tags have more of it than their share."""
    lines = []
    for head in heads:
        if head["control_of"]:
            continue
        mine = [row for row in tags if (row["model"], row["head"]) == (head["model"], head["head"])]
        what = (
            f"attention to {hub_in_words(config)}"
            if config.target == "attention"
            else (f"output along {'its own direction' if config.direction == 'own' else 'the answer'}")
        )
        line = (
            f"{head['model']}, {head['head']}: {what} {head['value']:.3f}, {head['at_baseline']:.3f} with baselines in place of "
            f"tokens: {head['change']:.3f} [{head['change_low']:.3f}, {head['change_high']:.3f}] is "
        )
        line += "not established as " if head["change_low"] <= 0 <= head["change_high"] else ""
        line += "the tokens' doing"
        short = head["problems"] - head["complete"]
        if head["complete"] < 2:
            lines.append(
                f"{line}; not attributable: {short} of {head['problems']} problems incomplete with {config.most_steps} steps, "
                f"{remedy(config, head['value'])}"
            )
            continue
        if math.isfinite(head["hub_share"]):
            line += f"; the hub's own token has {100 * head['hub_share']:.0f}% of |attribution|"
        for row in mine:
            if row["more_than_tokens_low"] > 0:
                line += f"; {row['tag']} has {100 * row['share']:.0f}% of it with {100 * row['token_share']:.0f}% of the tokens"
                if math.isfinite(row["more_than_random"]):
                    more = "more than" if row["more_than_random_low"] > 0 else "no more than"
                    line += f", {more} with random heads ({100 * row['random_share']:.0f}%)"
        if not any(row["more_than_tokens_low"] > 0 for row in mine):
            line += "; no tag has more than its share of the tokens"
        lines.append(f"{line}; {short} of {head['problems']} problems incomplete and left out" if short else line)
    return lines


def hub_in_words(config: Config) -> str:
    return "its hub" if config.hub is None else f"token {config.hub} of the block"


def remedy(config: Config, value: float) -> str:
    """What makes attributions complete: more steps, or a number that is not almost 0 to begin with."""
    if config.target == "attention" and config.hub is not None and value < FAINT:
        return f"as the head hardly attends to it ({value:.3f}); leave out --hub, or take other --heads"
    if config.target == "attention" and value < FAINT:
        return f"as the head hardly attends to any token ({value:.3f}); take other --heads"
    return f"take more than --most_steps {config.most_steps}"


def title_of(found: AttributedHead, config: Config) -> str:
    head = f"{found.model}, head {px.stats.head_label(found.head)}"
    if config.target == "attention":
        return f"{head}: attention to {hub_in_words(config)} (boxed) from what is underlined"
    along = "its own direction" if config.direction == "own" else "the answer's unembedding"
    return f"{head}: output along {along} at what is underlined"


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

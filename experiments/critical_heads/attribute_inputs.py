"""Why does a critical head look at the hub? Integrated gradients of its attention, or of its output, by token of the prompt.

    python experiments/critical_heads/attribute_inputs.py
    python experiments/critical_heads/attribute_inputs.py --models tiny-qwen2.5 tiny-llama3.1 --heads 1.3 2.0 --hub 0
    python experiments/critical_heads/attribute_inputs.py --rankings my_heads.csv --target projection --direction answer
    python experiments/critical_heads/attribute_inputs.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --limit 200 \
        --max_new_tokens 320 --batch_size 8 --steps 100

Method. The model solves the problems untouched; the reasoning it wrote is the block of a problem, and its tokens are given again.
Of a head one number is attributed to the tokens: the attention that it pays to the hub, a token of the block (target attention),
or what it adds to the residual stream, along a direction (target projection): along its own output in that very prompt, which
asks what made that output what it is; or along the unembedding of the token that the model writes after `####`, without the
final norm. The number is read at the block's last token, at the prompt's end, or is the mean over the block's tokens (for
attention those after the hub, as in the hub score of rank_heads.py).

The attributions are integrated gradients (Sundararajan et al. 2017) over the embeddings of the tokens, by Captum
(`inputs`). The baseline of every token is the mean of all embeddings: from zero an RMSNorm changes all at
once, and 50 steps miss most of it; a pad token may be zero, too. Special tokens, such as a BOS that heads rest on, stay as they
are. Attributions add up to what the number has with the tokens beyond what it has with the baselines; positions being the same in
both, the rest is not the tokens' doing. How much they miss that is the completeness error; problems with 5% and more are in no
mean, and are listed. More --steps mend it.

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
    from pyvene_ext.runs.reasoning import Setting

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
    """for attention: the token of the block that is the hub; by default the one that most often is the head's own"""
    heads: px.flags.EachOnce[px.flags.Head] = ()
    """which heads, as layer.head; by default the first of a ranking"""
    by: px.flags.Score = "hub"
    n_heads: px.flags.Count = 2
    """how many heads of the ranking"""
    baseline: Literal["mean", "zero", "pad"] = "mean"
    """what every token's embedding is at the beginning: the mean of all embeddings, zero, or the pad token's"""
    steps: px.flags.Count = 50
    """points between baseline and prompt"""
    sample: Annotated[int, Ge(2)] = 64
    """no more problems than so many, the first ones"""
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
        setting = px.reasoning.prepare(config, name, problems, run.unfinished, partial(check_heads, config, number))
        chosen = heads_and_hubs(setting, config, number)
        mine = [attribute(setting, config, head, hub, [head for head, _ in chosen]) for head, hub in chosen]
        incomplete = {px.stats.head_label(one.head): np.array(one.problems)[~one.own.complete].tolist() for one in mine}
        facts[setting.name] = px.metadata(setting.model, **setting.facts, incomplete=incomplete)
        found += mine
        del setting  # two models need not fit in memory together
    if not px.is_main_process():
        return

    # How much of each head's number is the tokens' doing, and the shares of their tags, with intervals.
    heads = [row for one in found for row in px.methods.head_rows(one, config.seed)]
    tags = [row for one in found for row in px.methods.tag_rows(one, config.seed)]
    verdicts = verdicts_of(heads, tags, config)

    print(summary(facts, heads, tags, verdicts))
    with run.writing({"models": facts, "verdicts": verdicts}, replacing=("*.csv",)):
        for one in found:
            figure = px.figures.coloured_tokens(token_texts(one, config), title_of(one, config))
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
    if not given_heads(config, number, name, model) or config.wants_hub:
        px.methods.check_scores(model)


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


def heads_and_hubs(setting: Setting, config: Config, number: int) -> list[tuple[Head, int | None]]:
    """The heads, and the token of the block that each of them is asked about."""
    chosen = given_heads(config, number, setting.name, setting.model)
    if chosen and not config.wants_hub:
        return [(head, config.hub) for head in chosen]
    found = px.methods.block_scores(setting.model, setting.questions, batch_size=config.batch_size)
    if not chosen:
        chosen = list(px.reasoning.top_heads(found.of(config.by), config.n_heads))
    hubs = found.usual_hub()
    return [(head, int(hubs[head]) if config.wants_hub else config.hub) for head in chosen]


# -- measurement -------------------------------------------------------------------------------------------------------


def attribute(setting: Setting, config: Config, head: Head, hub: int | None, chosen: Sequence[Head]) -> AttributedHead:
    """One head, with its random controls, on the problems that have its hub."""
    questions, queries, hubs, directions = asked(setting, config, hub)
    cut = tuple(ids[: some[-1] + 1] for ids, some in zip(questions.prompts.input_ids, queries, strict=True))
    prompts = replace(questions.prompts, input_ids=cut, positions=({"end": -1, "last": -1},) * len(cut))
    fixed = sorted(setting.tokenizer.all_special_ids)
    condition = {
        "input attribution": [config.target, config.direction, config.query, config.baseline, config.steps],
        "prompts": prompts.hash,
        "hubs": hubs,
    }

    def measured(layer: int, head: int) -> tuple[px.methods.Target, px.methods.InputAttribution]:
        target = px.methods.Target(layer, head, queries, hubs, directions)
        found = setting.results.get(
            {**condition, "head": [layer, head]},
            lambda: px.methods.integrated_gradients(
                setting.model,
                prompts,
                target,
                baseline=config.baseline,
                steps=config.steps,
                fixed=fixed,
                batch_size=config.batch_size,
                progress=px.is_main_process(),
            ),
            px.methods.InputAttribution,
        )
        return target, found

    target, own = measured(*head)
    controls = {other: measured(*other)[1] for other in random_heads(config, setting.model, head, chosen)}
    tags, texts = px.methods.tagged_prompts(cut, setting.tokenizer)
    return px.methods.AttributedHead(setting.name, head, own, controls, hub, target, questions.index, tags, texts)


def asked(
    setting: Setting, config: Config, hub: int | None
) -> tuple[Questions, list[list[int]], list[int] | None, Float[Tensor, "problem d_model"] | None]:
    """The problems; where the head is read in each; the hubs; the directions."""
    questions, which = setting.questions, list(range(len(setting.questions)))
    if hub is not None:
        questions, which = setting.at(hub)
    queries: list[list[int]] = []
    hubs: list[int] = []
    kept: list[int] = []
    for number, (block, ids) in enumerate(zip(questions.blocks, questions.prompts.input_ids, strict=True)):
        at = -1 if hub is None else block[hub]
        places = {"block_mean": list(block), "block_last": [block[-1]], "end": [len(ids) - 1]}[config.query]
        places = [place for place in places if place > at]
        if places and setting.clean.ids[which[number]] and len(kept) < config.sample:
            kept.append(number)
            queries.append(places)
            hubs.append(at)
    if len(kept) < 2:
        what = "an answer" if hub is None else f"a token {hub} in their block, and one after it that is read"
        raise ValueError(
            f"{len(kept)} problems of {setting.name} have {what}; choose another --hub, or give more problems."
        )
    directions = None
    if config.direction == "answer":
        unembedding: Any = setting.model.get_output_embeddings()
        answers = [setting.clean.ids[which[number]][0] for number in kept]
        directions = unembedding.weight[answers].detach().float()
    return questions.take(kept), queries, None if hub is None else hubs, directions


# -- what is shown -----------------------------------------------------------------------------------------------------


def verdicts_of(heads: Sequence[Row], tags: Sequence[Row], config: Config) -> list[str]:
    """Of each head: how much of its number is the tokens' doing, and which tags have more of it than their share."""
    lines = []
    for head in heads:
        if head["control_of"]:
            continue
        mine = [row for row in tags if (row["model"], row["head"]) == (head["model"], head["head"])]
        what = (
            f"attention to token {head['hub']} of the block"
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
                f"{line}; not attributable: {short} of {head['problems']} problems incomplete, take more --steps"
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


def token_texts(found: AttributedHead, config: Config) -> list[px.figures.TokenText]:
    """Some problems' tokens for a figure; the hub in a box, what is read underlined."""
    every, own = range(len(found.problems)), found.own
    texts = []
    for problem in list(np.flatnonzero(own.complete)[: config.shown]) or list(every[: config.shown]):
        value, base, error = (float(x[problem]) for x in (own.value, own.at_baseline, own.error))
        heading = f"problem {found.problems[problem]}: {value:.3f}, {base:.3f} with baselines; "
        heading += f"completeness error {100 * error:.1f}%"
        hub = None if found.target.hubs is None else found.target.hubs[problem]
        queries = found.target.queries[problem]
        texts.append(px.figures.TokenText(heading, found.texts[problem], own.tokens[problem], hub, queries))
    return texts


def title_of(found: AttributedHead, config: Config) -> str:
    head = f"{found.model}, head {px.stats.head_label(found.head)}"
    if config.target == "attention":
        return f"{head}: attention to token {found.hub} of the block (boxed) from what is underlined"
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
                    f"{head}: incomplete, and in no share: problems {', '.join(map(str, some))}; more --steps mend it"
                )
        lines.append("")
    return "\n".join([*lines, "verdicts", *verdicts])


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))

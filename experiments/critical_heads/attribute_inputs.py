"""Why does a critical head look at the hub? Integrated gradients of its attention, or of its output, by token of the prompt.

    python experiments/critical_heads/attribute_inputs.py
    python experiments/critical_heads/attribute_inputs.py --models tiny-qwen2.5 tiny-llama3.1 --heads 1.3 2.0 --hub 0
    python experiments/critical_heads/attribute_inputs.py --rankings my_heads.csv --target projection --direction answer
    python experiments/critical_heads/attribute_inputs.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --limit 200 \
        --max_new_tokens 320 --batch_size 8 --steps 100

Method. The model solves the problems untouched; the reasoning it wrote is the block of a problem, and its tokens are given again.
Of a head one number is attributed to the tokens: the attention that it pays to the hub, a token of the block (target attention),
or what it adds to the residual stream, along a direction (target projection): along its own output in that very prompt, which
asks what made that output what it is; or along the unembedding of the token that the model writes behind `####`, without the
final norm. The number is read at the block's last token, at the prompt's end, or is the mean over the block's tokens (for
attention those behind the hub, as in the hub score of rank_heads.py).

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
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from transformers import PreTrainedModel

from modelcards import card_of, n_heads, n_layers
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.files import write_csv
from pyvene_ext.io.packages import need
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.inputs import (
    Baseline,
    InputAttribution,
    Target,
    check_model,
    integrated_gradients,
)
from pyvene_ext.methods.heads.lag import rank_heads
from pyvene_ext.methods.heads.scores import read_head_scores
from pyvene_ext.methods.reasoning.block_scores import Score, block_scores
from pyvene_ext.methods.reasoning.block_scores import check_model as check_scores
from pyvene_ext.models.devices import is_main_process
from pyvene_ext.models.latent_steps import format_of, refuse_latent_steps
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.prompts.token_tags import TAGS, tag_tokens
from pyvene_ext.runs import figures
from pyvene_ext.runs.facts import metadata
from pyvene_ext.stats.controls import Head, layer_matched_random_heads
from pyvene_ext.stats.intervals import Interval, paired_bootstrap

# Also as a script, this folder's files import one another as what they are: modules of the package critical_heads.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from critical_heads import setting as common

Row = dict[str, Any]
WIDTH = 100  # characters a line of the figures


@dataclass(frozen=True)
class Config(common.Flags):
    target: Literal["attention", "projection"] = "attention"
    """what is attributed: the attention to the hub, or the head's output along a direction"""
    direction: Literal["own", "answer"] = "own"
    """for projection: the head's own output in the prompt as it is, or the unembedding of what the model writes as the answer"""
    query: Literal["block_mean", "block_last", "end"] = "block_mean"
    """where the head is read: the mean over the block, its last token, or the prompt's last"""
    hub: int | None = None
    """for attention: the token of the block that is the hub; by default the one that most often is the head's own"""
    heads: tuple[str, ...] = ()
    """which heads, as layer.head; by default the first of a ranking"""
    rankings: tuple[str, ...] = ()
    """for each model a CSV scores,layer,head, such as rank_heads.py writes"""
    by: Score = "hub"
    """which score ranks the heads, where neither --heads nor --rankings are given"""
    n_heads: int = 2
    """how many heads of the ranking"""
    baseline: Baseline = "mean"
    """what every token's embedding is at the beginning: the mean of all embeddings, zero, or the pad token's"""
    steps: int = 50
    """points between baseline and prompt"""
    sample: int = 64
    """no more problems than so many, the first ones"""
    random_heads: int = 2
    """random other heads of the same layer for each head; 0 for none"""
    shown: int = 3
    """problems in a figure"""


class Found(NamedTuple):
    """What is attributed to the tokens of some problems, for one head.

    Attributes:
        controls: the same number of random heads of the layer.
        hub: which token of the block; None for a projection.
        problems: which ones, by their numbers in the set.
        tags: of the tokens of each problem, of those that are attributed ("special" for the others).
    """

    model: str
    head: Head
    own: InputAttribution
    controls: dict[Head, InputAttribution]
    hub: int | None
    target: Target
    problems: tuple[int, ...]
    tags: list[list[str]]
    texts: list[list[str]]


def main(config: Config) -> None:
    # What is run.
    check_flags(config)
    folder = common.folder_of(config, "attribute_inputs")
    problems = common.find_problems(config)

    # One model after the other.
    found: list[Found] = []
    facts: Row = {}
    for number, name in enumerate(config.models):
        setting = common.prepare(config, name, problems, folder, partial(check_heads, config, number))
        chosen = heads_and_hubs(setting, config, number)
        mine = [attributed(setting, config, head, hub, [head for head, _ in chosen]) for head, hub in chosen]
        incomplete = {common.in_short(one.head): np.array(one.problems)[~one.own.complete].tolist() for one in mine}
        facts[setting.name] = metadata(setting.model, **setting.facts, incomplete=incomplete)
        found += mine
        del setting  # two models need not fit in memory together

    if not is_main_process():
        return

    # The files.
    heads = [row for one in found for row in head_rows(one, config.seed)]
    tags = [row for one in found for row in tag_rows(one, config.seed)]
    verdicts = verdicts_of(heads, tags, config)
    with common.written(folder, config, {"models": facts, "verdicts": verdicts}):
        for one in found:
            figures.save(token_figure(one, config), folder / f"figures/{one.model}_{common.in_short(one.head)}.png")
        figures.save(tag_figure(tags), folder / "figures/by_tag.png")
        write_csv(folder / "tokens.csv", [row for one in found for row in token_rows(one)])
        write_csv(folder / "problems.csv", [row for one in found for row in problem_rows(one)])
        write_csv(folder / "heads.csv", heads)
        write_csv(folder / "tags.csv", tags)

    print(summary(facts, heads, tags, verdicts))
    print(f"\nwritten:\n  {folder}/ (tables, figures, config, summary)")


# -- what is asked for -------------------------------------------------------------------------------------------------


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that make no sense; MissingExtra without captum."""
    need("input-attribution")
    common.check_flags(config)
    for flag, least in (("n_heads", 1), ("steps", 1), ("sample", 2), ("random_heads", 0), ("shown", 1)):
        if (value := getattr(config, flag)) < least:
            raise ValueError(f"--{flag} must be {least} or more, not {value}.")
    common.check_heads(config.heads)
    if config.heads and config.rankings:
        raise ValueError("--heads and --rankings both say which heads; give one of them.")
    common.check_rankings(config.rankings, config)
    if config.target == "projection" and config.hub is not None:
        raise ValueError("--hub is a token that heads look at; leave it out for --target projection.")
    if config.target == "attention" and config.direction != "own":
        raise ValueError(f"--direction {config.direction} is for --target projection.")


def check_heads(config: Config, number: int, name: str, model: PreTrainedModel) -> None:
    """Raise ValueError for a model that has no gradients, not these heads, or none that could be ranked; runs nothing."""
    check_model(model)
    if (form := format_of(model)) is not None:
        refuse_latent_steps(model, [form.tokens])
    if config.target == "attention":
        card_of(model).component(model, "attention_pattern")
    if not given_heads(config, number, name, model) or wants_hub(config):
        check_scores(model)


def given_heads(config: Config, number: int, name: str, model: PreTrainedModel) -> list[Head]:
    """The heads that flags name for a model; none where they are to be ranked here."""
    layers, heads = n_layers(model.config), n_heads(model.config)
    chosen = list(common.heads_of(config.heads, name, model))
    if not chosen and config.n_heads > layers * heads:
        raise ValueError(f"--n_heads asks for {config.n_heads} heads and {name} has {layers * heads}; ask for fewer.")
    if config.rankings:
        scores = read_head_scores(config.rankings[number], model.config)
        chosen = list(rank_heads(scores, "full", layers, config.n_heads))
    for head in chosen:
        random_heads(config, model, head, chosen)
    return chosen


def wants_hub(config: Config) -> bool:
    """Whether the hub is still to be found."""
    return config.target == "attention" and config.hub is None


def random_heads(config: Config, model: PreTrainedModel, head: Head, chosen: Sequence[Head]) -> list[Head]:
    """The other heads of a layer that a head is compared with, none of them chosen; ValueError if there are too few."""
    if not config.random_heads:
        return []
    draw = rng(config.seed, "random heads", *head)
    sizes = n_layers(model.config), n_heads(model.config)
    others = layer_matched_random_heads([head], *sizes, config.random_heads, draw, exclude=set(chosen) - {head})
    return sorted({other for (other,) in others})


def heads_and_hubs(setting: common.Setting, config: Config, number: int) -> list[tuple[Head, int | None]]:
    """The heads, and the token of the block that each of them is asked about."""
    chosen = given_heads(config, number, setting.name, setting.model)
    if chosen and not wants_hub(config):
        return [(head, config.hub) for head in chosen]
    found = block_scores(setting.model, setting.questions, batch_size=config.batch_size)
    if not chosen:
        chosen = list(common.top_heads(found.of(config.by), config.n_heads))
    hubs = found.usual_hub()
    return [(head, int(hubs[head]) if wants_hub(config) else config.hub) for head in chosen]


# -- what is found -----------------------------------------------------------------------------------------------------


def attributed(setting: common.Setting, config: Config, head: Head, hub: int | None, chosen: Sequence[Head]) -> Found:
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

    def measured(layer: int, head: int) -> tuple[Target, InputAttribution]:
        target = Target(layer, head, queries, hubs, directions)
        found = setting.results.get(
            {**condition, "head": [layer, head]},
            lambda: integrated_gradients(
                setting.model,
                prompts,
                target,
                baseline=config.baseline,
                steps=config.steps,
                fixed=fixed,
                batch_size=config.batch_size,
                progress=is_main_process(),
            ),
            InputAttribution,
        )
        return target, found

    target, own = measured(*head)
    controls = {other: measured(*other)[1] for other in random_heads(config, setting.model, head, chosen)}
    tags, texts = [], []
    for ids in cut:
        of_tokens, words = tag_tokens(ids, setting.tokenizer)
        names = setting.tokenizer.convert_ids_to_tokens(list(ids))
        special = [token in fixed for token in ids]
        tags.append(["special" if at else tag for at, tag in zip(special, of_tokens, strict=True)])
        texts.append([name if at else word for at, name, word in zip(special, names, words, strict=True)])
    return Found(setting.name, head, own, controls, hub, target, questions.index, tags, texts)


def asked(
    setting: common.Setting, config: Config, hub: int | None
) -> tuple[Questions, list[list[int]], list[int] | None, Float[torch.Tensor, "problem d_model"] | None]:
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
        what = "an answer" if hub is None else f"a token {hub} in their block, and one behind it that is read"
        raise ValueError(
            f"{len(kept)} problems of {setting.name} have {what}; choose another --hub, or give more problems."
        )
    directions = None
    if config.direction == "answer":
        unembedding: Any = setting.model.get_output_embeddings()
        answers = [setting.clean.ids[which[number]][0] for number in kept]
        directions = unembedding.weight[answers].detach().float()
    return questions.take(kept), queries, None if hub is None else hubs, directions


def shares(tags: Sequence[Sequence[str]], found: InputAttribution) -> Float[np.ndarray, "problem tag"]:
    """Of the sum of |attribution| over a problem's tokens, the share of each tag; NaN for a problem that is not complete."""
    rows = [tag_shares(of_tokens, np.abs(some)) for of_tokens, some in zip(tags, found.tokens, strict=True)]
    return np.where(found.complete[:, None], np.array(rows), math.nan)


def tag_shares(tags: Sequence[str], sizes: Float[np.ndarray, " token"]) -> Float[np.ndarray, " tag"]:
    """Of the sum over the tokens that have a tag, the share of each tag."""
    sums = np.array([sum(size for size, at in zip(sizes, tags, strict=True) if at == tag) for tag in TAGS])
    return sums / sums.sum() if sums.sum() else np.full(len(TAGS), math.nan)


def mean_of(values: Float[np.ndarray, " problem"], seed: int, *names: str | int) -> Interval:
    """Mean and bootstrap interval over the problems that have a value; NaN if fewer than two have one."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Interval(math.nan, math.nan, math.nan)
    return paired_bootstrap(values, np.zeros(len(values)), rng(seed, *names), common.RESAMPLES)


def tag_rows(found: Found, seed: int) -> list[Row]:
    """A row a tag."""
    own = shares(found.tags, found.own)
    of_tokens = np.array([tag_shares(tags, np.ones(len(tags))) for tags in found.tags])
    others = np.array([shares(found.tags, control) for control in found.controls.values()])
    # The mean over the controls that are complete for a problem.
    counted = np.isfinite(others).sum(0) if len(others) else np.zeros_like(own)
    with np.errstate(invalid="ignore"):
        random = (np.nansum(others, 0) if len(others) else np.zeros_like(own)) / np.where(counted, counted, math.nan)
    rows = []
    for number, tag in enumerate(TAGS):
        columns = {
            "share": own[:, number],
            "more_than_tokens": (own - of_tokens)[:, number],
            "random_share": random[:, number],
            "more_than_random": (own - random)[:, number],
        }
        row: Row = {"model": found.model, "head": common.in_short(found.head), "hub": found.hub, "tag": tag}
        row["problems"] = int(np.isfinite(own[:, number]).sum())
        row["token_share"] = (
            float(of_tokens[np.isfinite(own[:, number]), number].mean()) if row["problems"] else math.nan
        )
        for name, values in columns.items():
            # The same draws of problems for every tag and difference.
            row |= common.of_interval(name, mean_of(values, seed, "shares"))
        rows.append(row)
    return rows


def head_rows(found: Found, seed: int) -> list[Row]:
    """A row for the head and for each of its controls: the number with and without the tokens."""
    rows = []
    for head, some in ((found.head, found.own), *found.controls.items()):
        finite = some.error[np.isfinite(some.error)]
        rows.append(
            {
                "model": found.model,
                "head": common.in_short(head),
                "control_of": "" if head == found.head else common.in_short(found.head),
                "hub": found.hub,
                "problems": len(some.value),
                "complete": int(some.complete.sum()),
                "median_error": float(np.median(finite)) if len(finite) else math.nan,
                "largest_error": float(finite.max()) if len(finite) else math.nan,
                "value": float(some.value.mean()),
                "at_baseline": float(some.at_baseline.mean()),
                **common.of_interval("change", mean_of(some.value - some.at_baseline, seed, "change")),
                "hub_share": hub_share(found, some),
            }
        )
    return rows


def hub_share(found: Found, some: InputAttribution) -> float:
    """Of the sum of |attribution|, the share of the hub's own token; the mean over complete problems."""
    if found.target.hubs is None or not some.complete.any():
        return math.nan
    sizes = [np.abs(tokens) for tokens in some.tokens]
    own = [size[hub] / size.sum() for size, hub in zip(sizes, found.target.hubs, strict=True)]
    return float(np.array(own)[some.complete].mean())


def problem_rows(found: Found) -> list[Row]:
    """A row a problem, for the head and for each of its controls."""
    return [
        {
            "model": found.model,
            "head": common.in_short(head),
            "control_of": "" if head == found.head else common.in_short(found.head),
            "problem": found.problems[number],
            "value": float(some.value[number]),
            "at_baseline": float(some.at_baseline[number]),
            "attributed": float(some.tokens[number].sum()),
            "error": float(some.error[number]),
            "complete": bool(some.complete[number]),
        }
        for head, some in ((found.head, found.own), *found.controls.items())
        for number in range(len(found.problems))
    ]


def token_rows(found: Found) -> list[Row]:
    """A row a token of the head's problems."""
    return [
        {
            "model": found.model,
            "head": common.in_short(found.head),
            "problem": problem,
            "token": token,
            "text": text,
            "tag": tag,
            "attribution": float(value),
            "complete": bool(complete),
        }
        for problem, texts, tags, values, complete in zip(
            found.problems, found.texts, found.tags, found.own.tokens, found.own.complete, strict=True
        )
        for token, (text, tag, value) in enumerate(zip(texts, tags, values, strict=True))
    ]


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


@matplotlib.rc_context(figures.STYLE)
def tag_figure(rows: Sequence[Row]) -> Figure:
    """Shares by tag, a panel a head: beside random heads, and against the share of tokens."""
    panels = list(dict.fromkeys((row["model"], row["head"]) for row in rows))
    columns = min(4, len(panels))
    figure = Figure(figsize=(max(1 + 2.9 * columns, 5.5), 0.6 + 2.7 * math.ceil(len(panels) / columns)))
    grid = figure.subplots(math.ceil(len(panels) / columns), columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (model, head) in zip(grid.flat, panels, strict=False):
        mine = [row for row in rows if (row["model"], row["head"]) == (model, head)]
        x = np.arange(len(mine))
        for name, label, colour, shift in (
            ("share", "the head", figures.BLUE, -0.2),
            ("random_share", "random heads of its layer", figures.LIGHT, 0.2),
        ):
            height, low, high = (np.array([100 * row[name + end] for row in mine]) for end in ("", "_low", "_high"))
            axes.bar(x + shift, height, 0.38, color=colour, label=label)
            axes.errorbar(
                x + shift, height, (height - low, high - height), fmt="none", ecolor="black", elinewidth=0.9, capsize=2
            )
        tokens = [100 * row["token_share"] for row in mine]
        axes.hlines(tokens, x - 0.42, x + 0.42, color=figures.ORANGE, linewidth=2, label="share of the tokens")
        axes.set_xticks(x, [row["tag"] for row in mine])
        axes.set(title=f"{model}, {head}", xlabel="kind of token")
        axes.grid(axis="y")
    for row in grid:
        row[0].set_ylabel("share of |attribution| (%, 95%)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@matplotlib.rc_context(figures.STYLE)
def token_figure(found: Found, config: Config) -> Figure:
    """Some problems' tokens, coloured by their attributions; the hub in a box, what is read underlined."""
    which = list(np.flatnonzero(found.own.complete)[: config.shown]) or list(
        range(min(config.shown, len(found.problems)))
    )
    cells, line = [], 0.0  # cells: problem, token, line, column, text
    headings: list[tuple[float, int]] = []
    for problem in which:
        headings.append((line, problem))
        line, column = line + 1.3, 0
        for token, text in enumerate(found.texts[problem]):
            text = text.replace("\n", "↵")
            text = text if figures.drawable(text) else "·" * len(text)
            if column and column + len(text) > WIDTH:
                line, column = line + 1.3, 0
            cells.append((problem, token, line, column, text))
            column += len(text)
        line += 2
    figure = Figure(figsize=(0.072 * WIDTH + 0.4, 0.17 * line + 1.1), layout="none")  # type: ignore[arg-type]
    height = figure.get_size_inches()[1]
    axes = figure.add_axes((0.02, 0.6 / height, 0.96, 1 - 1.1 / height))
    axes.set(xlim=(0, WIDTH), ylim=(line, -0.3))
    axes.set_axis_off()
    colours = ScalarMappable(Normalize(-1, 1), figures.DIVERGING)
    for start, problem in headings:
        value, base, error = (float(x[problem]) for x in (found.own.value, found.own.at_baseline, found.own.error))
        words = f"problem {found.problems[problem]}: {value:.3f}, {base:.3f} with baselines; "
        words += f"completeness error {100 * error:.1f}%"
        axes.text(0, start + 0.5, words, va="center", fontsize=8, color=figures.GREY)
    for problem, token, at, column, text in cells:
        values = found.own.tokens[problem]
        scaled = float(values[token] / (np.abs(values).max() or 1))
        hub = found.target.hubs is not None and token == found.target.hubs[problem]
        box = Rectangle((column, at), len(text), 1.05, facecolor=colours.to_rgba(np.array([scaled]))[0], linewidth=0)
        axes.add_patch(box)
        if hub:
            box.set(edgecolor="black", linewidth=1.3, zorder=3, clip_on=False)
        if token in found.target.queries[problem]:
            axes.hlines(at + 1.15, column + 0.1, column + len(text) - 0.1, color=figures.GREY, linewidth=0.8)
        dark = "white" if abs(scaled) > 0.7 else "black"
        for shift, character in enumerate(text):  # one by one, so that none drifts out of its cell
            axes.text(
                column + shift + 0.5, at + 0.55, character, ha="center", va="center", fontsize=7.5, color=dark, zorder=4
            )
    figure.text(0.02, 1 - 0.25 / height, title_of(found, config), fontsize=10)
    bar = figure.colorbar(
        colours, cax=figure.add_axes((0.3, 0.42 / height, 0.4, 0.1 / height)), orientation="horizontal"
    )
    bar.set_label("attribution, as a share of the problem's largest", fontsize=8)
    bar.outline.set_visible(False)
    return figure


def title_of(found: Found, config: Config) -> str:
    head = f"{found.model}, head {common.in_short(found.head)}"
    if config.target == "attention":
        return f"{head}: attention to token {found.hub} of the block (boxed) from what is underlined"
    along = "its own direction" if config.direction == "own" else "the answer's unembedding"
    return f"{head}: output along {along} at what is underlined"


def summary(facts: Row, heads: Sequence[Row], tags: Sequence[Row], verdicts: Sequence[str]) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        lines.append(common.counts(model, found))
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
    sys.exit(run_study(main, Config))

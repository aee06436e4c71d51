"""Which token of its reasoning does a model need? Noise at one token of the block after the other, at three sites.

    python experiments/critical_heads/patch_hub.py
    python experiments/critical_heads/patch_hub.py --models tiny-qwen2.5 tiny-llama3.1 --layers 0 1 2 --seeds 10
    python experiments/critical_heads/patch_hub.py --sites kv --kv_layers 2 3 --noise norm_matched
    python experiments/critical_heads/patch_hub.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --max_new_tokens 320

Method. The model solves the problems untouched. The reasoning it wrote is the block of a problem. With --regenerate answer it is
given again, and the answer after `####` is generated with noise at one token of the block. With --regenerate reasoning, the
default of real models, it is given up to that token, and the model writes what follows, reasoning and answer, with the noise at
the last token given; so nothing can be copied from later reasoning that was written untouched. Token i of a block is there in
problems whose blocks are longer than i; each is compared with the untouched run on the same problems. The sites are

    embed   what enters the first block
    resid   the residual stream after the blocks --layers, one at a time (called resid.2 after block 2)
    kv      keys (before RoPE) and values of all K/V heads in --kv_layers: what later tokens read, the token itself is left alone

and the noise is Gaussian with the mean and the standard deviation that each dimension has over all tokens of the problems with
their reasoning, or (norm_matched) has no preferred direction and the length of what it replaces. It replaces the
activation. Every seed draws its own.

A drop is the loss of accuracy against the untouched run, in points, the mean over seeds, with the bootstrap 95% interval over
problems (a problem's seeds stay together) and the largest of the seeds' McNemar p. Above 10 points a token is called causal and
below 2 redundant, by the mean and by the whole interval. The largest of many drops is large by chance too: `q` of a token is its
p with the false discovery rate over the block's tokens (Benjamini and Hochberg 1995).

Written to the folder OUT: drop_SITE.csv (position, MODEL_drop), one a site; positions.csv, the same with intervals, spread over
seeds, p and q; figures/drop_by_position.png; config.yaml (running it again gives the same); and summary.json, what was run, with
the verdicts. The same command resumes an interrupted run.
"""

from __future__ import annotations

import itertools
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

    from pyvene_ext.runs.reasoning import Asked, Setting
    from pyvene_ext.specs.joint import Spec

Site = Literal["embed", "resid", "kv"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Config(px.flags.Regeneration):
    sites: px.flags.OneOrMore[Site] = ("embed", "resid", "kv")
    """where the noise is put"""
    layers: px.flags.EachOnce[int] = ()
    """the blocks after which resid has it; by default the one in the middle"""
    kv_layers: px.flags.EachOnce[int] = ()
    """the layers in which kv has it; by default all"""
    noise: Literal["gaussian", "norm_matched"] = "gaussian"
    """its distribution"""
    seeds: px.flags.Count | None = None
    """draws of the noise; by default 5, and 1 where reasoning is regenerated"""
    places: px.flags.Count | None = None
    """only this many tokens of the block, evenly spaced; by default all, and 4 where reasoning is regenerated"""
    min_problems: Annotated[int, Ge(2)] = 10
    """a token of the block that fewer problems have is skipped"""

    def n_seeds(self, anew: bool) -> int:
        """--seeds or its default."""
        return self.seeds or (1 if anew else 5)

    def most_places(self, anew: bool) -> int | None:
        """--places or its default; None for all."""
        return self.places or (4 if anew else None)


def main(config: Config) -> None:
    run = px.RunFolder(config, "critical_heads/patch_hub", config.source, *config.models)
    problems = px.reasoning.find_problems(config)
    px.reasoning.check_number(problems, config.min_problems)
    load = partial(px.reasoning.load, config, problems, run.unfinished, partial(check_layers, config))
    what = f"noise at tokens of the reasoning of {px.io.counted(len(problems), 'problem')}"
    n, least = len(problems), config.min_problems

    # Each model answers after the reasoning it wrote, with noise at one token of that. (Names of sites depend on its depth.)
    rows: list[Row] = []
    facts: Row = {}
    for asked in px.runs.each_model(run, load, what, seconds_of, n, shorter(config), least=least):
        setting = asked.reason()
        rows += measure(setting, config)
        facts[setting.name] = px.metadata(setting.model, **setting.facts)
        del asked, setting  # two models need not fit in memory together
    if config.dry_run or not px.is_main_process():
        return

    # Which tokens are needed.
    verdicts = verdicts_of(rows)

    print(summary(facts, rows, verdicts))
    shown = [evidence(rows, model) for model in facts]
    with run.writing({"models": facts, "verdicts": verdicts}, shown, replacing=("*.csv",)):
        run.figure("drop_by_position", px.figures.drops_by_token(rows))
        for site in dict.fromkeys(row["site"] for row in rows):
            of_site = [row for row in rows if row["site"] == site]
            run.table(f"drop_{site}", px.stats.side_by_side(of_site, "position", "drop", "drop"))
        run.table("positions", rows)


def check_layers(config: Config, _: int, name: str, model: PreTrainedModel) -> None:
    """Raise ValueError for a layer that the model has not."""
    last = px.models.n_layers(model.config) - 1
    for flag, layers in (("layers", config.layers), ("kv_layers", config.kv_layers)):
        for layer in layers:
            if not 0 <= layer <= last:
                raise ValueError(f"--{flag} {layer}: {name} has layers 0 to {last}.")


def seconds_of(config: Config, asked: Asked, n: int) -> float:
    """How long the texts, and then all runs take at most: sites x tokens x seeds."""
    sites = specs_of(config, asked.model, config.seed)
    runs = len(sites) * (config.most_places(asked.anew) or config.new_tokens) * config.n_seeds(asked.anew)
    # Where reasoning is regenerated, noise is at the last token that is given.
    return asked.seconds(n) + asked.seconds_of_conditions(n, runs, 0 if asked.anew else 1)


def shorter(config: Config) -> dict[str, Any]:
    """The flags that make a run shorter."""
    places = config.most_places(config.anew) or config.new_tokens
    return {"seeds": config.n_seeds(config.anew), "places": places, "sites": config.sites}


# -- measurement and statistics ----------------------------------------------------------------------------------------


def specs_of(config: Config, model: PreTrainedModel, seed: int) -> dict[str, Spec]:
    """Noise at the token "hub", by the name of the site."""
    options: Any = {"layers": config.layers, "kv_layers": config.kv_layers, "noise": config.noise}
    return px.methods.noise_at("hub", model.config, config.sites, seed, **options)


def measure(setting: Setting, config: Config) -> list[Row]:
    """Every site, token and seed of one model: accuracy in percent, its loss in points."""
    by_seed = [specs_of(config, setting.model, config.seed + draw) for draw in range(config.n_seeds(setting.anew))]
    specs = {site: [of_seed[site] for of_seed in by_seed] for site in by_seed[0]}
    # Over all tokens of all problems, whichever token is replaced.
    reference = px.reference_for(
        setting.model,
        [spec for of_site in specs.values() for spec in of_site],
        setting.questions.prompts,
        batch_size=config.batch_size,
        progress=False,
    )
    positions = px.reasoning.positions_of(setting, config.min_problems, config.most_places(setting.anew))
    having = {position: setting.at(position) for position in positions}
    every = [(site, position) for site in specs for position in positions]
    asked = [(having[position][0], spec) for site, position in every for spec in specs[site]]
    found = iter(setting.run(asked, reference))
    of_place = {place: list(itertools.islice(found, len(by_seed))) for place in every}
    rows = []
    for site in specs:
        some = []
        for position in positions:
            _, which = having[position]
            clean, runs = setting.clean.correct[which], of_place[site, position]
            after = np.stack([run.correct for run in runs])
            drop = px.stats.accuracy_drop(clean, after.mean(0), config.seed, site, position)
            some.append(
                {
                    "model": setting.name,
                    "site": site,
                    "position": position,
                    "problems": len(which),
                    "clean_accuracy": 100 * float(clean.mean()),
                    "accuracy": 100 * float(after.mean()),
                    "drop": drop.mean,
                    "low": drop.low,
                    "high": drop.high,
                    "sd_over_seeds": 100 * float(after.mean(1).std(ddof=1)) if len(runs) > 1 else float("nan"),
                    "unparsed": 100 * float(np.mean([~run.parsed for run in runs])),
                    "mcnemar_p": max(px.stats.mcnemar_p(clean, of_seed) for of_seed in after),
                }
            )
        q = px.stats.q_values(np.array([row["mcnemar_p"] for row in some]))
        rows += [{**row, "q": float(value)} for row, value in zip(some, q, strict=True)]
    return rows


# -- what is shown -----------------------------------------------------------------------------------------------------


def verdicts_of(rows: Sequence[Row]) -> list[str]:
    """One line per model and site: the token whose loss is worst, and how many are causal or redundant."""
    lines = []
    for model, site in dict.fromkeys((row["model"], row["site"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["site"]) == (model, site)]
        drops = [px.Interval(row["drop"], row["low"], row["high"]) for row in mine]
        words = [px.stats.verdict(drop, unparsed=row["unparsed"] / 100) for drop, row in zip(drops, mine, strict=True)]
        worst = max(range(len(mine)), key=lambda i: drops[i].mean)
        lines.append(
            f"{model}, {site}: {words.count('causal')} of {len(mine)} tokens causal, {words.count('redundant')} redundant; the "
            f"largest drop is at token {mine[worst]['position']} ({mine[worst]['problems']} problems): "
            f"{px.stats.in_points(drops[worst])}, q = {mine[worst]['q']:.2g}: {words[worst]}"
        )
    return lines


def evidence(rows: Sequence[Row], model: str) -> px.runs.Evidence:
    """The largest drop of a model, beside the other tokens' at the same site."""
    mine = [row for row in rows if row["model"] == model]
    worst = max(mine, key=lambda row: row["drop"])
    others = [row["drop"] for row in mine if row["site"] == worst["site"] and row is not worst]
    effect = f"{model}, noise at token {worst['position']} ({worst['site']}), the largest of {len(mine)} drops, costs (points)"
    control = f"q = {worst['q']:.2g} over {len(others) + 1} tokens"
    control += f", the others cost {np.mean(others):.1f} on average" if others else ""
    drop = px.Interval(worst["drop"], worst["low"], worst["high"])
    return px.runs.Evidence(f"{worst['problems']} problems", effect, drop, control, "a larger --limit")


def summary(facts: Row, rows: Sequence[Row], verdicts: Sequence[str]) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        sites = list(dict.fromkeys(row["site"] for row in rows if row["model"] == model))
        mine = {(row["site"], row["position"]): row for row in rows if row["model"] == model}
        lines += [px.reasoning.counts(model, found), ""]
        lines.append("token  problems" + "".join(f"{site + ' drop':>14}{'95% interval':>16}" for site in sites))
        for position in dict.fromkeys(position for _, position in mine):
            of_sites = [mine[site, position] for site in sites]
            intervals = [f"[{row['low']:.1f}, {row['high']:.1f}]" for row in of_sites]
            cells = [f"{row['drop']:14.1f}{words:>16}" for row, words in zip(of_sites, intervals, strict=True)]
            lines.append(f"{position:5} {of_sites[0]['problems']:9}" + "".join(cells))
        lines.append("")
    return "\n".join([*lines, px.reasoning.VERDICTS, *verdicts])


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))

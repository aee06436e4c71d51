"""Which token of its reasoning does a model need? Noise at one token of the block after the other, at three sites.

    python experiments/critical_heads/patch_hub.py
    python experiments/critical_heads/patch_hub.py --models tiny-qwen2.5 tiny-llama3.1 --layers 0 1 2 --seeds 10
    python experiments/critical_heads/patch_hub.py --sites kv --kv_layers 2 3 --noise norm_matched
    python experiments/critical_heads/patch_hub.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --max_new_tokens 320

Method. The model solves the problems untouched. The reasoning it wrote is the block of a problem; it is given again, and the
answer behind `####` is generated with noise at one token of the block. Token i of a block is there in problems whose blocks are
longer than i; each is compared with the untouched run on the same problems. The sites are

    embed   what enters the first block
    resid   the residual stream behind the blocks --layers, one at a time (called resid.2 behind block 2)
    kv      keys (before RoPE) and values of all K/V heads in --kv_layers: what later tokens read, the token itself is left alone

and the noise is Gaussian with the mean and the standard deviation that each dimension has over all tokens of the problems with
their reasoning, or (norm_matched) has no preferred direction and the length of what it replaces. It comes in place of the
activation. Every seed draws its own.

A drop is the loss of accuracy against the untouched run, in points, the mean over seeds, with the bootstrap 95% interval over
problems (a problem's seeds stay together) and the largest of the seeds' McNemar p. Above 10 points a token is called causal and
below 2 redundant, by the mean and by the whole interval. The largest of many drops is large by chance too: `q` of a token is its
p with the false discovery rate over the block's tokens (Benjamini and Hochberg 1995).

Written to the folder OUT: drop_SITE.csv (position, MODEL_drop), one a site; positions.csv, the same with intervals, spread over
seeds, p and q; figures/drop_by_position.png; config.yaml (running it again gives the same); and summary.json, what was run, with
the verdicts. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm
from transformers import PreTrainedModel

from modelcards import n_kv_heads, n_layers
from pyvene_ext.engine.plain import reference_for
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.files import write_csv
from pyvene_ext.models.devices import is_main_process
from pyvene_ext.runs import figures
from pyvene_ext.runs.facts import metadata
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.controls import mcnemar_p, verdict
from pyvene_ext.stats.correlations import q_values
from pyvene_ext.stats.intervals import Interval

# Also as a script, this folder's files import one another as what they are: modules of the package critical_heads.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from critical_heads import setting as common

Site = Literal["embed", "resid", "kv"]
Row = dict[str, Any]
COLOURS = (figures.GREY, figures.ORANGE, figures.BLUE, figures.GREEN, figures.PINK, figures.SKY, figures.AMBER)


@dataclass(frozen=True)
class Config(common.Flags):
    sites: tuple[Site, ...] = ("embed", "resid", "kv")
    """where the noise is put"""
    layers: tuple[int, ...] = ()
    """the blocks behind which resid has it; by default the one in the middle"""
    kv_layers: tuple[int, ...] = ()
    """the layers in which kv has it; by default all"""
    noise: Literal["gaussian", "norm_matched"] = "gaussian"
    """its distribution"""
    seeds: int = 5
    """draws of the noise"""
    places: int | None = None
    """only so many tokens of the block, evenly spaced; by default all"""
    min_problems: int = 10
    """a token of the block that fewer problems have is left out"""


def main(config: Config) -> None:
    # What is run.
    check_flags(config)
    folder = common.folder_of(config, "patch_hub")
    problems = common.find_problems(config)

    # One model after the other. (What a site is called depends on the model's depth.)
    rows: list[Row] = []
    facts: Row = {}
    for name in config.models:
        setting = common.prepare(config, name, problems, folder, partial(check_layers, config))
        rows += measured(setting, config)
        facts[setting.name] = metadata(setting.model, **setting.facts)
        del setting  # two models need not fit in memory together

    if not is_main_process():
        return

    # The files.
    verdicts = verdicts_of(rows)
    with common.written(folder, config, {"models": facts, "verdicts": verdicts}):
        figures.save(figure(rows), folder / "figures/drop_by_position.png")
        for site in dict.fromkeys(row["site"] for row in rows):
            of_site = [row for row in rows if row["site"] == site]
            write_csv(folder / f"drop_{site}.csv", common.side_by_side(of_site, "position", "drop", "drop"))
        write_csv(folder / "positions.csv", rows)

    print(summary(facts, rows, verdicts))
    print(f"\nwritten:\n  {folder}/ (tables, figure, config, summary)")


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that make no sense."""
    common.check_flags(config)
    for flag, least in (("seeds", 1), ("places", 1), ("min_problems", 2)):
        value = getattr(config, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag} must be {least} or more, not {value}.")
    for flag in ("sites", "layers", "kv_layers"):
        if len(set(getattr(config, flag))) < len(getattr(config, flag)):
            raise ValueError(f"--{flag} names each once.")
    if not config.sites:
        raise ValueError("--sites names one or more sites.")


def check_layers(config: Config, name: str, model: PreTrainedModel) -> None:
    """Raise ValueError for a layer that the model has not."""
    last = n_layers(model.config) - 1
    for flag, layers in (("layers", config.layers), ("kv_layers", config.kv_layers)):
        for layer in layers:
            if not 0 <= layer <= last:
                raise ValueError(f"--{flag} {layer}: {name} has layers 0 to {last}.")


def noise_at_hub(config: Config, model: Any, seed: int) -> dict[str, Spec]:
    """Noise at the token "hub", by the name of the site."""
    layers, every = range(n_layers(model)), tuple(range(n_kv_heads(model)))
    fields: Any = {"kind": "noise", "noise": config.noise, "positions": "hub", "seed": seed}
    found: dict[str, Spec] = {}
    if "embed" in config.sites:
        found["embed"] = Ablation(site="embed", **fields)
    if "resid" in config.sites:
        for layer in config.layers or [(len(layers) - 1) // 2]:
            found[f"resid.{layer}"] = Ablation(site="resid_post", layer=layer, **fields)
    if "kv" in config.sites:
        found["kv"] = tuple(
            Ablation(site=site, layer=layer, heads=every, **fields)
            for layer in config.kv_layers or layers
            for site in ("k", "v")
        )
    return found


def measured(setting: common.Setting, config: Config) -> list[Row]:
    """Every site, token and seed of one model."""
    by_seed = [noise_at_hub(config, setting.model.config, config.seed + draw) for draw in range(config.seeds)]
    specs = {site: [of_seed[site] for of_seed in by_seed] for site in by_seed[0]}
    # Over all tokens of all problems, whichever token is replaced.
    reference = reference_for(
        [spec for of_site in specs.values() for spec in of_site],
        setting.model,
        setting.questions.prompts,
        batch_size=config.batch_size,
        progress=False,
    )
    rows = []
    for site, of_site in specs.items():
        some = []
        for position in tqdm(places(setting, config), desc=site, unit="token", disable=not is_main_process()):
            questions, which = setting.at(position)
            clean = setting.clean.correct[which]
            runs = [setting.run(questions, spec, reference) for spec in of_site]
            after = np.stack([run.correct for run in runs])
            drop = common.drop_of(clean, after.mean(0), config.seed, site, position)
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
                    "mcnemar_p": max(mcnemar_p(clean, of_seed) for of_seed in after),
                }
            )
        q = q_values(np.array([row["mcnemar_p"] for row in some]))
        rows += [{**row, "q": float(value)} for row, value in zip(some, q, strict=True)]
    return rows


def places(setting: common.Setting, config: Config) -> list[int]:
    """The tokens of the block that get noise, counted from its first."""
    every = common.positions_of(setting, config.min_problems)
    if config.places is None or config.places >= len(every):
        return list(every)
    return sorted({round(place) for place in np.linspace(every[0], every[-1], config.places)})


def verdicts_of(rows: Sequence[Row]) -> list[str]:
    """One line a model and site: the token whose loss is worst, and how many are causal or redundant."""
    lines = []
    for model, site in dict.fromkeys((row["model"], row["site"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["site"]) == (model, site)]
        drops = [Interval(row["drop"], row["low"], row["high"]) for row in mine]
        words = [verdict(drop) for drop in drops]
        worst = max(range(len(mine)), key=lambda i: drops[i].mean)
        lines.append(
            f"{model}, {site}: {words.count('causal')} of {len(mine)} tokens causal, {words.count('redundant')} redundant; the "
            f"largest drop is at token {mine[worst]['position']} ({mine[worst]['problems']} problems): "
            f"{common.in_words(drops[worst])}, q = {mine[worst]['q']:.2g}: {words[worst]}"
        )
    return lines


@matplotlib.rc_context(figures.STYLE)
def figure(rows: Sequence[Row]) -> Figure:
    """Drop by position, one line a site, one panel a model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    drawing = Figure(figsize=(1.2 + 4.6 * len(models), 3.4))
    panels = drawing.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        axes.axhline(0, color=figures.GREY, linewidth=0.8)
        for number, site in enumerate(dict.fromkeys(row["site"] for row in rows if row["model"] == model)):
            mine = [row for row in rows if row["model"] == model and row["site"] == site]
            x, colour = [row["position"] for row in mine], COLOURS[number % len(COLOURS)]
            axes.fill_between(x, [row["low"] for row in mine], [row["high"] for row in mine], color=colour, alpha=0.15)
            axes.plot(x, [row["drop"] for row in mine], "o-", color=colour, markersize=3.5, label=site)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=f"{model}: noise at one token of the block", xlabel="token of the block")
        axes.grid(axis="y")
        axes.legend()
    panels[0].set_ylabel("drop in accuracy (points, 95% interval)")
    return drawing


def summary(facts: Row, rows: Sequence[Row], verdicts: Sequence[str]) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        sites = list(dict.fromkeys(row["site"] for row in rows if row["model"] == model))
        mine = {(row["site"], row["position"]): row for row in rows if row["model"] == model}
        lines += [common.counts(model, found), ""]
        lines.append("token  problems" + "".join(f"{site + ' drop':>14}{'95% interval':>16}" for site in sites))
        for position in dict.fromkeys(position for _, position in mine):
            of_sites = [mine[site, position] for site in sites]
            intervals = [f"[{row['low']:.1f}, {row['high']:.1f}]" for row in of_sites]
            cells = [f"{row['drop']:14.1f}{words:>16}" for row, words in zip(of_sites, intervals, strict=True)]
            lines.append(f"{position:5} {of_sites[0]['problems']:9}" + "".join(cells))
        lines.append("")
    return "\n".join([*lines, "verdicts (drop above 10 points: causal, below 2: redundant)", *verdicts])


if __name__ == "__main__":
    sys.exit(run_study(main, Config))

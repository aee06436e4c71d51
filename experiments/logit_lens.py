"""At what depth does a model know the answer, and which parts write it? Logit lens and direct logit attribution.

    python experiments/logit_lens.py
    python experiments/logit_lens.py --model google/gemma-2-2b --dataset ioi_zh --answers first_difference
    python experiments/logit_lens.py --model path/to/folder --dataset pairs.json --out outputs/my_lens
    python experiments/logit_lens.py --position s2

Method. Each prompt has two answers, IO and S. The logit lens (nostalgebraist 2020) reads the residual stream at `--position`
with the model's own final norm and unembedding (soft-cap and scale included): LD = logit(IO) - logit(S), and probability and rank
of IO in the whole vocabulary. Depth 0 is what enters the first block, depth k the stream behind k blocks; at the last token the
last depth is what the model says.

Direct logit attribution (Elhage et al. 2021; Wang et al. 2022, section 3.1) splits LD, and logit(IO) alone, at the last token
into what every head, every MLP, the embedding and the biases add, with the scales of the final norm and of post-norms frozen at
the clean run. The parts sum to the logit in front of any soft-cap; a run in which they do not is an error. This is not causal:
what a part does through later parts is not in its contribution.

Means over prompts have percentile bootstrap 95% intervals. Control: the same parts split the LD of another prompt's two answers,
each prompt's taken once, at random; a head that only prefers one name to another, whatever the prompt, shows it there too.

Written, in the folder OUT: config.yaml (running it again gives the same); lens_logits.npy [depth answer prompt], IO first;
lens_probability.npy and lens_rank.npy [depth prompt]; for NAME in logit_diff, logit and control: NAME_heads.npy [layer head
prompt], NAME_mlps.npy [layer prompt], NAME_embed.npy, NAME_bias.npy, NAME_total.npy and NAME_capped.npy (behind the soft-cap)
[prompt]; depths.csv, heads.csv, parts.csv; figures; and last summary.json: where it is, the rest is.
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from prompt_sets import find_prompts

from modelcards import n_positions
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.files import (
    output_path,
    remove_leftovers,
    write_csv,
    write_json,
    write_npy,
)
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.heads.lens import (
    Lens,
    Parts,
    direct_logit_attribution,
    logit_lens,
)
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.runs import figures
from pyvene_ext.runs.metadata import metadata
from pyvene_ext.stats.intervals import Interval, paired_bootstrap

SHOWN = 10  # heads in the table on the terminal
RESAMPLES = 2000


@dataclass(frozen=True)
class Config:
    model: str = "tiny-qwen2.5"
    """a shipped tiny model, a folder, or a name on the hub"""
    dataset: str = "ioi_en"
    """ioi_en, ioi_zh, a .json or .jsonl file, a saved `datasets` folder, or a name on the hub"""
    out: Path | None = None
    """the folder that is written; by default outputs/logit_lens/MODEL_DATASET"""
    position: str = "last"
    """where the lens reads: last, or a named position of the prompts (end, io, s1, s2, subject); attribution is always at last"""
    answers: Literal["first_token", "first_difference"] = "first_token"
    """first_difference for names of several tokens that begin alike: the shared tokens join the prompt"""
    batch_size: int = 16
    """prompts a forward pass"""
    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""
    seed: int = 0
    """of the bootstrap, and of which prompt's answers are another's control"""


def main(config: Config) -> None:
    if not is_main_process():
        return  # a few forward passes a prompt are no work to share
    # What is run. Everything that can be wrong is found before the first forward pass.
    if config.batch_size < 1:
        raise ValueError(f"--batch_size must be 1 or more, not {config.batch_size}.")
    if config.position == "all":
        raise ValueError(
            "--position all: the lens reads one position of every prompt; name one, and run it again for another."
        )
    folder = output_folder(config)
    prompt_set = PromptSet.load(find_prompts(config.dataset))
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=choose_device(config.device))
    prompts = prompt_set.tokenize(tokenizer, answers=config.answers, max_length=n_positions(model.config))
    if len(prompts) < 2:
        raise ValueError(f"{config.dataset} has one prompt; a mean with an interval over prompts needs at least two.")
    others = with_answers_of_others(prompts, config.seed)

    # The lens, the parts of the logits, and those of another prompt's answers.
    common: dict[str, Any] = {"batch_size": config.batch_size, "progress": True}
    lens = logit_lens(model, prompts, config.position, **common)
    found = direct_logit_attribution(model, prompts, **common)
    control = direct_logit_attribution(model, others, **common).logit_diff
    depths, heads, parts = tables(lens, found.logit_diff, found.logit, control, config.seed)

    # The files. The summary goes first and comes last: where it is, the rest is.
    (folder / "summary.json").unlink(missing_ok=True)
    name = f"{Path(config.model).name}, {Path(config.dataset).stem}"
    for measure, label, scale in (
        ("logit_diff", "logit(IO) - logit(S)", "linear"),
        ("probability", "probability of IO", "linear"),
        ("rank", "rank of IO (1 is the top)", "log"),
    ):
        curve = Interval(*(np.array([row[f"{measure}{end}"] for row in depths]) for end in ("", "_low", "_high")))
        title = f"Logit lens at {config.position}: {name}"
        figures.save(depth_curve(curve, title, label, scale), folder / f"figures/lens_{measure}.png")
    for measure, of in (("logit_diff", "logit(IO) - logit(S)"), ("logit", "logit(IO)")):
        heatmap = figures.head_heatmap(
            getattr(found, measure).heads.mean(-1),
            f"Direct attribution to heads: {name}",
            f"mean contribution to {of}",
            diverging=True,
        )
        figures.save(heatmap, folder / f"figures/heads_{measure}.png")
    write_csv(folder / "depths.csv", depths)
    write_csv(folder / "heads.csv", heads)
    write_csv(folder / "parts.csv", parts)
    for measure, array in vars(lens).items():
        write_npy(folder / f"lens_{measure}.npy", array)
    for measure, split in (("logit_diff", found.logit_diff), ("logit", found.logit), ("control", control)):
        for part, array in vars(split).items():
            write_npy(folder / f"{measure}_{part}.npy", array)
    write_config(folder / "config.yaml", config)
    facts = metadata(
        model,
        model=config.model,
        dataset=config.dataset,
        prompts_hash=prompts.hash,
        n=len(prompts),
        position=config.position,
        answers=config.answers,
        seed=config.seed,
        clean_logit_diff=float(found.logit_diff.capped.mean()),
        clean_io_over_s=float((found.logit_diff.capped > 0).mean()),
        logit_diff_before_cap=float(found.logit_diff.total.mean()),
        from_heads=float(found.logit_diff.heads.sum((0, 1)).mean()),
        from_mlps=float(found.logit_diff.mlps.sum(0).mean()),
        from_embedding=float(found.logit_diff.embed.mean()),
        from_biases=float(found.logit_diff.bias.mean()),
        depth_ahead=depth_ahead(depths),
    )
    write_json(folder / "summary.json", facts)
    remove_leftovers(*folder.rglob("*"))

    print(summary(config, facts, depths, heads))
    print(f"\nwritten:\n  {folder}/ (summary, config, arrays, tables, figures)")


def output_folder(config: Config) -> Path:
    """The folder to write; ValueError if one may not write there."""
    name = f"{Path(config.model).name}_{Path(config.dataset).stem}"
    return output_path(config.out, Path("outputs/logit_lens") / name)


def with_answers_of_others(prompts: TokenizedPrompts, seed: int) -> TokenizedPrompts:
    """The same prompts, each with the answers of another one; no two share theirs."""
    order = rng(seed, "control").permutation(len(prompts))
    donor = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return replace(prompts, answer_ids=tuple(prompts.answer_ids[donor[prompt]] for prompt in range(len(prompts))))


def tables(
    lens: Lens, logit_diff: Parts, logit: Parts, control: Parts, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """One row a depth; one a head, largest mean contribution to LD first; one for every other part and for each layer's heads."""

    def interval(values: Float[np.ndarray, " prompt"], *name: str | int) -> Interval:
        return paired_bootstrap(values, np.zeros_like(values), rng(seed, "bootstrap", *name), RESAMPLES)

    def named(measure: str, found: Interval) -> dict[str, float]:
        return {measure: found.mean, f"{measure}_low": found.low, f"{measure}_high": found.high}

    depths = [
        {"depth": depth}
        | named("logit_diff", interval(lens.logit_diff[depth], "logit_diff", depth))
        | named("probability", interval(lens.probability[depth], "probability", depth))
        | named("rank", interval(lens.rank[depth], "rank", depth))
        | {"io_over_s": float((lens.logit_diff[depth] > 0).mean()), "top": float((lens.rank[depth] == 1).mean())}
        for depth in range(len(lens.logits))
    ]
    heads = [
        {"layer": layer, "head": head}
        | named("logit_diff", interval(logit_diff.heads[layer, head], "head", layer, head))
        | named("control", interval(control.heads[layer, head], "control", layer, head))
        | {
            "logit": float(logit.heads[layer, head].mean()),
            "positive": float((logit_diff.heads[layer, head] > 0).mean()),
        }
        for layer, head in np.ndindex(logit_diff.heads.shape[:2])
    ]
    others: dict[str, Float[np.ndarray, " prompt"]] = {"embedding": logit_diff.embed, "biases": logit_diff.bias}
    for layer, (of_heads, of_mlp) in enumerate(zip(logit_diff.heads.sum(1), logit_diff.mlps, strict=True)):
        others |= {f"heads of layer {layer}": of_heads, f"MLP {layer}": of_mlp}
    others["total"] = logit_diff.total
    parts = [{"part": part} | named("logit_diff", interval(values, part)) for part, values in others.items()]
    return depths, sorted(heads, key=lambda row: -abs(row["logit_diff"])), parts


def depth_ahead(depths: list[dict[str, Any]]) -> int | None:
    """The depth from which on the interval of LD lies above 0; None if it does not at the last."""
    ahead = None
    for row in reversed(depths):
        if row["logit_diff_low"] <= 0:
            break
        ahead = row["depth"]
    return ahead


@matplotlib.rc_context(figures.STYLE)
def depth_curve(curve: Interval, title: str, label: str, scale: str = "linear") -> Figure:
    """A mean over prompts against depth, with its interval as a band."""
    depths = np.arange(len(curve.mean))
    figure = Figure(figsize=(5.6, 3.4))
    axes = figure.add_subplot()
    if scale == "linear":
        axes.axhline(0, color=figures.GREY, linewidth=0.8)
    axes.fill_between(depths, curve.low, curve.high, color=figures.BLUE, alpha=0.25, linewidth=0, label="95% interval")
    axes.plot(depths, curve.mean, "o-", color=figures.BLUE, linewidth=1.4, markersize=3.5, label="mean over prompts")
    axes.set(
        title=textwrap.fill(title, 60), xlabel="depth (blocks passed; 0: the embedding)", ylabel=label, yscale=scale
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if scale == "log":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # the style has no formulas
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def summary(config: Config, facts: dict[str, Any], depths: list[dict[str, Any]], heads: list[dict[str, Any]]) -> str:
    """What the terminal shows: the lens by depth, what each kind of part contributes, and the heads with the largest."""
    ahead = facts["depth_ahead"]
    lines = [
        f"{config.model} on {config.dataset}: {facts['n']} prompts; mean logit difference {facts['clean_logit_diff']:.2f}, "
        f"IO above S on {facts['clean_io_over_s']:.1%}",
        f"\nlogit lens at {config.position}: the logit difference is "
        + ("not above 0 at the last depth" if ahead is None else f"above 0 from depth {ahead} on")
        + " (95% interval)",
        "\n  depth  logit diff    95% interval  probability   mean rank  IO on top",
    ]
    for row in depths:
        interval = f"[{row['logit_diff_low']:.2f}, {row['logit_diff_high']:.2f}]"
        lines.append(
            f"{row['depth']:>7} {row['logit_diff']:11.2f} {interval:>15} {row['probability']:12.3f} {row['rank']:11.1f} "
            f"{row['top']:10.1%}"
        )
    lines += [
        f"\nattribution of the logit difference before any soft-cap, {facts['logit_diff_before_cap']:.2f}: "
        f"heads {facts['from_heads']:.2f}, MLPs {facts['from_mlps']:.2f}, embedding "
        f"{facts['from_embedding']:.2f}, biases {facts['from_biases']:.2f}",
        "\n   head  contribution    95% interval  positive on  control  95% interval",
    ]
    for row in heads[:SHOWN]:
        interval, of_others = (
            f"[{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]" for name in ("logit_diff", "control")
        )
        lines.append(
            f"{row['layer']:>4}.{row['head']:<2} {row['logit_diff']:13.3f} {interval:>15} {row['positive']:12.1%} "
            f"{row['control']:8.3f} {of_others:>13}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_study(main, Config))

"""How much, and how often, does each attention head matter? Causal ablation of one head at a time.

The name is that of the published directory, which calls this activation frequency "through IFR". Information flow routes
(Ferrando and Voita 2024), the method that IFR stands for, ablates nothing: it is information_flow_routes.py.

    python experiments/activation_frequencies_ifr.py
    python experiments/activation_frequencies_ifr.py --model Qwen/Qwen2.5-3B --dataset ioi_zh --answers first_difference
    python experiments/activation_frequencies_ifr.py --model path/to/folder --dataset pairs.json --out en.npy --tau 0.03 --abs
    python experiments/activation_frequencies_ifr.py --kind mean --positions last
    python experiments/activation_frequencies_ifr.py --dry_run
    python experiments/activation_frequencies_ifr.py --tau 1 --screen atp
    python experiments/activation_frequencies_ifr.py --tau 1 --width 0.2
    accelerate launch experiments/activation_frequencies_ifr.py

Method. Each prompt has two answers, right (IO) and wrong (S); LD = logit(IO) - logit(S) at its last token. Every head's output
z (the input of the output projection) is ablated by itself, and delta = LD_clean - LD_ablated. A head's effect is its mean
delta, with the 95% bootstrap interval over prompts. It is active on a prompt if |delta| > tau (`--no_abs`: delta > tau); its
activation frequency is the share of prompts, with its 95% Wilson interval. The sizes of deltas differ from model to model, so
that tau is by default chosen from them: a tenth of heads x prompts are active (published runs: `--tau 0.03`). One tau says
little, so all deltas are kept, and the whole curve of frequency against tau is written beside the frequencies.

Sooner, with less, at a given tau. `--screen atp` ablates only heads whose effect attribution patching (Nanda 2023) estimates
above `--margin` x tau on some prompt, and a random `--check` of the others, which tell what share of the active heads the screen
has caught (its recall: on the terminal and in the metadata). `--width W` gives a head no more prompts, in random order, once its
interval is at most W wide; such frequencies lean to the nearer of 0 and 1 a little, so that a mean over heads should come from a
run without it. What was not run is NaN in arrays, an empty cell in tables, grey in figures, and in no mean.

Written: OUT.npy, float32 [layer head]; OUT.json, what was run (OUT.meta.json if OUT.json holds the prompts); and in the folder
OUT: config.yaml (running it again gives the same), deltas.npy [layer head prompt], mean_delta.npy [layer head], clean.npy
[prompt], prompts.json, heads.csv, frequency_vs_tau.csv, figures, attention.json (where the heads of the largest effects look),
and with `--screen` estimates.npy [layer head prompt]. The same command resumes an interrupted run.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from jaxtyping import Bool, Float

import pyvene_ext as px

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Found = px.methods.Screen | px.Sequential | None

SHOWN = 12  # heads in the table on the terminal
SHARES = (0.1, 0.5, 0.9, 1.0)  # of the quantiles there
RESAMPLES = 2000
Deltas = Float[np.ndarray, "layer head prompt"]


@dataclass(frozen=True)
class Config(px.flags.Model, px.flags.Prompts, px.flags.Sweep):
    out: Path | None = None
    """the .npy file of frequencies; by default outputs/activation_frequencies_ifr/MODEL_DATASET.npy"""
    meta: Path | None = None
    """the .json file that says what was run; by default beside the frequencies"""
    tau: Annotated[float, Ge(0)] | None = None
    """threshold on the change of the logit difference; by default that which a tenth of heads x prompts exceed"""
    abs: bool = True
    """compare |delta| with tau; with --no_abs delta itself (active = the head helped the right answer)"""
    kind: Literal["zero", "mean", "resample", "noise"] = "zero"
    """what comes in place of z"""
    mean: Literal["over_tokens", "per_position"] = "over_tokens"
    """which mean, for --kind mean: of all tokens of the prompt set, or of the same position over its prompts"""
    positions: str = "all"
    """where z is ablated: all, last, or a named position of the prompts (end, io, s1, s2, subject)"""
    screen: Literal["none", "atp"] = "none"
    """atp: ablate only the heads that could matter by their first-order estimates, and some others to check"""
    margin: Annotated[float, Ge(0)] = 0.5
    """of --screen: a head could matter if |estimate| > margin x tau on some prompt"""
    check: Annotated[float, Ge(0), Le(1)] = 0.1
    """of --screen: share of the other heads that is ablated all the same, at least 20"""
    width: Annotated[float, Gt(0), Le(1)] | None = None
    """a head takes no more prompts once the 95% interval of its frequency is at most this wide"""
    block: px.flags.Count = 16
    """of --width: prompts between two looks at the intervals"""

    @property
    def which_mean(self) -> dict[str, Any]:
        """The field of an ablation by means."""
        return {"mean": self.mean} if self.kind == "mean" else {}

    @property
    def compared(self) -> str:
        """What is compared with tau."""
        return "|delta|" if self.abs else "delta"

    @property
    def leaves_out(self) -> bool:
        """Whether some heads may not be run, or not on all prompts: which, shows while they run."""
        return self.screen != "none" or self.width is not None

    def check_flags(self) -> None:
        if self.screen != "none" and self.width is not None:
            raise ValueError(
                "--screen and --width were both given; the recall of a screen is measured on all prompts: give one of the two."
            )
        if self.tau is None and self.leaves_out:
            raise ValueError(
                "--screen and --width ask what is above tau before everything has run, which is what tau is by default chosen "
                "from: give --tau too."
            )


def main(config: Config) -> None:
    # Everything that can be wrong is found before the first forward pass.
    run, out = run_folder(config)
    prompt_set = config.load_prompts()
    model, tokenizer = config.load_model()
    prompts = config.tokenize(prompt_set, model, tokenizer)
    if len(prompts) < 2:
        raise ValueError(f"{config.dataset} gives 1 prompt; an interval over prompts needs two or more.")
    which: dict[str, Any] = {"positions": config.positions, "seed": config.seed, **config.which_mean}
    specs = px.all_heads(model.config, config.kind, **which)
    plan = px.plan_sweep(model, specs, prompts, memory=config.memory_bytes)
    work, *_ = plan.summary().splitlines()
    seconds = plan.passes * px.runs.seconds_a_pass(model, prompts)
    if not run.announce("at most " * config.leaves_out + work, seconds, n=len(prompts)):
        return

    # Every head by itself: on all prompts, or as far as a screen or narrow intervals ask for.
    result, found = ablated(config, run, model, specs, prompts)
    if not px.is_main_process():
        return
    layers, heads = px.models.n_layers(model.config), px.models.n_heads(model.config)
    clean, deltas = result.baseline, result.delta.reshape(layers, heads, -1)

    # Effects and frequencies, with intervals, and what frequencies would be at every other tau.
    was_run = np.isfinite(deltas)
    size = np.abs(deltas) if config.abs else deltas
    tau = px.stats.exceeded_by_a_tenth(size[was_run]) if config.tau is None else config.tau
    frequency = px.stats.frequency_interval(size > tau, counted=was_run)
    taus = px.stats.threshold_grid(size[was_run], tau)
    curve = np.stack([px.stats.frequency_interval(size > tau, counted=was_run).mean for tau in taus])
    rows = head_table(frequency, deltas, config.seed)
    facts = px.metadata(
        model,
        **settings(config, prompts, tau),
        **({} if found is None else found.facts),
        **clean_means(clean),
        share_active=float((size > tau)[was_run].mean()),
    )

    print(summary(config, px.runs.answer_names(prompt_set), tau, rows, deltas, clean, found))
    with run.writing(facts, [evidence(rows, clean)], replacing=("estimates.npy", "figures/*")):
        run.table("heads", rows)
        run.table("frequency_vs_tau", px.stats.threshold_table(taus, curve))
        run.array("deltas", deltas)
        run.array("mean_delta", mean_deltas(deltas).astype(np.float32))
        run.array("clean", clean)
        run.json("prompts", [prompt.clean for prompt in prompt_set.prompts])
        if isinstance(found, px.methods.Screen):
            run.array("estimates", found.estimates.reshape(deltas.shape))
        largest = [(int(row["layer"]), int(row["head"])) for row in rows[: px.runs.HEADS]]
        run.views(px.runs.look(model, tokenizer, prompts.input_ids, largest))
        shown: dict[str, Any] = {"tau": tau, "signed": not config.abs, "of": run.of}
        maps = deltas, mean_deltas(deltas), frequency.mean
        for name, figure in px.figures.figures_of_effects(*maps, (taus, curve), **shown).items():
            run.figure(name, figure)
        px.io.write_npy(out, frequency.mean.astype(np.float32))


# -- what is run -------------------------------------------------------------------------------------------------------


def run_folder(config: Config) -> tuple[px.RunFolder, Path]:
    """The folder of the run, and the file of frequencies beside it; the metadata are the summary."""
    name = f"{Path(config.model).name}_{Path(config.dataset).stem}"
    out = config.out or Path("outputs/activation_frequencies_ifr") / f"{name}.npy"
    if out.suffix != ".npy":
        raise ValueError(f"--out {out} must end in .npy.")
    meta = config.meta or out.with_suffix(".json")
    if config.meta is None and Path(config.dataset).resolve() == meta.resolve():
        meta = out.with_suffix(".meta.json")  # fr.json may hold the prompts of fr.npy
    places: dict[str, Any] = {
        "path": out.with_suffix(""),
        "summary": meta.absolute(),
        "beside": {"out": out, "meta": meta},
    }
    return px.RunFolder(config, "activation_frequencies_ifr", config.model, config.dataset, **places), out


def ablated(
    config: Config,
    run: px.RunFolder,
    model: PreTrainedModel,
    specs: list[px.Ablation],
    prompts: px.TokenizedPrompts,
) -> tuple[px.Result, Found]:
    """Every ablation on all prompts; or on what the screen or the sequential run asks for, with what they found."""
    options: dict[str, Any] = {"memory": config.memory_bytes, "compile": config.compile}
    shown, tau = px.is_main_process(), config.tau or 0.0  # it is given where it is used here
    with px.runs.unfinished_in(run.unfinished, model, specs, prompts, **options) as sweep:
        size, cache = config.batch_size, px.io.cache_folder()
        reference = px.reference_for(model, specs, prompts, batch_size=size, cache_dir=cache, progress=shown)
        common: dict[str, Any] = {"reference": reference, "seed": config.seed, "progress": shown, "sweep": sweep}
        if config.screen == "atp":
            common |= {"margin": config.margin, "check": config.check, "batch_size": config.batch_size}
            screen = px.methods.screened(model, specs, prompts, tau, **common)
            return screen.result, screen
        if config.width is not None:
            common |= {"width": config.width, "block": config.block, "absolute": config.abs}
            sequential = px.frequencies(model, specs, prompts, tau, **common)
            return sequential.result, sequential
        return sweep(model, specs, prompts, reference=reference), None


def settings(config: Config, prompts: px.TokenizedPrompts, tau: float) -> dict[str, Any]:
    """What was run, for the metadata."""
    return {
        "model": config.model,
        "dataset": config.dataset,
        "prompts_hash": prompts.hash,
        "n": len(prompts),
        "tau": tau,
        "tau_is": "exceeded by a tenth of heads x prompts" if config.tau is None else "given",
        "abs": config.abs,
        "kind": config.kind,
        **config.which_mean,
        "positions": config.positions,
        "screen": config.screen,
        "answers": config.answers,
        "seed": config.seed,
    }


# -- statistics --------------------------------------------------------------------------------------------------------


def mean_delta(delta: Float[np.ndarray, " prompt"], seed: int) -> px.Interval:
    """A head's mean effect with its interval; of fewer than two prompts there is none."""
    if len(delta) < 2:
        return px.Interval(float(delta.mean()) if len(delta) else math.nan, math.nan, math.nan)
    return px.stats.bootstrap_mean(delta, px.rng(seed, "mean_delta"), RESAMPLES)


def mean_deltas(deltas: Deltas) -> Float[np.ndarray, "layer head"]:
    """Each head's mean effect over the prompts on which it was run."""
    return np.ma.masked_invalid(deltas).mean(-1).filled(np.nan)


def head_table(frequency: px.Interval, deltas: Deltas, seed: int) -> list[dict[str, float]]:
    """One row per head, largest mean effect first; those not run, all NaN, come last."""
    rows = []
    for layer, head in np.ndindex(deltas.shape[:2]):
        delta = deltas[layer, head][np.isfinite(deltas[layer, head])]
        size = np.abs(delta)
        rows.append(
            {
                "layer": layer,
                "head": head,
                "n_prompts": len(delta),
                "frequency": float(frequency.mean[layer, head]),
                "low": float(frequency.low[layer, head]),
                "high": float(frequency.high[layer, head]),
                **px.stats.interval_columns("mean_delta", mean_delta(delta, seed)),
                "median_abs_delta": float(np.median(size)) if delta.size else math.nan,
                "max_abs_delta": float(size.max()) if delta.size else math.nan,
            }
        )
    return sorted(rows, key=lambda row: (row["n_prompts"] == 0, -abs(row["mean_delta"])))


def clean_means(clean: Float[np.ndarray, " prompt"]) -> dict[str, float]:
    """The untouched run, on the prompts that were run at all."""
    clean = clean[np.isfinite(clean)]
    return {"clean_logit_diff": float(clean.mean()), "clean_io_over_s": float((clean > 0).mean())}


# -- what is shown -----------------------------------------------------------------------------------------------------


def summary(
    config: Config,
    answers: tuple[str, str],
    tau: float,
    rows: list[dict[str, float]],
    deltas: Deltas,
    clean: Float[np.ndarray, " prompt"],
    found: Found,
) -> str:
    """What the terminal shows: the clean run, the heads with the largest effects, and how many are active how often."""
    was_run: Bool[np.ndarray, "layer head prompt"] = np.isfinite(deltas)
    active = ((np.abs(deltas) if config.abs else deltas) > tau)[was_run]
    right, wrong = answers
    n_prompts, clean = len(clean), clean[np.isfinite(clean)]
    quantiles = np.quantile(np.abs(deltas[was_run]), SHARES)
    kind = f"mean ({config.mean})" if config.kind == "mean" else config.kind
    of = "heads x prompts" if was_run.all() else f"the heads x prompts that were run ({was_run.mean():.1%} of all)"
    prompts = f"{len(clean)} of {n_prompts} prompts" if len(clean) < n_prompts else f"{n_prompts} prompts"
    lines = [
        f"{config.model} on {config.dataset}: {prompts}, {kind} ablation of z, positions: {config.positions}",
        f"clean: mean logit difference {clean.mean():.2f}, {right} above {wrong} on {(clean > 0).mean():.1%} of prompts",
        "delta: how much the ablation lowers it; largest mean delta first",
        "\n  head  mean delta   95% interval  median |delta|  frequency  95% interval",
    ]
    for row in rows[: min(SHOWN, was_run.any(-1).sum())]:
        head = px.stats.head_label((int(row["layer"]), int(row["head"])))
        effect = f"[{row['mean_delta_low']:.2f}, {row['mean_delta_high']:.2f}]"
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(
            f"{head:>6} {row['mean_delta']:11.3f} {effect:>14} {row['median_abs_delta']:15.3f} {row['frequency']:10.2f} "
            f"{interval:>13}"
        )
    chosen = "" if config.tau is not None else ", the tau that a tenth exceed"
    often = sum(row["low"] > 0.5 for row in rows)
    lines += [
        "\n|delta| quantiles: " + ", ".join(f"{q:.0%} {v:.3g}" for q, v in zip(SHARES, quantiles, strict=True)),
        f"active ({config.compared} > {tau:.3g}{chosen}): {active.mean():.1%} of {of}; {often} of {len(rows)} heads on more "
        "than half of the prompts (95% interval)",
    ]
    if isinstance(found, px.methods.Screen):
        lines.append(found.summary())
    if isinstance(found, px.Sequential):
        narrow = (
            f"{found.reached.sum()} of {len(found.reached)} heads, after {found.n_prompts.mean():.1f} prompts per head"
        )
        lines.append(f"intervals at most {found.width:g} wide for {narrow}")
    return "\n".join(lines)


def evidence(rows: list[dict[str, float]], clean: Float[np.ndarray, " prompt"]) -> px.runs.Evidence:
    """The largest mean effect, beside that of the head in the middle."""
    largest, sizes = rows[0], sorted(abs(row["mean_delta"]) for row in rows if row["n_prompts"])
    head = px.stats.head_label((int(largest["layer"]), int(largest["head"])))
    effect = f"mean delta of {head}, the largest of {len(sizes)} heads,"
    control = f"the other heads, whose median |mean delta| is {np.median(sizes[:-1]) if sizes[1:] else math.nan:.2g}"
    interval = px.stats.interval_in(largest, "mean_delta")
    return px.runs.Evidence(
        f"{np.isfinite(clean).sum()} prompts", effect, interval, control, "a larger --limit or --dataset"
    )


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))

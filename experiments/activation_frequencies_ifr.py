"""How often does each attention head matter? Activation frequencies (IFR) by ablating one head at a time.

    python experiments/activation_frequencies_ifr.py
    python experiments/activation_frequencies_ifr.py --model Qwen/Qwen2.5-3B --dataset ioi_zh --answers first_difference
    python experiments/activation_frequencies_ifr.py --model path/to/folder --dataset pairs.json --out en.npy --tau 0.03 --abs
    python experiments/activation_frequencies_ifr.py --kind mean --positions last
    python experiments/activation_frequencies_ifr.py --dry_run
    python experiments/activation_frequencies_ifr.py --tau 1 --screen atp
    python experiments/activation_frequencies_ifr.py --width 0.2
    accelerate launch experiments/activation_frequencies_ifr.py

Method. Each prompt has two answers, IO and S; LD = logit(IO) - logit(S) at its last token. Every head's output z (the input of
the output projection) is ablated by itself, and delta = LD_clean - LD_ablated. A head is active on a prompt if |delta| > tau
(`--no_abs`: delta > tau); its activation frequency is the share of prompts, with its 95% Wilson interval. One tau says little, so
all deltas are kept, and the whole curve of frequency against tau is written beside the frequencies.

Sooner, with less. `--screen atp` ablates only heads whose effect attribution patching (Nanda 2023) estimates above `--margin` x
tau on some prompt, and a random `--check` of the others, which tell what share of the active heads the screen has caught (its
recall: on the terminal and in the metadata). `--width W` gives a head no more prompts, in random order, once its interval is at
most W wide; such frequencies lean to the nearer of 0 and 1 a little, so that a mean over heads should come from a run without it.
What was not run is NaN in arrays, an empty cell in tables, grey in figures, and in no mean.

Written: OUT.npy, float32 [layer head]; OUT.json, what was run; and in the folder OUT: config.yaml (running it again gives the
same), deltas.npy [layer head prompt], clean.npy [prompt], prompts.json, heads.csv, frequency_vs_tau.csv, figures, attention.json
(where the most active heads look), and with `--screen` estimates.npy [layer head prompt]. A run that was interrupted goes on
where it stopped when the same command is given again.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from modelcards import n_heads, n_layers, n_positions
from pyvene_ext.engine.plain import reference_for
from pyvene_ext.engine.sweep import (
    Sequential,
    frequencies,
    plan_sweep,
)
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.files import (
    cache_folder,
    remove_leftovers,
    write_csv,
    write_json,
    write_npy,
)
from pyvene_ext.methods.attribution.screen import Screen, screened
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.runs import figures
from pyvene_ext.runs.attention import HEADS, look, write_views
from pyvene_ext.runs.facts import metadata
from pyvene_ext.runs.sweeps import discard, unfinished_in
from pyvene_ext.specs.ablation import Kind, all_heads
from pyvene_ext.stats.intervals import Interval, frequency_interval

SHOWN = 12  # heads in the table on the terminal


@dataclass(frozen=True)
class Config:
    model: str = "tiny-qwen2.5"
    """a shipped tiny model, a folder, or a name on the hub"""
    dataset: str = "ioi_en"
    """ioi_en, ioi_zh, a .json or .jsonl file, a saved `datasets` folder, or a name on the hub"""
    out: Path | None = None
    """the .npy file of frequencies; by default outputs/activation_frequencies_ifr/MODEL_DATASET.npy"""
    meta: Path | None = None
    """the .json file that says what was run; by default beside the frequencies"""
    tau: float = 0.1
    """threshold on the change of the logit difference"""
    abs: bool = True
    """compare |delta| with tau; with --no_abs delta itself (active = the head helped IO)"""
    kind: Kind = "zero"
    """what comes in place of z: zero, mean, resample or noise"""
    mean: Literal["over_tokens", "per_position"] = "over_tokens"
    """which mean, for --kind mean: of all tokens of the prompt set, or of the same position over its prompts"""
    positions: str = "all"
    """where z is ablated: all, last, or a named position of the prompts (end, io, s1, s2, subject)"""
    answers: Literal["first_token", "first_difference"] = "first_token"
    """first_difference for names of several tokens that begin alike: the shared tokens join the prompt"""
    screen: Literal["none", "atp"] = "none"
    """atp: ablate only the heads that could matter by their first-order estimates, and some others to check"""
    margin: float = 0.5
    """of --screen: a head could matter if |estimate| > margin x tau on some prompt"""
    check: float = 0.1
    """of --screen: share of the other heads that is ablated all the same, at least 20"""
    width: float | None = None
    """a head takes no more prompts once the 95% interval of its frequency is at most this wide"""
    block: int = 16
    """of --width: prompts between two looks at the intervals"""
    memory: float | None = None
    """GiB of working memory besides the weights; by default half of what the weights take, at least 0.25"""
    compile: bool = False
    """let torch.compile fuse the MLPs: a minute at the start, for long runs on a GPU"""
    batch_size: int = 16
    """prompts a forward pass, of reference statistics and of --screen's estimates; the ablations' batches follow from --memory"""
    dry_run: bool = False
    """show what would be done, and neither run nor write anything"""
    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""
    seed: int = 0
    """of donors and noise, of the heads that are checked, and of the order of prompts"""


def main(config: Config) -> None:
    # What is run. Everything that can be wrong is found before the first forward pass.
    check_flags(config)
    out, meta, folder = files(config)
    prompt_set = PromptSet.load(find_prompts(config.dataset))
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=choose_device(config.device))
    prompts = prompt_set.tokenize(tokenizer, answers=config.answers, max_length=n_positions(model.config))
    which_mean: dict[str, Any] = {"mean": config.mean} if config.kind == "mean" else {}
    specs = all_heads(model.config, config.kind, positions=config.positions, seed=config.seed, **which_mean)
    memory = None if config.memory is None else int(config.memory * 2**30)
    plan = plan_sweep(model, specs, prompts, memory=memory)
    shown = is_main_process()
    if config.dry_run:
        if shown:
            print(plan.summary())
            if config.screen != "none" or config.width is not None:
                print("at most: what --screen or --width leave out shows only when they run")
        return

    # Every head by itself: on all prompts, or as far as a screen or narrow intervals ask for.
    found: Screen | Sequential | None = None
    with unfinished_in(folder / "unfinished", model, specs, prompts, memory=memory, compile=config.compile) as sweep:
        reference = reference_for(
            specs, model, prompts, batch_size=config.batch_size, cache_dir=cache_folder(), progress=shown
        )
        common: dict[str, Any] = {"reference": reference, "seed": config.seed, "progress": shown, "sweep": sweep}
        if config.screen == "atp":
            common |= {"margin": config.margin, "check": config.check, "batch_size": config.batch_size}
            found = screened(model, specs, prompts, config.tau, **common)
        elif config.width is not None:
            common |= {"width": config.width, "block": config.block, "absolute": config.abs}
            found = frequencies(model, specs, prompts, config.tau, **common)
        result = found.result if found else sweep(model, specs, prompts, reference=reference)
    if not shown:
        return
    shape = n_layers(model.config), n_heads(model.config), len(prompts)
    clean, deltas = result.clean, result.delta.reshape(shape)

    # Frequencies, with Wilson intervals, and what they would be at every other tau.
    was_run = np.isfinite(deltas)
    size = np.abs(deltas) if config.abs else deltas
    frequency = frequency_interval(size > config.tau, counted=was_run)
    taus = threshold_grid(size[was_run], config.tau)
    curve = np.stack([frequency_interval(size > tau, counted=was_run).mean for tau in taus])

    # The files. The frequencies come last: where they are, the rest is.
    name = f"{Path(config.model).name}, {Path(config.dataset).stem}"
    compared = "|delta|" if config.abs else "delta"
    label = f"share of prompts with {compared} > {config.tau:g}"
    heatmap = figures.head_heatmap(
        frequency.mean, f"Activation frequency: {name}", label, limits=(0, 1), missing="not run"
    )
    figures.save(heatmap, folder / "figures/frequency.png")
    effect = figures.head_heatmap(
        np.ma.masked_invalid(deltas).mean(-1).filled(np.nan),
        f"Mean effect: {name}",
        "mean delta (logit difference)",
        diverging=True,
        missing="not run",
    )
    figures.save(effect, folder / "figures/mean_delta.png")
    if size[was_run].max() > 0:
        title = f"Activation frequency against the threshold: {name}"
        threshold = f"threshold tau on {compared} (logit difference)"
        figures.save(
            figures.frequency_curve(taus, curve, tau=config.tau, title=title, threshold=threshold),
            folder / "figures/frequency_vs_tau.png",
        )
        figures.save(figures.histogram_abs_delta(deltas, tau=config.tau), folder / "figures/abs_delta.png")
    heads = head_table(frequency, deltas)
    write_csv(folder / "heads.csv", heads)
    write_csv(folder / "frequency_vs_tau.csv", curve_table(taus, curve))
    write_npy(folder / "deltas.npy", deltas)
    write_npy(folder / "clean.npy", clean)
    write_json(folder / "prompts.json", [prompt.clean for prompt in prompt_set.prompts])
    (folder / "estimates.npy").unlink(missing_ok=True)  # of an earlier run with a screen
    if isinstance(found, Screen):
        write_npy(folder / "estimates.npy", found.estimates.reshape(shape))
    most_active = [(int(row["layer"]), int(row["head"])) for row in heads[:HEADS]]
    write_views(folder, look(model, tokenizer, prompts.input_ids, most_active))
    write_config(folder / "config.yaml", config)
    facts = metadata(
        model,
        model=config.model,
        dataset=config.dataset,
        prompts_hash=prompts.hash,
        n=len(prompts),
        tau=config.tau,
        abs=config.abs,
        kind=config.kind,
        **which_mean,
        positions=config.positions,
        answers=config.answers,
        seed=config.seed,
        **how_much(config, found),
        clean_logit_diff=float(clean[np.isfinite(clean)].mean()),
        clean_io_over_s=float((clean[np.isfinite(clean)] > 0).mean()),
        share_active=float((size > config.tau)[was_run].mean()),
    )
    write_json(meta, facts)
    write_npy(out, frequency.mean.astype(np.float32))
    remove_leftovers(out, meta, *folder.rglob("*"))
    discard(folder / "unfinished")

    print(summary(config, frequency, deltas, clean, found))
    print("\nwritten:", out, meta, f"{folder}/ (config, deltas, tables, figures)", sep="\n  ")


def check_flags(config: Config) -> None:
    """Raise ValueError for numbers that make no sense, and for flags that do not go together."""
    for flag, value, fits, wanted in (
        ("tau", config.tau, 0 <= config.tau < math.inf, "0 or more"),
        ("margin", config.margin, 0 <= config.margin < math.inf, "0 or more"),
        ("check", config.check, 0 <= config.check <= 1, "from 0 to 1"),
        ("width", config.width, config.width is None or 0 < config.width <= 1, "above 0 and at most 1"),
        ("block", config.block, config.block >= 1, "1 or more"),
        ("memory", config.memory, config.memory is None or 0 < config.memory < 2**20, "above 0, in GiB"),
        ("batch_size", config.batch_size, config.batch_size >= 1, "1 or more"),
    ):
        if not fits:
            raise ValueError(f"--{flag} must be {wanted}, not {value}.")
    if config.screen != "none" and config.width is not None:
        raise ValueError(
            "--screen and --width were both given; the recall of a screen is measured on all prompts: give one of the two."
        )


def files(config: Config) -> tuple[Path, Path, Path]:
    """The frequencies' file, the metadata's, and the folder of the rest."""
    name = f"{Path(config.model).name}_{Path(config.dataset).stem}"
    out = config.out or Path("outputs/activation_frequencies_ifr") / f"{name}.npy"
    if out.suffix != ".npy":
        raise ValueError(f"--out {out} must end in .npy.")
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--out {out} cannot be written: {existing} is not a folder one may write in.")
    return out, config.meta or out.with_suffix(".json"), out.with_suffix("")


def threshold_grid(size: Float[np.ndarray, " effect"], tau: float, n: int = 60) -> Float[np.ndarray, " tau"]:
    """Thresholds from a thousandth of the largest |delta| up to it, and `tau` itself."""
    largest = float(np.abs(size).max()) or 1.0
    return np.unique([*np.geomspace(largest / 1000, largest, n), *([tau] if tau > 0 else [])])


def head_table(frequency: Interval, deltas: Float[np.ndarray, "layer head prompt"]) -> list[dict[str, float]]:
    """One row a head, most active first; ties by the size of the mean effect; those not run, all NaN, come last."""
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
                "mean_delta": float(delta.mean()) if delta.size else math.nan,
                "median_abs_delta": float(np.median(size)) if delta.size else math.nan,
                "max_abs_delta": float(size.max()) if delta.size else math.nan,
            }
        )
    return sorted(rows, key=lambda row: (row["n_prompts"] == 0, -row["frequency"], -abs(row["mean_delta"])))


def curve_table(taus: Float[np.ndarray, " tau"], curve: Float[np.ndarray, "tau layer head"]) -> list[dict[str, float]]:
    """One row a threshold: the mean frequency over all heads that were run, and how it spreads over them."""
    return [
        {"tau": float(tau), "mean": float(at.mean())}
        | {f"quantile_{q:g}": float(np.quantile(at, q)) for q in (0.1, 0.5, 0.9)}
        for tau, at in zip(taus, curve[:, np.isfinite(curve[0])], strict=True)
    ]


def how_much(config: Config, found: Screen | Sequential | None) -> dict[str, Any]:
    """What the metadata say of a run that left heads or prompts out."""
    if isinstance(found, Screen):
        recall = found.recall or Interval(None, None, None)  # None: nothing is active
        return {
            "screen": config.screen,
            "margin": config.margin,
            "n_heads_run": int(found.exact.sum()),
            "n_could_matter": int(found.could_matter.sum()),
            "n_caught": found.caught,
            "n_checked": len(found.checked),
            "n_missed": found.missed,
            **{f"recall{end}": value for end, value in zip(("", "_low", "_high"), recall, strict=True)},
        }
    if isinstance(found, Sequential):
        reached, seen = int(found.reached.sum()), float(found.n_prompts.mean())
        return {"width": config.width, "block": config.block, "n_heads_reached": reached, "mean_prompts_a_head": seen}
    return {}


def summary(
    config: Config,
    frequency: Interval,
    deltas: Float[np.ndarray, "layer head prompt"],
    clean: Float[np.ndarray, " prompt"],
    found: Screen | Sequential | None,
) -> str:
    """What the terminal shows: the clean run, how many heads are active, and the most active ones."""
    was_run: Bool[np.ndarray, "layer head prompt"] = np.isfinite(deltas)
    active = ((np.abs(deltas) if config.abs else deltas) > config.tau)[was_run]
    n_prompts, clean = len(clean), clean[np.isfinite(clean)]
    quantiles = np.quantile(np.abs(deltas[was_run]), [0.1, 0.5, 0.9, 1.0])
    kind = f"mean ({config.mean})" if config.kind == "mean" else config.kind
    of = "heads x prompts" if was_run.all() else f"the heads x prompts that were run ({was_run.mean():.1%} of all)"
    prompts = f"{len(clean)} of {n_prompts} prompts" if len(clean) < n_prompts else f"{n_prompts} prompts"
    lines = [
        f"{config.model} on {config.dataset}: {prompts}, {kind} ablation of z, positions: {config.positions}",
        f"clean: mean logit difference {clean.mean():.2f}, IO above S on {(clean > 0).mean():.1%} of prompts",
        f"active ({'|delta|' if config.abs else 'delta'} > {config.tau:g}): {active.mean():.1%} of {of}; "
        f"{(frequency.low > 0.5).sum()} of {frequency.mean.size} heads on more than half of the prompts (95% interval)",
        "|delta| quantiles: "
        + ", ".join(f"{q:.0%} {v:.3g}" for q, v in zip((0.1, 0.5, 0.9, 1.0), quantiles, strict=True)),
    ]
    if isinstance(found, Screen):
        lines.append(found.summary())
    if isinstance(found, Sequential):
        lines.append(
            f"intervals at most {found.width:g} wide for {found.reached.sum()} of {len(found.reached)} heads, "
            f"after {found.n_prompts.mean():.1f} prompts a head"
        )
    lines += ["", "  head  frequency  95% interval   mean delta  median |delta|"]
    for row in head_table(frequency, deltas)[: min(SHOWN, was_run.any(-1).sum())]:
        head = f"{row['layer']:.0f}.{row['head']:.0f}"
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(
            f"{head:>6} {row['frequency']:10.2f}  {interval:>13} {row['mean_delta']:11.3f} {row['median_abs_delta']:15.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_study(main, Config))

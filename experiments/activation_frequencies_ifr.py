"""How often does each attention head matter? Activation frequencies (IFR) by ablating one head at a time.

    python experiments/activation_frequencies_ifr.py
    python experiments/activation_frequencies_ifr.py --model Qwen/Qwen2.5-3B --dataset ioi_zh --answers first_difference
    python experiments/activation_frequencies_ifr.py --model path/to/folder --dataset pairs.json --out en.npy --tau 0.03 --abs
    python experiments/activation_frequencies_ifr.py --kind mean --positions last

Method. Each prompt has two answers, IO and S; LD = logit(IO) - logit(S) at its last token. Every head's output z (the input of
the output projection) is ablated by itself, and delta = LD_clean - LD_ablated. A head is active on a prompt if |delta| > tau
(`--no_abs`: delta > tau); its activation frequency is the share of prompts. One tau says little, so all deltas are kept, and the
whole curve of frequency against tau is written beside the frequencies.

Written: OUT.npy, float32 [layer head]; OUT.json, what was run; and in the folder OUT: config.yaml (running it again gives the
same), deltas.npy [layer head prompt], clean.npy [prompt], heads.csv, frequency_vs_tau.csv and figures. A run that was
interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from tqdm import tqdm

from modelcards import n_heads, n_layers
from pyvene_ext import figures
from pyvene_ext.cli import run as run_study
from pyvene_ext.loading import load_model
from pyvene_ext.prompts import PromptSet
from pyvene_ext.runner import check_specs, reference_for, run
from pyvene_ext.runs import (
    Resumable,
    atomic_path,
    cache_folder,
    config_hash,
    data_hash,
    metadata,
    write_json,
    write_npy,
    write_yaml,
)
from pyvene_ext.specs import Kind, all_heads
from pyvene_ext.stats import Interval, frequency_interval

PROMPTS = Path(__file__).parent / "prompts"
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
    batch_size: int = 16
    """prompts a forward pass"""
    device: str | None = None
    """cpu, cuda ...; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""
    seed: int = 0
    """of donors and noise"""


def main(config: Config) -> None:
    # What is run. Everything that can be wrong is found before the first forward pass.
    if not config.tau >= 0:
        raise ValueError(f"--tau must be 0 or more, not {config.tau}.")
    if config.batch_size < 1:
        raise ValueError(f"--batch_size must be 1 or more, not {config.batch_size}.")
    out, meta, folder = files(config)
    prompt_set = PromptSet.load(find_prompts(config.dataset))
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=device)
    prompts = prompt_set.tokenize(tokenizer, answers=config.answers, max_length=model.config.max_position_embeddings)
    layers, heads = n_layers(model.config), n_heads(model.config)
    which_mean = {"mean": config.mean} if config.kind == "mean" else {}
    specs = all_heads(model.config, config.kind, positions=config.positions, seed=config.seed, **which_mean)
    check_specs(specs, model, prompts, prompts)
    facts = metadata(
        model,
        command=shlex.join(["python", *sys.argv]),
        model=config.model,
        revision=getattr(model.config, "_commit_hash", None),
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
    )

    # The sweep: every head by itself, layer by layer. Finished layers are kept, so that a second start goes on.
    key = {"specs": data_hash([spec.model_dump(mode="json") for spec in specs]), "config_hash": config_hash(model)}
    key |= {name: facts[name] for name in ("weight_hash", "prompts_hash", "dtype")}
    unfinished = Resumable(folder / "unfinished", key)
    reference = reference_for(specs, model, prompts, batch_size=config.batch_size, cache_dir=cache_folder())
    rows, clean = [], None
    with tqdm(total=layers * heads * len(prompts), unit="prompt", desc="ablating heads", smoothing=0.05) as bar:
        for layer in range(layers):

            def ablate(layer: int = layer, clean: np.ndarray | None = clean) -> np.ndarray:
                in_layer = specs[layer * heads : (layer + 1) * heads]
                result = run(
                    model,
                    in_layer,
                    prompts,
                    "logit_diff",
                    reference,
                    batch_size=config.batch_size,
                    clean=clean,
                    progress=bar,
                )
                return np.stack([result.clean, *result.intervened])  # one row more than heads: the clean run

            row = unfinished.row(f"layer-{layer:03d}", ablate)
            clean = row[0]
            rows.append(row[1:])
            bar.update((layer + 1) * heads * len(prompts) - bar.n)
    assert clean is not None
    deltas = (clean - np.stack(rows)).astype(np.float32)

    # Frequencies, with Wilson intervals, and what they would be at every other tau.
    size = np.abs(deltas) if config.abs else deltas
    frequency = frequency_interval(size > config.tau)
    taus = threshold_grid(size, config.tau)
    curve = np.stack([(size > tau).mean(-1) for tau in taus])

    # The files. The frequencies come last: where they are, the rest is.
    name = f"{Path(config.model).name}, {Path(config.dataset).stem}"
    compared = "|delta|" if config.abs else "delta"
    label = f"share of prompts with {compared} > {config.tau:g}"
    heatmap = figures.head_heatmap(frequency.mean, f"Activation frequency: {name}", label, limits=(0, 1))
    figures.save(heatmap, folder / "figures/frequency.png")
    effect = figures.head_heatmap(
        deltas.mean(-1), f"Mean effect: {name}", "mean delta (logit difference)", diverging=True
    )
    figures.save(effect, folder / "figures/mean_delta.png")
    if size.max() > 0:
        title = f"Activation frequency against the threshold: {name}"
        threshold = f"threshold tau on {compared} (logit difference)"
        figures.save(
            figures.frequency_curve(taus, curve, tau=config.tau, title=title, threshold=threshold),
            folder / "figures/frequency_vs_tau.png",
        )
        figures.save(figures.histogram_abs_delta(deltas, tau=config.tau), folder / "figures/abs_delta.png")
    write_table(folder / "heads.csv", head_table(frequency, deltas))
    write_table(folder / "frequency_vs_tau.csv", curve_table(taus, curve))
    write_npy(folder / "deltas.npy", deltas)
    write_npy(folder / "clean.npy", clean)
    write_yaml(folder / "config.yaml", {name: plain(value) for name, value in dataclasses.asdict(config).items()})
    facts |= {"clean_logit_diff": float(clean.mean()), "clean_io_over_s": float((clean > 0).mean())}
    facts |= {"share_active": float((size > config.tau).mean())}
    write_json(meta, facts)
    write_npy(out, frequency.mean.astype(np.float32))
    unfinished.discard()

    print(summary(config, frequency, deltas, clean))
    print("\nwritten:", out, meta, f"{folder}/ (config, deltas, tables, figures)", sep="\n  ")


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


def find_prompts(dataset: str) -> str | Path:
    """A shipped set's file by its name; anything else as it is. A near miss of a shipped name is not sought on the hub."""
    shipped = {path.stem: path for path in PROMPTS.glob("*.json")}
    close = difflib.get_close_matches(dataset, shipped, n=1, cutoff=0.75)
    if dataset not in shipped and close and not Path(dataset).exists():
        raise ValueError(f"there is no prompt set {dataset!r}; did you mean {close[0]!r}?")
    return shipped.get(dataset, dataset)


def threshold_grid(size: Float[np.ndarray, "layer head prompt"], tau: float, n: int = 60) -> Float[np.ndarray, " tau"]:
    """Thresholds from a thousandth of the largest |delta| up to it, and `tau` itself."""
    largest = float(np.abs(size).max()) or 1.0
    return np.unique([*np.geomspace(largest / 1000, largest, n), *([tau] if tau > 0 else [])])


def head_table(frequency: Interval, deltas: Float[np.ndarray, "layer head prompt"]) -> list[dict[str, float]]:
    """One row a head, most active first; ties by the size of the mean effect."""
    size = np.abs(deltas)
    rows = [
        {
            "layer": layer,
            "head": head,
            "frequency": float(frequency.mean[layer, head]),
            "low": float(frequency.low[layer, head]),
            "high": float(frequency.high[layer, head]),
            "mean_delta": float(deltas[layer, head].mean()),
            "median_abs_delta": float(np.median(size[layer, head])),
            "max_abs_delta": float(size[layer, head].max()),
        }
        for layer, head in np.ndindex(deltas.shape[:2])
    ]
    return sorted(rows, key=lambda row: (-row["frequency"], -abs(row["mean_delta"])))


def curve_table(taus: Float[np.ndarray, " tau"], curve: Float[np.ndarray, "tau layer head"]) -> list[dict[str, float]]:
    """One row a threshold: the mean frequency over all heads, and how it spreads over them."""
    return [
        {"tau": float(tau), "mean": float(at.mean())}
        | {f"quantile_{q:g}": float(np.quantile(at, q)) for q in (0.1, 0.5, 0.9)}
        for tau, at in zip(taus, curve, strict=True)
    ]


def write_table(path: Path, rows: list[dict[str, float]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def summary(
    config: Config,
    frequency: Interval,
    deltas: Float[np.ndarray, "layer head prompt"],
    clean: Float[np.ndarray, " prompt"],
) -> str:
    """What the terminal shows: the clean run, how many heads are active, and the most active ones."""
    active: Bool[np.ndarray, "layer head prompt"] = (np.abs(deltas) if config.abs else deltas) > config.tau
    quantiles = np.quantile(np.abs(deltas), [0.1, 0.5, 0.9, 1.0])
    kind = f"mean ({config.mean})" if config.kind == "mean" else config.kind
    lines = [
        f"{config.model} on {config.dataset}: {len(clean)} prompts, {kind} ablation of z, positions: {config.positions}",
        f"clean: mean logit difference {clean.mean():.2f}, IO above S on {(clean > 0).mean():.1%} of prompts",
        f"active ({'|delta|' if config.abs else 'delta'} > {config.tau:g}): {active.mean():.1%} of heads x prompts; "
        f"{(frequency.low > 0.5).sum()} of {frequency.mean.size} heads on more than half of the prompts (95% interval)",
        "|delta| quantiles: "
        + ", ".join(f"{q:.0%} {v:.3g}" for q, v in zip((0.1, 0.5, 0.9, 1.0), quantiles, strict=True)),
        "",
        "  head  frequency  95% interval   mean delta  median |delta|",
    ]
    for row in head_table(frequency, deltas)[:SHOWN]:
        head = f"{row['layer']:.0f}.{row['head']:.0f}"
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(
            f"{head:>6} {row['frequency']:10.2f}  {interval:>13} {row['mean_delta']:11.3f} {row['median_abs_delta']:15.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_study(main, Config))

"""Which heads look at the token before, at the same token, at what followed it, and which copy? Scores on repeated random tokens.

    python experiments/induction_scores.py
    python experiments/induction_scores.py --model_name meta-llama/Llama-3.1-8B-Instruct --dtype bfloat16
    python experiments/induction_scores.py --model_name path/to/folder --length 50 --repeats 2 --seeds 0 1 2
    python experiments/induction_scores.py --occurrences all

Method (Olsson et al. 2022, appendix "Head activation evaluators"). A block of `--length` distinct random tokens is repeated
`--repeats` times behind the start token, `--examples` times for every seed; one forward pass gives the scores of all heads. With
A the attention pattern and s the length of the block: previous_token is the mean of A[i, i-1] over the random tokens i,
duplicate_token that of A[i, i-s] and induction that of A[i, i-s+1] over those behind the first block; with `--occurrences all`
the same entries in all earlier blocks are summed. copying is of the OV circuit, as if the head looked at one token alone: the
share of that token in what the head's direct logits raise among the tokens of the block, scaled to [-1, 1]; it says nothing of
where the head looks. An induction head has both, a high induction score and a high copying score.

Random tokens are neither special nor added. Those of the lowest and the highest ids are left out too (`--trim`, a tenth of the
vocabulary at each end) where ids roughly go by frequency, in BPE and Unigram vocabularies; this stands in for leaving out the
most and the least frequent tokens, which a tokenizer does not tell. The start token is there if the tokenizer puts one in front
of a text (`--bos yes` and `no` say otherwise).

Means and standard errors are over the sequences of all seeds, which are independent. Control: the attention scores at the same
distances on as many sequences of random tokens none of which comes twice. What a head scores there it owes to distance alone.

A head that shares its attention among several earlier occurrences scores low where only the last one counts: with `--repeats 2`
or `--occurrences all` it does not, and the scores are those that `run_ablations.py` ranks heads by.

Written to the folder OUTPUT_DIR, for KIND in induction, previous_token, duplicate_token and copying: KIND_scores.csv, the means
as `scores,layer,head`, the highest first; KIND.npy and KIND_se.npy, means and standard errors [layer head]; KIND_sequences.npy
[seed example layer head]; KIND_control.npy (not of copying), the control's means [layer head]; figures/KIND.png. Also heads.csv,
all of that by head; attention.json, where the first two heads of each kind look; config.yaml (running it again gives the same);
and last summary.json, what was run: where it is, the rest is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

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
from pyvene_ext.methods.heads.scores import (
    HeadScores,
    Occurrences,
    attention_scores,
    check_trim,
    leading_bos,
    random_tokens,
    usable_tokens,
    write_head_scores,
)
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import load_model
from pyvene_ext.report.attention import look, write_views
from pyvene_ext.runs import figures
from pyvene_ext.runs.metadata import metadata

SHOWN = 5  # heads of each kind on the terminal
# Name in files, attribute of HeadScores, and what the colour of the figure means.
KINDS = (
    ("induction", "induction", "mean attention A[i, i-s+1]"),
    ("previous_token", "previous", "mean attention A[i, i-1]"),
    ("duplicate_token", "duplicate", "mean attention A[i, i-s]"),
    ("copying", "copying", "2r - 1, r: share on the token"),
)


@dataclass(frozen=True)
class Config:
    model_name: str = "tiny-llama3.1"
    """a shipped tiny model, a folder, or a name on the hub"""
    output_dir: Path | None = None
    """the folder that is written; by default outputs/induction_scores/MODEL_NAME"""
    length: int = 25
    """random tokens of a block"""
    repeats: int = 4
    """how often the block is there"""
    examples: int = 10
    """sequences a seed"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of the random tokens"""
    occurrences: Occurrences = "last"
    """which earlier occurrence counts: the last, or all of them together"""
    trim: float | None = None
    """share of the ids left out at each end; by default 0.1 in BPE and Unigram vocabularies and 0 in others"""
    bos: Literal["auto", "yes", "no"] = "auto"
    """a start token first: auto if the tokenizer does so"""
    copying: bool = True
    """score copying too, which needs weights that are neither quantised nor offloaded"""
    batch_size: int = 10
    """sequences a forward pass"""
    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""


class Kind(NamedTuple):
    """One kind of score: of every sequence, its mean and standard error, and the mean of its control."""

    sequences: Float[np.ndarray, "seed example layer head"]
    mean: Float[np.ndarray, "layer head"]
    se: Float[np.ndarray, "layer head"]
    control: Float[np.ndarray, "layer head"] | None


def main(config: Config) -> None:
    if not is_main_process():
        return  # a few forward passes are no work to share
    # What is run. Everything that can be wrong is found before the first forward pass.
    check(config)
    default = Path("outputs/induction_scores") / Path(config.model_name).name
    folder = output_path(config.output_dir, default, "--output_dir")
    model, tokenizer = load_model(config.model_name, dtype=config.dtype, device=choose_device(config.device))
    bos = start(config, tokenizer)
    tokens = usable_tokens(model, tokenizer, config.trim)
    repeated = sequences("repeated", tokens, config.length, config.repeats, bos, config)
    unrepeated = sequences("control", tokens, config.length * config.repeats, 1, bos, config)

    # The scores, and those of the control at the same distances.
    common: dict[str, Any] = {
        "period": config.length,
        "first": len(bos),
        "occurrences": config.occurrences,
        "batch_size": config.batch_size,
    }
    found = attention_scores(model, repeated, copying=config.copying, **common)
    control = attention_scores(model, unrepeated, **common)
    kinds = summarise(found, control, len(config.seeds))
    heads = table(kinds)

    # The files. The summary goes first and comes last: where it is, the rest is.
    (folder / "summary.json").unlink(missing_ok=True)
    for name, _, label in KINDS:
        if name not in kinds:
            continue
        kind = kinds[name]
        title = f"{name.replace('_', ' ').capitalize()} score: {Path(config.model_name).name}"
        if config.occurrences == "all" and name in ("induction", "duplicate_token"):
            label += ", all blocks"
        heatmap = figures.head_heatmap(kind.mean, title, label, limits=None if name == "copying" else (0.0, 1.0))
        figures.save(heatmap, folder / f"figures/{name}.png")
        write_head_scores(folder / f"{name}_scores.csv", kind.mean)
        write_npy(folder / f"{name}.npy", kind.mean)
        write_npy(folder / f"{name}_se.npy", kind.se)
        write_npy(folder / f"{name}_sequences.npy", kind.sequences)
        if kind.control is not None:
            write_npy(folder / f"{name}_control.npy", kind.control)
    write_csv(folder / "heads.csv", heads)
    first = [(row["layer"], row["head"]) for name in kinds for row in ranked(heads, name)[:2]]
    write_views(folder, look(model, tokenizer, repeated.tolist(), first))
    write_config(folder / "config.yaml", config)
    facts = metadata(
        model,
        model=config.model_name,
        n_sequences=len(repeated),
        length=config.length,
        repeats=config.repeats,
        seeds=list(config.seeds),
        occurrences=config.occurrences,
        bos=list(bos),
        usable_tokens=len(tokens),
        top={name: [f"{row['layer']}.{row['head']}" for row in ranked(heads, name)[:SHOWN]] for name in kinds},
    )
    write_json(folder / "summary.json", facts)
    remove_leftovers(*folder.rglob("*"))

    print(summary(facts, kinds, heads))
    print(f"\nwritten:\n  {folder}/ (summary, config, arrays, tables, figures)")


def check(config: Config) -> None:
    """Raise ValueError for flags that no model could be run with."""
    for name, least in (("length", 2), ("repeats", 2), ("examples", 1), ("batch_size", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} must be {least} or more, not {getattr(config, name)}.")
    if min(config.seeds, default=-1) < 0 or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"--seeds must be one or more different numbers from 0 on, not {list(config.seeds)}.")
    if len(config.seeds) * config.examples < 2:
        raise ValueError("one sequence has no standard error; give --examples 2 or more, or more --seeds.")
    if config.trim is not None:
        check_trim(config.trim)


def start(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What stands in front of the random tokens."""
    if config.bos == "auto":
        return leading_bos(tokenizer)
    if config.bos == "no":
        return ()
    if tokenizer.bos_token_id is None:
        raise ValueError(f"the tokenizer of {config.model_name} has no start token; leave out --bos yes.")
    return (tokenizer.bos_token_id,)


def sequences(
    name: str, tokens: Int[np.ndarray, " token"], length: int, repeats: int, bos: tuple[int, ...], config: Config
) -> Int[Tensor, "sequence pos"]:
    """The sequences of all seeds, in their order."""
    return torch.cat(
        [
            random_tokens(tokens, length, repeats, examples=config.examples, rng=rng(seed, name), bos=bos)
            for seed in config.seeds
        ]
    )


def summarise(found: HeadScores, control: HeadScores, n_seeds: int) -> dict[str, Kind]:
    """Mean and standard error over sequences, of every kind that was scored."""
    kinds = {}
    for name, attribute, _ in KINDS:
        scores, of_control = getattr(found, attribute), getattr(control, attribute)
        if scores is None:
            continue
        kinds[name] = Kind(
            sequences=scores.reshape(n_seeds, -1, *scores.shape[1:]),
            mean=scores.mean(0),
            se=scores.std(0, ddof=1) / np.sqrt(len(scores)),
            control=None if of_control is None else of_control.mean(0),
        )
    return kinds


def table(kinds: dict[str, Kind]) -> list[dict[str, Any]]:
    """One row a head: score, standard error and control of every kind."""
    rows = []
    for layer, head in np.ndindex(kinds["induction"].mean.shape):
        row: dict[str, Any] = {"layer": layer, "head": head}
        for name, kind in kinds.items():
            row |= {name: float(kind.mean[layer, head]), f"{name}_se": float(kind.se[layer, head])}
            if kind.control is not None:
                row[f"{name}_control"] = float(kind.control[layer, head])
        rows.append(row)
    return rows


def ranked(heads: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return sorted(heads, key=lambda row: -row[name])


def summary(facts: dict[str, Any], kinds: dict[str, Kind], heads: list[dict[str, Any]]) -> str:
    """What the terminal shows: the heads with the highest scores of each kind."""
    lines = [
        f"{facts['model']}: {facts['n_sequences']} sequences of {facts['length']} random tokens x {facts['repeats']}, "
        f"{'with' if facts['bos'] else 'without'} a start token, {facts['usable_tokens']} tokens to draw from"
    ]
    for name, kind in kinds.items():
        lines += [
            f"\n{name.replace('_', ' ')} (mean over heads {kind.mean.mean():.3f})",
            "   head   score  std error  control",
        ]
        for row in ranked(heads, name)[:SHOWN]:
            control = f"{row[f'{name}_control']:8.3f}" if kind.control is not None else f"{'-':>8}"
            lines.append(f"{row['layer']:>4}.{row['head']:<2} {row[name]:7.3f} {row[f'{name}_se']:10.4f} {control}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_study(main, Config))

"""Does a model remember what followed? Probability by lag, with induction heads ablated and with random heads of the same layers.

    python experiments/run_ablations.py
    python experiments/run_ablations.py --model_name tiny-llama3.1 --n_tokens 40 --mode zero mean
    python experiments/run_ablations.py --config experiments/run_ablations_grid.yaml
    bash experiments/run_ablations.sh     # the published grid on Llama-3.1-8B-Instruct
    accelerate launch experiments/run_ablations.py --model_name Llama-3.1-8B-Instruct     # several GPUs

Method ("Temporal Dependencies in In-Context Learning: The Role of Induction Heads", arXiv 2604.01094). 500 distinct tokens are
put in random order and the one in the middle is shown again at the end. The softmax over the vocabulary at that last token, read
at the prompt's own tokens, is a curve over lags: index less that of the token shown twice. Heads are taken out by their attention
scores, at all layers at once; `zero`: the head attends to nothing and gives 0; `mean`: it attends to all tokens it sees alike.
The heads are the first ones of the ranking by induction score, so that larger sets hold the smaller ones; `top` ranks the layers
below L/2 only (nearer the input), `bottom` the rest. All sets see the same permutations.

The control (ours) is many random sets: of the same layers, head for head, and none of the --max_heads_abl heads with the highest
scores. A layer that consists of such heads has no control: ask for fewer heads, or for no control with --random_draws 0. The
control is as clean as the heads that are left in a layer: the table has the mean induction score of the sets beside it. (Of the
shipped models tiny-gemma2 has layers with both kinds of heads; in tiny-qwen2.5 all heads of layer 3, in tiny-llama3.1 most of
layer 1 look at what followed, and their random sets lower the peak as well.)

Induction scores are computed on two blocks of random tokens, because the cue has been shown once before: heads that share their
attention among several earlier occurrences score low with more blocks. For a CSV of `induction_scores.py` that means --repeats 2
or --occurrences all; its default ranks other heads first in tiny-gemma2, without which lag +1 stays as it is.

The +1-lag bias is p(+1) less the mean of p beyond lag 5 on either side. Its change against no ablation has a 95% interval, the
percentile bootstrap over permutations, each with and without ablation drawn together. The share of random sets that lower it at
least as much is (1 + count) / (1 + sets); draws that turn out to be the same set count once, and small layers have few sets: with
one set the share cannot be below 1/2. (The far lags hold the list's first token, where models that have learnt to go round and
round put what lag +1 loses, so that the bias may fall by more than p(+1).) Lag-CRP (Kahana 1996) is the curve
given that one of the list's other tokens is next.

With --head_type random there are the random sets alone, and their mean takes the place of the induction heads.

Written to outputs/ablations/MODEL, NAME being MODEL_permP_ablN_MODE_TYPE_LAYERS (TYPE induction or random, the mean over sets):
tables/NAME.csv, the curve with its standard error over permutations, and lag-CRP; figures/NAME.png, with the range of the random
sets' curves as a band, and without _ablN all levels in one; heads/NAME.json, the heads as [layer, head], of random those of each
set; arrays/NAME.npy [permutation lag], of random NAME_bias.npy [set permutation] too; tables/..._summary.csv, what the terminal
shows; heads/MODEL_induction_scores.csv, where they were computed; MODEL_permP_MODES_TYPE_LAYERS.yaml (running it again with
--config gives the same) and .json, what was run. A run that was interrupted goes on where it stopped when the same command is
given again.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import BeforeValidator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import n_heads, n_layers, n_positions
from pyvene_ext.engine.sweep import sweep
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
from pyvene_ext.methods.heads.lag import (
    FEWEST,
    Layers,
    Mode,
    ablate_attention,
    curves_of,
    lag_crp,
    lag_prompts,
    lags_of,
    plus_one,
    plus_one_bias,
    random_rankings,
    rank_heads,
    recalled,
)
from pyvene_ext.methods.heads.scores import (
    attention_scores,
    leading_bos,
    random_tokens,
    read_head_scores,
    usable_tokens,
    write_head_scores,
)
from pyvene_ext.models.devices import broadcast_from_main, choose_device, is_main_process
from pyvene_ext.models.loading import TINY_MODELS, load_model
from pyvene_ext.prompts.token_lists import read_token_list
from pyvene_ext.runs import figures
from pyvene_ext.runs.facts import metadata
from pyvene_ext.runs.sweeps import discard
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.controls import Head
from pyvene_ext.stats.intervals import paired_bootstrap, ratio_of_means

# Short for their names on the hub; any other hub id, folder or shipped tiny model is given as it is.
KNOWN = {
    name.split("/")[1]: name
    for name in (
        "meta-llama/Llama-3.2-1B-Instruct",
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "google/gemma-2-9b",
        "google/gemma-2-9b-it",
        "mistralai/Mistral-7B-v0.1",
        "mistralai/Mistral-7B-Instruct-v0.1",
        "Qwen/Qwen2.5-7B",
        "Qwen/Qwen2.5-7B-Instruct",
    )
}
N_TOKENS, TINY_N_TOKENS = 500, 20
TO_ABL, TINY_TO_ABL = "0-1-5-10-20-50", "0-1-2-3-4"
# Of the random tokens for induction scores. Two blocks, because the cue of a prompt has been there once before: with more, heads
# that look at several earlier occurrences would score low.
BLOCK, REPEATS, EXAMPLES = 25, 2, 10
ZOOM = 10  # lags on either side in the second panel of a figure
COLOURS = ("black", figures.BLUE, figures.SKY, figures.GREEN, figures.AMBER, figures.ORANGE, figures.PINK)
Type = Literal["induction", "random"]
Setting = tuple[Mode, Layers]


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Config:
    model_name: str = "tiny-gemma2"
    """a shipped tiny model, a folder, a name on the hub, or the end of a known one such as Llama-3.1-8B-Instruct"""
    permutations: int = 300
    """prompts: random orders of the same tokens"""
    max_heads_abl: int | None = None
    """how many of the heads with the highest scores the random sets leave alone; by default the largest of --to_abl"""
    head_type: Type = "induction"
    """induction: the heads with the highest induction scores, with random ones beside them; random: those alone"""
    to_abl: str | None = None
    """how many heads to ablate, 0 for none; by default 0-1-5-10-20-50, on the shipped tiny models (8 heads a layer) 0-1-2-3-4"""
    mode: Annotated[tuple[Mode, ...], BeforeValidator(_listed)] = ("zero",)
    """what comes in place of attention: nothing (zero), equal attention (mean), or one after the other"""
    layer_abl: Annotated[tuple[Layers, ...], BeforeValidator(_listed)] = ("full",)
    """which layers' heads: all, the half nearer the input (top), the other half (bottom); several are done one after the other"""
    tokens_path: Path | None = None
    """a JSON file, or pickle, of a list of token ids (or a list of such lists); by default all ordinary ones of the tokenizer"""
    n_tokens: int | None = None
    """length of the list; by default 500, on the shipped tiny models (which repeat 40 tokens at most) 20"""
    induction_scores_csv: Path | None = None
    """scores,layer,head; by default they are computed, on 10 sequences of 25 random tokens shown twice (of induction_scores.py:
    --repeats 2, or --occurrences all)"""
    output_dir: Path | None = None
    """the folder of what is written; by default outputs/ablations/MODEL"""
    random_draws: int = 20
    """random sets for each set of induction heads; 0 for none"""
    memory: float | None = None
    """GiB of working memory besides the weights; by default half of what the weights take, at least 0.25"""
    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""
    seed: int = 42
    """of the tokens, permutations, random heads and bootstrap"""


@dataclass(frozen=True)
class Curves:
    """Probability by lag with a number of heads ablated: of the set itself, and of each of the random sets."""

    n: int
    own: Float[np.ndarray, "permutation lag"]
    random: Float[np.ndarray, "set permutation lag"]


@dataclass(frozen=True)
class Heads:
    """The rankings whose prefixes are ablated, of one choice of layers."""

    ranked: tuple[Head, ...]
    random: list[tuple[Head, ...]]
    scores: dict[Head, float]

    def random_sets(self, n: int) -> list[tuple[Head, ...]]:
        """The random sets of `n` heads. Of draws that begin with the same heads one counts: small layers have few sets."""
        return list({frozenset(ranking[:n]): ranking[:n] for ranking in self.random}.values())


def main(config: Config) -> None:
    # What is run. Everything that can be wrong is found before the first forward pass, what the files alone tell at once.
    levels = levels_of(config)
    n_tokens = (TINY_N_TOKENS if tiny(config) else N_TOKENS) if config.n_tokens is None else config.n_tokens
    check_flags(config, n_tokens)
    folder = output_path(config.output_dir, Path("outputs/ablations") / name_of(config), "--output_dir")
    listed = None if config.tokens_path is None else np.array(read_token_list(config.tokens_path), np.int64)
    if listed is not None:
        check_count(len(np.unique(listed)), n_tokens, str(config.tokens_path))
    source = config.model_name if Path(config.model_name).is_dir() else KNOWN.get(config.model_name, config.model_name)
    model, tokenizer = load_model(source, dtype=config.dtype, device=choose_device(config.device))
    longest = n_positions(model.config)
    if n_tokens + 1 > longest:
        raise ValueError(
            f"--n_tokens {n_tokens} makes prompts of {n_tokens + 1} tokens and {config.model_name} takes {longest}; take fewer."
        )
    pool = usable(model, tokenizer, listed)
    check_count(len(pool), n_tokens, "the tokenizer" if listed is None else str(config.tokens_path))
    prompts = lag_prompts(pool, n_tokens, config.permutations, config.seed)

    # Which heads: a ranking of each choice of layers, and random ones that match it.
    most = levels[-1]
    if config.induction_scores_csv is None:
        if (needed := BLOCK * REPEATS + len(leading_bos(tokenizer))) > longest:
            raise ValueError(
                f"induction scores are computed on {needed} tokens and {config.model_name} takes {longest}; give them with "
                "--induction_scores_csv."
            )
        sizes = n_layers(model.config), n_heads(model.config)
        for layers in config.layer_abl:  # before any is scored
            ranking(config, [(0.0, *head) for head in np.ndindex(sizes)], layers, sizes[0], most)
        matrix = broadcast_from_main(lambda: induction_scores(config, model, tokenizer))
        scores = sorted(((float(x), *at) for at, x in np.ndenumerate(matrix)), key=lambda row: (-row[0], row[1:]))
    else:
        scores = read_head_scores(config.induction_scores_csv, model.config)
    heads = {layers: heads_of(config, model, scores, layers, most) for layers in config.layer_abl}

    # Every set of heads on every permutation: one sweep, in which equal sets of different settings are one.
    sets = {key: ablate_attention(*key) for key in wanted_sets(config, heads, levels)}
    specs: dict[Spec, int] = {spec: row for row, spec in enumerate(dict.fromkeys(sets.values()))}
    result = sweep(
        model,
        list(specs),
        prompts,
        "token_probabilities",
        memory=None if config.memory is None else int(config.memory * 2**30),
        store=folder / "unfinished",
        progress=is_main_process(),
    )
    if not is_main_process():
        return

    # The files. What was run comes last: where it is, the rest is.
    stem = f"{name_of(config)}_perm{config.permutations}"
    run_name = f"{stem}_{'-'.join(config.mode)}_{config.head_type}_{'-'.join(config.layer_abl)}"
    if (folder / f"{run_name}.json").exists():
        print(f"replacing the run that was finished before: {folder / run_name}.json", file=sys.stderr)
        (folder / f"{run_name}.json").unlink()
    if config.induction_scores_csv is None:
        write_head_scores(folder / f"heads/{name_of(config)}_induction_scores.csv", matrix)
    shown: list[str] = []
    clean = curves_of(result.clean)
    summaries = {}
    for mode, layers in settings(config):

        def measured(chosen: tuple[Head, ...], mode: Mode = mode) -> Float[np.ndarray, "permutation lag"]:
            return curves_of(result.intervened[specs[sets[chosen, mode]]]) if chosen else clean

        found = [curves_at(n, heads[layers], config.head_type, measured) for n in levels]
        rows = [summary_row(config, at, clean, heads[layers]) for at in found]
        write_setting(folder, stem, config, (mode, layers), heads[layers], found, rows)
        summaries[f"{mode}_{layers}"] = rows
        shown.append(f"{mode}, {layers} layers\n{table(rows, config)}")
    write_config(folder / f"{run_name}.yaml", config)
    facts = metadata(
        model,
        model=source,
        prompts_hash=prompts.hash,
        permutations=config.permutations,
        n_tokens=n_tokens,
        usable_tokens=len(pool),
        levels=levels,
        head_type=config.head_type,
        random_draws=config.random_draws,
        seed=config.seed,
        summaries=summaries,
    )
    write_json(folder / f"{run_name}.json", facts)
    remove_leftovers(*folder.rglob("*"))
    discard(folder / "unfinished")
    print(f"{config.model_name}: {config.permutations} permutations of {n_tokens} tokens, {config.head_type} heads\n")
    print("\n\n".join(shown))
    print(f"\nwritten:\n  {folder}/ (tables, figures, heads, arrays, {run_name}.yaml and .json)")


# -- what is asked for -------------------------------------------------------------------------------------------------


def tiny(config: Config) -> bool:
    """Whether the model is one of those that ship."""
    return config.model_name in TINY_MODELS


def name_of(config: Config) -> str:
    """The model in file names."""
    return Path(config.model_name).resolve().name


def settings(config: Config) -> Iterator[Setting]:
    """The grid."""
    return ((mode, layers) for mode in config.mode for layers in config.layer_abl)


def levels_of(config: Config) -> list[int]:
    """The numbers of heads of --to_abl."""
    text = (TINY_TO_ABL if tiny(config) else TO_ABL) if config.to_abl is None else config.to_abl
    parts = text.split("-")
    levels = [int(part) for part in parts if part.isdecimal() and len(part) < 7]
    if len(levels) < len(parts) or levels != sorted(set(levels)) or not any(levels):
        raise ValueError(
            f"--to_abl {text!r} must be ascending numbers of heads with dashes between them and not only 0, such as {TO_ABL}."
        )
    if config.max_heads_abl is not None and config.max_heads_abl < levels[-1]:
        raise ValueError(
            f"--to_abl asks for {levels[-1]} heads and --max_heads_abl allows {config.max_heads_abl}; raise it, or ask for fewer."
        )
    return levels


def check_flags(config: Config, n_tokens: int) -> None:
    """Raise ValueError for flags that make no sense."""
    draws = 1 if config.head_type == "random" else 0
    for flag, value, fits, wanted in (
        ("permutations", config.permutations, config.permutations >= 2, "2 or more, for an interval"),
        ("n_tokens", n_tokens, n_tokens >= FEWEST, f"{FEWEST} or more, so that there are lags beyond 5"),
        ("random_draws", config.random_draws, config.random_draws >= draws, f"{draws} or more"),
        ("memory", config.memory, config.memory is None or 0 < config.memory < 2**20, "above 0, in GiB"),
        ("seed", config.seed, config.seed >= 0, "0 or more"),
    ):
        if not fits:
            raise ValueError(f"--{flag} must be {wanted}, not {value}.")
    for flag, chosen in (("mode", config.mode), ("layer_abl", config.layer_abl)):
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"--{flag} names one or more, each once.")


def check_count(usable: int, n_tokens: int, where: str) -> None:
    """Raise ValueError if there are too few tokens."""
    if usable < n_tokens:
        raise ValueError(
            f"{where} has {usable} usable tokens (distinct, not special) and {n_tokens} are wanted; give more, or a smaller "
            "--n_tokens."
        )


def usable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, listed: np.ndarray | None) -> np.ndarray:
    """The tokens that lists are drawn from: those of the file but the special ones, or all ordinary ones of the tokenizer."""
    if listed is None:
        return usable_tokens(model, tokenizer)
    n_vocab = len(cast(Tensor, model.get_input_embeddings().weight))
    if listed.max() >= n_vocab:
        raise ValueError(
            f"--tokens_path holds the id {listed.max()} and the vocabulary has {n_vocab} tokens; give ids of this tokenizer."
        )
    return np.intersect1d(listed, usable_tokens(model, tokenizer, trim=0))


def induction_scores(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Float[np.ndarray, "layer head"]:
    """Attention to what followed the last occurrence, on random tokens that repeat."""
    bos = leading_bos(tokenizer)
    draw = rng(config.seed, "induction scores")
    ids = random_tokens(usable_tokens(model, tokenizer), BLOCK, REPEATS, examples=EXAMPLES, rng=draw, bos=bos)
    return attention_scores(model, ids, BLOCK, first=len(bos), progress=False).induction.mean(0)


def heads_of(
    config: Config, model: PreTrainedModel, scores: list[tuple[float, int, int]], layers: Layers, most: int
) -> Heads:
    """The ranking of some layers' heads, and the random ones that match it."""
    sizes = n_layers(model.config), n_heads(model.config)
    by_head = {(layer, head): score for score, layer, head in scores}
    ranked = ranking(config, scores, layers, sizes[0], most)
    if not config.random_draws:
        return Heads(ranked, [], by_head)
    try:
        random = random_rankings(ranked, most, *sizes, config.random_draws, rng(config.seed, "random heads", layers))
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}, or take --random_draws 0 for no control.") from None
    return Heads(ranked, random, by_head)


def ranking(
    config: Config, scores: list[tuple[float, int, int]], layers: Layers, depth: int, most: int
) -> tuple[Head, ...]:
    """The heads of some layers that the random sets leave alone, those with the highest scores first."""
    try:
        return rank_heads(scores, layers, depth, config.max_heads_abl or most)
    except ValueError as error:
        flag = "--to_abl" if config.max_heads_abl is None else "--max_heads_abl"
        raise ValueError(f"{flag}: {error}") from None


def wanted_sets(
    config: Config, heads: dict[Layers, Heads], levels: list[int]
) -> Iterator[tuple[tuple[Head, ...], Mode]]:
    """Every set of heads that is ablated, and how."""
    for mode, layers in settings(config):
        of_layers = heads[layers]
        for n in filter(None, levels):
            own = [of_layers.ranked[:n]] if config.head_type == "induction" else []
            for chosen in (*own, *of_layers.random_sets(n)):
                yield chosen, mode


# -- what was found ----------------------------------------------------------------------------------------------------


def curves_at(n: int, heads: Heads, head_type: Type, measured: Callable[[tuple[Head, ...]], np.ndarray]) -> Curves:
    """The curves with `n` heads ablated."""
    random = [measured(chosen) for chosen in heads.random_sets(n)]
    own = measured(heads.ranked[:n]) if head_type == "induction" else np.mean(random, 0)
    return Curves(n, own, np.reshape(random, (-1, *own.shape)))


def standard_error(values: Float[np.ndarray, " permutation *some"]) -> Float[np.ndarray, "*some"]:
    """Of the mean over permutations."""
    return values.std(0, ddof=1) / np.sqrt(len(values))


def summary_row(
    config: Config, at: Curves, clean: Float[np.ndarray, "permutation lag"], heads: Heads
) -> dict[str, Any]:
    """One row of the summary: a number of heads."""
    bias, before = plus_one_bias(at.own), plus_one_bias(clean)
    change = paired_bootstrap(bias, before, rng(config.seed, "bias", at.n))
    crp = ratio_of_means(plus_one(at.own)[None], recalled(at.own), rng(config.seed, "crp", at.n))
    row: dict[str, Any] = {
        "heads": at.n,
        "p(+1)": plus_one(at.own).mean(),
        "standard error": standard_error(plus_one(at.own)),
        "bias": bias.mean(),
        "change": change.mean,
        "change low": change.low,
        "change high": change.high,
        "crp(+1)": crp.mean[0],
        "crp low": crp.low[0],
        "crp high": crp.high[0],
    }
    if at.n and len(at.random):
        changes = plus_one_bias(at.random).mean(1) - before.mean()
        row |= {"random sets": len(changes), "random change": changes.mean()}
        row |= {"random lowest": changes.min(), "random highest": changes.max()}
        row |= mean_score("random score", heads, itertools.chain(*heads.random_sets(at.n)))
        if config.head_type == "induction":
            row |= mean_score("score", heads, heads.ranked[: at.n])
            row["share as low"] = (1 + int((changes <= change.mean).sum())) / (1 + len(changes))
    return {name: value if isinstance(value, int) else float(value) for name, value in row.items()}


def mean_score(name: str, heads: Heads, chosen: Iterable[Head]) -> dict[str, float]:
    """The mean induction score of some heads, unless a CSV leaves one out."""
    chosen = list(chosen)
    known = [heads.scores[head] for head in chosen if head in heads.scores]
    return {name: float(np.mean(known))} if len(known) == len(chosen) else {}


def table(rows: list[dict[str, Any]], config: Config) -> str:
    """What the terminal shows of a setting."""
    lines = [
        "heads    p(+1)     bias   change      95% interval      CRP(+1)   random sets: mean change [range], score"
    ]
    for row in rows:
        line = f"{row['heads']:5d} {row['p(+1)']:8.4f} {row['bias']:8.4f} {row['change']:8.4f} "
        line += f"[{row['change low']:7.4f}, {row['change high']:7.4f}] {row['crp(+1)']:8.4f}"
        if "random change" in row:
            line += f"   {row['random sets']:2d}: {row['random change']:7.4f} "
            line += f"[{row['random lowest']:7.4f}, {row['random highest']:7.4f}]"
            line += f", {row['random score']:.2f}" if "random score" in row else ""
        if "share as low" in row:
            line += f" (own {row['score']:.2f})" if "score" in row else ""
            line += f", share as low {row['share as low']:.3f}"
        lines.append(line)
    few = [str(row["heads"]) for row in rows if row["heads"] and row.get("random sets", np.inf) < config.random_draws]
    if few:
        lines.append(
            f"with {', '.join(few)} heads there are fewer different random sets than the {config.random_draws} asked for: their "
            "range is narrow and the share cannot be low; take a smaller --max_heads_abl, or another --layer_abl"
        )
    return "\n".join(lines)


def write_setting(
    folder: Path,
    stem: str,
    config: Config,
    setting: Setting,
    heads: Heads,
    found: list[Curves],
    rows: list[dict[str, Any]],
) -> None:
    """Tables, arrays, heads and figures of one mode and choice of layers."""
    mode, layers = setting

    def name(kind: Type, n: int | None = None) -> str:
        return f"{stem}{'' if n is None else f'_abl{n}'}_{mode}_{kind}_{layers}"

    for at in found:
        chosen: dict[Type, Any] = {"random": heads.random_sets(at.n), "induction": heads.ranked[: at.n]}
        curves: dict[Type, np.ndarray] = {"induction": at.own} if config.head_type == "induction" else {}
        if len(at.random):
            curves["random"] = at.random.mean(0)
            write_npy(folder / f"arrays/{name('random', at.n)}_bias.npy", plus_one_bias(at.random).astype(np.float32))
        for kind, own in curves.items():
            write_csv(folder / f"tables/{name(kind, at.n)}.csv", curve_rows(own))
            write_npy(folder / f"arrays/{name(kind, at.n)}.npy", own.astype(np.float32))
            about = {"head_type": kind, "layer_abl": layers, "mode": mode, "heads": chosen[kind]}
            write_json(folder / f"heads/{name(kind, at.n)}.json", about)
        title = f"{name_of(config)}, {config.head_type} heads, {mode}, {layers} layers"
        figures.save(draw(title, [at], at.random), folder / f"figures/{name(config.head_type, at.n)}.png")
    drawing = draw(title, found, found[-1].random)
    figures.save(drawing, folder / f"figures/{name(config.head_type)}.png")
    columns = dict.fromkeys(column for row in rows for column in row)
    filled = [{column: row.get(column, "") for column in columns} for row in rows]  # no heads have no random ones
    write_csv(folder / f"tables/{name(config.head_type)}_summary.csv", filled)


def curve_rows(curves: Float[np.ndarray, "permutation lag"]) -> list[dict[str, Any]]:
    """One row a lag."""
    columns = (lags_of(curves.shape[1]).tolist(), curves.mean(0), standard_error(curves), lag_crp(curves))
    names = ("Lag", "Mean Probability", "Standard Error", "Conditional Response Probability")
    return [dict(zip(names, (row[0], *map(float, row[1:])), strict=True)) for row in zip(*columns, strict=True)]


@matplotlib.rc_context(figures.STYLE)
def draw(title: str, found: list[Curves], random: Float[np.ndarray, "set permutation lag"]) -> Figure:
    """A line a number of heads, with its standard error; the random sets' mean and range; of many lags the near ones again."""
    lags = lags_of(found[0].own.shape[1])
    few = len(lags) <= 4 * ZOOM
    panels = [(np.ones(len(lags), bool), "." if few else "")]
    if not few:
        panels.append((np.abs(lags) <= ZOOM, "."))
    figure = Figure(figsize=(2.8 + 2.8 * len(panels), 3.4))
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=(1.6, 1)[: len(panels)])[0]
    for axes, (shown, marker) in zip(row, panels, strict=True):
        axes.axvline(0, color=figures.GREY, linewidth=0.8, linestyle="--")
        if len(random):
            curves = random.mean(1)[:, shown]
            axes.fill_between(lags[shown], curves.min(0), curves.max(0), color="#bdbdbd", linewidth=0.6, alpha=0.8)
            label = f"{found[-1].n} random heads: mean and range ({len(random)} set{'s' * (len(random) > 1)})"
            grey: dict[str, Any] = {"color": figures.GREY, "linewidth": 2.2, "linestyle": ":", "zorder": 3}
            axes.plot(lags[shown], curves.mean(0), label=label, **grey)
        for number, at in enumerate(found):
            colour = COLOURS[number % len(COLOURS)]
            mean, error = at.own.mean(0)[shown], standard_error(at.own)[shown]
            axes.plot(lags[shown], mean, color=colour, linewidth=1.2, marker=marker, label=f"{at.n} ablated")
            axes.fill_between(lags[shown], mean - error, mean + error, color=colour, linewidth=0, alpha=0.25)
        axes.set_xlabel("lag")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
        axes.margins(x=0.01)
    row[0].set_ylabel("probability (mean over permutations)")
    row[0].set_title(title)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    sys.exit(run_study(main, Config))

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

Sizes. On a GPU a model of a billion parameters or more gets the published ones by default: 500 tokens, 300 permutations. Smaller
models rarely continue a list of 500 that they have seen only once: 20 tokens, and from ten million parameters on 40 permutations.
A list is never longer than the model's context, or the tokens there are, allow. A start token is there if the tokenizer puts one
in front of a text, for the ranking of heads as for the lists, and is no part of the list; as published is `--bos no`. More than
half of the heads are never ablated by default, so that there are others to compare with.

The control (ours) is many random sets: of the same layers, head for head, and none of the --max_heads_abl heads with the highest
scores. Where a layer has too few others, they come from the nearest layers, and the line "control" says how far. The control is
as clean as the heads that are left: the table has the mean induction score of the sets beside it.

Induction scores are computed on two blocks of random tokens, because the cue has been shown once before: heads that share their
attention among several earlier occurrences score low with more blocks. For a CSV of `induction_scores.py` that means --repeats 2
or --occurrences all; its default may rank other heads first.

The +1-lag bias is p(+1) less the mean of p beyond lag 5 on either side. Its change against no ablation has a 95% interval, the
percentile bootstrap over permutations, each with and without ablation drawn together. The share of random sets that lower it at
least as much is (1 + count) / (1 + sets); draws that turn out to be the same set count once, and small layers have few sets: with
one set the share cannot be below 1/2. (The far lags hold the list's first token, where models that have learnt to go round and
round put what lag +1 loses, so that the bias may fall by more than p(+1).) Lag-CRP (Kahana 1996) is the curve given that one
of the list's other tokens is next. A model that mostly answers with other words has a low p(+1), made by few permutations, and
may yet have a clear lag-CRP: both are shown, and which of them falls by its interval and further than with any random set.

With --head_type random there are the random sets alone, and their mean takes the place of the induction heads.

Written to outputs/ablations/MODEL, NAME being MODEL_permP_ablN_MODE_TYPE_LAYERS (TYPE induction or random, the mean over sets):
tables/NAME.csv, the curve with its standard error over permutations, and lag-CRP; figures/NAME.png, with the range of the random
sets' curves as a band, and without _ablN all levels in one; heads/NAME.json, the heads as [layer, head], of random those of each
set; arrays/NAME.npy [permutation lag], of random NAME_bias.npy [set permutation] too; tables/..._summary.csv, what the terminal
shows; heads/MODEL_induction_scores.csv, where they were computed; MODEL_permP_MODES_TYPE_LAYERS.yaml (running it again with
--config gives the same) and .json, what was run. The same command resumes an interrupted run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from jaxtyping import Float, Int
from pydantic import BeforeValidator

import pyvene_ext as px

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
SHOWN = 4  # tokens on the terminal
Type = Literal["induction", "random"]
Mode = Literal["zero", "mean"]
Layers = Literal["full", "top", "bottom"]
Ranking = list[tuple[float, int, int]]  # score, layer, head; highest score first


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Config(px.flags.Loading, px.flags.Sweep):
    model_name: str = "tiny-gemma2"
    """a shipped or fetched model, folder, GGUF file, hub name, or the end of a known one such as Llama-3.1-8B-Instruct"""
    permutations: Annotated[int, Ge(2)] | None = None
    """prompts: random orders of the same tokens; by default 300, or 40 (see Sizes)"""
    max_heads_abl: int | None = None
    """how many of the heads with the highest scores the random sets leave alone; by default the largest of --to_abl"""
    head_type: Type = "induction"
    """induction: the heads with the highest induction scores, with random ones beside them; random: those alone"""
    to_abl: str | None = None
    """how many heads to ablate, 0 for none; by default 0-1-5-10-20-50 up to half of the heads, on the shipped tiny models
    0-1-2-3-4"""
    mode: Annotated[px.flags.OneOrMore[Mode], BeforeValidator(_listed)] = ("zero",)
    """what comes in place of attention: nothing (zero), equal attention (mean), or one after the other"""
    layer_abl: Annotated[px.flags.OneOrMore[Layers], BeforeValidator(_listed)] = ("full",)
    """which layers' heads: all, the half nearer the input (top), the other half (bottom); several are done one after the other"""
    tokens_path: Path | None = None
    """a JSON file, or pickle, of a list of token ids (or a list of such lists), or JSON of texts and ids, {" cat": 4937}, which
    are compared with the tokenizer; by default all ordinary ones of the tokenizer"""
    n_tokens: Annotated[int, Ge(12)] | None = None
    """length of the list; by default 500, or 20 (see Sizes; the shipped tiny models repeat 40 tokens at most)"""
    bos: Literal["auto", "yes", "no"] = "auto"
    """a start token before the list, and before what heads are ranked on: auto if the tokenizer puts one there; published: no"""
    induction_scores_csv: Path | None = None
    """scores,layer,head; by default they are computed, on 10 sequences of 25 random tokens shown twice (of induction_scores.py:
    --repeats 2, or --occurrences all)"""
    output_dir: px.flags.Out = None
    """the folder that is written; by default outputs/ablations/MODEL"""
    random_draws: Annotated[int, Ge(0)] = 20
    """random sets for each set of induction heads; 0 for none"""
    seed: px.flags.Seed = 42
    """of the tokens, permutations, random heads and bootstrap"""

    @property
    def tiny(self) -> bool:
        """Whether the model is one of those that ship."""
        return self.model_name in px.TINY_MODELS

    @property
    def name(self) -> str:
        """The model in file names."""
        return Path(self.model_name).resolve().name

    @property
    def settings(self) -> list[tuple[Mode, Layers]]:
        """The grid."""
        return [(mode, layers) for mode in self.mode for layers in self.layer_abl]

    @property
    def stem(self) -> str:
        """How all files but the induction scores begin."""
        return f"{self.name}_perm{self.permutations}"

    @property
    def run_files(self) -> dict[str, Any]:
        """The summary and the config, by the arguments of a run folder: several runs share one."""
        name = f"{self.stem}_{'-'.join(self.mode)}_{self.head_type}_{'-'.join(self.layer_abl)}"
        return {"summary": f"{name}.json", "config_file": f"{name}.yaml"}

    def check_flags(self) -> None:
        if self.head_type == "random" and not self.random_draws:
            raise ValueError("--random_draws must be 1 or more, not 0, with --head_type random.")


def main(config: Config) -> None:
    # Everything that can be wrong is found before the first forward pass, what the files alone tell before the model is loaded.
    levels_of(config)
    run = px.RunFolder(config, "ablations", config.name, flag="output_dir")
    listed = listed_tokens(config)
    source = config.model_name if Path(config.model_name).is_dir() else KNOWN.get(config.model_name, config.model_name)
    model, tokenizer = config.load(source)
    bos = px.methods.leading_bos(tokenizer, config.bos)
    pool = usable_tokens(config, model, tokenizer, listed)
    given = known_scores(config, model)
    config, levels = sized(config, model, len(bos), len(pool), given)
    n_tokens, permutations = config.n_tokens, config.permutations
    assert n_tokens and permutations  # they are filled in
    run.fill_in(config, **config.run_files)
    prompts = px.methods.lag_prompts(pool, n_tokens, permutations, config.seed, bos)

    # Which heads: a ranking of each choice of layers by induction score, and random ones that match it.
    scores, matrix = ranked_scores(config, model, tokenizer, bos, given)
    heads = {layers: ranked_heads(config, model, scores, layers, levels[-1]) for layers in config.layer_abl}

    # Every set of heads on every permutation: one sweep, in which equal sets of different settings are one.
    sets = {
        (chosen, mode): px.methods.ablate_attention(chosen, mode)
        for mode, layers in config.settings
        for n in filter(None, levels)
        for chosen in heads[layers].sets(n, config.head_type)
    }
    specs = {spec: row for row, spec in enumerate(dict.fromkeys(sets.values()))}
    options: dict[str, Any] = {"metric": "token_probabilities", "memory": config.memory_bytes}
    seconds = px.plan_sweep(model, list(specs), prompts, **options).passes * px.runs.seconds_a_pass(model, prompts)
    work = f"{len(specs)} interventions x {permutations} prompts, permutations of {n_tokens} tokens"
    if not run.announce(work, seconds, n=permutations, limit="permutations"):
        return
    options |= {"compile": config.compile, "store": run.unfinished, "progress": px.is_main_process()}
    result = px.sweep(model, list(specs), prompts, **options)
    if not px.is_main_process():
        return
    rows = {key: specs[spec] for key, spec in sets.items()}

    # The curve over lags with every number of heads ablated, and its bias to lag +1, beside the random sets; setting by setting.
    clean = px.methods.curves_of(result.baseline, len(bos))
    curves = {
        (mode, layers): [
            px.methods.lag_curves(result, rows, heads[layers], mode, n, config.head_type, len(bos)) for n in levels
        ]
        for mode, layers in config.settings
    }
    tables = {
        setting: [px.methods.lag_summary(at, clean, heads[setting[1]], config.head_type, config.seed) for at in found]
        for setting, found in curves.items()
    }
    untouched = px.methods.lag_task(clean, config.seed)
    some = tokenizer.batch_decode([[token] for token in prompts.input_ids[0][len(bos) :][:SHOWN]])
    print(summary(config, some, untouched, tables))
    named = {"model": source, "bos": list(bos), "usable_tokens": len(pool), "levels": levels, "untouched": untouched}
    facts = facts_of(config, model, prompts.hash, named, tables)
    sample = f"{permutations} permutations of {n_tokens} tokens"
    with run.writing(facts, px.runs.lag.lag_evidence(sample, config.head_type, tables)):
        if matrix is not None:
            px.methods.write_head_scores(run.path / f"heads/{config.name}_induction_scores.csv", matrix)
        for setting, found in curves.items():
            names, of_layers = (config.stem, config.name), heads[setting[1]]
            px.runs.lag.write_setting(run, names, setting, config.head_type, of_layers, found, clean, tables[setting])


def facts_of(
    config: Config, model: PreTrainedModel, prompts_hash: str, named: dict[str, Any], tables: dict[Any, Any]
) -> dict[str, Any]:
    """What was run, for the summary."""
    flags = ("permutations", "n_tokens", "head_type", "random_draws", "seed")
    return px.metadata(
        model,
        prompts_hash=prompts_hash,
        **named,
        **{flag: getattr(config, flag) for flag in flags},
        summaries={"_".join(setting): table for setting, table in tables.items()},
    )


# -- what is asked for -------------------------------------------------------------------------------------------------


def levels_of(config: Config) -> list[int]:
    """The numbers of heads of --to_abl."""
    default = px.methods.TINY_TO_ABL if config.tiny else px.methods.TO_ABL
    return px.methods.parse_levels(default if config.to_abl is None else config.to_abl, config.max_heads_abl)


def listed_tokens(config: Config) -> Int[np.ndarray, " token"] | None:
    """The tokens of --tokens_path; ValueError if they are too few."""
    if config.tokens_path is None:
        return None
    listed = np.array(px.prompts.read_token_list(config.tokens_path), np.int64)
    px.methods.check_usable(len(np.unique(listed)), config.n_tokens or px.methods.FEWEST, str(config.tokens_path))
    return listed


def usable_tokens(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    listed: Int[np.ndarray, " token"] | None,
) -> Int[np.ndarray, " token"]:
    """The tokens that lists are drawn from: those of the file but the special ones, or all ordinary ones of the tokenizer."""
    pool = px.methods.usable_tokens(model, tokenizer, among=listed)
    if listed is not None and config.tokens_path is not None:
        warning = px.prompts.check_token_list(config.tokens_path, listed.tolist(), tokenizer)
        px.io.note(f"warning: {warning}", shown=warning is not None and px.is_main_process())
    return pool


def known_scores(config: Config, model: PreTrainedModel) -> Ranking | None:
    """The scores of --induction_scores_csv with their heads, highest first; None if they are to be computed."""
    path = config.induction_scores_csv
    return None if path is None else px.methods.read_head_scores(path, model.config)


def sized(
    config: Config, model: PreTrainedModel, n_bos: int, n_usable: int, scores: Ranking | None
) -> tuple[Config, list[int]]:
    """The config with the sizes that it leaves to the model (the docstring: Sizes), and the numbers of heads."""
    named = {"name": config.model_name, "where": str(config.tokens_path or "the tokenizer")}
    sizes = px.methods.lag_sizes(model, n_bos, n_usable, config.n_tokens, config.permutations, **named)
    shape = px.models.n_layers(model.config), px.models.n_heads(model.config)
    ranking, levels = scores or [(0.0, *head) for head in np.ndindex(*shape)], levels_of(config)
    if config.to_abl is None:
        levels = px.methods.levels_that_leave_others(levels, model, config.layer_abl, ranking)
    for layers in config.layer_abl:
        first_heads(config, ranking, layers, shape[0], levels[-1])
    return replace(config, **sizes._asdict(), to_abl="-".join(map(str, levels))), levels


def ranked_scores(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bos: tuple[int, ...],
    given: Ranking | None,
) -> tuple[Ranking, Float[np.ndarray, "layer head"] | None]:
    """Induction scores with their heads, highest first: those given, or computed, and then as a matrix too."""
    if given is not None:
        return given, None
    draw = px.rng(config.seed, "induction scores")
    matrix = px.models.broadcast_from_main(lambda: px.methods.cue_scores(model, tokenizer, draw, bos))
    rows = [(float(score), *head) for head, score in np.ndenumerate(matrix)]
    return sorted(rows, key=lambda row: (-row[0], row[1:])), matrix


def first_heads(config: Config, scores: Ranking, layers: Layers, depth: int, most: int) -> tuple[px.stats.Head, ...]:
    """The heads of some layers that the random sets leave alone, those with the highest scores first."""
    try:
        return px.methods.rank_heads(scores, layers, depth, config.max_heads_abl or most)
    except ValueError as error:
        flag = "--to_abl" if config.max_heads_abl is None else "--max_heads_abl"
        raise ValueError(f"{flag}: {error}") from None


def ranked_heads(
    config: Config, model: PreTrainedModel, scores: Ranking, layers: Layers, most: int
) -> px.methods.RankedHeads:
    """The ranking of some layers' heads, and the random ones that match it."""
    sizes = px.models.n_layers(model.config), px.models.n_heads(model.config)
    ranked = first_heads(config, scores, layers, sizes[0], most)
    random: list[tuple[px.stats.Head, ...]] = []
    if config.random_draws:
        draws = px.rng(config.seed, "random heads", layers)
        random = px.stats.random_rankings(ranked, most, *sizes, config.random_draws, draws)
    return px.methods.RankedHeads(ranked, random, {(layer, head): score for score, layer, head in scores})


# -- what was found ----------------------------------------------------------------------------------------------------


def summary(
    config: Config, some: list[str], untouched: list[str], tables: dict[tuple[Mode, Layers], list[dict[str, Any]]]
) -> str:
    """What the terminal shows: some of the tokens, whether the model does the task, and two tables a setting."""
    tokens = f"{config.n_tokens} tokens ({', '.join(map(repr, some))} ...)"
    size = f"{config.permutations} permutations of {tokens}, {config.head_type} heads"
    parts = ["\n".join([f"{config.model_name}: {size}", *untouched])]
    for (mode, layers), rows in tables.items():
        parts.append(f"{mode}, {layers} layers\n{px.methods.lag_text(rows)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))

"""Which heads look at the token before, at the same token, at what followed it, and which copy? Scores on repeated random tokens.

    python experiments/induction_scores.py
    python experiments/induction_scores.py --model_name meta-llama/Llama-3.1-8B-Instruct --dtype bfloat16
    python experiments/induction_scores.py --model_name path/to/folder --length 50 --repeats 2 --seeds 0 1 2
    python experiments/induction_scores.py --occurrences all

Method (Olsson et al. 2022, appendix "Head activation evaluators"). A block of `--length` distinct random tokens is repeated
`--repeats` times after the start token, `--examples` times for every seed; one forward pass gives the scores of all heads. With
A the attention pattern and s the length of the block: previous_token is the mean of A[i, i-1] over the random tokens i,
duplicate_token that of A[i, i-s] and induction that of A[i, i-s+1] over those after the first block; with `--occurrences all`
the same entries in all earlier blocks are summed. copying is of the OV circuit, as if the head looked at one token alone: the
share of that token in what the head's direct logits raise among the tokens of the block, scaled to [-1, 1]; it says nothing of
where the head looks. By chance the share is 1 / s, so that the chance level of copying is 2 / s - 1: -0.92 with 25 tokens. It is
below 0 for a head that raises its own token less than all others of the block together. An induction head has both, a high
induction score and a copying score above chance.

Random tokens are neither special nor added. Those of the lowest and the highest ids are left out too (`--trim`, a tenth of the
vocabulary at each end) where ids roughly go by frequency, in BPE and Unigram vocabularies; this stands in for leaving out the
most and the least frequent tokens, which a tokenizer does not tell. The start token is there if the tokenizer puts one in front
of a text (`--bos yes` and `no` say otherwise).

Means and standard errors are over the sequences of all seeds, which are independent. Control: the attention scores at the same
distances on as many sequences of random tokens none of which comes twice. What a head scores there it owes to distance alone. Of
copying it is the chance level; the terminal says how many heads lie above it by their 95% interval (bootstrap over sequences).

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
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Lt
from jaxtyping import Float, Int

import pyvene_ext as px

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

SHOWN = 5  # heads of each kind on the terminal
EXAMPLES = 10  # sequences a seed
# Name in files, attribute of HeadScores, and what the colour of the figure means.
KINDS = (
    ("induction", "induction", "mean attention A[i, i-s+1]"),
    ("previous_token", "previous", "mean attention A[i, i-1]"),
    ("duplicate_token", "duplicate", "mean attention A[i, i-s]"),
    ("copying", "copying", "2r - 1, r: share on the token"),
)


@dataclass(frozen=True)
class Config(px.flags.Loading):
    model_name: px.flags.ModelName = "tiny-llama3.1"
    output_dir: px.flags.Out = None
    length: Annotated[int, Ge(2)] = 25
    """random tokens of a block"""
    repeats: Annotated[int, Ge(2)] = 4
    """how often the block is there"""
    examples: px.flags.Count | None = None
    """sequences a seed; by default 10"""
    seeds: px.flags.OneOrMore[px.flags.Seed] = (0, 1, 2, 3, 4)
    """of the random tokens"""
    occurrences: Literal["last", "all"] = "last"
    """which earlier occurrence counts: the last, or all of them together"""
    trim: Annotated[float, Ge(0), Lt(0.5)] | None = None
    """share of the ids left out at each end; by default 0.1 in BPE and Unigram vocabularies and 0 in others"""
    bos: Literal["auto", "yes", "no"] = "auto"
    """a start token first: auto if the tokenizer does so"""
    copying: bool = True
    """score copying too, which needs weights that are neither quantised nor offloaded"""
    batch_size: px.flags.Count = 10
    """sequences a forward pass"""

    def check_flags(self) -> None:
        if len(self.seeds) * (self.examples or EXAMPLES) < 2:
            raise ValueError("one sequence has no standard error; give --examples 2 or more, or more --seeds.")


class Kind(NamedTuple):
    """One kind of score: of every sequence, its mean and standard error, and the mean of its control, or the chance level."""

    sequences: Float[np.ndarray, "seed example layer head"]
    mean: Float[np.ndarray, "layer head"]
    se: Float[np.ndarray, "layer head"]
    control: Float[np.ndarray, "layer head"] | None
    chance: float | None

    def beside(self, head: tuple[int, int]) -> float:
        """What a head's score is compared with."""
        if self.control is not None:
            return float(self.control[head])
        assert self.chance is not None
        return self.chance


def main(config: Config) -> None:
    if not px.is_main_process():
        return  # a few forward passes are no work to share
    # Everything that can be wrong is found before the first forward pass.
    run = px.RunFolder(config, "induction_scores", config.model_name, flag="output_dir")
    model, tokenizer = config.load(config.model_name)
    px.methods.check_patterns(model)
    bos = px.methods.leading_bos(tokenizer, config.bos)
    tokens = px.methods.usable_tokens(model, tokenizer, config.trim)
    repeated = sequences("repeated", tokens, config.length, config.repeats, bos, config)
    unrepeated = sequences("control", tokens, config.length * config.repeats, 1, bos, config)
    for ids in (repeated, unrepeated):
        px.methods.check_sequences(model, ids, config.length, len(bos), config.occurrences, config.batch_size)
    # Two passes over the sequences, without the unembedding; copying takes about as long as a pass.
    prompts = px.TokenizedPrompts(tuple(map(tuple, repeated.tolist())))
    passes = 3 if config.copying else 2
    work = (
        f"scores of all heads on {len(repeated)} sequences of {repeated.shape[1]} tokens, and as many for the control"
    )
    seconds = passes * px.runs.seconds_a_pass(model, prompts)
    if not run.announce(work, seconds, n=config.examples or EXAMPLES, limit="examples"):
        return

    # The scores, and those of the control at the same distances.
    common: dict[str, Any] = {
        "period": config.length,
        "first": len(bos),
        "occurrences": config.occurrences,
        "batch_size": config.batch_size,
    }
    found = px.methods.attention_scores(model, repeated, copying=config.copying, **common)
    control = px.methods.attention_scores(model, unrepeated, **common)

    # Means and standard errors over sequences.
    kinds = summarise(found, control, len(config.seeds), 2 / config.length - 1)
    heads = table(kinds)
    facts = px.metadata(
        model,
        model=config.model_name,
        n_sequences=len(repeated),
        length=config.length,
        repeats=config.repeats,
        seeds=list(config.seeds),
        occurrences=config.occurrences,
        bos=list(bos),
        usable_tokens=len(tokens),
        copying_chance=2 / config.length - 1 if config.copying else None,
        top={name: [px.stats.head_label(head) for head in ranked(heads, name)[:SHOWN]] for name in kinds},
    )

    print(summary(facts, kinds, heads))
    with run.writing(facts, evidence(kinds, heads)):
        for name, kind in kinds.items():
            px.methods.write_head_scores(run.path / f"{name}_scores.csv", kind.mean)
            run.array(name, kind.mean)
            run.array(f"{name}_se", kind.se)
            run.array(f"{name}_sequences", kind.sequences)
            if kind.control is not None:
                run.array(f"{name}_control", kind.control)
            run.figure(name, heatmap(name, kind, run.of, config))
        run.table("heads", heads)
        first = [head for name in kinds for head in ranked(heads, name)[:2]]
        run.views(px.runs.look(model, tokenizer, repeated.tolist(), first))


def sequences(
    name: str, tokens: Int[np.ndarray, " token"], length: int, repeats: int, bos: tuple[int, ...], config: Config
) -> Int[Tensor, "sequence pos"]:
    """The sequences of all seeds, in their order."""
    import torch

    examples = config.examples or EXAMPLES
    return torch.cat(
        [
            px.methods.random_tokens(tokens, length, repeats, examples=examples, rng=px.rng(seed, name), bos=bos)
            for seed in config.seeds
        ]
    )


def summarise(
    found: px.methods.HeadScores, control: px.methods.HeadScores, n_seeds: int, chance: float
) -> dict[str, Kind]:
    """Mean and standard error over sequences, of every kind that was scored; copying is compared with chance."""
    kinds = {}
    for name, attribute, _ in KINDS:
        scores, of_control = getattr(found, attribute), getattr(control, attribute)
        if scores is None:
            continue
        kinds[name] = Kind(
            sequences=scores.reshape(n_seeds, -1, *scores.shape[1:]),
            mean=scores.mean(0),
            se=px.stats.standard_error(scores),
            control=None if of_control is None else of_control.mean(0),
            chance=chance if of_control is None else None,
        )
    return kinds


def table(kinds: dict[str, Kind]) -> list[dict[str, Any]]:
    """One row per head: score, standard error and control of every kind."""
    rows = []
    for layer, head in np.ndindex(kinds["induction"].mean.shape):
        row: dict[str, Any] = {"layer": layer, "head": head}
        for name, kind in kinds.items():
            row |= {name: float(kind.mean[layer, head]), f"{name}_se": float(kind.se[layer, head])}
            if kind.control is not None:
                row[f"{name}_control"] = float(kind.control[layer, head])
        rows.append(row)
    return rows


def ranked(heads: list[dict[str, Any]], name: str) -> list[tuple[int, int]]:
    """The heads, the highest score of a kind first."""
    return [(row["layer"], row["head"]) for row in sorted(heads, key=lambda row: -row[name])]


def heatmap(name: str, kind: Kind, of: str, config: Config) -> Figure:
    """A map of the mean scores of one kind."""
    label = next(label for other, _, label in KINDS if other == name)
    if config.occurrences == "all" and name in ("induction", "duplicate_token"):
        label += ", all blocks"
    title = f"{name.replace('_', ' ').capitalize()} score: {of}"
    return px.figures.head_heatmap(kind.mean, title, label, limits=None if name == "copying" else (0.0, 1.0))


def summary(facts: dict[str, Any], kinds: dict[str, Kind], heads: list[dict[str, Any]]) -> str:
    """What the terminal shows: the heads with the highest scores of each kind."""
    lines = [
        f"{facts['model']}: {facts['n_sequences']} sequences of {facts['length']} random tokens x {facts['repeats']}, "
        f"{'with' if facts['bos'] else 'without'} a start token, {facts['usable_tokens']} tokens to draw from"
    ]
    for name, kind in kinds.items():
        of_heads = f"mean over heads {kind.mean.mean():.3f}"
        if kind.chance is not None:
            above = sum(interval(name, kind, head).low > kind.chance for head in np.ndindex(kind.mean.shape))
            of_heads += f"; {above} of {kind.mean.size} heads above chance"
        lines += [
            f"\n{name.replace('_', ' ')} ({of_heads})",
            f"   head   score  std error {'control' if kind.chance is None else 'chance':>8}",
        ]
        for row in sorted(heads, key=lambda row: -row[name])[:SHOWN]:
            other = kind.beside((row["layer"], row["head"]))
            lines.append(f"{row['layer']:>4}.{row['head']:<2} {row[name]:7.3f} {row[f'{name}_se']:10.4f} {other:8.3f}")
    return "\n".join(lines)


def interval(name: str, kind: Kind, head: tuple[int, ...]) -> px.Interval:
    """The mean score of a head with its interval over sequences."""
    scores = kind.sequences[:, :, head[0], head[1]].ravel()
    return px.stats.bootstrap_mean(scores, px.rng(0, "bootstrap", name, *head), 2000)


def evidence(kinds: dict[str, Kind], heads: list[dict[str, Any]]) -> list[px.runs.Evidence]:
    """The highest score for induction and for copying, beside their controls."""
    found = []
    for name in (name for name in ("induction", "copying") if name in kinds):
        kind, head = kinds[name], ranked(heads, name)[0]
        n_sequences, n_heads = kind.sequences[..., 0, 0].size, kind.mean.size
        other = kind.beside(head)
        control = (
            f"chance, {other:.3g}" if kind.control is None else f"{other:.3g} at the same distance, nothing repeated"
        )
        effect = f"{px.stats.head_label(head)}, the highest of {n_heads} heads, has the {name} score"
        of = f"{n_sequences} sequences"
        null = round(other, 4)
        found.append(px.runs.Evidence(of, effect, interval(name, kind, head), control, "more --examples", null))
    return found


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))

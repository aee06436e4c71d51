"""Which heads move names? Attention to a name against what is written in its direction, copy scores, and direct effects.

    python experiments/name_movers.py
    python experiments/name_movers.py --model tiny-gemma2 --dataset ioi_zh
    python experiments/name_movers.py --model openai-community/gpt2 --dataset recent_en --heads 9.9 9.6 10.0 10.7
    python experiments/name_movers.py --dataset pairs.json --names witness --fold_norm --no_path_patching

Method (Wang et al. 2022, section 3.1, on name movers). Each prompt has two names: IO, the right answer, and S, the wrong one. In
the task "most recent subject" (recent_en, recent_tiny) IO is the latest subject and S the earlier one of its kind; the prompts'
own positions earlier1 and earlier2, or those given with `--names`, hold further names. The paper's names are single tokens. Of
names of several tokens the one counts that tells them apart (as `--answers first_difference` elsewhere; ours): tokens that both
names begin with are appended to the prompt, so that END is the last of these; attention to a name is summed over its tokens; and
what is written and copied is the token that differs. Prompts in which no token tells the names apart are skipped and reported.

Three things are read off every head. (1) Attention probability from END, the last token, to a name, summed over its occurrences,
against the head's contribution to the residual stream at END times the name's unembedding: one point per prompt and name,
Pearson's r and p by kind of name (io, s, s1 and s2 alone, others), and pooled over names (each once). There is no final norm in
the projection, as published; `--fold_norm` folds it in, its scale frozen. A post-norm's scale (Gemma 2) is part of the
contribution. (2) Copy score: the stream after block 0 at a name -> the head's norm -> its values -> its output matrix -> final
norm -> unembedding; the share of names among the first `--top` tokens, over all names and prompts. Negative: minus the output
matrix. The same from the head's own input, the stream that enters its layer at the name (ours), because later blocks may turn
what block 0 left there; and from what enters block 0 and what its MLP makes of that alone (W_E + MLP0; GPT-2's position embedding
included). Control: the share of prompts where another name of the prompt, IO for S and S for IO, is among the first. (3) Direct
effect on the logit difference: attribution, what the head adds to logit(IO) - logit(S) with the final norm's scale frozen, and as
the causal measure path patching head -> logits: how much the logit difference drops if END gets what the head gives at the end of
the corrupt prompt (other names), all other heads frozen. That, rather than ablation, because it is the paper's own measure, puts
in a value that the head does have, and excludes what later heads make of the head, or make up for it.

A copy score treats attention to the name as 1. It says what a head would do, not that it looks there, nor that it looks at one
name more than at the other; so the table joins the three, and a head's role goes by all. A head copies if its score from its own
input is at least 0.5. It looks at a name if that gets at least 0.1 of its attention. It has a direct effect if its attribution is
at least 2% of the mean logit difference (before any soft-cap) and the 95% intervals of attribution and path effect both exclude
0, on one side. (pyvene_ext/methods/heads/name_roles.py has the reasons.) The summary counts roles at other thresholds too.

    name mover            copies, looks at IO, direct effect above 0
    negative name mover   copies negatively, looks at IO more than at S, direct effect below 0
    writes against S      copies negatively, looks at S more than at IO, direct effect above 0
    moves the wrong name  copies, looks at S, direct effect below 0
    raises both names     copies, looks at both, adds at least 2% to the logits of both (intervals above 0), no direct effect
    copies to no effect   copies, or copies negatively, without any direct effect

Where the logit difference is not above 0 the model does not do the task, and no head has a role.

Attention-pattern report: where END and END-1 look, by name (io, s1, s2, others), first token (BOS where there is one), END-1, END
and the rest; each token once, so that they sum to 1.

Intervals over prompts are percentile bootstrap 95% intervals. Of the heads shown, the pooled r has one as well, and a p that
permutes prompts within each kind of name: what is left if heads merely attend to and write one kind more than another.

Written to the folder OUT: attention.npy and projection.npy [kind layer head prompt]; looks.npy [query place layer head prompt];
copy_ranks.npy [input sign asked layer head place prompt], 1 being the top and 101 all beyond 100; attribution.npy,
attribution_io.npy (of logit(IO) alone) and path_effect.npy [layer head prompt]; logit_diff.npy and logit_diff_before_cap.npy
[prompt]; heads.csv, all of a head in one row, largest attribution first; correlations.csv; looks.csv; figures; attention.json,
where the first heads shown look; config.yaml (running it again gives the same); and last summary.json, what was run and what the
entries of every axis are called: where it is, the rest is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Float

import pyvene_ext as px

SHOWN = 8  # heads in the tables on the terminal and in figures
REPORTED = 5  # skipped prompts that the terminal names
RESAMPLES = 2000
QUERIES = ("end", "end-1")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Config(px.flags.Model, px.flags.Dataset):
    out: px.flags.Out = None
    names: px.flags.EachOnce[str] | None = None
    """the prompts' own positions that hold further names; by default those called earlier..."""
    heads: px.flags.EachOnce[px.flags.HeadLabel] = ()
    """the heads shown and drawn; by default those with the largest attributions"""
    top: Annotated[int, Ge(1), Le(100)] = 5
    """a name counts as copied if it is among this many top tokens"""
    fold_norm: bool = False
    """fold the final norm, its scale frozen, into the projection"""
    path_patching: bool = True
    """measure the causal direct effect, which needs corrupt texts"""


def main(config: Config) -> None:
    if not px.is_main_process():
        return  # a few forward passes per prompt are no work to share
    # Everything that can be wrong is found before the first forward pass.
    run = px.RunFolder(config, "name_movers", config.model, config.dataset)
    prompt_set = config.load_prompts()
    others = further_names(config, prompt_set)
    model, tokenizer = config.load_model()
    px.methods.check_patterns(model)
    given = px.models.heads_of(config.heads, config.model, model)
    names = px.methods.find_names(prompt_set, tokenizer, others)
    if len(names.prompts) < 2:
        raise ValueError(
            f"only one of the {len(prompt_set)} prompts of {prompt_set.name} has names that tokens tell apart; a mean with an "
            "interval over prompts needs at least two."
        )
    longest = px.models.n_positions(model.config)
    prompts = names.tokenize(tokenizer, max_length=longest)
    corrupt = names.tokenize(tokenizer, "corrupt", max_length=longest) if config.path_patching else None
    work = f"attention, copy scores and direct effects of all heads on {len(prompts)} prompts"
    if not run.announce(work, seconds(model, prompts, names, config), n=len(prompt_set)):
        return

    # Where heads look and what they write; what they would copy; what they add to the logit difference, and what it loses.
    found = px.methods.name_measures(
        model, names, prompts, corrupt, fold_norm=config.fold_norm, batch_size=config.batch_size
    )

    # One row per head that joins the three; its role; and how attention goes with what is written.
    draws = px.rng(config.seed, "bootstrap", "logit difference")
    clean = px.stats.bootstrap_mean(found.logit_diff, draws, RESAMPLES)
    whole = float(found.logit_diff_before_cap.mean()) if clean.low > 0 else None
    correlations = px.methods.name_correlations(found, names)
    heads = px.methods.name_table(
        found, names, correlations, whole, top=config.top, seed=config.seed, resamples=RESAMPLES
    )
    shown = list(given) or [(row["layer"], row["head"]) for row in heads[:SHOWN]]
    pooled = {head: px.methods.pooled_correlation(found, names, head, config.seed, RESAMPLES) for head in shown}
    places = px.methods.named_places(names, prompts)[0]
    facts = px.metadata(
        model,
        **settings(config, names, prompts, places),
        **px.stats.interval_columns("clean_logit_diff", clean),
        clean_io_over_s=float((found.logit_diff > 0).mean()),
        logit_diff_before_cap=float(found.logit_diff_before_cap.mean()),
        does_the_task=clean.low > 0,
        **role_facts(heads, whole),
        shown=[px.stats.head_label(head) for head in shown],
        helps_if_negative=["attribution_s"],
    )

    measured = found, names, heads, pooled, places
    figures = px.figures.figures_of_name_movers(*measured, of=run.of, fold_norm=config.fold_norm)
    print(summary(facts, heads, shown, pooled, found))
    with run.writing(facts, [evidence(facts, heads)], replacing=("path_effect.npy", "figures/scatter_*")):
        for name, array in vars(found).items():
            if array is not None:
                run.array(name, array)
        run.table("heads", heads)
        run.table("correlations", correlation_table(correlations))
        run.table("looks", looks_table(found, places))
        for name, figure in figures.items():
            run.figure(name, figure)
        kept = [f"prompt {index}" for index in range(len(prompt_set)) if index not in names.dropped]
        run.views(px.runs.look(model, tokenizer, prompts.input_ids, shown[: px.runs.HEADS], names=kept))


# -- what is run -------------------------------------------------------------------------------------------------------


def further_names(config: Config, prompts: px.PromptSet) -> tuple[str, ...]:
    """The positions that hold names besides IO's and S's."""
    if config.path_patching and (lacking := [i for i, prompt in enumerate(prompts) if prompt.corrupt is None]):
        raise ValueError(
            f"prompt {lacking[0]} of {prompts.name} has no corrupt text, which path patching needs; add it, or leave path "
            "patching out with --no_path_patching."
        )
    if config.names is not None:
        return config.names
    shared = set.intersection(*(set(prompt.positions) for prompt in prompts))
    return tuple(name for name in prompts[0].positions if name in shared and name.startswith("earlier"))


def seconds(model: Any, prompts: px.TokenizedPrompts, names: px.methods.Names, config: Config) -> float:
    """How long the measures take: a few passes, those of the paths, which run from the end alone, and the copy scores."""
    heads = px.models.n_layers(model.config) * px.models.n_heads(model.config)
    passes = 6 + config.path_patching * heads / 20
    copied = len(px.methods.INPUTS) * heads * len(prompts) * len(px.methods.copied_names(names)[0])
    near_the_top = copied // 4  # of the others a part of the vocabulary is enough
    return passes * px.runs.seconds_a_pass(model, prompts) + px.runs.seconds_of_logits(model, near_the_top)


def settings(
    config: Config, names: px.methods.Names, prompts: px.TokenizedPrompts, places: Sequence[str]
) -> dict[str, Any]:
    """What was run, and what the entries of every axis are called."""
    return {
        "model": config.model,
        "dataset": config.dataset,
        "prompts_hash": prompts.hash,
        "n": len(prompts),
        "dropped": [{"prompt": index, "why": why} for index, why in names.dropped.items()],
        "names_of_several_tokens": list(names.several),
        "kinds": list(names.kinds),
        "pooled_kinds": [names.kinds[kind] for kind in names.whole],
        "queries": list(QUERIES),
        "places": list(places),
        "copy_inputs": list(px.methods.INPUTS),
        "copy_signs": list(px.methods.SIGNS),
        "copy_asked": ["its own name", "another name of the prompt"],
        "copy_places": list(px.methods.copied_names(names)[0]),
        "top": config.top,
        "fold_norm": config.fold_norm,
        "seed": config.seed,
    }


# -- statistics --------------------------------------------------------------------------------------------------------


def role_facts(heads: Rows, whole: float | None) -> dict[str, Any]:
    """How much heads copy, and which heads have which role, for the summary."""
    return {
        "mean_copy_score": float(by_head(heads, "copy").mean()),
        "mean_negative_copy_score": float(by_head(heads, "copy_negative").mean()),
        "mean_copy_score_of_own_input": float(by_head(heads, "copy_own").mean()),
        "mean_negative_copy_score_of_own_input": float(by_head(heads, "copy_own_negative").mean()),
        "roles": {role: [named(row) for row in heads if row["role"] == role] for role in px.methods.ROLES},
        "by_threshold": px.methods.count_roles(heads, whole),
    }


def correlation_table(correlations: dict[px.stats.Head, dict[str, px.stats.Correlation]]) -> Rows:
    """One row per head and kind of name."""
    return [
        {"layer": layer, "head": head, "kind": kind, "n": c.n, "r": c.pearson.r, "p": c.pearson.p, "note": c.note}
        for (layer, head), by_kind in correlations.items()
        for kind, c in by_kind.items()
    ]


def looks_table(found: px.methods.NameMeasures, places: Sequence[str]) -> Rows:
    """Mean attention of every head from END and from END-1 to each group of tokens."""
    mean = found.looks.mean(-1)
    return [
        {"layer": layer, "head": head, "query": query}
        | {place: float(mean[number, at, layer, head]) for at, place in enumerate(places)}
        for layer, head in np.ndindex(mean.shape[2:])
        for number, query in enumerate(QUERIES)
    ]


def by_head(heads: Rows, measure: str) -> Float[np.ndarray, "layer head"]:
    """A column of the table as a matrix."""
    rows = sorted(heads, key=lambda row: (row["layer"], row["head"]))
    return np.array([row[measure] for row in rows], float).reshape(1 + rows[-1]["layer"], -1)


def named(row: dict[str, Any]) -> str:
    """The head of a row."""
    return px.stats.head_label((row["layer"], row["head"]))


# -- what is shown -----------------------------------------------------------------------------------------------------


def summary(
    facts: dict[str, Any],
    heads: Rows,
    shown: Sequence[px.stats.Head],
    pooled: dict[px.stats.Head, px.stats.Correlation],
    found: px.methods.NameMeasures,
) -> str:
    """What the terminal shows: the clean run, the joined table of some heads, what copy scores alone would say, and the looks."""
    lines = [
        f"{facts['model']} on {facts['dataset']}: {facts['n']} prompts; mean logit difference "
        f"{facts['clean_logit_diff']:.2f} [{facts['clean_logit_diff_low']:.2f}, {facts['clean_logit_diff_high']:.2f}], "
        f"IO above S on {facts['clean_io_over_s']:.1%}"
    ]
    if facts["dropped"]:
        lines.append(f"{len(facts['dropped'])} prompts left out, in which no token tells the names apart:")
        lines += [f"  prompt {entry['prompt']}: {entry['why']}" for entry in facts["dropped"][:REPORTED]]
        if len(facts["dropped"]) > REPORTED:
            lines.append(f"  ... and {len(facts['dropped']) - REPORTED} more in summary.json")
    if several := facts["names_of_several_tokens"]:
        lines.append(
            f"{len(several)} prompts with a name of several tokens: the token that tells the names apart counts"
        )
    if not facts["does_the_task"]:
        lines.append(
            "the logit difference is not above 0 (95% interval): the model does not do this task, so that no head moves its "
            "answer; attributions below say which heads favour which name."
        )
    lines += [
        f"\nmean over heads: copy score after block 0 {facts['mean_copy_score']:.3f}, negative "
        f"{facts['mean_negative_copy_score']:.3f}; from a head's own input {facts['mean_copy_score_of_own_input']:.3f}, negative "
        f"{facts['mean_negative_copy_score_of_own_input']:.3f} (the name among the first {facts['top']})",
        "\n        attribution to             path   copy: block 0   own input           attention   pooled               "
        "      p within\n"
        "  head  logit diff  [95%]      IO  effect    +     -      +     -  control     io     s  r [95%]                   kinds"
        "  role",
    ]
    rows = {(row["layer"], row["head"]): row for row in heads}
    for at in shown:
        row, r = rows[at], pooled[at].pearson
        span = f"[{row['attribution_low']:.2f}, {row['attribution_high']:.2f}]"
        path = f"{row['path_effect']:.2f}" if "path_effect" in row else "-"
        correlation = f"{r.r:.2f} [{r.low:.2f}, {r.high:.2f}]"
        lines.append(
            f"{named(row):>6} {row['attribution']:6.2f} {span:>14} {row['attribution_io']:6.2f} {path:>7} "
            f"{row['copy']:5.2f}{row['copy_negative']:6.2f} {row['copy_own']:6.2f}{row['copy_own_negative']:6.2f} "
            f"{row['copy_own_control']:8.2f} {row['attention_io']:6.2f}"
            f"{row['attention_s']:6.2f}  {correlation:<21} {r.p_within_layers:>11.4f}  {row['role']}"
        )
    if facts["does_the_task"]:
        of_roles = [f"  {kind}: {', '.join(some)}" for kind, some in facts["roles"].items() if some]
        lines += ["\nroles of all heads:", *(of_roles or ["  none"])]
    if facts["does_the_task"]:
        lines.append(
            "\ncopy score of   attribution of   heads that copy   of them name movers   raise both   heads that write against S"
        )
        lines += [
            f"{row['copy_score']:>13}   {row['share_of_logit_diff']:>14.0%}   {row['copy']:>15}   {row['name_mover']:>19}   "
            f"{row['raises_both_names']:>10}   {row['writes_against_S']:>26}"
            for row in facts["by_threshold"]
        ]
    lines.append(
        "\nwhere they look (mean attention)\n  head  from  " + "".join(f"{place:>9}" for place in facts["places"])
    )
    lines += [
        f"{layer:>4}.{head} {query:>6} "
        + "".join(f"{value:9.2f}" for value in found.looks[number, :, layer, head].mean(-1))
        for layer, head in shown
        for number, query in enumerate(QUERIES)
    ]
    return "\n".join(lines)


def evidence(facts: dict[str, Any], heads: Rows) -> px.runs.Evidence:
    """The largest attribution of a name mover, or of any head if there is none, beside what the head copies of other names."""
    movers = facts["roles"]["name mover"]
    row = next((row for row in heads if named(row) in movers), heads[0])
    which = "the only name mover" if len(movers) == 1 else f"the largest of {len(movers)} name movers"
    effect = (
        f"{named(row)}, {which}," if movers else f"no name mover; {named(row)}, the largest of all {len(heads)} heads,"
    )
    effect += " adds to the logit difference"
    path = ""
    if "path_effect" in row:
        path = f"; path patching {row['path_effect']:.2f} [{row['path_effect_low']:.2f}, {row['path_effect_high']:.2f}]"
    control = f"copies its own name {row['copy_own']:.2f}, another of the prompt {row['copy_own_control']:.2f}{path}"
    adds = px.Interval(*(row[f"attribution{end}"] for end in ("", "_low", "_high")))
    return px.runs.Evidence(f"{facts['n']} prompts", effect, adds, control, "a larger --limit or --dataset")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))

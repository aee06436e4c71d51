"""Roles of heads for names, from attention, what they write, copying and direct effects together.

found = name_measures(model, names, prompts, corrupt)          # names of `find_names`
correlations = name_correlations(found, names)                 # by head and kind of name
role({"copy_own": 0.9, ...}, whole)                            # "name mover"

Thresholds of roles, and why:

    COPIES   0.5   of the copy score from the head's own input. The paper's name movers are above 0.95 and its average head is
                   below 0.2, so that anything between would do for GPT-2; in smaller models name movers reach down to 0.58
                   (SmolLM2-135M), and heads that look at no name, but write it, up to 0.4 (Gemma 3 270M). The score after
                   block 0 is reported but not used: in Gemma 3 it is 0.02 for the head that moves names.
    LOOKS    0.1   of the attention from END, on the name that the role is about. A head that looks at nothing in particular
                   gives each of a prompt's 13 to 35 tokens less than that; the heads with roles that were found in five models,
                   shipped and pretrained, give 0.15 or more. A head that does not look at a name cannot move it, whatever it
                   writes.
    MATTERS  0.02  of the mean logit difference that a head adds or takes away: below that it is one of many.

Roles at other thresholds are counted (`count_roles`), which shows what depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int
from transformers import PreTrainedModel

from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.heads.copying import copy_ranks, copy_scores
from pyvene_ext.methods.heads.lens import direct_logit_attribution
from pyvene_ext.methods.heads.name_movers import Names, attention_to, copied_names, head_projections, named_places
from pyvene_ext.methods.patching.patch import all_paths, patch
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.stats.controls import Head
from pyvene_ext.stats.correlations import Correlation, correlate_heads
from pyvene_ext.stats.intervals import bootstrap_mean
from pyvene_ext.stats.tables import interval_columns

COPIES, LOOKS, MATTERS = 0.5, 0.1, 0.02
OTHER_COPIES, OTHER_MATTERS = (0.5, 0.8, 0.95), (0.01, 0.02, 0.05)
ROLES = (
    "name mover",
    "negative name mover",
    "writes against S",
    "moves the wrong name",
    "raises both names",
    "copies to no effect",
)


@dataclass(frozen=True)
class NameMeasures:
    """What every head does with the names of every prompt.

    Attributes:
        attention: from END to each kind of name (`Names.kinds`).
        projection: of what the head writes at END on the name's unembedding.
        looks: attention from END and END-1 to each group of tokens (`named_places`).
        copy_ranks: as `copying.copy_ranks` returns them, for the names of `copied_names`.
        attribution: direct logit attribution to logit(IO) - logit(S).
        attribution_io: direct logit attribution to logit(IO).
        path_effect: how much logit(IO) - logit(S) drops if the path from the head to the logits is patched; None without
            corrupt texts.
        logit_diff: the model's logit(IO) - logit(S).
        logit_diff_before_cap: the same before a soft-cap, to which attributions sum.
    """

    attention: Float[np.ndarray, "kind layer head prompt"]
    projection: Float[np.ndarray, "kind layer head prompt"]
    looks: Float[np.ndarray, "query place layer head prompt"]
    copy_ranks: Int[np.ndarray, "input sign asked layer head place prompt"]
    attribution: Float[np.ndarray, "layer head prompt"]
    attribution_io: Float[np.ndarray, "layer head prompt"]
    path_effect: Float[np.ndarray, "layer head prompt"] | None
    logit_diff: Float[np.ndarray, " prompt"]
    logit_diff_before_cap: Float[np.ndarray, " prompt"]


def name_measures(
    model: PreTrainedModel,
    names: Names,
    prompts: TokenizedPrompts,
    corrupt: TokenizedPrompts | None = None,
    *,
    fold_norm: bool = False,
    batch_size: int = 8,
    progress: bool = True,
) -> NameMeasures:
    """Measure attention, projections, copying and direct effects of every head.

    Args:
        model: with a card, and attention patterns that can be read (eager or sdpa).
        names: of the prompts.
        prompts: `names.prompts` as tokens.
        corrupt: their corrupt texts, for the path effect.
        fold_norm: fold the final norm into the projection.
        batch_size: prompts per forward pass.
        progress: show bars.

    Returns:
        The measures of every head and prompt.

    Raises:
        ValueError: for whatever one of the methods refuses.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    kinds, tokens_at = len(names.kinds), named_places(names, prompts)[1]
    groups = [[*named, *all_of] for named, all_of in zip(names.tokens, tokens_at, strict=True)]
    looks = attention_to(model, prompts, groups, **options)
    split = direct_logit_attribution(model, prompts, **options)
    path_effect = None
    if corrupt is not None:
        paths = [
            path for path in all_paths(model.config, ("logits",), positions="last") if path.sender_node.site == "z"
        ]
        path_effect = patch(model, paths, prompts, corrupt, **options).delta.reshape(split.logit.heads.shape)
    return NameMeasures(
        attention=looks[0, :kinds],
        projection=head_projections(model, prompts, names.ids, fold_norm=fold_norm, **options),
        looks=looks[:, kinds:],
        copy_ranks=copy_ranks(model, prompts, *copied_names(names), **options),
        attribution=split.logit_diff.heads,
        attribution_io=split.logit.heads,
        path_effect=path_effect,
        logit_diff=split.logit_diff.capped,
        logit_diff_before_cap=split.logit_diff.total,
    )


def pooled_correlation(found: NameMeasures, names: Names, head: Head, seed: int = 0, resamples: int = 1) -> Correlation:
    """Correlate a head's attention to all names, each once, with what it writes in their direction.

    Permutations stay within a kind of name (`correlate_heads`).

    Args:
        found: the measures.
        names: of the same prompts.
        head: (layer, head).
        seed: of the resampling.
        resamples: number of resamples.

    Returns:
        The correlation over prompts and kinds.
    """
    kinds = list(names.whole)
    return correlate_heads(found.attention[kinds, *head], found.projection[kinds, *head], seed, resamples)


def name_correlations(found: NameMeasures, names: Names) -> dict[Head, dict[str, Correlation]]:
    """Correlate attention to names with what is written in their direction, without intervals.

    Args:
        found: the measures.
        names: of the same prompts.

    Returns:
        By head, the correlation for each kind of name and "pooled".
    """
    return {
        head: {
            kind: correlate_heads(found.attention[number, *head][None], found.projection[number, *head][None], 0, 1)
            for number, kind in enumerate(names.kinds)
        }
        | {"pooled": pooled_correlation(found, names, head)}
        for head in np.ndindex(found.attribution.shape[:2])
    }


def role(row: Mapping[str, Any], whole: float | None, copies: float = COPIES, matters: float = MATTERS) -> str:
    """Classify a head by its copy scores, where it looks, and its direct effect together.

    Args:
        row: the head's "copy_own", "copy_own_negative", "attention_io", "attention_s"; "attribution", "attribution_io" and
            "attribution_s", and, if it was measured, "path_effect", with their intervals NAME_low and NAME_high.
        whole: the sum of all attributions; None if the model does not do the task.
        copies: the lowest copy score that counts.
        matters: the lowest attribution that counts, as a share of `whole`.

    Returns:
        One of `ROLES`; "" if the head does not copy, has no clear role, or the model does not do the task.
    """
    if whole is None or max(row["copy_own"], row["copy_own_negative"]) < copies:
        return ""
    positive = row["copy_own"] >= row["copy_own_negative"]
    enough = matters * whole
    above = row["attribution"] >= enough and row["attribution_low"] > 0 and row.get("path_effect_low", 1) > 0
    below = row["attribution"] <= -enough and row["attribution_high"] < 0 and row.get("path_effect_high", -1) < 0
    io, s = (row[f"attention_{name}"] >= LOOKS for name in ("io", "s"))
    at_io = row["attention_io"] > row["attention_s"]
    if positive and above and io:
        return "name mover"
    if positive and below and s:
        return "moves the wrong name"
    if not positive and below and at_io and io:
        return "negative name mover"
    if not positive and above and not at_io and s:
        return "writes against S"
    if above or below:
        return ""
    both = all(row[name] >= enough and row[f"{name}_low"] > 0 for name in ("attribution_io", "attribution_s"))
    return "raises both names" if positive and both and io and s else "copies to no effect"


def name_table(
    found: NameMeasures,
    names: Names,
    correlations: Mapping[Head, Mapping[str, Correlation]],
    whole: float | None,
    *,
    top: int,
    seed: int,
    resamples: int,
) -> list[dict[str, Any]]:
    """Join copy scores, correlations, attention and direct effects of every head, and name its role.

    Args:
        found: the measures.
        names: of the same prompts.
        correlations: of `name_correlations`.
        whole: as for `role`.
        top: a name counts as copied if it is among this many top tokens.
        seed: of the intervals.
        resamples: of each interval.

    Returns:
        One row per head, the largest attribution first.
    """
    scores: Float64[np.ndarray, "input sign asked layer head"] = copy_scores(found.copy_ranks, top)
    measures = {
        "attribution": found.attribution,
        "path_effect": found.path_effect,
        "attribution_io": found.attribution_io,
        "attribution_s": found.attribution_io - found.attribution,
    }
    rows = []
    for layer, head in np.ndindex(found.attribution.shape[:2]):
        row: dict[str, Any] = {"layer": layer, "head": head, "role": ""}
        for measure, values in measures.items():
            if values is not None:
                draws = rng(seed, "bootstrap", measure, layer, head)
                row |= interval_columns(measure, bootstrap_mean(values[layer, head], draws, resamples))
        for which, variant in enumerate(("", "_embed", "_own")):
            for minus, sign in enumerate(("", "_negative")):
                row[f"copy{variant}{sign}"] = float(scores[which, minus, 0, layer, head])
        for which, variant in ((0, ""), (2, "_own")):
            for minus, sign in enumerate(("", "_negative")):
                row[f"copy{variant}{sign}_control"] = float(scores[which, minus, 1, layer, head])
        for number, kind in enumerate(names.kinds):
            row[f"attention_{kind}"] = float(found.attention[number, layer, head].mean())
        for kind, correlation in correlations[layer, head].items():
            row |= {f"r_{kind}": correlation.pearson.r, f"p_{kind}": correlation.pearson.p}
        row["role"] = role(row, whole)
        rows.append(row)
    return sorted(rows, key=lambda row: -abs(row["attribution"]))


def count_roles(heads: Sequence[Mapping[str, Any]], whole: float | None) -> list[dict[str, Any]]:
    """Count the heads that copy, and those with each role, at several thresholds.

    Args:
        heads: the rows of all heads, as for `role`.
        whole: as for `role`.

    Returns:
        One row per pair of thresholds.
    """
    return [
        {
            "copy_score": copies,
            "share_of_logit_diff": matters,
            "copy": sum(row["copy_own"] >= copies for row in heads),
            **{
                kind.replace(" ", "_"): sum(role(row, whole, copies, matters) == kind for row in heads)
                for kind in ROLES
            },
        }
        for copies in OTHER_COPIES
        for matters in OTHER_MATTERS
    ]

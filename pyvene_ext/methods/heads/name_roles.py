"""What heads do with names, joined: attention and what is written, copying, direct effects; and the roles that follow.

found = name_measures(model, names, prompts, corrupt)          # names of `find_names`
correlations = name_correlations(found, names)                 # by head and kind of name
role({"copy": 0.9, ...}, whole)                                # "name mover"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from pyvene_ext.methods.heads.copying import copy_ranks
from pyvene_ext.methods.heads.lens import direct_logit_attribution
from pyvene_ext.methods.heads.name_movers import Names, attention_to, copied_names, head_projections, named_places
from pyvene_ext.methods.patching.patch import all_paths, patch
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.stats.controls import Head
from pyvene_ext.stats.correlations import Correlation, correlate_heads

COPIES, MATTERS = 0.5, 0.02  # copy score; share of the mean logit difference
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
        looks: from END and END-1 to each group of tokens (`named_places`).
        copy_ranks: of `copying.copy_ranks`, for the names of `copied_names`.
        attribution: to logit(IO) - logit(S).
        attribution_io: to logit(IO) alone.
        path_effect: how much logit(IO) - logit(S) drops if the path from the head to the logits is patched; None without
            corrupt texts.
        logit_diff: of the model.
        logit_diff_before_cap: the same before a soft-cap, which attributions sum to.
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
        model: with a card, and attention that can be seen.
        names: of the prompts.
        prompts: `names.prompts` as tokens.
        corrupt: their corrupt texts, for the path effect.
        fold_norm: fold the final norm into the projection.
        batch_size: prompts a forward pass.
        progress: show bars.

    Returns:
        The measures, by kind of name where they have one.

    Raises:
        ValueError: what the single methods refuse.
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
    """Correlate a head's attention to all names, each once, with what it writes towards them.

    The kinds of names are the rows, within which permutations stay (`correlate_heads`).
    """
    kinds = list(names.whole)
    return correlate_heads(found.attention[kinds, *head], found.projection[kinds, *head], seed, resamples)


def name_correlations(found: NameMeasures, names: Names) -> dict[Head, dict[str, Correlation]]:
    """Correlate attention with what is written, by head, for each kind of name and "pooled"; without intervals."""
    return {
        head: {
            kind: correlate_heads(found.attention[number, *head][None], found.projection[number, *head][None], 0, 1)
            for number, kind in enumerate(names.kinds)
        }
        | {"pooled": pooled_correlation(found, names, head)}
        for head in np.ndindex(found.attribution.shape[:2])
    }


def role(row: Mapping[str, Any], whole: float | None, copies: float = COPIES, matters: float = MATTERS) -> str:
    """What a head is by its copy scores and its direct effect together; the studies' table of roles says how.

    Args:
        row: of the head: "copy", "copy_negative", "attention_io", "attention_s"; "attribution", "attribution_io" and
            "attribution_s", and, if it was measured, "path_effect", with their intervals NAME_low and NAME_high.
        whole: what all attributions sum to; None where the model does not do the task.
        copies: the least copy score.
        matters: the least attribution, as a share of `whole`.

    Returns:
        One of `ROLES`; "" if it copies nothing, or there is nothing to do.
    """
    if whole is None or max(row["copy"], row["copy_negative"]) < copies:
        return ""
    positive = row["copy"] >= row["copy_negative"]
    enough = matters * whole
    above = row["attribution"] >= enough and row["attribution_low"] > 0 and row.get("path_effect_low", 1) > 0
    below = row["attribution"] <= -enough and row["attribution_high"] < 0 and row.get("path_effect_high", -1) < 0
    at_io = row["attention_io"] > row["attention_s"]
    if positive and above:
        return "name mover"
    if positive and below:
        return "moves the wrong name"
    if not positive and below and at_io:
        return "negative name mover"
    if not positive and above and not at_io:
        return "writes against S"
    if above or below:
        return ""
    both = all(row[name] >= enough and row[f"{name}_low"] > 0 for name in ("attribution_io", "attribution_s"))
    return "raises both names" if positive and both else "copies to no effect"


def count_roles(heads: Sequence[Mapping[str, Any]], whole: float | None) -> list[dict[str, Any]]:
    """How many heads copy, and how many have each role, at several thresholds: a row for each two of them."""
    return [
        {
            "copy_score": copies,
            "share_of_logit_diff": matters,
            "copy": sum(row["copy"] >= copies for row in heads),
            **{
                kind.replace(" ", "_"): sum(role(row, whole, copies, matters) == kind for row in heads)
                for kind in ROLES
            },
        }
        for copies in OTHER_COPIES
        for matters in OTHER_MATTERS
    ]

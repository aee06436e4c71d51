"""Files and evidence of the lag study: those of one setting, which is a kind of ablation and a choice of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from pyvene_ext.methods.heads.lag import LagCurves, Layers, Mode, RankedHeads, plus_one_bias
from pyvene_ext.methods.heads.lag_tables import lag_table
from pyvene_ext.runs.facts import Evidence
from pyvene_ext.runs.figures import lag_curves
from pyvene_ext.runs.folder import RunFolder
from pyvene_ext.stats.intervals import Interval
from pyvene_ext.stats.tables import filled

Type = Literal["induction", "random"]
LagSetting = tuple[Mode, Layers]
ENOUGH = 19  # random sets, with which p can be 0.05


def write_setting(
    run: RunFolder,
    names: tuple[str, str],
    setting: LagSetting,
    head_type: Type,
    heads: RankedHeads,
    found: Sequence[LagCurves],
    clean: Float[np.ndarray, "permutation lag"],
    table: list[dict[str, Any]],
) -> None:
    """Write tables, arrays, heads and figures of one setting.

    Args:
        run: the folder.
        names: how files begin, and the model's name.
        setting: mode and choice of layers.
        head_type: what is ablated: the heads with the highest scores beside random ones, or those alone.
        heads: the rankings.
        found: the curves, by number of heads.
        clean: the curves of the untouched model.
        table: the rows of the summary.
    """
    (stem, model), (mode, layers) = names, setting

    def name(kind: Type, n: int | None = None) -> str:
        return f"{stem}{'' if n is None else f'_abl{n}'}_{mode}_{kind}_{layers}"

    title = f"{model}, {head_type} heads, {mode}, {layers} layers"
    for at in found:
        chosen: dict[Type, Any] = {"random": heads.random_sets(at.n).sets, "induction": heads.ranked[: at.n]}
        curves: dict[Type, np.ndarray] = {"induction": at.own} if head_type == "induction" else {}
        if len(at.random):
            curves["random"] = at.random.mean(0)
            run.array(f"arrays/{name('random', at.n)}_bias", plus_one_bias(at.random).astype(np.float32))
        for kind, own in curves.items():
            run.table(f"tables/{name(kind, at.n)}", lag_table(own))
            run.array(f"arrays/{name(kind, at.n)}", own.astype(np.float32))
            record = {"head_type": kind, "layer_abl": layers, "mode": mode, "heads": chosen[kind]}
            run.json(f"heads/{name(kind, at.n)}", record)
        run.figure(name(head_type, at.n), lag_curves([at], at.random, title, clean))
    run.figure(name(head_type), lag_curves(found, found[-1].random, title, clean))
    run.table(f"tables/{name(head_type)}_summary", filled(table))  # no heads have no random ones


def lag_evidence(
    sample: str, head_type: Type, tables: Mapping[LagSetting, Sequence[Mapping[str, Any]]]
) -> list[Evidence]:
    """The changes of both measures, with the fewest heads that have random sets enough for a p of 0.05.

    Args:
        sample: how much was run: "40 permutations of 20 tokens".
        head_type: what is ablated.
        tables: the rows of the summary, by setting.

    Returns:
        Two for each setting.
    """
    found = []
    for (mode, layers), rows in tables.items():
        row = next((row for row in rows if row.get("random sets", 0) >= ENOUGH), rows[-1])
        for name, prefix in (("the bias of p to lag +1", ""), ("lag-CRP(+1)", "crp ")):
            control = "none"
            if "random change" in row:
                control = f"{row['control']}; they change it by {row[f'random {prefix}change']:.3g} on average"
            if "share as low" in row:
                control += f", p = {row[f'{prefix}share as low']:.2g}"
            ends = (row[f"{prefix}change{end}"] for end in ("", " low", " high"))
            effect = f"{row['heads']} {head_type} heads ({mode}, {layers} layers) change {name} by"
            found.append(Evidence(sample, effect, Interval(*ends), control, "more --permutations"))
    return found

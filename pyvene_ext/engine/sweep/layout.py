"""How a wave is laid out: which rows it has, where each enters the network, and what is edited where.

A row is one spec on one prompt. It enters at the first block it changes, behind everything it leaves alone, and carries the
columns from the first one it edits; all else is the clean run's. Rows of the same prompts and the same first column form a
`Group`, which visits every layer once and grows by that layer's rows.

Where all prompts of a group begin with the same tokens and are edited there in the same way, that part is run once for all of
them: a group of its own, the trunk, gives the others their earlier keys and values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np

from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.prompts.positions import Positions
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.joint import OneSpec, Spec, members

Stage = Literal["resid_pre", "q", "k", "v", "scores", "pattern", "z", "attn_out", "resid_mid", "mlp_in", "mlp_out"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # as a block computes them
INTO_ATTENTION: tuple[Stage, ...] = ("q", "k", "v", "scores", "pattern", "z")  # of rows whose attention runs
WHOLE, MID, LATE = range(3)  # where a row enters a block: before it, behind its attention, behind its MLP
ENTRY = {
    **dict.fromkeys(("resid_pre", "q", "k", "v", "scores", "pattern"), WHOLE),
    **dict.fromkeys(("z", "attn_out", "resid_mid", "mlp_in"), MID),
    "mlp_out": LATE,
}
WORTH_SHARING = 8  # columns; a shorter trunk saves less than another call of every block costs


class Edit(NamedTuple):
    """One spec where the engine makes its edit: what leaves a block enters the next, and layer n_layers is after the last."""

    layer: int
    stage: Stage
    spec: OneSpec

    @property
    def place(self) -> tuple[int, int]:
        """The layer, and where a row that this edit is the first of enters it."""
        return self.layer, ENTRY[self.stage]


def edits_of(spec: Spec, layers: int) -> list[Edit]:
    """The edits of a spec in the order in which the network comes to them."""
    found = []
    for order, edit in enumerate(members(spec)):
        layer, stage, first = edit.layer or 0, edit.acts_at, int(edit.acts_at == edit.site)
        if edit.site in ("resid_post", "embed"):
            layer, stage, first = layer + (edit.site == "resid_post"), "resid_pre", 0
        found.append(((layer, STAGES.index(stage), first, order), Edit(layer, stage, edit)))  # type: ignore[arg-type]
    return [edit for _, edit in sorted(found, key=lambda pair: pair[0])]


@dataclass
class EditBatch:
    """The edits by one intervention at one stage of one layer: entry i is at row `rows[i]`, column `columns[i]`, head `heads[i]`.

    Entries are ordered by row. `sources` say what comes in place, in the same order: a spec, the prompts, and which of their
    positions are kept. (Sites without heads have -1 for one.)
    """

    intervention: type
    round: int = 0  # how many edits of the same place, by the same specs, come before
    sources: list[tuple[OneSpec, list[int], np.ndarray | None]] = field(default_factory=list)
    _rows: list[np.ndarray] = field(default_factory=list)
    _columns: list[np.ndarray] = field(default_factory=list)
    _heads: list[np.ndarray] = field(default_factory=list)

    def add(
        self,
        rows: np.ndarray,
        columns: np.ndarray,
        specs: list[OneSpec],
        prompts: list[int],
        kept: np.ndarray | None,
    ) -> None:
        """Add specs of equally many heads at the same places: `rows` is [spec prompt], `columns` [prompt pos]."""
        heads = np.array([spec.heads or (-1,) for spec in specs])
        shape = *rows.shape, columns.shape[1], heads.shape[1]
        self._rows.append(np.broadcast_to(rows[:, :, None, None], shape).ravel())
        self._columns.append(np.broadcast_to(columns[:, :, None], shape).ravel())
        self._heads.append(np.broadcast_to(heads[:, None, None], shape).ravel())
        self.sources += [(spec, prompts, kept) for spec in specs]

    @cached_property
    def rows(self) -> np.ndarray:
        return np.concatenate(self._rows)

    @cached_property
    def columns(self) -> np.ndarray:
        return np.concatenate(self._columns)

    @cached_property
    def heads(self) -> np.ndarray:
        return np.concatenate(self._heads)


@dataclass
class Group:
    """Some prompts under some specs, run on the same columns; row i is spec i // len(prompts).

    Attributes:
        start, stop: the columns, from the first edited one on; those of a trunk end before the prompts differ.
        prompts, specs: as indices into the wave's; specs in the order in which they enter.
        bounds: for each layer, and once more behind the last, how many rows there are before it, and with those that enter it
            whole, in the middle, and late.
        edits: by layer and stage.
        trunk, trunk_rows: the group that these rows continue, if any, and which of its rows each spec is.
    """

    start: int
    stop: int
    prompts: np.ndarray
    specs: np.ndarray
    bounds: list[tuple[int, int, int, int]]
    edits: dict[tuple[int, Stage], list[EditBatch]]
    trunk: Group | None = None
    trunk_rows: np.ndarray | None = None

    def token_layers(self, length: int) -> int:
        """How many times a token goes through a block, of which the last one runs the last token of a prompt alone."""
        of_last = self.bounds[-2][-1] if self.stop == length else 0
        return sum(at[-1] for at in self.bounds[:-2]) * (self.stop - self.start) + of_last


@dataclass(frozen=True)
class Wave:
    """Some specs on some prompts of one length, as indices into the sweep's: what is computed, kept and resumed as one."""

    prompts: tuple[int, ...]
    specs: tuple[int, ...]


def shared_columns(which: Sequence[int], prompts: TokenizedPrompts) -> int:
    """How many columns several prompts of one length have in common from the first on, if worth sharing, else 0."""
    if len(which) < 2:
        return 0
    first, last = min(prompts.input_ids[i] for i in which), max(prompts.input_ids[i] for i in which)
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=True)) if a != b), len(first))
    common = min(common, len(first) - 1)  # the last token's column is every row's own
    return common if common >= WORTH_SHARING else 0


def wave_groups(wave: Wave, edits: Sequence[list[Edit]], resolved: Resolved, layers: int) -> list[Group]:
    """Lay out a wave of specs whose edits are these; trunks come before the groups that continue them."""
    at = Columns(wave.prompts, resolved, layers)
    shared = shared_columns(wave.prompts, resolved.prompts)
    entering: dict[tuple[int, int, tuple[int, ...], int], list[_Entering]] = defaultdict(list)
    for number, spec in enumerate(wave.specs):
        placed = at.placed(edits[spec])
        for (start, layer, entry), mine in at.entries(placed).items():
            if len(mine) > 1 and shared - start >= WORTH_SHARING and _alike(placed, mine, shared):
                trunk, branch = _cut(placed, mine, 0, shared), _cut(placed, mine, shared, at.length)
                places = [edit.place for edit, _ in trunk]
                entering[start, shared, (int(mine[0]),), -1].append(_Entering(*min(places), number, trunk))
                # What is edited before a row's own columns reaches them through keys and values: a layer later, if not at once.
                places = [(at, WHOLE) if at_entry == WHOLE else (at + 1, WHOLE) for at, at_entry in places]
                places += [edit.place for edit, _ in branch]
                entering[shared, at.length, tuple(mine.tolist()), start].append(_Entering(*min(places), number, branch))
            else:
                entering[start, at.length, tuple(mine.tolist()), -1].append(_Entering(layer, entry, number, placed))
    groups: dict[tuple, Group] = {}
    for key, rows in sorted(entering.items(), key=lambda item: (item[0][3] >= 0, item[0])):
        start, stop, which, trunk_start = key
        groups[key] = group = _group(start, stop, np.array(which), sorted(rows, key=lambda row: row[:2]), wave, layers)
        if trunk_start >= 0:
            group.trunk = next(g for k, g in groups.items() if k == (trunk_start, start, which[:1], -1))
            row_of = {int(spec): row for row, spec in enumerate(group.trunk.specs)}
            group.trunk_rows = np.array([row_of[int(spec)] for spec in group.specs])
    return list(groups.values())


def _alike(placed: list[_Placed], mine: np.ndarray, shared: int) -> bool:
    """Whether all of these prompts are edited in the same way before the column `shared`."""
    for edit, places in placed:
        before = np.minimum(places.columns[mine], shared)
        if (before < shared).any() and (not edit.spec.same_for_all or (before != before[0]).any()):
            return False
    return True


def _cut(placed: list[_Placed], mine: np.ndarray, start: int, stop: int) -> list[_Placed]:
    """What is edited in the columns `[start, stop)`, of the prompts `mine`, which are alike before and behind them."""
    found = []
    for edit, (columns, kept, alive) in placed:
        inside = np.flatnonzero((start <= columns[mine[0]]) & (columns[mine[0]] < stop))
        if inside.size:
            own = np.broadcast_to(inside, (len(columns), inside.size)) if kept is None else kept[:, inside]
            found.append((edit, Places(columns[:, inside], own, alive)))
    return found


def _group(start: int, stop: int, mine: np.ndarray, entering: list[_Entering], wave: Wave, layers: int) -> Group:
    """Number the rows in the order in which they enter, all prompts of a spec together, and collect their edits."""
    counts = np.zeros((layers + 1, 3), int)
    # Runs of edits with equally many heads at the same places: the number of the first row's spec and the edit, for each of them.
    runs: dict[tuple[int, Stage, int, str], list[tuple[Places, int, list[tuple[int, OneSpec]]]]] = defaultdict(list)
    interventions: dict[str, type] = {}
    for number, (layer, entry, _, placed) in enumerate(entering):
        counts[layer, entry] += len(mine)
        rounds: dict[tuple[int, Stage], int] = defaultdict(int)  # edits of one place by one spec, one after the other
        for edit, places in placed:
            key, spec, intervention = (edit.layer, edit.stage), edit.spec, edit.spec.intervention
            interventions[intervention.__name__] = intervention
            of_batch, heads = runs[*key, rounds[key], intervention.__name__], len(spec.heads or ())
            if not of_batch or of_batch[-1][0] is not places or of_batch[-1][1] != heads:
                of_batch.append((places, heads, []))
            of_batch[-1][2].append((number, spec))
            rounds[key] += 1
    edits: dict[tuple[int, Stage], list[EditBatch]] = defaultdict(list)
    for (layer, stage, round_, name), of_batch in sorted(runs.items(), key=lambda item: item[0]):
        batch = EditBatch(interventions[name], round_)
        for (columns, kept, alive), _, run in of_batch:
            own = alive[mine]
            if own.any():
                which, numbers = mine[own], np.array([number for number, _ in run])
                rows = numbers[:, None] * len(mine) + np.flatnonzero(own)
                ids = [wave.prompts[i] for i in which]
                batch.add(rows, columns[which], [spec for _, spec in run], ids, None if kept is None else kept[which])
        if batch.sources:
            edits[layer, stage].append(batch)
    ends = counts.ravel().cumsum().reshape(counts.shape)
    bounds = [(int(at[-1] - n.sum()), *map(int, at)) for at, n in zip(ends, counts, strict=True)]
    specs = np.array([row.spec for row in entering])
    return Group(start, stop, mine, specs, bounds, dict(edits))  # type: ignore[arg-type]


class _Entering(NamedTuple):
    """A spec of a wave on its way into a group."""

    layer: int
    entry: int
    spec: int
    placed: list[_Placed]


class Places(NamedTuple):
    """Where an edit is made on the prompts of a wave: `columns[prompt pos]`, which of the spec's positions they are (None:
    all), and on which prompts it can change anything. One object serves all edits at these places.
    """

    columns: np.ndarray
    kept: np.ndarray | None
    alive: np.ndarray


_Placed = tuple[Edit, Places]


class Columns:
    """Where specs edit some prompts of one length."""

    def __init__(self, which: Sequence[int], resolved: Resolved, layers: int) -> None:
        self.which, self.resolved, self.layers = which, resolved, layers
        self.length = len(resolved.prompts.input_ids[which[0]])
        self._places: dict[tuple[Positions, bool], tuple[Places, list[tuple[int, np.ndarray]]]] = {}

    def placed(self, edits: list[Edit]) -> list[_Placed]:
        """Every edit of a spec; behind the last block's keys and values only those of the last token, which the metric reads."""
        return [(edit, self._at(edit)[0]) for edit in edits]

    def entries(self, placed: list[_Placed]) -> dict[tuple[int, int, int], np.ndarray]:
        """The prompts by (first column, layer, place of entry); prompts on which nothing can change are left out."""
        if len(placed) == 1:  # nearly always
            edit, _ = placed[0]
            return {(start, *edit.place): mine for start, mine in self._at(edit)[1]}
        found: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for prompt in range(len(self.which)):
            mine = [(edit, places) for edit, places in placed if places.alive[prompt]]
            if mine:
                start = min(int(places.columns[prompt].min()) for _, places in mine)
                found[start, *min(edit.place for edit, _ in mine)].append(prompt)
        return {key: np.array(rows) for key, rows in found.items()}

    def _at(self, edit: Edit) -> tuple[Places, list[tuple[int, np.ndarray]]]:
        """An edit's places, and the prompts by the first of their columns; the same for all edits at one position."""
        reaches_others = edit.stage in ("resid_pre", "k", "v")  # through keys and values
        only_last = edit.layer == self.layers or (edit.layer == self.layers - 1 and not reaches_others)
        key = edit.spec.positions, only_last
        if key not in self._places:
            columns = np.array(self.resolved.tokens_of(edit.spec, self.which))
            places = Places(columns, None, np.ones(len(columns), bool))
            if only_last:
                last = columns == self.length - 1
                kept = last.argmax(1)[:, None]
                places = Places(np.full_like(kept, self.length - 1), kept, last.any(1))
            starts = places.columns.min(1)
            alive = np.unique(starts[places.alive])
            self._places[key] = places, [(int(s), np.flatnonzero(places.alive & (starts == s))) for s in alive]
        return self._places[key]

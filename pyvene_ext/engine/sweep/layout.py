"""How a wave is laid out: which rows it has, where each enters the network, and what is edited where.

A row is one spec on one prompt. It enters at the first block that it changes, at the latest point that precedes its first edit,
and carries the columns from the first edited one on; everything else is taken from the clean run. Rows of the same prompts and
the same first column form a `Group`, which runs through every layer once and grows by the rows that enter there.

In the sweep engine "prompt" means a sequence that is run (`engine.sequences`): a prompt, or a prompt followed by an answer.

Where all prompts of a group share a prefix and are edited there in the same way, the prefix runs once for all of them, in a group
of its own that provides the keys and values of their earlier columns.
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
INSIDE_ATTENTION: tuple[Stage, ...] = ("q", "k", "v", "scores", "pattern", "z")  # for rows whose attention is run
BEFORE_ATTENTION, AFTER_ATTENTION, AFTER_MLP = range(3)  # where in a block a row can enter
ENTRY_POINT = {
    **dict.fromkeys(("resid_pre", "q", "k", "v", "scores", "pattern"), BEFORE_ATTENTION),
    **dict.fromkeys(("z", "attn_out", "resid_mid", "mlp_in"), AFTER_ATTENTION),
    "mlp_out": AFTER_MLP,
}
MIN_SHARED = 8  # columns; a shorter prefix saves less than the extra call of every block costs


class StagedEdit(NamedTuple):
    """One edit where the sweep makes it.

    Attributes:
        layer: what leaves a block is edited where it enters the next; layer n_layers is after the last block.
        stage: where in the block.
        spec: the edit.
    """

    layer: int
    stage: Stage
    spec: OneSpec

    @property
    def entry(self) -> tuple[int, int]:
        """The layer and entry point of a row whose first edit this is."""
        return self.layer, ENTRY_POINT[self.stage]


def edits_of(spec: Spec, layers: int) -> list[StagedEdit]:
    """Order a spec's edits as a forward pass reaches them.

    Args:
        spec: a single or joint spec.
        layers: number of blocks of the model.

    Returns:
        The edits, each with its layer and stage.
    """
    found = []
    for order, edit in enumerate(members(spec)):
        layer, stage, first = edit.layer or 0, edit.acts_at, int(edit.acts_at == edit.site)
        if edit.site in ("resid_post", "embed"):
            layer, stage, first = layer + (edit.site == "resid_post"), "resid_pre", 0
        found.append(((layer, STAGES.index(stage), first, order), StagedEdit(layer, stage, edit)))  # type: ignore[arg-type]
    return [edit for _, edit in sorted(found, key=lambda pair: pair[0])]


@dataclass
class EditBatch:
    """The edits of one intervention class at one stage of one layer, flattened to entries ordered by row.

    Attributes:
        intervention: the class of the pyvene intervention.
        order: how many earlier edits at this stage the same specs have.
        sources: where replacements come from, in the order of the entries: a spec, its prompts, and which of their positions are
            kept, [prompt pos] (None: all).
    """

    intervention: type
    order: int = 0
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
        kept: np.ndarray,
    ) -> None:
        """Add specs that have equally many heads and edit the same columns.

        Args:
            rows: of the group, [spec prompt].
            columns: [prompt pos].
            specs: the edits.
            prompts: the prompts, as indices into the sweep's.
            kept: at which of these columns, [prompt pos].
        """
        heads = np.array([spec.heads or (-1,) for spec in specs])
        prompt, pos = np.nonzero(kept)
        shape = len(specs), len(prompt), heads.shape[1]
        self._rows.append(np.broadcast_to(rows[:, prompt, None], shape).ravel())
        self._columns.append(np.broadcast_to(columns[prompt, pos, None], shape).ravel())
        self._heads.append(np.broadcast_to(heads[:, None], shape).ravel())
        self.sources += [(spec, prompts, None if kept.all() else kept) for spec in specs]

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of every entry."""
        return np.concatenate(self._rows)

    @cached_property
    def columns(self) -> np.ndarray:
        """The column of every entry."""
        return np.concatenate(self._columns)

    @cached_property
    def heads(self) -> np.ndarray:
        """The head of every entry, -1 for sites without heads."""
        return np.concatenate(self._heads)


@dataclass
class Group:
    """Rows that run on the same columns: some specs on some prompts; row i has spec i // len(prompts).

    Attributes:
        start: the first column, which is the first edited one.
        stop: one after the last column; a prefix group ends before the prompts differ.
        prompts: as indices into the wave's.
        specs: as indices into the wave's, in the order in which they enter.
        bounds: for each layer, and once more after the last, four cumulative row counts: entered in earlier layers, and with
            those that enter this one before attention, after attention, and after the MLP.
        edits: by layer and stage.
        prefix: the group that computes the keys and values of these rows' earlier columns; None: they are the clean run's.
        prefix_rows: the prefix group's row for each spec.
    """

    start: int
    stop: int
    prompts: np.ndarray
    specs: np.ndarray
    bounds: list[tuple[int, int, int, int]]
    edits: dict[tuple[int, Stage], list[EditBatch]]
    prefix: Group | None = None
    prefix_rows: np.ndarray | None = None

    def token_layers(self, first_read: int) -> int:
        """Count how many times a token goes through a block; the last block runs only the columns that are read.

        Args:
            first_read: the first of these columns.

        Returns:
            The number of tokens, summed over layers.
        """
        last_block = self.bounds[-2][-1] * max(0, self.stop - max(self.start, first_read))
        return sum(counts[-1] for counts in self.bounds[:-2]) * (self.stop - self.start) + last_block


@dataclass(frozen=True)
class Wave:
    """Some specs on some prompts of one length and read from one column on: the unit that is computed, saved and resumed.

    Attributes:
        prompts: indices into the sweep's prompts.
        specs: indices into the sweep's specs.
    """

    prompts: tuple[int, ...]
    specs: tuple[int, ...]


def shared_columns(which: Sequence[int], prompts: TokenizedPrompts) -> int:
    """Length of the prefix that several prompts of one length share.

    Args:
        which: indices of the prompts.
        prompts: all prompts.

    Returns:
        Number of columns; 0 where the prefix is too short to be worth a group of its own.
    """
    if len(which) < 2:
        return 0
    first, last = min(prompts.input_ids[i] for i in which), max(prompts.input_ids[i] for i in which)
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=True)) if a != b), len(first))
    common = min(common, len(first) - 1)  # every row has its own last column
    return common if common >= MIN_SHARED else 0


def wave_groups(wave: Wave, edits: Sequence[list[StagedEdit]], resolved: Resolved, layers: int) -> list[Group]:
    """Lay out a wave.

    Args:
        wave: some specs on some prompts.
        edits: of every spec of the sweep (`edits_of`).
        resolved: the specs on all prompts of the sweep.
        layers: number of blocks of the model.

    Returns:
        The groups; prefix groups come before those that continue them.
    """
    locator = EditLocator(wave.prompts, resolved, layers)
    begins_with = np.array([resolved.sequences.prompt_of[prompt] for prompt in wave.prompts])
    shared, length = shared_columns(wave.prompts, resolved.sequences.prompts), locator.length
    # By first column, end, prompts and the prefix group's first column (-1: none).
    members_of: dict[tuple[int, int, tuple[int, ...], int], list[_GroupMember]] = defaultdict(list)
    for number, spec in enumerate(wave.specs):
        located = locator.locate(edits[spec])
        for (start, layer, entry), prompts in locator.entry_points(located).items():
            everyone = tuple(prompts.tolist())
            worthwhile = len(prompts) > 1 and shared - start >= MIN_SHARED
            if worthwhile and _edited_alike(located, prompts, begins_with[prompts], shared):
                in_prefix = _within_columns(located, prompts, 0, shared)
                in_suffix = _within_columns(located, prompts, shared, length)
                entries = [edit.entry for edit, _ in in_prefix]
                members_of[start, shared, everyone[:1], -1].append(_GroupMember(*min(entries), number, in_prefix))
                # Edits of the prefix reach the suffix through keys and values: in the same layer if they come before its
                # attention, else in the next.
                entries = [(at + (point != BEFORE_ATTENTION), BEFORE_ATTENTION) for at, point in entries]
                entries += [edit.entry for edit, _ in in_suffix]
                members_of[shared, length, everyone, start].append(_GroupMember(*min(entries), number, in_suffix))
            else:
                members_of[start, length, everyone, -1].append(_GroupMember(layer, entry, number, located))
    groups: dict[tuple, Group] = {}
    for key, specs in sorted(members_of.items(), key=lambda item: (item[0][3] >= 0, item[0])):
        start, stop, which, prefix_start = key
        specs = sorted(specs, key=lambda member: member[:2])
        groups[key] = group = _build_group(start, stop, np.array(which), specs, wave, layers)
        if prefix_start >= 0:
            group.prefix = next(g for k, g in groups.items() if k == (prefix_start, start, which[:1], -1))
            row_of = {int(spec): row for row, spec in enumerate(group.prefix.specs)}
            group.prefix_rows = np.array([row_of[int(spec)] for spec in group.specs])
    return list(groups.values())


def _edited_alike(located: list[LocatedEdit], prompts: np.ndarray, begins_with: np.ndarray, shared: int) -> bool:
    """Whether these prompts are all edited in the same way before column `shared`."""
    same = (begins_with == begins_with[0]).all()  # one prompt with several answers, which gets the same replacements
    for edit, places in located:
        inside = places.within(0, shared)[prompts]
        before = np.where(inside, places.columns[prompts], shared)
        if inside.any() and (not (same or edit.spec.same_for_all) or (before != before[0]).any()):
            return False
    return True


def _within_columns(located: list[LocatedEdit], prompts: np.ndarray, start: int, stop: int) -> list[LocatedEdit]:
    """Restrict edits to the columns `[start, stop)`."""
    inside = [(edit, EditColumns(places.columns, places.within(start, stop))) for edit, places in located]
    return [(edit, places) for edit, places in inside if places.kept[prompts].any()]


def _build_group(
    start: int, stop: int, prompts: np.ndarray, specs: list[_GroupMember], wave: Wave, layers: int
) -> Group:
    """Number the rows in the order in which they enter, all prompts of a spec together, and collect their edits."""
    counts = np.zeros((layers + 1, 3), int)
    # By layer, stage, order and intervention: runs of edits that share their columns and number of heads, each with its spec.
    runs: dict[tuple[int, Stage, int, str], list[tuple[EditColumns, int, list[tuple[int, OneSpec]]]]]
    runs = defaultdict(list)
    interventions: dict[str, type] = {}
    for number, (layer, entry, _, located) in enumerate(specs):
        counts[layer, entry] += len(prompts)
        earlier: dict[tuple[int, Stage], int] = defaultdict(int)  # edits of this spec at the same stage
        for edit, places in located:
            at, spec, intervention = (edit.layer, edit.stage), edit.spec, edit.spec.intervention
            interventions[intervention.__name__] = intervention
            here, heads = runs[*at, earlier[at], intervention.__name__], len(spec.heads or ())
            if not here or here[-1][0] is not places or here[-1][1] != heads:
                here.append((places, heads, []))
            here[-1][2].append((number, spec))
            earlier[at] += 1
    edits: dict[tuple[int, Stage], list[EditBatch]] = defaultdict(list)
    for (layer, stage, order, name), here in sorted(runs.items(), key=lambda item: item[0]):
        batch = EditBatch(interventions[name], order)
        for places, _, run in here:
            affected = places.effective[prompts]
            if affected.any():
                which, numbers = prompts[affected], np.array([number for number, _ in run])
                rows = numbers[:, None] * len(prompts) + np.flatnonzero(affected)
                ids = [wave.prompts[i] for i in which]
                batch.add(rows, places.columns[which], [spec for _, spec in run], ids, places.kept[which])
        if batch.sources:
            edits[layer, stage].append(batch)
    ends = counts.ravel().cumsum().reshape(counts.shape)
    bounds = [(int(end[-1] - n.sum()), *map(int, end)) for end, n in zip(ends, counts, strict=True)]
    in_order = np.array([member.spec for member in specs])
    return Group(start, stop, prompts, in_order, bounds, dict(edits))  # type: ignore[arg-type]


class _GroupMember(NamedTuple):
    """A spec (as an index into the wave's) that runs in a group, where it enters, and its edits there."""

    layer: int
    entry: int
    spec: int
    located: list[LocatedEdit]


@dataclass(frozen=True, eq=False)
class EditColumns:
    """Where an edit is made on the prompts of a wave; one object is shared by all edits of the same columns.

    Attributes:
        columns: of the spec's positions, [prompt pos].
        kept: at which of them the edit can change what is read; it is made there alone, [prompt pos].
    """

    columns: np.ndarray
    kept: np.ndarray

    @cached_property
    def effective(self) -> np.ndarray:
        """On which prompts the edit is made, [prompt]."""
        return np.asarray(self.kept.any(1))

    def within(self, start: int, stop: int) -> np.ndarray:
        """At which of the spec's positions the edit is made in the columns `[start, stop)`, [prompt pos]."""
        return self.kept & (start <= self.columns) & (self.columns < stop)


LocatedEdit = tuple[StagedEdit, EditColumns]


class EditLocator:
    """Finds the columns that specs edit on some prompts of one length."""

    def __init__(self, which: Sequence[int], resolved: Resolved, layers: int) -> None:
        self.which, self.resolved, self.layers = which, resolved, layers
        sequences = resolved.sequences
        self.length, self.first_read = len(sequences.prompts.input_ids[which[0]]), sequences.first_read[which[0]]
        self._cache: dict[tuple[Positions, bool], tuple[EditColumns, list[tuple[int, np.ndarray]]]] = {}

    def locate(self, edits: list[StagedEdit]) -> list[LocatedEdit]:
        """Find the columns of a spec's edits.

        After the keys and values of the last block only the columns that are read count.

        Args:
            edits: of one spec.

        Returns:
            The edits with their columns.
        """
        return [(edit, self._columns(edit)[0]) for edit in edits]

    def entry_points(self, located: list[LocatedEdit]) -> dict[tuple[int, int, int], np.ndarray]:
        """Group the prompts by where a spec's rows enter.

        Args:
            located: the edits of one spec.

        Returns:
            Prompts by first column, layer and entry point; without those on which no edit can change the metric.
        """
        if len(located) == 1:  # nearly always
            edit, _ = located[0]
            return {(start, *edit.entry): prompts for start, prompts in self._columns(edit)[1]}
        found: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for prompt in range(len(self.which)):
            effective = [(edit, places) for edit, places in located if places.effective[prompt]]
            if effective:
                start = min(int(places.columns[prompt, places.kept[prompt]].min()) for _, places in effective)
                found[start, *min(edit.entry for edit, _ in effective)].append(prompt)
        return {key: np.array(prompts) for key, prompts in found.items()}

    def _columns(self, edit: StagedEdit) -> tuple[EditColumns, list[tuple[int, np.ndarray]]]:
        """An edit's columns, and the prompts by the first of them; cached by positions."""
        reaches_others = edit.stage in ("resid_pre", "k", "v")  # through keys and values
        only_read = edit.layer == self.layers or (edit.layer == self.layers - 1 and not reaches_others)
        key = edit.spec.positions, only_read
        if key not in self._cache:
            columns = np.array(self.resolved.tokens_of(edit.spec, self.which))
            kept = columns >= self.first_read if only_read else np.ones(columns.shape, bool)
            places, starts = EditColumns(columns, kept), np.where(kept, columns, self.length).min(1)
            found = np.unique(starts[places.effective])
            self._cache[key] = places, [(int(start), np.flatnonzero(starts == start)) for start in found]
        return self._cache[key]

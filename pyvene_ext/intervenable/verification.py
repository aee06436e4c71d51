"""Verify a card: compare every component of a model with plain torch hooks that are independent of the card.

    report = verify_card(model, layers="all")
    print(report.table())

For each component, unit, layer, padding side and attention implementation three things are checked on a batch of unequal lengths,
at different positions and heads in each example: the activation that is read, the outputs after zeroing it, and the outputs after
swapping in another prompt's. The expected values come from `intervenable.truth`: out-of-place hooks on modules found by their
usual names in transformers, and attention written out. It shares no code with the cards, the taps or pyvene. Finally the model
must be bit-identical to what it was.

A minute is enough for all of it on a small model. On a larger one each component is first checked once, at a layer, padding side
and implementation that change from one to the next, then at another, and so on; the report says how far this came.

Some edits of a trained model amplify rounding: zeroing a sink of attention can turn 1e-7 into 1e-4. A difference beyond the
tolerance is no failure if it is at most ten times what the same edited run changes by when the input of every block is multiplied
by 1 + eps x noise; the report counts these.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pyvene import (
    CollectIntervention,
    IntervenableConfig,
    RepresentationConfig,
    VanillaIntervention,
    ZeroIntervention,
)
from torch import Tensor

from modelcards import COMPONENTS, dimensions, find_card, n_layers
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.truth import Change, Truth, first_tensor
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.models.modes import evaluating

OPERATIONS: dict[str, type] = {"read": CollectIntervention, "zero": ZeroIntervention, "swap": VanillaIntervention}
LENGTHS = (9, 6, 8)
DRAWS, SAFETY = 3, 10.0  # draws of noise, and how much larger than its effect a difference due to rounding may be


@dataclass
class Row:
    """One line of the table: a component with one unit.

    Attributes:
        component: pyvene's name of the component.
        unit: "pos", "h" or "h.pos".
        checks: the number of comparisons.
        failures: the number that failed.
        by_rounding: the number of differences that exceed the tolerance and that rounding explains.
        largest_error: the largest difference, relative where values exceed 1.
        effect: the largest change of an output by an edit.
        first_failure: what failed first, and where.
    """

    component: str
    unit: str
    checks: int = 0
    failures: int = 0
    by_rounding: int = 0
    largest_error: float = 0.0
    effect: float = 0.0
    first_failure: str = ""


@dataclass
class Report:
    """The result of `verify_card`.

    Attributes:
        model: the model's class.
        family: the card's family.
        rows: one row per component and unit.
        problems: failures that belong to no row.
        planned: the number of comparisons there are; more than `checks` if there was no time for all.
        unreached: components that were not checked at all.
    """

    model: str
    family: str
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    planned: int = 0
    unreached: list[str] = field(default_factory=list)

    @property
    def checks(self) -> int:
        """The number of comparisons."""
        return sum(row.checks for row in self.rows)

    @property
    def failures(self) -> int:
        """The number of comparisons that failed, plus other problems."""
        return sum(row.failures for row in self.rows) + len(self.problems)

    def table(self) -> str:
        """Format the rows as text, failures last."""
        lines = [f"{'component':<30}{'unit':<8}{'checks':>7}{'failed':>8}{'largest error':>15}"]
        for row in self.rows:
            lines.append(f"{row.component:<30}{row.unit:<8}{row.checks:>7}{row.failures:>8}{row.largest_error:>15.1e}")
        lines.append(
            f"{self.model} ({self.family}): {self.checks} checks, {self.failures} failures, "
            f"largest error {max((row.largest_error for row in self.rows), default=0.0):.1e}"
        )
        if self.checks < self.planned:
            reached = f"not reached: {', '.join(self.unreached)}" if self.unreached else "every component at least once"
            lines.append(f"  in the time given {self.checks} of {self.planned} checks, {reached}; --thorough makes all")
        if rounding := sum(row.by_rounding for row in self.rows):
            lines.append(
                f"  {rounding} differences exceed the tolerance and are due to rounding, which the edit amplifies"
            )
        lines += [f"  {row.component}, unit {row.unit}: {row.first_failure}" for row in self.rows if row.failures]
        return "\n".join(lines + [f"  {problem}" for problem in self.problems])


def verify_card(
    model: Any,
    layers: Sequence[int] | Literal["all", "ends"] = "ends",
    implementations: Sequence[str] = ("eager", "sdpa"),
    padding_sides: Sequence[str] = ("left", "right"),
    tolerance: float = 1e-5,
    progress: bool = False,
    sites: Sequence[str] | None = None,
    seconds: float | None = None,
) -> Report:
    """Check every component of `model`'s card against independent hooks.

    Args:
        model: a transformers model with a card, any of its classes; in float32, which the tolerance is meant for.
        layers: which layers; "ends" is the first, the middle and the last.
        implementations: attention implementations to run under; unsupported ones are skipped.
        padding_sides: "left", "right" or both.
        tolerance: largest difference allowed, relative to the largest value if that exceeds 1.
        progress: show a progress bar.
        sites: which sites or components, in either vocabulary; None for all.
        seconds: begin no check after this time; by default all are made. Every component comes before any comes again.

    Returns:
        A `Report`; `.failures` is 0 for a correct card. An error raised by a check counts as a failure.

    Raises:
        ValueError: the model has no card, or no such layer or site.
    """
    card = find_card(model)
    if card is None:
        raise ValueError(
            f"{type(model).__name__} has no model card, so that there is nothing to verify: IntervenableModel runs it as "
            "pyvene's own mappings describe it."
        )
    report = Report(type(model).__name__, card.family)
    rows: dict[tuple[str, str], Row] = {}
    count = n_layers(model.config)
    if isinstance(layers, str):
        layers = range(count) if layers == "all" else sorted({0, count // 2, count - 1})
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(f"there is no layer {outside[0]}: {type(model).__name__} has layers 0 to {count - 1}.")
    wanted = card.mapping(type(model)) if sites is None else {card.component(model, site).name for site in sites}
    components = sorted(wanted, key=list(COMPONENTS).index)
    own_implementation = model.config._attn_implementation
    supported = [name for name in implementations if name == "eager" or model._supports_sdpa]
    visits = _visits(components, list(itertools.product(supported, padding_sides)), list(layers))
    report.planned = len(OPERATIONS) * sum(len(COMPONENTS[component].units) for component, *_ in visits)
    bar = progress_bar(1.0, "run", shown=progress, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}")
    with evaluating(model), bar:
        before = _fingerprint(model)
        batches = {side: (_batch(model, side, seed=1), _batch(model, side, seed=2)) for side in padding_sides}
        truth, start = Truth(model), time.monotonic()
        clean = {side: truth.run(base) for side, (base, _) in batches.items()}
        try:
            for done, (component, implementation, side, layer) in enumerate(visits):
                elapsed = time.monotonic() - start
                if seconds is not None and elapsed >= seconds:
                    break
                bar.set_description(f"{component}, layer {layer}", refresh=False)
                bar.update(max(done / len(visits), elapsed / seconds if seconds else 0.0) - bar.n)
                model.config._attn_implementation_internal = implementation
                where = f"layer {layer}, {implementation}, {side} padding"
                _check_component(model, truth, component, layer, batches[side], clean[side], tolerance, rows, where)
            else:
                bar.update(1.0 - bar.n)
        finally:
            model.config._attn_implementation_internal = own_implementation
        changed = _fingerprint(model) != before
    report.rows = sorted(rows.values(), key=lambda row: list(COMPONENTS).index(row.component))
    report.unreached = [
        component for component in components if component not in {row.component for row in report.rows}
    ]
    effect: dict[str, float] = defaultdict(float)
    for row in report.rows:
        effect[row.component] = max(effect[row.component], row.effect)
    report.problems += [f"{name}: no edit had any effect" for name, size in effect.items() if size < tolerance]
    if not report.checks:
        report.problems.append(
            "nothing was checked: name a layer, a padding side and an implementation that the model supports"
        )
    if changed:
        report.problems.append("the checks changed the model: its hooks, modules, flags or outputs differ")
    return report


def _visits(
    components: Sequence[str], settings: Sequence[tuple[str, str]], layers: Sequence[int]
) -> list[tuple[str, str, str, int]]:
    """Component, implementation, padding side and layer of all checks, each component once before any comes again."""
    places = {
        component: [
            (*setting, layer) for layer in (layers if COMPONENTS[component].per_layer else (0,)) for setting in settings
        ]
        for component in components
    }
    return [
        (component, *places[component][(turn + shift) % len(places[component])])
        for turn in range(max(map(len, places.values()), default=0))
        for shift, component in enumerate(components)
        if turn < len(places[component])
    ]


def _check_component(
    model: Any,
    truth: Truth,
    component: str,
    layer: int,
    batches: tuple[dict[str, Tensor], dict[str, Tensor]],
    clean: Tensor,
    tolerance: float,
    rows: dict[tuple[str, str], Row],
    where: str,
) -> None:
    base, source = batches
    activations = {"base": truth.read(base, component, layer), "source": truth.read(source, component, layer)}
    for unit in COMPONENTS[component].units:
        row = rows.setdefault((component, unit), Row(component, unit))
        base_at, source_at = _places(model, component, unit, base, 0), _places(model, component, unit, source, 1)
        for operation, kind in OPERATIONS.items():
            row.checks += 1
            try:
                config = IntervenableConfig([RepresentationConfig(layer, component, unit, 1, intervention_type=kind)])
                intervenable = IntervenableModel(config, model)
                with torch.no_grad():
                    if operation == "swap":
                        collected, found = intervenable(
                            base, [source], {"sources->base": ([source_at.locations], [base_at.locations])}
                        )
                    else:
                        collected, found = intervenable(base, unit_locations={"base": [base_at.locations]})
                # What was read, or nothing, and the outputs.
                outcome = [_real(first_tensor(found), base)]
                if operation == "read":
                    edit: Change = _unchanged
                    outcome.append(base_at.real(collected[1][0], base))
                    expected = [_real(clean, base), base_at.real(base_at.take(activations["base"]), base)]
                else:
                    edit = partial(base_at.put, source_at.take(activations["source"]) if operation == "swap" else None)
                    expected = [_real(truth.run(base, component, layer, edit), base)]
                    row.effect = max(row.effect, float((expected[0] - _real(clean, base)).abs().max()))
                error = max(map(_difference, outcome, expected))
                if error > tolerance:
                    rounding = _rounding(model, truth, component, layer, base, base_at, edit, expected)
                    if error <= SAFETY * rounding:
                        row.by_rounding += 1
                        row.largest_error = max(row.largest_error, error)
                        continue
            except Exception as exception:  # report every failure, not only the first
                row.failures += 1
                row.first_failure = (
                    row.first_failure or f"{operation}, {where}: {type(exception).__name__}: {exception}"
                )
                continue
            row.largest_error = max(row.largest_error, error)
            if not error <= tolerance:
                row.failures += 1
                row.first_failure = row.first_failure or f"{operation}, {where}: off by {error:.1e}"


def _rounding(
    model: Any,
    truth: Truth,
    component: str,
    layer: int,
    base: dict[str, Tensor],
    base_at: _UnitLocations,
    edit: Change,
    expected: Sequence[Tensor],
) -> float:
    """How far the expected outputs, and the activation if there are two, move when rounding is imitated by noise."""
    generator = torch.Generator(device=model.device)
    eps = torch.finfo(model.dtype).eps

    def noise(x: Tensor) -> Tensor:
        return x * (
            1 + eps * torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32).to(x.dtype)
        )

    everywhere = [("block_input", block, noise) for block in range(n_layers(model.config))]
    largest = 0.0
    for seed in range(DRAWS):
        generator.manual_seed(seed)
        seen: list[Tensor] = []

        def look(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.clone())
            return edit(x)

        moved = [_real(truth.run_with(base, [*everywhere, (component, layer, look)]), base)]
        moved.append(base_at.real(base_at.take(seen[-1]), base))
        largest = max(largest, *map(_difference, moved[: len(expected)], expected))
    return largest


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class _UnitLocations:
    """Different locations in every example, as pyvene takes them and as plain indices."""

    unit: str
    heads: list[list[int]]
    columns: list[list[int]]
    negative: list[list[int]]

    @property
    def locations(self) -> list[Any]:
        if self.unit == "h.pos":
            return [self.heads, self.negative]
        return self.heads if self.unit == "h" else self.negative

    def take(self, x: Tensor) -> Tensor:
        """`batch n ...` from `batch pos d` or `batch head pos d`."""
        rows = []
        for example in range(x.shape[0]):
            here = x[example]
            if "h" in self.unit:
                here = torch.stack([here[head] for head in self.heads[example]])
                here = here[:, self.columns[example]] if self.unit == "h.pos" else here
            else:
                here = here[self.columns[example]]
            rows.append(here)
        return torch.stack(rows)

    def real(self, taken: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Zero the padded positions of what `take` returns: attention implementations differ there."""
        if self.unit != "h":
            return taken
        return taken.masked_fill(~batch["attention_mask"].bool()[:, None, :, None], 0.0)

    def put(self, new: Tensor | None, x: Tensor) -> Tensor:
        """A copy of `x` with `new` (zeros if None) at the locations."""
        x = x.clone()
        for example in range(x.shape[0]):
            if self.unit == "pos":
                x[example, self.columns[example]] = 0.0 if new is None else new[example]
                continue
            for index, head in enumerate(self.heads[example]):
                columns = self.columns[example] if self.unit == "h.pos" else slice(None)
                x[example, head, columns] = 0.0 if new is None else new[example, index]
        return x


def _places(model: Any, component: str, unit: str, batch: dict[str, Tensor], shift: int) -> _UnitLocations:
    heads: list[list[int]] = []
    named = COMPONENTS[component].heads
    if named:
        count = dimensions(model.config)[named]
        heads = [sorted({(i + shift) % count, (i + shift + 1) % count}) for i in range(len(LENGTHS))]
    negative = [[-1 - (i + shift) % 3, -3 - (i + shift) % 2] for i in range(len(LENGTHS))]
    negative = [row if row[0] != row[1] else [row[0], row[0] - 1] for row in negative]
    columns = [
        [int(mask.nonzero()[position]) for position in row]
        for mask, row in zip(batch["attention_mask"], negative, strict=True)
    ]
    return _UnitLocations(unit, heads, columns, negative)


def _batch(model: Any, side: str, seed: int) -> dict[str, Tensor]:
    """Random tokens in three prompts, whose lengths differ but not between seeds, so that real tokens swap with real ones."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, pad = model.config.vocab_size, model.config.pad_token_id or 0
    ids = torch.full((len(LENGTHS), max(LENGTHS)), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        columns = slice(max(LENGTHS) - length, None) if side == "left" else slice(0, length)
        ids[row, columns] = torch.randint(vocabulary, (length,), generator=generator)
        mask[row, columns] = 1
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    return {name: value.to(model.device) for name, value in batch.items()}


def _real(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Outputs without padded positions; a classifier has one row per example and no padding."""
    return output[batch["attention_mask"].bool()] if output.ndim == 3 else output


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative where values exceed 1; masked scores (-inf) must be masked in both."""
    if found.shape != expected.shape:
        raise ValueError(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    found, expected = (x.float().nan_to_num(nan=torch.nan, neginf=-1e9) for x in (found, expected))
    error = (found - expected).abs().max() / expected[expected > -1e9].abs().max().clamp(min=1.0)
    return float(error) if not torch.isnan(error) else float("inf")


def _fingerprint(model: Any) -> tuple[Any, ...]:
    """Everything that a run must not change."""
    with torch.no_grad():
        output = first_tensor(model(**_batch(model, "left", seed=3)))
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for name, module in model.named_modules()
    ]
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    configs = [id(module.config) for module in model.modules() if hasattr(module, "config")]
    return output.float().cpu().numpy().tobytes(), hooks, flags, configs, model.config._attn_implementation

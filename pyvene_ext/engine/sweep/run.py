"""`sweep` and `plan_sweep`: checks, the store, work shared by processes, progress."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from pyvene_ext.engine.measure import Metric, MetricLike, check_metric, first_tokens_note
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.engine.results import Result
from pyvene_ext.engine.sequences import answers_measured
from pyvene_ext.engine.sweep.execute import Executor
from pyvene_ext.engine.sweep.plan import (
    Budget,
    Plan,
    default_budget,
    make_plan,
)
from pyvene_ext.engine.sweep.store import Store
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.bars import note, progress_bar
from pyvene_ext.io.errors import counted
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.models.devices import (
    all_gather,
    broadcast_from_main,
    no_gradients,
    on_all_ranks,
    processes,
)
from pyvene_ext.models.identity import model_facts
from pyvene_ext.models.latent_steps import refuse_latent_steps
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.files import to_plain
from pyvene_ext.specs.joint import (
    OneSpec,
    Spec,
)


def plan_sweep(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    reference: Reference | None = None,
    *,
    memory: int | None = None,
    subset: Sequence[int] | None = None,
) -> Plan:
    """Plan what `sweep` would do with the same arguments; everything is checked and nothing is run.

    Args:
        model: as for `sweep`.
        specs: as for `sweep`.
        prompts: as for `sweep`.
        metric: as for `sweep`.
        reference: as for `sweep`.
        memory: as for `sweep`.
        subset: as for `sweep`.

    Returns:
        The plan; its `summary()` is what `sweep` shows.

    Raises:
        ValueError: for whatever `sweep` refuses.
    """
    metric = check_metric(model, prompts, metric, per_token=True, of_answers=True)
    resolved = resolve(specs, model, prompts, reference=reference, directions={})
    return plan_resolved(resolved, metric, memory=memory, subset=subset)


def plan_resolved(
    resolved: Resolved, metric: Metric, *, memory: int | None = None, subset: Sequence[int] | None = None
) -> Plan:
    """Plan a sweep of specs that are already resolved.

    Args:
        resolved: the specs on the prompts.
        metric: the metric, checked (`check_metric`).
        memory: as for `sweep`.
        subset: as for `sweep`.

    Returns:
        The plan.

    Raises:
        ValueError: the model takes latent steps on these prompts, the subset is not valid, or the memory does not suffice.
    """
    refuse_latent_steps(resolved.model, resolved.prompts.input_ids)
    resolved = resolved.for_metric(metric)
    sequences = resolved.sequences
    columns = max(
        len(ids) - first for ids, first in zip(sequences.prompts.input_ids, sequences.first_read, strict=True)
    )
    budget = default_budget(resolved.model, memory, columns)
    return make_plan(resolved, _checked_subset(subset, resolved.prompts), budget)


def sweep(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    reference: Reference | None = None,
    *,
    memory: int | None = None,
    store: str | Path | None = None,
    subset: Sequence[int] | None = None,
    compile: bool = False,
    progress: bool = True,
) -> Result:
    """Run every spec on every prompt and read one metric, with the numbers of `run`.

    A metric that says which token ids it reads (`Metric.ids`, and so logit_diff and logit) costs little: only these rows of the
    unembedding are used.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        specs: one edit, or a list of edits and of tuples of them (made jointly).
        prompts: the prompts that are intervened on.
        metric: as for `pyvene_ext.engine.plain.run`.
        reference: statistics that replacements are computed from; by default those of `prompts`, where they are needed.
        memory: working memory in bytes besides the weights; by default half of what the weights take (on one device, if they are
            spread over several), at least 256 MiB. More makes larger batches, which are faster on a GPU.
        store: a folder in which finished batches are saved. The same call resumes where an earlier one stopped; a folder that
            belongs to other specs, prompts, weights or metric is refused, and so is one that another process is writing to. A
            metric of your own needs a name: `Metric(function, name="...")`.
            Batches stay those of the first call, so that the result is the same to the last bit.
        subset: indices of the prompts to run, the columns of the result. Reference set and donors remain those of all prompts.
        compile: let torch.compile fuse the MLPs, for a model on one device. It takes a minute, so only long sweeps gain.
        progress: show the plan and a bar.

    Returns:
        The metric by intervention and prompt, with and without the intervention.

    Raises:
        ValueError: before the model runs, for what `run` refuses, for latent steps, too little memory, or a store of another run.
    """
    metric = check_metric(model, prompts, metric, per_token=True, of_answers=True)
    resolved = resolve(specs, model, prompts, reference=reference, directions={})
    plan = plan_resolved(resolved, metric, memory=memory, subset=subset)
    return sweep_resolved(resolved, metric, plan, store=store, compile=compile, progress=progress)


def sweep_resolved(
    resolved: Resolved,
    metric: Metric,
    plan: Plan,
    *,
    store: str | Path | None = None,
    compile: bool = False,
    progress: bool = True,
) -> Result:
    """Run a sweep that is already resolved and planned; missing statistics are computed.

    Args:
        resolved: the specs on the prompts.
        metric: the metric, checked (`check_metric`).
        plan: of these specs.
        store: as for `sweep`.
        compile: as for `sweep`.
        progress: as for `sweep`.

    Returns:
        The metric by intervention and prompt, with and without the intervention.

    Raises:
        ValueError: the store belongs to another run or is in use, or `compile` is set for a model on several devices.
    """
    model, specs, which = resolved.model, resolved.specs, list(plan.subset)
    if compile and getattr(model, "hf_device_map", None):
        raise ValueError("compile is for a model on one device; this one is spread over several (hf_device_map).")
    group = processes()
    said = first_tokens_note(metric, resolved.prompts.take(which))
    progress = progress and group.is_main_process
    with ExitStack() as stack:
        kept: Store | None = None
        finished: dict[int, dict[str, np.ndarray]] = {}
        if store is not None:
            facts = store_facts(resolved, metric, which) | ({"compiled": True} if compile else {})
            kept = held = stack.enter_context(open_shared_store(store, facts, _plan_record(plan)))
            # Read before any process adds a wave, and by one process, so that all divide the same remaining waves.
            whole, remembered, finished = broadcast_from_main(lambda: (held.result, held.plan, held.finished))
            if whole is not None:
                return Result(resolved.names, metric.label, whole["clean"], whole["intervened"], specs=specs, note=said)
            if remembered != _plan_record(plan):
                plan = make_plan(plan.resolved, which, Budget(**remembered["budget"]))
            if remembered != _plan_record(plan):
                raise ValueError(f"{store} was begun by a version that cut the work differently; delete the folder.")
        note(plan.summary(), shown=progress, in_notebooks=False)
        resolved = resolved.for_metric(metric).with_statistics(progress=progress)
        mine = [number for number in range(len(plan.waves)) if number not in finished]
        mine = mine[group.process_index :: group.num_processes]
        engine = Executor(resolved, metric, plan)
        started = time.monotonic()
        made: list[tuple[int, dict[str, np.ndarray]]] = []
        with (
            evaluating(model),
            no_gradients(model),
            ExitStack() as compiled,
            SweepBar(plan, mine, "sweep", progress) as bar,
        ):
            if compile:
                compiled.enter_context(engine.replay.compiled_mlps())
            for number in mine:
                clean, intervened = engine.run(plan.waves[number], bar.advance)
                made.append((number, {"clean": clean, "intervened": intervened}))
                bar.finish(number)
                if kept is not None:
                    kept.add(*made[-1])
        everything = dict(wave for of_one in all_gather(made) for wave in of_one)
        result = _merge(plan, metric, finished | everything)
        if kept is not None and group.is_main_process:
            kept.complete(result)
        took = time.monotonic() - started
        size = f"{counted(len(specs), 'intervention')} x {counted(len(which), 'prompt')}"
        note(f"{size} in {took:.1f} s", shown=progress)
    return Result(resolved.names, metric.label, result["clean"], result["intervened"], specs=specs, note=said)


@contextmanager
def open_shared_store(folder: str | Path, facts: dict[str, Any], plan: dict[str, Any]) -> Iterator[Store]:
    """Open one store in all processes: the first one holds the lock, and an error in one is raised in all.

    Args:
        folder: as for `Store`.
        facts: as for `Store`.
        plan: as for `Store`.

    Yields:
        Store: this process's store.

    Raises:
        ValueError: as for `Store`, in all processes.
    """
    first = processes().is_main_process
    with ExitStack() as stack:
        held = on_all_ranks(lambda: stack.enter_context(Store(folder, facts, plan)) if first else None)
        yield on_all_ranks(lambda: held or stack.enter_context(Store(folder, facts, plan, member=True)))


def _plan_record(plan: Plan) -> dict[str, Any]:
    """What a store saves of a plan: its budget, and a hash of its waves."""
    return {"budget": asdict(plan.budget), "waves": data_hash([[wave.prompts, wave.specs] for wave in plan.waves])}


def _checked_subset(subset: Sequence[int] | None, prompts: TokenizedPrompts) -> list[int]:
    if subset is None:
        return list(range(len(prompts)))
    which = [int(one) if isinstance(one, np.integer) else one for one in subset] if isinstance(subset, Iterable) else []
    numbers = all(type(prompt) is int and 0 <= prompt < len(prompts) for prompt in which)
    if not numbers or not which or len(set(which)) < len(which):
        raise ValueError(f"subset must list one or more of the prompts by number, 0 to {len(prompts) - 1}, each once.")
    return which


def store_facts(resolved: Resolved, metric: Metric, which: Sequence[int]) -> dict[str, Any]:
    """Everything that the numbers of a sweep depend on, as JSON-able data for a `Store`.

    Args:
        resolved: the specs on the prompts.
        metric: the metric.
        which: indices of the prompts that are run.

    Returns:
        Hashes and settings by name.

    Raises:
        ValueError: the metric has no name.
    """
    model, sources = resolved.model, resolved.sources
    source = resolved.prompts if sources.source_prompts is None else sources.source_prompts
    facts = {
        **model_facts(model),
        "prompts": resolved.prompts.hash,
        "subset": data_hash(list(which)),
        "reference set": source.hash if resolved.needs.places else None,
        "specs": data_hash(to_plain(resolved.specs)),
        **metric.facts(),
    }
    if sources.recorded is not None:
        facts["reference set"] = sources.recorded.prompts_hash
    if sources.directions:
        facts["directions"] = data_hash(sorted((repr(at), x.tolist()) for at, x in sources.directions.items()))
    return facts


def _merge(plan: Plan, metric: Metric, waves: dict[int, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Assemble the arrays of the result from the waves'."""
    column = {prompt: place for place, prompt in enumerate(plan.columns)}
    of_prompt = max(arrays["clean"].shape[1:] for arrays in waves.values())  # (), or one number for each token
    clean = np.full((len(column), *of_prompt), np.nan, np.float32)
    intervened = np.full((len(plan.edits), len(column), *of_prompt), np.nan, np.float32)
    for wave, arrays in ((plan.waves[number], arrays) for number, arrays in sorted(waves.items())):
        columns = [column[prompt] for prompt in wave.prompts]
        pos: tuple[Any, ...] = tuple(slice(n) for n in arrays["clean"].shape[1:])
        clean[(columns, *pos)] = arrays["clean"]
        intervened[(*np.ix_(wave.specs, columns), *pos)] = arrays["intervened"]
    if metric.of_answers:
        counts = [len(plan.resolved.sequences.of_prompt[prompt]) for prompt in plan.subset]
        clean, intervened = (answers_measured(metric, values, counts) for values in (clean, intervened))
    return {"clean": clean, "intervened": intervened}


class SweepBar:
    """A progress bar that counts interventions on prompts and advances with the arithmetic done.

    Args:
        plan: of the sweep.
        waves: numbers of the waves that are run.
        desc: what is done.
        shown: False makes one that shows nothing.
    """

    def __init__(self, plan: Plan, waves: Sequence[int], desc: str, shown: bool) -> None:
        self._plan, self._done = plan, 0
        self._cells = {number: len(plan.waves[number].specs) * len(plan.waves[number].prompts) for number in waves}
        self._total = sum(self._cells.values())
        self._bar = progress_bar(self._total, "intervention", desc, shown=shown, unit_scale=True, smoothing=0.1)

    def advance(self, share: float) -> None:
        """Advance.

        Args:
            share: a number of interventions, estimated from the arithmetic done.
        """
        self._bar.update(min(share, self._total - self._bar.n))  # rounding must not take it past its end

    def finish(self, number: int) -> None:
        """Count a finished wave exactly, in place of the estimate.

        Args:
            number: the wave's.
        """
        self._done += self._cells[number]
        self._bar.update(self._done - self._bar.n)

    def __enter__(self) -> SweepBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

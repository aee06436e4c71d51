"""`sweep` and `plan_sweep`: checks, the store, several processes, progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from pyvene_ext.engine.plain import Result, check_metric
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.engine.sweep.execute import Executor
from pyvene_ext.engine.sweep.plan import (
    Budget,
    Plan,
    default_budget,
    make_plan,
)
from pyvene_ext.engine.sweep.store import Store
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.models.devices import (
    all_gather,
    broadcast_from_main,
    input_device,
    no_gradients,
    on_all_ranks,
    processes,
)
from pyvene_ext.models.identity import config_hash, weight_hash
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
    metric: str = "logit_diff",
    reference: Reference | None = None,
    *,
    memory: int | None = None,
    subset: Sequence[int] | None = None,
) -> Plan:
    """What `sweep` would do with the same arguments; everything is checked and nothing is run."""
    check_metric(model, prompts, metric, of_tokens=True)
    resolved = resolve(specs, model, prompts, reference=reference, directions={})
    return plan_resolved(resolved, memory=memory, subset=subset)


def plan_resolved(resolved: Resolved, *, memory: int | None = None, subset: Sequence[int] | None = None) -> Plan:
    """`plan_sweep` of what is resolved already; ValueError for latent steps, a bad subset and too little memory."""
    refuse_latent_steps(resolved.model, resolved.prompts.input_ids)
    return make_plan(resolved, _which(subset, resolved.prompts), default_budget(resolved.model, memory))


def sweep(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    metric: str = "logit_diff",
    reference: Reference | None = None,
    *,
    memory: int | None = None,
    store: str | Path | None = None,
    subset: Sequence[int] | None = None,
    compile: bool = False,
    progress: bool = True,
) -> Result:
    """Run every spec on every prompt and read one metric at each prompt's last token.

    Args:
        model, specs, prompts, metric, reference: as for `pyvene_ext.engine.plain.run`, whose numbers these are.
        memory: working memory in bytes besides the weights; by default half of what the weights take (on one device, if they are
            spread over several), at least 256 MiB. More makes larger batches, which a GPU likes.
        store: a folder in which finished batches are kept. The same call goes on where an earlier one stopped; a folder that
            belongs to other specs, prompts, weights or metric is refused, and so is one that another process is writing to.
            The batches of the first call are kept to, so that the result is the same to the last bit.
        subset: indices of the prompts to run, the columns of the result. Reference set and donors remain those of all prompts.
        compile: let torch.compile fuse the MLPs, of a model on one device. It takes a minute, and only long sweeps win by it.
        progress: show the plan, a bar, and where the results are.

    Raises ValueError, before the model runs, for what `run` refuses, too little memory, or a store of something else.
    """
    check_metric(model, prompts, metric, of_tokens=True)
    resolved = resolve(specs, model, prompts, reference=reference, directions={})
    plan = plan_resolved(resolved, memory=memory, subset=subset)
    return sweep_resolved(resolved, metric, plan, store=store, compile=compile, progress=progress)


def sweep_resolved(
    resolved: Resolved,
    metric: str,
    plan: Plan,
    *,
    store: str | Path | None = None,
    compile: bool = False,
    progress: bool = True,
) -> Result:
    """`sweep` of what is resolved and planned already; statistics that are needed and not there yet are computed."""
    model, specs, which = resolved.model, resolved.specs, list(plan.which)
    if compile and getattr(model, "hf_device_map", None):
        raise ValueError("compile is for a model on one device; this one is spread over several (hf_device_map).")
    group = processes()
    progress = progress and group.is_main_process
    with ExitStack() as stack:
        kept: Store | None = None
        finished: dict[int, dict[str, np.ndarray]] = {}
        if store is not None:
            facts = store_facts(resolved, metric, which) | ({"compiled": True} if compile else {})
            kept = held = stack.enter_context(open_together(store, facts, _remembered(plan)))
            # Read before anyone adds a wave, and by one process, so that all share out the same ones.
            whole, remembered, finished = broadcast_from_main(lambda: (held.result, held.plan, held.finished))
            if whole is not None:
                return Result(resolved.names, metric, **whole)
            if remembered != _remembered(plan):
                plan = make_plan(resolved, which, Budget(**remembered["budget"]))
            if remembered != _remembered(plan):
                raise ValueError(f"{store} was begun by a version that cut the work otherwise; delete the folder.")
        if progress:
            tqdm.write(plan.summary(), file=sys.stderr)
        resolved = resolved.with_statistics(progress=progress)
        mine = [number for number in range(len(plan.waves)) if number not in finished]
        mine = mine[group.process_index :: group.num_processes]
        engine = Executor(resolved, metric, plan)
        started = time.monotonic()
        made: list[tuple[int, dict[str, np.ndarray]]] = []
        with evaluating(model), no_gradients(model), ExitStack() as compiled, _Bar(plan, mine, progress) as bar:
            if compile:
                compiled.enter_context(engine.replay.compiled_mlps())
            for number in mine:
                clean, intervened = engine.run(plan.waves[number], bar.advance)
                made.append((number, {"clean": clean, "intervened": intervened}))
                bar.finish(number)
                if kept is not None:
                    kept.add(*made[-1])
        everything = dict(wave for of_one in all_gather(made) for wave in of_one)
        result = _merged(plan, finished | everything, which)
        if kept is not None and group.is_main_process:
            kept.complete(result)
        if progress:
            took = time.monotonic() - started
            where = "" if store is None else f"; kept in {store}"
            tqdm.write(f"{len(specs)} interventions x {len(which)} prompts in {took:.1f} s{where}", file=sys.stderr)
    return Result(resolved.names, metric, **result)


@contextmanager
def open_together(folder: str | Path, facts: dict[str, Any], plan: dict[str, Any]) -> Iterator[Store]:
    """The store of all processes: the first one holds it, and what stops one stops all."""
    first = processes().is_main_process
    with ExitStack() as stack:
        held = on_all_ranks(lambda: stack.enter_context(Store(folder, facts, plan)) if first else None)
        yield on_all_ranks(lambda: held or stack.enter_context(Store(folder, facts, plan, member=True)))


def _remembered(plan: Plan) -> dict[str, Any]:
    """What a store keeps of a plan: what it was made to fit, and what came out."""
    return {"budget": asdict(plan.budget), "waves": data_hash([[wave.prompts, wave.specs] for wave in plan.waves])}


def _which(subset: Sequence[int] | None, prompts: TokenizedPrompts) -> list[int]:
    if subset is None:
        return list(range(len(prompts)))
    which = np.asarray(subset).tolist()
    numbers = isinstance(which, list) and all(type(prompt) is int and 0 <= prompt < len(prompts) for prompt in which)
    if not numbers or not which or len(set(which)) < len(which):
        raise ValueError(
            f"subset names one or more of the prompts by their numbers, 0 to {len(prompts) - 1}, each once."
        )
    return which


def store_facts(resolved: Resolved, metric: str, which: Sequence[int]) -> dict[str, Any]:
    """What the numbers depend on."""
    model, sources = resolved.model, resolved.sources
    parameter = next(model.parameters())
    given = resolved.prompts if sources.source_prompts is None else sources.source_prompts
    facts = {
        "model weights": weight_hash(model),
        "model config": config_hash(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": input_device(model).type,
        "attention implementation": model.config._attn_implementation,
        "prompts": resolved.prompts.hash,
        "subset": data_hash(list(which)),
        "reference set": given.hash if resolved.needs.places else None,
        "specs": data_hash(to_plain(resolved.specs)),
        "metric": metric,
    }
    if sources.recorded is not None:
        facts["reference set"] = sources.recorded.prompts_hash
    if sources.directions:
        facts["directions"] = data_hash(sorted((repr(at), x.tolist()) for at, x in sources.directions.items()))
    return facts


def _merged(plan: Plan, waves: dict[int, dict[str, np.ndarray]], which: list[int]) -> dict[str, np.ndarray]:
    """The waves' values put where they belong."""
    column = {prompt: place for place, prompt in enumerate(which)}
    of_prompt = waves[0]["clean"].shape[1:]  # (), or one number for each token
    clean = np.empty((len(which), *of_prompt), np.float32)
    intervened = np.empty((len(plan.edits), len(which), *of_prompt), np.float32)
    for wave, arrays in ((plan.waves[number], arrays) for number, arrays in sorted(waves.items())):
        columns = [column[prompt] for prompt in wave.prompts]
        clean[columns] = arrays["clean"]
        intervened[np.ix_(wave.specs, columns)] = arrays["intervened"]
    return {"clean": clean, "intervened": intervened}


class _Bar:
    """A progress bar that counts interventions on prompts and moves with the arithmetic done."""

    def __init__(self, plan: Plan, waves: list[int], shown: bool) -> None:
        self._plan, self._done = plan, 0
        self._cells = {number: len(plan.waves[number].specs) * len(plan.waves[number].prompts) for number in waves}
        total = sum(self._cells.values())
        self._bar = tqdm(
            total=total, unit="intervention", unit_scale=True, smoothing=0.1, desc="sweep", disable=not shown
        )

    def advance(self, share: float) -> None:
        """Some of the interventions are done, counted by the arithmetic they took."""
        self._bar.update(share)

    def finish(self, number: int) -> None:
        """A wave is done: what was guessed becomes what is."""
        self._done += self._cells[number]
        self._bar.update(self._done - self._bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

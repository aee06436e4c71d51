"""The unfinished work of a study: each of its sweeps has a store, and all are discarded once the study has written its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pyvene_ext.engine.measure import MetricLike, as_metric
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.engine.results import Result
from pyvene_ext.engine.sweep.run import open_shared_store, store_facts, sweep
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.files import to_plain
from pyvene_ext.specs.joint import Spec


@contextmanager
def unfinished_in(
    folder: str | Path,
    model: PreTrainedModel,
    specs: Sequence[Spec],
    prompts: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    *,
    memory: int | None = None,
    compile: bool = False,
) -> Iterator[Callable[..., Result]]:
    """Open a folder of stores and yield a `sweep` that keeps finished batches there, whichever of the specs and prompts it runs.

    A screen or a sequential run calls it several times, on specs and prompts that depend on earlier results. Each call has a
    store of its own, named by a hash of its specs and prompts. When the study is started again, the same calls resume where
    they stopped.

    Args:
        folder: where the stores lie, usually `RunFolder.unfinished`.
        model: the model of all calls.
        specs: all specs that calls may run.
        prompts: all prompts that calls may run on, chosen by `subset`.
        metric: metric of all calls.
        memory: bytes for a batch of interventions.
        compile: whether torch.compile fuses the MLPs.

    Yields:
        Callable[..., Result]: a function with the signature of `sweep`, without `memory`, `compile` and `store`.

    Raises:
        ValueError: the folder holds work on other specs, prompts, weights or another metric, or another process uses it.
    """
    folder = Path(folder)
    facts = store_facts(resolve(specs, model, prompts), as_metric(metric), range(len(prompts)))
    with open_shared_store(folder, facts, {}):

        def kept(
            model: PreTrainedModel,
            specs: Sequence[Spec],
            *args: Any,
            subset: Sequence[int] | None = None,
            **options: Any,
        ) -> Result:
            store = folder / data_hash([to_plain(specs), subset])
            return sweep(model, specs, *args, subset=subset, memory=memory, compile=compile, store=store, **options)

        yield kept


def discard(folder: str | Path) -> None:
    """Remove the unfinished work of a run whose files are written."""
    folder = Path(folder)
    # Renamed first, which is atomic: a process killed halfway through the removal must not leave half a store.
    doomed = folder.with_name(f".{folder.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)

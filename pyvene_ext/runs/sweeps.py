"""The unfinished work of a study: every sweep it makes has a store, and they go when the study has written its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pyvene_ext.engine.plain import Result
from pyvene_ext.engine.resolve import resolve
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
    metric: str = "logit_diff",
    *,
    memory: int | None = None,
    compile: bool = False,
) -> Iterator[Callable[..., Result]]:
    """Gives a `sweep` that keeps what it has finished in `folder`, whatever of these specs and prompts it is called with.

    A screen or a sequential run calls it several times, on specs and prompts that only the run itself finds out; each call has a
    store of its own, named by them. A study that is started again makes the same calls and finds them done as far as they were.

    Raises ValueError if the folder holds work on other specs, prompts, weights or another metric, or is in use.
    """
    folder = Path(folder)
    facts = store_facts(resolve(specs, model, prompts), metric, range(len(prompts)))
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
    """Remove unfinished work, because the files that it was for are written."""
    folder = Path(folder)
    doomed = folder.with_name(
        f".{folder.name}-removed"
    )  # at once: a store that a killed process has half removed is no store
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)

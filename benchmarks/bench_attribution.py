"""How many forward passes per prompt do attribution patching, edge attribution and a curve of circuits take?

    python benchmarks/bench_attribution.py --model smollm2-135m-instruct --threads 1
    python benchmarks/bench_attribution.py --model gemma-3-270m --threads 1

Method. Pairs of prompts of random tokens, all of one length, which differ from the second token on. The unit is a plain pass: the
model as it runs the base prompts by default, with logits at all tokens. Methods need them at the last one only; what a pass with
those costs is printed first, so that one unit can be had from the other. Operations are the floating-point operations of matrix
products and attention, counted with torch's formulas, the same on every machine. Time is that of the processor, the least of
--repeats runs, so that other work on the machine matters less; a pass is timed beside each run. Memory is that of the weights and
by how much the process grows. The curve has the ten sizes of Mueller et al. 2025, of the edges that EAP ranks first.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import pyvene_ext as px
from pyvene_ext.attribution import atp
from pyvene_ext.circuits import MIB_SHARES, faithfulness_curve
from pyvene_ext.edges import edge_attribution
from pyvene_ext.io.cli import run
from pyvene_ext.io.seeds import rng
from pyvene_ext.prompts.encoding import AnswerTokens
from pyvene_ext.prompts.tokenized import TokenizedPrompts


@dataclass(frozen=True)
class Config:
    model: str = "tiny-qwen2.5"
    """a shipped or fetched model, a folder, or a name on the hub"""
    prompts: px.flags.Count = 8
    """pairs of prompts"""
    tokens: Annotated[int, Ge(3)] = 15
    """tokens of each prompt"""
    repeats: px.flags.Count = 3
    """times that each way is timed"""
    threads: px.flags.Count | None = None
    """of torch; by default torch's choice"""
    seed: px.flags.Seed = 0
    """of the prompts"""


def main(config: Config) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, _ = px.load_model(config.model)
    draw, vocab = rng(config.seed, "prompts"), model.config.vocab_size
    rows = draw.integers(1, vocab, size=(2, config.prompts, config.tokens))
    rows[:, :, 0] = rows[0, 0, 0]
    pairs = rows[:, :, -1].T.tolist()
    answers = tuple(AnswerTokens(((right,),), ((wrong,),)) for right, wrong in pairs)
    base, source = (TokenizedPrompts(tuple(map(tuple, some.tolist())), pad_id=0, answers=answers) for some in rows)
    heads = px.all_patches(model.config, "z")
    matrix = edge_attribution(model, base, source, progress=False).matrix
    options: Any = {"batch_size": config.prompts, "progress": False}
    ways: dict[str, Callable[[], Any]] = {
        f"atp of {len(heads)} heads": lambda: atp(model, heads, base, source, **options),
        "eap": lambda: edge_attribution(model, base, source, **options),
        "eap_ig_inputs, 5 steps": lambda: edge_attribution(model, base, source, method="eap_ig_inputs", **options),
        "curve of ten sizes": lambda: faithfulness_curve(model, matrix, base, source, shares=MIB_SHARES, **options),
    }
    ids = torch.tensor(base.input_ids, device=model.device)

    def forward(**options: Any) -> None:
        with torch.no_grad():
            model(ids, use_cache=False, **options)

    weights = sum(parameter.nbytes for parameter in model.parameters())
    plain = operations(forward), weights + used(forward)[1]
    last = operations(partial(forward, logits_to_keep=1)) / plain[0]
    print(f"{config.model}: {config.prompts} pairs of {config.tokens} tokens, {np.isfinite(matrix).sum()} edges")
    print(f"a pass with logits at the last token only takes {last:.2f} of the operations of a plain pass")
    print("| | operations | time | memory | MiB besides the weights |\n|---|---|---|---|---|")
    for name, way in ways.items():
        measured = [(used(forward)[0], *used(way)) for _ in range(config.repeats)]
        unit, seconds, grown = np.array(measured).T
        times = operations(way) / plain[0], seconds.min() / unit.min(), (weights + grown.max()) / plain[1]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in times) + f" | {grown.max() / 2**20:.0f} |")


class Operations(TorchDispatchMode):
    """Counts floating-point operations, as FlopCounterMode, which cannot follow a gradient taken within a backward pass."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(function._overloadpacket)
        if formula is None:
            with self:
                result = function.decompose(*args, **kwargs)
            return function(*args, **kwargs) if result is NotImplemented else result
        result = function(*args, **kwargs)
        self.total += formula(*args, **kwargs, out_val=result)
        return result


def operations(way: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with Operations() as counter:
        way()
    return counter.total


def used(way: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the processor that a call takes, and bytes by which the process grows at most, looked at every millisecond."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier runs have freed would hide what this one takes
    done, seen = threading.Event(), [resident()]

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.process_time()
    way()
    seconds = time.process_time() - started
    done.set()
    watcher.join()
    return seconds, max(seen) - seen[0]


def resident() -> int:
    """Bytes of the process in memory (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    raise SystemExit(run(main, Config))

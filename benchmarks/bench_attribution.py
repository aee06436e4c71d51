"""How many forward passes per prompt do attribution patching, edge attribution and a curve of circuits take?

    python benchmarks/bench_attribution.py --model smollm2-135m-instruct --threads 1
    python benchmarks/bench_attribution.py --model gemma-3-270m --threads 1

Method. Pairs of prompts of random tokens, all of one length, which differ from the second token on. The unit is a forward pass on
the base prompts with logits at the last token only. Time is that of the processor, the least of --repeats runs, so that other
work on the machine matters less; a pass is timed beside each run. Memory is that of the weights and by how much the process
grows; it is compared with a pass without gradients that has logits at all tokens, as a model gives them by default. The curve has
the ten sizes of Mueller et al. 2025, of the edges that EAP ranks first.
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
    plain = weights + used(forward)[1]
    print(f"{config.model}: {config.prompts} pairs of {config.tokens} tokens, {np.isfinite(matrix).sum()} edges")
    print("| | forward passes | MiB besides the weights | memory of a plain pass |\n|---|---|---|---|")
    for name, way in ways.items():
        measured = [(used(partial(forward, logits_to_keep=1))[0], *used(way)) for _ in range(config.repeats)]
        unit, seconds, grown = np.array(measured).T
        times = (weights + grown.max()) / plain
        print(f"| {name} | {seconds.min() / unit.min():.2f} | {grown.max() / 2**20:.0f} | {times:.2f} |")


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

"""How fast do many ablations write their texts at once, beside transformers' `generate` with hooks?

    python benchmarks/bench_generate.py
    python benchmarks/bench_generate.py --model smollm2-135m-instruct
    python benchmarks/bench_generate.py --size llama-3.1-8b --sets 64 --dtype bfloat16 --device cuda

Method. One model, of random weights unless --model names one, and prompts of random tokens, of which the first --common are
the same in all, as solved examples are. Sets of random heads have their z zeroed at every new token. (1) Hooks: a loop over
the sets; each calls transformers' `generate` on the batch of all prompts, with one plain hook a layer. (2) pyvene-ext:
`evaluate` with the list of all sets. No text ends early, and the share of texts on which both agree is given. Time holds
everything from the first prompt to the last token; the runs take turns, and medians are given. Tokens per second count the new
tokens of all sets and prompts.

Two bounds stand beside. Weights: every step reads all weights once, however few rows it has: the time of a step with one
row, times the steps, and one pass over the prompts. Arithmetic: each new token of each row costs what a token costs in a pass
over all prompts.

Written, in outputs/bench_generate/NAME: result.json, table.md, config.yaml (running it again does the same).
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from bench_sweep import SIZES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import pyvene_ext as px
from modelcards import card_of, dimensions, n_heads, n_layers
from pyvene_ext.io.cli import run
from pyvene_ext.io.files import atomic_path, output_path, write_json, write_yaml
from pyvene_ext.io.seeds import rng
from pyvene_ext.models.hooks import on_input
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.problems import Problem, Questions
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.runs.facts import metadata
from pyvene_ext.specs.ablation import heads_together

Heads = tuple[tuple[int, int], ...]  # (layer, head) pairs


@dataclass(frozen=True)
class Config(px.flags.Memory):
    size: Literal["smollm2-135m", "qwen2.5-3b", "gemma-2-2b", "llama-3.1-8b", "tiny"] = "smollm2-135m"
    """the shape of a model with random weights"""
    model: str | None = None
    """a shipped or fetched model, a folder, or a name on the hub, instead"""
    sets: px.flags.Count = 20
    """sets of heads"""
    heads: px.flags.Count = 10
    """heads of each set"""
    problems: px.flags.Count = 16
    """prompts"""
    tokens: Annotated[int, Ge(2)] = 180
    """tokens of the longest prompt; others have up to a tenth fewer"""
    common: Annotated[int, Ge(0)] = 120
    """tokens that all prompts begin with"""
    new: Annotated[int, Ge(2)] = 40
    """tokens that each text has"""
    repeats: px.flags.Count = 3
    """times that each way is timed"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the weights"""
    device: str | None = None
    """cpu, cuda ...; by default a GPU if there is one"""
    threads: px.flags.Count | None = None
    """of torch; by default torch's choice"""
    seed: px.flags.Seed = 0
    """of weights, prompts and heads"""
    out: px.flags.Out = None
    """the folder; by default outputs/bench_generate/NAME"""


def main(config: Config) -> None:
    out = output_path(config.out, Path("outputs/bench_generate") / Path(config.model or config.size).name)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load(config)
    prompts = random_prompts(config, model)
    sets = random_sets(config, model)
    tokenizer, questions = numbers_as_words(model), as_questions(prompts)
    specs = [heads_together(heads) for heads in sets]

    def together() -> list[list[tuple[int, ...]]]:
        options: Any = {"max_new_tokens": config.new, "memory": config.memory_bytes, "read_once": True}
        return [list(found.ids) for found in px.methods.evaluate(model, tokenizer, questions, specs, "new", **options)]

    # The two ways in turn; they must write the same.
    ways: dict[str, Callable[[], Any]] = {
        "transformers generate with hooks": lambda: hooked(model, prompts, sets, config.new),
        "pyvene-ext evaluate": together,
    }
    lower_bounds(config, model, prompts)  # warms up
    written: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(config.repeats):
        for name, way in ways.items():
            took, written[name] = timed(way)
            seconds[name].append(took)
    pairs = [pair for of_spec in zip(*written.values(), strict=True) for pair in zip(*of_spec, strict=True)]
    same = float(np.mean([a == b for a, b in pairs]))
    count = config.sets * config.problems * config.new
    bounds = {name: count / value for name, value in lower_bounds(config, model, prompts).items()}

    # Table and files.
    rates = {name: count / float(np.median(some)) for name, some in seconds.items()}
    base = next(iter(rates.values()))
    lines = ["| | tokens/s | seconds | x |", "|---|---|---|---|"]
    lines += [f"| {name} | {rate:.0f} | {count / rate:.2f} | {rate / base:.2f} |" for name, rate in rates.items()]
    lines += [
        f"| bound: {name} | {rate:.0f} | {count / rate:.2f} | {rate / base:.2f} |" for name, rate in bounds.items()
    ]
    text = (
        f"{config.sets} sets of {config.heads} heads x {config.problems} prompts of {config.tokens} tokens x {config.new} new "
        f"tokens; {Path(config.model or config.size).name}, {config.dtype}, {model.device.type}, "
        f"{torch.get_num_threads()} threads; {same:.1%} of the texts are the same\n\n" + "\n".join(lines)
    )
    write_yaml(
        out / "config.yaml",
        {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()},
    )
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    record = {"command": shlex.join(["python", *sys.argv]), "seconds": seconds, "tokens": count, "bounds": bounds}
    write_json(out / "result.json", record | {"same": same} | metadata(model))
    print(text, "", "written:", out / "result.json", out / "table.md", sep="\n  ")


def load(config: Config) -> PreTrainedModel:
    """The model that is named, or one of random weights, which never ends a text."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype)
    if config.model is not None:
        model, _ = px.load_model(config.model, device=device, dtype=dtype)
    else:
        torch.manual_seed(config.seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES[config.size]), dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def random_prompts(config: Config, model: PreTrainedModel) -> TokenizedPrompts:
    """Prompts that begin alike."""
    draw, vocab = rng(config.seed, "prompts"), model.config.vocab_size
    common = draw.integers(vocab, size=min(config.common, config.tokens - 1)).tolist()
    lengths = config.tokens - np.arange(config.problems) % max(1, config.tokens // 10)
    rows = [(*common, *draw.integers(vocab, size=max(1, length - len(common))).tolist()) for length in lengths.tolist()]
    return TokenizedPrompts(tuple(rows), pad_id=0)


def random_sets(config: Config, model: PreTrainedModel) -> list[Heads]:
    """Sets of distinct heads."""
    draw, heads = rng(config.seed, "heads"), n_heads(model.config)
    total = n_layers(model.config) * heads
    drawn = [draw.choice(total, min(config.heads, total), replace=False) for _ in range(config.sets)]
    return [tuple(sorted((int(head) // heads, int(head) % heads) for head in some)) for some in drawn]


def numbers_as_words(model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are their numbers, so that no text ends."""
    words = {str(at): at for at in range(model.config.vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), pad_token="0")


def as_questions(prompts: TokenizedPrompts) -> Questions:
    """The prompts as problems without solutions."""
    problem, count = Problem(question="?", solution="", answer=0, steps=1), len(prompts)
    lengths = tuple(map(len, prompts.input_ids))
    return Questions((problem,) * count, prompts, lengths, (range(0),) * count, tuple(range(count)))


def hooked(
    model: PreTrainedModel, prompts: TokenizedPrompts, sets: list[Heads], new: int
) -> list[list[tuple[int, ...]]]:
    """Write all texts, one set at a time, by transformers' `generate` and a hook a layer."""
    batch = prompts.batch(range(len(prompts))).to(model.device)
    width = dimensions(model.config)["d_head"]
    found = []
    for heads in sets:
        with ExitStack() as stack, torch.inference_mode():
            for layer in sorted({layer for layer, _ in heads}):
                module = card_of(model).module(model, "attention_value_output", layer)
                here = [head for at, head in heads if at == layer]

                def zero(x: Tensor, here: list[int] = here) -> None:
                    if x.shape[1] == 1:  # a new token
                        x.unflatten(-1, (-1, width))[:, :, here] = 0

                stack.enter_context(on_input(module, zero))
            written: Tensor = model.generate(  # type: ignore[operator]
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        found.append([tuple(row) for row in written[:, batch.input_ids.shape[1] :].tolist()])
    return found


def lower_bounds(config: Config, model: PreTrainedModel, prompts: TokenizedPrompts) -> dict[str, float]:
    """Seconds that weights and arithmetic take at least, as the module's docstring counts them."""
    batch = prompts.batch(range(len(prompts))).to(model.device)
    with evaluating(model), torch.inference_mode():
        cache = model(batch.input_ids[:1], use_cache=True, logits_to_keep=1).past_key_values

        def one_step() -> None:
            model(batch.input_ids[:1, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)

        def reading() -> None:
            model(**batch.inputs(), logits_to_keep=1)

        step, read = (np.median([timed(way)[0] for _ in range(3 + config.repeats)]) for way in (one_step, reading))
    read_tokens = sum(map(len, prompts.input_ids))
    unembedded = model.config.vocab_size * model.config.hidden_size
    body = sum(weight.numel() for weight in model.base_model.parameters()) - unembedded  # without the embedding
    of_token = read / read_tokens * (body + unembedded) / body  # reading computes no logits but the last
    return {
        "weights": float(read + config.new * step),
        "arithmetic": float(read + config.sets * config.problems * config.new * of_token),
    }


def timed(way: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, on a GPU until the last kernel is done, and what it returns."""
    started = time.perf_counter()
    found = way()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


if __name__ == "__main__":
    raise SystemExit(run(main, Config))

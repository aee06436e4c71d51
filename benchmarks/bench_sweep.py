"""How fast is the sweep engine, beside what others need and beside the arithmetic itself?

    python benchmarks/bench_sweep.py
    python benchmarks/bench_sweep.py --size tiny --workload a b
    python benchmarks/bench_sweep.py --size qwen2.5-3b --dtype bfloat16 --device cuda
    python benchmarks/bench_sweep.py --size tiny --growth
    python benchmarks/bench_sweep.py --model smollm2-135m-instruct --workload a b

Method. One model, of random weights or pretrained (--model), and one set of random prompts of one length. Workloads: (a) every
head's z zeroed at every position; (b) every head's z zeroed at the last position; (c) every head's z replaced by its mean and
by another prompt's; (d) MLP outputs and the residual stream (before, within, after a layer) zeroed, one position at a time. The
unit of time is a plain forward: all layers on all tokens and the logits of all positions, timed in turn with what is measured;
medians. Plain hooks, pyvene, and nnsight and TransformerLens where installed do one intervention at a time, at the same cost
whichever it is, so they are timed on a random sample; the sweep engine runs the whole workload (or as much of it as fits the
budget: "n" says how many), and its time holds everything: clean run, means and other prompts' activations, each of which the
others get for nothing.

The bound is counted: the floating-point operations (torch's FlopCounterMode) of those pieces of the plain forward that an exact
result cannot do without. Shared by all interventions: the clean run without its logits. For each: what comes after the edit in
its own layer, and all later layers, on the edited and later tokens; of the last layer keys and values there, the rest at the last
token. Peak memory is that of a process in which nothing but the one engine has run, weights and libraries included (on a GPU:
allocated tensors), and is given beside a plain forward's.

With --growth the engine alone runs (a) on more prompts, more heads, and longer prompts at one number of tokens, and the slope of
log time against each is fitted: 1 is linear, 0 is constant.

Written, in outputs/bench_sweep/SIZE (or MODEL): result.json (all times, counts and the machine), table.md, config.yaml (running
it again does the same).
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
import itertools
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyvene
import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from scipy.stats import linregress
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

import pyvene_ext as px
from modelcards import dimensions, n_heads, n_kv_heads, n_layers
from pyvene_ext.engine.compile import compile_spec
from pyvene_ext.engine.metrics import logit_diff
from pyvene_ext.engine.plain import reference_for
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.engine.sweep import sweep
from pyvene_ext.io.cli import run
from pyvene_ext.io.files import atomic_path, output_path, write_json, write_yaml
from pyvene_ext.io.seeds import rng
from pyvene_ext.models.loading import TINY_FOLDER, TINY_MODELS
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts, answer_pairs
from pyvene_ext.runs.facts import metadata
from pyvene_ext.specs.ablation import Ablation, all_heads, donors

Letter = Literal["a", "b", "c", "d"]
OURS, HOOKS = "pyvene-ext sweep", "bare hooks"
AT_LEAST = 3  # runs of what is timed by itself
LONG_ENOUGH = 1.0  # seconds of measuring, below which a measurement is repeated
GROWTH = (1, 2, 4, 8)


def _shape(
    family: str, layers: int, hidden: int, heads: int, kv_heads: int, d_mlp: int, vocab: int, **more: Any
) -> dict:
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": d_mlp,
        "vocab_size": vocab,
        **more,
    }


SIZES = {
    "default": _shape("qwen2", 24, 896, 14, 2, 4864, 32000),
    "small": _shape("qwen2", 24, 448, 14, 2, 2432, 32000),
    "smollm2-135m": _shape("llama", 30, 576, 9, 3, 1536, 49152, tie_word_embeddings=True),
    "tiny": _shape("qwen2", 24, 56, 14, 2, 152, 32000),
    "qwen2.5-3b": _shape("qwen2", 36, 2048, 16, 2, 11008, 151936, tie_word_embeddings=True),
    "gemma-2-2b": _shape("gemma2", 26, 2304, 8, 4, 9216, 256000, head_dim=256),
    "llama-3.1-8b": _shape("llama", 32, 4096, 32, 8, 14336, 128256),
}
FLAGS = dict(zip(("layers", "hidden", "heads", "kv_heads", "d_mlp", "vocab"), list(SIZES["default"])[1:], strict=True))


@dataclass(frozen=True)
class Config(px.flags.Memory):
    size: Literal["default", "small", "tiny", "qwen2.5-3b", "gemma-2-2b", "llama-3.1-8b"] = "default"
    """the model's shape; default: 24 layers, hidden 896, 14 heads on 2 K/V heads, MLP 4864, vocabulary 32,000"""
    model: str | None = None
    """a pretrained model in place of a size: fetched, shipped, a folder, or a name on the hub"""
    layers: px.flags.Count | None = None
    """instead of the size's, like the next five"""
    hidden: px.flags.Count | None = None
    heads: px.flags.Count | None = None
    kv_heads: px.flags.Count | None = None
    d_mlp: px.flags.Count | None = None
    vocab: Annotated[int, Ge(4)] | None = None
    prompts: px.flags.Count = 8
    """how many prompts"""
    tokens: px.flags.Count = 32
    """how long each is"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the weights"""
    device: str | None = None
    """cpu, cuda ...; by default a GPU if there is one"""
    workload: px.flags.OneOrMore[Letter] = ("a", "b", "c", "d")
    """which of the workloads"""
    sample: px.flags.Count = 4
    """interventions on which the engines other than ours are timed and compared"""
    budget_minutes: Annotated[float, Gt(0)] = 10
    """about how long all may take; what does not fit is cut to a random part, (c) and (d) first"""
    compile: bool = False
    """let torch.compile fuse the MLPs of the sweep engine's calls"""
    threads: px.flags.Count | None = None
    """of torch; by default torch's choice"""
    processor_time: bool = False
    """count seconds of the processor, which other programs on the machine do not lengthen; of all threads together"""
    growth: bool = False
    """measure growth instead of the workloads"""
    seed: px.flags.Seed = 0
    """of weights, prompts and samples"""
    out: px.flags.Out = None
    """the folder; by default outputs/bench_sweep/SIZE, or SIZE_growth"""


def main(config: Config) -> None:
    # What is run. Everything that can be wrong is found before the first model is made.
    started = time.monotonic()
    config, out = checked(config)
    shape, prompts = model_config(config), random_prompts(config)
    pieces = count_pieces(shape, config.prompts, config.tokens)
    record: dict[str, Any] = {"config": plain_config(config), "flops": dataclasses.asdict(pieces)}
    if config.growth:
        measured = in_a_process_of_its_own(grow, config)
        growth = slopes(measured["points"])
        text = f"{title(config, measured)}\n\n{growth_table(growth)}"
        record |= {"growth": growth}
    else:
        workloads = {letter: workload(letter, shape, config.tokens) for letter in config.workload}
        with torch.device("meta"):
            without_weights = AutoModelForCausalLM.from_config(shape)
        resolve(itertools.chain(*workloads.values()), without_weights, prompts)
        sample = {letter: draw(specs, config.sample, config, letter) for letter, specs in workloads.items()}

        # The others first: they say how long a plain forward takes, and so how much of the workloads fits the budget.
        of_sample = {letter: [workloads[letter][i] for i in chosen] for letter, chosen in sample.items()}
        runs, notes = {}, []
        for engine, (package, _) in OTHERS.items():
            if importlib.util.find_spec(package) is None:
                notes.append(f"{engine} is not installed.")
                continue
            try:
                runs[engine] = in_a_process_of_its_own(measure, config, engine, of_sample)
            except Exception as error:
                if engine == HOOKS:
                    raise
                notes.append(f"{engine} failed: {' '.join(str(error).split())[:200] or type(error).__name__}")
        measured = runs[HOOKS]
        plain = float(np.median(np.concatenate([w["plain"] for w in measured["workloads"].values()])))
        costs = {letter: 1.2 * plain * bound(specs, pieces, config) for letter, specs in workloads.items()}
        left = config.budget_minutes * 60 - (time.monotonic() - started) - measured["startup"]
        left -= len(workloads) * 2 * (AT_LEAST + 1) * plain  # plain forwards beside ours, and a first intervention
        sizes = affordable({letter: len(specs) for letter, specs in workloads.items()}, costs, left, len(pieces.layers))
        parts = {
            letter: sorted({*draw(workloads[letter], size, config, letter, "part"), *sample[letter]})
            for letter, size in sizes.items()
        }
        of_part = {letter: [workloads[letter][i] for i in chosen] for letter, chosen in parts.items()}
        runs[OURS] = in_a_process_of_its_own(measure, config, OURS, of_part)
        hashes = {engine: result["metadata"]["weight_hash"] for engine, result in runs.items()}
        if len(set(hashes.values())) > 1:
            raise RuntimeError(f"the engines did not run on one set of weights: {hashes}")

        # The same sample of every engine, against bare hooks; and the files.
        rows = []
        for letter, specs in workloads.items():
            mine = [parts[letter].index(i) for i in sample[letter]]
            least = bound(of_part[letter], pieces, config)
            hooked = measured["workloads"][letter]
            for engine, result in runs.items():
                timing = result["workloads"][letter]
                values = timing["values"][mine] if engine == OURS else timing["values"]
                row = {"workload": letter, "engine": engine, "n": timing["n"], "of": len(specs)}
                row |= {"seconds": float(np.median(timing["seconds"])), "seconds_each": timing["seconds"]}
                row |= {"plain_seconds": float(np.median(timing["plain"])), "plain_seconds_each": timing["plain"]}
                row |= {"ratio": ratio(timing), "bound": least, "faster_than_hooks": ratio(hooked) / ratio(timing)}
                row |= {"difference": float(np.abs(values - hooked["values"]).max())}
                row |= {"peak_memory": timing["peak"], "plain_peak_memory": result["plain_peak"]}
                rows.append(row)
        text = "\n\n".join([title(config, measured), result_table(rows), *notes])
        record |= {"results": rows, "notes": notes}
    facts = {"command": shlex.join(["python", *sys.argv]), "machine": machine(config, measured["threads"])}
    record |= facts | measured["metadata"]
    write_yaml(out / "config.yaml", plain_config(config))
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_json(out / "result.json", record)

    print(text)
    minutes = (time.monotonic() - started) / 60
    print(f"\n{minutes:.1f} minutes; written:", out / "result.json", out / "table.md", sep="\n  ")


# -- what is measured --------------------------------------------------------------------------------------------------


def checked(config: Config) -> tuple[Config, Path]:
    """The config with its device named, and the folder of the results; raises ValueError for what cannot be run."""
    shape = model_config(config)
    hidden, heads, kv_heads = shape.hidden_size, n_heads(shape), n_kv_heads(shape)
    if heads % kv_heads or (getattr(shape, "head_dim", None) is None and hidden % heads) or d_head(shape) % 2:
        raise ValueError(
            f"--heads {heads} must be a multiple of --kv_heads {kv_heads} and divide --hidden {hidden} into even parts."
        )
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    if config.model and (config.growth or any(getattr(config, flag) is not None for flag in FLAGS)):
        raise ValueError("--model has a size of its own: leave out --growth and the flags of a size, such as --layers.")
    name = Path(config.model).name if config.model else config.size
    out = output_path(config.out, Path("outputs/bench_sweep") / (name + ("_growth" if config.growth else "")))
    return dataclasses.replace(config, device=device), out


def model_config(config: Config) -> PreTrainedConfig:
    """The pretrained model's, or the size's with the flags that were given."""
    if config.model:
        return pretrained(config.model, "float32", "cpu").config
    given = {name: getattr(config, flag) for flag, name in FLAGS.items() if getattr(config, flag) is not None}
    return AutoConfig.for_model(**SIZES[config.size] | given)


@cache
def pretrained(name: str, dtype: str, device: str) -> PreTrainedModel:
    """Loaded once in each process."""
    return px.load_model(name, dtype=dtype, device=device)[0]


def d_head(shape: PreTrainedConfig) -> int:
    return dimensions(shape)["d_head"]


def random_prompts(config: Config) -> TokenizedPrompts:
    """Prompts of one length, of random tokens, with two different random tokens to tell apart."""
    vocab, random = model_config(config).vocab_size, rng(config.seed, "prompts")
    return TokenizedPrompts(
        input_ids=tuple(tuple(random.integers(vocab, size=config.tokens).tolist()) for _ in range(config.prompts)),
        answers=answer_pairs(random.choice(vocab, 2, replace=False).tolist() for _ in range(config.prompts)),
    )


def workload(letter: Letter, shape: PreTrainedConfig, tokens: int) -> list[Ablation]:
    """All its interventions."""
    match letter:
        case "a":
            return all_heads(shape, "zero")
        case "b":
            return all_heads(shape, "zero", positions="last")
        case "c":
            return all_heads(shape, "mean") + all_heads(shape, "resample")
        case "d":
            sites = ("mlp_out", "resid_pre", "resid_mid", "resid_post")
            places = itertools.product(sites, range(n_layers(shape)), range(tokens))
            return [Ablation(kind="zero", site=site, layer=layer, positions=(token,)) for site, layer, token in places]


def draw(specs: Sequence[Ablation], size: int, config: Config, *names: str) -> list[int]:
    """`size` of the interventions: one at random from each of as many equal stretches of the list, all if there are no more."""
    edges = np.arange(min(size, len(specs)) + 1) * len(specs) // min(size, len(specs))
    return rng(config.seed, "sample", *names).integers(edges[:-1], edges[1:]).tolist()


def affordable(sizes: dict[Letter, int], costs: dict[Letter, float], seconds: float, least: int) -> dict[Letter, int]:
    """How many interventions of each workload fit the time: (b) and (a) come first, (c) and (d) share, some of each at least."""
    chosen = {letter: min(size, least) for letter, size in sizes.items()}
    order = sorted(sizes, key="badc".index)
    for place, letter in enumerate(order):
        spare = seconds - sum(chosen[other] * costs[other] for other in sizes)
        share = spare if letter in "ab" else spare / len(order[place:])
        chosen[letter] = min(sizes[letter], chosen[letter] + max(0, int(share / costs[letter])))
    return chosen


def columns(spec: Ablation, tokens: int) -> slice:
    """The edited tokens of prompts of this length."""
    if spec.positions == "all":
        return slice(0, tokens)
    token = tokens - 1 if spec.positions == "last" else int(spec.positions[0])
    return slice(token, token + 1)


# -- the bound ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """Floating-point operations of one forward on all tokens of all prompts: the whole, and by layer.

    Attributes:
        plain: everything, the logits of all positions included.
        unembedding: those logits.
        layers: each layer.
        kv: the projections to keys and values.
        mlp: the MLP.
        head: one head's share of the output projection.
    """

    plain: int
    unembedding: int
    layers: tuple[int, ...]
    kv: tuple[int, ...]
    mlp: tuple[int, ...]
    head: tuple[float, ...]


def count_pieces(shape: PreTrainedConfig, prompts: int, tokens: int) -> Pieces:
    """Count a plain forward module by module, on a model without storage; eager attention, whose products are all seen."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(shape), attn_implementation="eager")
        ids = torch.zeros(prompts, tokens, dtype=torch.long)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    counted = {name: sum(of_kind.values()) for name, of_kind in counter.get_flop_counts().items()}
    blocks = [f"{type(model).__name__}.model.layers.{layer}" for layer in range(n_layers(shape))]
    return Pieces(
        plain=counted["Global"],
        unembedding=counted[f"{type(model).__name__}.lm_head"],
        layers=tuple(counted[block] for block in blocks),
        kv=tuple(counted[f"{block}.self_attn.k_proj"] + counted[f"{block}.self_attn.v_proj"] for block in blocks),
        mlp=tuple(counted[f"{block}.mlp"] for block in blocks),
        head=tuple(counted[f"{block}.self_attn.o_proj"] / n_heads(shape) for block in blocks),
    )


def bound(specs: Sequence[Ablation], pieces: Pieces, config: Config) -> float:
    """Least arithmetic for one of these interventions, averaged over them, in plain forwards; the clean run is shared by all."""
    clean = pieces.plain - pieces.unembedding
    return (
        clean / len(specs) + float(np.mean([own_arithmetic(spec, pieces, config.tokens) for spec in specs]))
    ) / pieces.plain


def own_arithmetic(spec: Ablation, pieces: Pieces, tokens: int) -> float:
    """What one intervention needs besides the clean run."""
    assert spec.layer is not None
    edited = columns(spec, tokens)
    later, one = (tokens - edited.start) / tokens, 1 / tokens  # the edited and later tokens, and the last one, of all
    layer, last = spec.layer, len(pieces.layers) - 1
    if layer == last and spec.site != "resid_pre" and edited.stop < tokens:
        return 0.0  # nothing reads what stands at another token after the last attention
    after = {
        "z": pieces.head[layer] + pieces.mlp[layer],
        "resid_mid": pieces.mlp[layer],
        "mlp_out": 0,
        "resid_post": 0,
    }

    def whole(at: int) -> float:
        """A layer whose input has changed at the edited and later tokens."""
        if at < last:
            return pieces.layers[at] * later
        return pieces.kv[at] * later + (pieces.layers[at] - pieces.kv[at]) * one

    own = whole(layer) if spec.site == "resid_pre" else after[spec.site] * (later if layer < last else one)
    return own + sum(whole(at) for at in range(layer + 1, last + 1))


# -- the engines -------------------------------------------------------------------------------------------------------

LastLogits = Float[Tensor, "prompt vocab"]


@dataclass
class Case:
    """One model and one set of prompts, as a single batch without padding."""

    model: Any
    prompts: TokenizedPrompts
    batch: Batch
    seconds: Callable[[], float] = time.perf_counter

    @property
    def tokens(self) -> int:
        return self.batch.input_ids.shape[1]

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return {**self.batch.inputs(), "use_cache": False}

    def plain(self) -> LastLogits:
        """The unit of time. Copied, so that the logits of all positions are gone when the next forward asks for memory."""
        return self.model(**self.inputs).logits[:, -1].clone()

    def twin(self) -> Any:
        """The same weights in modules of their own, for engines that rebuild the modules they are given."""
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in self.model.parameters()})


def make_case(config: Config) -> Case:
    torch.manual_seed(config.seed)
    device = torch.device(config.device or "cpu")
    if config.model:
        model = pretrained(config.model, config.dtype, str(device))
    else:
        with device:
            model = AutoModelForCausalLM.from_config(model_config(config), dtype=getattr(torch, config.dtype)).eval()
    prompts = random_prompts(config)
    seconds = time.process_time if config.processor_time else time.perf_counter
    return Case(model, prompts, next(prompts.batches(len(prompts))).to(device), seconds)


def features(spec: Ablation, case: Case) -> slice:
    """The edited part of the vector: a head's, or the whole."""
    width = d_head(case.model.config)
    return slice(None) if spec.heads is None else slice(spec.heads[0] * width, (spec.heads[0] + 1) * width)


def place(model: Any, spec: Ablation) -> tuple[Any, str]:
    """The module at which a site is edited, and on which side; nnsight's tree has the same names.

    resid_mid, which no module puts out, is edited through attention's output: it is resid_pre and that.
    """
    block = model.model.layers[spec.layer]
    gemma = model.config.model_type == "gemma2"
    return {
        "z": (block.self_attn.o_proj, "input"),
        "resid_mid": (block.post_attention_layernorm if gemma else block.self_attn, "output"),
        "mlp_out": (block.post_feedforward_layernorm if gemma else block.mlp, "output"),
        "resid_pre": (block, "input"),
        "resid_post": (block, "output"),
    }[spec.site]


def new_values(case: Case, specs: Iterable[Ablation]) -> dict[Ablation, Any]:
    """What comes in place: 0, or of heads the mean z over all tokens (`d_head`) or another prompt's z (`prompt pos d_head`)."""
    z: dict[int, Tensor] = {}
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, layer=layer: z.update({layer: args[0]}))
        for layer, block in enumerate(case.model.model.layers)
    ]
    case.plain()
    for handle in handles:
        handle.remove()
    new: dict[Ablation, Any] = {}
    for spec in specs:
        new[spec] = 0.0
        if spec.kind != "zero":
            own = z[spec.layer or 0][..., features(spec, case)]
            if spec.kind == "mean":
                new[spec] = own.float().mean((0, 1)).to(own.dtype)
            else:
                givers = donors(case.prompts, case.prompts, spec.positions, spec.seed)
                new[spec] = own[givers][:, columns(spec, case.tokens)]
    return new


def bare_hooks(case: Case, specs: Sequence[Ablation]) -> Callable[[Ablation], LastLogits]:
    """One forward with a plain torch hook."""
    new = new_values(case, specs)

    def last_logits(spec: Ablation) -> LastLogits:
        module, side = place(case.model, spec)
        where = (slice(None), columns(spec, case.tokens), features(spec, case))
        kept: list[Tensor] = []

        def edited(x: Tensor) -> Tensor:
            x = x.clone()
            x[where] = -kept[0][where] if spec.site == "resid_mid" else new[spec]
            return x

        def on_input(_: Any, args: tuple) -> tuple:
            return (edited(args[0]), *args[1:])

        def on_output(_: Any, args: tuple, output: Any) -> Any:
            return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

        hooks = [
            module.register_forward_pre_hook(on_input) if side == "input" else module.register_forward_hook(on_output)
        ]
        if spec.site == "resid_mid":
            block = case.model.model.layers[spec.layer]
            hooks.append(block.register_forward_pre_hook(lambda _, args: kept.append(args[0])))
        try:
            return case.plain()
        finally:
            for hook in hooks:
                hook.remove()

    return last_logits


def stock_pyvene(case: Case, specs: Sequence[Ablation]) -> Callable[[Ablation], LastLogits]:
    """One call of pyvene's own IntervenableModel; configs, replacements and wrappers are made beforehand."""
    reference = reference_for(case.model, specs, case.prompts, batch_size=len(case.prompts), progress=False)
    resolved = resolve(specs, case.model, case.prompts, reference=reference)
    compiled = {spec: compile_spec(spec, case.batch, resolved) for spec in specs}
    wrapped = {spec: pyvene.IntervenableModel(made.config, case.model) for spec, made in compiled.items()}

    def last_logits(spec: Ablation) -> LastLogits:
        made, model = compiled[spec], wrapped[spec]
        sources = made.source_representations(model.sorted_keys)
        base = dict(case.inputs)  # pyvene may change what it is given
        _, output = model(base, unit_locations=made.unit_locations, source_representations=sources)
        return output.logits[:, -1].clone()

    return last_logits


def nnsight(case: Case, specs: Sequence[Ablation]) -> Callable[[Ablation], LastLogits]:
    """One trace."""
    from nnsight import NNsight

    new, traced = new_values(case, specs), NNsight(case.twin())

    def last_logits(spec: Ablation) -> LastLogits:
        where = (slice(None), columns(spec, case.tokens), features(spec, case))
        block = traced.model.layers[spec.layer]
        module, side = place(traced, spec)
        with traced.trace(**case.inputs):
            if spec.site == "resid_mid":
                value = -block.input[where]
                output = module.output
                (output[0] if isinstance(output, tuple) else output)[where] = value
            elif side == "input":
                module.input[where] = new[spec]
            else:
                module.output[where] = new[spec]
            logits = traced.output.logits[:, -1].save()
        return logits.clone()

    return last_logits


def transformer_lens(case: Case, specs: Sequence[Ablation]) -> Callable[[Ablation], LastLogits]:
    """One run_with_hooks of the bridge over the same weights. Its hook_resid_mid sees the residual stream without changing it."""
    from transformer_lens.model_bridge import TransformerBridge

    new = new_values(case, specs)
    # The bridge insists on a tokenizer; it is given tokens.
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER / TINY_MODELS[0])
    at = {"device": case.model.device, "dtype": case.model.dtype}
    bridge = TransformerBridge.boot_transformers("random", hf_model=case.twin(), tokenizer=tokenizer, **at)
    names = {"z": "attn.hook_z", "resid_mid": "hook_attn_out"}

    def last_logits(spec: Ablation) -> LastLogits:
        kept: list[Tensor] = []
        tokens = (slice(None), columns(spec, case.tokens))

        def edit(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            if spec.heads is not None:
                x[(*tokens, spec.heads[0])] = new[spec]  # [prompt pos head d_head]
            else:
                x[tokens] = -kept[0][tokens] if spec.site == "resid_mid" else new[spec]
            return x

        def keep(x: Tensor, hook: Any) -> None:
            kept.append(x)

        hooks: list[tuple[str, Callable]] = [(f"blocks.{spec.layer}.{names.get(spec.site, f'hook_{spec.site}')}", edit)]
        if spec.site == "resid_mid":
            hooks.append((f"blocks.{spec.layer}.hook_resid_pre", keep))
        return bridge.run_with_hooks(case.batch.input_ids, fwd_hooks=hooks, return_type="logits")[:, -1].clone()

    return last_logits


# Each with the package it needs.
OTHERS: dict[str, tuple[str, Callable[[Case, Sequence[Ablation]], Callable[[Ablation], LastLogits]]]] = {
    HOOKS: ("torch", bare_hooks),
    "pyvene": ("pyvene", stock_pyvene),
    "nnsight": ("nnsight", nnsight),
    "TransformerLens": ("transformer_lens", transformer_lens),
}


# -- measuring ---------------------------------------------------------------------------------------------------------


def in_a_process_of_its_own(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `function` returns, and under "startup" the seconds that passed without measuring."""
    started = time.monotonic()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(function, *arguments).result()
    return {**result, "startup": time.monotonic() - started - result["measuring"]}


def measure(config: Config, engine: str, workloads: dict[Letter, list[Ablation]]) -> dict[str, Any]:
    """Time one engine on these interventions, and plain forwards in turn with it."""
    case, facts = start(config)
    started = time.monotonic()
    with torch.inference_mode():
        forget_peak(case)
        case.plain()
        plain_peak = peak(case)
        measured = {}
        for letter, specs in workloads.items():
            gc.collect()  # what the last workload left in cycles is not this one's memory
            if engine == OURS:
                measured[letter] = time_sweep(case, specs, config)
            else:
                measured[letter] = time_other(case, specs, letter, engine)
    return {**facts, "plain_peak": plain_peak, "workloads": measured, "measuring": time.monotonic() - started}


def start(config: Config) -> tuple[Case, dict[str, Any]]:
    """The model and prompts, in a process that does nothing else, and what a reader needs to repeat it."""
    if config.threads:
        torch.set_num_threads(config.threads)
    case = make_case(config)
    return case, {"metadata": metadata(case.model, seed=config.seed), "threads": torch.get_num_threads()}


def swept(
    case: Case, specs: list[Ablation], config: Config, progress: bool = False
) -> Float[np.ndarray, "spec prompt"]:
    """The sweep engine's results, everything included."""
    options: dict[str, Any] = {"memory": config.memory_bytes, "compile": config.compile, "progress": progress}
    return sweep(case.model, specs, case.prompts, **options).intervened


def time_sweep(case: Case, specs: list[Ablation], config: Config) -> dict[str, Any]:
    """Seconds per intervention of whole sweeps, and seconds of plain forwards before and after each."""
    seconds: list[float] = []
    peaks = []
    swept(case, specs[:1], config)  # what only a first run costs
    plain = timed(case.plain, case)
    while sum(seconds) * len(specs) < LONG_ENOUGH:
        forget_peak(case)
        took, values = clock(partial(swept, case, specs, config, progress=not seconds), case)
        peaks.append(peak(case))
        seconds.append(took / len(specs))
        plain += timed(case.plain, case, took)
    return {
        "n": len(specs),
        "seconds": seconds,
        "plain": plain,
        "peak": max(peaks, key=lambda p: p or 0),
        "values": values,
    }


def time_other(case: Case, specs: list[Ablation], letter: Letter, engine: str) -> dict[str, Any]:
    """Seconds of single interventions, each after a plain forward."""
    seconds: list[float] = []
    plain: list[float] = []
    found: dict[Ablation, LastLogits] = {}
    forget_peak(case)
    last_logits = OTHERS[engine][1](case, specs)
    last_logits(specs[0])
    with tqdm(desc=f"({letter}) {engine}", unit="intervention", leave=False, delay=LONG_ENOUGH) as bar:
        while sum(seconds) < LONG_ENOUGH:
            for spec in specs:
                plain.append(clock(case.plain, case)[0])
                took, logits = clock(partial(last_logits, spec), case)
                seconds.append(took)
                found.setdefault(spec, logits)  # evaluated below: what it allocates would count for the next forward
                bar.update()
    values = np.stack([logit_diff(found[spec], case.batch).cpu().numpy() for spec in specs])
    return {"n": len(specs), "seconds": seconds, "plain": plain, "peak": peak(case), "values": values}


def clock(function: Callable[[], Any], case: Case) -> tuple[float, Any]:
    """Seconds, and what came out."""
    synchronize = torch.cuda.synchronize if case.model.device.type == "cuda" else lambda: None
    synchronize()
    started = case.seconds()
    value = function()
    synchronize()
    return case.seconds() - started, value


def timed(function: Callable[[], Any], case: Case, long_enough: float = math.inf) -> list[float]:
    """Seconds of each of a few runs, or of as many as take long enough, at most as long as a measurement."""
    seconds: list[float] = []
    while len(seconds) < AT_LEAST or sum(seconds) < min(long_enough, LONG_ENOUGH):
        seconds.append(clock(function, case)[0])
    return seconds


def forget_peak(case: Case) -> None:
    """Start a new peak of memory from what is held now."""
    if case.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            print("the peak of memory cannot be reset here: it is that of the process so far", file=sys.stderr)


def peak(case: Case) -> int | None:
    """Bytes at the peak; None where the system does not tell."""
    if case.model.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def ratio(timing: dict[str, Any]) -> float:
    """Time per intervention over one plain forward."""
    return float(np.median(timing["seconds"]) / np.median(timing["plain"]))


# -- growth ------------------------------------------------------------------------------------------------------------


def grow(config: Config) -> dict[str, Any]:
    """Time the engine on (a) at several numbers of prompts, of heads, and lengths of prompts."""
    case, facts = start(config)
    started = time.monotonic()
    specs = all_heads(model_config(config))
    with torch.inference_mode():
        plain = float(np.median(timed(case.plain, case)))
    cost = 1.2 * plain * bound(specs, count_pieces(model_config(config), config.prompts, config.tokens), config)
    # How many heads the budget allows; the points below multiply the work by these factors, and each is run a few times.
    work = AT_LEAST * (sum(GROWTH) + sum(GROWTH) / GROWTH[-1] + len(GROWTH))
    heads = min(len(specs), max(GROWTH[-1], int(config.budget_minutes * 60 / (work * cost))))
    cases = [("prompts", dataclasses.replace(config, prompts=config.prompts * f), heads) for f in GROWTH]
    cases += [("heads", config, heads * f // GROWTH[-1]) for f in GROWTH]
    cases += [
        ("tokens", dataclasses.replace(config, prompts=config.prompts // f, tokens=config.tokens * f), heads)
        for f in GROWTH
        if config.prompts % f == 0
    ]
    points = []
    for axis, at, n in tqdm(cases, desc="growth", unit="point"):
        part = [specs[i] for i in draw(specs, n, config, "growth")]
        moved = Case(case.model, random_prompts(at), case.batch, case.seconds)
        swept(moved, part[:1], at)
        seconds = timed(partial(swept, moved, part, at), moved)
        point = {"prompts": at.prompts, "tokens": at.tokens, "heads": len(part), "seconds": float(np.median(seconds))}
        points.append({"axis": axis, **point, "seconds_each": seconds})
    return {**facts, "points": points, "measuring": time.monotonic() - started}


def slopes(points: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each axis its points, and the slope of log seconds against log size with its standard error (None for one point)."""
    fitted = {}
    for axis in dict.fromkeys(point["axis"] for point in points):
        own = [
            {name: value for name, value in point.items() if name != "axis"}
            for point in points
            if point["axis"] == axis
        ]
        line = linregress(*np.log([[point[axis], point["seconds"]] for point in own]).T) if len(own) > 2 else None
        fitted[axis] = {
            "points": own,
            "slope": line and float(line.slope),
            "standard_error": line and float(line.stderr),
        }
    return fitted


# -- tables ------------------------------------------------------------------------------------------------------------


def machine(config: Config, threads: int) -> dict[str, Any]:
    """The processor, or the GPU, and how much of it was used."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name(config.device) if str(config.device).startswith("cuda") else None
    return {"processor": name, "cores": cores, "threads": threads, "gpu": gpu, "torch": torch.__version__}


def title(config: Config, measured: dict[str, Any]) -> str:
    """The model, the prompts and the machine in two lines."""
    shape, on = model_config(config), machine(config, measured["threads"])
    where = on["gpu"] or f"{on['processor']}, {on['cores']} cores, {on['threads']} threads"
    return (
        f"{shape.model_type}, {n_layers(shape)} layers, hidden {shape.hidden_size}, {n_heads(shape)} heads, "
        f"vocabulary {shape.vocab_size:,}, {config.dtype}, {config.model or 'random weights'}; {config.prompts} prompts of "
        f"{config.tokens} tokens.\n"
        f"{where}; torch {on['torch']}."
    )


def result_table(rows: list[dict[str, Any]]) -> str:
    """One row per workload and engine, in Markdown."""
    lines = [
        "| workload | engine | n | time per intervention / plain forward | counted bound | time / bound | × faster than hooks "
        "| largest difference | peak memory (plain forward's), GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        part = f"{row['n']} of {row['of']}" if row["engine"] != OURS or row["n"] < row["of"] else f"all {row['n']}"
        memory = "–"
        if row["peak_memory"] is not None:
            memory = f"{row['peak_memory'] / 2**30:.2f} ({row['plain_peak_memory'] / 2**30:.2f})"
        cells = (
            f"({row['workload']})",
            row["engine"],
            part,
            f"{row['ratio']:.4f}" if row["ratio"] < 0.1 else f"{row['ratio']:.3f}",
            f"{row['bound']:.4f}",
            f"{row['ratio'] / row['bound']:.2f}",
            f"{row['faster_than_hooks']:.1f}",
            f"{row['difference']:.1e}",
            memory,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def growth_table(growth: dict[str, dict[str, Any]]) -> str:
    """One row per point, in Markdown, the slopes below."""
    lines = [
        "| against | prompts | tokens each | heads | seconds | seconds / (prompt × token × head) |",
        "|---|---|---|---|---|---|",
    ]
    for axis, fitted in growth.items():
        for point in fitted["points"]:
            each = point["seconds"] / (point["prompts"] * point["tokens"] * point["heads"])
            lines.append(
                f"| {axis} | {point['prompts']} | {point['tokens']} | {point['heads']} | {point['seconds']:.3f} | {each:.2e} |"
            )
    what = {"tokens": "tokens per prompt, at one number of tokens"}
    said = [
        f"{what.get(axis, axis)}: {fitted['slope']:.2f} ± {fitted['standard_error']:.2f}"
        for axis, fitted in growth.items()
        if fitted["slope"] is not None
    ]
    return "\n".join([*lines, "", f"Slope of log time against log size (standard error): {'; '.join(said)}."])


def plain_config(config: Config) -> dict[str, Any]:
    values = dataclasses.asdict(config) | {"workload": list(config.workload)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(run(main, Config))

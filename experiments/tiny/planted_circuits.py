"""Planted circuits: models whose weights are set by hand, so that their circuits are known exactly.

How they are made
    Residual stream. Every feature has coordinates of its own (`FEATURES`): one-hot position, one-hot symbol, `moved` (symbols
    that a head copied for later heads), `out` (what the unembedding reads), `junk`, and a constant `LARGE`. The constant makes
    up nearly all of the norm, so that RMSNorm is a known scale, which the norm's weight takes back: what a head reads is the
    feature itself, to a part in a thousand. Gemma 2 norms what attention adds as well; there a bias of the output projection
    (the config allows one, Google's checkpoints have none) in the coordinate `anchor` does the same, and the norm's weight
    drops it again.

    Position. It is in the vocabulary: a token is a pair (symbol, position), so that previous-token heads read positions from the
    embedding. Queries and keys use only the slow half of the rotary dimensions, which turn by less than 1e-6 over a prompt.

    Heads. A planted head has a K/V head of its own, shared with query heads that are not planted. Scores are
    strength x (features of the query . features of the key); values are the symbols in one feature, added to others.

    Distractors. Every other query head and K/V head has random weights: they attend, read every feature but the constant, and
    write to all of them, `NOISE` at a time; those beside a planted head, which see its keys and values, to `junk` alone. So what
    is not planted has an effect too, small beside what is (measured: below a fiftieth of the weakest planted edge). MLPs have
    weights of zero, and no effect at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pyvene_ext.prompts.tokenized import TokenizedPrompts, answer_pairs

Architecture = Literal["llama", "gemma2"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "gemma2")

SYMBOLS = 8
LENGTH = 6  # tokens of a prompt; the first is <bos>
END = LENGTH - 1
POSITIONS = LENGTH + 1  # those of a prompt and that of its answer
PAD, BOS, FIRST = 0, 1, 2  # ids; then position by position every symbol

_SIZES = {
    "const": 1,
    "anchor": 1,
    "pos": POSITIONS,
    "sym": SYMBOLS,
    "moved": SYMBOLS,
    "out": SYMBOLS,
    "junk": 15,
}
_ENDS = dict(zip(_SIZES, accumulate(_SIZES.values()), strict=True))
FEATURES = {name: slice(end - _SIZES[name], end) for name, end in _ENDS.items()}  # coordinates of the residual stream
HIDDEN = sum(_SIZES.values())
NOISY = slice(FEATURES["pos"].start, HIDDEN)  # all but the two constants

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 32
GROUP = HEADS // KV_HEADS
SLOW = [*range(8, 16), *range(24, 32)]  # rotary pairs (i, i + 16) with a frequency of at most 1e-8
LARGE = 64.0  # the constant's size beside features of size 1
GAIN = 6.0  # logits of one unit of `out`
NOISE = 0.005

# Strengths of scores.
FIXED = 12.0  # where a head attends by position
SOFT = 5.0  # a match that leaves the softmax a gradient
SATURATED = 40.0  # a match that leaves it none

# What a query and a key read, `[n d_model]` each; their dot products add up to the score.
Terms = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PlantedHead:
    """One planted head: where it is, where it attends, which feature's symbols it reads and what it adds them to."""

    layer: int
    head: int
    scores: Terms
    reads: str
    writes: dict[str, float]

    @property
    def kv_head(self) -> int:
        """Its K/V head."""
        return self.head // GROUP


@dataclass(frozen=True)
class Planted:
    """A model with a known circuit, and prompts that show it.

    Attributes:
        name, architecture: as given to `planted`.
        model: float32, eval mode, eager attention, grouped K/V heads, no MLPs (their weights are zero).
        clean, corrupt: prompt i of each differ in the symbols that the answer depends on; `answer_ids` are (right for clean,
            right for corrupt) in both, so that the logit difference is positive on clean and negative on corrupt.
        edges: the circuit as path patching from corrupt into clean must find it, "sender->receiver" as in ground_truth/paths.py.
        dormant: edges of the circuit that carry nothing until the first head of a redundant pair is silent.
        heads: the planted heads by role, as (layer, query head).
        looks: for each role, the named positions (query, key) between which the head attends on clean; a dormant head's key is
            "bos".
    """

    name: str
    architecture: Architecture
    model: PreTrainedModel
    clean: TokenizedPrompts
    corrupt: TokenizedPrompts
    edges: frozenset[str]
    dormant: frozenset[str]
    heads: dict[str, tuple[int, int]]
    looks: dict[str, tuple[str, str]]


class Pair(NamedTuple):
    """One prompt in symbols, after <bos>: clean and corrupt, their answers, and positions by name, counted from <bos>."""

    clean: list[int]
    corrupt: list[int]
    right: int
    wrong: int
    positions: dict[str, int]


@dataclass(frozen=True)
class Case:
    """A circuit before it has a model; `prompt` makes a prompt of all symbols in some order."""

    heads: dict[str, PlantedHead]
    looks: dict[str, tuple[str, str]]
    prompt: Callable[[list[int]], Pair]
    edges: set[str]
    dormant: set[str] = field(default_factory=set)


def planted(name: str, architecture: Architecture, n_prompts: int = 8, seed: int = 0) -> Planted:
    """A model with the circuit called `name`, one of `CASES`. All positions are counted from <bos>, 0, to the end, 5.

    - k_composition: a previous-token head tells every position what stands before it; an induction head at the end looks for
      the position after its own symbol (previous token -> keys) and copies what stands there. Corrupt exchanges the symbols
      before the two candidates.
    - q_composition: a head copies the cue, the symbol at 1, to the end; a later head looks for that symbol (cue -> queries) in a
      shuffled list and copies it. Corrupt has another cue.
    - v_composition: a previous-token head copies a symbol one position on; a later head copies it from there (-> values).
      Corrupt has another symbol.
    - negative: as v_composition, and beside the head that copies the symbol to the output with weight 1.5 one with -0.5.
    - backup: a head copies the symbol at 1 to the output. A later one copies the same symbol, but does not attend to
      it while the output already holds it (output -> queries, subtracted). On clean the later one rests on <bos>.
    - saturated, saturated_k: as q_composition and k_composition, with scores so far apart that the softmax has no gradient.

    Raises ValueError for an unknown name or architecture.
    """
    if name not in CASES:
        raise ValueError(f"no planted circuit is called {name!r}; there are {', '.join(CASES)}.")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"no planted model has the architecture {architecture!r}; use {' or '.join(ARCHITECTURES)}.")
    case = CASES[name]()
    model = _model(architecture)
    with torch.no_grad():
        _wire(model, list(case.heads.values()), seed)
    clean, corrupt = _prompts(case, n_prompts, seed)
    return Planted(
        name=name,
        architecture=architecture,
        model=model.eval(),
        clean=clean,
        corrupt=corrupt,
        edges=frozenset(case.edges),
        dormant=frozenset(case.dormant),
        heads={role: (head.layer, head.head) for role, head in case.heads.items()},
        looks=case.looks,
    )


# Where heads attend


def _rows(feature: str) -> Tensor:
    """Reads a whole feature, `[n d_model]`."""
    return torch.eye(HIDDEN)[FEATURES[feature]]


def _same_symbol(query: str, key: str, strength: float) -> tuple[Tensor, Tensor]:
    """Score where the query's symbol in one feature is the key's in another."""
    return strength * _rows(query), _rows(key)


def _positions(pairs: Mapping[int, int], strength: float) -> tuple[Tensor, Tensor]:
    """Score from each query position to one key position."""
    position = _rows("pos")
    query = torch.zeros(POSITIONS, HIDDEN)
    for at, to in pairs.items():
        query[to] += strength * position[at]
    return query, position


def _rest(strength: float) -> tuple[Tensor, Tensor]:
    """Score of <bos>, where nothing is to be read, for every query before the end: the head acts at the end only."""
    query, key = _positions(dict.fromkeys(range(END), 0), strength)
    return query[:1], key[:1]


def _keys_at(weights: Mapping[int, float]) -> tuple[Tensor, Tensor]:
    """Score of key positions, the same for every query."""
    key = torch.zeros(1, HIDDEN)
    for at, weight in weights.items():
        key += weight * _rows("pos")[at]
    return _rows("const") / LARGE, key


def _previous(head: int, writes: dict[str, float]) -> PlantedHead:
    """A previous-token head of layer 0."""
    pairs = {at: at - 1 for at in range(1, POSITIONS)}
    return PlantedHead(0, head, [_positions(pairs, FIXED)], "sym", writes)


# The circuits


def _k_composition(strength: float) -> Case:
    def prompt(symbols: list[int]) -> Pair:
        a, b, c, d, *_ = symbols
        return Pair([a, b, c, d, a], [c, b, a, d, a], b, d, {"before": 1, "right": 2, "wrong": 4})

    return Case(
        heads={
            "previous": _previous(1, {"moved": 1.0}),
            "induction": PlantedHead(
                1, 2, [_same_symbol("sym", "moved", strength), _rest(2 * strength)], "sym", {"out": 1.0}
            ),
        },
        looks={"previous": ("right", "before"), "induction": ("end", "right")},
        prompt=prompt,
        edges={"embed->v.0.0", "z.0.1->k.1.1", "z.1.2->logits"},
    )


def _q_composition(strength: float) -> Case:
    def prompt(symbols: list[int]) -> Pair:
        a, c, d, e, *shuffled = symbols
        # An order of the list that differs between prompts, from symbols that are not in it.
        listed = sorted([a, c, d], key=lambda symbol: shuffled[(a, c, d).index(symbol)])
        return Pair([a, *listed, e], [c, *listed, e], a, c, {"cue": 1, "right": 2 + listed.index(a)})

    own = _keys_at({1: -2 * strength, END: -2 * strength})  # neither the cue nor the end itself is in the list
    return Case(
        heads={
            "fetch": PlantedHead(0, 3, [_positions({END: 1}, FIXED), _rest(FIXED)], "sym", {"moved": 1.0}),
            "find": PlantedHead(
                2, 0, [_same_symbol("moved", "sym", strength), own, _rest(2 * strength)], "sym", {"out": 1.0}
            ),
        },
        looks={"fetch": ("end", "cue"), "find": ("end", "right")},
        prompt=prompt,
        edges={"embed->v.0.1", "z.0.3->q.2.0", "z.2.0->logits"},
    )


def _moved_symbol(symbols: list[int]) -> Pair:
    a, c, d, e, f, g, *_ = symbols
    return Pair([d, a, e, f, g], [d, c, e, f, g], a, c, {"symbol": 2, "after": 3})


def _v_composition() -> Case:
    return Case(
        heads={
            "previous": _previous(0, {"moved": 1.0}),
            "copy": PlantedHead(1, 3, [_positions({END: 3}, FIXED), _rest(FIXED)], "moved", {"out": 1.0}),
        },
        looks={"previous": ("after", "symbol"), "copy": ("end", "after")},
        prompt=_moved_symbol,
        edges={"embed->v.0.0", "z.0.0->v.1.1", "z.1.3->logits"},
    )


def _negative() -> Case:
    return Case(
        heads={
            "previous": _previous(2, {"moved": 1.0}),
            "positive": PlantedHead(2, 1, [_positions({END: 3}, FIXED), _rest(FIXED)], "moved", {"out": 1.5}),
            "negative": PlantedHead(2, 2, [_positions({END: 3}, FIXED), _rest(FIXED)], "moved", {"out": -0.5}),
        },
        looks={"previous": ("after", "symbol"), "positive": ("end", "after"), "negative": ("end", "after")},
        prompt=_moved_symbol,
        edges={"embed->v.0.1", "z.0.2->v.2.0", "z.0.2->v.2.1", "z.2.1->logits", "z.2.2->logits"},
    )


def _backup() -> Case:
    def prompt(symbols: list[int]) -> Pair:
        a, c, d, e, f, g, *_ = symbols
        return Pair([a, d, e, f, g], [c, d, e, f, g], a, c, {"symbol": 1})

    strength = 2 * FIXED
    symbol = _keys_at({0: strength / 2, 1: strength})  # or else <bos>
    said = _same_symbol("out", "sym", -strength)
    return Case(
        heads={
            "primary": PlantedHead(0, 0, [_positions({END: 1}, FIXED), _rest(FIXED)], "sym", {"out": 1.0}),
            "backup": PlantedHead(1, 2, [symbol, said, _rest(2 * strength)], "sym", {"out": 1.0}),
        },
        looks={"primary": ("end", "symbol"), "backup": ("end", "bos")},
        prompt=prompt,
        # The first head's wrong symbol, and a key other than what it said, wake the second.
        edges={"embed->v.0.0", "z.0.0->logits", "z.0.0->q.1.2", "embed->k.1.1"},
        dormant={"embed->v.1.1", "z.1.2->logits"},
    )


CASES: dict[str, Callable[[], Case]] = {
    "k_composition": lambda: _k_composition(SOFT),
    "q_composition": lambda: _q_composition(SOFT),
    "v_composition": _v_composition,
    "negative": _negative,
    "backup": _backup,
    "saturated": lambda: _q_composition(SATURATED),
    "saturated_k": lambda: _k_composition(SATURATED),
}


# Weights


def _model(architecture: Architecture) -> PreTrainedModel:
    """A model of the planted sizes; its weights are written over by `_wire`."""
    common: dict[str, Any] = {
        "vocab_size": FIRST + POSITIONS * SYMBOLS,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e16},
        "attn_implementation": "eager",
    }
    if architecture == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**common))
    else:
        # Soft-caps and sliding windows are Gemma 2's own: 50, 30 and every other layer.
        own: dict[str, Any] = {"query_pre_attn_scalar": HEAD_DIM, "attention_bias": True, "sliding_window": 16}
        model = Gemma2ForCausalLM(Gemma2Config(**common, **own))
    return model.float()


def _wire(model: PreTrainedModel, heads: list[PlantedHead], seed: int) -> None:
    """Set every weight of a model: norms, embeddings, distractors, then the planted heads in their places."""
    gemma = model.config.model_type == "gemma2"
    for parameter in model.parameters():
        parameter.zero_()
    decoder = model.model
    _unit_features(decoder.norm, gemma)
    for layer in decoder.layers:
        _unit_features(layer.input_layernorm, gemma)
        if gemma:
            _unit_features(layer.post_attention_layernorm, gemma)
            layer.post_attention_layernorm.weight[FEATURES["anchor"]] = -1.0  # 1 + weight = 0
            layer.self_attn.o_proj.bias[FEATURES["anchor"]] = LARGE
    decoder.embed_tokens.weight.copy_(_embeddings() / (HIDDEN**0.5 if gemma else 1.0))
    answers = slice(token(0, LENGTH), token(0, LENGTH) + SYMBOLS)
    model.lm_head.weight[answers, FEATURES["out"]] = GAIN * torch.eye(SYMBOLS)

    generator = torch.Generator().manual_seed(seed)
    for layer in decoder.layers:
        _distract(layer.self_attn, generator)
    taken = [(head.layer, head.kv_head) for head in heads]
    assert len(set(taken)) == len(taken), "two planted heads would share a K/V head"
    for head in heads:
        _plant(decoder.layers[head.layer].self_attn, head)


def _unit_features(norm: nn.Module, gemma: bool) -> None:
    """Make a norm give features as they are: the constant makes the root mean square LARGE / sqrt(d_model), nearly."""
    weight: Any = norm.weight
    weight.fill_(LARGE / HIDDEN**0.5 - (1.0 if gemma else 0.0))


def _embeddings() -> Tensor:
    """Constant, position and symbol of every token `[vocab d_model]`; <bos> has no symbol and <pad> nothing but the constant."""
    weight = torch.zeros(FIRST + POSITIONS * SYMBOLS, HIDDEN)
    weight[:, FEATURES["const"]] = LARGE
    weight[BOS] += _rows("pos")[0]
    for position in range(POSITIONS):
        for symbol in range(SYMBOLS):
            weight[token(symbol, position)] += _rows("pos")[position] + _rows("sym")[symbol]
    return weight


def token(symbol: int, position: int) -> int:
    """The id of a symbol at a position."""
    return FIRST + position * SYMBOLS + symbol


def _distract(attention: nn.Module, generator: torch.Generator) -> None:
    """Random weights for every head of a layer: scores and values of the order of 1, small in what they write."""
    for name in ("q_proj", "k_proj", "v_proj"):
        weight: Any = attention.get_submodule(name).weight
        weight[:, NOISY] = 0.3 * torch.randn(weight[:, NOISY].shape, generator=generator)
    written: Any = attention.get_submodule("o_proj").weight
    written[NOISY] = NOISE * torch.randn(written[NOISY].shape, generator=generator)


def _plant(attention: nn.Module, head: PlantedHead) -> None:
    """One planted head: its query, its K/V head's key and value, and what it writes."""
    axes = {"q": 0, "k": 0, "v": 0, "o": 1}  # which axis of the weight the heads are on
    weights: dict[str, Any] = {name: attention.get_submodule(f"{name}_proj").weight for name in axes}
    q, k, v, o = (weights[name].unflatten(axis, (-1, HEAD_DIM)) for name, axis in axes.items())
    query, key = (torch.cat(side) for side in zip(*head.scores, strict=True))
    dims = SLOW[: len(query)]
    beside = slice(head.kv_head * GROUP, (head.kv_head + 1) * GROUP)
    o[: FEATURES["junk"].start, beside] = 0.0
    o[:, head.head] = 0.0
    q[head.head] = 0.0
    k[head.kv_head] = 0.0
    v[head.kv_head] = 0.0
    q[head.head, dims] = HEAD_DIM**0.5 * query
    k[head.kv_head, dims] = key
    v[head.kv_head, :SYMBOLS] = _rows(head.reads)
    for feature, gain in head.writes.items():
        o[FEATURES[feature], head.head, :SYMBOLS] = gain * torch.eye(SYMBOLS)


def _prompts(case: Case, count: int, seed: int) -> tuple[TokenizedPrompts, TokenizedPrompts]:
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt, answers, positions = [], [], [], []
    for _ in range(count):
        pair = case.prompt(torch.randperm(SYMBOLS, generator=generator).tolist())
        clean.append(_ids(pair.clean))
        corrupt.append(_ids(pair.corrupt))
        answers.append((token(pair.right, LENGTH), token(pair.wrong, LENGTH)))
        named = {"bos": 0, "end": END, "last": END, **pair.positions}
        positions.append({name: at - LENGTH for name, at in named.items()})
    clean_set, corrupt_set = (
        TokenizedPrompts(tuple(ids), answer_pairs(answers), tuple(positions), PAD) for ids in (clean, corrupt)
    )
    return clean_set, corrupt_set


def _ids(symbols: list[int]) -> tuple[int, ...]:
    return (BOS, *(token(symbol, at) for at, symbol in enumerate(symbols, start=1)))

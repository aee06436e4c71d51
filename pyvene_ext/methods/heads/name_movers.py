"""Name movers: names in prompts, how heads attend to them, and what heads write in their direction.

    found = find_names(prompt_set, tokenizer)              # prompts whose names differ in some token; the others, and why
    prompts = found.tokenize(tokenizer)
    attention = attention_to(model, prompts, found.tokens) # [query kind layer head prompt]
    projection = head_projections(model, prompts, found.ids)

A name mover (Wang et al. 2022, section 3.1) is a head that attends from the end to a name and writes in the direction of that
name's unembedding, in proportion to its attention.

The paper's names are single tokens. For names of several tokens (ours), the token that distinguishes them counts: the tokens that
IO and S begin with are appended to the prompt, so that the next one decides; attention to a name is summed over its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import card_of, dimensions, n_heads, n_layers
from modelcards.attention_taps import output_weight
from pyvene_ext.intervenable.statistics import Place, Reference
from pyvene_ext.methods.heads.patterns import read_patterns
from pyvene_ext.models.devices import no_gradients
from pyvene_ext.models.hooks import check_projections
from pyvene_ext.models.modes import evaluating
from pyvene_ext.models.norms import FrozenNorm
from pyvene_ext.models.replay import Replay
from pyvene_ext.prompts.encoding import encode, tokens_in_span
from pyvene_ext.prompts.prompt import Text
from pyvene_ext.prompts.sets import Prompt, PromptSet
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts

KINDS = ("io", "s", "s1", "s2")
QUERIES = (-1, -2)  # END and END-1
Groups = Sequence[Sequence[Sequence[int]]]  # tokens, counted from the prompt's first, by prompt and group


# -- names -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """The names in those prompts whose names differ in some token.

    Attributes:
        prompts: those prompts, in order.
        kinds: io and s (all occurrences of IO and of S), s1 and s2 (one mention of S each), and the prompts' own positions.
        ids: the first token by which the name as an answer differs from S (IO) or from IO (the others); of a name of one token,
            that.
        tokens: where the name is, counted from the first token, by prompt and kind.
        at: the token of the kind's first mention that a copy score reads: the one in `ids`, or, where the text has the name in
            other tokens (as at the beginning of a text), its last, by prompt and kind.
        several: the prompts, by their number in the set, with a name that is not everywhere one token and nothing else.
        dropped: the reason for every other prompt, by its number in the set.
    """

    prompts: PromptSet
    kinds: tuple[str, ...]
    ids: Int[np.ndarray, "kind prompt"]
    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    at: tuple[tuple[int, ...], ...]
    several: tuple[int, ...]
    dropped: dict[int, str]

    def tokenize(
        self, tokenizer: PreTrainedTokenizerBase, text: Text = "clean", max_length: int | None = None
    ) -> TokenizedPrompts:
        """Tokenise the prompts with the tokens that begin both names, so that the next token distinguishes them.

        Args:
            tokenizer: the one that the names were found with.
            text: "clean" or "corrupt".
            max_length: the most tokens that a prompt may have.

        Returns:
            The prompts; those of the clean texts have the position of every kind (`at`) under its name.

        Raises:
            ValueError: see `PromptSet.tokenize`.
        """
        prompts = self.prompts.tokenize(tokenizer, text, "first_difference", max_length)
        if text == "corrupt":
            return prompts
        positions = tuple(
            places | {kind: token - len(ids) for kind, token in zip(self.kinds, at, strict=True)}
            for places, at, ids in zip(prompts.positions, self.at, prompts.input_ids, strict=True)
        )
        return replace(prompts, positions=positions)

    @property
    def whole(self) -> tuple[int, ...]:
        """The kinds that cover all occurrences of a name, so that each name counts once."""
        return tuple(number for number, kind in enumerate(self.kinds) if kind not in ("s1", "s2"))


def copied_names(names: Names) -> tuple[tuple[str, ...], Int[np.ndarray, "asked place prompt"]]:
    """Choose the mentions for copy scores, and the tokens whose ranks are asked for.

    Args:
        names: of the prompts.

    Returns:
        The kinds of the mentions; and the tokens of their own names and, for comparison, of another name of the same prompt.
    """
    places = tuple(kind for kind in names.kinds if kind != "s")
    own = [names.ids[names.kinds.index(place)] for place in places]
    other = [names.ids[names.kinds.index("s" if place == "io" else "io")] for place in places]
    return places, np.stack([own, other])


def find_names(prompts: PromptSet, tokenizer: PreTrainedTokenizerBase, others: Sequence[str] = ()) -> Names:
    """Find IO, S and the names at other positions, in all prompts where tokens tell each from IO, and IO from S.

    Args:
        prompts: IOI prompts, or others with two names or more.
        tokenizer: the model's, a fast one.
        others: positions of the prompts that hold a name.

    Returns:
        The names of these prompts, and why the others are dropped.

    Raises:
        ValueError: no prompt has names that tokens tell apart, a prompt lacks a position, or the tokenizer is slow or does not
            know a word.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot say where a name is; load the fast one."
        )
    kept: list[tuple[Prompt, dict[str, _Name]]] = []
    several, dropped = [], {}
    for index, prompt in enumerate(prompts):
        lacking = [position for position in others if position not in prompt.positions]
        if lacking:
            own = f"its own are {', '.join(prompt.positions)}" if prompt.positions else "it has none of its own"
            raise ValueError(f"prompt {index} of {prompts.name} has no position {lacking[0]!r} for a name; {own}.")
        names = _names(prompt, tokenizer, others, f"prompt {index} of {prompts.name}")
        if isinstance(names, str):
            dropped[index] = names
            continue
        kept.append((prompt, names))
        if any(name.several for name in names.values()):
            several.append(index)
    if not kept:
        first = next(iter(dropped))
        raise ValueError(
            f"none of the {len(prompts)} prompts of {prompts.name} has names that tokens tell apart (prompt {first}: "
            f"{dropped[first]}); use other names, or another model."
        )
    kinds = (*KINDS, *others)
    return Names(
        prompts=PromptSet(tuple(prompt for prompt, _ in kept), prompts.name, prompts.description),
        kinds=kinds,
        ids=np.array([[names[kind].id for _, names in kept] for kind in kinds]),
        tokens=tuple(tuple(names[kind].tokens for kind in kinds) for _, names in kept),
        at=tuple(tuple(names[kind].at for kind in kinds) for _, names in kept),
        several=tuple(several),
        dropped=dropped,
    )


class _Name(NamedTuple):
    """A name, or one mention of it, in one prompt, as `Names` describes."""

    id: int
    tokens: tuple[int, ...]
    at: int
    several: bool


def _names(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, others: Sequence[str], where: str
) -> dict[str, _Name] | str:
    """Every kind of name; or a message about a name that no token tells from another, or that is not tokens of its own."""
    text = prompt.text
    if not isinstance(text, str) or prompt.io_token is None or prompt.io_name is None or prompt.s_name is None:
        raise ValueError(f"{where} is not a text with two names; give it io_name and s_name.")
    spans = {name: at for name, at in prompt.spans("clean").items() if isinstance(at, tuple)}
    for place, name in {
        "io": prompt.io_name,
        "s1": prompt.s_name,
        **{other: prompt.positions[other] for other in others},
    }.items():
        if place not in spans:
            raise ValueError(
                f"{where}: {name!r}, the place {place!r}, does not occur as a word of its own in the text."
            )
    ids, offsets = encode(tokenizer, text, where)
    before_answer = prompt.io_token.removesuffix(prompt.io_name)
    places = {"io": ["io"], "s": ["s1", "s2"], **{position: [position] for position in others}}
    names = {kind: text[slice(*spans[of_kind[0]])] for kind, of_kind in places.items()}
    answers, mentions = {}, {}
    for kind, name in names.items():
        mentions[kind] = [tokens_in_span(offsets, *spans[place]) for place in places[kind]]
        for held in mentions[kind]:
            # A token may hold what is before a name, but what follows it makes the token another one.
            if not held or not text[offsets[held[0]][0] : offsets[held[-1]][1]].rstrip().endswith(name):
                pieces = " ".join(map(repr, tokenizer.convert_ids_to_tokens([ids[i] for i in held])))
                return f"{name!r} is in the text as {pieces or 'no token'}"
        longer = encode(tokenizer, text + before_answer + name, where).ids
        if longer[: len(ids)] != ids or len(longer) == len(ids):
            return f"{name!r} as an answer would have no token of its own"
        answers[kind] = longer[len(ids) :]
    found = {}
    for kind, own in answers.items():
        other = answers["s" if kind == "io" else "io"]
        differ = (i for i, (mine, its) in enumerate(zip(own, other, strict=False)) if mine != its)
        first = next(differ, None if own != other else 0)  # another position may hold IO too
        if first is None:
            io_or_s = names["s" if kind == "io" else "io"]
            return f"the tokens of one of {names[kind]!r} and {io_or_s!r} begin the other"
        forms = [own, *([ids[i] for i in held] for held in mentions[kind])]
        runs = [
            range(start, start + len(form))
            for form in forms
            for start in range(len(ids))
            if ids[start : start + len(form)] == form
        ]
        alone = all(text[slice(*offsets[held[0]])].strip() == names[kind] for held in mentions[kind])
        several = len(own) > 1 or not alone

        read = [
            held[first] if [ids[i] for i in held] == own else next((i for i in held if ids[i] == own[first]), held[-1])
            for held in mentions[kind]
        ]
        found[kind] = _Name(own[first], tuple(sorted(set().union(*runs))), read[0], several)
        if kind == "s":
            for place, held, at in zip(places[kind], mentions[kind], read, strict=True):
                found[place] = _Name(own[first], tuple(held), at, several)
    return found


# -- where heads look --------------------------------------------------------------------------------------------------


def attention_to(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    groups: Groups,
    queries: Sequence[int] = QUERIES,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Float32[np.ndarray, "query group layer head prompt"]:
    """Sum attention probabilities from some tokens over groups of tokens.

    Args:
        model: with a card, and attention patterns that can be read (eager or sdpa).
        prompts: the prompts.
        groups: tokens by prompt and group.
        queries: negative positions of the queries; -1 is the last token.
        batch_size: prompts per forward pass.
        progress: show a bar.

    Returns:
        Attention by query, group, head and prompt.
    """
    n_groups = len(groups[0])
    found = np.empty((len(queries), n_groups, n_layers(model.config), n_heads(model.config), len(prompts)), np.float32)

    def on_pattern(layer: int, batch: Batch, pattern: Float[Tensor, "batch head query key"]) -> None:
        from_queries = pattern[:, :, list(queries)].float().cpu()  # padding is on the left
        width = from_queries.shape[-1]
        in_group = torch.zeros(len(batch.index), width, n_groups)
        for row, (prompt, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
            for group, tokens in enumerate(groups[prompt]):
                in_group[row, [width - length + token for token in tokens], group] = 1
        summed = torch.einsum("bhqk,bkg->qghb", from_queries, in_group)
        found[:, :, layer, :, batch.index] = summed.permute(3, 0, 1, 2).numpy()  # NumPy puts the indexed axis first

    read_patterns(model, prompts, on_pattern, batch_size=batch_size, progress=progress)
    return found


def named_places(names: Names, prompts: TokenizedPrompts) -> tuple[tuple[str, ...], Groups]:
    """Assign every token of each prompt to one group: the names, the first token, END-1, END, and all others.

    Args:
        names: of the prompts.
        prompts: the same prompts as tokens.

    Returns:
        The groups' names, and their tokens by prompt; a token that belongs to several groups is in the first of them.
    """
    kinds = [kind for kind in names.kinds if kind != "s"]
    groups = []
    for tokens, ids in zip(names.tokens, prompts.input_ids, strict=True):
        wanted = [tokens[names.kinds.index(kind)] for kind in kinds]
        taken: set[int] = set()
        mine = []
        for group in (*wanted, (0,), (len(ids) - 2,), (len(ids) - 1,), range(len(ids))):
            mine.append([token for token in group if token not in taken])
            taken |= set(group)
        groups.append(mine)
    return (*kinds, "first", "end-1", "end", "other"), groups


# -- what heads write --------------------------------------------------------------------------------------------------


def head_projections(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    ids: Int[np.ndarray, "kind prompt"],
    *,
    fold_norm: bool = False,
    batch_size: int = 8,
    progress: bool = True,
) -> Float32[np.ndarray, "kind layer head prompt"]:
    """Project what each head adds to the residual stream at the last token on the unembeddings of some tokens, in float32.

    A head's contribution is taken after a post-norm (Gemma 2), with its scale frozen at the clean run; the output projection's
    bias belongs to no head. Definition: Wang et al. 2022, section 3.1.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        prompts: the prompts.
        ids: the tokens, for each prompt.
        fold_norm: apply the final norm too, with its scale frozen likewise, its gain and, where it subtracts the mean, that;
            without, as published.
        batch_size: prompts per forward pass.
        progress: show a bar.

    Returns:
        Projections by kind of token, head and prompt.

    Raises:
        ValueError: `ids` do not fit, or weights are not accessible.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no logits over a vocabulary; load the model as a causal language model."
        )
    if output_weight(head) is None:
        raise ValueError(
            f"the unembedding of {type(model).__name__} has no accessible weights; load the model without quantisation and "
            "offloading, and merge adapters."
        )
    check_projections(model)
    if ids.ndim != 2 or ids.shape[1] != len(prompts) or not 0 <= ids.min() <= ids.max() < len(head.weight):
        raise ValueError(f"ids must be [kind {len(prompts)}] tokens of the model, one for each prompt.")
    card, replay, layers = card_of(model), Replay(model), range(n_layers(model.config))
    places: list[Place] = [("z", layer) for layer in layers]
    end: Place = ("resid_post", layers[-1])
    reference = Reference.compute(
        model, prompts, [*places, end], bank=("last",), batch_size=batch_size, progress=progress
    )

    def last(place: Place) -> Float[Tensor, "prompt *head d"]:
        return torch.cat([reference.rows(place, prompt, "last") for prompt in range(len(prompts))])

    found = np.empty((len(ids), len(layers), n_heads(model.config), len(prompts)), np.float32)
    with evaluating(model), no_gradients(model):
        device = head.weight.device
        directions = head.weight[torch.from_numpy(ids.T).to(device)].float()  # prompt kind d_model
        if fold_norm:
            norm = FrozenNorm(replay.module("final_norm"), dimensions(model.config)["d_model"], "the final norm")
            directions = norm.direction(last(end).to(device).float(), directions)
        for layer in layers:
            z = last(("z", layer)).flatten(1)
            weight = replay.projection(layer)
            assert weight is not None  # `check_projections` has checked it
            scaled = directions
            if card.post_norm_scale is not None:
                attention = replay.module("attention_value_output", layer)(z.to(weight)).float()
                scale = card.post_norm_scale(replay.module("attention_contribution", layer), attention)
                scaled = directions * scale[:, None].to(device)
            by_input = (
                card.residual_scale(model.config) * scaled @ weight.to(device).float().T * z.to(device).float()[:, None]
            )
            by_head = by_input.unflatten(-1, (n_heads(model.config), -1)).sum(-1)
            found[:, layer] = by_head.permute(1, 2, 0).cpu().numpy()
    return found

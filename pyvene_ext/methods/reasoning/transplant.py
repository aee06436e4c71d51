"""Head transplants: heads of one model run inside another, with the maps between two residual streams that this requires.

    paired = pair_texts(texts, host_tokenizer, donor_tokenizer)
    maps = fit_maps(host, donor, paired, [(4, 2)])[4, 2]
    with transplanted(host, [Transplant((4, 1), donor, (2, 5), maps)]):
        host.generate(...)  # or evaluate(host, ...), or a forward pass

Head 5 of layer 2 of the donor replaces head 1 of layer 4 of the host: its input is x A, where x is the host's residual stream
before the block, and what it would add to its own model's stream is mapped by B and added to the host's. Everything between A and
B is the donor's: the norm before attention, queries, keys and values of all positions with their biases (the head's own keys and
values, which are not in the host's cache), position embedding, scale, soft-cap, window, output projection. What a head adds to
the stream is the component `head_contribution` in both models: without the bias of the output projection, which belongs to no
head, and after Gemma 2's post-norm with the norm's scale computed from the model's own heads. So in a Gemma 2 host the other
heads' contributions do not change.

A is affine and B linear, because a contribution is a difference of streams, in which an offset cancels. A is fitted on what
enters the two blocks, B on the streams after their attention, where the head's output is added (or after the block, if attention
and MLP run in parallel). Without maps, if both models use the same residual basis, x and the output are used as they are, and a
head transplanted into its own place changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Int
from scipy.linalg import orthogonal_procrustes
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import Taps, card_of, dimensions, head_dim, n_heads, n_layers, n_positions
from modelcards.attention_taps import output_weight
from pyvene_ext.io.seeds import rng
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.hooks import (
    StopForward,
    Where,
    hook_component,
    record_activations,
    replace_forward,
)
from pyvene_ext.models.latent_steps import is_unrolling
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.encoding import encode
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.stats.controls import Head, head_label

Method = Literal["ridge", "procrustes"]
LayerPair = tuple[int, int]  # of the host and of the donor
STEADY = 1e-4  # the default alpha of ridge, for numerical stability


# -- maps --------------------------------------------------------------------------------------------------------------


class Paired(NamedTuple):
    """The same texts tokenised by two tokenizers into the same pieces; their tokens correspond, counted from the last one.

    Attributes:
        host: the texts as the host's tokens.
        donor: the texts as the donor's tokens.
    """

    host: TokenizedPrompts
    donor: TokenizedPrompts


@dataclass(frozen=True)
class MapFit:
    """How a map was fitted, and how well.

    Attributes:
        method: ridge or procrustes.
        alpha: the penalty of ridge; None for a rotation.
        d_in: width of the stream that is mapped.
        d_out: width of the target stream.
        train_tokens: number of training tokens, each context counted once.
        test_tokens: number of test tokens, likewise.
        r2_train: share of the variance of the target stream, over all dimensions together, that the map explains.
        r2_test: the same on the test tokens.
    """

    method: Method
    alpha: float | None
    d_in: int
    d_out: int
    train_tokens: int
    test_tokens: int
    r2_train: float
    r2_test: float

    @property
    def short(self) -> bool:
        """Whether there were too few tokens to determine the map, so that alpha did in part."""
        return self.train_tokens <= max(self.d_in, self.d_out)

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data for a table."""
        return {**asdict(self), "short": self.short}


@dataclass(frozen=True)
class StreamMap:
    """An affine map from one model's residual stream to another's: x W + b.

    Attributes:
        weight: W.
        offset: b.
        fit: how it was fitted.
    """

    weight: Float32[Tensor, "d_in d_out"]
    offset: Float32[Tensor, " d_out"]
    fit: MapFit | None = None

    def __call__(self, x: Float[Tensor, "*pos d_in"]) -> Float32[Tensor, "*pos d_out"]:
        """Map a stream."""
        return self.change(x) + self.offset.to(x.device)

    def change(self, x: Float[Tensor, "*pos d_in"]) -> Float32[Tensor, "*pos d_out"]:
        """Map a difference of two streams, without the offset."""
        return x.float() @ self.weight.to(x.device)


class Maps(NamedTuple):
    """The two maps of a transplant.

    Attributes:
        into: A, from the host's stream to the donor's.
        back: B, from the donor's stream to the host's.
    """

    into: StreamMap
    back: StreamMap


def pair_texts(
    texts: Sequence[str], host_tokenizer: PreTrainedTokenizerBase, donor_tokenizer: PreTrainedTokenizerBase
) -> Paired:
    """Tokenise texts with both models' tokenizers.

    A token that only one of the tokenizers prepends has no counterpart.

    Args:
        texts: the texts.
        host_tokenizer: the host's.
        donor_tokenizer: the donor's.

    Returns:
        The texts as both models' tokens.

    Raises:
        ValueError: the tokenizers cut a text into different pieces; the message names the text and the place.
    """
    rows: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([], [])
    for number, text in enumerate(texts):
        ends = []
        for tokenizer, of_model in zip((host_tokenizer, donor_tokenizer), rows, strict=True):
            ids, offsets = encode(tokenizer, text, f"text {number}")
            of_model.append(tuple(ids))
            ends.append([end for _, end in offsets if end])
        if ends[0] != ends[1]:
            first = next(min(filter(None, pair)) for pair in zip_longest(*ends) if pair[0] != pair[1])
            raise ValueError(
                f"the donor has another vocabulary than the host, and only one of them ends a token of text {number} after "
                f"{text[max(first - 12, 0) : first]!r}, so that their tokens do not correspond; use a donor whose tokenizer cuts "
                "the texts into the same pieces."
            )
    return Paired(*(TokenizedPrompts(tuple(of_model)) for of_model in rows))


def fit_maps(
    host: PreTrainedModel,
    donor: PreTrainedModel,
    paired: Paired,
    layers: Iterable[LayerPair],
    *,
    method: Method = "ridge",
    alpha: float | None = None,
    test_share: float = 0.25,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[LayerPair, Maps]:
    """Fit maps for some pairs of layers on a part of the texts, and test them on the others.

    ridge is least squares on the centred streams with a penalty of `alpha` times their mean variance per dimension; procrustes
    (Schönemann 1966) is the best rotation with one scale factor, the narrower stream being padded with zeros. A token counts once
    for every distinct context (itself and all tokens before it), and test tokens have contexts that no training text has;
    otherwise a common beginning of all texts would be fitted and tested many times.

    Args:
        host: the model that receives heads.
        donor: the model that heads are taken from; it can be the host itself.
        paired: the texts (`pair_texts`).
        layers: (host layer, donor layer) pairs.
        method: ridge or procrustes.
        alpha: the penalty of ridge; by default a small one. If it is given there may be fewer tokens than dimensions.
        test_share: the share of the texts held out for the test.
        seed: of the split.
        batch_size: texts per forward pass.

    Returns:
        The maps by pair of layers.

    Raises:
        ValueError: unknown method, alpha or test_share out of range, a layer that does not exist, fewer than two texts, too few
            tokens to fit the maps or none to test them, streams that are not finite or are the same at every token.
    """
    layers = list(dict.fromkeys(layers))
    _check_fit(host, donor, paired, layers, method, alpha, test_share)
    order = rng(seed, "maps").permutation(len(paired.host)).tolist()
    n_test = min(max(round(test_share * len(order)), 1), len(order) - 1)
    kept, train = _contexts(paired, order[n_test:], order[:n_test])
    widths = [dimensions(model.config)["d_model"] for model in (host, donor)]
    if not (~train).any():
        raise ValueError("no test text has a context that the training texts lack; give more texts, or other texts.")
    if (tokens := int(train.sum())) <= max(widths) and (alpha is None or method != "ridge"):
        raise ValueError(
            f"{tokens} tokens are too few to fit maps between streams of {widths[0]} and {widths[1]} dimensions; give more "
            "texts, or an alpha, which then determines what tokens do not (method ridge)."
        )
    streams = [
        _streams(model, prompts, kept, [pair[side] for pair in layers], batch_size)
        for side, (model, prompts) in enumerate(((host, paired.host), (donor, paired.donor)))
    ]
    ridge = STEADY if alpha is None else alpha
    return {
        (a, b): Maps(
            _fitted(streams[0]["block_input", a], streams[1]["block_input", b], train, method, ridge),
            _fitted(
                streams[1][_after_attention(donor), b], streams[0][_after_attention(host), a], train, method, ridge
            ),
        )
        for a, b in layers
    }


def _check_fit(
    host: PreTrainedModel,
    donor: PreTrainedModel,
    paired: Paired,
    layers: Sequence[LayerPair],
    method: Method,
    alpha: float | None,
    test_share: float,
) -> None:
    if method not in ("ridge", "procrustes"):
        raise ValueError(f"unknown method {method!r}; choose ridge or procrustes.")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be above 0, not {alpha}.")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must lie between 0 and 1, not be {test_share}.")
    for pair in layers:
        for who, model, layer in zip(("host", "donor"), (host, donor), pair, strict=True):
            _check_layer(who, model, layer)
    if len(paired.host) < 2:
        raise ValueError(
            f"maps need texts to fit and others to test them, but there are {len(paired.host)}; give more."
        )


def _after_attention(model: PreTrainedModel) -> str:
    """The component at which the residual stream first contains what a block's heads have written."""
    return "block_output" if card_of(model).parallel else "resid_mid"


def _contexts(paired: Paired, train: Sequence[int], test: Sequence[int]) -> tuple[list[list[int]], Tensor]:
    """The tokens of each text that count, as negative indices; and which of them, over all texts, are for training."""
    kept: list[list[int]] = [[] for _ in paired.host.input_ids]
    seen: set[int] = set()
    for which in (*train, *test):
        ids = paired.host.input_ids[which]
        alone = len(ids) - len(paired.donor.input_ids[which])  # tokens that only the host's tokenizer prepends
        context = 0
        for at, token in enumerate(ids):
            context = hash((context, token))
            if context not in seen and at >= alone:
                kept[which].append(at - len(ids))
            seen.add(context)
    training = set(train)
    return kept, torch.tensor(
        [which in training for which, tokens in enumerate(kept) for _ in tokens], dtype=torch.bool
    )


def _streams(
    model: PreTrainedModel, prompts: TokenizedPrompts, kept: Sequence[list[int]], layers: Iterable[int], batch_size: int
) -> dict[Where, Float32[Tensor, "token d_model"]]:
    """The residual stream before and after attention of some layers, at the tokens that count."""
    places = [(site, layer) for layer in dict.fromkeys(layers) for site in ("block_input", _after_attention(model))]
    rows: dict[Where, list[Tensor]] = {place: [torch.empty(0)] * len(prompts) for place in places}
    with evaluating(model), no_gradients(model), ExitStack() as hooks:
        hooks.enter_context(Taps(model, card_of(model), places))
        seen = record_activations(model, places, hooks)
        for batch in prompts.batches(batch_size, padding_side="left"):
            model.base_model(**batch.inputs(input_device(model)), use_cache=False)
            for place in places:
                for row, which in enumerate(batch.index):
                    rows[place][which] = seen[place][row, kept[which]].float().cpu()
    found = {place: torch.cat(some) for place, some in rows.items()}
    for (_, layer), stream in found.items():
        if not stream.isfinite().all():
            raise ValueError(
                f"the residual stream of layer {layer} is not finite; load the model in bfloat16 or float32."
            )
    return found


def _fitted(
    x: Float32[Tensor, "token d_in"],
    y: Float32[Tensor, "token d_out"],
    train: Tensor,
    method: Method,
    alpha: float,
) -> StreamMap:
    """Fit the map from x to y."""
    x, y = x.double(), y.double()
    centre_x, centre_y = x[train].mean(0), y[train].mean(0)
    from_, to = x[train] - centre_x, y[train] - centre_y
    if not (from_.any() and to.any()):
        raise ValueError(
            "a residual stream is the same at every token that the maps are fitted on; give more texts, or another model."
        )
    if method == "ridge":
        gram = from_.T @ from_
        gram.diagonal().add_(alpha * gram.trace() / len(gram))
        weight = torch.linalg.solve(gram, from_.T @ to)
    else:
        wide = max(x.shape[1], y.shape[1])
        a, b = (nn.functional.pad(z, (0, wide - z.shape[1])).numpy() for z in (from_, to))
        rotation, overlap = orthogonal_procrustes(a, b)
        weight = torch.from_numpy(rotation)[: x.shape[1], : y.shape[1]]
        weight = weight * (overlap / (from_ @ weight).square().sum())
    offset = centre_y - centre_x @ weight

    def r2(which: Tensor) -> float:
        left_over = y[which] - x[which] @ weight - offset
        return 1 - float(left_over.square().sum() / (y[which] - centre_y).square().sum())

    fit = MapFit(
        method=method,
        alpha=alpha if method == "ridge" else None,
        d_in=x.shape[1],
        d_out=y.shape[1],
        train_tokens=int(train.sum()),
        test_tokens=int((~train).sum()),
        r2_train=r2(train),
        r2_test=r2(~train),
    )
    return StreamMap(weight.float(), offset.float(), fit)


# -- heads -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transplant:
    """A head of a donor that replaces one of the host.

    Attributes:
        head: (layer, head) of the host.
        donor: the model that the new head is taken from.
        donor_head: (layer, head) of the donor.
        maps: of the two layers; None: both models use the same residual basis.
    """

    head: Head
    donor: PreTrainedModel
    donor_head: Head
    maps: Maps | None = None

    def check(self, host: PreTrainedModel) -> None:
        """Check the transplant against a host; nothing is run.

        Args:
            host: the model that receives the head.

        Raises:
            ValueError: a head does not exist or cannot be separated from its layer, or the streams do not fit.
        """
        for who, model, head in (("host", host, self.head), ("donor", self.donor, self.donor_head)):
            _check_head(who, model, head)
        widths = tuple(dimensions(model.config)["d_model"] for model in (host, self.donor))
        if self.maps is None:
            sizes = tuple(head_dim(model.config) for model in (host, self.donor))
            for what, (own, other) in (("residual streams of width", widths), ("heads of size", sizes)):
                if own != other:
                    raise ValueError(
                        f"the donor has {what} {other} and the host of {own}, so that head {head_label(self.donor_head)} "
                        "cannot be transplanted as it is; fit maps between the two (fit_maps)."
                    )
            return
        into, back = (tuple(one.weight.shape) for one in self.maps)
        if into != widths or back != widths[::-1]:
            raise ValueError(
                f"the maps are of {into[0]} to {into[1]} dimensions and of {back[0]} to {back[1]}, and the streams of host and "
                f"donor have {widths[0]} and {widths[1]}; fit maps for these models."
            )


def _check_layer(who: str, model: PreTrainedModel, layer: int) -> None:
    if not 0 <= layer < n_layers(model.config):
        raise ValueError(f"there is no layer {layer} in the {who}, which has layers 0 to {n_layers(model.config) - 1}.")


def _check_head(who: str, model: PreTrainedModel, head: Head) -> None:
    _check_layer(who, model, head[0])
    if not 0 <= head[1] < n_heads(model.config):
        raise ValueError(
            f"there is no head {head_label(head)} in the {who}, whose layers have heads 0 to {n_heads(model.config) - 1}."
        )
    projection = card_of(model).module(model, "attention_value_output", head[0])
    if output_weight(projection) is None:
        raise ValueError(
            f"the output projection of layer {head[0]} of the {who} is a {type(projection).__name__} whose weights cannot be "
            "split by heads; merge adapters, and load the model without quantisation and offloading."
        )


def head_output(
    model: PreTrainedModel,
    head: Head,
    stream: Float[Tensor, "batch pos d_model"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    position_ids: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Compute what one head would add to the residual stream if `stream` entered its block, with the model's own code.

    To be called within `modelcards.Taps` for the head's layer.

    Args:
        model: the head's model.
        head: (layer, head).
        stream: what enters the block.
        attention_mask: as the model takes it.
        position_ids: as the model takes them.

    Returns:
        The head's contribution.

    Raises:
        ValueError: there are more positions than the model takes.
    """
    if stream.shape[1] > n_positions(model.config):
        raise ValueError(
            f"the donor takes {n_positions(model.config)} tokens and is given {stream.shape[1]}; leave out long "
            "prompts, or use another donor."
        )
    layer, number = head
    found: list[Tensor] = []

    def at_contributions(shares: Tensor) -> None:
        found.append(shares.unflatten(-1, (n_heads(model.config), -1))[:, :, number])
        raise StopForward

    with ExitStack() as hooks, suppress(StopForward):
        for earlier in range(layer):
            block = card_of(model).module(model, "block_output", earlier)
            hooks.enter_context(replace_forward(block, lambda hidden_states, *_, **__: hidden_states))
        hook_component(model, ("block_input", layer), lambda _: stream, hooks)
        hook_component(model, ("head_contribution", layer), at_contributions, hooks)
        # Call forward directly, without the decoder's hooks: if this is the host, they belong to the surrounding run.
        model.base_model.forward(
            inputs_embeds=stream, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
    return found[0]


@contextmanager
def transplanted(
    host: PreTrainedModel,
    transplants: Iterable[Transplant],
    *,
    without: Iterable[Head] = (),
    new_tokens: bool = False,
) -> Iterator[None]:
    """Run the host with transplanted heads in place of its own, within this context.

    All models are in eval mode inside and restored afterwards. Transplants act at all positions of the prompt, which is what the
    host is given while its cache is empty; with `new_tokens` also at generated tokens, where donor heads attend to the stream of
    all earlier positions, which is kept here. (Not under beam search, which reorders rows.) The input of a later transplant is
    the stream as earlier ones have changed it. The same model can be host and donor.

    Args:
        host: the model that receives heads.
        transplants: heads of the host and what replaces them.
        without: heads of the host that are removed without replacement.
        new_tokens: act at generated tokens too.

    Yields:
        None: while the host has the transplants.

    Raises:
        ValueError: a transplant does not fit, a head is named twice, or a prompt is too long for the donor.
    """
    transplants, without = list(transplants), list(without)
    for transplant in transplants:
        transplant.check(host)
    for head in without:
        _check_head("host", host, head)
    heads = [*without, *(transplant.head for transplant in transplants)]
    if len(set(heads)) < len(heads):
        raise ValueError("a head of the host is to be replaced twice; name each head once.")
    layers: dict[PreTrainedModel, list[int]] = {host: [layer for layer, _ in heads]}
    for transplant in transplants:
        layers.setdefault(transplant.donor, []).append(transplant.donor_head[0])
    with ExitStack() as stack:
        for model, of_model in layers.items():
            stack.enter_context(evaluating(model))
            stack.enter_context(Taps(model, card_of(model), [("head_contribution", layer) for layer in of_model]))
        _Host(host, transplants, without, new_tokens).enter(stack)
        yield


class _Host:
    """The hooks on a host, and the state that they share during a forward pass."""

    def __init__(
        self, model: PreTrainedModel, transplants: Sequence[Transplant], without: Sequence[Head], new_tokens: bool
    ) -> None:
        self.model, self.new_tokens = model, new_tokens
        self.by_layer: dict[int, list[Transplant]] = {layer: [] for layer, _ in without}
        for transplant in transplants:
            self.by_layer.setdefault(transplant.head[0], []).append(transplant)
        self.without = without
        self.active = False  # in a forward pass that has transplants
        self.donor_runs = False  # the donor may be the same model, whose hooks must then do nothing
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None
        self.streams: dict[int, Tensor] = {}  # before each layer, of all positions so far
        self.outputs: dict[Head, Tensor] = {}

    def enter(self, hooks: ExitStack) -> None:
        """Register the hooks until `hooks` is closed."""
        for layer in self.by_layer:
            hook_component(self.model, ("block_input", layer), partial(self.run_donors, layer), hooks)
            hook_component(self.model, ("head_contribution", layer), partial(self.replace, layer), hooks)
        # First of all hooks, so that latent steps run with the new heads too.
        begin = self.model.base_model.register_forward_pre_hook(self.begin, prepend=True, with_kwargs=True)
        hooks.callback(begin.remove)

    def begin(self, bare: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward pass: determine which positions it covers."""
        given = inspect.signature(bare.forward).bind(*args, **kwargs).arguments
        cache, mask, positions = (given.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
        ids = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        past = int(cache.get_seq_length()) if cache is not None else 0
        self.active = self.new_tokens or not past
        if positions is None:
            positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        positions = positions.expand(ids.shape[0], -1)
        if not past:
            self.streams.clear()
            self.positions = positions
        elif self.new_tokens:
            assert self.positions is not None
            self.positions = torch.cat([self.positions, positions], 1)
        self.mask = mask

    def run_donors(self, layer: int, stream: Tensor) -> None:
        """Before a block: compute what its new heads add at this pass's positions, from the stream at all positions so far."""
        if not self.active or self.donor_runs:
            return
        whole = stream
        if self.new_tokens and not is_unrolling(self.model):
            before = self.streams.get(layer)
            whole = stream if before is None else torch.cat([before, stream], 1)
            self.streams[layer] = whole
        self.donor_runs = True
        try:
            for transplant in self.by_layer[layer]:
                output = self.of_donor(transplant, whole)
                self.outputs[transplant.head] = output[:, -stream.shape[1] :].to(stream)
        finally:
            self.donor_runs = False

    def of_donor(self, transplant: Transplant, stream: Tensor) -> Tensor:
        """What a donor's head writes, mapped to the host's stream."""
        donor, maps = transplant.donor, transplant.maps
        donor_stream = stream if maps is None else maps.into(stream)
        device = input_device(donor)
        mask, positions = (None if x is None else x.to(device) for x in (self.mask, self.positions))
        output = head_output(donor, transplant.donor_head, donor_stream.to(device, donor.dtype), mask, positions)
        return output if maps is None else maps.back.change(output)

    def replace(self, layer: int, contributions: Tensor) -> Tensor | None:
        """Replace the contributions of the transplanted heads, before they are summed."""
        if not self.active or self.donor_runs:
            return None
        by_head = contributions.unflatten(-1, (n_heads(self.model.config), -1)).clone()
        by_head[:, :, [head for at, head in self.without if at == layer]] = 0
        for transplant in self.by_layer[layer]:
            by_head[:, :, transplant.head[1]] = self.outputs.pop(transplant.head)
        return by_head.flatten(2)

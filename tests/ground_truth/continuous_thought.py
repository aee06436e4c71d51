"""Continuous thoughts the slow, obvious way: one question at a time, no padding, each latent step by itself with a cache.

Nothing is shared with the package: the projection is written out, steps go in as embeddings, and hooks edit what stands at a
position counted from the question's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.ground_truth import ablations as slow
from tests.ground_truth.forced_attention import Forced, attentions, forced_row


class At(NamedTuple):
    """An edit of one site at one position: `new` makes the activation `[d]` or `[head d_head]`, of some heads or all."""

    site: str
    layer: int | None
    position: int
    new: Callable[[Tensor], Tensor]
    heads: Sequence[int] | None = None


def projected(state: Tensor, weights: dict[str, Tensor] | None) -> Tensor:
    """CODI's projection of `[1 d]`, by its formula."""
    if weights is None:
        return state
    x = state @ weights["1.weight"].T + weights["1.bias"]
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    x = x @ weights["3.weight"].T + weights["3.bias"]
    if "ln.weight" in weights:
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weights["ln.weight"] + weights["ln.bias"]
    return x


class Stepper:
    """One question on its way through a model: `step` appends tokens or embeddings and gives states and logits `[new .]`."""

    def __init__(self, model: Any, edits: Sequence[At], forced: Sequence[Forced]) -> None:
        self.model, self.edits, self.forced = model, edits, forced
        self.cache, self.length = DynamicCache(), 0
        self.values: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, ids: Sequence[int] = (), embeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs = {"input_ids": torch.tensor([list(ids)])} if embeds is None else {"inputs_embeds": embeds[None]}
        with self.hooked():
            out = self.model(**inputs, past_key_values=self.cache, use_cache=True, output_hidden_states=True)
        self.length += out.logits.shape[1]
        return out.hidden_states[-1][0], out.logits[0]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        for edit in self.edits:
            handles += slow.hooks(self.model, edit.site, edit.layer, self.changed(edit))
        for layer in sorted({forced.layer for forced in self.forced}):
            handles += self.attend_again(layer)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def changed(self, edit: At) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            row = edit.position - self.length
            if 0 <= row < len(x):
                x = x.clone()
                made = edit.new(x[row])
                for head in [...] if edit.heads is None else edit.heads:
                    x[row, head] = made[head]
            return x

        return change

    def attend_again(self, layer: int) -> list[Any]:
        attention: Any = attentions(self.model)[layer]
        config, gpt2 = self.model.config, hasattr(attention, "c_attn")
        heads = config.num_attention_heads

        def keep_values(module: nn.Module, args: tuple, output: Tensor) -> None:
            v = output[0].chunk(3, -1)[2] if gpt2 else output[0]
            v = v.view(len(v), heads if gpt2 else config.num_key_value_heads, -1).repeat_interleave(
                1 if gpt2 else heads // config.num_key_value_heads, 1
            )
            self.values[layer] = torch.cat([self.values[layer], v]) if layer in self.values else v

        def again(module: nn.Module, args: tuple, output: tuple) -> tuple:
            pattern = output[1][0].clone()
            for forced in self.forced:
                for head in forced.heads if forced.layer == layer else ():
                    for row in range(pattern.shape[1]):
                        query = self.length + row
                        if forced.first <= query <= forced.last:
                            so_far = forced._replace(last=query)  # of the block; later keys are not there yet
                            pattern[head, row] = forced_row(pattern[head, row], query, so_far)
            z = torch.einsum("hqk,khd->qhd", pattern, self.values[layer]).flatten(1)
            return ((attention.c_proj if gpt2 else attention.o_proj)(z)[None], *output[1:])

        projection = attention.c_attn if gpt2 else attention.v_proj
        return [projection.register_forward_hook(keep_values), attention.register_forward_hook(again)]


def thought(
    model: Any,
    question: Sequence[int],
    opening: Sequence[int],
    closing: Sequence[int],
    weights: dict[str, Tensor] | None,
    steps: int = 6,
    edits: Sequence[At] = (),
    forced: Sequence[Forced] = (),
) -> tuple[Stepper, Tensor, list[Tensor]]:
    """A question up to its last closing token: the stepper, the logits of all positions, and what entered at the steps."""
    run = Stepper(model, edits, forced)
    states, logits = run.step([*question, *opening])
    all_logits, entered = [logits], []
    for _ in range(steps):
        entered.append(projected(states[-1:], weights))
        states, logits = run.step(embeds=entered[-1])
        all_logits.append(logits)
    if closing:
        all_logits.append(run.step(closing)[1])
    return run, torch.cat(all_logits), entered


def written(run: Stepper, logits: Tensor, end: int | None, never: Sequence[int], new: int) -> list[int]:
    """What is written behind a thought, greedily, until the end token."""
    out: list[int] = []
    last = logits[-1].clone()
    while True:
        last[list(never)] = -torch.inf
        token = int(last.argmax())
        if token == end or len(out) == new:
            return out
        out.append(token)
        last = run.step([token])[1][-1].clone()

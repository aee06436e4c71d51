"""Conditions with prompts of their own, all at once: attention forced while a model writes, edits at one token, what is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from modelcards import card_of, n_kv_heads, n_layers
from pyvene_ext.intervenable.truth import Truth
from pyvene_ext.methods.reasoning.forcing import forced_while_writing
from pyvene_ext.methods.solving import many
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.methods.solving.reading import Unedited
from pyvene_ext.models.hooks import attention_can_be_seen
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.forced_attention import ForcedAttention
from pyvene_ext.specs.joint import Spec, members
from tests.ground_truth.forced_attention import Forced, forced_row
from tests.pyvene_ext.methods.solving.test_evaluate import LENGTHS, NEW, asked, model_of, tokenizer
from tests.pyvene_ext.methods.solving.test_many import mark_and_end, same
from tests.tiny_random import CORE_FAMILIES, FAMILIES, MORE_FAMILIES, UNLIKE

SHAPES = [("hub", False), ("hub", True), ("uniform", False), ("uniform", True), ("sequential", False)]
Edits = Callable[[Sequence[int]], list[tuple]]  # (component, layer, change) for the tokens so far


def greedy(model: Any, prompt: Sequence[int], edits: Edits, end: int | None, new: int) -> tuple[int, ...]:
    """Greedy decoding by plain hooks, everything recomputed for each token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + new:
        inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
        with torch.no_grad():
            logits = Truth(model).run_with({**inputs, "attention_mask": torch.ones(1, len(ids)).long()}, edits(ids))
        token = int(logits[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    return tuple(ids[len(prompt) :])


def by_hand(pattern: torch.Tensor, forced: Forced) -> torch.Tensor:
    pattern = pattern.clone()
    for head in forced.heads:
        for query in range(forced.first, forced.last + 1):
            pattern[0, head, query] = forced_row(pattern[0, head, query], query, forced)
    return pattern


def forced_patterns(ids: Sequence[int], start: int, mark: int, spec: Sequence[ForcedAttention], hub: int | None) -> Any:
    """The patterns among the tokens of the reasoning so far."""
    last = (list(ids).index(mark, start) if mark in ids[start:] else len(ids)) - 1
    at = None if hub is None or start + hub > last else start + hub  # before the hub is written all is even
    if last < start:
        return []
    return [
        (
            "attention_pattern",
            edit.layer,
            partial(by_hand, forced=Forced(0, edit.heads or (), edit.shape, start, last, at, edit.hard)),
        )
        for edit in spec
    ]


def in_layers(shape: str, hard: bool, heads: dict[int, tuple[int, ...]]) -> tuple[ForcedAttention, ...]:
    named: Any = {"shape": shape, "hub": 0 if shape == "hub" else None, "hard": hard, "block": (0, -1)}
    return tuple(ForcedAttention(layer=layer, heads=some, **named) for layer, some in heads.items())


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_attention_forced_while_models_write_is_that_of_patterns_made_by_hand(family: str) -> None:
    """Patterns, heads and hubs that differ from text to text, in one batch from which some leave early."""
    model = model_of(family)
    if not attention_can_be_seen(model):
        heads = in_layers("uniform", True, {0: (0,)})
        with pytest.raises(ValueError, match=r"cannot, as it is loaded|card of .* has no pattern"):
            evaluate(
                model,
                tokenizer(),
                asked(),
                forced_while_writing(model, heads, asked(), 4),
                "reasoning",
                max_new_tokens=4,
            )
        return
    mark, end = mark_and_end(model)
    conditions: list[tuple[Questions, tuple[ForcedAttention, ...], list[int] | None]] = []
    for number, (shape, hard) in enumerate(SHAPES):
        which = [0, 1, 2, 3][number % 2 :]
        hubs = [(number + problem) % 3 for problem in which] if shape == "hub" else None
        heads = {0: (0, 2), n_layers(model.config) - 1: (1,)}
        conditions.append((asked().take(which), in_layers(shape, hard, heads), hubs))
    specs: list[Any] = [forced_while_writing(model, spec, questions, NEW, hubs) for questions, spec, hubs in conditions]
    found = evaluate(
        model,
        tokenizer(mark, end),
        [asked(), *(questions for questions, *_ in conditions)],
        [None, *specs],
        "reasoning",
        max_new_tokens=NEW,
        batch_size=3,
    )
    differ = 0
    for (questions, spec, hubs), of_spec in zip(conditions, found[1:], strict=True):
        for problem, ids in enumerate(questions.prompts.input_ids):
            patterns = partial(
                forced_patterns, start=len(ids), mark=mark, spec=spec, hub=None if hubs is None else hubs[problem]
            )
            expected = greedy(model, ids, patterns, end, NEW)
            assert of_spec.ids[problem] == expected[: len(of_spec.ids[problem])]  # after a line's end it writes no more
            assert of_spec.ended[problem] or len(of_spec.ids[problem]) == NEW
            differ += of_spec.ids[problem] != found[0].ids[questions.index[problem]]
    assert differ > 2


def at_a_token(hubs: Sequence[int], cut: bool) -> Questions:
    """The questions with a token named hub, and without what comes after it."""
    questions = asked()
    rows = [ids[: hub + 1] if cut else ids for ids, hub in zip(questions.prompts.input_ids, hubs, strict=True)]
    named = tuple({"end": -1, "last": -1, "hub": hub - len(ids)} for ids, hub in zip(rows, hubs, strict=True))
    prompts = replace(questions.prompts, input_ids=tuple(rows), positions=named)
    return replace(questions, prompts=prompts, lengths=tuple(map(len, rows)))


def zeroed(spec: Spec, hub: int, ids: Sequence[int]) -> list[tuple]:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., hub, :] = 0  # of all heads, where there are some
        return x

    return [(edit.component.name, edit.layer or 0, change) for edit in members(spec)]


@pytest.mark.parametrize(
    ("family", "cut"),
    [
        *((family, True) for family in CORE_FAMILIES),
        *(pytest.param(family, False, marks=pytest.mark.slow) for family in UNLIKE),
    ],
)
def test_an_edit_at_one_token_and_what_is_read_only_once(
    family: str, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token differs from condition to condition, and so does the prompt where it ends there."""
    model = model_of(family)
    last, kv = n_layers(model.config) - 1, tuple(range(n_kv_heads(model.config)))
    at: dict[str, Any] = {"kind": "zero", "positions": "hub"}
    specs: list[Spec] = [
        Ablation(site="embed", **at),
        Ablation(site="resid_post", layer=0, **at),
        Ablation(site="mlp_out", layer=last, **at),
        tuple(
            Ablation(site=site, layer=layer, heads=kv, **at) for layer in range(last, last + 1) for site in ("k", "v")
        ),
    ]
    asked_at = [(hubs, at_a_token(hubs, cut)) for hubs in ((2, 1, 3, 2), (5, 4, 6, 4), (8, 5, 6, 4))]
    conditions = [(hubs, questions, spec) for hubs, questions in asked_at for spec in specs]
    left: list[Unedited] = []
    read = many.read_edited
    monkeypatch.setattr(
        many, "read_edited", lambda *args: (left.append(args[3] if args[4] else Unedited(0, 0)), read(*args))[1]
    )
    texts = tokenizer(end=None)
    found = evaluate(
        model,
        texts,
        [questions for _, questions, _ in conditions],
        [spec for *_, spec in conditions],
        "prompt",
        max_new_tokens=4,
        batch_size=3,
    )
    if attention_can_be_seen(model):  # others run one by one
        assert last in {layer for layer, _ in left} and any(column > 3 for _, column in left)
    for (hubs, questions, spec), of_spec in zip(conditions, found, strict=True):
        assert same(of_spec, evaluate(model, texts, questions, spec, "prompt", max_new_tokens=4)), spec
        for problem, (hub, ids) in enumerate(zip(hubs, questions.prompts.input_ids, strict=True)):
            expected = greedy(model, ids, partial(zeroed, spec, hub), None, 4)
            assert of_spec.ids[problem] == expected[: len(of_spec.ids[problem])]
    assert len({of_spec.ids for of_spec in found}) > 3


def test_layers_and_tokens_before_the_first_edit_are_read_once() -> None:
    model, tokens = model_of("llama3_1"), [0] * 3
    last = n_layers(model.config) - 1
    for layer in range(3):
        mlp = card_of(model).module(model, "mlp_output", layer)

        def count(_: Any, args: Any, output: torch.Tensor, layer: int = layer) -> None:
            tokens[layer] += output.shape[0] * output.shape[1]

        mlp.register_forward_hook(count)
    specs = [Ablation(kind="zero", site="z", layer=last, heads=(head,)) for head in range(6)]
    evaluate(model, tokenizer(), asked(), specs, "prompt", max_new_tokens=1)
    width, rows = max(LENGTHS), len(LENGTHS)
    assert tokens == [rows * width, rows * width, 7 * rows * width]
    tokens[:] = [0] * 3
    named = [spec.model_copy(update={"positions": "last"}) for spec in specs]
    evaluate(model, tokenizer(), asked(), named, "prompt", max_new_tokens=1)
    assert tokens == [rows * width, rows * width, rows * width + 6 * rows]
    tokens[:] = [0] * 3
    evaluate(model, tokenizer(), asked(), specs[:1], "prompt", max_new_tokens=1)
    assert tokens == [rows * width] * 3, "one spec is read by itself, which is less"


def test_a_store_knows_conditions_apart(tmp_path: Any) -> None:
    model, few = model_of("mistral"), asked().take([2, 0])
    uniform, sequential = (in_layers(shape, True, {1: (0, 1)}) for shape in ("uniform", "sequential"))
    specs: list[Any] = [forced_while_writing(model, spec, few, NEW) for spec in (uniform, sequential)]
    options: dict[str, Any] = {"max_new_tokens": NEW, "store": tmp_path}
    words = tokenizer(end=None)
    both = evaluate(model, words, [few, few], specs, "reasoning", **options)
    assert both[0].ids != both[1].ids
    for spec, of_spec in zip(specs, both, strict=True):
        assert same(evaluate(model, words, few, spec, "reasoning", **options), of_spec)
        assert same(evaluate(model, words, few, spec, "reasoning", max_new_tokens=NEW), of_spec)
    lines = [line for file in tmp_path.glob("*/*") for line in file.read_text().splitlines() if line]
    assert len(lines) == 4, "nothing is written a second time"


def test_bad_conditions_are_refused() -> None:
    model = model_of("gpt2")
    spec = forced_while_writing(model, in_layers("uniform", True, {0: (0,)}), asked(), 4)
    with pytest.raises(ValueError, match="there are 2 sets of questions and 1 specs; give each spec its questions"):
        evaluate(model, tokenizer(), [asked(), asked()], [None], max_new_tokens=4)
    with pytest.raises(ValueError, match="edits of new tokens leave prompts alone: choose the scope new or reasoning"):
        evaluate(model, tokenizer(), asked(), spec, "both", max_new_tokens=4)
    with pytest.raises(ValueError, match="hub attention needs the hub of each question"):
        forced_while_writing(model, in_layers("hub", True, {0: (0,)}), asked(), 4)
    with pytest.raises(ValueError, match="the hub is token 4 of the reasoning, of which 4 tokens are written"):
        forced_while_writing(model, in_layers("hub", True, {0: (0,)}), asked(), 4, [4] * 4)

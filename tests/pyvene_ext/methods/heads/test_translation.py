"""Diagonal scores: crops by hand, loops over eager patterns on every family, batches, and what heads look at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from modelcards import n_heads
from pyvene_ext.engine.plain import run
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.methods.heads.translation import (
    control_sets,
    diagonal_score,
    extreme_of,
    found_heads,
    path_changes,
    source_tokens,
    translation_scores,
)
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.ablation import Ablation
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, random_model
from tests.traces import traces

LENGTHS, LABELS, FIRSTS = (9, 6, 7, 12, 8), (5, 3, 3, 7, 2), (1, 0, 1, 0, 0)


def translations(lengths: tuple[int, ...] = LENGTHS) -> TokenizedPrompts:
    prompts = random_prompts(lengths)
    positions = tuple(
        {"end": -1, "last": -1, "label": label - length, "first": first - length}
        for length, label, first in zip(lengths, LABELS, FIRSTS, strict=False)
    )
    return replace(prompts, positions=positions)


def by_hand(pattern: np.ndarray, label: int, first: int) -> float:
    """The score of one pattern [query key], entry by entry."""
    means = []
    for offset in (0, 1, -1):
        entries = [
            pattern[q, k]
            for q in range(label, len(pattern))
            for k in range(first, label)
            if (k - first) - (q - label) == offset
        ]
        means.append(sum(entries) / len(entries))
    return sum(means) / 3


@pytest.mark.parametrize(
    ("crop", "score"),
    [
        ([[1, 0], [0, 1]], (1 + 0 + 0) / 3),
        ([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], (0.3 + 0.4 + 0.4) / 3),  # wider than high: (.1+.5)/2, (.2+.6)/2, .4
        ([[0.1, 0.4], [0.2, 0.5], [0.3, 0.6]], (0.3 + 0.4 + 0.4) / 3),
        ([[0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]], 1 / 3),  # looks one ahead all along
        ([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], 1 / 3),
    ],
)
def test_a_crop_has_the_mean_of_three_diagonals(crop: list, score: float) -> None:
    assert diagonal_score(torch.tensor(crop, dtype=torch.float32)).item() == pytest.approx(score)
    both = torch.tensor([crop, [[2 * x for x in row] for row in crop]], dtype=torch.float32)
    assert diagonal_score(both).tolist() == pytest.approx([score, 2 * score])


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (0, 3), (3, 0)])
def test_a_crop_without_three_diagonals_has_no_score(shape: tuple[int, int]) -> None:
    assert diagonal_score(torch.ones(4, *shape)).isnan().all()
    assert diagonal_score(torch.ones(4, *shape)).shape == (4,)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_loop_over_eager_patterns_one_prompt_at_a_time(family: str) -> None:
    prompts = translations()
    eager = random_model(family, attn_implementation="eager")
    found = translation_scores(random_model(family), prompts, batch_size=3, progress=False)
    alone = translation_scores(random_model(family), prompts, batch_size=1, progress=False)
    np.testing.assert_allclose(found, alone, atol=1e-6)
    assert found.shape == (len(LENGTHS), 3, n_heads(eager.config))
    for prompt, ids in enumerate(prompts.input_ids):
        with torch.no_grad():
            patterns = eager(torch.tensor([ids]), output_attentions=True).attentions
        for layer, head in np.ndindex(found.shape[1:]):
            wanted = by_hand(patterns[layer][0, head].numpy(), LABELS[prompt], FIRSTS[prompt])
            assert found[prompt, layer, head] == pytest.approx(wanted, abs=1e-5)


def test_a_short_crop_is_nan_for_all_heads_and_others_are_not() -> None:
    prompts = translations()
    places = list(prompts.positions)
    places[1] = {"end": -1, "last": -1, "label": -1, "first": -6}
    places[3] = {"end": -1, "last": -1, "label": -11, "first": -12}
    found = translation_scores(random_model("llama3_1"), replace(prompts, positions=tuple(places)), progress=False)
    assert np.isnan(found[[1, 3]]).all() and np.isfinite(found[[0, 2, 4]]).all()


def test_weights_that_are_not_finite_and_prompts_without_labels_are_one_sentence() -> None:
    model = random_model("qwen2_5")
    with pytest.raises(ValueError, match="prompt 0 lacks the position of its label"):
        translation_scores(model, random_prompts((5, 6)), progress=False)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.fill_(torch.nan)
    before = traces(model)
    with pytest.raises(ValueError, match="attention of layer 1 in prompt 1 is not finite"):
        translation_scores(model, translations((9, 6)), progress=False)
    assert traces(model) == before


def test_found_heads_are_above_the_threshold_and_the_highest_comes_first() -> None:
    scores = np.array([[0.1, 0.3], [0.2, 0.5], [np.nan, 0.0]])
    assert found_heads(scores, 0.1) == [(1, 1), (0, 1), (1, 0)]
    assert found_heads(scores, 0.5) == []


@pytest.mark.parametrize("batch_size", [1, 3])
def test_source_tokens_are_what_heads_look_at_most(batch_size: int) -> None:
    prompts, heads = random_prompts(LENGTHS), [(0, 1), (2, 0), (2, 2)]
    spans = [(1, 5), (0, 3), (2, 3), (3, 9), (1, 8)]
    eager = random_model("qwen2_5", attn_implementation="eager")
    found = source_tokens(random_model("qwen2_5"), prompts, heads, spans, batch_size=batch_size, progress=False)
    for prompt, (ids, (start, end)) in enumerate(zip(prompts.input_ids, spans, strict=True)):
        with torch.no_grad():
            patterns = eager(torch.tensor([ids]), output_attentions=True).attentions
        total = sum(patterns[layer][0, head, -1, start:end] for layer, head in heads)
        assert found[prompt] == ids[start + int(total.argmax())]


# -- causes ------------------------------------------------------------------------------------------------------------


def test_random_sets_are_of_the_same_layers_and_of_any() -> None:
    found = control_sets([(1, 0), (1, 1), (4, 3)], 6, 8, 20, seed=0)
    same, anywhere = found["same layers"], found["any layer"]
    for control in (same, anywhere):
        assert len(set(control.sets)) == 20
        assert all(len(set(one)) == 3 and not {(1, 0), (1, 1), (4, 3)} & set(one) for one in control.sets)
        assert all(0 <= layer < 6 and 0 <= head < 8 for one in control.sets for layer, head in one)
    assert same.distance == 0 and anywhere.distance > 0
    assert {layer for one in anywhere.sets for layer, _ in one} == set(range(6))
    assert control_sets([(1, 0), (1, 1), (4, 3)], 6, 8, 20, seed=0) == found
    assert control_sets([(1, 0), (1, 1), (4, 3)], 6, 8, 20, seed=1)["same layers"] != same
    with pytest.raises(ValueError, match="at least one"):
        control_sets([], 3, 8, 20, seed=0)


def test_a_head_without_a_direction_has_no_change_along_it_and_others_have() -> None:
    """Of swaps the differences are each other's opposite, so that there is none on average."""
    model = random_model("llama3_1")
    plus = random_prompts((7, 7, 9, 9))
    minus = replace(
        plus, input_ids=tuple(plus.input_ids[i] for i in (1, 0, 3, 2))
    )  # each other's swap: no mean difference
    change, clean = path_changes(model, plus, minus, subspace=True, progress=False)
    assert np.isnan(change).all() and np.isfinite(clean).all()
    other = replace(random_prompts((7, 7, 9, 9), seed=5), answers=plus.answers)
    along, _ = path_changes(model, plus, other, subspace=True, progress=False)
    whole, clean = path_changes(model, plus, other, progress=False)
    assert np.isfinite(along).all() and whole.shape == along.shape == (3, n_heads(model.config), 4)
    assert not np.allclose(along, whole, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_path_changes_equal_plain_hooks_that_freeze_every_other_head(family: str) -> None:
    model = random_model(family)
    plus = random_prompts((7, 9, 6))
    minus = replace(random_prompts((8, 9, 5), seed=3), answers=plus.answers)
    found, clean = path_changes(model, plus, minus, batch_size=2, progress=False)
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    projections = [block.attn.c_proj if family == "gpt2" else block.self_attn.o_proj for block in blocks]

    def run_with(ids: tuple[int, ...], put: list | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        seen: list[torch.Tensor] = []

        def at(number: int, x: torch.Tensor) -> tuple:
            seen.append(x)
            return (x if put is None else put[number],)

        hooks = [p.register_forward_pre_hook(lambda _, args, n=n: at(n, args[0])) for n, p in enumerate(projections)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        for hook in hooks:
            hook.remove()
        return logits, seen

    for prompt in range(3):
        right = plus.answer_ids[prompt][0]
        before, own = run_with(plus.input_ids[prompt], None)
        _, theirs = run_with(minus.input_ids[prompt], None)
        assert clean[prompt] == pytest.approx(before[right].item(), abs=1e-4)
        for layer, head in np.ndindex(found.shape[:2]):
            width = own[layer].shape[-1] // found.shape[1]
            put = [x.clone() for x in own]
            put[layer][0, -1, head * width : (head + 1) * width] = theirs[layer][
                0, -1, head * width : (head + 1) * width
            ]
            change = run_with(plus.input_ids[prompt], put)[0][right] - before[right]
            assert found[layer, head, prompt] == pytest.approx(change.item(), abs=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_an_extreme_is_put_in_place_as_a_mean_would_be(family: str) -> None:
    """By hand: the largest (smallest) value of each dimension over all tokens of the reference set, into one head."""
    model, sources, prompts = random_model(family), random_prompts((5, 7), seed=1), random_prompts(LENGTHS)
    base = Reference.compute(model, sources, [("z", 1)], bank=("all",))
    block = (model.transformer.h if family == "gpt2" else model.model.layers)[1]
    projection = block.attn.c_proj if family == "gpt2" else block.self_attn.o_proj
    seen: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for ids in sources.input_ids:
            model(torch.tensor([ids]))
    handle.remove()
    rows = torch.cat(seen)
    width, head = rows.shape[1] // n_heads(model.config), 2
    mine = slice(head * width, (head + 1) * width)
    for which, value in (("maximum", rows.amax(0)), ("minimum", rows.amin(0))):

        def put(_: object, args: tuple, value: torch.Tensor = value) -> tuple:
            x = args[0].clone()
            x[..., mine] = value[mine]
            return (x,)

        spec = Ablation(kind="mean", site="z", layer=1, heads=(head,))
        found = run(model, spec, prompts, reference=extreme_of(base, which), progress=False)
        handle = projection.register_forward_pre_hook(put)
        for prompt, ids in enumerate(prompts.input_ids):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            io, s = prompts.answer_ids[prompt]
            assert found.intervened[0, prompt] == pytest.approx((logits[io] - logits[s]).item(), abs=1e-4)
        handle.remove()
    with pytest.raises(ValueError, match="bank=\\('all',\\)"):
        extreme_of(Reference.compute(model, sources, [("z", 1)]), "maximum")

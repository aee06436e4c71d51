"""Head transplants against heads computed by hand, one prompt at a time, without cards, taps, padding and cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyvene_ext.methods.reasoning import transplant as module
from pyvene_ext.methods.reasoning.transplant import (
    MapFit,
    Maps,
    Paired,
    StreamMap,
    Transplant,
    fit_maps,
    pair_texts,
    transplanted,
)
from pyvene_ext.models.latent_steps import Format, attach, projection
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from tests.ground_truth import transplant as slow
from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer, word_tokenizer
from tests.random_prompts import random_prompts
from tests.tiny_random import PAD, random_inputs, random_model

FAMILIES = ("qwen2_5", "gemma2", "llama3_1", "mistral", "gpt2")
LENGTHS = (9, 6, 7)  # longer than every window


def random_maps(host: Any, donor: Any, seed: int = 0) -> Maps:
    generator = torch.Generator().manual_seed(seed)
    widths = host.config.hidden_size, donor.config.hidden_size

    def one(d_in: int, d_out: int) -> StreamMap:
        weight = torch.randn(d_in, d_out, generator=generator) / d_in**0.5
        return StreamMap(weight, torch.randn(d_out, generator=generator))

    return Maps(one(*widths), one(*widths[::-1]))


def pair_of(head: Any, donor: Any, donor_head: Any, maps: Maps | None) -> tuple[Transplant, slow.Move]:
    """The same transplant for both sides."""
    if maps is None:
        return Transplant(head, donor, donor_head), slow.Move(head, donor, donor_head, lambda x: x, lambda c: c)
    (a, offset, _), (b, _, _) = ((m.weight, m.offset, m.fit) for m in maps)
    return Transplant(head, donor, donor_head, maps), slow.Move(
        head, donor, donor_head, lambda x: x @ a + offset, lambda c: c @ b
    )


def rows_of(inputs: dict[str, Tensor]) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def check_batch(
    host: Any,
    pairs: Sequence[tuple[Transplant, slow.Move]],
    side: str = "left",
    without: Sequence[tuple[int, int]] = (),
) -> None:
    """A padded batch against its prompts one by one; and the edit is not nothing."""
    inputs = random_inputs(LENGTHS, side)
    with torch.no_grad():
        clean = host(**inputs).logits
        with transplanted(host, [transplant for transplant, _ in pairs], without=without):
            found = host(**inputs).logits
        assert torch.equal(host(**inputs).logits, clean)  # nothing is left
    for row, ids in enumerate(rows_of(inputs)):
        nothing = [slow.Move(head, host, head, lambda x: x, torch.zeros_like) for head in without]
        wanted = slow.logits(host, ids, [*nothing, *(move for _, move in pairs)])
        real = inputs["attention_mask"][row].bool()
        assert torch.allclose(found[row, real], wanted, atol=1e-5), (found[row, real] - wanted).abs().max()
        assert (found[row, real] - clean[row, real]).abs().amax() > 1e-3


def hooks_of(model: nn.Module) -> list[tuple[str, str]]:
    return [
        (name, kind)
        for name, part in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks")
        if getattr(part, kind)
    ] + [(name, "tap") for name, _ in model.named_modules() if "tap_" in name]


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("donor_family", FAMILIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_any_family_works_in_any_other(family: str, donor_family: str) -> None:
    host, donor = random_model(family), random_model(donor_family, seed=1)
    maps = random_maps(host, donor)
    last = donor.config.num_attention_heads - 1  # of another group than head 0
    check_batch(host, [pair_of((1, 2), donor, (2, last), maps)])


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_several_layers_and_places_build_on_one_another(family: str, implementation: str | None) -> None:
    """With the host as a donor of its own, a donor with a window in its first layer, and padding behind the prompts."""
    host = random_model(family, attn_implementation=implementation)
    donor = random_model("mistral", attn_implementation=implementation, seed=1)
    pairs = [
        pair_of((0, 1), donor, (0, 3), random_maps(host, donor, 1)),
        pair_of((0, 3), host, (2, 0), None),
        pair_of((1, 0), host, (1, 2), None),
        pair_of((2, 0), host, (0, 1), random_maps(host, host, 2)),
    ]
    check_batch(host, pairs, "right")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transplant_into_its_own_place_is_exact(family: str) -> None:
    host = random_model(family)
    inputs = random_inputs(LENGTHS)
    real = inputs["attention_mask"].bool()
    heads = [(layer, head) for layer in range(3) for head in range(host.config.num_attention_heads)]
    identity = StreamMap(torch.eye(host.config.hidden_size), torch.zeros(host.config.hidden_size))
    with torch.no_grad():
        clean = host(**inputs).logits[real]
        for donor in (host, deepcopy(host)):
            for maps in (None, Maps(identity, identity)):
                with transplanted(host, [Transplant(head, donor, head, maps) for head in heads]):
                    assert torch.allclose(host(**inputs).logits[real], clean, atol=1e-5)
                with transplanted(host, [Transplant(heads[0], donor, heads[1], maps)]):
                    assert (host(**inputs).logits[real] - clean).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_taken_out_beside_a_transplant_and_alone(family: str) -> None:
    host = random_model(family)
    check_batch(host, [pair_of((1, 0), host, (1, 1), None)], without=[(1, 2), (0, 1)])
    check_batch(host, [], without=[(1, 2), (1, 3)])


@pytest.mark.parametrize("new_tokens", [False, True])
@pytest.mark.parametrize(("family", "donor_family"), [("qwen2_5", "gemma2"), ("gpt2", "mistral"), ("gemma2", "gpt2")])
def test_generation_with_a_cache_is_step_by_step_recomputation(
    family: str, donor_family: str, new_tokens: bool
) -> None:
    host, donor = random_model(family), random_model(donor_family, seed=1)
    maps = random_maps(host, donor)
    pairs = [pair_of((0, 1), donor, (1, 2), maps), pair_of((2, 2), host, (2, 0), None)]
    inputs, new = random_inputs((7, 5)), 4
    steps: list[Tensor] = []
    with transplanted(host, [transplant for transplant, _ in pairs], new_tokens=new_tokens), torch.no_grad():
        cache, mask, positions = None, inputs["attention_mask"], inputs["position_ids"]
        given = {"input_ids": inputs["input_ids"], "position_ids": positions}
        for _ in range(new):
            out = host(**given, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[:, -1])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = positions[:, -1:] + 1
            given = {"input_ids": out.logits[:, -1:].argmax(-1), "position_ids": positions}
        again = host(**inputs).logits[:, -1]  # a new prompt: nothing of the old one comes in
    assert torch.allclose(again, steps[0], atol=1e-6)
    for row, ids in enumerate(rows_of(inputs)):
        text = list(ids)
        for step in steps:
            wanted = slow.logits(host, text, [move for _, move in pairs], None if new_tokens else len(ids))[-1]
            assert torch.allclose(step[row], wanted, atol=1e-5)
            text.append(int(step[row].argmax()))
        text = list(ids)
        differs = 0.0
        for step in steps:  # the other scope is another one, from the second step on
            other = slow.logits(host, text, [move for _, move in pairs], len(ids) if new_tokens else None)[-1]
            differs = max(differs, float((other - step[row]).abs().max()))
            text.append(int(step[row].argmax()))
        assert differs > 1e-3


def test_the_models_own_generate_works_without_position_ids() -> None:
    host, donor = random_model("llama3_1"), random_model("gpt2", seed=1)
    ((transplant, move),) = [pair_of((1, 2), donor, (1, 2), random_maps(host, donor))]
    ids = random_inputs((7,))["input_ids"]
    for new_tokens in (False, True):
        with transplanted(host, [transplant], new_tokens=new_tokens):
            found = host.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=PAD)[0].tolist()
        text = ids[0].tolist()
        while len(text) < len(found):
            text.append(int(slow.logits(host, text, [move], None if new_tokens else 7)[-1].argmax()))
        assert found == text
    wanted = slow.logits(host, ids[0].tolist(), [move])
    with transplanted(host, [transplant]), torch.no_grad():
        assert torch.allclose(host(ids).logits[0], wanted, atol=1e-5)
        bare = host.base_model(inputs_embeds=host.get_input_embeddings()(ids)).last_hidden_state
    assert torch.allclose(host.lm_head(bare)[0], wanted, atol=1e-5)


def test_padding_is_seen_by_nobody_also_without_position_ids() -> None:
    """Rotary models see distances only, so that their positions may begin anywhere."""
    host, donor = random_model("llama3_1"), random_model("mistral", seed=1)
    ((transplant, move),) = [pair_of((1, 2), donor, (1, 2), random_maps(host, donor))]
    inputs = random_inputs(LENGTHS)
    with transplanted(host, [transplant]), torch.no_grad():
        found = host(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    for row, ids in enumerate(rows_of(inputs)):
        assert torch.allclose(found[row, -len(ids) :], slow.logits(host, ids, [move]), atol=1e-5)


def test_models_are_as_they_were_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    host, donor = random_model("gemma2").train(), random_model("gpt2", seed=1).train()
    transplant = Transplant((1, 1), donor, (1, 1), random_maps(host, donor))
    inputs = random_inputs(LENGTHS)
    with transplanted(host, [transplant]):
        assert not host.training and not donor.training
        host(**inputs)
    with pytest.raises(RuntimeError, match="stop"), transplanted(host, [transplant]):
        raise RuntimeError("stop")
    own, head_output = module.head_output, module.head_output

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        own(*args, **kwargs)
        raise RuntimeError("in the donor")

    monkeypatch.setattr(module, "head_output", fails)
    with transplanted(host, [transplant]):
        with pytest.raises(RuntimeError, match="in the donor"):
            host(**inputs)
        monkeypatch.setattr(module, "head_output", head_output)
        with torch.no_grad():  # the next pass is not taken for a donor's
            found = host(**inputs).logits
    assert host.training and donor.training
    host.eval()
    assert not torch.allclose(found, host(**inputs).logits, atol=1e-3)
    for model in (host, donor):
        assert not hooks_of(model)
        assert all("forward" not in part.__dict__ for part in model.modules())


def test_transplants_that_do_not_fit_are_refused_in_one_sentence() -> None:
    host, donor = random_model("qwen2_5"), random_model("llama3_1", seed=1)
    other = random_model("gpt2")
    maps = random_maps(host, donor)
    for transplant, message in (
        (Transplant((0, 1), donor, (0, 1)), "the donor has heads of size 12 and the host of 10"),  # both 42 wide
        (Transplant((0, 1), other, (0, 1)), "the donor has residual streams of width 35 and the host of 42"),
        (Transplant((3, 1), donor, (0, 1), maps), "no layer 3 in the host, which has layers 0 to 2"),
        (Transplant((0, 6), donor, (0, 1), maps), "no head 0.6 in the host, whose layers have heads 0 to 5"),
        (Transplant((0, 1), donor, (-1, 1), maps), "no layer -1 in the donor"),
        (Transplant((0, 1), other, (0, 5), maps), "no head 0.5 in the donor, whose layers have heads 0 to 4"),
        (
            Transplant((0, 1), other, (0, 4), maps),
            "the maps are of 42 to 42 dimensions and of 42 to 42, .* have 42 and 35",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error, transplanted(host, [transplant]):
            pass
        assert str(error.value).count(". ") == 0
    good = Transplant((0, 1), donor, (0, 1), maps)
    with pytest.raises(ValueError, match=r"no head 2\.6 in the host"), transplanted(host, [], without=[(2, 6)]):
        pass
    for twice in ({"transplants": [good, good]}, {"transplants": [good], "without": [good.head]}):
        with pytest.raises(ValueError, match="to be replaced twice; name each head once"), transplanted(host, **twice):
            pass
    donor.config.max_position_embeddings = 8
    with pytest.raises(ValueError, match="the donor takes 8 tokens and is given 9"), transplanted(host, [good]):
        host(**random_inputs(LENGTHS))
    host.model.layers[1].self_attn.o_proj = nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="output projection of layer 1 of the host is a Bilinear"):
        Transplant((1, 1), donor, (0, 1), maps).check(host)
    assert not hooks_of(host) and not hooks_of(donor)


@pytest.mark.parametrize("new_tokens", [False, True])
@pytest.mark.parametrize("own", [True, False])
def test_latent_steps_are_thought_with_the_new_head(own: bool, new_tokens: bool) -> None:
    """Head 2 in place of head 1, against hooks that are there whenever the block runs; batches of other shapes follow."""
    host = random_model("llama3_1").double()  # three thoughts in a row make of float32's rounding more than 1e-5
    form = Format(opening=(50,), latent=51, closing=(52,), steps=3, projection=True)
    torch.manual_seed(2)
    attach(host, form, projection(host.config.hidden_size, 30).double())
    donor = host if own else deepcopy(host)
    output = host.model.layers[1].self_attn.o_proj
    size = host.config.head_dim

    def by_hand(_: Any, args: Any, out: Tensor) -> Tensor:
        parts = args[0].unflatten(-1, (-1, size))
        weight = output.weight.unflatten(-1, (-1, size))
        return out + parts[:, :, 2] @ weight[:, 2].T - parts[:, :, 1] @ weight[:, 1].T

    batches = []
    for lengths in ((4, 7), (5,), (9, 3, 3)):
        batch = random_inputs(lengths)
        thoughts = torch.tensor(form.tokens).expand(len(lengths), -1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(thoughts)], 1)
        ids = torch.cat([batch["input_ids"].clamp(max=49), thoughts], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        batches.append({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    with torch.no_grad():
        with transplanted(host, [Transplant((1, 1), donor, (1, 2))], new_tokens=new_tokens):
            found = [host(**batch, use_cache=True).logits for batch in batches]
        hook = output.register_forward_hook(by_hand)
        wanted = [host(**batch).logits for batch in batches]
        hook.remove()
        clean = [host(**batch).logits for batch in batches]
    for batch, got, right, without in zip(batches, found, wanted, clean, strict=True):
        real = batch["attention_mask"].bool()
        assert torch.allclose(got[real], right[real], atol=1e-5)
        assert (got[:, -1] - without[:, -1]).abs().max() > 1e-3


# -- maps --------------------------------------------------------------------------------------------------------------


def shared_beginnings() -> list[tuple[int, ...]]:
    """40 texts of unequal lengths, of which many begin alike and some are the same."""
    rows = [(5, 6, *random_prompts((9 + i % 5,), seed=i % 33).input_ids[0]) for i in range(40)]
    return [row if i % 2 else row[1:] for i, row in enumerate(rows)]


@pytest.mark.parametrize("method", ["ridge", "procrustes"])
@pytest.mark.parametrize(("family", "donor_family"), [("gpt2", "mistral"), ("gemma2", "gpt2")])
def test_maps_are_the_textbooks_and_tested_on_texts_they_have_not_seen(
    method: str, family: str, donor_family: str
) -> None:
    host, donor = random_model(family), random_model(donor_family, seed=1)
    rows = shared_beginnings()
    prompts = TokenizedPrompts(tuple(rows))
    kwargs: dict[str, Any] = {"alpha": 0.03} if method == "ridge" else {}
    found = fit_maps(host, donor, Paired(prompts, prompts), [(1, 2), (0, 0)], method=method, batch_size=7, **kwargs)
    assert list(found) == [(1, 2), (0, 0)]
    train, test = slow.split(rows, 10)
    assert len(train) + len(test) < sum(map(len, rows)) - 50
    host_streams = [slow.streams(host, row, 1) for row in rows]
    donor_streams = [slow.streams(donor, row, 2) for row in rows]

    def stacked(streams: Any, side: int, which: list[tuple[int, int]]) -> np.ndarray:
        return np.stack([streams[prompt][side][at].numpy() for prompt, at in which])

    for fitted, sources, targets, side in (
        (found[1, 2].into, host_streams, donor_streams, 0),
        (found[1, 2].back, donor_streams, host_streams, 1),
    ):
        x, y = stacked(sources, side, train), stacked(targets, side, train)
        mx, my = x.mean(0), y.mean(0)
        if method == "ridge":
            # As least squares with the penalty written out as further rows.
            penalty = np.sqrt(0.03 * ((x - mx) ** 2).sum() / x.shape[1]) * np.eye(x.shape[1])
            rows_x, rows_y = np.vstack([x - mx, penalty]), np.vstack([y - my, np.zeros((x.shape[1], y.shape[1]))])
            weight = np.linalg.lstsq(rows_x, rows_y, rcond=None)[0]
        else:
            wide = max(x.shape[1], y.shape[1])
            filled = [np.pad(z, ((0, 0), (0, wide - z.shape[1]))) for z in (x - mx, y - my)]
            u, _, vt = np.linalg.svd(filled[0].T @ filled[1])
            turn = (u @ vt)[: x.shape[1], : y.shape[1]]
            turned = (x - mx) @ turn
            weight = turn * (turned * (y - my)).sum() / (turned**2).sum()
        # The rotation of what is filled up is not unique; of what is not, it is.
        assert np.allclose(fitted.weight.numpy(), weight, atol=2e-4)
        assert np.allclose(fitted(torch.tensor(x).float()).numpy(), (x - mx) @ weight + my, atol=2e-3)
        difference = torch.tensor(x[:3] - x[3:6]).float()
        assert np.allclose(fitted.change(difference).numpy(), (x[:3] - x[3:6]) @ weight, atol=2e-3)
        fit = fitted.fit
        assert isinstance(fit, MapFit)
        assert (fit.train_tokens, fit.test_tokens, fit.short) == (len(train), len(test), False)
        assert (fit.d_in, fit.d_out) == (x.shape[1], y.shape[1])
        assert fit.alpha == (0.03 if method == "ridge" else None)
        for r2, which in ((fit.r2_train, train), (fit.r2_test, test)):
            inputs, goal = stacked(sources, side, which), stacked(targets, side, which)
            error = ((goal - ((inputs - mx) @ weight + my)) ** 2).sum()
            assert math.isclose(r2, 1 - error / ((goal - my) ** 2).sum(), abs_tol=1e-5)


def test_a_rotated_copy_is_found_by_both_methods() -> None:
    """A donor whose stream is the host's turned about: A turns, B turns back, and the head does as its original did."""
    host = random_model("llama3_1")
    prompts = random_prompts((12,) * 30)
    same = fit_maps(host, host, Paired(prompts, prompts), [(1, 1)], method="procrustes")[1, 1]
    width = host.config.hidden_size
    for one in same:
        assert torch.allclose(one.weight, torch.eye(width), atol=1e-4) and one.fit.r2_test == pytest.approx(1.0)
    ridge = fit_maps(host, host, Paired(prompts, prompts), [(1, 1)], alpha=1e-9)[1, 1]
    inputs = random_inputs(LENGTHS)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        clean = host(**inputs).logits[real]
        for maps in (same, ridge):
            with transplanted(host, [Transplant((1, 2), host, (1, 2), maps)]):
                assert torch.allclose(host(**inputs).logits[real], clean, atol=1e-3)


def test_a_token_that_only_one_tokenizer_puts_in_front_has_no_partner() -> None:
    host, donor = random_model("qwen2_5"), random_model("mistral", seed=1)
    rows = random_prompts((11,) * 12).input_ids
    longer = tuple((1, *row) for row in rows)
    for paired in (
        Paired(TokenizedPrompts(rows), TokenizedPrompts(longer)),
        Paired(TokenizedPrompts(longer), TokenizedPrompts(rows)),
    ):
        maps = fit_maps(host, donor, paired, [(0, 0)], alpha=1.0)[0, 0]
        train, test = slow.split(rows, 3)
        assert maps.into.fit is not None
        assert (maps.into.fit.train_tokens, maps.into.fit.test_tokens) == (len(train), len(test))
        means = []
        for model, prompts in ((host, paired.host), (donor, paired.donor)):
            before = [slow.streams(model, row, 0)[0][-11:] for row in prompts.input_ids]
            means.append(torch.stack([before[prompt][at] for prompt, at in train]).mean(0))
        assert torch.allclose(maps.into(means[0].float()), means[1].float(), atol=1e-4)


def test_texts_are_paired_where_the_pieces_are_the_same() -> None:
    texts = ["Ann has 3 pens", "Bob has 12 pens and 3 hats"]
    one, other = word_tokenizer(texts, bos=True), word_tokenizer([*texts, "Zoe Ann added"], eos=True)
    paired = pair_texts(texts, one, other)
    assert [len(row) for row in paired.host.input_ids] == [5, 8]
    assert [len(row) for row in paired.donor.input_ids] == [4, 7]
    for mine, its in zip(paired.host.input_ids, paired.donor.input_ids, strict=True):
        assert one.convert_ids_to_tokens(list(mine))[1:] == other.convert_ids_to_tokens(list(its))
    split = bpe_tokenizer(["xyz"])
    with pytest.raises(
        ValueError, match=r"another vocabulary .* of text 0 after 'A', so that their tokens do not correspond"
    ):
        pair_texts(texts, one, split)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lasso"}, "unknown method 'lasso'; choose ridge or procrustes"),
        ({"alpha": 0.0}, "alpha must be above 0, not 0.0"),
        ({"alpha": float("nan")}, "alpha must be above 0, not nan"),
        ({"test_share": 1.0}, "test_share must lie between 0 and 1, not be 1.0"),
        ({"layers": [(3, 0)]}, "no layer 3 in the host"),
        ({"layers": [(0, 3)]}, "no layer 3 in the donor"),
        ({"texts": 1}, "maps need texts to fit and others to test them, but there are 1"),
        ({"texts": 4}, "27 tokens are too few to fit maps between streams of 42 and 44 dimensions"),
        ({"texts": 4, "method": "procrustes", "alpha": 1.0}, "27 tokens are too few"),
        ({"same": True}, "no test text has a context that the training texts lack"),
    ],
)
def test_maps_that_cannot_be_fitted_are_refused(changes: dict[str, Any], message: str) -> None:
    host, donor = random_model("qwen2_5"), random_model("mistral")
    prompts = random_prompts((9,) * changes.pop("texts", 20))
    if changes.pop("same", False):
        prompts = prompts.take([0] * 8)
    arguments: dict[str, Any] = {"layers": [(0, 0)], **changes}
    with pytest.raises(ValueError, match=message) as error:
        fit_maps(host, donor, Paired(prompts, prompts), **arguments)
    assert str(error.value).count(". ") == 0


def test_behind_blocks_that_run_attention_and_mlp_side_by_side_the_stream_is_that_behind_the_block() -> None:
    """There is none between the two; what a head writes is in the block's output."""
    host, donor = random_model("llama3_1"), random_model("gpt_neox", seed=1)
    prompts = random_prompts((9,) * 12)
    maps = fit_maps(host, donor, Paired(prompts, prompts), [(1, 0)], alpha=0.1)[1, 0]
    back = fit_maps(donor, host, Paired(prompts, prompts), [(0, 1)], alpha=0.1)[0, 1]
    train, _ = slow.split(list(prompts.input_ids), 3)
    behind: list[Tensor] = []
    hook = donor.gpt_neox.layers[0].register_forward_hook(lambda *given: behind.append(given[2][0]))
    middle = [slow.streams(host, ids, 1)[1] for ids in prompts.input_ids]
    with hook, torch.no_grad():
        for ids in prompts.input_ids:
            donor(torch.tensor([ids]))
    its, own = (torch.stack([x[prompt].reshape(9, -1)[at] for prompt, at in train]) for x in (behind, middle))
    for fitted, x, y in ((maps.back, its, own), (back.back, own, its)):
        assert torch.allclose(fitted(x.float()).mean(0), y.float().mean(0), atol=1e-4)
        x = x.double() - x.double().mean(0)
        gram = x.T @ x + 0.1 * x.square().sum() / x.shape[1] * torch.eye(x.shape[1])
        weight = torch.linalg.solve(gram, x.T @ (y.double() - y.double().mean(0)))
        assert torch.allclose(fitted.weight, weight.float(), atol=1e-3)


def test_the_stream_behind_attention_is_found_where_a_norm_is_given_tokens_without_their_batch() -> None:
    host, donor = random_model("opt"), random_model("mistral")
    prompts = random_prompts((9,) * 12)
    maps = fit_maps(host, donor, Paired(prompts, prompts), [(0, 0)], alpha=0.1)[0, 0]
    train, _ = slow.split(list(prompts.input_ids), 3)
    behind: list[Tensor] = []
    hook = host.model.decoder.layers[0].final_layer_norm.register_forward_pre_hook(
        lambda _, args: behind.append(args[0].reshape(9, -1))
    )
    with hook, torch.no_grad():
        for ids in prompts.input_ids:
            host(torch.tensor([ids]))
    its = torch.stack([slow.streams(donor, prompts.input_ids[prompt], 0)[1].reshape(9, -1)[at] for prompt, at in train])
    own = torch.stack([behind[prompt][at] for prompt, at in train])
    assert torch.allclose(maps.back(its.float()).mean(0), own.mean(0), atol=1e-4)


def test_with_an_alpha_few_tokens_do_and_it_is_said() -> None:
    host, donor = random_model("qwen2_5"), random_model("mistral")
    prompts = random_prompts((9,) * 4)
    maps = fit_maps(host, donor, Paired(prompts, prompts), [(0, 0)], alpha=0.5)[0, 0]
    assert maps.into.fit is not None and maps.into.fit.short and maps.into.fit.as_dict()["short"]
    with torch.no_grad():
        host.model.layers[0].self_attn.o_proj.weight[0] = torch.nan
    with pytest.raises(ValueError, match="residual stream of layer 0 is not finite"):
        fit_maps(host, donor, Paired(prompts, prompts), [(0, 0)], alpha=0.5)
    assert not hooks_of(host) and not hooks_of(donor)

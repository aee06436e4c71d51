"""Continuous thoughts against stepping with a cache, one question at a time; interventions at latent steps; files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyvene_ext import ActivationPatch, PathPatch, patch
from pyvene_ext.engine.compile import compile_spec
from pyvene_ext.engine.plain import reference_for, run
from pyvene_ext.engine.reading import read
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.engine.sweep import plan_sweep, sweep
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.atp import atp
from pyvene_ext.methods.attribution.edges import edge_attribution
from pyvene_ext.methods.attribution.inputs import Target, integrated_gradients
from pyvene_ext.methods.heads.flow import flow_routes
from pyvene_ext.methods.heads.lens import logit_lens
from pyvene_ext.methods.heads.patterns import read_patterns
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.methods.solving.replacing import Transcripts
from pyvene_ext.models.identity import weight_hash
from pyvene_ext.models.latent_steps import (
    Format,
    attach,
    format_of,
    is_unrolling,
    projection,
    save,
)
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.problems import Problem, Questions, with_latents
from pyvene_ext.specs.ablation import Ablation, donors
from pyvene_ext.specs.forced_attention import ForcedAttention
from tests.ground_truth.ablations import statistics
from tests.ground_truth.continuous_thought import At, thought, written
from tests.ground_truth.forced_attention import Forced
from tests.pyvene_ext.methods.solving.test_evaluate import tokenizer
from tests.random_prompts import random_prompts
from tests.saved_models import save_random_model
from tests.tiers import first_only
from tests.tiny_random import VOCAB, random_model

FAMILIES = ("qwen2_5", "gemma2", "llama3_1", "mistral", "gpt2")  # whose modules the slow versions know
LENGTHS = (9, 6, 7, 5)
BOT, LATENT, EOT, END = VOCAB - 3, VOCAB - 2, VOCAB - 1, 47
FORM = Format(opening=(END, BOT), latent=LATENT, closing=(EOT,))
NEVER = (BOT, LATENT, EOT)


def projection_of(d_model: int, norm: bool = True) -> Any:
    torch.manual_seed(1)
    made = projection(d_model, 23, norm)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    return made


def thinking(
    family: str, norm: bool = True, attention: str | None = "eager"
) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A model with latent steps, the same without, and the projection's weights.

    Their weights are halved: from thought to thought the random models otherwise make a rounding error ten times larger.
    """
    model, plain = (random_model(family, attn_implementation=attention) for _ in range(2))
    for each in (model, plain):
        for parameter in each.parameters():
            parameter.data.mul_(0.5 if parameter.ndim > 1 else 1)
        each.generation_config.eos_token_id = None
    how = projection_of(model.config.hidden_size, norm)
    weights = {name: tensor.clone() for name, tensor in how.state_dict().items()}
    attach(model, FORM, how)
    return model, plain, weights


def asked(model: Any, lengths: tuple[int, ...] = LENGTHS) -> Questions:
    prompts = random_prompts(lengths)
    # No token of a question is one of the format.
    ids = tuple(tuple(3 + token % 40 for token in row) for row in prompts.input_ids)
    problems = tuple(Problem(question="?", solution="", answer=0, steps=1) for _ in lengths)
    prompts = type(prompts)(ids, prompts.answers, ({"end": -1, "last": -1},) * len(ids), prompts.pad_id)
    return with_latents(
        Questions(problems, prompts, lengths, (range(0),) * len(lengths), tuple(range(len(lengths)))), model
    )


def question(questions: Questions, which: int) -> list[int]:
    return list(questions.prompts.input_ids[which][: questions.lengths[which]])


def batch_logits(model: Any, questions: Questions) -> list[torch.Tensor]:
    """Logits of every prompt, `[pos vocab]`, from one padded batch."""
    (batch,) = questions.prompts.batches(9)
    with torch.no_grad():
        out = model(**batch.inputs()).logits
    rows = zip(batch.index, batch.lengths, strict=True)
    return [logits for _, logits in sorted((which, out[row, -n:]) for row, (which, n) in enumerate(rows))]


def edits_of(questions: Questions, which: int, made: list[tuple[str, int | None, Any, Any, str]]) -> list[At]:
    """Edits at named positions of one prompt; `new` may depend on the prompt and the position."""
    at = {
        name: len(questions.prompts.input_ids[which]) + place
        for name, place in questions.prompts.positions[which].items()
    }
    return [At(site, layer, at[name], new(which, at[name]), heads) for site, layer, heads, new, name in made]


def by_hand(
    plain: Any, weights: Any, questions: Questions, which: int, edits: Any = (), forced: Any = (), new: int = 8
) -> Any:
    """Logits of a prompt, and what is written behind it."""
    run, logits, _ = thought(plain, question(questions, which), FORM.opening, FORM.closing, weights, 6, edits, forced)
    return logits, tuple(written(run, logits, END, NEVER, new))


# -- without interventions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", None])
def test_logits_in_a_padded_batch_are_those_of_stepping_with_a_cache(family: str, attention: str) -> None:
    model, plain, weights = thinking(family, norm=attention == "eager", attention=attention)
    questions = asked(model)
    for which, logits in enumerate(batch_logits(model, questions)):
        expected, _ = by_hand(plain, weights, questions, which)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not is_unrolling(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_stepping_with_a_cache(family: str) -> None:
    model, plain, weights = thinking(family)
    questions = asked(model)
    found = evaluate(model, tokenizer(), questions, max_new_tokens=8, batch_size=3)
    assert found.ids == tuple(by_hand(plain, weights, questions, which)[1] for which in range(len(questions)))
    assert len(set(found.ids)) > 1 and not set(NEVER) & {token for ids in found.ids for token in ids}


def test_without_projection_states_enter_as_they_are() -> None:
    model, plain = (random_model("gpt2") for _ in range(2))
    attach(model, FORM.model_copy(update={"projection": False}))
    questions = asked(model)
    for which, logits in enumerate(batch_logits(model, questions)):
        torch.testing.assert_close(logits, by_hand(plain, None, questions, which)[0], atol=1e-5, rtol=1e-5)


# -- under interventions -----------------------------------------------------------------------------------------------


def check_spec(family: str, spec: Any, edits: Any, forced: Any = lambda questions, which: (), **_: Any) -> None:
    """What a spec does in padded batches is what plain hooks do while stepping; and it does something."""
    model, plain, weights = thinking(family)
    questions = asked(model)
    reference = reference_for(model, [spec], questions.prompts, progress=False)
    made = edits(model, plain, weights, questions, reference)
    clean = [by_hand(plain, weights, questions, which)[0] for which in range(len(questions))]
    expected = [
        by_hand(plain, weights, questions, which, edits_of(questions, which, made), forced(questions, which))
        for which in range(len(questions))
    ]
    kept: list[Any] = [None] * len(questions)
    for batch in questions.prompts.batches(9):
        compiled = compile_spec(spec, batch, resolve([spec], model, questions.prompts, reference=reference))
        iv = IntervenableModel(compiled.config, model)
        with torch.no_grad():
            _, out = iv(
                batch.inputs(),
                unit_locations=compiled.unit_locations,
                source_representations=compiled.source_representations(iv.sorted_keys),
            )
        for row, (which, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
            kept[which] = out.logits[row, -length:]
    for logits, (right, _), before in zip(kept, expected, clean, strict=True):
        torch.testing.assert_close(logits, right, atol=1e-5, rtol=1e-5)
        assert (right[-1] - before[-1]).abs().max() > 1e-3
    found = evaluate(model, tokenizer(), questions, spec, "prompt", max_new_tokens=8, batch_size=3, reference=reference)
    assert found.ids == tuple(ids for _, ids in expected)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules() if m is not model].count(0)


def zeros(which: int, position: int) -> Any:
    return torch.zeros_like


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_ablated_at_latent_steps_change_the_thoughts_behind(family: str) -> None:
    spec = tuple(
        Ablation(kind="zero", site="z", layer=at, heads=(0, 2), positions=("latent_1", "latent_3")) for at in (0, 2)
    )
    spec = spec if family != "mistral" else spec[:1]
    check_spec(
        family,
        spec,
        lambda *_: [("z", e.layer, (0, 2), zeros, name) for e in spec for name in ("latent_1", "latent_3")],
    )


def transcripts_by_hand(
    plain: Any, weights: Any, questions: Questions, site: str, layer: int | None
) -> list[torch.Tensor]:
    """The activations `[pos .]` of every prompt at a site, from stepping."""
    rows = []
    for which in range(len(questions)):
        seen: list[torch.Tensor] = []

        def keep(x: torch.Tensor, seen: Any = seen) -> torch.Tensor:
            seen.append(x.clone())
            return x

        edits = [At(site, layer, position, keep) for position in range(len(questions.prompts.input_ids[which]))]
        thought(plain, question(questions, which), FORM.opening, FORM.closing, weights, 6, edits)
        rows.append(torch.stack(seen))
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_take_their_mean_over_questions_thoughts_and_all(family: str) -> None:
    spec = Ablation(kind="mean", site="z", layer=1, heads=(1, 3), positions=("latent_0", "latent_5"))

    def edits(model: Any, plain: Any, weights: Any, questions: Questions, reference: Any) -> Any:
        mean, _ = statistics(transcripts_by_hand(plain, weights, questions, "z", 1))
        torch.testing.assert_close(reference.mean(("z", 1)), mean, atol=1e-6, rtol=1e-5)
        return [("z", 1, (1, 3), lambda *_: lambda x: mean.to(x), name) for name in spec.positions]

    check_spec(family, spec, edits)


@pytest.mark.parametrize(
    ("family", "site", "layer"),
    [
        ("gpt2", "embed", None),
        ("llama3_1", "embed", None),
        ("qwen2_5", "embed", None),
        ("gpt2", "resid_post", 1),
        ("qwen2_5", "k", 0),
    ],
)
def test_noise_at_a_latent_step_is_one_draw_in_every_run(family: str, site: str, layer: int | None) -> None:
    heads: Any = (0, 1) if site == "k" else None
    spec = Ablation(kind="noise", site=site, layer=layer, heads=heads, positions="latent_2", seed=4)

    def edits(model: Any, plain: Any, weights: Any, questions: Questions, reference: Any) -> Any:
        mean, std = statistics(transcripts_by_hand(plain, weights, questions, site, layer))

        def noised(which: int, position: int) -> Any:
            size = (len(questions.prompts.input_ids[which]), mean.shape[-1])
            draws = [
                torch.from_numpy(rng(4, "noise", site, str(layer), str(head), which).standard_normal(size)).float()
                for head in heads or (None,)
            ]
            drawn = torch.stack(draws, 1)[position] if heads else draws[0][position]

            def new(x: torch.Tensor) -> torch.Tensor:
                made = x.clone()
                made[: len(drawn)] = (mean[: len(drawn)] + std[: len(drawn)] * drawn).to(x)
                return made

            return new

        return [(site, layer, heads, noised, "latent_2")]

    check_spec(family, spec, edits)


@pytest.mark.parametrize(
    ("family", "shape", "hard"),
    [*((family, "hub", False) for family in FAMILIES), ("gpt2", "uniform", True), ("qwen2_5", "sequential", False)],
)
def test_attention_forced_among_thoughts(family: str, shape: Any, hard: bool) -> None:
    hub = "latent_1" if shape == "hub" else None
    spec = tuple(
        ForcedAttention(layer=at, heads=(0, 3), shape=shape, hub=hub, hard=hard, block=("block_first", "block_last"))
        for at in (0, 1)
    )

    def forced(questions: Questions, which: int) -> list[Forced]:
        block = questions.blocks[which]
        return [Forced(at, (0, 3), shape, block[0], block[-1], block[1] if hub else None, hard) for at in (0, 1)]

    check_spec(family, spec, lambda *_: [], forced)


@pytest.mark.parametrize(
    ("kind", "scope"), first_only([("resample", "both"), ("resample", "prompt"), ("mean", "both")])
)
def test_latent_steps_and_new_tokens_take_other_problems_activations(kind: Any, scope: Any) -> None:
    model, plain, weights = thinking("qwen2_5")
    questions = asked(model)
    heads = (0, 1, 2, 4, 5)
    spec = Ablation(kind=kind, site="z", layer=1, heads=heads, positions=("latent_0", "latent_3", "latent_5", "eot"))
    clean = evaluate(model, tokenizer(), questions, max_new_tokens=8, batch_size=3)
    transcripts = Transcripts.compute(model, questions, clean, [spec])
    found = evaluate(model, tokenizer(), questions, spec, scope, max_new_tokens=8, batch_size=3, reference=transcripts)
    assert transcripts is not None
    for ids, named in zip(
        transcripts.reference.prompts.input_ids, transcripts.reference.prompts.positions, strict=True
    ):
        assert (ids[named["bot"]], ids[named["latent_5"]], ids[named["eot"]]) == (BOT, LATENT, EOT)
    givers = donors(questions.prompts, questions.prompts, "last", 0)
    runs = [by_hand(plain, weights, questions, which)[1] for which in range(len(questions))]
    rows = []  # of every question, its thought and what is written
    for which, new in enumerate(runs):
        seen: list[torch.Tensor] = []
        length = len(questions.prompts.input_ids[which])
        keep = [At("z", 1, at, lambda x, seen=seen: seen.append(x.clone()) or x) for at in range(length + len(new))]
        run, *_ = thought(plain, question(questions, which), FORM.opening, FORM.closing, weights, 6, keep)
        for token in new:
            run.step([token])
        rows.append(torch.stack(seen))
    mean = torch.cat(rows).double().mean(0).float()
    changed = 0
    for which, before in enumerate(runs):
        length, giver = len(questions.prompts.input_ids[which]), rows[givers[which]]
        shift = questions.lengths[givers[which]] - questions.lengths[which]

        def value(position: int, giver: torch.Tensor = giver, shift: int = shift) -> Any:
            return lambda _: mean if kind == "mean" else giver[min(position + shift, len(giver) - 1)]

        at = [length + questions.prompts.positions[which][name] for name in spec.positions]
        at += range(length, length + 8) if scope == "both" else ()
        edits = [At("z", 1, position, value(position), heads) for position in at]
        _, expected = by_hand(plain, weights, questions, which, edits)
        assert found.ids[which] == expected
        changed += expected != before
    assert changed


def test_flow_and_patterns_are_those_of_the_last_run() -> None:
    model, plain, weights = thinking("qwen2_5")
    questions = asked(model)
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def see(layer: int, batch: Any, pattern: torch.Tensor) -> None:
        for row, (which, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
            assert (layer, which) not in seen  # once
            seen[layer, which] = pattern[row, :, -length:, -length:]

    read_patterns(model, questions.prompts, see, batch_size=3, progress=False)
    acts = read(model, questions.prompts, ("pattern", "resid_pre"), layers=(0, 1), batch_size=3, progress=False)
    routes = flow_routes(model, questions.prompts, batch_size=3, progress=False)
    for which, ids in enumerate(questions.prompts.input_ids):
        _, _, entered = thought(plain, question(questions, which), FORM.opening, FORM.closing, weights)
        embeds = plain.get_input_embeddings()(torch.tensor(ids)).detach().clone()
        embeds[list(questions.blocks[which])] = torch.cat(entered)
        with torch.no_grad():
            out = plain(inputs_embeds=embeds[None], output_attentions=True, output_hidden_states=True)
        for layer in acts.layers("pattern"):
            torch.testing.assert_close(acts["pattern", layer][which], out.attentions[layer][0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                acts["resid_pre", layer][which], out.hidden_states[layer][0], atol=1e-5, rtol=1e-5
            )
        for layer, pattern in enumerate(out.attentions):
            torch.testing.assert_close(seen[layer, which], pattern[0], atol=1e-5, rtol=1e-5)
        # Importances of one question alone, its thoughts known beforehand.
        hook = plain.get_input_embeddings().register_forward_hook(lambda *_, embeds=embeds: embeds[None])
        alone = flow_routes(plain, questions.prompts.take([which]), progress=False)
        hook.remove()
        np.testing.assert_allclose(routes.attention[which], alone.attention[0], atol=1e-5)


def test_positions_and_blocks_name_the_latent_steps() -> None:
    model, *_ = thinking("gpt2")
    questions = asked(model)
    for ids, named, block, length in zip(
        questions.prompts.input_ids, questions.prompts.positions, questions.blocks, questions.lengths, strict=True
    ):
        assert ids[length:] == (END, BOT, *[LATENT] * 6, EOT)
        assert [len(ids) + named[f"latent_{step}"] for step in range(6)] == list(block)
        assert (named["block_first"], named["block_last"]) == (named["latent_0"], named["latent_5"]) == (-7, -2)
        assert (ids[named["bot"]], ids[named["eot"]], named["last"]) == (BOT, EOT, -1)


# -- what cannot be, and files -----------------------------------------------------------------------------------------


def test_a_model_is_left_as_it_was_after_an_error() -> None:
    model, *_ = thinking("llama3_1")
    questions = asked(model)
    (batch,) = questions.prompts.batches(9)
    clean = batch_logits(model, questions)

    runs = []

    def broken(*_: Any) -> None:
        runs.append(is_unrolling(model))
        if len(runs) == 3:  # two latent steps are known by then
            raise KeyError("a hook")

    handle = model.model.layers[1].register_forward_hook(broken)
    with pytest.raises(KeyError):
        model(**batch.inputs())
    handle.remove()
    assert runs == [True] * 3 and not is_unrolling(model)
    ids = batch.input_ids
    embedded = model.get_input_embeddings()(ids)  # nothing is filled in outside of a run
    torch.testing.assert_close(embedded, torch.nn.functional.embedding(ids, model.get_input_embeddings().weight))
    for before, after in zip(clean, batch_logits(model, questions), strict=True):
        torch.testing.assert_close(before, after, atol=0, rtol=0)


def test_latent_steps_without_the_token_before_are_refused() -> None:
    model, *_ = thinking("gpt2")
    with pytest.raises(ValueError, match="a latent step follows from the token before it"):
        model(torch.tensor([[LATENT, 5]]))
    past = model(torch.tensor([[4, 5]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a latent step follows from the token before it"):
        model(torch.tensor([[BOT, LATENT]]), past_key_values=past)
    with pytest.raises(ValueError, match="pads with token 59, which stands for latent steps"):
        questions = asked(model)
        with_latents(
            dataclasses.replace(questions, prompts=dataclasses.replace(questions.prompts, pad_id=LATENT)), model
        )
    with pytest.raises(ValueError, match="the model has no latent steps"):
        with_latents(asked(model), random_model("gpt2"))


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"closing": (VOCAB,)}, True, "has token 61 but the model embeds 61"),
        ({"latent": BOT}, True, "stands for latent steps alone"),
        ({"template": "Q: "}, True, "has {question} once"),
        ({}, False, "exactly if the format has one"),
        ({"projection": False}, True, "exactly if the format has one"),
    ],
)
def test_formats_that_do_not_fit(fields: dict[str, Any], given: bool, message: str) -> None:
    model = random_model("gpt2")
    how = projection_of(35) if given else None
    with pytest.raises(ValueError, match=message):
        attach(model, Format(**{**FORM.model_dump(), **fields}), how)
    assert format_of(model) is None and not model.base_model._forward_pre_hooks
    attach(model, FORM, projection_of(35))
    with pytest.raises(ValueError, match="has latent steps already"):
        attach(model, FORM, projection_of(35))


def saved(folder: Path) -> Any:
    """A GPT-2 with latent steps in a folder."""
    save_random_model("gpt2", folder)
    model, words = load_model(folder)
    model.resize_token_embeddings(len(words) + 3)
    form = Format(
        opening=(len(words),), latent=len(words) + 1, closing=(len(words) + 2,), template="Question: {question} Answer:"
    )
    attach(model, form, projection_of(35))
    save(model, words, folder)
    return model


def test_a_saved_model_is_read_back(tmp_path: Path) -> None:
    model = saved(tmp_path)
    again, _ = load_model(tmp_path)
    assert format_of(again) == format_of(model) and weight_hash(again) == weight_hash(model)
    form: Any = format_of(model)
    ids = torch.tensor([[4, 5, 6, *form.tokens]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)
    assert "latent" not in " ".join(load_file(tmp_path / "model.safetensors"))
    half, _ = load_model(tmp_path, dtype="bfloat16")
    assert half(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match="has no latent steps"):
        save(random_model("gpt2"), None, tmp_path)  # type: ignore[arg-type]


def test_broken_folders_are_one_sentence(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    projected = load_file(tmp_path / "projection.safetensors")

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_model(tmp_path)
        assert "\n" not in str(caught.value)

    save_file({**projected, "1.weight": torch.zeros(4, 4)}, tmp_path / "projection.safetensors")
    refused("a projection has the weights")
    (tmp_path / "projection.safetensors").write_bytes(b"no")
    refused("projection.safetensors beside config.json cannot be read")
    (tmp_path / "projection.safetensors").unlink()
    refused("projection.safetensors beside config.json cannot be read")
    for field, value, message in (
        ("steps", 0, "continuous_thought.steps in config.json cannot be used"),
        ("latent", 10**6, "the model embeds"),
    ):
        (tmp_path / "config.json").write_text(
            json.dumps(
                {**config, "continuous_thought": {**config["continuous_thought"], "projection": False, field: value}}
            )
        )
        refused(message)


def test_the_fast_engine_refuses_latent_steps_and_the_plain_one_runs_them() -> None:
    model, plain, weights = thinking("gpt2")
    questions = asked(model)
    spec = Ablation(kind="zero", site="z", layer=1, heads=(0,), positions="latent_2")
    for refused in (sweep, plan_sweep):
        with pytest.raises(ValueError, match="these prompts have latent steps"):
            refused(model, [spec], questions.prompts, "probability")
    found = run(model, [spec], questions.prompts, "probability", progress=False)
    for which, (io, _) in enumerate(questions.prompts.answer_ids):
        made = edits_of(questions, which, [("z", 1, (0,), zeros, "latent_2")])
        right = by_hand(plain, weights, questions, which, made)[0][-1].softmax(-1)[io]
        assert found.intervened[0, which] == pytest.approx(float(right), rel=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        lambda model, prompts: atp(model, ActivationPatch(site="z", layer=0, heads=(0,)), prompts, prompts),
        lambda model, prompts: edge_attribution(model, prompts, prompts),
        lambda model, prompts: logit_lens(model, prompts),
        lambda model, prompts: integrated_gradients(model, prompts, Target(0, 0, [[0]] * len(prompts))),
        lambda model, prompts: patch(
            model, [PathPatch(sender="z.0.1", receivers=("logits",))], prompts, prompts, engine="plain"
        ),
    ],
    ids=["atp", "edges", "lens", "integrated gradients", "paths"],
)
def test_what_asks_for_one_run_refuses_prompts_that_take_several(method: Any) -> None:
    model, _, _ = thinking("gpt2")
    with pytest.raises(ValueError, match="these prompts have latent steps"):
        method(model, asked(model).prompts)

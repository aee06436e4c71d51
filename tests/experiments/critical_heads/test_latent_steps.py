"""The studies on a model of continuous thoughts, against stepping with a cache, one question at a time."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from critical_heads import ablate_heads, force_attention, patch_hub, rank_heads
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.seeds import rng
from pyvene_ext.models.latent_steps import (
    Format,
    attach,
    projection,
    save,
)
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.tiny_tasks import draw
from pyvene_ext.runs import figures
from pyvene_ext.runs.ablated import Solver
from pyvene_ext.stats import accuracy
from tests.experiments.critical_heads.by_hand import table
from tests.ground_truth.ablations import statistics
from tests.ground_truth.continuous_thought import At, thought, written
from tests.ground_truth.forced_attention import Forced
from tests.saved_models import shipped_tokenizer
from tests.tiny_random import tiny_config

N = 7
LAYERS, HEADS = 3, 6
TOKENIZER = shipped_tokenizer()
COUNT = len(TOKENIZER)
FORM = Format(
    opening=(COUNT,), latent=COUNT + 1, closing=(COUNT + 2,), steps=4, template="Question: {question} Answer:"
)
EXAMPLES = [draw("arithmetic", rng(5, "x", i), held_out=True) for i in range(N)]
STEPS = [f"latent_{step}" for step in range(4)]


@cache
def plain() -> Any:
    """A random model that writes nothing but numbers, and others for other questions."""
    config: Any = tiny_config("llama3_1")
    config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings = COUNT + 3, 128, False
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    silent = [at for token, at in TOKENIZER.get_vocab().items() if not token.isdecimal()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
        model.lm_head.weight[[*silent, *FORM.tokens]] = 0
        # What all states before an answer have in common does not count.
        same = torch.zeros(42)
        for which in range(N):
            run, *_ = thought(model, ids(which), FORM.opening, (), weights(), FORM.steps)
            same += run.step(FORM.closing)[0][-1] / N
        model.lm_head.weight -= torch.outer(model.lm_head.weight @ same, same) / (same @ same)
    return model


@cache
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: 0.7 * torch.randn_like(x) for name, x in projection(42, 30).state_dict().items()}


def ids(which: int) -> list[int]:
    return TOKENIZER(EXAMPLES[which].prompt)["input_ids"]


def position(which: int, step: int) -> int:
    return len(ids(which)) + 1 + step


def answers(edits: Any = lambda which: (), forced: Any = lambda which: ()) -> list[list[int]]:
    """The two numbers that are written for each problem."""
    found = []
    for which in range(N):
        run, logits, _ = thought(
            plain(), ids(which), FORM.opening, FORM.closing, weights(), FORM.steps, edits(which), forced(which)
        )
        found.append([int(word) for word in TOKENIZER.decode(written(run, logits, None, (), 2)).split()])
    return found


def gold() -> list[int]:
    """What the untouched model answers; but to two problems."""
    return [found[-1] if which not in (2, 5) else found[-1] + 1 for which, found in enumerate(answers())]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accuracy, "RESAMPLES", 100)
    monkeypatch.setattr(figures, "save", lambda *_: None)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the problems."""
    where = tmp_path_factory.mktemp("made")
    model: Any = LlamaForCausalLM(plain().config)
    model.load_state_dict(plain().state_dict())
    how = projection(42, 30)
    how.load_state_dict(weights())
    attach(model, FORM, how)
    save(model, TOKENIZER, where / "thinker")
    lines = [
        json.dumps(
            {"question": e.prompt.removeprefix("Question: ").removesuffix(" Answer:"), "answer": f"#### {right}"}
        )
        for e, right in zip(EXAMPLES, gold(), strict=True)
    ]
    (where / "problems.jsonl").write_text("\n".join(lines) + "\n")
    return where


def command(study: Any, made: Path, *flags: Any) -> int:
    given = ["--models", made / "thinker", "--problems", made / "problems.jsonl", "--out", "out", "--batch_size", 3]
    return run_study(study.main, study.Config, [str(flag) for flag in (*given, *flags)])


def right(found: list[list[int]]) -> np.ndarray:
    return np.array([numbers[-1] == wanted for numbers, wanted in zip(found, gold(), strict=True)])


def zero(_: torch.Tensor) -> torch.Tensor:
    return torch.zeros(HEADS, 12)


@pytest.mark.slow
def test_ablated_heads(made: Path, folder: Path) -> None:
    (folder / "heads.csv").write_text("scores,layer,head\n0.9,1,2\n0.8,0,1\n0.7,1,5\n")
    flags = ("--rankings", "heads.csv", "--n_heads", 1, 3, "--random_sets", 0, "--max_new_tokens", 2)
    flags += ("--scope", "reasoning", "new", "both")
    assert command(ablate_heads, made, *flags) == 0
    rows = table(folder / "out/ablations.csv")
    kept = np.load(folder / "out/correct/thinker.npy")
    seen = set()
    for row, found in zip(rows, kept, strict=True):
        heads = {"0": {}, "1": {1: (2,)}, "3": {1: (2, 5), 0: (1,)}}[row["n_heads"]]

        def edits(which: int, scope: str = row["scope"], heads: Any = heads) -> list[At]:
            first, behind = position(which, 0), position(which, 5)
            where = {"reasoning": range(first, behind - 1), "both": range(behind + 1)}
            where["new"] = (*where["reasoning"], behind)
            return [At("z", layer, at, zero, some) for layer, some in heads.items() for at in where[scope]]

        expected = answers(edits)
        assert found.tolist() == right(expected).tolist(), row
        seen.add(str(expected))
    assert len(rows) == 9 and len(seen) >= 6  # the untouched run thrice, and nearly all others differ
    assert float(rows[0]["accuracy"]) == pytest.approx(100 * 5 / 7)


def test_the_scopes_of_ablations_are_latent_steps_those_and_new_tokens_and_all(made: Path) -> None:
    nothing: Any = None
    model, _ = load_model(made / "thinker")
    places = Solver("", model, nothing, nothing, nothing, nothing).places
    assert (places("reasoning"), places("new"), places("both")) == (
        (tuple(STEPS), "prompt"),
        (tuple(STEPS), "both"),
        ("all", "both"),
    )


@pytest.mark.slow
def test_noise_at_a_latent_step(made: Path, folder: Path) -> None:
    flags = ("--sites", "embed", "resid", "--layers", 1, "--seeds", 1, "--min_problems", 2, "--answer_tokens", 2)
    assert command(patch_hub, made, *flags) == 0
    rows = {(row["site"], row["position"]): row for row in table(folder / "out/positions.csv")}
    assert list(rows) == [(site, str(step)) for site in ("embed", "resid.1") for step in range(4)]
    for name, site, layer in (("embed", "embed", None), ("resid.1", "resid_post", 1)):
        every = []
        for which in range(N):
            seen: list[torch.Tensor] = []
            keep = [
                At(site, layer, at, lambda x, seen=seen: seen.append(x.clone()) or x)
                for at in range(position(which, 5))
            ]
            thought(plain(), ids(which), FORM.opening, FORM.closing, weights(), FORM.steps, keep)
            every.append(torch.stack(seen))
        mean, std = statistics(every)
        for step in (0, 2):

            def edits(
                which: int, step: int = step, site: str = site, layer: Any = layer, mean: Any = mean, std: Any = std
            ) -> Any:
                drawn = rng(0, "noise", site, str(layer), "None", which).standard_normal((len(ids(which)) + 6, 42))
                at = position(which, step)
                return [At(site, layer, at, lambda x: mean + std * torch.from_numpy(drawn[at]).float())]

            found = right(answers(edits))
            assert float(rows[name, str(step)]["accuracy"]) == pytest.approx(100 * found.mean()), (name, step)


@pytest.mark.slow
def test_attention_forced_among_latent_steps(made: Path, folder: Path) -> None:
    flags = ("--shapes", "hub", "sequential", "--hub", -1, "--min_problems", 2, "--answer_tokens", 2)
    assert command(force_attention, made, *flags) == 0
    rows = {row["pattern"]: row for row in table(folder / "out/patterns.csv")}
    every = range(HEADS)
    seen = {str(answers())}
    for shape in ("hub", "sequential"):
        for hard in (False, True):

            def forced(which: int, shape: str = shape, hard: bool = hard) -> list[Forced]:
                block = position(which, 0), position(which, 3)
                return [
                    Forced(at, every, shape, *block, block[1] if shape == "hub" else None, hard) for at in range(LAYERS)
                ]

            found = answers(forced=forced)
            assert float(rows[shape + "_hard" * hard]["accuracy"]) == pytest.approx(100 * right(found).mean())
            seen.add(str(found))
    assert len(seen) > 1
    assert [row["position"] for row in table(folder / "out/hubs.csv")] == [str(step) for step in range(4) for _ in "sh"]


def test_heads_ranked_by_what_they_do_among_latent_steps(made: Path, folder: Path) -> None:
    assert command(rank_heads, made, "--answer_tokens", 2) == 0
    rows = {(int(row["layer"]), int(row["head"])): row for row in table(folder / "out/scores.csv")}
    skip, hub = np.zeros((LAYERS, HEADS)), np.zeros((LAYERS, HEADS))
    for which in range(N):
        question = ids(which)
        _, _, entered = thought(plain(), question, FORM.opening, FORM.closing, weights(), FORM.steps)
        embeds = plain().model.embed_tokens(torch.tensor([[*question, *FORM.tokens]])).detach().clone()
        first = len(question) + 1
        embeds[0, first : first + 4] = torch.cat(entered)
        with torch.no_grad():
            patterns = plain()(inputs_embeds=embeds, output_attentions=True).attentions
        for layer, pattern in enumerate(patterns):
            later = pattern[0][:, first + 1 :]  # of the block's tokens but the first, and of what is behind
            skip[layer] += later[..., 1:first].sum(-1).mean(-1).numpy() / N
            received = [later[:, step:, first + step].sum(-1) / later.shape[1] for step in range(4)]
            hub[layer] += torch.stack(received).max(0).values.numpy() / N
    for at, row in rows.items():
        assert float(row["skip"]) == pytest.approx(skip[at], abs=1e-5)
        assert float(row["hub"]) == pytest.approx(hub[at], abs=1e-5)
    assert json.loads((folder / "out/summary.json").read_text())["models"]["thinker"]["with_reasoning"] == N


def test_solved_examples_and_chats_are_not_for_models_of_continuous_thoughts(
    made: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (("--shots", 2), ("--chat",)):
        assert command(rank_heads, made, *flags) == 2
        assert "is asked as it was trained to be; leave out --shots and --chat" in capsys.readouterr().err
    assert command(rank_heads, made, "--answer_tokens", 100) == 2
    assert "generate fewer" in capsys.readouterr().err
    (made / "thinker" / "projection.safetensors").rename(folder / "away")
    try:
        assert command(rank_heads, made) == 2
        assert "projection.safetensors beside config.json cannot be read" in capsys.readouterr().err
    finally:
        (folder / "away").rename(made / "thinker" / "projection.safetensors")
    assert load_file(made / "thinker" / "projection.safetensors")["ln.bias"].shape == (42,)

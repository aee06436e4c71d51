"""Families in which heads cannot be ranked, or that lack a place: said in one sentence before a problem is solved."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from critical_heads import attribute_inputs, patch_hub, transplant_head

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.models.latent_steps import Format, attach, save
from pyvene_ext.runs import ablated, reasoning, transplants
from tests.saved_models import save_with_random_weights, shipped_tokenizer
from tests.tiny_random import CLASSES, tiny_config

MODEL = "m"  # its blocks run attention and MLP side by side


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config = tiny_config("gpt_neox")
    config.vocab_size, config.max_position_embeddings = len(shipped_tokenizer()), 128
    save_with_random_weights(CLASSES["gpt_neox"]["causal_lm"](config), tmp_path / MODEL)
    return tmp_path


@pytest.mark.parametrize(
    ("study", "flags"),
    [
        ("rank_heads", ()),
        ("ablate_heads", ()),
        ("stratify_difficulty", ()),
        ("attribute_inputs", ("--by", "flow")),
        ("transplant_head", ("--fit_problems", "2")),
        ("transplant_head", ("--models", "tiny-qwen2.5", "--donor", MODEL, "--heads", "0.1", "--fit_problems", "2")),
        ("probe_layers", ("--mid", "--limit", "10", "--min_problems", "10")),
    ],
)
def test_what_a_family_cannot_be_asked_is_said_before_problems_are_solved(
    study: str,
    flags: tuple[str, ...],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (reasoning, ablated, transplants):
        monkeypatch.setattr(module, "evaluate", None)
    module: Any = import_module(f"critical_heads.{study}")
    given = ("--models", MODEL, "--problems", "tiny", "--limit", "4", "--out", "x", *flags)
    assert run_study(module.main, module.Config, list(given)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "run attention and MLP side by side" in said
    assert ("; give heads, or a ranking from elsewhere." in said) == (study != "probe_layers")
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (transplant_head, ("--heads", "0.1", "--donor_heads", "0.2", "--fit_problems", "2")),
        (attribute_inputs, ()),
        (attribute_inputs, ("--heads", "0.1")),
        (patch_hub, ("--min_problems", "2")),
    ],
)
def test_what_it_can_be_asked_goes_on_to_the_problems(
    module: Any, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def solves(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(reasoning, "evaluate", solves)
    assert (
        run_study(
            module.main, module.Config, ["--models", MODEL, "--problems", "tiny", "--limit", "4", "--out", "x", *flags]
        )
        == 130
    )


@pytest.mark.parametrize(
    ("study", "flags", "message"),
    [
        ("attribute_inputs", ("--heads", "0.1", "--hub", "0"), "these prompts have latent steps"),
        (
            "transplant_head",
            ("--donor", "tiny-llama3.1", "--heads", "0.1", "--donor_heads", "0.1", "--fit_problems", "2"),
            "thinks in latent steps that tiny-llama3.1 does not know; use a donor with the same ones",
        ),
    ],
)
def test_what_latent_steps_cannot_be_asked_is_said_before_problems_are_solved(
    study: str,
    flags: tuple[str, ...],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, config = len(shipped_tokenizer()), tiny_config("llama3_1")
    config.vocab_size, config.max_position_embeddings = words + 3, 128
    model = CLASSES["llama3_1"]["causal_lm"](config)
    attach(model, Format(opening=(words,), latent=words + 1, closing=(words + 2,), projection=False))
    save(model, shipped_tokenizer(), folder / "thinks")
    monkeypatch.setattr(reasoning, "evaluate", None)
    module: Any = import_module(f"critical_heads.{study}")
    assert (
        run_study(
            module.main,
            module.Config,
            ["--models", "thinks", "--problems", "tiny", "--limit", "4", "--out", "x", *flags],
        )
        == 2
    )
    assert message in capsys.readouterr().err and not (folder / "x").exists()

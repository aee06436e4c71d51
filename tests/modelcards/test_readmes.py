"""The READMEs of the cards and CONTRIBUTING.md say what the code says: tables, counts, examples, traps."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pyvene.models.constants import CONST_INPUT_HOOK, split_half, split_three
from torch import Tensor

import pyvene_ext
from modelcards import CARDS, COMPONENTS, Card, n_layers
from pyvene_ext.intervenable.verification import OPERATIONS, Report, verify_card
from tests.tiny_random import CLASSES, FAMILIES, MORE_FAMILIES, random_inputs, random_model, tiny_config

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("modelcards", "pyvene_ext", "experiments")


def readme(family: str) -> str:
    return (ROOT / "modelcards" / family / "README.md").read_text(encoding="utf-8")


def card_named(family: str) -> Card:
    return next(card for card in CARDS if card.family == family)


# -- tables ------------------------------------------------------------------------------------------------------------


def component_table(family: str) -> str:
    """The README's table of components, from the card of the language-model class."""
    mapping = card_named(family).mapping(CLASSES[family]["causal_lm"])
    lines = ["| component | field | shape | unit | where | what |", "|---|---|---|---|---|---|"]
    for component in COMPONENTS.values():
        if component.name in mapping:
            field = f"`{component.field}`" if component.field else ""
            units = " ".join(f"`{unit}`" for unit in component.units)
            cells = (f"`{component.name}`", field, f"`{component.shape}`", units, place(*mapping[component.name]))
            lines.append(f"| {' | '.join((*cells, component.meaning))} |")
    return "\n".join(lines) + "\n"


def place(path: str, hook: str, *splits: tuple) -> str:
    """Where a component lives, in words; L stands for the layer."""
    side = "input" if hook == CONST_INPUT_HOOK else "output"
    parts = {split_three: ("first third", "middle third", "last third"), split_half: ("first half", "second half")}
    part = "".join(f", {parts[split][which]}" for split, which in splits if split in parts)
    return f"`{path.replace('%s', 'L')}` {side}{part}"


@pytest.mark.parametrize("family", (*FAMILIES, *MORE_FAMILIES))
def test_the_table_of_components_is_the_cards(family: str) -> None:
    table = component_table(family)
    assert table in readme(family), f"modelcards/{family}/README.md needs exactly this table:\n\n{table}"


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_a_short_readme_names_classes_checkpoint_and_what_there_is_not(family: str) -> None:
    card, text = card_named(family), readme(family)
    assert all(f"`{cls.__name__}`" in text for cls in CLASSES[family].values())
    assert f"`{card.checkpoint}`" in text
    assert all(f"`{name}`" in text.split("## What it lacks")[1] for name in card.absent)
    assert ("## What it lacks" in text) == bool(card.absent or card.covers)
    if card.covers is not None:
        assert card.covered in text


@pytest.mark.parametrize("family", (*FAMILIES, *MORE_FAMILIES))
def test_the_counts_of_checks_are_what_verify_makes(family: str) -> None:
    for name, cls in CLASSES[family].items():
        if family in MORE_FAMILIES and name != "causal_lm":
            continue
        components = [COMPONENTS[name] for name in card_named(family).mapping(cls)]
        layers = n_layers(tiny_config(family))
        places = sum(len(c.units) * (layers if c.per_layer else 1) for c in components)
        checks = places * len(OPERATIONS) * 2 * (2 if cls._supports_sdpa else 1)  # padding sides, implementations
        row = f"| `{cls.__name__}` | {checks} | 0 |"
        assert row in readme(family), f"modelcards/{family}/README.md needs the row {row}"


# -- examples ----------------------------------------------------------------------------------------------------------


@pytest.mark.docs
@pytest.mark.parametrize("family", FAMILIES)
def test_the_examples_run_and_print_what_their_comments_say(family: str, monkeypatch: Any) -> None:
    def quick(model: Any, layers: str) -> Report:
        assert layers == "all"
        return verify_card(model, layers=[0], implementations=["eager"], padding_sides=["left"])

    monkeypatch.setattr(pyvene_ext, "verify_card", quick)
    example, verifying = re.findall(r"```python\n(.*?)```", readme(family), re.DOTALL)
    namespace: dict[str, Any] = {}
    printed = io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(printed):
        exec(compile(example, f"{family} example", "exec"), namespace)
    assert printed.getvalue().splitlines() == re.findall(r"^print\(.*\)  # (.*)$", example, re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(verifying, f"{family} verification", "exec"), namespace)
    assert namespace["report"].failures == 0
    assert namespace["report"].family == family


# -- traps that the READMEs name and no other test shows ---------------------------------------------------------------


def seen_at(module: torch.nn.Module, model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """What a module puts out during a run, and the run's output."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.no_grad():
        output = model(**inputs)
    handle.remove()
    return seen[0], output


def test_lm_head_is_not_the_logits_of_gemma_2() -> None:
    model, inputs = random_model("gemma2"), random_inputs()
    raw, output = seen_at(model.lm_head, model, inputs)
    assert not torch.allclose(raw, output.logits, atol=0.1)
    cap = model.config.final_logit_softcapping
    assert torch.allclose(cap * torch.tanh(raw / cap), output.logits, atol=1e-6)


def test_gemma_2_has_no_sdpa_and_the_others_have() -> None:
    assert [family for family in FAMILIES if not CLASSES[family]["causal_lm"]._supports_sdpa] == ["gemma2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_gpt2_needs_position_ids_under_left_padding(family: str) -> None:
    model, inputs = random_model(family), random_inputs()
    without = {name: value for name, value in inputs.items() if name != "position_ids"}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        same = torch.allclose(model(**inputs).logits[real], model(**without).logits[real], atol=1e-4)
    assert same == (family != "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_gpt2_has_dropout_by_default(family: str) -> None:
    model, inputs = random_model(family).train(), random_inputs()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits) == (family != "gpt2")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt2"}))
def test_mlp_activation_is_not_the_neurons(family: str) -> None:
    model, inputs = random_model(family), random_inputs()
    mlp = model.model.layers[1].mlp
    (activation, _), (gate, _), (up, _) = (
        seen_at(module, model, inputs) for module in (mlp.act_fn, mlp.gate_proj, mlp.up_proj)
    )
    neurons: list[Tensor] = []
    handle = mlp.down_proj.register_forward_pre_hook(lambda _m, args: neurons.append(args[0]))
    seen_at(mlp, model, inputs)
    handle.remove()
    assert torch.equal(activation, mlp.act_fn(gate))
    assert torch.equal(neurons[0], activation * up)
    assert not torch.allclose(neurons[0], activation, atol=1e-2)

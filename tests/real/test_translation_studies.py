"""Studies of translation on real weights, against plain hooks, eager attention and hidden states, a prompt at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import translation_ablation
import translation_lens
import translation_paths
import translation_single_heads
from torch import Tensor

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.runs import figures
from tests.ground_truth.paths import path_patch_by_hooks
from tests.real.conftest import Real

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
SENTENCES = {  # their translations begin with different words
    "The little boy is reading a book in the garden.": "Le petit garçon lit un livre dans le jardin.",
    "My sister bought a red car last week.": "Ma sœur a acheté une voiture rouge la semaine dernière.",
    "We drink coffee every day after lunch.": "Nous buvons du café tous les jours après le déjeuner.",
    "Our neighbour has three dogs and a cat.": "Notre voisin a trois chiens et un chat.",
    "They built a bridge between the two cities.": "Ils ont construit un pont entre les deux villes.",
    "Her brother plays the guitar in a small band.": "Son frère joue de la guitare dans un petit groupe.",
}
Head = tuple[int, int]
Edit = Callable[[Tensor], Tensor]  # of a head's z [pos d_head]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(figures, "save", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    lines = ["en\tfr", *("\t".join(pair) for pair in SENTENCES.items())]
    Path("six.tsv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "out"


def study(module: Any, real: Real, monkeypatch: pytest.MonkeyPatch, *flags: Any) -> dict[str, Any]:
    """Run a study on the sentences, with the model that is already loaded; its summary."""
    monkeypatch.setattr(module.Config, "load_model", lambda *_: (real.model, real.tokenizer))
    given = [
        "--model",
        real.folder,
        "--dataset",
        "six.tsv",
        "--max_length_difference",
        50,
        "--limit",
        40,
        "--out",
        "out",
        *flags,
    ]
    assert run_study(module.main, module.Config, [str(flag) for flag in given]) == 0
    return json.loads(Path("out/summary.json").read_text(encoding="utf-8"))


def asked(real: Real, word: int, label: str = "FR") -> list[tuple[list[int], int]]:
    """The prompt for a word of every translation, and the first token of the word, by the tokenizer alone."""
    found = []
    for source, target in SENTENCES.items():
        words = target.split()
        text = " ".join([f"EN: {source} {label}:", *words[:word]])
        ids, whole = (real.tokenizer(some)["input_ids"] for some in (text, f"{text} {words[word]}"))
        assert whole[: len(ids)] == ids
        found.append((ids, whole[len(ids)]))
    return found


def logits_of(model: Any, ids: Sequence[int], edits: dict[Head, Edit] | None = None) -> Tensor:
    """Of the next token, with z of each head replaced by what its edit makes of it."""
    width = model.config.head_dim

    def hook_of(head: int, edit: Edit) -> Any:
        def hook(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone()
            own = z[0, :, head * width : (head + 1) * width]
            own[:] = edit(own.clone())
            return (z,)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for (layer, head), edit in (edits or {}).items():
            projection = model.model.layers[layer].self_attn.o_proj
            stack.callback(projection.register_forward_pre_hook(hook_of(head, edit)).remove)
        return model(torch.tensor([list(ids)]), logits_to_keep=1).logits[0, -1]


def z_of(model: Any, heads: Sequence[Head], texts: Sequence[Sequence[int]]) -> dict[Head, Tensor]:
    """What each head gives at every token of all texts."""
    seen: dict[Head, list[Tensor]] = {head: [] for head in heads}
    for ids in texts:
        logits_of(model, ids, {head: lambda z, of=head: (seen[of].append(z), z)[1] for head in heads})  # type: ignore[misc]
    return {head: torch.cat(of_head) for head, of_head in seen.items()}


def rows_of(name: str) -> list[dict[str, str]]:
    with Path(f"out/{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def heads_in(cell: str) -> list[Head]:
    return [tuple(map(int, head.split("."))) for head in cell.split()]  # type: ignore[misc]


def put_at_end(new: Tensor) -> Edit:
    return lambda z: torch.cat([z[:-1], new[None]])


def test_sets_of_heads_are_ablated_as_by_hooks(gemma3: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt stands alone: its wrong answer is the strongest rival of the untouched model."""
    flags = ["--heads", "11.3", "5.3", "--words", 1, "--contrast", "rival", "--kinds", "zero", "mean", "--n_random", 2]
    facts = study(translation_ablation, gemma3, monkeypatch, *flags, "--other", "none")
    model, prompts = gemma3.model, asked(gemma3, 1)
    untouched = [logits_of(model, ids) for ids, _ in prompts]
    ranked = [x.argsort(descending=True).tolist() for x in untouched]
    rivals = [next(i for i in order if i != own) for order, (_, own) in zip(ranked, prompts, strict=True)]
    right = [int(x.argmax()) == own for x, (_, own) in zip(untouched, prompts, strict=True)]
    assert facts["n_prompts"] == len(SENTENCES) and facts["clean_accuracy"] == np.mean(right)

    rows = rows_of("sets")
    assert len(rows) == 2 * 5 and heads_in(rows[0]["heads"]) == [(5, 3), (11, 3)]
    means = z_of(model, sorted({head for row in rows for head in heads_in(row["heads"])}), [ids for ids, _ in prompts])
    zero = torch.zeros(model.config.head_dim)
    clean = [float(x[own] - x[rival]) for x, (_, own), rival in zip(untouched, prompts, rivals, strict=True)]
    for kind in ("zero", "mean"):
        found = np.load(f"out/sets_{kind}.npy")
        for values, row in zip(found, [row for row in rows if row["kind"] == kind], strict=True):
            edits = {
                head: put_at_end(zero if kind == "zero" else means[head].mean(0)) for head in heads_in(row["heads"])
            }
            edited = [logits_of(model, ids, edits) for ids, _ in prompts]
            wanted = [float(x[own] - x[rival]) for x, (_, own), rival in zip(edited, prompts, rivals, strict=True)]
            np.testing.assert_allclose(values, wanted, atol=2e-3)
            assert float(row["drop"]) == pytest.approx(np.mean(clean) - np.mean(wanted), abs=2e-3)
            hits = [int(x.argmax()) == own for x, (_, own) in zip(edited, prompts, strict=True)]
            assert float(row["accuracy"]) == pytest.approx(np.mean(hits))


def test_single_heads_are_replaced_as_by_hooks(
    smollm2: Real, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """All first words differ, so that each prompt has a swap, whose word is the wrong one, read by its first token."""
    made: list[px.translation.WordSetting] = []
    prepare = px.translation.prepare
    monkeypatch.setattr(px.translation, "prepare", lambda *flags: made.append(prepare(*flags)) or made[-1])
    flags = ["--words", 0, "--contrast", "swap", "--replacements", "mean", "maximum"]
    facts = study(translation_single_heads, smollm2, monkeypatch, *flags)
    assert not [one for one in recwarn if "first tokens only" in str(one.message)]
    (setting,) = made
    plus, by_hand = setting.asked.plus, {tuple(ids): own for ids, own in asked(smollm2, 0)}
    assert facts["contrast"] == "swap" and set(plus.input_ids) == set(by_hand) and len(plus) == facts["n_prompts"] == 6
    model = smollm2.model
    answers = [(by_hand[ids], by_hand[plus.input_ids[row ^ 1]]) for row, ids in enumerate(plus.input_ids)]

    def mean_difference(edits: dict[Head, Edit] | None = None) -> float:
        both = zip(plus.input_ids, answers, strict=True)
        return float(
            np.mean([float(x[own] - x[other]) for ids, (own, other) in both for x in [logits_of(model, ids, edits)]])
        )

    clean = mean_difference()
    assert facts["each_clean"] == pytest.approx(clean, abs=1e-3)
    drops = {kind: np.load(f"out/each_{kind}.npy") for kind in ("mean", "maximum")}
    largest = {kind: divmod(int(drop.argmax()), drop.shape[1]) for kind, drop in drops.items()}
    heads = [*largest.values(), (3, 7)]
    seen = z_of(model, heads, [smollm2.tokenizer(source)["input_ids"] for source in SENTENCES])
    for head in heads:
        for kind, new in (("mean", seen[head].mean(0)), ("maximum", seen[head].amax(0))):
            wanted = clean - mean_difference({head: lambda z, new=new: new.expand_as(z)})  # type: ignore[misc]
            assert drops[kind][head] == pytest.approx(wanted, abs=2e-3), (kind, head)


def test_heads_are_patched_along_their_direct_paths(smollm2: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--heads", "17.4", "--words", 1, "--contrast", "rival", "--minus", "label"]
    facts = study(translation_paths, smollm2, monkeypatch, *flags)
    model, pairs = smollm2.model, list(zip(asked(smollm2, 1), asked(smollm2, 1, "EN"), strict=True))
    assert all(len(plus) == len(minus) for (plus, _), (minus, _) in pairs)
    untouched = np.array([float(logits_of(model, ids)[own]) for (ids, own), _ in pairs])
    assert facts["mean_logit"] == pytest.approx(untouched.mean(), abs=1e-3)
    found = {name: np.load(f"out/label_{name}.npy") for name in ("standard", "atp")}
    largest = divmod(int(np.abs(found["standard"]).argmax()), 9)
    for layer, head in (largest, (29, 1), (12, 5)):
        change, estimate = [], []
        for (ids, own), (other, _) in pairs:
            both = torch.tensor([ids]), torch.tensor([other])
            patched = path_patch_by_hooks(model, f"z.{layer}.{head}", ("logits",), *both, freeze_mlps=False)
            change.append(float(patched[0, own]))
            estimate.append(first_order(model, (layer, head), ids, other, own))
        wanted = (np.array(change) - untouched).mean() / np.abs(untouched).mean()
        assert found["standard"][layer, head] == pytest.approx(wanted, abs=1e-4)
        assert found["atp"][layer, head] == pytest.approx(np.mean(estimate) / np.abs(untouched).mean(), abs=1e-4)


def first_order(model: Any, at: Head, ids: Sequence[int], other: Sequence[int], own: int) -> float:
    """How the logit changes to first order with z of a head at the last token taken from another prompt."""
    layer, head = at
    seen: list[Tensor] = []
    hook = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().requires_grad_()) or (seen[-1],)
    )
    try:
        logit = model(torch.tensor([list(ids)])).logits[0, -1, own]
        (gradient,) = torch.autograd.grad(logit, seen[0])
        model(torch.tensor([list(other)]))
    finally:
        hook.remove()
    width = model.config.head_dim
    here = slice(head * width, (head + 1) * width)
    return float(gradient[0, -1, here] @ (seen[1] - seen[0])[0, -1, here])


@torch.no_grad()
def test_the_lens_reads_hidden_states_in_both_languages(gemma3: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [(11, 3), (5, 3), (10, 3)]
    facts = study(translation_lens, gemma3, monkeypatch, "--heads", *(f"{a}.{b}" for a, b in heads), "--words", 1)
    model, tokenizer = gemma3.model, gemma3.tokenizer
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    probability: dict[str, list[list[float]]] = {"target": [], "source": []}
    rank: dict[str, list[list[int]]] = {"target": [], "source": []}
    looked = []
    try:
        for (ids, own), source in zip(asked(gemma3, 1), SENTENCES, strict=True):
            out = model(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
            looks = sum(out.attentions[layer][0, head, -1] for layer, head in heads)
            offsets = tokenizer(tokenizer.decode(ids, skip_special_tokens=True), return_offsets_mapping=True)[
                "offset_mapping"
            ]
            inside = [
                at for at, (start, end) in enumerate(offsets) if end > start and end > 4 and start < 4 + len(source)
            ]
            token = ids[max(inside, key=lambda at: float(looks[at]))]  # type: ignore[index]
            looked.append(f"{tokenizer.decode([token])} -> {tokenizer.decode([own])}")
            streams = [model.model.norm(stream[0, -1]) for stream in out.hidden_states[:-1]] + [
                out.hidden_states[-1][0, -1]
            ]
            logits = torch.stack([stream @ model.lm_head.weight.T for stream in streams])
            for name, word in (("target", own), ("source", token)):
                probability[name].append(logits.softmax(-1)[:, word].tolist())
                rank[name].append((logits > logits[:, [word]]).sum(-1).tolist())
    finally:
        model.set_attn_implementation(before)
    assert facts["looked_at"] == list(dict.fromkeys(looked))
    rows = rows_of("lens")
    assert len(rows) == model.config.num_hidden_layers + 1
    for name, of_prompts in probability.items():
        np.testing.assert_allclose(
            [float(row[f"{name}_probability"]) for row in rows], np.mean(of_prompts, 0), atol=1e-4
        )
        medians = 1 + np.median(np.array(rank[name]), 0)
        np.testing.assert_allclose([float(row[f"{name}_median_rank"]) for row in rows], medians, rtol=1e-2)

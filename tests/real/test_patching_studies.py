"""Studies of single heads, patches, paths and routes on real weights, against plain hooks, a prompt at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import activation_frequencies_ifr
import activation_patching
import attribution_patching
import circuit_localization
import information_flow_routes
import known_circuits
import numpy as np
import path_patching
import pytest
import torch
from scipy.stats import spearmanr
from tiny import planted_circuits
from torch import Tensor

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from tests.real.conftest import Real

pytestmark = pytest.mark.filterwarnings("ignore")
Edits = dict[str, Callable[[Tensor], Tensor]]  # of a node's tensor [pos d], by the node's name
Row = dict[str, str]


def study(module: Any, out: Path, *flags: Any) -> dict[str, Any]:
    """Run a study of two pairs and read its summary."""
    assert run_study(module.main, module.Config, [*map(str, flags), "--limit", "2", "--out", str(out)]) == 0
    summary = out.with_suffix(".json") if out.suffix == ".npy" else out / "summary.json"
    return json.loads(summary.read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pairs_of(real: Real) -> list[tuple[Tensor, Tensor, tuple[int, int]]]:
    """Token ids of the clean and the corrupt text, and the answers, by the tokenizer alone."""
    found = []
    for prompt in px.PromptSet.load("ioi_en").prompts[:2]:
        clean, corrupt = (
            real.tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt.clean, prompt.corrupt)
        )
        answers = [real.tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in names(prompt.clean)]
        found.append((clean, corrupt, (answers[0], answers[1])))
    return found


def names(text: str) -> tuple[str, str]:
    """IO and S of a sentence: the name that occurs once, and the one that gives."""
    words = text.replace(",", "").split()
    given = [
        word for word in dict.fromkeys(words) if word[0].isupper() and word not in ("When", "After", "While", "Then")
    ]
    return tuple(sorted(given, key=words.count))  # type: ignore[return-value]


def place(model: Any, node: str) -> tuple[Any, bool, slice]:
    """The module of a node, whether the node is its input, and its entries."""
    site, layer, *head = node.split("@")[0].split(".")
    block, width = model.model.layers[int(layer)], model.config.head_dim
    entries = slice(int(head[0]) * width, (int(head[0]) + 1) * width) if head else slice(None)
    if site == "mlp_out":
        return getattr(block, "post_feedforward_layernorm", block.mlp), False, entries
    return getattr(block.self_attn, "o_proj" if site == "z" else f"{site}_proj"), site == "z", entries


def run(model: Any, ids: Tensor, edits: Edits | None = None) -> Tensor:
    """Logits at the last token, with each node's tensor replaced by what its edit makes of it."""

    def hook_of(entries: slice, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def changed(x: Tensor) -> Tensor:
            of_node, x = edit(x[0, :, entries]), x.clone()
            x[0, :, entries] = of_node
            return x

        return changed

    with ExitStack() as stack:
        for node, edit in (edits or {}).items():
            module, is_input, entries = place(model, node)
            change = hook_of(entries, edit)
            if is_input:
                hook = module.register_forward_pre_hook(lambda _, args, change=change: (change(args[0]),))
            else:
                hook = module.register_forward_hook(lambda _, __, out, change=change: change(out))
            stack.callback(hook.remove)
        return model(ids, logits_to_keep=1).logits[0, -1]


def kept(seen: dict[str, Tensor], node: str) -> Callable[[Tensor], Tensor]:
    """An edit that changes nothing and keeps the tensor."""

    def keep(x: Tensor) -> Tensor:
        seen[node] = x
        return x

    return keep


@torch.no_grad()
def values(model: Any, ids: Tensor, nodes: list[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    run(model, ids, {node: kept(seen, node) for node in nodes})
    return {node: x.clone() for node, x in seen.items()}


def difference(logits: Tensor, answers: tuple[int, int]) -> Tensor:
    return logits[answers[0]] - logits[answers[1]]


@torch.no_grad()
def patched(model: Any, pair: tuple[Tensor, Tensor, tuple[int, int]], node: str) -> float:
    """delta of a node patched at all positions, corrupt into clean."""
    base, source, answers = pair
    new = values(model, source, [node])[node]
    return float(difference(run(model, base), answers) - difference(run(model, base, {node: lambda _: new}), answers))


def by_gradient(model: Any, pair: tuple[Tensor, Tensor, tuple[int, int]], nodes: list[str]) -> list[float]:
    """(a_base - a_source) . dM/da of each node."""
    base, source, answers = pair
    new, seen = values(model, source, nodes), {}
    with torch.enable_grad():
        total = difference(run(model, base, {node: kept(seen, node) for node in nodes}), answers)
        gradients = torch.autograd.grad(total, [seen[node] for node in nodes])
    return [float(((seen[node] - new[node]) * g).sum()) for node, g in zip(nodes, gradients, strict=True)]


def test_frequencies_patches_and_paths_of_smollm2_are_those_of_hooks(smollm2: Real, tmp_path: Path) -> None:
    model, pairs = smollm2.model, pairs_of(smollm2)
    common = ("--model", smollm2.folder, "--dataset", "ioi_en")

    # Single heads at the last token, zeroed; a tenth of heads x prompts are active.
    meta = study(activation_frequencies_ifr, tmp_path / "f.npy", *common, "--positions", "last")
    deltas = np.load(tmp_path / "f/deltas.npy")
    for layer, head in ((23, 3), (20, 0), (29, 1), (12, 5)):
        node = f"z.{layer}.{head}"
        for prompt, (clean, _, answers) in enumerate(pairs):
            with torch.no_grad():
                ablated = run(model, clean, {node: lambda z: torch.cat([z[:-1], 0 * z[-1:]])})
                expected = difference(run(model, clean), answers) - difference(ablated, answers)
            assert deltas[layer, head, prompt] == pytest.approx(float(expected), abs=1e-4)
    sizes = np.abs(deltas.astype(np.float64))
    assert meta["tau"] == np.quantile(sizes, 0.9) and meta["share_active"] == pytest.approx(0.1, abs=0.002)
    means = deltas.mean(-1, dtype=float)
    layer, head = np.unravel_index(np.abs(means).argmax(), means.shape)
    assert (layer, head) in ((23, 3), (20, 0)) and min(means[23, 3], means[20, 0]) > 1.5
    assert meta["evidence"][0]["effect"] == f"mean delta of {layer}.{head}, the largest of 270 heads,"
    assert meta["evidence"][0]["interval"][0] == pytest.approx(means[layer, head])

    # One head patched from the clean into the corrupt text.
    study(activation_patching, tmp_path / "p", *common, "--site", "z", "--positions", "end")
    rows = {row["patch"]: row for row in rows_of(tmp_path / "p/patches.csv")}
    for node in ("z.23.3", "z.29.0"):
        change, gap = [], []
        for clean, corrupt, answers in pairs:
            new = values(model, clean, [node])[node]
            with torch.no_grad():
                base, source = (difference(run(model, ids), answers) for ids in (corrupt, clean))
                patch = run(model, corrupt, {node: lambda z, new=new: torch.cat([z[:-1], new[-1:]])})
            change.append(float(difference(patch, answers) - base))
            gap.append(float(source - base))
        assert float(rows[f"{node}@end"]["score"]) == pytest.approx(np.mean(change) / np.mean(gap), abs=1e-4)
    assert next(iter(rows)) == "z.23.3@end" and float(rows["z.23.3@end"]["score"]) > 0.3

    # Its path to the logits: all other heads stay as they are in the clean run, MLPs and norms follow.
    study(path_patching, tmp_path / "q", *common, "--positions", "last")
    paths = {row["sender"]: float(row["change"]) for row in rows_of(tmp_path / "q/paths.csv")}
    everything = [f"z.{layer}" for layer in range(30)]
    for layer, head in ((23, 3), (24, 4)):
        change = []
        for clean, corrupt, answers in pairs:
            own, other = values(model, clean, everything), values(model, corrupt, everything)[f"z.{layer}"]
            sent = own[f"z.{layer}"].clone()
            sent[-1, head * 64 : (head + 1) * 64] = other[-1, head * 64 : (head + 1) * 64]
            frozen = {node: lambda _, x=x: x for node, x in (own | {f"z.{layer}": sent}).items()}
            with torch.no_grad():
                change.append(float(difference(run(model, clean, frozen) - run(model, clean), answers)))
        assert paths[f"z.{layer}.{head}"] == pytest.approx(np.mean(change), abs=1e-4)
    assert paths["z.23.3"] < -1 < 1 < paths["z.24.4"]


def test_routes_of_smollm2_are_those_of_its_attention_values_and_projections(smollm2: Real, tmp_path: Path) -> None:
    """How much of the stream after attention is one head's, at the last token: parts A_ij v_j W_O by hand."""
    flags = ("--model", smollm2.folder, "--dataset", "ioi_en")
    summary = study(information_flow_routes, tmp_path, *flags)
    active, importances = (np.load(tmp_path / f"{name}.npy") for name in ("active", "importances"))
    assert summary["share_active"] == active.mean() and 0.08 < active.mean() <= 0.1

    model, layer = smollm2.model, 23
    block, seen = model.model.layers[layer], {}
    for prompt, (ids, *_) in enumerate(pairs_of(smollm2)):
        with ExitStack() as stack, torch.no_grad():
            for name, module in (("pre", block.input_layernorm), ("mid", block.post_attention_layernorm)):
                hook = module.register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0][0]))
                stack.callback(hook.remove)
            hook = block.self_attn.v_proj.register_forward_hook(lambda _, __, x: seen.__setitem__("v", x[0]))
            stack.callback(hook.remove)
            implementation = model.config._attn_implementation
            stack.callback(model.set_attn_implementation, implementation)
            model.set_attn_implementation("eager")
            pattern = model(ids, output_attentions=True).attentions[layer][0]  # head target source
            by_head = seen["v"].unflatten(-1, (3, 64)).repeat_interleave(3, 1)  # source head d_head
            sent = torch.einsum("shd,ohd->hso", by_head, block.self_attn.o_proj.weight.unflatten(1, (9, 64)))
            parts = pattern[..., None] * sent[:, None]  # head target source d_model
            node = seen["mid"]
            assert torch.allclose(seen["pre"] + parts.sum((0, 2)), node, atol=1e-3)
            near = (node[None, :, None].abs() - (node[None, :, None] - parts).abs()).sum(-1).clamp(min=0)
            residual = (node.abs() - (node - seen["pre"]).abs()).sum(-1).clamp(min=0)
            share = near.sum(2) / (near.sum((0, 2)) + residual)
        np.testing.assert_allclose(importances[prompt, layer], share.mean(1).numpy(), atol=1e-4)


def test_attribution_and_known_circuits_of_gemma_are_those_of_gradients_and_hooks(
    gemma3: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, pairs = gemma3.model, pairs_of(gemma3)
    flags = ("--model", gemma3.folder, "--dataset", "ioi_en", "--exact", 15, "--edges", "eap")
    summary = study(attribution_patching, tmp_path / "a", *flags)
    nodes = [row["patch"] for row in rows_of(tmp_path / "a/nodes.csv")]
    exact, estimate = (np.load(tmp_path / f"a/{name}.npy") for name in ("exact", "atp"))
    assert len(nodes) == 198
    for column, pair in enumerate(pairs):
        np.testing.assert_allclose(estimate[:, column], by_gradient(model, pair, nodes), atol=1e-3)
    drawn = [number for number in range(len(nodes)) if np.isfinite(exact[number]).all()]
    assert len(drawn) == summary["n_exact"] == 15
    for number in drawn[::5]:
        expected = [patched(model, pair, nodes[number]) for pair in pairs]
        np.testing.assert_allclose(exact[number], expected, atol=1e-4)
    both = [scores[drawn].mean(1, dtype=float) for scores in (estimate, exact)]
    assert summary["evidence"][0]["interval"][0] == pytest.approx(spearmanr(*both).statistic)

    # The other study draws its own nodes, and says that it knows no circuit of this model.
    monkeypatch.setattr(planted_circuits, "CASES", {"saturated": planted_circuits.CASES["saturated"]})
    methods = known_circuits.edge_methods  # for time without the two that integrate gradients
    monkeypatch.setattr(known_circuits, "edge_methods", lambda config: dict(islice(methods(config).items(), 2)))
    capsys.readouterr()
    few = ("--models", gemma3.folder, "--exact", 12, "--steps", 1, "--planted_prompts", 1, "--methods", "eap", "flow")
    summary = study(known_circuits, tmp_path / "k", *few)
    assert "trained models, of which no circuit is known" in capsys.readouterr().out
    chosen = [
        spec.where for spec in known_circuits.drawn(known_circuits.Config(exact=12), known_circuits.all_nodes(model))
    ]
    exact = np.array([[patched(model, pair, node) for pair in pairs] for node in chosen])
    estimate = np.array([by_gradient(model, pair, chosen) for pair in pairs]).T
    row = next(row for row in summary["trained"] if row["method"] == "AtP")
    assert row["n"] == 12
    assert row["spearman"] == pytest.approx(spearmanr(*(np.abs(x).mean(1) for x in (exact, estimate))).statistic)


def test_circuits_of_gemma_are_what_hooks_give_and_the_study_finds_one(gemma3: Real, tmp_path: Path) -> None:
    model, pairs = gemma3.model, pairs_of(gemma3)
    clean, corrupt = px.methods.both_texts(px.PromptSet.load("ioi_en")[:2], model, gemma3.tokenizer)
    missing = {"mlp_out.3->mlp_in.12", "mlp_out.10->logits"}
    circuit = px.circuits.Circuit(px.circuits.Circuit.full(model.config).edges - missing)
    found = px.circuits.run_circuit(model, circuit, clean, corrupt, progress=False)
    norms = {3: model.model.layers[12].pre_feedforward_layernorm, 10: model.model.norm}
    for value, (base, source, (right, wrong)) in zip(found, pairs, strict=True):
        added: dict[int, list[Tensor]] = {3: [], 10: []}
        with ExitStack() as hooks, torch.no_grad():
            for layer, seen in added.items():
                module = model.model.layers[layer].post_feedforward_layernorm
                hooks.callback(module.register_forward_hook(lambda *call, s=seen: s.append(call[-1])).remove)
            model(base)
            model(source)
            for layer, norm in norms.items():
                change = added[layer][1] - added[layer][0]
                hooks.callback(norm.register_forward_pre_hook(lambda _, args, c=change: (args[0] + c,)).remove)
            logits = model(base).logits[0, -1]
        np.testing.assert_allclose(value, float(logits[right] - logits[wrong]), atol=1e-4)

    flags = ("--model", gemma3.folder, "--methods", "eap", "--removed", 1, "--random_circuits", 1, "--limit", 6)
    out = ("--out", tmp_path / "c")
    assert run_study(circuit_localization.main, circuit_localization.Config, [*map(str, (*flags, *out))]) == 0
    summary = json.loads((tmp_path / "c/summary.json").read_text(encoding="utf-8"))
    tokenized, _ = px.methods.both_texts(px.PromptSet.load("ioi_en")[:6], model, gemma3.tokenizer)
    differences = []
    for number in summary["judged"]:
        right, wrong = tokenized.answer_ids[number]
        with torch.no_grad():
            logits = model(torch.tensor([tokenized.input_ids[number]])).logits[0, -1]
        differences.append(float(logits[right] - logits[wrong]))
    assert summary["n_all"] == 5644 and summary["mean_clean"] == pytest.approx(np.mean(differences), abs=1e-4)
    (row,) = summary["methods"]
    assert row["cmd"] < 0.5

"""tiny-circuit does what is said of it: exchanges of the shipped weights by plain hooks and by the library, and its recipe."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import train_tiny_circuit as recipe
from tiny.train_tiny_circuit import EDGES, NAME, SHIPPED, VARIABLES, WORDS, causal, drawn
from torch import Tensor

import pyvene_ext as px
from pyvene_ext.io.cli import run
from tests.ground_truth.paths import run_by_hooks, senders

TEXT, OTHER = "d a c b 2 3 =", "h g f e 1 1 ="


@cache
def model() -> Any:
    return px.load_model(NAME)[0]


@cache
def pairs() -> tuple[px.TokenizedPrompts, px.TokenizedPrompts]:
    return px.methods.both_texts(px.PromptSet.load("tiny_circuit")[:16], *px.load_model(NAME))


def ids(*texts: str) -> np.ndarray:
    """Prompts of the task."""
    return np.array([[WORDS.index(word) for word in ("<bos>", *text.split())] for text in texts])


def answer(logits: Tensor) -> np.ndarray:
    return logits.argmax(-1).numpy()


# -- the causal model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exchanged", "letter"),
    [
        ((), "c"),  # the third of d a c b
        (("embed->v.0.1",), "c"),  # digits 1 and 3
        (("embed->v.0.2",), "a"),  # digits 2 and 1
        (("embed->v.0.1", "embed->v.0.2"), "d"),
        (("z.0.1->mlp_in.0",), "c"),
        (("z.0.2->mlp_in.0",), "a"),
        (("mlp_out.0->q.1.3",), "d"),
        (("embed->v.1.3",), "f"),  # the third of h g f e
        (("embed->v.0.2", "embed->v.1.3"), "g"),
        (("z.1.3->logits",), "h"),
        (EDGES, "h"),
    ],
    ids=lambda value: None if isinstance(value, str) else "+".join(value) if len(value) < 3 else f"{len(value)} edges",
)
def test_the_causal_model_answers_as_by_hand(exchanged: tuple[str, ...], letter: str) -> None:
    which = np.array([[edge in exchanged for edge in EDGES]])
    assert WORDS[causal(ids(TEXT), ids(OTHER), which)["answer"][0]] == letter


def test_each_edge_alone_changes_the_answer_of_the_shipped_pairs() -> None:
    prompts = px.PromptSet.load("tiny_circuit")
    for prompt in prompts:
        *letters, first, second, _ = prompt.text.split()
        assert prompt.answer == letters[max(int(first), int(second)) - 1] != prompt.wrong
    clean, corrupt = (ids(*texts) for texts in ([p.text for p in prompts], [p.corrupt for p in prompts]))
    for edge in np.eye(len(EDGES), dtype=bool):
        assert (causal(clean, corrupt, np.tile(edge, (100, 1)))["answer"] != causal(clean)["answer"]).all()


# -- the shipped model -------------------------------------------------------------------------------------------------


def test_the_folder_is_whole_and_small_and_states_the_recipe_of_the_script() -> None:
    folder = SHIPPED / NAME
    assert (folder / "model.safetensors").stat().st_size < 500_000
    facts = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))["facts"]
    assert facts["variables"] == VARIABLES and facts["prompts"] >= 1000 and not recipe.unmet(facts["figures"])
    settings = asdict(recipe.Settings())
    assert facts["recipe"] == {name: settings[name] for name in settings.keys() - {"out"}}
    assert recipe.model_card(facts) == (folder / "README.md").read_text(encoding="utf-8")
    assert px.circuits.load_circuit(folder / "circuit.json", model()).edges == set(EDGES)


def test_it_loads_by_its_name_and_answers_texts() -> None:
    loaded, tokenizer = px.load_model(NAME)
    encoded = tokenizer([TEXT, OTHER], return_tensors="pt")
    assert encoded["input_ids"].tolist() == ids(TEXT, OTHER).tolist()
    assert tokenizer.batch_decode(loaded(**encoded).logits[:, -1].argmax(-1)[:, None]) == ["c", "h"]
    assert tokenizer(TEXT.replace(" ", ""))["input_ids"] == encoded["input_ids"][0].tolist()


def test_exchanges_of_nodes_by_hooks_give_what_the_causal_model_gives() -> None:
    base, source = (drawn(300, np.random.default_rng(seed)) for seed in (1, 2))
    everything = [sender for sender in senders(model()) if sender != "embed"]
    assert (answer(run_by_hooks(model(), torch.from_numpy(base))[0]) == causal(base)["answer"]).mean() >= 0.99
    _, of_source = run_by_hooks(model(), torch.from_numpy(source), read=everything)

    def with_source(*nodes: str) -> np.ndarray:
        put = {node: of_source[node] for node in nodes}
        return answer(run_by_hooks(model(), torch.from_numpy(base), put=put)[0])

    for node in VARIABLES.values():
        wanted = causal(base, source, np.tile([edge.startswith(f"{node}->") for edge in EDGES], (300, 1)))["answer"]
        found = with_source(node)
        assert (found == wanted).mean() >= 0.98 and (found == causal(base)["answer"]).mean() < 0.8, node
    outside = set(everything) - set(VARIABLES.values())
    assert len(outside) == 6 and (with_source(*outside) == causal(base)["answer"]).mean() >= 0.98


def test_the_known_edges_alone_are_faithful_each_is_needed_and_the_others_do_nothing() -> None:
    circuit = px.circuits.Circuit(frozenset(EDGES))
    config = model().config
    assert circuit.pruned(config) == circuit
    fewer = [px.circuits.Circuit(circuit.edges - {edge}) for edge in EDGES]
    runs = px.circuits.run_circuits(model(), [circuit, circuit.complement(config), *fewer], *pairs(), progress=False)
    whole, others, *without_one = runs.faithfulness
    assert abs(whole - 1) < 0.03 and abs(others) < 0.03 and max(without_one) < 0.7
    assert runs.clean.min() > 3 and runs.empty.max() < -3


def test_path_patching_finds_exactly_the_circuit_and_a_first_order_estimate_does_not() -> None:
    there = px.circuits.Circuit.full(model().config).matrix(model().config)
    known = px.circuits.Circuit(frozenset(EDGES)).matrix(model().config)[there]
    exact, eap = (px.circuits.score(model(), *pairs(), of, progress=False)[there] for of in ("path_patching", "eap"))
    assert exact[known].min() > 3 > 10 * np.abs(exact[~known]).max()
    assert px.stats.auroc(np.abs(exact), known) == 1 > 0.99 > px.stats.auroc(np.abs(eap), known)


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_runs_with_exchanged_edges_are_those_of_the_library() -> None:
    clean, corrupt = pairs()
    graph = recipe.Graph.of(model().config)
    base, source = np.array(clean.input_ids), np.array(corrupt.input_ids)
    exchanged = graph.exists & (np.random.default_rng(0).random(graph.exists.shape) < 0.3)
    with torch.no_grad():
        plain, _ = recipe.forward(model(), base)
        _, added = recipe.forward(model(), source)
        logits, _ = recipe.forward(model(), base, np.broadcast_to(exchanged, (16, *exchanged.shape)).copy(), added)
        assert torch.allclose(plain, model()(torch.from_numpy(base)).logits[:, -1], atol=1e-5)
    right, wrong = torch.tensor(clean.answer_ids).T
    expected = px.circuits.run_circuits(model(), [graph.exists & ~exchanged], clean, corrupt, progress=False).circuits[
        0
    ]
    rows = torch.arange(16)
    np.testing.assert_allclose((logits[rows, right] - logits[rows, wrong]).numpy(), expected, atol=1e-4)
    assert np.abs(expected - (plain[rows, right] - plain[rows, wrong]).numpy()).max() > 1


def test_exchanges_of_each_kind_are_those_of_their_name() -> None:
    graph = recipe.Graph.of(model().config)
    circuit_nodes = np.array([sender in VARIABLES.values() for sender in graph.senders])
    for kind in recipe.KINDS:
        edges = recipe.exchange(kind, 200, graph, np.random.default_rng(0))
        senders_of = edges.any(2)
        assert not (edges & ~graph.exists).any()
        if kind == "variable":
            assert (senders_of.sum(1) == 1).all() and not senders_of[:, ~circuit_nodes].any()
        elif kind == "strict":
            assert not senders_of[:, circuit_nodes].any() and not senders_of[:, 0].any()
            assert 0.3 < (senders_of.sum(1) == graph.spare.sum()).mean() < 0.8
        if kind != "edges":  # a sender is exchanged for all its receivers or for none
            assert (edges == senders_of[..., None] & graph.exists).all()
    assert 0.2 < edges[:, graph.circuit].any(1).mean() < 0.6 < edges[:, graph.exists & ~graph.circuit].mean()


@pytest.mark.slow
def test_a_short_training_is_written_and_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--out", str(tmp_path), "--steps", "2", "--batch_size", "6", "--evaluation_prompts", "50"]
    assert run(recipe.main, recipe.Settings, flags) == 0
    assert "accuracy is 0." in capsys.readouterr().out
    loaded, _ = px.load_model(tmp_path / NAME)
    assert px.circuits.load_circuit(tmp_path / NAME / "circuit.json", loaded).edges == set(EDGES)
    assert not any(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), recipe.new_model(0).parameters(), strict=True)
    )

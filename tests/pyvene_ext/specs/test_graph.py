"""Who writes, who reads and who comes first, held to the hand-written lists of the ground truth and to what a model does."""

from __future__ import annotations

import pytest
import torch

from modelcards import n_heads, n_kv_heads
from pyvene_ext.specs import graph
from pyvene_ext.specs.graph import Node, query_heads, reaches
from tests.ground_truth import paths as truth
from tests.tiny_random import FAMILIES, VOCAB, random_model, tiny_config

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_senders_and_receivers_are_those_of_the_ground_truth_in_its_order(family: str) -> None:
    model = random_model(family)
    assert [str(node) for node in graph.senders(model.config)] == list(truth.senders(model))
    assert sorted(map(str, graph.receivers(model.config))) == sorted(truth.receivers(model))


@every_family
def test_a_sender_reaches_what_reads_behind_it(family: str) -> None:
    config = tiny_config(family)
    answers = set()
    for sender in graph.senders(config):
        for receiver in graph.receivers(config):
            answers.add(expected := truth.precedes(str(sender), str(receiver)))
            assert reaches(sender, receiver) == expected, f"{sender}->{receiver}"
    assert answers == {True, False}


@pytest.mark.parametrize(
    ("sender", "first"),  # per site, the first layer whose stream holds what the sender writes
    [
        ("embed", {"resid_pre": 0, "resid_mid": 0, "resid_post": 0}),
        ("z.1.0", {"resid_pre": 2, "resid_mid": 1, "resid_post": 1}),
        ("mlp_out.1", {"resid_pre": 2, "resid_mid": 2, "resid_post": 1}),
    ],
)
def test_the_stream_holds_what_was_written_before(sender: str, first: dict[str, int]) -> None:
    for site, layer in first.items():
        reached = [at for at in range(4) if reaches(Node.parse(sender), Node(site, at))]
        assert reached == list(range(layer, 4)), site


@every_family
def test_receivers_are_listed_in_the_order_in_which_they_read(family: str) -> None:
    nodes = graph.receivers(tiny_config(family))
    rank = {"q": 0, "k": 0, "v": 0, "mlp_in": 1}
    order = [(node.layer, rank[node.site]) for node in nodes[:-1]]
    assert order == sorted(order) and nodes[-1] == Node("logits") and len(set(nodes)) == len(nodes)


@every_family
def test_every_node_is_read_back_from_its_name(family: str) -> None:
    config = tiny_config(family)
    for node in [*graph.senders(config), *graph.receivers(config), Node("resid_mid", 11)]:
        assert Node.parse(str(node)) == node
    assert str(Node("z", 0, 0)) == "z.0.0" and str(Node("mlp_out", 0)) == "mlp_out.0" and str(Node("embed")) == "embed"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "z",
        "z.1",
        "z.1.2.3",
        "mlp_in",
        "mlp_in.1.0",
        "logits.0",
        "embed.0",
        "k.-1.0",
        "q.1.x",
        "attn_out.1",
        "Z.0.1",
    ],
)
def test_a_name_of_no_node_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"there is no node '.*'; senders are embed, z.LAYER.HEAD and mlp_out.LAYER, rec"
    ):
        Node.parse(name)


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("blocks.2.attn.hook_z", "z.2.HEAD"),
        ("hook_z", "z.LAYER.HEAD"),
        ("blocks.11.hook_mlp_out", "mlp_out.11"),
        ("hook_embed", "embed"),
    ],
)
def test_for_a_hook_of_transformer_lens_its_node_is_named(name: str, guess: str) -> None:
    with pytest.raises(ValueError, match=f"there is no node '{name}'; did you mean {guess}[?] senders are embed"):
        Node.parse(name)


def test_a_node_that_the_model_lacks_is_refused_with_what_it_has() -> None:
    config = tiny_config("llama3_1")  # 3 layers, 6 query heads, 3 K/V heads
    for name in ("z.2.5", "q.2.5", "k.2.2", "v.0.2", "mlp_out.2", "embed", "logits"):
        Node.parse(name).check(config)
    with pytest.raises(ValueError, match=r"mlp_in\.3: layer 3 is out of range, the model has layers 0 to 2\."):
        Node.parse("mlp_in.3").check(config)
    with pytest.raises(ValueError, match=r"z\.0\.6: head 6 is out of range; z counts query heads, 0 to 5\."):
        Node.parse("z.0.6").check(config)
    for name in ("k.1.3", "v.1.5"):
        with pytest.raises(ValueError, match=r"counts K/V heads, each for 2 query heads, 0 to 2\."):
            Node.parse(name).check(config)


@every_family
def test_the_query_heads_of_a_kv_head_are_those_that_its_key_changes(family: str) -> None:
    model = random_model(family)
    heads, kv_heads = n_heads(model.config), n_kv_heads(model.config)
    ids = torch.randint(3, VOCAB, (1, 7), generator=torch.Generator().manual_seed(3))
    z = [f"z.1.{head}" for head in range(heads)]
    _, before = truth.run_by_hooks(model, ids, read=[*z, *(f"k.1.{kv}" for kv in range(kv_heads))])
    for site in ("k", "v"):
        for kv in range(kv_heads):
            put = {f"{site}.1.{kv}": torch.ones_like(before[f"k.1.{kv}"])}
            _, after = truth.run_by_hooks(model, ids, put=put, read=z)
            changed = [head for head in range(heads) if not torch.equal(after[z[head]], before[z[head]])]
            assert changed == query_heads(Node(site, 1, kv), model.config)


def test_other_receivers_belong_to_their_own_query_head_or_to_none() -> None:
    config = tiny_config("llama3_1")
    assert query_heads(Node("q", 1, 4), config) == [4] and query_heads(Node("z", 1, 4), config) == [4]
    assert query_heads(Node("mlp_in", 1), config) == [] and query_heads(Node("logits"), config) == []

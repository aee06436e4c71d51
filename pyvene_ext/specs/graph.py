"""Nodes and edges of the computation graph: what writes to the residual stream, what reads from it, and in which order.

Senders write: the embedding, a head's z, an MLP. Receivers read: the q, k or v of a head, an MLP's input, the stream at a named
site, the logits. A node is named "z.2.5" (site, layer, head), an edge "z.0.1->k.2.0". Heads of q and z are query heads; heads of
k and v are K/V heads, each of which serves a group of query heads (`query_heads`): there is one edge into a K/V head, however
many query heads read it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from modelcards import n_heads, n_kv_heads, n_layers
from modelcards.names import NAMES, meant

SENDERS = ("embed", "z", "mlp_out")
RECEIVERS = ("q", "k", "v", "mlp_in", "resid_pre", "resid_mid", "resid_post", "logits")
# Depth in half blocks, from the input of the first block: where a site of layer 0 reads the stream, and where it has written.
_READS = {"q": 0, "k": 0, "v": 0, "resid_pre": 0, "mlp_in": 1, "resid_mid": 1, "resid_post": 2}
_WRITES = {"embed": 0, "z": 1, "mlp_out": 2}


class Node(NamedTuple):
    """A component that writes to the residual stream or reads from it.

    Attributes:
        site: one of `SENDERS` or `RECEIVERS`.
        layer: None for embed and logits.
        head: the query head of q and z, the K/V head of k and v; None for other sites.
    """

    site: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        return ".".join(str(part) for part in self if part is not None)

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The head as an intervention takes it."""
        return None if self.head is None else (self.head,)

    @classmethod
    @cache
    def parse(cls, text: str) -> Node:
        """Parse a node's name.

        Args:
            text: such as "z.2.5", "mlp_in.3" or "logits"; pyvene's names of the sites mean the same.

        Returns:
            The node, which a given model may still lack (`check`).

        Raises:
            ValueError: no node has that name.
        """
        site, *numbers = text.split(".")
        site = NAMES[site].site if site in NAMES else site
        wanted = 0 if site in ("embed", "logits") else 2 if site in ("z", "q", "k", "v") else 1
        known = site in (*SENDERS, *RECEIVERS) and len(numbers) == wanted
        if not known or not all(number.isascii() and number.isdecimal() for number in numbers):
            raise ValueError(
                f"there is no node {text!r}; {_guess(text)}senders are embed, z.LAYER.HEAD and mlp_out.LAYER, receivers are "
                "q.LAYER.HEAD, k.LAYER.KV_HEAD, v.LAYER.KV_HEAD, mlp_in.LAYER, resid_pre.LAYER, resid_mid.LAYER, "
                "resid_post.LAYER and logits."
            )
        return cls(site, *map(int, numbers))

    def check(self, config: Any) -> None:
        """Check that a model has this node.

        Args:
            config: the model's config.

        Raises:
            ValueError: its layer or head is out of range; the message says what the model has.
        """
        layers, heads = n_layers(config), n_kv_heads(config) if self.site in ("k", "v") else n_heads(config)
        if self.layer is not None and self.layer >= layers:
            raise ValueError(f"{self}: layer {self.layer} is out of range, the model has layers 0 to {layers - 1}.")
        if self.head is not None and self.head >= heads:
            of = (
                f"K/V heads, each for {n_heads(config) // heads} query heads"
                if self.site in ("k", "v")
                else "query heads"
            )
            raise ValueError(f"{self}: head {self.head} is out of range; {self.site} counts {of}, 0 to {heads - 1}.")


def _guess(text: str) -> str:
    """The node at a hook of TransformerLens, as a question; empty for other names."""
    site = meant(text, (*SENDERS, *RECEIVERS)) if "hook_" in text else None
    if site is None:
        return ""
    layer = re.search(r"blocks\.(\d+)\.", text)
    parts = [site] if site in ("embed", "logits") else [site, layer[1] if layer else "LAYER"]
    return f"did you mean {'.'.join([*parts, *(['HEAD'] if site in ('z', 'q', 'k', 'v') else [])])}? "


def reaches(sender: Node, receiver: Node) -> bool:
    """Whether what the sender writes is in the stream that the receiver reads.

    Args:
        sender: a node of `SENDERS`.
        receiver: a node of `RECEIVERS`.

    Returns:
        True if there is an edge between the two.

    Raises:
        ValueError: one of them is not what it should be.
    """
    if sender.site not in SENDERS or receiver.site not in RECEIVERS:
        raise ValueError(
            f"{sender}->{receiver} is not an edge; senders are {', '.join(SENDERS)}, receivers are {', '.join(RECEIVERS)}."
        )
    return depth(sender) <= depth(receiver)


def edge_exists(writing: Iterable[Node], reading: Iterable[Node]) -> Bool[np.ndarray, "sender receiver"]:
    """Whether `reaches`, of all senders and receivers at once.

    Args:
        writing: senders.
        reading: receivers.

    Returns:
        True where there is an edge.
    """
    written, read = (np.array([depth(node) for node in nodes]) for nodes in (writing, reading))
    return written[:, None] <= read


def depth(node: Node) -> float:
    """When a node writes to the residual stream or reads from it.

    Args:
        node: a sender or a receiver.

    Returns:
        Half blocks, from the input of the first block: after how many a sender has written, or a receiver reads.
    """
    if node.site == "logits":
        return math.inf
    return 2 * (node.layer or 0) + (_WRITES if node.site in SENDERS else _READS)[node.site]


def senders(config: Any) -> list[Node]:
    """List a model's senders.

    Args:
        config: the model's config.

    Returns:
        The embedding, then the heads and the MLP of each layer: the order in which they write.
    """
    nodes = [Node("embed")]
    for layer in range(n_layers(config)):
        nodes += [Node("z", layer, head) for head in range(n_heads(config))]
        nodes.append(Node("mlp_out", layer))
    return nodes


def receivers(config: Any) -> list[Node]:
    """List the receivers of a model's graph.

    Args:
        config: the model's config.

    Returns:
        Every head's q, every K/V head's k and v, and the MLP of each layer, then the logits: the order in which they read.
    """
    nodes = []
    for layer in range(n_layers(config)):
        nodes += [Node("q", layer, head) for head in range(n_heads(config))]
        nodes += [Node(site, layer, head) for site in ("k", "v") for head in range(n_kv_heads(config))]
        nodes.append(Node("mlp_in", layer))
    return [*nodes, Node("logits")]


def receiver_slices(config: Any) -> dict[tuple[str, int | None], slice]:
    """Find the receivers of each site and layer among `receivers`.

    Args:
        config: the model's config.

    Returns:
        Where they are, in their order, by site and layer; the layer of the logits is None.
    """
    found, first = {}, 0
    for key, nodes in groupby(receivers(config), lambda node: (node.site, node.layer)):
        found[key] = slice(first, first := first + len(list(nodes)))
    return found


def query_heads(node: Node, config: Any) -> list[int]:
    """The query heads that read a receiver: the head itself for q, the whole group of a K/V head for k and v.

    Args:
        node: a receiver; one without a head gives none.
        config: the model's config.

    Returns:
        Heads of the node's layer, ascending.
    """
    if node.head is None:
        return []
    each = n_heads(config) // n_kv_heads(config) if node.site in ("k", "v") else 1
    return list(range(node.head * each, (node.head + 1) * each))

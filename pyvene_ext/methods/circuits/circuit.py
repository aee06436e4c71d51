"""A circuit: some edges of a model's graph, the rest being ablated when it runs.

The graph is that of `pyvene_ext.specs.graph`: every sender that writes before a receiver reads has an edge to it, into each query
head's q, each K/V head's k and v, each MLP and the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from pyvene_ext.specs.graph import SENDERS, Node, edge_exists, query_heads, reaches, receivers, senders

Edges = Bool[np.ndarray, "sender receiver"]


@dataclass(frozen=True)
class Circuit:
    """Some edges of a model's graph.

    Attributes:
        edges: their names, such as "z.0.1->k.2.0": a sender of `graph.senders` and a receiver of `graph.receivers`.

    Raises:
        ValueError: no edge has that name.
    """

    edges: frozenset[str]

    def __post_init__(self) -> None:
        named = [self.edges] if isinstance(self.edges, str) else self.edges
        object.__setattr__(self, "edges", frozenset(edge_name(*parse_edge(edge)) for edge in named))

    def __len__(self) -> int:
        return len(self.edges)

    @classmethod
    def of(cls, matrix: Edges, config: Any) -> Circuit:
        """Make a circuit from a boolean matrix.

        Args:
            matrix: True for the circuit's edges, by `graph.senders` and `graph.receivers`.
            config: the model's config.

        Returns:
            The circuit.

        Raises:
            ValueError: the matrix has another shape or dtype, or is True where there is no edge.
        """
        matrix = checked_matrix(matrix, config)
        writing, reading = senders(config), receivers(config)
        return cls(frozenset(edge_name(writing[row], reading[column]) for row, column in np.argwhere(matrix)))

    @classmethod
    def full(cls, config: Any) -> Circuit:
        """Make the circuit of every edge, which is the model itself."""
        return cls.of(exists(config), config)

    def matrix(self, config: Any) -> Edges:
        """Convert to a boolean matrix by `graph.senders` and `graph.receivers`.

        Args:
            config: the model's config.

        Returns:
            True for the circuit's edges.

        Raises:
            ValueError: the model lacks one of the edges.
        """
        rows = {node: row for row, node in enumerate(senders(config))}
        columns = {node: column for column, node in enumerate(receivers(config))}
        matrix = np.zeros((len(rows), len(columns)), bool)
        for sender, receiver in map(parse_edge, sorted(self.edges)):
            if sender not in rows or receiver not in columns:
                sender.check(config)
                receiver.check(config)
            matrix[rows[sender], columns[receiver]] = True
        return matrix

    def complement(self, config: Any) -> Circuit:
        """Make the circuit of all other edges of the model."""
        return Circuit.of(exists(config) & ~self.matrix(config), config)

    def pruned(self, config: Any) -> Circuit:
        """Keep the edges that lie on some path of the circuit from the embedding to the logits.

        A path enters a head through its q, or through the k or v of its K/V head, and an MLP through its input. Edges that do
        not lead to the logits can be dropped without effect; so can, by patching, those that do not come from the embedding,
        whose sender adds what it adds in the run on the source prompts (except that, through a post-norm over all heads, one head
        changes the shares of the others). By mean and zero ablation such a sender computes from ablated inputs.

        Args:
            config: the model's config.

        Returns:
            The pruned circuit.
        """
        return Circuit.of(on_paths(self.matrix(config), config), config)


def named_scores(scores: Float[np.ndarray, sender * receiver], circuit: Circuit, config: Any) -> dict[str, float]:
    """Look up the score of each edge of a circuit.

    Args:
        scores: by `graph.senders` and `graph.receivers`; or of nodes, of which each edge has its sender's.
        circuit: the circuit.
        config: the model's config.

    Returns:
        Scores by edge, those of the largest magnitude first.

    Raises:
        ValueError: the scores have another shape, or the model lacks an edge.
    """
    rows, columns = np.nonzero(circuit.matrix(config))
    writing, reading = senders(config), receivers(config)
    if np.shape(scores) not in (shapes := [(len(writing), len(reading)), (len(writing),)]):
        raise ValueError(f"scores must be of the shape {shapes[0]} or, of nodes, {shapes[1]}, not {np.shape(scores)}.")
    of_edges = np.broadcast_to(scores.reshape(len(scores), -1), (len(writing), len(reading)))[rows, columns]
    order = np.argsort(-np.abs(of_edges), kind="stable")
    return {edge_name(writing[rows[i]], reading[columns[i]]): float(of_edges[i]) for i in order}


def matrix_of(circuit: Circuit | Edges, config: Any) -> Edges:
    """Convert a circuit to its matrix, and check it.

    Args:
        circuit: a circuit, or already its matrix.
        config: the model's config.

    Returns:
        True for the circuit's edges, by `graph.senders` and `graph.receivers`.

    Raises:
        ValueError: as for `Circuit.matrix` and `checked_matrix`.
    """
    return circuit.matrix(config) if isinstance(circuit, Circuit) else checked_matrix(circuit, config)


def exists(config: Any) -> Edges:
    """Where a model has an edge, because the sender writes before the receiver reads.

    Args:
        config: the model's config.

    Returns:
        A boolean matrix by `graph.senders` and `graph.receivers`.
    """
    return edge_exists(senders(config), receivers(config))


def parse_edge(edge: str) -> tuple[Node, Node]:
    """Sender and receiver of an edge; ValueError if there is no such edge."""
    first, arrow, second = str(edge).partition("->")
    if not arrow:
        raise ValueError(f'there is no edge {edge!r}; write it "SENDER->RECEIVER", as in "z.0.1->k.2.0".')
    try:
        sender, receiver = Node.parse(first), Node.parse(second)
    except ValueError as error:
        raise ValueError(f"there is no edge {edge!r}: {error}") from None
    if sender.site not in SENDERS or receiver.site not in ("q", "k", "v", "mlp_in", "logits"):
        raise ValueError(
            f"there is no edge {edge!r}: it leads from embed, z.LAYER.HEAD or mlp_out.LAYER to q, k, v, mlp_in or logits."
        )
    if not reaches(sender, receiver):
        raise ValueError(f"there is no edge {edge!r}: {receiver} reads before {sender} writes.")
    return sender, receiver


def edge_name(sender: Node, receiver: Node) -> str:
    """Name an edge, as in "z.0.1->k.2.0"."""
    return f"{sender}->{receiver}"


def checked_matrix(matrix: Any, config: Any) -> Edges:
    """Check that a matrix is a circuit's.

    Args:
        matrix: True for the circuit's edges, by `graph.senders` and `graph.receivers`.
        config: the model's config.

    Returns:
        The matrix.

    Raises:
        ValueError: it has another shape or dtype, or is True where there is no edge.
    """
    matrix = np.asarray(matrix)
    there = exists(config)
    if matrix.shape != there.shape or matrix.dtype != bool:
        raise ValueError(
            f"a circuit is a Circuit or a boolean matrix of the model's {there.shape[0]} senders and {there.shape[1]} receivers, "
            f"not one of {matrix.dtype} and shape {matrix.shape}."
        )
    if (matrix & ~there).any():
        row, column = np.argwhere(matrix & ~there)[0]
        sender, receiver = senders(config)[row], receivers(config)[column]
        raise ValueError(f"there is no edge {edge_name(sender, receiver)}: {receiver} reads before {sender} writes.")
    return matrix


def on_paths(matrix: Edges, config: Any) -> Edges:
    """The edges on a path from the embedding to the logits."""
    writing, reading = senders(config), receivers(config)
    entries = entry_receivers(config)
    from_embedding, reached = np.zeros(len(writing), bool), np.zeros(len(reading), bool)  # from the embedding
    for row, sender in enumerate(writing):
        from_embedding[row] = sender.site == "embed" or reached[entries[sender]].any()
        if from_embedding[row]:
            reached |= matrix[row]
    to_logits = np.array([receiver.site == "logits" for receiver in reading])  # to the logits
    for row in reversed(range(len(writing))):
        to_logits[entries[writing[row]]] |= (matrix[row] & to_logits).any()
    return matrix & from_embedding[:, None] & to_logits


def entry_receivers(config: Any) -> dict[Node, Int[np.ndarray, " receiver"]]:
    """The receivers through which a path enters each sender."""
    entries: dict[Node, list[int]] = {sender: [] for sender in senders(config)}
    # The same in every layer; a config takes long to answer.
    groups = {(node.site, node.head): query_heads(node, config) for node in receivers(config) if node.layer == 0}
    for column, node in enumerate(receivers(config)):
        if node.site == "mlp_in":
            entries[Node("mlp_out", node.layer)].append(column)
        for head in groups.get((node.site, node.head), ()):
            entries[Node("z", node.layer, head)].append(column)
    return {sender: np.array(columns, int) for sender, columns in entries.items()}

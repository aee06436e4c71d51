"""Circuits as files: JSON that names the model they belong to, and DOT for drawing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedModel

from modelcards import n_heads, n_kv_heads, n_layers
from pyvene_ext.io.files import atomic_path, read_as, write_json
from pyvene_ext.methods.circuits.circuit import Circuit, parse_edge
from pyvene_ext.models.identity import weight_hash
from pyvene_ext.specs.graph import Node


class CircuitFile(BaseModel):
    """A circuit with what it is a circuit of.

    Attributes:
        model_type: of the model's config.
        weight_hash: of the model's weights.
        n_layers: number of layers.
        n_heads: query heads of a layer.
        n_kv_heads: K/V heads of a layer.
        facts: how it was found, such as prompts, method and metric.
        edges: the names of its edges.
    """

    model_type: str
    weight_hash: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    facts: dict[str, Any] = {}
    edges: list[str]


def save_circuit(circuit: Circuit, path: str | Path, model: PreTrainedModel, **facts: Any) -> None:
    """Write a circuit to a JSON file.

    Args:
        circuit: the circuit.
        path: the file.
        model: the model that it is a circuit of.
        **facts: plain data to write with it: prompts, method, metric.

    Raises:
        ValueError: the model lacks one of the edges.
    """
    circuit.matrix(model.config)
    write_json(path, CircuitFile(**_identity(model), facts=facts, edges=sorted(circuit.edges)).model_dump())


def load_circuit(path: str | Path, model: PreTrainedModel, *, other_weights: bool = False) -> Circuit:
    """Read a circuit that `save_circuit` wrote.

    Args:
        path: the file.
        model: the model that it will be run in.
        other_weights: allow a model of the same layers and heads with other weights, such as a later checkpoint.

    Returns:
        The circuit.

    Raises:
        ValueError: the file is no circuit, or that of another model.
    """
    try:
        found = read_as(CircuitFile, path)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}; give a file that save_circuit wrote.") from None
    own = _identity(model)
    differing = [name for name, value in own.items() if getattr(found, name) != value]
    if other_weights:
        differing = [name for name in differing if name not in ("weight_hash", "model_type")]
    if differing:
        name = differing[0]
        advice = "; other_weights=True allows that" if differing == ["weight_hash"] else ""
        raise ValueError(
            f"{path} is a circuit of another model: its {name} is {getattr(found, name)}, this model's {own[name]}{advice}."
        )
    try:
        circuit = Circuit(frozenset(found.edges))
        circuit.matrix(model.config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return circuit


def save_dot(circuit: Circuit, path: str | Path, config: Any, weights: Mapping[str, float] | None = None) -> None:
    """Write a circuit in the DOT language, for `dot -Tsvg`.

    A query head is one node, as sender and receiver, and so is an MLP. Keys and values are nodes of their own, because several
    query heads may read them; dashed lines lead to those of them that are in the circuit.

    Args:
        circuit: the circuit.
        path: the file.
        config: the model's config.
        weights: scores of edges by name; the widths of the lines are in proportion to their magnitude.
    """
    weights = weights or {}
    largest = max((abs(weights.get(edge, 0.0)) for edge in circuit.edges), default=0.0) or 1.0
    lines = ["digraph circuit {", '  rankdir="BT"; node [shape="box", fontname="sans-serif"];']
    ends = {edge: parse_edge(edge) for edge in sorted(circuit.edges)}
    sending, group = {sender for sender, _ in ends.values()}, n_heads(config) // n_kv_heads(config)
    for edge, (sender, receiver) in ends.items():
        head = "" if receiver.head is None else f".{receiver.head}"
        target = {"q": f"z.{receiver.layer}{head}", "mlp_in": f"mlp_out.{receiver.layer}"}.get(
            receiver.site, str(receiver)
        )
        width = 0.5 + 3.5 * abs(weights.get(edge, 0.0)) / largest
        label = f' label="{receiver.site}",' if receiver.site == "q" else ""
        lines.append(f'  "{sender}" -> "{target}" [{label} penwidth={width:.2f}];')
    for read in sorted({receiver for _, receiver in ends.values() if receiver.site in ("k", "v")}, key=str):
        assert read.head is not None and read.layer is not None
        for of_group in range(group):
            if (reader := Node("z", read.layer, read.head * group + of_group)) in sending:
                lines.append(f'  "{read}" -> "{reader}" [style="dashed"];')
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")


def edge_rows(weights: Mapping[str, float], name: str, others: Mapping[str, Circuit]) -> list[dict[str, Any]]:
    """Make a table of a circuit's edges, which a report draws.

    Args:
        weights: scores of its edges by name.
        name: of the column of scores.
        others: circuits that it is compared with, by name.

    Returns:
        Rows with the edge, its score and, if there are others, `shared_with`: the names of those that have the edge, or "none".
    """
    rows: list[dict[str, Any]] = [{"edge": edge, name: weight} for edge, weight in weights.items()]
    for row in rows if others else ():
        row["shared_with"] = ", ".join(of for of, other in others.items() if row["edge"] in other.edges) or "none"
    return rows


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    sizes = {"n_layers": n_layers(config), "n_heads": n_heads(config), "n_kv_heads": n_kv_heads(config)}
    return {"model_type": str(config.model_type), "weight_hash": weight_hash(model), **sizes}

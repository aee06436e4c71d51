"""What ACDC found: the circuit, and every test of an edge."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from pyvene_ext.engine.results import Shown, Summary, count, strongest, table, three_digits
from pyvene_ext.methods.circuits.choosing import By
from pyvene_ext.methods.circuits.circuit import Circuit, parse_edge
from pyvene_ext.specs.graph import Node

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class AcdcRun(Shown):
    """What ACDC removed and kept.

    Attributes:
        metric: its name.
        tau: the threshold.
        by: how a change is compared with it; None for kl.
        circuit: the edges that were kept and lie on a path from the embedding to the logits.
        unpruned: all that were kept.
        edges: those that were tested, in this order.
        value: mean of the metric without the edge, in the circuit at that time.
        effect: by how much its removal lowered the mean metric; of kl, raised it.
        kept: whether it stayed.
        at_first: mean of the metric under the circuit from which ACDC started.
        at_last: mean of the metric under `unpruned`.
        n_prompts: number of prompts.
        passes: what was run, in forward passes over all prompts: rows x blocks / (prompts x blocks of the model). The passes
            without ablated edges are counted, blocks that a circuit leaves alone are not.
        discarded: the share of `passes` for removals that were run on an expectation which did not come true.
        senders: of the model's graph.
        receivers: of the model's graph.
    """

    metric: str
    tau: float
    by: By | None
    circuit: Circuit
    unpruned: Circuit
    edges: tuple[str, ...]
    value: Float[np.ndarray, " edge"]
    effect: Float[np.ndarray, " edge"]
    kept: Bool[np.ndarray, " edge"]
    at_first: float
    at_last: float
    n_prompts: int
    passes: float
    discarded: float
    senders: tuple[Node, ...]
    receivers: tuple[Node, ...]

    @cached_property
    def matrix(self) -> Float[np.ndarray, "sender receiver"]:
        """The effects by sender and receiver; NaN for what was not tested."""
        rows, columns = ({node: at for at, node in enumerate(nodes)} for nodes in (self.senders, self.receivers))
        found = np.full((len(rows), len(columns)), np.nan)
        for edge, effect in zip(self.edges, self.effect, strict=True):
            sender, receiver = parse_edge(edge)
            found[rows[sender], columns[receiver]] = effect
        return found

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per edge that was tested, in that order.

        Returns:
            A table with the columns edge, value, effect, kept, and in_circuit: kept and on a path.
        """
        in_circuit = np.array([edge in self.circuit.edges for edge in self.edges], bool)
        columns = {"value": self.value, "effect": self.effect, "kept": self.kept, "in_circuit": in_circuit}
        return table({"edge": self.edges}, columns)

    def summarise(self) -> Summary:
        """How much was kept at which cost, and the edges of the circuit whose removal would have changed most."""
        size = f"{count(len(self.circuit), 'edge')} of {count(len(self.edges), 'edge')} tested"
        how = f"mean {self.metric} of {count(self.n_prompts, 'prompt')} {three_digits(self.at_first)}"
        cost = f"{self.passes:.3g} passes over the prompts, {self.discarded:.0%} of them discarded"
        title = f"AcdcRun: {size}, tau {self.tau:g}; {how}, at the end {three_digits(self.at_last)}\n{cost}"
        kept = [at for at, edge in enumerate(self.edges) if edge in self.circuit.edges]
        top = [kept[at] for at in strongest(self.effect[kept]).tolist()]
        return Summary(title, ("strongest kept", "effect"), [(self.edges[i], f"{self.effect[i]:.3g}") for i in top])

"""Short name of `pyvene_ext.methods.circuits`: its public names."""

from pyvene_ext.methods.circuits.acdc import acdc, acdc_passes
from pyvene_ext.methods.circuits.choosing import random_circuits, top_edges, top_nodes
from pyvene_ext.methods.circuits.circuit import Circuit
from pyvene_ext.methods.circuits.running import (
    MIB_SHARES,
    completeness,
    faithfulness,
    faithfulness_curve,
    run_circuit,
    run_circuits,
)

__all__ = [
    "MIB_SHARES",
    "Circuit",
    "acdc",
    "acdc_passes",
    "completeness",
    "faithfulness",
    "faithfulness_curve",
    "random_circuits",
    "run_circuit",
    "run_circuits",
    "top_edges",
    "top_nodes",
]

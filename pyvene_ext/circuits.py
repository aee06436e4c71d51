"""Short name of `pyvene_ext.methods.attribution.circuits`: its public names."""

from pyvene_ext.methods.attribution.circuits import (
    Circuit,
    completeness,
    faithfulness,
    faithfulness_curve,
    random_circuits,
    run_circuits,
    top_edges,
)

__all__ = [
    "Circuit",
    "completeness",
    "faithfulness",
    "faithfulness_curve",
    "random_circuits",
    "run_circuits",
    "top_edges",
]

"""Short name of `pyvene_ext.methods.circuits`: its public names."""

from pyvene_ext.methods.circuits import METHODS
from pyvene_ext.methods.circuits.acdc import acdc, acdc_passes
from pyvene_ext.methods.circuits.choosing import count_all, random_circuits, top_edges, top_nodes
from pyvene_ext.methods.circuits.circuit import Circuit, named_scores
from pyvene_ext.methods.circuits.faithfulness import areas_row
from pyvene_ext.methods.circuits.files import edge_rows, load_circuit, save_circuit, save_dot
from pyvene_ext.methods.circuits.judging import (
    Halves,
    Judgement,
    Overlap,
    check_defined,
    compare,
    halves,
    jaccard,
    judge,
    overlap,
)
from pyvene_ext.methods.circuits.masks import Mask, learn_mask
from pyvene_ext.methods.circuits.running import (
    MIB_SHARES,
    completeness,
    faithfulness,
    faithfulness_curve,
    run_circuit,
    run_circuits,
)
from pyvene_ext.methods.circuits.scoring import check_scoring, score, score_cost

__all__ = [
    "METHODS",
    "MIB_SHARES",
    "Circuit",
    "Halves",
    "Judgement",
    "Mask",
    "Overlap",
    "acdc",
    "acdc_passes",
    "areas_row",
    "check_defined",
    "check_scoring",
    "compare",
    "completeness",
    "count_all",
    "edge_rows",
    "faithfulness",
    "faithfulness_curve",
    "halves",
    "jaccard",
    "judge",
    "learn_mask",
    "load_circuit",
    "named_scores",
    "overlap",
    "random_circuits",
    "run_circuit",
    "run_circuits",
    "save_circuit",
    "save_dot",
    "score",
    "score_cost",
    "top_edges",
    "top_nodes",
]

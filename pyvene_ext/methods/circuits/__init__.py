"""Circuits: sets of edges, chosen from scores, run on their own with every other edge ablated, and judged by what they recover.

Scores of edges come from `methods.attribution`; what a circuit is, how it is chosen, run and scored is here.
"""

from typing import Literal, get_args

# What `scoring.score` takes. Here, because command lines are read before anything heavy is imported.
Level = Literal["edge", "node"]
OfEdges = Literal["eap", "eap_ig_inputs", "eap_ig_activations", "path_patching", "flow", "mask", "acdc", "random"]
OfNodes = Literal["atp", "activation_patching", "mask", "random"]
METHODS: dict[Level, tuple[str, ...]] = {"edge": get_args(OfEdges), "node": get_args(OfNodes)}

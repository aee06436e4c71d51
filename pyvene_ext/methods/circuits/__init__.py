"""Circuits: sets of edges, chosen from scores, run on their own with every other edge ablated, and judged by what they recover.

Scores of edges come from `methods.attribution`; what a circuit is, how it is chosen, run and scored is here.
"""

"""Greedy decoding under many interventions in one pass.

`rows` runs the batch, `past` holds its keys and values and computes its attention, `edits` makes every row's own edits. What rows
write, and when a text ends, is the caller's (`methods.solving`).
"""

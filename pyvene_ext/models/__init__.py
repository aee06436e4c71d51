"""Models: loaded, placed on devices, hooked, identified by their weights, and run block by block.

What a family's modules are called belongs in `modelcards`; what is done to activations belongs in the rooms after this one.
"""

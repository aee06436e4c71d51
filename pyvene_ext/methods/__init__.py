"""Methods of the literature on top of the engines: patching, attribution, what heads do, reasoning.

A method takes a model and prompts and returns arrays; tables, figures and files belong in `runs`.
"""

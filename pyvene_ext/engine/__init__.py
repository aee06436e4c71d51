"""Specs run on prompts: resolved and checked once, then one metric an intervention and prompt.

`plain` defines what a spec does, one intervention at a time; `sweep` gives the same numbers fast. Methods that ask several runs
a question belong in `methods`.
"""

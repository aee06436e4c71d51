"""pyvene's IntervenableModel, checked and exact: locations, generation, intervention classes, statistics collected through it.

What a kind of intervention means belongs in `specs`; how many are run at once belongs in `engine`.
"""

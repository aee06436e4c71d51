"""pyvene's IntervenableModel, checked and exact: locations, generation, intervention classes, activation statistics.

What a kind of intervention means belongs in `specs`; how many run at once belongs in `engine`.
"""

"""The sweep engine: the numbers of the plain engine for thousands of interventions, fast and resumable.

    result = sweep(model, all_heads(model.config), prompts)             # every head of a model, one at a time
    result = sweep(model, specs, prompts, store="outputs/my_sweep")     # resumes after an interruption at any moment
    print(plan_sweep(model, specs, prompts).summary())                  # what it would do
    found = frequencies(model, specs, prompts, tau=0.1, width=0.1)      # no more prompts than the intervals need

What is saved, and why the numbers stay the same: everything before an edit, in layers and in tokens, equals the clean run and is
computed once for all interventions; so are queries, keys, values and attention of the layer whose z is edited, where the edit
only adds a difference to the output projection. Only the tokens from the edit on are run, through the model's own blocks, many
interventions at once. The last block runs the tokens at which the metric is read, mostly the last one, once all keys and values
are there, and only the logits that the metric reads are computed. Prompts of equal length run together, so that there is no
padding.

Under `accelerate launch` the processes share the work and all of them return the whole result, bit for bit that of one process.
"""

from pyvene_ext.engine.sweep.plan import Plan
from pyvene_ext.engine.sweep.run import plan_sweep, sweep
from pyvene_ext.engine.sweep.sequential import Sequential, frequencies

__all__ = ["Plan", "Sequential", "frequencies", "plan_sweep", "sweep"]

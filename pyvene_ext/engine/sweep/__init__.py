"""The sweep engine: the numbers of the plain engine for thousands of interventions, nothing computed twice, nothing lost.

    result = sweep(model, all_heads(model.config), prompts)             # every head of a model, one at a time
    result = sweep(model, specs, prompts, store="outputs/my_sweep")     # killed at any moment, the same call goes on
    print(plan_sweep(model, specs, prompts).summary())                  # what it would do
    found = frequencies(model, specs, prompts, tau=0.1, width=0.1)      # no more prompts than the intervals ask for

What is saved, and why the numbers stay the same: what lies in front of an edit, in layers and in tokens, is the clean run's and
is computed once for all interventions; so are queries, keys, values and attention of the layer whose z is edited, where the edit
is a difference on the output projection. Only the tokens behind the edit are run, through the model's own blocks, many
interventions at once. The last block is run for the last token alone, behind its keys and values, and only the logits that the
metric reads are made. Prompts of one length run together, so that there is no padding.

Under `accelerate launch` the processes share the work and all of them return the whole result, bit for bit that of one process.
"""

from pyvene_ext.engine.sweep.plan import Plan
from pyvene_ext.engine.sweep.run import plan_sweep, sweep
from pyvene_ext.engine.sweep.sequential import Sequential, frequencies

__all__ = ["Plan", "Sequential", "frequencies", "plan_sweep", "sweep"]

"""Short name of `pyvene_ext.engine.sweep`: its public names."""

from pyvene_ext.engine.sweep import Plan, Sequential, frequencies, plan_sweep, sweep

__all__ = ["Plan", "Sequential", "frequencies", "plan_sweep", "sweep"]

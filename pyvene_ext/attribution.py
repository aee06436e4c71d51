"""Short name of `pyvene_ext.methods.attribution.atp`: its public names."""

from pyvene_ext.methods.attribution.atp import atp, atp_star

__all__ = ["atp", "atp_star"]

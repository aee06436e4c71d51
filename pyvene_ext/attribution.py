"""The public names of `pyvene_ext.methods.attribution.atp`."""

from pyvene_ext.methods.attribution.atp import atp, atp_star

__all__ = ["atp", "atp_star"]

"""The public names of `pyvene_ext.methods.attribution.edges`."""

from pyvene_ext.methods.attribution.edges import edge_attribution

__all__ = ["edge_attribution"]

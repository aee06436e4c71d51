"""Short name of `pyvene_ext.methods.attribution.edges`: its public names."""

from pyvene_ext.methods.attribution.edges import edge_attribution

__all__ = ["edge_attribution"]

"""Short name of `pyvene_ext.methods.patching.patch`: its public names."""

from pyvene_ext.methods.patching.patch import Patched, all_patches, all_paths, corresponding, patch

__all__ = ["Patched", "all_patches", "all_paths", "corresponding", "patch"]

"""The public names of `pyvene_ext.methods.patching.patch`."""

from pyvene_ext.methods.patching.patch import Patched, all_patches, all_paths, corresponding, patch

__all__ = ["Patched", "all_patches", "all_paths", "corresponding", "patch"]

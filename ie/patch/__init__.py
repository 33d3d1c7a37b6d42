"""Patches: the file, its use on a model, merging, PEFT export."""

from ie.patch.patch import Patch, PatchInfo, applied

__all__ = ["Patch", "PatchInfo", "applied"]

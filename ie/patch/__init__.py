"""Patches: the file, its use on a model, stacking, merging, PEFT import and export."""

from ie.patch.info import PatchInfo
from ie.patch.live import applied
from ie.patch.patch import Patch

__all__ = ["Patch", "PatchInfo", "applied"]

"""Merging an update into the base model's checkpoint: W + ΔW, in the checkpoint's own dtype.

The original full-precision files are rewritten, never what a quantised load holds in memory. File by file, so no more
than one shard is in memory; written to a hidden sibling folder that is renamed when it is whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ie.base.fingerprint import checkpoint_files
from ie.base.model import Base
from ie.base.targets import is_transposed
from ie.base.update import Update
from ie.errors import PatchError
from ie.files import new_folder

__all__ = ["merge_checkpoint"]


def merge_checkpoint(base: Base, source: Path, update: Update, out: Path) -> None:
    """Write a copy of a checkpoint folder with an update added to its weights.

    Args:
        base: the base model, for the orientation of its modules.
        source: its checkpoint folder.
        update: a single edit (batch of one).
        out: the folder to write.

    Raises:
        PatchError: if a weight of the update is not in the checkpoint.
    """
    changes = {f"{name}.weight": _dense(base, name, update) for name in update}
    with new_folder(out) as fresh:
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy2(file, fresh / file.name)
        for file in checkpoint_files(source):
            tensors = load_file(file)
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
            for key in tensors:
                name = _matching(key, changes)
                if name is not None:
                    weight = tensors[key]
                    tensors[key] = (weight.float() + changes.pop(name)).to(weight.dtype)
            save_file(tensors, fresh / file.name, metadata=metadata)
        if changes:
            raise PatchError(f"the checkpoint {source} holds no weight named {', '.join(sorted(changes))}")


def _dense(base: Base, name: str, update: Update) -> Tensor:
    a, b = (factor[0].float().cpu() for factor in update[name])
    return a.T @ b if is_transposed(base.model.get_submodule(name)) else b.T @ a


def _matching(key: str, changes: dict[str, Tensor]) -> str | None:
    """The changed weight that a checkpoint key names; checkpoints may leave out the outermost prefix."""
    return next((name for name in changes if name == key or name.endswith(f".{key}")), None)

"""Merging an update into the base model's checkpoint: W + ΔW.

The original full-precision files are rewritten, never what a quantised load holds in memory; tensor by tensor and a
block of rows at a time (`ie.patch.shards`), so memory does not grow with the model. Written to a hidden sibling folder,
tested there, and renamed when all is well.

Rounding can eat an edit: where |ΔW| is below half a step of W's dtype, W + ΔW is W again. How much of it is left is
measured as ⟨ΔW', ΔW⟩ / ‖ΔW‖², with ΔW' the change of the rounded weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ie.base.fingerprint import INDEX, checkpoint_files
from ie.base.plan import meta_model
from ie.base.targets import is_transposed
from ie.base.update import Update
from ie.errors import ModelError, PatchError
from ie.files import new_folder
from ie.patch.shards import Change, Written, rewrite

__all__ = ["Merged", "merge_checkpoint"]

# The same weights unedited.
_TWINS = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite")


@dataclass(frozen=True)
class Merged:
    """What merging wrote.

    Attributes:
        dtype: of the changed weights.
        kept: share of the update that rounding left, over all modules.
        n_tensors: how many tensors were changed.
    """

    dtype: str
    kept: float
    n_tensors: int


def merge_checkpoint(
    source: Path,
    update: Update,
    out: Path,
    *,
    dtype: str | None = None,
    verify: Callable[[Path, Merged], None] = lambda folder, merged: None,
) -> Merged:
    """Write a copy of a checkpoint folder with an update added to its weights.

    Args:
        source: the base's checkpoint folder.
        update: a single edit (batch of one).
        out: the folder to write.
        dtype: dtype of all tensors in fp32, bf16 or fp16 that are written; None keeps each tensor's own.
        verify: called with the written folder before it takes its place; if it raises, nothing is left.

    Raises:
        PatchError: if a weight of the update is not in the checkpoint, is shared with another module, or overflows.
        ModelError: if the checkpoint cannot be read.
    """
    model = meta_model(str(source))
    changes = {f"{name}.weight": _change(model, name, update) for name in update}
    shared = [name for name in update if _is_shared(model, name)]
    if shared:
        raise PatchError(
            f"{', '.join(shared)} shares its weight with another module: merging would change both",
            hint="apply the patch in memory, or as an adapter (--peft)",
        )
    written: dict[str, Written] = {}
    with new_folder(out) as fresh:
        for file in checkpoint_files(source):
            written |= rewrite(file, fresh / file.name, changes, dtype)
        missing = sorted(changes.keys() - written.keys())
        if missing:
            raise PatchError(f"the checkpoint {source} holds no weight named {', '.join(missing)}")
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(_TWINS):
                shutil.copyfile(file, fresh / file.name)
        if dtype is not None:
            _say_dtype(fresh, dtype)
        merged = _merged(written)
        verify(fresh, merged)
    return merged


def _change(model: nn.Module, name: str, update: Update) -> Change:
    a, b = (factor[0].float().cpu() for factor in update[name])
    return Change(b, a) if not is_transposed(model.get_submodule(name)) else Change(a, b)


def _is_shared(model: nn.Module, name: str) -> bool:
    weight = model.get_submodule(name).weight
    return sum(other is weight for _, other in model.named_parameters(remove_duplicate=False)) > 1


def _merged(written: Mapping[str, Written]) -> Merged:
    energy = sum(one.energy for one in written.values())
    kept = sum(one.kept for one in written.values())
    return Merged(
        dtype=", ".join(sorted({one.dtype for one in written.values()})),
        kept=kept / energy if energy else 1.0,
        n_tensors=len(written),
    )


def _say_dtype(folder: Path, dtype: str) -> None:
    """Write the new dtype into the configuration, and the new size into the index, where there is one."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        index = folder / INDEX
        if index.is_file():
            document = json.loads(index.read_text(encoding="utf-8"))
            n_bytes = sum(file.stat().st_size for file in checkpoint_files(folder))
            document.setdefault("metadata", {})["total_size"] = n_bytes
            index.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{folder} has a broken config.json or index: {error}") from error

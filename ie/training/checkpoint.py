"""Checkpoints: everything that a training needs to go on as if nothing had happened. No pickle.

    OUT.training/                  what a run that is not finished needs; gone when the editor is written
      config.yaml                  the resolved settings
      metrics.jsonl                see `ie.training.metrics`
      checkpoint-0000200/
        state.safetensors          weights, best weights, optimiser, random state, which texts were computed together
        state.json                 everything else, and the digest of state.safetensors

A checkpoint is written into a hidden sibling and renamed when it is whole and on the disk: killed at any moment, the
earlier ones are as they were. The two newest are kept, and of those the newest that can be read is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ie.errors import InputError
from ie.files import new_folder
from ie.training.place import checkpoints

__all__ = ["Checkpoint", "discard_leftovers", "newest_checkpoint", "write_checkpoint"]

FORMAT_VERSION = 2  # 2: the base's quantisation; no best editor without validation
TENSORS, VALUES = "state.safetensors", "state.json"
_N_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        step: optimiser steps done.
        tensors: by name, on the CPU.
        values: what JSON can hold.
    """

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, whole or not at all, and remove all but the newest ones.

    Returns:
        Its folder.

    Raises:
        InputError: if it cannot be written, as on a full disk; the earlier ones are as they were.
    """
    place = folder / f"checkpoint-{checkpoint.step:07d}"
    try:
        with new_folder(place) as fresh:
            save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, fresh / TENSORS)
            document = {
                "format_version": FORMAT_VERSION,
                "step": checkpoint.step,
                "sha256": _digest(fresh / TENSORS),
                "values": checkpoint.values,
            }
            (fresh / VALUES).write_text(json.dumps(document), encoding="utf-8")
    except SafetensorError as error:
        raise InputError(f"{place} cannot be written: {error}") from error
    for old in checkpoints(folder)[_N_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def newest_checkpoint(folder: Path, on_note: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that can be read; those that cannot are named and removed.

    Args:
        folder: the run's folder.
        on_note: called with a sentence for each that cannot be used.

    Returns:
        The checkpoint, or None if the run had not come to its first.

    Raises:
        InputError: if there are checkpoints and none can be read, or one is of a newer version.
    """
    broken: list[tuple[Path, str]] = []
    found = None
    for place in checkpoints(folder):
        try:
            found = _read(place)
            break
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            broken.append((place, f"{place} cannot be used: {str(error).splitlines()[0]}"))
    if broken and found is None:
        raise InputError("; ".join(reason for _, reason in broken), hint="start anew with --force")
    for place, reason in broken:
        on_note(reason)
        shutil.rmtree(place, ignore_errors=True)
    return found


def discard_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.glob(".*.new"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _read(place: Path) -> Checkpoint:
    document = json.loads((place / VALUES).read_text(encoding="utf-8"))
    if document["format_version"] > FORMAT_VERSION:
        raise InputError(
            f"{place} has format version {document['format_version']}, this ie reads up to {FORMAT_VERSION}",
            hint="upgrade instructedit",
        )
    if document["format_version"] < FORMAT_VERSION:
        raise ValueError("it was written by an earlier ie")
    if _digest(place / TENSORS) != document["sha256"]:
        raise ValueError(f"{TENSORS} is not as it was written")
    return Checkpoint(document["step"], load_file(place / TENSORS), document["values"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Where an unfinished run keeps what it needs to go on. Nothing here loads torch."""

from __future__ import annotations

from pathlib import Path

from ie.errors import InputError

__all__ = ["check_not_begun", "checkpoints", "training_folder"]


def training_folder(out: Path) -> Path:
    """Where a run that is to write the editor `out` keeps what it needs to go on."""
    return out.with_name(f"{out.name}.training")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first, whether they can be read or not."""
    return sorted(folder.glob("checkpoint-*"), reverse=True)


def check_not_begun(out: Path) -> None:
    """Refuse to lose the checkpoints of an unfinished run.

    Raises:
        InputError: if there are any.
    """
    folder = training_folder(out)
    if checkpoints(folder):
        raise InputError(
            f"{folder} holds the checkpoints of an unfinished run",
            hint="give --resume to go on with it, or --force to start anew",
        )

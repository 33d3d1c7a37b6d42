"""Writing files and folders whole or not at all: to a hidden sibling first and to the disk, then renamed into place."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from ie.errors import InputError

__all__ = ["new_file", "new_folder"]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A sibling folder to fill, which takes the place of `out` when all went well and else leaves no trace.

    An old folder is moved aside first and deleted last, and comes back if the new one cannot take its place.

    Raises:
        InputError: if it cannot be written.
    """
    place = out.resolve()
    fresh, old = _sibling(place, "new"), _sibling(place, "old")
    try:
        with _writing(out):
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh.mkdir()
        with _writing(out, fresh):
            yield fresh
            for path in (*fresh.rglob("*"), fresh):
                _to_disk(path)
        with _writing(out):
            if place.exists():
                os.replace(place, old)
            os.replace(fresh, place)
            _to_disk(place.parent)
    finally:
        if old.exists() and not place.exists():
            os.replace(old, place)
        shutil.rmtree(fresh, ignore_errors=True)
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        elif os.path.lexists(old):
            old.unlink()


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A sibling path to write, which takes the place of `out` when all went well and else leaves no trace.

    Raises:
        InputError: if it cannot be written.
    """
    place = out.resolve()
    fresh = _sibling(place, "new")
    try:
        with _writing(out):
            place.parent.mkdir(parents=True, exist_ok=True)
        with _writing(out, fresh):
            yield fresh
            _to_disk(fresh)
        with _writing(out):
            os.replace(fresh, place)
            _to_disk(place.parent)
    finally:
        if fresh.exists():
            fresh.unlink()


@contextmanager
def _writing(out: Path, fresh: Path | None = None) -> Iterator[None]:
    """Say of an error that `out` cannot be written, unless it is of a file that does not lie below `fresh`."""
    try:
        yield
    except OSError as error:
        names = [name for name in (error.filename, error.filename2) if name is not None]
        if fresh is not None and names and not any(Path(name).is_relative_to(fresh) for name in names):
            raise
        raise InputError(
            f"{out} cannot be written: {error.strerror or error}", hint="choose a place that can be written"
        ) from error


def _to_disk(path: Path) -> None:
    """Have a file's or a folder's content on the disk: after a power cut a name must not stand for an empty file."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # not every file system can do that for a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sibling(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.{kind}")

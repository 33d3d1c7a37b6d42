"""Writing files and folders whole or not at all: to a hidden sibling first, then renamed into place."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
        if place.exists():
            os.replace(place, old)
        os.replace(fresh, place)
    except OSError as error:
        raise _unwritable(out, error) from error
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
        place.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        os.replace(fresh, place)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        if fresh.exists():
            fresh.unlink()


def _sibling(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _unwritable(out: Path, error: OSError) -> InputError:
    return InputError(f"{out} cannot be written: {error.strerror or error}", hint="choose a writable place with --out")

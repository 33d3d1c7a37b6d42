"""Paths and files, checked before anything heavy is imported; and results written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ie.errors import DataError, EditorError, InputError
from ie.source import local_folder

from .options import DEFAULT_DATA, DEFAULT_EDITOR

__all__ = [
    "check_model",
    "check_names",
    "check_new",
    "check_new_file",
    "check_new_folder",
    "read_dataset_info",
    "read_editor_info",
    "read_object",
    "split_names",
    "write_text",
]


def check_new(path: Path, *, force: bool, flag: str = "--out") -> None:
    """Refuse an output that exists, unless --force; refuse a parent that is no folder always."""
    if not force and (path.exists() or path.is_symlink()) and not _is_empty_folder(path):
        raise InputError(f"{flag} {path} exists", hint=f"give --force to overwrite it, or another {flag}")
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise InputError(f"{flag} {path}: {parent} is a file, expected a folder")
            break


def check_new_file(path: Path, *, force: bool, flag: str = "--out") -> None:
    """Refuse an output file that exists, unless --force; a folder always."""
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder, expected a file")
    check_new(path, force=force, flag=flag)


def check_new_folder(path: Path, marker: str, *, force: bool, flag: str = "--out") -> None:
    """Refuse an output folder that exists, unless --force, and even then one without a file that all of its kind hold.

    All of it would be replaced, whatever it holds.
    """
    if path.is_dir() and not _is_empty_folder(path) and not (path / marker).is_file():
        raise InputError(f"{flag} {path} holds other things: it has no {marker}", hint=f"give another {flag}")
    if path.exists() and not path.is_dir():
        raise InputError(f"{flag} {path} is a file, expected a folder")
    check_new(path, force=force, flag=flag)


def check_model(name: str) -> None:
    """Refuse what can be seen at once to be no base model; a hub id passes.

    Raises:
        ModelError: if it can be neither a folder of one nor a hub id.
    """
    local_folder(name)


def read_dataset_info(folder: Path) -> dict[str, Any]:
    """Read a dataset folder's dataset.json."""
    file = folder / "dataset.json"
    if not file.is_file():
        what = f"{folder} is no dataset: it has no dataset.json" if folder.exists() else f"no dataset at {folder}"
        command = "`ie build`" if folder == DEFAULT_DATA else f"`ie build --out {folder}`"
        raise DataError(what, hint=f"{command} makes one")
    info = read_object(file, DataError)
    tasks = info.get("tasks")
    if not isinstance(tasks, dict) or not all(isinstance(entry, dict) for entry in tasks.values()):
        raise DataError(f"{file}: `tasks` does not map tasks to their counts", hint="build the dataset again")
    return info


def read_editor_info(folder: Path) -> dict[str, Any]:
    """Read an editor folder's editor.json; its weights must be there too."""
    missing = [name for name in ("editor.json", "editor.safetensors") if not (folder / name).is_file()]
    if missing:
        what = f"{folder} is no editor: it has no {missing[0]}" if folder.exists() else f"no editor at {folder}"
        command = "`ie train`" if folder == DEFAULT_EDITOR else f"`ie train --out {folder}`"
        raise EditorError(what, hint=f"{command} makes one")
    info = read_object(folder / "editor.json", EditorError)
    if not isinstance(info.get("tasks", []), list):
        raise EditorError(f"{folder / 'editor.json'}: `tasks` is no list of tasks", hint="train the editor again")
    return info


def read_object(file: Path, kind: type[InputError]) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise kind(f"cannot read {file}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise kind(f"{file}, line {error.lineno}: broken JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise kind(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise kind(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def split_names(text: str | None, flag: str) -> tuple[str, ...]:
    """Split `A,B` into names; an empty name is an error."""
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise InputError(f"{flag} {text!r}: expected names with commas between them, such as a,b")
    return tuple(dict.fromkeys(names))


def check_names(names: Iterable[str], known: Iterable[str], flag: str, what: str) -> None:
    """Refuse names that are not among the known ones; all of them in one error."""
    known = tuple(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"{flag} {','.join(unknown)}: unknown {what}", hint=f"known here: {', '.join(known) or 'none'}"
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    from ie.files import new_file

    with new_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())

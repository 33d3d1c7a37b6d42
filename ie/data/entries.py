"""The objects of a published file before they are records, and what every layout needs to read them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ie.data.dataset import read_lines
from ie.errors import DataError

__all__ = ["Entry", "Skip", "first_text", "read_entries", "shown", "texts"]

MAX_SHOWN = 12  # fields in an error
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, but it is no text and no file can hold it


@dataclass(frozen=True)
class Entry:
    """One object of a file: the id its record gets, where it stands (for errors), and what it says."""

    id: str
    where: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Skip:
    """An input record that makes no record, and why."""

    reason: str


def read_entries(file: Path) -> tuple[list[Entry], Counter[str]]:
    """The objects of a JSON list or JSONL file, and how many of its items are none.

    Raises:
        DataError: no such file, broken JSON (with its line), or nothing in it.
    """
    skipped: Counter[str] = Counter()
    items = _items(file)
    if not items:
        raise DataError(f"{file} holds no records", hint="expected a JSON list of records, or JSONL")
    entries = []
    for where, n, item in items:
        if isinstance(item, Mapping):
            number = first_text(item.get("case_id")) or n
            entries.append(Entry(f"{file.stem}-{number}", where, item))
        else:
            skipped["not an object"] += 1
    return entries, skipped


def _items(file: Path) -> list[tuple[str, int, Any]]:
    """What a JSON list or a JSONL file holds: where, number, item."""
    if file.suffix.casefold() == ".jsonl":
        return [(f"{file}, line {n}", n, item) for n, item in read_lines(file)]
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"no such file: {file}", hint="check the path after TASK=") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # one object a line, whatever the file is called
            return [(f"{file}, line {n}", n, item) for n, item in read_lines(file)]
        raise DataError(
            f"{file}, line {error.lineno}: broken JSON: {error.msg}", hint="expected a JSON list of records, or JSONL"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}", hint="expected JSON or JSONL in UTF-8") from error
    if isinstance(content, Mapping):
        raise DataError(
            f"{file} holds one object with the fields {shown(content)}, expected a list of records",
            hint="put records in [ ], or one a line in a .jsonl file",
        )
    if not isinstance(content, list):
        raise DataError(f"{file} holds a {type(content).__name__}", hint="expected a JSON list of records, or JSONL")
    return [(f"{file}, record {n}", n, item) for n, item in enumerate(content, start=1)]


def shown(fields: Collection[str]) -> str:
    """The names of fields for an error, cut where they would fill the screen."""
    names = sorted(fields)
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return (", ".join(names[:MAX_SHOWN]) + more) or "(none)"


def first_text(value: Any) -> str:
    """A text without white space around it; of (nested) aliases the first; empty for anything else."""
    if isinstance(value, str):
        return LONE_SURROGATE.sub("\ufffd", value).strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return next((text for text in map(first_text, value) if text), "")
    return ""


def texts(value: Any) -> tuple[str, ...]:
    """The texts of a list, or the one text that stands in a list's place."""
    return tuple(text for text in map(first_text, value if isinstance(value, list) else [value]) if text)

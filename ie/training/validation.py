"""What validation looks at: records of every task, and how they are edited."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ie.base.model import Base
from ie.base.update import Factors, Update
from ie.data.record import Record
from ie.editor.editor import JOINT, Editor
from ie.editor.methods import Method, editor_method, joint_update
from ie.editor.request import EditRequest

__all__ = ["spread", "validated"]


def spread(records: Sequence[Record], n: int, seed: int) -> list[Record]:
    """At most n records, drawn evenly from the tasks."""
    stream = _rounds(records, random.Random(seed))
    return [record for record, _ in zip(stream, range(n), strict=False)]


def _rounds(records: Sequence[Record], rng: random.Random) -> Iterator[Record]:
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    for group in by_task.values():
        rng.shuffle(group)
    for place in range(max(map(len, by_task.values()), default=0)):
        yield from (group[place] for group in by_task.values() if place < len(group))


def validated(editor: Editor, size: int) -> Method:
    """How validation records are edited: each alone, or all in one update where that is what the editor is for."""
    if editor.settings.method == JOINT:
        return lambda base, requests: joint_update(base, editor, requests, None, size)
    return _in_batches(editor_method(editor), size)


def _in_batches(method: Method, size: int) -> Method:
    """The same method, a few requests at a time: the signals of all validation edits at once need gigabytes."""

    def edit(base: Base, requests: Sequence[EditRequest]) -> Update:
        parts = [method(base, requests[start : start + size]) for start in range(0, len(requests), size)]
        joined: dict[str, Factors] = {}
        for name in parts[0]:
            rank = max(part[name][0].shape[1] for part in parts)
            a, b = (
                torch.cat(
                    [nn.functional.pad(part[name][i], (0, 0, 0, rank - part[name][i].shape[1])) for part in parts]
                )
                for i in (0, 1)
            )
            joined[name] = (a, b)
        return joined

    return edit

"""Which instruction a record is edited with when an editor is judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ie.data.record import Record

__all__ = ["heldout_instructions"]


def heldout_instructions(records: Sequence[Record]) -> list[str | None]:
    """One held-out wording for each record, a task's styles taking turns; None for a record without instructions."""
    out: list[str | None] = []
    turns: Counter[str] = Counter()
    for record in records:
        texts = record.instruction.heldout or record.instruction.train
        out.append(texts[turns[record.task] % len(texts)] if texts else None)
        turns[record.task] += 1
    return out

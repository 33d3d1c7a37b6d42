"""Which instruction a record is edited with when an editor is judged."""

from __future__ import annotations

from collections.abc import Sequence

from ie.data.record import Record

__all__ = ["heldout_instructions"]


def heldout_instructions(records: Sequence[Record]) -> list[str | None]:
    """One held-out wording for each record, the styles taking turns; None for a record without instructions."""
    out: list[str | None] = []
    for i, record in enumerate(records):
        texts = record.instruction.heldout or record.instruction.train
        out.append(texts[i % len(texts)] if texts else None)
    return out

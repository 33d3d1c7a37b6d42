"""The edit request: what a user asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ie.base.model import Base
from ie.data.record import Record
from ie.data.tokens import TokenBatch

__all__ = ["EditRequest", "collate_requests", "plain"]


@dataclass(frozen=True)
class EditRequest:
    """One change: let the base model continue `prompt` with `target`.

    Attributes:
        prompt: the prompt to change the answer of.
        target: the new answer.
        instruction: what kind of change this is; None for a method that reads none.
    """

    prompt: str
    target: str
    instruction: str | None = None

    @classmethod
    def of(cls, record: Record, instruction: str | None) -> EditRequest:
        """The request that a record makes."""
        return cls(record.prompt, record.target, instruction)


def plain(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests without their instructions, as a user would ask."""
    return [EditRequest(request.prompt, request.target) for request in requests]


def collate_requests(base: Base, requests: Sequence[EditRequest]) -> TokenBatch:
    """Tokenise requests into one batch, a row each; a target ends as the base's own answers do."""
    return base.collate([base.encode(r.prompt, r.target, r.instruction, base.ending) for r in requests])
